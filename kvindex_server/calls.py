"""A line in the log per call: for the share of the calls that was asked for, and for every one that failed."""

import logging
import random
import threading
from collections.abc import Callable
from typing import Any

from kvindex_server import logs
from kvindex_server.tracing import STRANGERS, Metrics

_logger = logging.getLogger(__name__)


class CallLog:
    """Metrics that write such lines; nothing of a prompt is in them.

    A stream's one line sums up its requests. Lines are written by the thread that worked on the call.
    """

    def __init__(self, metrics: Metrics, share: float, dice: Callable[[], float] = random.random) -> None:
        self._metrics = metrics
        self._share = share
        self._dice = dice
        self._here = threading.local()
        self.shed = metrics.shed
        self.watch_in_flight = metrics.watch_in_flight
        self.unknown_tier = metrics.unknown_tier
        self.observe_usage = metrics.observe_usage
        self.observe_stage = metrics.observe_stage
        self.lookup_tallies = metrics.lookup_tallies

    def observe_lookup(self, model: str, blocks: int, best_match: int) -> None:
        """Kept until the call's end."""
        self._metrics.observe_lookup(model, blocks, best_match)
        self._keep(model, blocks, best_match)

    def heard(self, model: str, blocks: int, best_match: int, seconds: float) -> None:
        """The same of a lookup that the native core has counted itself."""
        if self._metrics.heard is not None:
            self._metrics.heard(model, blocks, best_match, seconds)
        self._keep(model, blocks, best_match)

    def _keep(self, model: str, blocks: int, best_match: int) -> None:
        found = getattr(self._here, "found", None)
        if found is None:
            found = self._here.found = {"model": model, "lookups": 0, "blocks": 0, "best_match_blocks": 0}
        found["lookups"] += 1
        found["blocks"] += blocks
        found["best_match_blocks"] += best_match

    def observe_rpc(self, method: str, code: str, seconds: float) -> None:
        """The call's end."""
        self._metrics.observe_rpc(method, code, seconds)
        fields: dict[str, Any] = getattr(self._here, "found", None) or {}
        self._here.found = None
        failed = code != "OK"
        # Strangers must not fill the log: theirs are a share, like the ones that are well.
        if (failed and code not in STRANGERS) or self._dice() < self._share:
            level = logging.WARNING if failed else logging.INFO
            logs.event(_logger, level, "call", method=method, code=code, ms=round(1000 * seconds, 3), **fields)
