"""The client for asyncio: one event loop, no threads."""

import asyncio
import math
import time
from collections.abc import AsyncIterable, AsyncIterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvindex_client import results
from kvindex_client.errors import CUT_OFF, TOO_MANY, CallError, Try, broken, pushback
from kvindex_client.options import HEALTH_SERVICE, Options
from kvindex_client.query import Query, usage_request
from kvindex_client.race import Endpoints, Race
from kvindex_client.results import BlockPods, Placement, Scores
from kvindex_client.resume import AsyncFeed
from kvindex_server.pb.kvindex.v1.kvindex_pb2_grpc import KVIndexStub


class AsyncClient:
    """As `Client`, with coroutines. To be made and used inside one running event loop."""

    def __init__(self, endpoints: str | Sequence[str], options: Options | None = None) -> None:
        self._options = options or Options()
        self._closed = False
        names = (endpoints,) if isinstance(endpoints, str) else tuple(endpoints)
        self._endpoints = Endpoints(names, self._options)
        # A name that is there twice is two connections to one replica.
        self._replicas = [number for number, name in enumerate(names) if name not in names[:number]]
        self._alone = [Endpoints((name,), self._options) for name in names]
        self._channels = [self._channel(name) for name in names]
        self._stubs: list[Any] = [KVIndexStub(channel) for channel in self._channels]

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Cancel what is under way and close the connections."""
        self._closed = True
        await asyncio.gather(*(channel.close() for channel in self._channels))

    @property
    def stubs(self) -> Mapping[str, Any]:
        """The generated stub per endpoint, for everything this class does not do; no token, deadline or retry."""
        return dict(zip(self._endpoints.names, self._stubs, strict=True))

    async def score(self, query: Query, *, timeout: float | None = None) -> Scores:
        """How much of the prompt each pod already holds."""
        answer, endpoint, failed = await self._call("Score", query.score_request(), timeout)
        return results.scores(answer, endpoint, failed)

    async def pods_for_blocks(self, query: Query, *, timeout: float | None = None) -> BlockPods:
        """Who holds each block, on which rank and tier."""
        answer, endpoint, failed = await self._call("GetPodsForBlocks", query.blocks_request(), timeout)
        return results.block_pods(answer, endpoint, failed)

    async def record_placement(
        self,
        query: Query,
        pod: str,
        *,
        rank: int | None = None,
        ttl_seconds: float | None = None,
        timeout: float | None = None,
    ) -> Placement:
        """As `Client.record_placement`: every replica is told."""
        request = query.placement_request(pod, rank, ttl_seconds)

        async def tell(endpoint: int) -> Any:
            try:
                return (await self._call("RecordPlacement", request, timeout, only=endpoint))[0]
            except CallError as error:
                return error

        told = await asyncio.gather(*(tell(number) for number in self._replicas))
        return results.placement([self._endpoints.names[number] for number in self._replicas], told)

    async def report_usage(
        self,
        model: str,
        pod: str,
        *,
        predicted_tokens: int,
        cached_tokens: int,
        prompt_tokens: int = 0,
        timeout: float | None = None,
    ) -> None:
        """As `Client.report_usage`."""
        request = usage_request(model, pod, predicted_tokens, cached_tokens, prompt_tokens)
        await self._call("ReportUsage", request, timeout, read=False)

    async def score_stream(
        self, queries: AsyncIterable[Query], *, timeout: float | None = None
    ) -> AsyncIterator[Scores | CallError]:
        """As `Client.score_stream`."""
        limit = math.inf if timeout is None else timeout
        race = Race(self._endpoints, self._options.unhedged(), time.monotonic(), limit, read=True)

        async def requests() -> AsyncIterator[Any]:
            async for query in queries:
                yield query.score_request()

        feed = AsyncFeed(requests())
        call: Any = None
        try:
            while True:
                number = race.start(time.monotonic())
                if number is None:
                    await asyncio.sleep(max(0.0, (race.wake() or 0.0) - time.monotonic()))
                    continue
                name = self._endpoints.names[number]
                call = self._stubs[number].ScoreStream(
                    feed.connection(),
                    timeout=None if timeout is None else max(0.0, race.deadline - time.monotonic()),
                    metadata=self._options.metadata(),
                )
                (code, message), told = CUT_OFF, None
                try:
                    async for answer in call:
                        if not feed.answered():
                            raise CallError([Try(name, *TOO_MANY)])
                        race.progressed(number)
                        bad = answer.HasField("status")
                        yield CallError([results.refused(answer, name)]) if bad else results.scores(answer, name)
                    if feed.done:
                        return
                except grpc.aio.AioRpcError as caught:
                    (code, message), told = (
                        broken(caught.code(), caught.details()),
                        pushback(_pairs(caught.trailing_metadata())),
                    )
                except asyncio.CancelledError:
                    if not self._closed:
                        raise
                    raise CallError([Try(name, grpc.StatusCode.CANCELLED, "client closed")]) from None
                if self._closed:
                    raise CallError([Try(name, grpc.StatusCode.CANCELLED, "client closed")])
                call.cancel()  # whoever reads the queries for it ends
                error = race.lost(number, code, message, told, time.monotonic())
                if error is not None:
                    raise error
        finally:
            if call is not None:
                call.cancel()
            await feed.close()

    async def health(self, *, timeout: float | None = None) -> Mapping[str, str]:
        """As `Client.health`."""
        request = health_pb2.HealthCheckRequest(service=HEALTH_SERVICE)

        limit = self._options.timeout if timeout is None else timeout

        async def ask(name: str) -> str:
            async with self._channel(name, watched=False) as channel:
                try:
                    answer = await health_pb2_grpc.HealthStub(channel).Check(request, timeout=limit)
                except grpc.aio.AioRpcError as error:
                    return str(error.code().name)
                return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))

        said = await asyncio.gather(*(ask(name) for name in self._endpoints.names))
        return dict(zip(self._endpoints.names, said, strict=True))

    def _channel(self, name: str, *, watched: bool = True) -> Any:
        credentials, arguments = self._options.credentials(), self._options.channel_arguments(watched=watched)
        if credentials is None:
            return grpc.aio.insecure_channel(name, arguments)
        return grpc.aio.secure_channel(name, credentials, arguments)

    async def _call(
        self, method: str, request: Any, timeout: float | None, only: int | None = None, *, read: bool = True
    ) -> tuple[Any, str, tuple[Try, ...]]:
        endpoints = self._endpoints if only is None else self._alone[only]
        stubs = self._stubs if only is None else [self._stubs[only]]
        limit = self._options.timeout if timeout is None else timeout
        race = Race(endpoints, self._options, time.monotonic(), limit, read=read and only is None)
        running: dict[asyncio.Task[Any], int] = {}

        async def ask(stub: Any) -> Any:
            call = getattr(stub, method)
            return await call(request, timeout=race.deadline - time.monotonic(), metadata=self._options.metadata())

        try:
            while True:
                number = race.start(time.monotonic())
                if number is not None:
                    running[asyncio.create_task(ask(stubs[number]))] = number
                wake = race.wake()
                pause = None if wake is None else max(0.0, wake - time.monotonic())
                if not running:
                    await asyncio.sleep(pause or 0.0)
                    continue
                done, _ = await asyncio.wait(running, timeout=pause, return_when=asyncio.FIRST_COMPLETED)
                # Answers first.
                for task in sorted(done, key=lambda each: each.cancelled() or each.exception() is not None):
                    number = running.pop(task)
                    try:
                        answer = task.result()
                    except asyncio.CancelledError:  # not this call's own task: the client was closed
                        race.failures.append(Try(endpoints.names[number], grpc.StatusCode.CANCELLED, "client closed"))
                        raise CallError(race.failures) from None
                    except grpc.aio.AioRpcError as caught:
                        told = pushback(_pairs(caught.trailing_metadata()))
                        error = race.lost(number, caught.code(), caught.details() or "", told, time.monotonic())
                        if error is not None:
                            raise error from None
                    else:
                        race.won(number, time.monotonic())
                        return answer, endpoints.names[number], tuple(race.failures)
        finally:
            for task in running:
                task.cancel()
            # A cancelled task ends by telling the server so; its own end is of no interest.
            await asyncio.gather(*running, return_exceptions=True)


def _pairs(metadata: Any) -> list[tuple[str, str | bytes]]:
    return [(str(key), value) for key, value in metadata or ()]
