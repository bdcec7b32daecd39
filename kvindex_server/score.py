"""Turns what the index found per pod into the answer's order: weights by tier, best first, zeros included."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from kvindex_server.stream import Trust

Match = tuple[str, int, int, float, list[int], int]
"""The index's answer for one pod: (pod, rank, matched blocks, score, blocks per tier bit, speculative blocks)."""


@dataclass(slots=True)
class PodScore:
    """One candidate's score. Trust and age are filled in from the stream that achieves the match."""

    pod: str
    score: float = 0.0
    matched_blocks: int = 0
    rank: int = 0
    tier_blocks: Mapping[str, int] = field(default_factory=dict)
    speculative_blocks: int = 0
    trust: Trust = Trust.COLD
    trust_reason: str = ""
    age_seconds: float = -1.0

    @property
    def hit(self) -> bool:
        """Whether there is any block to speak of: held, or only placed."""
        return bool(self.matched_blocks or self.speculative_blocks)


class Weights:
    """The configured weight of each tier; a tier nobody configured weighs as the lowest."""

    def __init__(self, by_tier: Mapping[str, float]) -> None:
        self._by_tier = dict(by_tier)
        self._lowest = min(by_tier.values())

    def of(self, tiers: Sequence[str]) -> list[float]:
        """One weight per tier, in the index's order of tiers."""
        return [self._by_tier.get(tier, self._lowest) for tier in tiers]

    def unknown(self, tiers: Iterable[str]) -> list[str]:
        """Those of these tiers that are not configured."""
        return [tier for tier in tiers if tier not in self._by_tier]


def ranked(candidates: Sequence[str], matches: Iterable[Match], tiers: Sequence[str], top_k: int = 0) -> list[PodScore]:
    """One PodScore per distinct candidate, best first, ties in the candidates' order; `top_k` 0 keeps all."""
    by_pod = {match[0]: match for match in matches}
    scores = [_pod_score(pod, by_pod.get(pod), tiers) for pod in dict.fromkeys(candidates)]
    # The sort is stable, also reversed: ties stay in the candidates' order.
    scores.sort(key=lambda each: each.score, reverse=True)
    return scores[:top_k] if top_k else scores


def _pod_score(pod: str, match: Match | None, tiers: Sequence[str]) -> PodScore:
    if match is None:
        return PodScore(pod)
    _, rank, blocks, score, per_tier, speculative = match
    return PodScore(
        pod,
        score,
        blocks,
        rank,
        {tier: count for tier, count in zip(tiers, per_tier, strict=False) if count},
        speculative,
    )
