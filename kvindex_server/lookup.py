"""The read path on one screen: a request's prompt becomes keys, and the index says who holds them."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from kvindex_server import _core
from kvindex_server.errors import FailedPrecondition, InvalidArgument, NotFound, ResourceExhausted
from kvindex_server.models import Model, Models
from kvindex_server.score import PodScore, Weights, ranked
from kvindex_server.stream import Trust
from kvindex_server.tokenize.media import spread
from kvindex_server.tokenize.tokenizer import NO_DEADLINE, AnyTokenizer, Body, Keyed

Check = Callable[[], None]
"""Called between stages; raises when the caller's deadline has passed or the caller is gone.

Its attribute `remaining`, if it has one, gives the seconds that are left, or None without a deadline.
"""

_MAX_MEDIA = 64 << 20
"""Bytes: each block's key covers the hashes of all media that touch it."""

Kind = Literal["prompt", "chat", "tokens", "keys", "engine_hashes"]
Located = tuple[str, int, int, int, bool]
"""A holder as the index says it: (pod, rank, tier bit, group, speculative)."""


@dataclass(frozen=True, slots=True)
class Query:
    """A checked request: a model, one prompt (`kind` says its form), and what makes equal tokens differ."""

    model: str
    kind: Kind
    text: str = ""
    tokens: bytes = b""  # u32 little-endian
    keys: bytes = b""  # u64 little-endian
    pods: tuple[str, ...] = ()
    lora_name: str = ""
    cache_salt: str = ""
    mm_features: tuple[tuple[str, int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class ScoreQuery(Query):
    """How much of this prompt does each pod hold?"""

    top_k: int = 0


@dataclass(frozen=True, slots=True)
class BlocksQuery(Query):
    """Who holds each of these blocks? Engine hashes come as u64 little-endian, or as byte strings."""

    engine_ints: bytes = b""
    engine_bytes: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class PlacementQuery(Query):
    """This prompt has been sent to this pod. `ttl` is in seconds; without a rank the index guesses."""

    pod: str = ""
    rank: int | None = None
    ttl: float = 0.0


@dataclass(frozen=True, slots=True)
class UsageQuery:
    """After a request: prompt tokens foreseen to be cached on the pod, and found; `prompt_tokens` 0 is not known."""

    model: str
    pod: str
    predicted_tokens: int
    cached_tokens: int
    prompt_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as it is looked up; no tokens when the caller sent keys."""

    model: Model
    lora_name: str
    tokens: bytes
    keys: bytes
    block_size: int
    total_tokens: int


@dataclass(frozen=True, slots=True)
class ScoreAnswer:
    """What is answered to a ScoreQuery."""

    scores: list[PodScore]
    total_blocks: int
    block_size: int
    total_tokens: int


@dataclass(frozen=True, slots=True)
class BlocksAnswer:
    """What is answered to a BlocksQuery: per block its key (0 when not known) and its holders."""

    blocks: list[tuple[int, list[Located]]]
    tiers: Sequence[str]
    block_size: int


@dataclass(frozen=True, slots=True)
class PlacementAnswer:
    """What is answered to a PlacementQuery: where it counts, for how many seconds, and the blocks that need none."""

    total_blocks: int
    held_blocks: int
    rank: int
    ttl: float


class Fleet(Protocol):
    """What the read path asks of the fleet."""

    def pods(self, model: str) -> list[str]: ...
    def trust(self, model: str, pod: str, rank: int | None = None) -> tuple[Trust, str, float]: ...


class Metrics(Protocol):
    """What the read path measures."""

    def observe_stage(self, stage: str, seconds: float) -> None: ...
    def observe_lookup(self, model: str, blocks: int, best_match: int) -> None: ...
    def unknown_tier(self, model: str, tier: str) -> None: ...
    def observe_usage(self, model: str, predicted: int, cached: int) -> None: ...


class Lookup:
    """Answers queries; safe from many threads, keeps nothing between them."""

    def __init__(
        self,
        models: Models,
        fleet: Fleet,
        tier_weights: Mapping[str, float],
        metrics: Metrics,
        max_tokens: int = 2_097_152,
    ) -> None:
        self._models = models
        self._fleet = fleet
        self._weights = Weights(tier_weights)
        self._metrics = metrics
        self._max_tokens = max_tokens

    def score(self, query: ScoreQuery, check: Check) -> ScoreAnswer:
        """One PodScore per candidate; without candidates, per pod of the model."""
        started = time.perf_counter()
        model, lora = self._models.resolve(query.model)
        keys, block_size, total_tokens = self._keys(model, lora, query, check)
        candidates = query.pods or tuple(self._fleet.pods(model.name))
        matching = time.perf_counter()
        matches = model.index.score(keys, candidates, self.weights(model)) if candidates else []
        # Read again: a tier first seen a moment ago may be in the answer, and tiers are only ever added.
        scores = ranked(candidates, matches, model.index.tiers, query.top_k)
        self._metrics.observe_stage("match", time.perf_counter() - matching)
        check()
        self._add_trust(model, scores)
        for tier in self._weights.unknown({tier for each in scores for tier in each.tier_blocks}):
            self._metrics.unknown_tier(model.name, tier)
        total_blocks = len(keys) // 8
        best = max((match[2] for match in matches), default=0)
        self._metrics.observe_lookup(model.name, total_blocks, best)
        self._metrics.observe_stage("total", time.perf_counter() - started)
        return ScoreAnswer(scores, total_blocks, block_size, total_tokens)

    def blocks(self, query: BlocksQuery, check: Check) -> BlocksAnswer:
        """The holders of each block, in the query's order."""
        model, lora = self._models.resolve(query.model)
        index = model.index
        found: list[tuple[int, list[Located]]]
        if query.kind != "engine_hashes":
            keys, _, _ = self._keys(model, lora, query, check)
            held = index.holders(keys, query.pods)
            found = list(zip(memoryview(keys).cast("Q"), held, strict=True))
        elif query.engine_bytes:
            found = _known(index.holders_of_bytes(query.engine_bytes, query.pods))
        else:
            found = _known(index.holders_of_ints(query.engine_ints, query.pods))
        check()
        return BlocksAnswer(found, index.tiers, index.block_size)

    def place(self, query: PlacementQuery, check: Check) -> PlacementAnswer:
        """Record the router's decision. NotFound when the pod is not registered for the model."""
        model, lora = self._models.resolve(query.model)
        keys, _, _ = self._keys(model, lora, query, check)
        rank = -1 if query.rank is None else query.rank
        outcome, rank, held = model.index.place(query.pod, rank, keys, query.ttl)
        if outcome == "no_pod":
            raise NotFound(f"pod: {query.pod!r} is not registered for model {query.model!r}")
        if outcome == "no_rank":
            raise InvalidArgument("rank", f"the pod has no rank {query.rank}")
        if outcome == "no_room":
            raise ResourceExhausted("as many blocks are placed as the model may have: see placement.max_blocks")
        return PlacementAnswer(len(keys) // 8, held, rank, query.ttl)

    def report(self, query: UsageQuery) -> None:
        """Measure how far a prediction was off. NotFound when the pod is not registered for the model."""
        model = self._models.get(query.model)
        if query.pod not in self._fleet.pods(model.name):
            raise NotFound(f"pod: {query.pod!r} is not registered for model {query.model!r}")
        self._metrics.observe_usage(model.name, query.predicted_tokens, query.cached_tokens)

    def prompt(self, query: Query, check: Check) -> Prompt:
        """The tokens and keys of a prompt, for who wants to see them; answers a router nothing."""
        model, lora = self._models.resolve(query.model)
        if query.kind == "keys":
            keys, block_size, total = self._keys(model, lora, query, check)
            return Prompt(model, query.lora_name or lora, b"", keys, block_size, total)
        tokens = query.tokens if query.kind == "tokens" else self._tokenize(model, query, check)
        keys, block_size, total = self._keys_of_tokens(model, lora, query, tokens, check)
        return Prompt(model, query.lora_name or lora, tokens, keys, block_size, total)

    def standings(self, model: Model, keys: bytes, pods: Sequence[str]) -> list[PodScore]:
        """What `score` says of these keys, without being counted as a request; without pods, all of the model."""
        candidates = pods or self._fleet.pods(model.name)
        matches = model.index.score(keys, candidates, self.weights(model)) if candidates else []
        scores = ranked(candidates, matches, model.index.tiers)
        self._add_trust(model, scores)
        return scores

    def weights(self, model: Model) -> list[float]:
        """By tier bit of the model's index."""
        return self._weights.of(model.index.tiers)

    def _add_trust(self, model: Model, scores: Sequence[PodScore]) -> None:
        for each in scores:
            rank = each.rank if each.hit else None
            each.trust, each.trust_reason, each.age_seconds = self._fleet.trust(model.name, each.pod, rank)

    def _keys(self, model: Model, lora: str, query: Query, check: Check) -> tuple[bytes, int, int]:
        """(keys, block size, total tokens) of the prompt; no keys while the block size is not known."""
        block_size = model.index.block_size
        if query.kind == "keys":  # made by the caller: LoRA, salt and media are in them already
            return query.keys, block_size, len(query.keys) // 8 * block_size
        if query.kind in ("prompt", "chat") and block_size and not query.mm_features:
            kind: Literal["prompt", "chat"] = "chat" if query.kind == "chat" else "prompt"
            keyed = self.keys_of_text(model, kind, query.text, query.lora_name or lora, query.cache_salt, check)
            return keyed.keys, block_size, keyed.tokens
        tokens = query.tokens if query.kind == "tokens" else self._tokenize(model, query, check)
        return self._keys_of_tokens(model, lora, query, tokens, check)

    def _keys_of_tokens(
        self, model: Model, lora: str, query: Query, tokens: bytes, check: Check
    ) -> tuple[bytes, int, int]:
        check()
        block_size, total = model.index.block_size, len(tokens) // 4
        for _, offset, length in query.mm_features:
            if offset + length > total:
                raise InvalidArgument("mm_features", f"offset + length is beyond the {total} tokens")
        if not block_size:
            return b"", 0, total
        if (
            sum((length // block_size + 2) * (len(name.encode()) + 5) for name, _, length in query.mm_features)
            > _MAX_MEDIA
        ):
            raise InvalidArgument("mm_features", "too many long features over too many blocks")
        started = time.perf_counter()
        keys = _core.block_keys(
            tokens,
            block_size,
            model.index.seed,
            query.lora_name or lora,
            query.cache_salt,
            query.mm_features,
        )
        self._metrics.observe_stage("hash", time.perf_counter() - started)
        check()
        return keys, block_size, total

    def keys_of_text(
        self, model: Model, kind: Literal["prompt", "chat"], text: Body, lora_name: str, cache_salt: str, check: Check
    ) -> Keyed:
        """Straight from text to keys, so that what was seen before is neither encoded nor hashed again.

        The model's block size must be known. FailedPrecondition when it has no tokenizer.
        """
        tokenizer = _tokenizer_of(model)
        started = time.perf_counter()
        keyed = tokenizer.keys(
            kind,
            text,
            model.index.block_size,
            model.index.seed,
            lora_name,
            cache_salt,
            max_tokens=self._max_tokens,
            seconds=_seconds_left(check),
        )
        self._metrics.observe_stage("tokenize", time.perf_counter() - started)
        check()
        return keyed

    def _tokenize(self, model: Model, query: Query, check: Check) -> bytes:
        tokenizer = _tokenizer_of(model)
        started = time.perf_counter()
        encode = tokenizer.encode_chat if query.kind == "chat" else tokenizer.encode_prompt
        tokens = encode(query.text, max_tokens=self._max_tokens, seconds=_seconds_left(check))
        if query.mm_features:
            tokens = spread(tokens, query.mm_features, self._max_tokens)
        self._metrics.observe_stage("tokenize", time.perf_counter() - started)
        return tokens


def _known(found: Sequence[tuple[int | None, list[Located]]]) -> list[tuple[int, list[Located]]]:
    """A name by which pods know different blocks has no key."""
    return [(key or 0, holders) for key, holders in found]


def _tokenizer_of(model: Model) -> AnyTokenizer:
    if model.tokenizer is None:
        raise FailedPrecondition(
            f"model {model.name!r} has no tokenizer: start the server with --tokenizer MODEL=DIR, set "
            "text.tokenizer_dirs or the model's tokenize_url, or send tokens or keys"
        )
    return model.tokenizer


def _seconds_left(check: Check) -> float:
    """What the caller's deadline leaves; a check without a deadline has no end."""
    remaining = getattr(check, "remaining", None)
    left = remaining() if remaining is not None else None
    return NO_DEADLINE if left is None else left
