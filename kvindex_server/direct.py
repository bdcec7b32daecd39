"""Answers ordinary read requests in the native core, others by the reference path; bytes to bytes."""

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal, Protocol

from kvindex_server import _core, codec
from kvindex_server.lookup import Check, Lookup
from kvindex_server.models import Model, Models
from kvindex_server.stream import Trust


class Fleet(Protocol):
    """What is asked of the fleet."""

    def pods(self, model: str) -> list[str]: ...
    def trust(self, model: str, pod: str, rank: int | None = None) -> tuple[Trust, str, float]: ...


class Metrics(Protocol):
    """What is measured."""

    def lookup_tallies(self, model: str) -> _core.LookupTallies: ...
    def unknown_tier(self, model: str, tier: str) -> None: ...
    @property
    def heard(self) -> Callable[[str, int, int, float], None] | None: ...


Route = tuple[
    _core.Scorer,
    str,
    Callable[[], list[str]],
    Callable[[list[tuple[str, int]]], None],
    Callable[[str], None],
    Callable[[int, int, float], None] | None,
]
"""Of a name that requests may give; see _core.answer_plain."""


class Direct:
    """Score, GetPodScores and GetPodsForBlocks, from the request's bytes to the answer's.

    The native core reads the request, matches, orders and writes the answer without the GIL and without a Python
    object per token, key or pod. It takes only what is plainly good; whatever it does not take is answered, or
    refused with its reason, by `codec` and `lookup`, which say the same of any request that both can answer.
    """

    def __init__(
        self,
        lookup: Lookup,
        models: Models,
        fleet: Fleet,
        tier_weights: Mapping[str, float],
        metrics: Metrics,
        limits: codec.Limits,
    ) -> None:
        self._lookup = lookup
        self._models = models
        self._fleet = fleet
        self._weights = dict(tier_weights)
        self._metrics = metrics
        self._limits = limits
        self._native_limits = _core.RequestLimits(
            limits.max_tokens, limits.max_pods, limits.max_keys, limits.max_prompt_bytes
        )
        self._scorers: dict[str, tuple[_core.Index, _core.Scorer]] = {}
        # One object, so that no thread sees the names of one moment with the routes of another.
        self._known: tuple[Mapping[str, tuple[Model, str]], dict[str, Route]] = (models.names, {})

    def score(self, data: bytes, check: Check) -> bytes:
        """An encoded ScoreResponse to an encoded ScoreRequest; KvindexError when there is none."""
        check()
        answer = self.plain(data)
        if answer is None:
            return self.answer(data, self.read(data), check)
        check()
        return answer

    def plain(self, data: bytes) -> bytes | None:
        """The answer in one native call, without looking at the time: some ten microseconds per thousand keys.

        None for a request that needs more than the index, is not plainly good, or is the first one of its model.
        """
        known = self._known
        if known[0] is not self._models.names:
            known = self._current()
        return _core.answer_plain(data, self._native_limits, known[1])

    def _current(self) -> tuple[Mapping[str, tuple[Model, str]], dict[str, Route]]:
        known = self._known
        if known[0] is not self._models.names:
            known = self._known = (self._models.names, {})
        return known

    def read(self, data: bytes) -> _core.ScoreRequest | None:
        """The request, for `answer`; None when it is not for the native core."""
        return _core.read_score_request(data, self._native_limits)

    def answer(self, data: bytes, request: _core.ScoreRequest | None, check: Check) -> bytes:
        """The second half of `score`."""
        answer = None if request is None else self._native(request, check)
        return self.reference(data, check) if answer is None else answer

    def reference(self, data: bytes, check: Check) -> bytes:
        """The same by protobuf messages and Python: slower, plainer, and right by definition."""
        return codec.encode_score(self._lookup.score(codec.decode_score(data, self._limits), check))

    def pod_scores(self, data: bytes, check: Check) -> bytes:
        """An encoded GetPodScoresResponse to an encoded GetPodScoresRequest; KvindexError when there is none."""
        request = _core.read_pod_scores_request(data, self._native_limits)
        answer = None if request is None else self._native(request, check)
        return self.pod_scores_reference(data, check) if answer is None else answer

    def pod_scores_reference(self, data: bytes, check: Check) -> bytes:
        """As `reference` is to `score`."""
        return codec.encode_pod_scores(self._lookup.score(codec.decode_pod_scores(data, self._limits), check))

    def blocks(self, data: bytes, check: Check) -> bytes:
        """An encoded GetPodsForBlocksResponse to an encoded GetPodsForBlocksRequest; KvindexError when there is none.

        Natively when it names keys or engine hashes; tokens and text are for the reference path.
        """
        request = _core.read_blocks_request(data, self._native_limits)
        known = None if request is None else self._models.names.get(request.model)
        if request is None or known is None or not isinstance(known[0].index, _core.Index):
            return self.blocks_reference(data, check)
        check()
        answer = request.answer(known[0].index)
        check()
        return answer

    def blocks_reference(self, data: bytes, check: Check) -> bytes:
        """As `reference` is to `score`."""
        return codec.encode_blocks(self._lookup.blocks(codec.decode_blocks(data, self._limits), check))

    def _native(self, request: _core.ScoreRequest, check: Check) -> bytes | None:
        """None when the request is not for the native core after all."""
        started = time.perf_counter_ns()
        names, routes = self._current()
        known = names.get(request.model)
        if known is None:
            return None
        model, lora = known
        if not isinstance(model.index, _core.Index):
            return None  # kept in a shared store
        if (request.is_prompt or request.is_chat) and not self._find_keys(model, lora, request, check):
            return None
        if not request.media_fit:
            return None
        check()
        route = routes.get(request.model)
        if route is None:
            route = routes[request.model] = self._route(model, lora)
        scorer, lora, pods, refresh, unknown_tier, heard = route
        known_pods = () if request.names_pods else pods()
        answer = scorer.answer(request, lora, known_pods, refresh, unknown_tier, heard, started)
        check()
        return answer

    def _find_keys(self, model: Model, lora: str, request: _core.ScoreRequest, check: Check) -> bool:
        if model.tokenizer is None or request.has_media or not model.index.block_size:
            return False
        kind: Literal["prompt", "chat"] = "chat" if request.is_chat else "prompt"
        context = (request.lora_name or lora, request.cache_salt)
        keyed = self._lookup.keys_of_text(model, kind, request, *context, check)
        request.set_keys(keyed.keys, keyed.tokens)
        return keyed.tokens > 0

    def _route(self, model: Model, lora: str) -> Route:
        found = self._scorers.get(model.name)
        if found is None or found[0] is not model.index:
            scorer = _core.Scorer(model.index, self._weights, self._metrics.lookup_tallies(model.name))
            found = self._scorers[model.name] = (model.index, scorer)
        scorer = found[1]

        def refresh(outdated: list[tuple[str, int]]) -> None:
            for pod, rank in outdated:
                asked_at = time.monotonic_ns()
                trust, reason, age = self._fleet.trust(model.name, pod, rank)
                scorer.tell(pod, rank, trust, reason, age, asked_at)

        return (
            scorer,
            lora,
            lambda: self._fleet.pods(model.name),
            refresh,
            lambda tier: self._metrics.unknown_tier(model.name, tier),
            None if self._metrics.heard is None else partial(self._metrics.heard, model.name),
        )
