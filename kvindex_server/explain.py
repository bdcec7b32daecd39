"""Explains one lookup: where each pod's match ends, and why it is no longer than that."""

import enum
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from kvindex_server import _core
from kvindex_server._core import Left
from kvindex_server.doctor.facts import NO_SALT, NOR_SALT
from kvindex_server.lookup import Check, Located, Lookup, Prompt, Query
from kvindex_server.models import Model
from kvindex_server.removals import Departure, Memory, remembered, shown
from kvindex_server.score import PodScore
from kvindex_server.stream import StreamStatus, Trust

MAX_PODS = 64
MAX_RUN_BLOCKS = 1024
"""Of one pod: a Python object is made of each of them."""
AHEAD_BLOCKS = 256
"""So far behind the end of a match it is looked for blocks that are still held."""
MAX_ADAPTERS = 16
"""So many of the model's known adapters are tried, those first that engines have named."""


class End(enum.IntEnum):
    """Why a match ends; the values are those of the proto's MatchEnd."""

    WHOLE_PROMPT = 1
    NO_BLOCK_SIZE = 2
    NO_FULL_BLOCK = 3
    NOT_REGISTERED = 4
    NOTHING_HEARD = 5
    REMOVED = 6
    OTHER_RANK = 7
    OTHER_GROUP = 8
    OTHER_CONTEXT = 9
    ELSEWHERE = 10
    UNKNOWN_KEY = 11
    CLEARED = 12
    DROPPED = 13
    NEVER_STORED = 14


Streams = Callable[[str], Sequence[StreamStatus]]
"""The streams of a model (its real name) that are followed here."""
Adapters = Callable[[str], Sequence[str]]
"""The adapters that engines of a model (its real name) have named."""

_ABOUT_NO_STREAM = (End.NO_BLOCK_SIZE, End.NO_FULL_BLOCK, End.NOT_REGISTERED, End.WHOLE_PROMPT)
_END_OF = {Left.REMOVED: End.REMOVED, Left.CLEARED: End.CLEARED}


@dataclass(slots=True)
class PodExplanation:
    """One pod's match: its score, its end, and (tier, blocks) from the beginning."""

    score: PodScore
    end: End
    why: str
    runs: list[tuple[str, int]] = field(default_factory=list)
    left: list[tuple[Departure, str]] = field(default_factory=list)
    """How the block behind the match left the rank, latest first, and which tier."""
    memory: Memory | None = None
    """Of the rank that the match is of; without a match, of the rank that `left` tells of."""
    stale_since: float = 0.0
    """Seconds since 1970; 0 when the match's rank is not STALE."""


@dataclass(slots=True)
class Explanation:
    """The prompt as it was looked up, and the best pods' matches."""

    prompt: Prompt
    pods: list[PodExplanation]
    more_pods: int


class Explainer:
    """Answers Explain; safe from many threads."""

    def __init__(self, lookup: Lookup, streams: Streams, adapters: Adapters) -> None:
        self._lookup = lookup
        self._streams = streams
        self._adapters = adapters

    def explain(self, query: Query, check: Check) -> Explanation:
        """At most MAX_PODS pods, best first. Errors as of Lookup.score."""
        prompt = self._lookup.prompt(query, check)
        scores = self._lookup.standings(prompt.model, prompt.keys, query.pods)
        check()
        others = self.other_contexts(prompt, query, check)
        shown_pods = {each.pod for each in scores[:MAX_PODS]}
        streams: dict[str, list[StreamStatus]] = {pod: [] for pod in shown_pods}
        for status in self._streams(prompt.model.name):
            if status.pod in shown_pods:
                streams[status.pod].append(status)
        pods = []
        for score in scores[:MAX_PODS]:
            pods.append(self._explained(prompt, score, others, streams[score.pod]))
            check()
        return Explanation(prompt, pods, max(0, len(scores) - MAX_PODS))

    def adapters(self, model: Model) -> Sequence[str]:
        """Names of a model's adapters: those that its engines have named, then those that are configured."""
        return list(dict.fromkeys([*self._adapters(model.name), *model.loras]))

    def other_contexts(self, prompt: Prompt, query: Query, check: Check) -> Mapping[str, Mapping[str, int]]:
        """Blocks per pod of the same tokens with other adapters, without the salt, and both, as far as can be tried."""
        if not prompt.tokens or not prompt.block_size:
            return {}
        others = [name for name in self.adapters(prompt.model) if name != prompt.lora_name]
        adapters = {f"adapter {name!r}": name for name in others[:MAX_ADAPTERS]}
        if prompt.lora_name:
            adapters["no adapter"] = ""
        tries = {label: (name, query.cache_salt) for label, name in adapters.items()}
        if query.cache_salt:
            tries[NO_SALT] = (prompt.lora_name, "")
            tries |= {f"{label}{NOR_SALT}": (name, "") for label, name in adapters.items()}
        found: dict[str, Mapping[str, int]] = {}
        for label, (lora_name, salt) in tries.items():
            keys = _core.block_keys(
                prompt.tokens, prompt.block_size, prompt.model.index.seed, lora_name, salt, query.mm_features
            )
            scores = self._lookup.standings(prompt.model, keys, query.pods)
            found[label] = {each.pod: each.matched_blocks for each in scores if each.matched_blocks}
            check()
        return found

    def _explained(
        self,
        prompt: Prompt,
        score: PodScore,
        others: Mapping[str, Mapping[str, int]],
        streams: Sequence[StreamStatus],
    ) -> PodExplanation:
        at, runs = score.matched_blocks, self._runs(prompt, score)
        lower = runs[0][1] if len(runs) > 1 else at  # the first block on another tier than the match begins on
        keys = prompt.keys[at * 8 : at * 8 + 8] + (prompt.keys[lower * 8 : lower * 8 + 8] if lower < at else b"")
        memories = {each.rank: each for each in remembered(prompt.model.index, score.pod, keys)} if keys else {}
        end, why, memory = self._end(prompt, score, others, streams, memories)
        tiers = prompt.model.index.tiers
        left = memory.left[0] if memory is not None and at * 8 < len(prompt.keys) else ()
        explanation = PodExplanation(score, end, why, runs, [(each, tiers[each.tier]) for each in left], memory)
        if lower < at:
            explanation.why += f"; from block {lower} on the match lies on {runs[1][0]}"
            moved = [each for each in memory.left[-1] if tiers[each.tier] == runs[0][0]] if memory is not None else []
            if moved:
                explanation.why += f": {moved[0].words(lower, tiers[moved[0].tier])}"
        stale = [each.stale_since for each in streams if each.stale_since and (each.rank == score.rank or not at)]
        explanation.stale_since = min(stale, default=0.0)
        if score.trust in (Trust.STALE, Trust.PARTIAL) and end not in _ABOUT_NO_STREAM:
            since = f" since {shown(explanation.stale_since)}" if explanation.stale_since else ""
            explanation.why += f"; the stream is {score.trust.name}{since}: {score.trust_reason}"
        return explanation

    def _end(
        self,
        prompt: Prompt,
        score: PodScore,
        others: Mapping[str, Mapping[str, int]],
        streams: Sequence[StreamStatus],
        memories: Mapping[int, Memory],
    ) -> tuple[End, str, Memory | None]:
        total, at = len(prompt.keys) // 8, score.matched_blocks
        if not prompt.block_size:
            return End.NO_BLOCK_SIZE, "no event has told the model's block size yet, and none is configured", None
        if not total:
            return End.NO_FULL_BLOCK, f"{prompt.total_tokens} tokens fill no block of {prompt.block_size}", None
        if score.trust is Trust.COLD and score.trust_reason == "pod is not registered":
            return End.NOT_REGISTERED, "no pod of this name is registered for the model", None
        memory = memories.get(score.rank)
        if at == total:
            return End.WHOLE_PROMPT, f"all {total} blocks are held", memory
        if not at and memories:  # without a match no rank is better than another: the one that has lost it last
            memory = max(memories.values(), key=lambda each: each.left[0][0].at.time if each.left[0] else -1.0)
        end, why = self._hole(prompt, score, others, memory)
        if end in (End.ELSEWHERE, End.UNKNOWN_KEY):
            end, why = _without_a_trace(at, end, why, score, streams, memories)
        return end, why, memory

    def _hole(
        self, prompt: Prompt, score: PodScore, others: Mapping[str, Mapping[str, int]], memory: Memory | None
    ) -> tuple[End, str]:
        index, at = prompt.model.index, score.matched_blocks
        ahead = prompt.keys[at * 8 : (at + AHEAD_BLOCKS) * 8]
        # Without a match no rank is better than another.
        held = [
            [each for each in holders if not each[4] and (each[1] == score.rank or not at)]
            for holders in index.holders(ahead, (score.pod,))
        ]
        left = memory.left[0] if memory is not None else ()
        if held[0]:
            groups = sorted({each[3] for each in held[0]})
            why = f"block {at} is held in KV-cache group {_words(groups)} only"
            gone = [each for each in left if each.group not in groups]
            return End.OTHER_GROUP, why + (f"; {self._departed(prompt, at, gone[0])}" if gone else "")
        ranks = sorted({each[1] for each in index.holders(ahead[:8], (score.pod,))[0] if not each[4]})
        if ranks:
            why = f"block {at} is held by rank {_words(ranks)}, the match is rank {score.rank}'s"
            return End.OTHER_RANK, why + (f"; there {self._departed(prompt, at, left[0])}" if left else "")
        if left:
            return _END_OF.get(left[0].how, End.DROPPED), self._departed(prompt, at, left[0])
        if score.trust is Trust.COLD:
            return End.NOTHING_HEARD, f"nothing is known of this pod: {score.trust_reason}"
        return self._unremembered(prompt, score, others, held, memory)

    def _unremembered(
        self,
        prompt: Prompt,
        score: PodScore,
        others: Mapping[str, Mapping[str, int]],
        held: Sequence[Sequence[Located]],
        memory: Memory | None,
    ) -> tuple[End, str]:
        index, at = prompt.model.index, score.matched_blocks
        later = next((step for step, holders in enumerate(held) if holders), 0)
        if later:
            why = f"block {at} is not held, but block {at + later} behind it is: it was there and has been removed"
            return End.REMOVED, f"{why}; when is not known: {_reach(memory)}"
        for label, blocks in others.items():
            if blocks.get(score.pod, 0) > at:
                return End.OTHER_CONTEXT, f"with {label} the pod holds {blocks[score.pod]} blocks of the same tokens"
        key = prompt.keys[at * 8 : at * 8 + 8]
        elsewhere = sorted({each[0] for each in index.holders(key, ())[0] if not each[4]})
        if elsewhere:
            return End.ELSEWHERE, f"block {at} is held by {_words(elsewhere)}"
        return End.UNKNOWN_KEY, f"no pod holds block {at}"

    def _departed(self, prompt: Prompt, block: int, departure: Departure) -> str:
        return departure.words(block, prompt.model.index.tiers[departure.tier])

    def _runs(self, prompt: Prompt, score: PodScore) -> list[tuple[str, int]]:
        """Consecutive blocks of the match on one tier, the best one of each block."""
        weights, tiers = self._lookup.weights(prompt.model), prompt.model.index.tiers
        runs: list[tuple[str, int]] = []
        keys = prompt.keys[: min(score.matched_blocks, MAX_RUN_BLOCKS) * 8]
        for holders in prompt.model.index.holders(keys, (score.pod,)):
            bits = [each[2] for each in holders if each[1] == score.rank and not each[4]]
            # Removed since it was scored, or of a tier that came since: the run ends here.
            if not (bits := [bit for bit in bits if bit < len(weights)]):
                break
            tier = tiers[max(bits, key=lambda bit: weights[bit])]
            if runs and runs[-1][0] == tier:
                runs[-1] = (tier, runs[-1][1] + 1)
            else:
                runs.append((tier, 1))
        return runs


def _without_a_trace(
    at: int,
    end: End,
    why: str,
    score: PodScore,
    streams: Sequence[StreamStatus],
    memories: Mapping[int, Memory],
) -> tuple[End, str]:
    """The block is not held, and nobody remembers that it left: whether it was ever there."""
    ranks = [each for each in streams if each.rank == score.rank or not score.matched_blocks]
    since = [memories[each.rank].never_since(each) if each.rank in memories else "" for each in ranks]
    if since and all(since):
        return End.NEVER_STORED, f"{why}; here it was never stored {since[0]}"
    doubtful = next((memories.get(each.rank) for each, never in zip(ranks, since, strict=True) if not never), None)
    return end, f"{why}; here it was never stored, or it left before that is remembered: {_reach(doubtful)}"


def _reach(memory: Memory | None) -> str:
    return "the pod is not followed here" if memory is None else memory.words()


def tokens_of(packed: bytes, most: int) -> tuple[int, ...]:
    """The first token ids of u32 little-endian bytes."""
    count = min(len(packed) // 4, most)
    return struct.unpack(f"<{count}I", packed[: count * 4])


def _words(values: Sequence[object]) -> str:
    shown = ", ".join(str(each) for each in values[:3])
    return shown if len(values) <= 3 else f"{shown} and {len(values) - 3} more"
