"""The client for threads: every call blocks its own thread, and all threads share the connections."""

import contextlib
import math
import queue
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvindex_client import results
from kvindex_client.errors import CUT_OFF, TOO_MANY, CallError, Try, broken, pushback
from kvindex_client.options import HEALTH_SERVICE, Options
from kvindex_client.query import Query, usage_request
from kvindex_client.race import Endpoints, Race
from kvindex_client.results import BlockPods, Placement, Scores
from kvindex_client.resume import Feed
from kvindex_server.pb.kvindex.v1.kvindex_pb2_grpc import KVIndexStub


class Client:
    """Asks one replica, or several that follow the same fleet: `host:port`, `unix:/path`, or a list of those.

    Safe for threads. Do not use it in a child after a fork. Every call raises CallError when it got no answer within
    `timeout` (default: the options'), and ValueError for a query that cannot be sent.
    """

    def __init__(self, endpoints: str | Sequence[str], options: Options | None = None) -> None:
        self._options = options or Options()
        self._closed = False
        names = (endpoints,) if isinstance(endpoints, str) else tuple(endpoints)
        self._endpoints = Endpoints(names, self._options)
        # A name that is there twice is two connections to one replica.
        self._replicas = [number for number, name in enumerate(names) if name not in names[:number]]
        self._alone = [Endpoints((name,), self._options) for name in names]
        self._channels = [self._channel(name) for name in names]
        self._stubs = [KVIndexStub(channel) for channel in self._channels]
        self._side_by_side = ThreadPoolExecutor(max(1, 2 * len(names)), "kvindex-placement")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Cancel what is under way and close the connections."""
        self._closed = True
        for channel in self._channels:
            channel.close()
        self._side_by_side.shutdown(wait=False, cancel_futures=True)

    @property
    def stubs(self) -> Mapping[str, KVIndexStub]:
        """The generated stub per endpoint, for everything this class does not do; no token, deadline or retry."""
        return dict(zip(self._endpoints.names, self._stubs, strict=True))

    def score(self, query: Query, *, timeout: float | None = None) -> Scores:
        """How much of the prompt each pod already holds."""
        answer, endpoint, failed = self._call("Score", query.score_request(), timeout)
        return results.scores(answer, endpoint, failed)

    def pods_for_blocks(self, query: Query, *, timeout: float | None = None) -> BlockPods:
        """Who holds each block, on which rank and tier."""
        answer, endpoint, failed = self._call("GetPodsForBlocks", query.blocks_request(), timeout)
        return results.block_pods(answer, endpoint, failed)

    def record_placement(
        self,
        query: Query,
        pod: str,
        *,
        rank: int | None = None,
        ttl_seconds: float | None = None,
        timeout: float | None = None,
    ) -> Placement:
        """Tell every replica where the prompt was sent, since each keeps placements of its own.

        CallError only when none recorded it; `Placement.failed` tells which did not.
        """
        request = query.placement_request(pod, rank, ttl_seconds)

        def tell(endpoint: int) -> Any:
            try:
                return self._call("RecordPlacement", request, timeout, only=endpoint)[0]
            except CallError as error:
                return error

        if len(self._replicas) == 1:
            told = [tell(self._replicas[0])]
        else:
            told = list(self._side_by_side.map(tell, self._replicas))
        return results.placement([self._endpoints.names[number] for number in self._replicas], told)

    def report_usage(
        self,
        model: str,
        pod: str,
        *,
        predicted_tokens: int,
        cached_tokens: int,
        prompt_tokens: int = 0,
        timeout: float | None = None,
    ) -> None:
        """What an engine found in its cache (`usage.prompt_tokens_details.cached_tokens`): the metric of the error.

        `predicted_tokens` are the pod's `matched_tokens` in the answer that it was chosen by; `prompt_tokens` 0 is not
        known. One replica is told; a report whose answer was lost is not made again, since it may have counted.
        """
        request = usage_request(model, pod, predicted_tokens, cached_tokens, prompt_tokens)
        self._call("ReportUsage", request, timeout, read=False)

    def score_stream(self, queries: Iterable[Query], *, timeout: float | None = None) -> Iterator[Scores | CallError]:
        """Answers in the queries' order over one connection; one bad query is answered with its CallError.

        The queries are read on another thread, ahead of the answers. `timeout` is of the whole stream, None for none.
        A stream that breaks goes on at the next replica: queries without an answer are sent again, and none is answered
        twice. CallError when `tries` connections in a row gave no answer, or none may be tried any more.
        """
        limit = math.inf if timeout is None else timeout
        race = Race(self._endpoints, self._options.unhedged(), time.monotonic(), limit, read=True)
        feed = Feed(query.score_request() for query in queries)
        call: Any = None
        try:
            while True:
                number = race.start(time.monotonic())
                if number is None:
                    time.sleep(max(0.0, (race.wake() or 0.0) - time.monotonic()))
                    continue
                name = self._endpoints.names[number]
                call = self._stubs[number].ScoreStream(
                    feed.connection(),
                    timeout=None if timeout is None else max(0.0, race.deadline - time.monotonic()),
                    metadata=self._options.metadata(),
                )
                (code, message), told = CUT_OFF, None
                try:
                    for answer in call:
                        if not feed.answered():
                            raise CallError([Try(name, *TOO_MANY)])
                        race.progressed(number)
                        bad = answer.HasField("status")
                        yield CallError([results.refused(answer, name)]) if bad else results.scores(answer, name)
                    if feed.done:
                        return
                except grpc.RpcError as caught:
                    (code, message), told = (
                        broken(caught.code(), caught.details()),
                        pushback(caught.trailing_metadata()),
                    )
                if self._closed:
                    raise CallError([Try(name, grpc.StatusCode.CANCELLED, "client closed")])
                call.cancel()  # whoever reads the queries for it ends
                error = race.lost(number, code, message, told, time.monotonic())
                if error is not None:
                    raise error
        finally:
            feed.close()
            if call is not None:
                call.cancel()

    def health(self, *, timeout: float | None = None) -> Mapping[str, str]:
        """Per endpoint what grpc.health.v1 says of the read path: SERVING, NOT_SERVING, or the code of the failure."""
        request = health_pb2.HealthCheckRequest(service=HEALTH_SERVICE)
        limit = self._options.timeout if timeout is None else timeout
        said = []
        with contextlib.ExitStack() as stack:
            # On connections of its own: those of the calls refuse everything while an endpoint is not serving.
            channels = [stack.enter_context(self._channel(name, watched=False)) for name in self._endpoints.names]
            calls = [health_pb2_grpc.HealthStub(each).Check.future(request, timeout=limit) for each in channels]
            for call in calls:
                try:
                    said.append(health_pb2.HealthCheckResponse.ServingStatus.Name(call.result().status))
                except grpc.RpcError as error:
                    said.append(error.code().name)
        return dict(zip(self._endpoints.names, said, strict=True))

    def _channel(self, name: str, *, watched: bool = True) -> grpc.Channel:
        credentials, arguments = self._options.credentials(), self._options.channel_arguments(watched=watched)
        if credentials is None:
            return grpc.insecure_channel(name, arguments)
        return grpc.secure_channel(name, credentials, arguments)

    def _call(
        self, method: str, request: Any, timeout: float | None, only: int | None = None, *, read: bool = True
    ) -> tuple[Any, str, tuple[Try, ...]]:
        endpoints = self._endpoints if only is None else self._alone[only]
        stubs = self._stubs if only is None else [self._stubs[only]]
        limit = self._options.timeout if timeout is None else timeout
        race = Race(endpoints, self._options, time.monotonic(), limit, read=read and only is None)
        ended: queue.SimpleQueue[int] = queue.SimpleQueue()
        running: dict[int, Any] = {}
        try:
            while True:
                number = race.start(time.monotonic())
                if number is not None:
                    call = getattr(stubs[number], method).future(
                        request, timeout=race.deadline - time.monotonic(), metadata=self._options.metadata()
                    )
                    running[number] = call
                    call.add_done_callback(lambda _, number=number: ended.put(number))
                try:
                    wake = race.wake()
                    number = ended.get(timeout=None if wake is None else max(0.0, wake - time.monotonic()))
                except queue.Empty:
                    continue
                call = running.pop(number)
                if call.code() is grpc.StatusCode.OK:
                    race.won(number, time.monotonic())
                    return call.result(), endpoints.names[number], tuple(race.failures)
                told = pushback(call.trailing_metadata())
                error = race.lost(number, call.code(), call.details() or "", told, time.monotonic())
                if error is not None:
                    raise error
        finally:
            for call in running.values():
                with contextlib.suppress(ValueError):  # the channel was closed meanwhile
                    call.cancel()
