"""`POST /query` and `/query_by_hash` for routers that speak to Mooncake's or Dynamo's indexer."""

from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from kvindex_server import _core
from kvindex_server.errors import InvalidArgument, NotFound
from kvindex_server.lookup import BlocksQuery, Check, Located, Lookup, ScoreQuery
from kvindex_server.models import Models
from kvindex_server.pods import PodSpec
from kvindex_server.rest import Calls, Fields
from kvindex_server.score import PodScore
from kvindex_server.stream import StreamStatus
from kvindex_server.web import Routes

TENANT = "default"
"""The only tenant: what keeps tenants apart here is `cache_salt`."""
_DEVICE = "gpu"
_NAMED = (_DEVICE, "cpu", "disk")
_MASK = (1 << 64) - 1


class Limits(Protocol):
    """Bounds on one request."""

    @property
    def max_tokens(self) -> int: ...
    @property
    def max_keys(self) -> int: ...


class Fleet(Protocol):
    """What is asked of the fleet."""

    def registrations(self) -> list[tuple[PodSpec, bool]]: ...
    def statuses(self, model: str | None = None) -> list[StreamStatus]: ...


@dataclass(slots=True)
class _Reach:
    """How many leading blocks one rank holds: on any tier, on each tier alone, on each or a faster one."""

    any: int
    alone: dict[str, int]
    through: dict[str, int]


def routes(calls: Calls, lookup: Lookup, models: Models, fleet: Fleet, limits: Limits) -> Routes:
    """The two paths. A request that names `model` is answered as Mooncake answers, one with `model_name` as Dynamo."""

    def query(fields: Fields, check: Check) -> Mapping[str, object]:
        asked = _asked(fields, by_hash=False)
        ids = fields.numbers("token_ids", limits.max_tokens)
        try:
            tokens = array("I", ids).tobytes()
        except OverflowError:
            raise InvalidArgument("token_ids", "each must be in 0..4294967295") from None
        lora, salt = fields.text("lora_name", ""), fields.text("cache_salt", "")
        fields.done()
        _check_block_size(models, asked)
        named = ScoreQuery(asked.model, "tokens", tokens=tokens, pods=asked.pods, lora_name=lora, cache_salt=salt)
        return _answer(asked, named, 4, check)

    def query_by_hash(fields: Fields, check: Check) -> Mapping[str, object]:
        asked = _asked(fields, by_hash=True)
        name = "block_hashes" if asked.shape == "dynamo" else "seq_hashes"
        if asked.shape == "mooncake" and "block_hash" in fields and name not in fields:
            name = "block_hash"  # as earlier drafts of that interface call it
        hashes = _words(name, fields.numbers(name, limits.max_keys))
        for extra in ("lora_name", "cache_salt"):
            if fields.text(extra, ""):
                raise InvalidArgument(extra, "cannot be added to hashes: make them with it, or use /query")
        fields.done()
        _check_block_size(models, asked)
        if asked.shape == "dynamo":
            hashes = _chained(hashes, models.get(asked.model).index.seed)
        return _answer(asked, ScoreQuery(asked.model, "keys", keys=hashes, pods=asked.pods), 8, check)

    def _answer(asked: _Asked, named: ScoreQuery, width: int, check: Check) -> Mapping[str, object]:
        answer = lookup.score(named, check)
        name = models.get(asked.model).name
        ranks = {spec.pod: spec.ranks for spec, _ in fleet.registrations() if spec.model == name}
        unknown = [pod for pod in asked.pods if pod not in ranks]
        if unknown:
            raise NotFound(f"instance_id: {unknown[0]!r} is not registered for model {asked.model!r}")
        reaches = {
            each.pod: {rank: _Reach(0, {}, {}) for rank in range(ranks.get(each.pod, 1))} for each in answer.scores
        }
        # A tier alone can hide behind a faster one in a score, but not in what a stream holds in all.
        held_on: dict[str, set[str]] = {}
        if asked.shape == "mooncake":
            for status in fleet.statuses(name):
                held_on.setdefault(status.pod, set()).update(status.blocks_by_tier)
        at_length = []
        for each in answer.scores:
            if not each.matched_blocks:
                continue
            tiers = held_on.get(each.pod, set()) | set(each.tier_blocks)
            if tiers <= {_DEVICE} and ranks.get(each.pod) == 1 and not each.speculative_blocks:
                blocks = each.matched_blocks
                reaches[each.pod] = {each.rank: _Reach(blocks, {_DEVICE: blocks}, dict.fromkeys(_NAMED, blocks))}
            else:
                at_length.append(each)
        if at_length:
            blocks = max(each.matched_blocks for each in at_length)
            step = width * (answer.block_size if named.kind == "tokens" else 1)
            part = BlocksQuery(
                named.model,
                named.kind,
                tokens=named.tokens[: blocks * step],
                keys=named.keys[: blocks * step],
                pods=tuple([each.pod for each in at_length]),
                lora_name=named.lora_name,
                cache_salt=named.cache_salt,
            )
            found = lookup.blocks(part, check)
            for pod, of_pod in _reaches(at_length, [holders for _, holders in found.blocks], found.tiers).items():
                reaches[pod].update(of_pod)
        return _SHAPES[asked.shape](answer.scores, reaches, answer.block_size)

    return {
        ("POST", "/query"): calls.handler("/query", query),
        ("POST", "/query_by_hash"): calls.handler("/query_by_hash", query_by_hash),
    }


@dataclass(frozen=True, slots=True)
class _Asked:
    shape: Literal["mooncake", "dynamo"]
    model: str
    pods: tuple[str, ...]
    block_size: int | None


def _asked(fields: Fields, *, by_hash: bool) -> _Asked:
    mooncake, dynamo = "model" in fields, "model_name" in fields
    if mooncake == dynamo:
        raise InvalidArgument("model", "not together with model_name" if mooncake else "or model_name is required")
    for name in ("tenant_id", *(() if mooncake else ("routing_group",))):
        if fields.text(name, TENANT) != TENANT:
            raise InvalidArgument(name, f"only {TENANT!r} is known: keep tenants apart by cache_salt")
    model = fields.text("model" if mooncake else "model_name")
    if not mooncake:
        return _Asked("dynamo", model, (), None)
    pod = fields.text("instance_id", "")
    return _Asked("mooncake", model, (pod,) if pod else (), fields.number("block_size"))


def _check_block_size(models: Models, asked: _Asked) -> None:
    known = models.get(asked.model).index.block_size
    if known and asked.block_size not in (None, known):
        raise InvalidArgument("block_size", f"is not the model's block size {known}")


def _words(name: str, values: list[int]) -> bytes:
    """u64 little-endian. Senders without unsigned numbers write the upper half as negative ones."""
    if not (min(values) >= -(1 << 63) and max(values) <= _MASK):
        raise InvalidArgument(name, "each must fit into 64 bits")
    if min(values) < 0:
        values = [each & _MASK for each in values]
    return array("Q", values).tobytes()


def _chained(local: bytes, seed: int) -> bytes:
    """Keys of prefixes from the hashes of single blocks."""
    key = local[:8]
    keys = [key]
    for at in range(8, len(local), 8):
        key = _core.xxh3_64(key + local[at : at + 8], seed).to_bytes(8, "little")
        keys.append(key)
    return b"".join(keys)


def _reaches(
    scores: Sequence[PodScore], held: Sequence[Sequence[Located]], tiers: Sequence[str]
) -> dict[str, dict[int, _Reach]]:
    """Of each rank of these pods, as far as its pod's own match goes."""
    masks: dict[tuple[str, int], list[int]] = {}
    groups: dict[tuple[str, int], set[int]] = {}
    for at, holders in enumerate(held):
        for pod, rank, tier, group, speculative in holders:
            if speculative:
                continue
            of_rank = masks.get((pod, rank))
            if of_rank is None:
                of_rank = masks[pod, rank] = [0] * len(held)
                groups[pod, rank] = set()
            of_rank[at] |= 1 << tier
            groups[pod, rank].add(group)
    reaches: dict[str, dict[int, _Reach]] = {}
    for score in scores:
        whole = score.matched_blocks
        # What a rank with several KV-cache groups needs of each only the core can tell: it has for the best rank.
        reaches[score.pod] = {
            rank: _reach(of_rank[:whole], tiers)
            for (pod, rank), of_rank in masks.items()
            if pod == score.pod and len(groups[pod, rank]) == 1
        }
        if score.rank not in reaches[score.pod]:
            slowest = max((tiers.index(tier) for tier in score.tier_blocks), default=0)
            through = {tier: whole for bit, tier in enumerate(tiers) if bit >= slowest}
            alone = dict.fromkeys(score.tier_blocks, whole) if len(score.tier_blocks) == 1 else {}
            reaches[score.pod][score.rank] = _Reach(whole, alone, through)
    return reaches


def _reach(masks: Sequence[int], tiers: Sequence[str]) -> _Reach:
    alone = {tier: _leading(masks, 1 << bit) for bit, tier in enumerate(tiers)}
    through = {tier: _leading(masks, (2 << bit) - 1) for bit, tier in enumerate(tiers)}
    return _Reach(_leading(masks, -1), alone, through)


def _leading(masks: Sequence[int], wanted: int) -> int:
    return next((at for at, mask in enumerate(masks) if not mask & wanted), len(masks))


_Reaches = Mapping[str, Mapping[int, _Reach]]


def _mooncake(scores: Sequence[PodScore], reaches: _Reaches, block_size: int) -> dict[str, object]:
    instances: dict[str, object] = {}
    for each in scores:
        ranks = reaches[each.pod]
        tiers = dict.fromkeys(_NAMED, 0)
        for reach in ranks.values():
            for tier, blocks in reach.alone.items():
                if blocks or tier in tiers:
                    tiers[tier] = max(tiers.get(tier, 0), blocks)
        instances[each.pod] = {
            "longest_matched": each.matched_blocks * block_size,
            **{tier.upper(): blocks * block_size for tier, blocks in tiers.items()},
            "DP": {str(rank): reach.any * block_size for rank, reach in sorted(ranks.items())},
        }
    return {TENANT: instances}


def _dynamo(scores: Sequence[PodScore], reaches: _Reaches, block_size: int) -> dict[str, object]:
    instances: dict[str, object] = {}
    device: dict[str, dict[str, int]] = {}
    depths: list[int] = []
    for each in scores:
        ranks = reaches[each.pod]
        device[each.pod] = {
            str(rank): reach.through.get(_DEVICE, 0) * block_size for rank, reach in sorted(ranks.items())
        }
        depths += [reach.through.get(_DEVICE, 0) for reach in ranks.values()]
        tiers = {
            tier: max((reach.through.get(tier, 0) for reach in ranks.values()), default=0) * block_size
            for tier in _NAMED
        }
        instances[each.pod] = {
            "longest_matched": each.matched_blocks * block_size,
            "gpu": tiers["gpu"],
            "dp": device[each.pod],
            "cpu": tiers["cpu"],
            # What lies on a tier of another name is beyond the device and the host, as a disk is.
            "disk": each.matched_blocks * block_size,
        }
    frequencies = [sum(depth > at for depth in depths) for at in range(max(depths, default=0))]
    return {"scores": device, "frequencies": frequencies, "instances": instances}


_SHAPES: Mapping[str, Callable[[Sequence[PodScore], _Reaches, int], dict[str, object]]] = {
    "mooncake": _mooncake,
    "dynamo": _dynamo,
}
