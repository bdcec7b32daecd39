"""What the page shows of the fleet: per stream and per model, nothing that `/metrics` does not tell too."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from kvindex_server import __version__
from kvindex_server.metrics import ModelStats
from kvindex_server.stream import StreamStatus, Trust

MAX_STREAMS = 1000
"""Rows sent to a browser; those in trouble come first."""

_TROUBLE = (Trust.STALE, Trust.COLD, Trust.PARTIAL, Trust.EXACT)


class Metrics(Protocol):
    """What is asked of the metrics."""

    @property
    def is_ready(self) -> bool: ...
    def lookups(self) -> dict[str, tuple[int, int]]: ...


@dataclass(frozen=True, slots=True)
class FleetView:
    """Reads the same sources as a scrape, at the same cost."""

    statuses: Callable[[], list[StreamStatus]]
    models: Callable[[], Iterable[ModelStats]]
    metrics: Metrics
    prompt: str
    """How the prompt box stands: `off`, `open`, or `token` when it asks for a bearer token."""

    def shown(self) -> Mapping[str, object]:
        """The answer of `/api/fleet`. Unknown times are null, counters count from the server's start."""
        statuses = self.statuses()
        lookups = self.metrics.lookups()
        trusts = {trust.name: sum(each.trust is trust for each in statuses) for trust in Trust}
        ordered = sorted(statuses, key=lambda each: _TROUBLE.index(each.trust))
        return {
            "version": __version__,
            "ready": self.metrics.is_ready,
            "prompt": self.prompt,
            "models": [
                {
                    "model": each.name,
                    "block_size": each.block_size,
                    "blocks": each.blocks,
                    "claims": each.claims,
                    "bytes": each.bytes,
                    "coverage": each.coverage,
                    "looked_up": lookups.get(each.name, (0, 0))[0],
                    "matched": lookups.get(each.name, (0, 0))[1],
                }
                for each in self.models()
            ],
            "trust": trusts,
            "streams_total": len(statuses),
            "lag": {
                "sum": sum(each.lag_sum for each in statuses),
                "count": sum(each.lag_buckets[-1] for each in statuses),
            },
            "streams": [_stream(each) for each in ordered[:MAX_STREAMS]],
        }


def _stream(status: StreamStatus) -> Mapping[str, object]:
    heard = status.last_sequence is not None
    return {
        "pod": status.pod,
        "rank": status.rank,
        "model": status.model,
        "state": status.state.name,
        "trust": status.trust.name,
        "cause": status.trust_cause,
        "lag_seconds": status.lag_seconds if heard else None,
        "age_seconds": status.age_seconds if heard else None,
        "last_sequence": status.last_sequence,
        # Copied before they are read: the stream's own thread may be adding meanwhile.
        "blocks": dict(status.blocks_by_tier),
        "gaps": status.gaps,
        "restarts": status.restarts,
        "orphans": status.orphans,
        "dropped": sum(dict(status.dropped).values()),
        "decode_errors": sum(dict(status.decode_errors).values()),
    }
