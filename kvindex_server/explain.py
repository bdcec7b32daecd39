"""Explains one lookup: where each pod's match ends, and why it is no longer than that."""

import enum
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from kvindex_server import _core
from kvindex_server.doctor import NO_SALT
from kvindex_server.lookup import Check, Lookup, Prompt, Query
from kvindex_server.score import PodScore
from kvindex_server.stream import Trust

MAX_PODS = 64
MAX_RUN_BLOCKS = 1024
"""Of one pod: a Python object is made of each of them."""
AHEAD_BLOCKS = 256
"""So far behind the end of a match it is looked for blocks that are still held."""
MAX_ADAPTERS = 16
"""So many of the model's known adapters are tried."""


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


@dataclass(slots=True)
class PodExplanation:
    """One pod's match: its score, its end, and (tier, blocks) from the beginning."""

    score: PodScore
    end: End
    why: str
    runs: list[tuple[str, int]] = field(default_factory=list)


@dataclass(slots=True)
class Explanation:
    """The prompt as it was looked up, and the best pods' matches."""

    prompt: Prompt
    pods: list[PodExplanation]
    more_pods: int


class Explainer:
    """Answers Explain; safe from many threads."""

    def __init__(self, lookup: Lookup) -> None:
        self._lookup = lookup

    def explain(self, query: Query, check: Check) -> Explanation:
        """At most MAX_PODS pods, best first. Errors as of Lookup.score."""
        prompt = self._lookup.prompt(query, check)
        scores = self._lookup.standings(prompt.model, prompt.keys, query.pods)
        check()
        others = self.other_contexts(prompt, query, check)
        pods = []
        for score in scores[:MAX_PODS]:
            end, why = self._end(prompt, score, others)
            pods.append(PodExplanation(score, end, why, self._runs(prompt, score)))
            check()
        return Explanation(prompt, pods, max(0, len(scores) - MAX_PODS))

    def other_contexts(self, prompt: Prompt, query: Query, check: Check) -> Mapping[str, Mapping[str, int]]:
        """Blocks per pod of the same tokens with other adapters or without the salt, as far as it can be tried."""
        if not prompt.tokens or not prompt.block_size:
            return {}
        adapters = {f"adapter {name!r}": name for name in prompt.model.loras[:MAX_ADAPTERS] if name != prompt.lora_name}
        if prompt.lora_name:
            adapters["no adapter"] = ""
        tries = {label: (name, query.cache_salt) for label, name in adapters.items()}
        if query.cache_salt:
            tries[NO_SALT] = (prompt.lora_name, "")
        found: dict[str, Mapping[str, int]] = {}
        for label, (lora_name, salt) in tries.items():
            keys = _core.block_keys(
                prompt.tokens, prompt.block_size, prompt.model.index.seed, lora_name, salt, query.mm_features
            )
            scores = self._lookup.standings(prompt.model, keys, query.pods)
            found[label] = {each.pod: each.matched_blocks for each in scores if each.matched_blocks}
            check()
        return found

    def _end(self, prompt: Prompt, score: PodScore, others: Mapping[str, Mapping[str, int]]) -> tuple[End, str]:
        total, at = len(prompt.keys) // 8, score.matched_blocks
        if not prompt.block_size:
            return End.NO_BLOCK_SIZE, "no event has told the model's block size yet, and none is configured"
        if not total:
            return End.NO_FULL_BLOCK, f"{prompt.total_tokens} tokens fill no block of {prompt.block_size}"
        if score.trust is Trust.COLD and score.trust_reason == "pod is not registered":
            return End.NOT_REGISTERED, "no pod of this name is registered for the model"
        if at == total:
            return End.WHOLE_PROMPT, f"all {total} blocks are held"
        end, why = self._hole(prompt, score, others)
        if score.trust in (Trust.STALE, Trust.PARTIAL):
            why += f"; the stream is {score.trust.name}: {score.trust_reason}"
        return end, why

    def _hole(self, prompt: Prompt, score: PodScore, others: Mapping[str, Mapping[str, int]]) -> tuple[End, str]:
        index, at = prompt.model.index, score.matched_blocks
        ahead = prompt.keys[at * 8 : (at + AHEAD_BLOCKS) * 8]
        # Without a match no rank is better than another.
        held = [
            [each for each in holders if not each[4] and (each[1] == score.rank or not at)]
            for holders in index.holders(ahead, (score.pod,))
        ]
        if held[0]:
            groups = sorted({each[3] for each in held[0]})
            return End.OTHER_GROUP, f"block {at} is held in KV-cache group {_words(groups)} only"
        ranks = sorted({each[1] for each in index.holders(ahead[:8], (score.pod,))[0] if not each[4]})
        if ranks:
            return End.OTHER_RANK, f"block {at} is held by rank {_words(ranks)}, the match is rank {score.rank}'s"
        if score.trust is Trust.COLD:
            return End.NOTHING_HEARD, f"nothing is known of this pod: {score.trust_reason}"
        later = next((step for step, holders in enumerate(held) if holders), 0)
        if later:
            return (
                End.REMOVED,
                f"block {at} is not held, but block {at + later} behind it is: it was there and has been removed; "
                "when is not kept",
            )
        for label, blocks in others.items():
            if blocks.get(score.pod, 0) > at:
                return End.OTHER_CONTEXT, f"with {label} the pod holds {blocks[score.pod]} blocks of the same tokens"
        elsewhere = sorted({each[0] for each in index.holders(ahead[:8], ())[0] if not each[4]})
        if elsewhere:
            return (
                End.ELSEWHERE,
                f"block {at} is held by {_words(elsewhere)}; here it was never stored, or it was removed: "
                "which of the two is not kept",
            )
        return End.UNKNOWN_KEY, f"no pod holds block {at}: never stored, or removed everywhere"

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


def tokens_of(packed: bytes, most: int) -> tuple[int, ...]:
    """The first token ids of u32 little-endian bytes."""
    count = min(len(packed) // 4, most)
    return struct.unpack(f"<{count}I", packed[: count * 4])


def _words(values: Sequence[object]) -> str:
    shown = ", ".join(str(each) for each in values[:3])
    return shown if len(values) <= 3 else f"{shown} and {len(values) - 3} more"
