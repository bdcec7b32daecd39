"""What the page shows of one prompt: per pod its score, where each block lies, and why the match ends there."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Literal, Protocol

from kvindex_server.errors import InvalidArgument
from kvindex_server.explain import Adapters, Explainer, PodExplanation, Streams, tokens_of
from kvindex_server.lookup import BlocksQuery, Check, Located, Lookup, ScoreQuery
from kvindex_server.rest import Fields
from kvindex_server.score import PodScore

MAX_PODS = 64
"""Pods shown, the best ones; the answer says how many there are."""
SHOWN_TOKENS, SHOWN_KEYS = 64, 16
MAX_TEXT_BYTES = 256 * 1024
"""Every block of the prompt is looked up at every pod shown."""


class Limits(Protocol):
    """Bounds on one request."""

    @property
    def max_prompt_bytes(self) -> int: ...


class PromptView:
    """Answers `/api/score`. Nothing of the prompt is kept or logged; its first token ids and keys are sent back."""

    def __init__(self, lookup: Lookup, limits: Limits, streams: Streams, adapters: Adapters) -> None:
        self._lookup = lookup
        self._explainer = Explainer(lookup, streams, adapters)
        self._max_bytes = min(MAX_TEXT_BYTES, limits.max_prompt_bytes)

    def shown(self, fields: Fields, check: Check) -> Mapping[str, object]:
        """`model`, `kind` (`prompt` or `chat`), `text`, and optionally `lora_name` and `cache_salt`."""
        kind = fields.text("kind")
        if kind not in ("prompt", "chat"):
            raise InvalidArgument("kind", "must be prompt or chat")
        of: Literal["prompt", "chat"] = "chat" if kind == "chat" else "prompt"
        text = fields.text("text", limit=self._max_bytes)
        model = fields.text("model")
        lora, salt = fields.text("lora_name", ""), fields.text("cache_salt", "")
        fields.done()
        if not text:
            raise InvalidArgument("text", "must not be empty")
        if len(text.encode()) > self._max_bytes:
            raise InvalidArgument("text", f"is longer than {self._max_bytes} bytes, the most this page asks about")
        asked = ScoreQuery(model, of, text=text, lora_name=lora, cache_salt=salt)
        answer = self._lookup.score(asked, check)
        scores = answer.scores[:MAX_PODS]
        pods = tuple(each.pod for each in scores)
        blocks: list[tuple[int, list[Located]]] = []
        tiers: Sequence[str] = ()
        if pods and answer.total_blocks:
            query = BlocksQuery(model, of, text=text, lora_name=lora, cache_salt=salt, pods=pods)
            found = self._lookup.blocks(query, check)
            blocks, tiers = found.blocks, found.tiers
        held = _held(blocks, tiers, {each.pod: each.rank for each in scores})
        explained = self._explainer.explain(asked, check)
        ends = {each.score.pod: each for each in explained.pods}
        keys = memoryview(explained.prompt.keys).cast("Q")[:SHOWN_KEYS]
        return {
            "total_tokens": answer.total_tokens,
            "total_blocks": answer.total_blocks,
            "block_size": answer.block_size,
            "pods_total": len(answer.scores),
            "tokens": tokens_of(explained.prompt.tokens, SHOWN_TOKENS),
            # Of 64 bits, which are not numbers in a browser.
            "keys": [f"{key:#018x}" for key in keys],
            "pods": [_pod(each, held[each.pod], ends.get(each.pod)) for each in scores],
        }


def _held(
    blocks: Sequence[tuple[int, list[Located]]], tiers: Sequence[str], ranks: Mapping[str, int]
) -> Mapping[str, list[str]]:
    """Per pod, of the rank that scores: where each block lies best, `speculative` when only placed, or empty."""
    held = {pod: [""] * len(blocks) for pod in ranks}
    best = {pod: [len(tiers) + 1] * len(blocks) for pod in ranks}
    for at, (_, holders) in enumerate(blocks):
        for pod, rank, tier, _group, speculative in holders:
            order = len(tiers) if speculative else tier
            if rank == ranks.get(pod) and order < best[pod][at]:
                best[pod][at] = order
                held[pod][at] = "speculative" if speculative else tiers[tier]
    return held


def _pod(score: PodScore, held: Sequence[str], explained: PodExplanation | None) -> Mapping[str, object]:
    return {
        "pod": score.pod,
        "rank": score.rank,
        "score": score.score,
        "matched_blocks": score.matched_blocks,
        "speculative_blocks": score.speculative_blocks,
        "tier_blocks": dict(score.tier_blocks),
        "trust": score.trust.name,
        "end": explained.end.name if explained else "",
        "why": explained.why if explained else "",
        # How the block behind the match left, latest first; seconds since 1970, 0 when not told.
        "left": [
            {
                "how": each.how.name,
                "tier": tier,
                "group": each.group,
                "sequence": None if each.at.sequence is None else str(each.at.sequence),
                "time": each.at.time,
                "earlier": each.earlier,
            }
            for each, tier in (explained.left if explained else ())
        ],
        # Runs of equal blocks from the first on: [where, how many].
        "runs": [[where, sum(1 for _ in run)] for where, run in groupby(held)],
    }
