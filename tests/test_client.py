"""The Python client against real server processes: one dies, one hangs, one is overloaded, one wants a token."""

import asyncio
import contextlib
import json
import random
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import HealthServicer
from publisher import free_port

from kvindex_client import AsyncClient, CallError, Client, MmFeature, Options, Query, Scores, Tls, Trust
from kvindex_client.errors import CUT_OFF, Pushback, broken, pushback
from kvindex_client.race import Endpoints, Race
from kvindex_client.resume import Feed
from kvindex_server.pb.kvindex.v1 import kvindex_pb2 as pb
from kvindex_server.pb.kvindex.v1.kvindex_pb2_grpc import KVIndexAdminStub

ROOT = Path(__file__).resolve().parent.parent
TOKENS = list(range(64))
QUERY = Query("m", tokens=TOKENS, pods=["10.0.0.1:8000", "10.0.0.2:8000"])
TOKEN = "reader-token-0123456789"


class Replica:
    """`kvindex-server serve` in a process of its own, with model m of 16-token blocks and two pods that say nothing."""

    def __init__(self, folder: Path, listen: str = "127.0.0.1:0", **settings: Any) -> None:
        model = {"name": "m", "block_size": 16}
        # Nobody publishes there: the pods are known, and COLD.
        pods = [{"pod": pod, "model": "m", "endpoint": f"tcp://127.0.0.1:{free_port()}"} for pod in QUERY.pods]
        ready = {"server": {"ready_timeout_seconds": 0.1, **settings.pop("server", {})}}
        config = folder / f"config-{random.randrange(1 << 30)}.yaml"
        config.write_text(json.dumps({"models": [model], "pods": pods, **ready, **settings}))
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", "kvindex_server", "serve", "--config", str(config)),
                *("--listen", listen, "--metrics-listen", "127.0.0.1:0"),
            ],
            stdout=subprocess.PIPE,
            stderr=(folder / "stderr").open("ab"),
            text=True,
        )
        assert self._process.stdout is not None
        found = re.search(r"listening grpc=(\S+) metrics=(\S+)", self._process.stdout.readline())
        assert found is not None
        self.address, self.metrics = found[1], found[2]

    def wait_ready(self) -> "Replica":
        with grpc.insecure_channel(self.address) as channel:
            wait_healthy(channel)
        return self

    def pause(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def end(self) -> None:
        self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.communicate(timeout=10)


def wait_healthy(channel: grpc.Channel) -> None:
    ask = health_pb2.HealthCheckRequest(service="kvindex.v1.KVIndex")
    eventually(
        lambda: (
            health_pb2_grpc.HealthStub(channel).Check(ask, wait_for_ready=True, timeout=20).status
            == health_pb2.HealthCheckResponse.SERVING
        )
    )


def eventually(check: Callable[[], bool], seconds: float = 20.0) -> None:
    ends = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < ends, "did not come true in time"
        time.sleep(0.02)


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Replica]]:
    with contextlib.ExitStack() as stack:

        def start(**settings: Any) -> Replica:
            replica = Replica(tmp_path, **settings)
            stack.callback(replica.kill)
            return replica

        yield start


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """Two replicas that stay well."""
    replicas = [Replica(tmp_path_factory.mktemp("replica")) for _ in range(2)]
    yield [replica.wait_ready().address for replica in replicas]
    for replica in replicas:
        replica.kill()


# --- answers ---


def check_placed(scores: Scores) -> None:
    best, other = scores.pods
    assert (best.pod, best.score, best.speculative_blocks, best.matched_blocks) == ("10.0.0.2:8000", 4.0, 4, 0)
    assert (other.pod, other.score) == ("10.0.0.1:8000", 0.0)
    assert best.trust is Trust.COLD and best.age_seconds == -1 and best.trust_reason
    assert (scores.total_blocks, scores.block_size, scores.total_tokens) == (4, 16, 64)
    assert scores.failed == ()


def test_every_call_gives_typed_answers(pair: list[str]) -> None:
    """A placement is seen by every replica, and shows in score, stream and blocks."""
    with Client(pair, Options(timeout=10)) as client:
        placed = client.record_placement(QUERY, "10.0.0.2:8000", rank=0, ttl_seconds=30)
        assert (placed.total_blocks, placed.rank, placed.ttl_seconds) == (4, 0, 30.0)
        assert placed.recorded_by == tuple(pair) and placed.failed == ()
        answers = [client.score(QUERY) for _ in range(4)]
        assert {answer.endpoint for answer in answers} == set(pair)  # each has its turn
        for answer in answers:
            check_placed(answer)
        blocks = client.pods_for_blocks(Query("m", tokens=TOKENS))
        assert [[(each.pod, each.speculative) for each in block.holders] for block in blocks.blocks] == [
            [("10.0.0.2:8000", True)]
        ] * 4
        assert blocks.block_size == 16 and all(block.key for block in blocks.blocks)
        by_key = client.score(Query("m", keys=[block.key for block in blocks.blocks], pods=QUERY.pods))
        assert by_key.pods[0].speculative_blocks == 4
        assert client.pods_for_blocks(Query("m", engine_hashes=[b"a", b"b"])).blocks[0].holders == ()
        assert len(client.pods_for_blocks(Query("m", engine_hashes=[1, 2, 3])).blocks) == 3
        assert client.health() == dict.fromkeys(pair, "SERVING")
        stub = client.stubs[pair[0]]
        assert stub.Score(QUERY.score_request(), timeout=10).total_blocks == 4


def test_a_name_given_twice_is_one_replica_with_two_connections(pair: list[str]) -> None:
    """A hedge can go there although there is no other replica; a placement is told once."""
    twice = [pair[0], pair[0]]
    with Client(twice, Options(timeout=10, hedge_after=0.0)) as client:
        assert client.score(QUERY).endpoint == pair[0]
        assert client.record_placement(QUERY, "10.0.0.2:8000", ttl_seconds=30).recorded_by == (pair[0],)

    async def place() -> tuple[str, ...]:
        async with AsyncClient(twice, Options(timeout=10)) as client:
            return (await client.record_placement(QUERY, "10.0.0.2:8000", ttl_seconds=30)).recorded_by

    assert asyncio.run(place()) == (pair[0],)


def test_a_stream_answers_in_order_and_outlives_a_bad_query(pair: list[str]) -> None:
    """Answers and errors come in the order of the queries."""
    queries = [Query("m", tokens=TOKENS[: 16 * n]) for n in (1, 2)] + [Query("absent", tokens=[1])] + [QUERY]
    with Client(pair) as client:
        answers = list(client.score_stream(queries, timeout=10))
    assert [each.total_blocks if isinstance(each, Scores) else each.code for each in answers] == [
        1,
        2,
        grpc.StatusCode.NOT_FOUND,
        4,
    ]


def test_asyncio_gives_the_same(pair: list[str]) -> None:
    """Every call of the asynchronous client, answers as above."""

    async def run() -> None:
        async with AsyncClient(pair, Options(timeout=10)) as client:
            placed = await client.record_placement(QUERY, "10.0.0.2:8000", ttl_seconds=30)
            assert placed.recorded_by == tuple(pair)
            answers = await asyncio.gather(*(client.score(QUERY) for _ in range(8)))
            assert {answer.endpoint for answer in answers} == set(pair)
            for answer in answers:
                check_placed(answer)
            blocks = await client.pods_for_blocks(Query("m", tokens=TOKENS))
            assert [block.holders[0].pod for block in blocks.blocks] == ["10.0.0.2:8000"] * 4

            async def queries() -> AsyncIterator[Query]:
                yield QUERY
                yield Query("absent", tokens=[1])

            told = [each async for each in client.score_stream(queries(), timeout=10)]
            assert isinstance(told[0], Scores) and isinstance(told[1], CallError)
            assert await client.health() == dict.fromkeys(pair, "SERVING")
            with pytest.raises(CallError) as caught:
                await client.score(Query("absent", tokens=[1]))
            assert caught.value.code is grpc.StatusCode.NOT_FOUND
            assert (await client.stubs[pair[0]].Score(QUERY.score_request(), timeout=10)).total_blocks == 4

    asyncio.run(run())


def test_a_bad_request_is_asked_once(pair: list[str]) -> None:
    """What is wrong with a request is wrong everywhere: no second try, and the server's words reach the caller."""
    with Client(pair) as client:
        for query, code, words in (
            (Query("m", tokens=TOKENS, mm_features=[MmFeature("h", 60, 100)]), "INVALID_ARGUMENT", "mm_features"),
            (Query("absent", tokens=TOKENS), "NOT_FOUND", "model"),
        ):
            with pytest.raises(CallError) as caught:
                client.score(query)
            assert caught.value.code.name == code and words in caught.value.message
            assert len(caught.value.tries) == 1


@pytest.mark.parametrize("inputs", [{}, {"prompt": "a", "tokens": [1]}])
def test_a_query_has_exactly_one_input(inputs: dict[str, Any]) -> None:
    """Nothing is guessed when there is none, and none is dropped when there are two."""
    with pytest.raises(ValueError, match="exactly one of prompt"):
        Query("m", **inputs)


USAGE = {"predicted_tokens": 64, "cached_tokens": 48, "prompt_tokens": 70}


def reported(replica: Replica) -> float:
    """Reports that said too many, as this replica counts them."""
    with urllib.request.urlopen(f"http://{replica.metrics}/metrics", timeout=10) as answer:
        found = re.search(
            r'kvindex_usage_error_tokens_count\{direction="over",model="m"\} (\S+)', answer.read().decode()
        )
    return float(found[1]) if found is not None else 0.0


@pytest.mark.parametrize("kind", ["threads", "asyncio"])
def test_usage_is_told_to_one_replica_and_once(serve: Callable[..., Replica], kind: str) -> None:
    """Both have their turns; what cannot be right is an error; and when one is gone nothing is told twice."""
    replicas = [serve().wait_ready(), serve().wait_ready()]
    addresses, options = [each.address for each in replicas], Options(timeout=10, hedge_after=0.0)

    def report(pod: str, **told: int) -> None:
        if kind == "threads":
            with Client(addresses, options) as client:
                client.report_usage("m", pod, **(USAGE | told))
            return

        async def run() -> None:
            async with AsyncClient(addresses, options) as client:
                await client.report_usage("m", pod, **(USAGE | told))

        asyncio.run(run())

    for _ in range(3):
        report("10.0.0.2:8000")
    assert sum(map(reported, replicas)) == 3
    for pod, told, code, words in (
        ("10.0.0.9:8000", {}, "NOT_FOUND", "pod"),
        ("10.0.0.2:8000", {"prompt_tokens": 40}, "INVALID_ARGUMENT", "predicted_tokens"),
    ):
        with pytest.raises(CallError) as caught:
            report(pod, **told)
        assert caught.value.code.name == code and words in caught.value.message and len(caught.value.tries) == 1
    with pytest.raises(ValueError, match="-1"):
        report("10.0.0.2:8000", cached_tokens=-1)
    replicas[0].kill()
    with pytest.raises(CallError) as caught:  # the first one's turn
        report("10.0.0.2:8000")
    assert caught.value.code is grpc.StatusCode.UNAVAILABLE and len(caught.value.tries) == 1
    assert reported(replicas[1]) == 0


def test_a_query_becomes_the_message_it_stands_for() -> None:
    """Every field arrives in its own; a chat object is sent as JSON."""
    chat = {"messages": [{"role": "user", "content": "é"}]}
    query = Query(
        "m", chat=chat, pods=["a"], lora_name="l", cache_salt="s", mm_features=[MmFeature("h", 1, 2)], top_k=3
    )
    message = query.score_request()
    assert json.loads(message.chat) == chat and "é" in message.chat
    assert (message.model, list(message.pods), message.lora_name, message.cache_salt) == ("m", ["a"], "l", "s")
    assert message.mm_features == [pb.MmFeature(hash="h", offset=1, length=2)] and message.top_k == 3
    placement = query.placement_request("a", None, None)
    assert placement.chat == message.chat and placement.pod == "a"
    assert not placement.HasField("rank") and not placement.HasField("ttl_seconds")
    with pytest.raises(ValueError, match="engine_hashes cannot be asked by score"):
        Query("m", engine_hashes=[1]).score_request()


# --- trouble ---


@pytest.mark.parametrize("kind", ["threads", "asyncio"])
def test_a_replica_killed_mid_way_costs_no_answer(serve: Callable[..., Replica], kind: str) -> None:
    """Callers go on while one of two replicas dies; when it is back it has its turn again."""
    first, second = serve().wait_ready(), serve().wait_ready()
    addresses = [first.address, second.address]
    options = Options(timeout=10, retry_budget=100)
    by: list[str] = []
    stop = threading.Event()

    def call(client: Client) -> None:
        while not stop.is_set():
            by.append(client.score(QUERY).endpoint)

    async def ask(client: AsyncClient) -> None:
        while not stop.is_set():
            by.append((await client.score(QUERY)).endpoint)

    async def ask_from_four() -> None:
        async with AsyncClient(addresses, options) as client:
            await asyncio.gather(*(ask(client) for _ in range(4)))

    def seen(address: str, since: int) -> bool:
        return address in by[since:]

    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(futures.ThreadPoolExecutor(4))
        stack.callback(stop.set)
        if kind == "threads":
            client = stack.enter_context(Client(addresses, options))
            stack.callback(stop.set)
            running = [pool.submit(call, client) for _ in range(4)]
        else:
            running = [pool.submit(asyncio.run, ask_from_four())]
        eventually(lambda: seen(first.address, 0) and seen(second.address, 0))
        first.kill()
        after = len(by)
        eventually(lambda: len(by) > after + 100)
        again = serve(listen=first.address).wait_ready()
        assert again.address == first.address
        since = len(by)
        eventually(lambda: seen(first.address, since))
        stop.set()
        for each in running:
            each.result(timeout=20)  # no caller has met an error


def test_a_dead_fleet_is_an_error_at_once(serve: Callable[..., Replica]) -> None:
    """No waiting for a deadline that nobody will meet: each replica was tried, and the error says so."""
    replicas = [serve().wait_ready() for _ in range(2)]
    with Client([each.address for each in replicas], Options(timeout=20, tries=2)) as client:
        client.score(QUERY)
        for each in replicas:
            each.kill()
        began = time.monotonic()
        with pytest.raises(CallError) as caught:
            client.score(QUERY)
        assert time.monotonic() - began < 10
        assert caught.value.code is grpc.StatusCode.UNAVAILABLE
        assert {each.endpoint for each in caught.value.tries} == {each.address for each in replicas}
        with pytest.raises(CallError) as caught:
            client.record_placement(QUERY, "10.0.0.2:8000")
        assert caught.value.code is grpc.StatusCode.UNAVAILABLE


def test_a_placement_says_which_replica_missed_it(serve: Callable[..., Replica], pair: list[str]) -> None:
    """One replica is gone: the other records, and the result names the one that did not."""
    gone = serve().wait_ready()
    gone.kill()
    with Client([gone.address, pair[0]], Options(timeout=5)) as client:
        placed = client.record_placement(QUERY, "10.0.0.2:8000", ttl_seconds=1)
    assert placed.recorded_by == (pair[0],) and placed.total_blocks == 4
    assert [(each.endpoint, each.code.name) for each in placed.failed] == [(gone.address, "UNAVAILABLE")]


@pytest.mark.parametrize("kind", ["threads", "asyncio"])
def test_a_hedge_answers_for_a_replica_that_hangs(serve: Callable[..., Replica], pair: list[str], kind: str) -> None:
    """A stopped process keeps its connections: only a second try elsewhere answers before the deadline."""
    slow = serve().wait_ready()
    # Fewer hedges than calls: they must suffice, because who lost one is left alone for a while.
    options = Options(timeout=20, hedge_after=0.05, retry_budget=4, retry_ratio=0)
    addresses = [slow.address, pair[0]]

    async def ask_twice() -> list[Scores]:
        async with AsyncClient(addresses, options) as client:
            await client.score(QUERY)
            slow.pause()
            return [await client.score(QUERY) for _ in range(20)]

    began = time.monotonic()
    if kind == "asyncio":
        answers = asyncio.run(ask_twice())
    else:
        with Client(addresses, options) as client:
            client.score(QUERY)
            slow.pause()
            answers = [client.score(QUERY) for _ in range(20)]
    slow.go_on()
    assert {answer.endpoint for answer in answers} == {pair[0]}
    assert time.monotonic() - began < 10


def test_without_a_hedge_the_deadline_ends_the_call(serve: Callable[..., Replica]) -> None:
    """A replica that hangs costs the caller its timeout and no more."""
    slow = serve().wait_ready()
    with Client(slow.address, Options(timeout=10)) as client:
        client.score(QUERY)
        slow.pause()
        began = time.monotonic()
        with pytest.raises(CallError) as caught:
            client.score(QUERY, timeout=0.2)
        took = time.monotonic() - began
        slow.go_on()
    assert caught.value.code is grpc.StatusCode.DEADLINE_EXCEEDED and 0.2 <= took < 5


@pytest.mark.parametrize("kind", ["threads", "asyncio"])
def test_the_loser_of_a_hedge_is_cancelled(kind: str) -> None:
    """The server that was too slow hears that its answer is not wanted any more."""
    cancelled = threading.Event()

    def hang(request: bytes, context: grpc.ServicerContext) -> bytes:
        context.add_callback(cancelled.set)
        assert cancelled.wait(20)
        return b""

    with plain_server(hang) as slow, plain_server(lambda *_: pb.ScoreResponse(total_blocks=4)) as fast:
        options = Options(timeout=20, hedge_after=0.05)
        if kind == "threads":
            with Client([slow, fast], options) as client:
                answer = client.score(QUERY)
                assert cancelled.wait(10)
        else:

            async def ask() -> Scores:
                async with AsyncClient([slow, fast], options) as client:
                    found = await client.score(QUERY)
                    assert await asyncio.to_thread(cancelled.wait, 10)
                    return found

            answer = asyncio.run(ask())
    assert answer.endpoint == fast and answer.total_blocks == 4


@pytest.mark.parametrize("kind", ["threads", "asyncio"])
def test_closing_ends_what_is_under_way(kind: str) -> None:
    """Whoever waits for an answer gets an error of the call, not one of the event loop."""
    asked, over = threading.Event(), threading.Event()

    def hang(request: bytes, context: grpc.ServicerContext) -> bytes:
        asked.set()
        assert over.wait(20)
        return b""

    with plain_server(hang) as slow, pytest.raises(CallError) as caught:
        try:
            if kind == "threads":
                with Client(slow, Options(timeout=20)) as client, futures.ThreadPoolExecutor(1) as pool:
                    call = pool.submit(client.score, QUERY)
                    assert asked.wait(10)
                    client.close()
                    call.result(timeout=10)
            else:

                async def ask() -> None:
                    client = AsyncClient(slow, Options(timeout=20))
                    call = asyncio.create_task(client.score(QUERY))
                    assert await asyncio.to_thread(asked.wait, 10)
                    await client.close()
                    await asyncio.wait_for(call, 10)

                asyncio.run(ask())
        finally:
            over.set()
    assert caught.value.code is grpc.StatusCode.CANCELLED


@pytest.mark.parametrize("kind", ["threads", "asyncio"])
def test_a_replica_that_is_not_ready_is_not_asked(kind: str) -> None:
    """Its health keeps calls away before any of them reaches it, and lets them in when it is ready."""
    asked: list[str] = []

    def answer(blocks: int) -> Callable[..., pb.ScoreResponse]:
        def score(request: pb.ScoreRequest, context: grpc.ServicerContext) -> pb.ScoreResponse:
            asked.append(str(blocks))
            return pb.ScoreResponse(total_blocks=blocks)

        return score

    serving, status = health_pb2.HealthCheckResponse, HealthServicer()
    status.set("kvindex.v1.KVIndex", serving.NOT_SERVING)
    with plain_server(answer(1), status) as unready, plain_server(answer(2)) as ready:
        options = Options(timeout=20, retry_budget=1000)
        if kind == "threads":
            with Client([unready, ready], options) as client:
                assert [client.score(QUERY).total_blocks for _ in range(6)] == [2] * 6
                assert client.health() == {unready: "NOT_SERVING", ready: "SERVING"}
                status.set("kvindex.v1.KVIndex", serving.SERVING)
                eventually(lambda: client.score(QUERY).total_blocks == 1)
        else:

            async def ask() -> None:
                async with AsyncClient([unready, ready], options) as client:
                    assert [(await client.score(QUERY)).total_blocks for _ in range(6)] == [2] * 6
                    assert await client.health() == {unready: "NOT_SERVING", ready: "SERVING"}
                    status.set("kvindex.v1.KVIndex", serving.SERVING)
                    ends = time.monotonic() + 20
                    while (await client.score(QUERY)).total_blocks != 1:
                        assert time.monotonic() < ends
                        await asyncio.sleep(0.02)

            asyncio.run(ask())
    assert asked[:6] == ["2"] * 6


@contextlib.contextmanager
def plain_server(score: Callable[..., Any], health: HealthServicer | None = None) -> Iterator[str]:
    """A gRPC server of which only Score and health are there."""
    server = grpc.server(futures.ThreadPoolExecutor(4))
    if health is None:
        health = HealthServicer()
        health.set("kvindex.v1.KVIndex", health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    handler = grpc.unary_unary_rpc_method_handler(
        score, pb.ScoreRequest.FromString, lambda answer: answer and answer.SerializeToString()
    )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("kvindex.v1.KVIndex", {"Score": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(0).wait(10)


@contextlib.contextmanager
def held(address: str, method: str) -> Iterator[None]:
    """Holds a permit of this RPC: a call whose message never comes. One that is turned away is made again."""
    over = threading.Event()

    def nothing() -> Iterator[bytes]:
        over.wait(20)
        yield from ()

    with grpc.insecure_channel(address) as channel:
        grpc.channel_ready_future(channel).result(10)
        calls = [channel.stream_stream(f"/kvindex.v1.KVIndex/{method}")(nothing())]

        def hold() -> None:
            while not over.is_set():
                with contextlib.suppress(grpc.RpcError):
                    list(calls[-1])
                if not over.wait(0.01):
                    calls.append(channel.stream_stream(f"/kvindex.v1.KVIndex/{method}")(nothing()))

        holding = threading.Thread(target=hold)
        holding.start()
        try:
            yield
        finally:
            over.set()
            calls[-1].cancel()
            holding.join(10)


def overloaded(call: Callable[[], object]) -> bool:
    """Whether calls are refused, time and again: one alone may have met the end of the call before it."""
    for _ in range(4):
        try:
            call()
        except CallError as error:
            if error.code is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                return False
        else:
            return False
        time.sleep(0.03)
    return True


@pytest.mark.parametrize("method", ["Score", "RecordPlacement"])
def test_an_overloaded_replica_is_asked_again_when_it_says(serve: Callable[..., Replica], method: str) -> None:
    """Refused with a pause of 100 ms: the next try keeps to it, placements too, since a refusal did nothing."""
    replica = serve(limits={"max_in_flight": 1}).wait_ready()
    options = Options(timeout=20, tries=50, retry_budget=50)

    def call(client: Client) -> Any:
        return client.score(QUERY) if method == "Score" else client.record_placement(QUERY, "10.0.0.2:8000")

    with Client(replica.address, options) as client, contextlib.ExitStack() as holder:
        call(client)
        holder.enter_context(held(replica.address, method))
        with Client(replica.address, Options(timeout=10, tries=1)) as impatient:
            eventually(lambda: overloaded(lambda: call(impatient)))
        timer = threading.Timer(0.6, holder.close)
        timer.start()
        began = time.monotonic()
        answer = call(client)
        took = time.monotonic() - began
        timer.join()
    assert took >= 0.3
    if method == "Score":
        # It was refused about every 100 ms, and not more often.
        assert 2 <= len(answer.failed) <= took / 0.1 + 1
        assert {each.code for each in answer.failed} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
    else:
        assert answer.recorded_by == (replica.address,)


def test_another_replica_is_asked_at_once_for_an_overloaded_one(serve: Callable[..., Replica], pair: list[str]) -> None:
    """The pause is one replica's own; a read need not wait where another is free."""
    full = serve(limits={"max_in_flight": 1}).wait_ready()
    with Client([full.address, pair[0]], Options(timeout=10)) as client, held(full.address, "Score"):
        with Client(full.address, Options(timeout=10, tries=1)) as alone:
            eventually(lambda: overloaded(lambda: alone.score(QUERY)))
        answer = client.score(QUERY)
    assert answer.endpoint == pair[0]
    assert [each.endpoint for each in answer.failed] == [full.address]


def test_tls_and_a_token_that_changes(serve: Callable[..., Replica], tmp_path: Path) -> None:
    """mTLS with a private CA, and a bearer token that is asked for anew at every try."""
    ca = trustme.CA()
    made, own = ca.issue_cert("127.0.0.1"), ca.issue_cert("router.example")
    files = {name: tmp_path / name for name in ("ca.pem", "tls.crt", "tls.key", "tokens", "operators")}
    ca.cert_pem.write_to_path(files["ca.pem"])
    files["tls.crt"].write_bytes(b"".join(each.bytes() for each in made.cert_chain_pems))
    made.private_key_pem.write_to_path(files["tls.key"])
    files["tokens"].write_text(f"{TOKEN}\n")
    files["operators"].write_text("operator-token-0123456789\n")
    replica = serve(
        tls={
            "cert_file": str(files["tls.crt"]),
            "key_file": str(files["tls.key"]),
            "client_ca_file": str(files["ca.pem"]),
        },
        auth={"tokens_file": str(files["tokens"]), "admin_tokens_file": str(files["operators"])},
    )
    tokens = iter(["wrong-token-0123456789"] + [TOKEN] * 100)
    tls = Tls(
        ca=ca.cert_pem.bytes(),
        cert=b"".join(each.bytes() for each in own.cert_chain_pems),
        key=own.private_key_pem.bytes(),
    )
    options = Options(timeout=10, tls=tls, token=lambda: next(tokens))
    with Client(replica.address, options) as client:
        eventually(lambda: client.health() == {replica.address: "SERVING"})
        with pytest.raises(CallError) as caught:
            client.score(QUERY)
        assert caught.value.code is grpc.StatusCode.UNAUTHENTICATED and len(caught.value.tries) == 1
        assert client.score(QUERY).total_blocks == 4
        assert client.record_placement(QUERY, "10.0.0.2:8000").total_blocks == 4
    with Client(replica.address, Options(timeout=2, tls=Tls(ca=ca.cert_pem.bytes()), token=TOKEN)) as client:
        with pytest.raises(CallError) as caught:
            client.score(QUERY)
        assert caught.value.code is grpc.StatusCode.UNAVAILABLE
    assert TOKEN not in repr(options) and "PRIVATE" not in repr(options) and TOKEN not in repr(Options(token=TOKEN))


# --- a stream that breaks ---


def streamed(
    kind: str,
    addresses: list[str],
    options: Options,
    queries: Callable[[], Iterator[Query]],
    heard: Callable[[Scores | CallError], None],
    timeout: float | None = 60,
) -> None:
    """All of a stream; `queries` and `heard` may wait."""
    if kind == "threads":
        with Client(addresses, options) as client:
            for answer in client.score_stream(queries(), timeout=timeout):
                heard(answer)
        return

    async def asked() -> AsyncIterator[Query]:
        source = queries()
        while (query := await asyncio.to_thread(next, source, None)) is not None:
            yield query

    async def run() -> None:
        async with AsyncClient(addresses, options) as client:
            async for answer in client.score_stream(asked(), timeout=timeout):
                await asyncio.to_thread(heard, answer)

    asyncio.run(run())


def prompts(count: int) -> list[Query]:
    """Of 1, 2, 3, 4, 1, ... blocks: an answer that is lost, doubled or out of turn shows."""
    return [Query("m", tokens=TOKENS[: 16 * (number % 4 + 1)]) for number in range(count)]


def in_turn(answers: list[Scores | CallError], count: int) -> bool:
    blocks = [each.total_blocks for each in answers if isinstance(each, Scores)]
    return blocks == [number % 4 + 1 for number in range(count)]


KINDS = pytest.mark.parametrize("kind", ["threads", "asyncio"])


def test_how_a_stream_broke() -> None:
    """A draining server and a connection that went are reasons to go elsewhere; a server's own INTERNAL is an error."""
    assert broken(grpc.StatusCode.CANCELLED, "whatever") == CUT_OFF
    assert broken(grpc.StatusCode.INTERNAL, "Internal error from Core") == CUT_OFF
    assert broken(grpc.StatusCode.INTERNAL, "boom") == (grpc.StatusCode.INTERNAL, "boom")
    assert broken(grpc.StatusCode.UNAVAILABLE, None) == (grpc.StatusCode.UNAVAILABLE, "")


@KINDS
def test_a_stream_goes_on_at_the_next_replica(serve: Callable[..., Replica], kind: str) -> None:
    """The replica that answers dies with queries under way: each query is answered once, in order."""
    replicas = {each.address: each for each in (serve().wait_ready(), serve().wait_ready())}
    answers: list[Scores | CallError] = []

    def queries() -> Iterator[Query]:
        for number, query in enumerate(prompts(200)):
            if number == 120:  # some are answered by now, and some on their way
                eventually(lambda: len(answers) > 50)
                first = answers[0]
                assert isinstance(first, Scores)
                replicas[first.endpoint].kill()
            yield query

    streamed(kind, list(replicas), Options(), queries, answers.append)
    assert in_turn(answers, 200)
    assert len({each.endpoint for each in answers if isinstance(each, Scores)}) == 2


@KINDS
def test_a_stream_outlives_a_restart_of_the_only_replica(serve: Callable[..., Replica], kind: str) -> None:
    """While the replica is away the client waits and tries, and the query that comes meanwhile is answered too."""
    first = serve().wait_ready()
    answers: list[Scores | CallError] = []

    def queries() -> Iterator[Query]:
        for number, query in enumerate(prompts(12)):
            if number == 6:
                eventually(lambda: len(answers) == 6)
                first.kill()
                threading.Timer(1.0, lambda: serve(listen=first.address)).start()
            yield query

    streamed(kind, [first.address], Options(tries=100, retry_budget=100, backoff_max=0.3), queries, answers.append)
    assert in_turn(answers, 12)


@KINDS
def test_a_stream_that_is_silent_while_its_server_drains_goes_on(serve: Callable[..., Replica], kind: str) -> None:
    """SIGTERM ends streams whose next query does not come; that is a reason to go elsewhere, not an error."""
    replicas = {each.address: each for each in (serve().wait_ready(), serve().wait_ready())}
    answers: list[Scores | CallError] = []

    def queries() -> Iterator[Query]:
        yield from prompts(4)
        eventually(lambda: len(answers) == 4)
        assert isinstance(answers[0], Scores)
        replicas[answers[0].endpoint].end()
        time.sleep(2.5)
        yield from prompts(8)[4:]

    streamed(kind, list(replicas), Options(), queries, answers.append)
    assert in_turn(answers, 8)


@KINDS
def test_a_stream_to_a_dead_fleet_ends_with_all_its_tries(serve: Callable[..., Replica], kind: str) -> None:
    """Nobody waits for ever: `tries` connections without an answer are the error."""
    replicas = [serve().wait_ready() for _ in range(2)]
    answers: list[Scores | CallError] = []

    def queries() -> Iterator[Query]:
        yield from prompts(2)
        eventually(lambda: len(answers) == 2)
        for each in replicas:
            each.kill()
        yield QUERY

    with pytest.raises(CallError) as caught:
        streamed(kind, [each.address for each in replicas], Options(tries=3), queries, answers.append, timeout=None)
    assert in_turn(answers, 2)
    assert [each.code.name for each in caught.value.tries] == ["UNAVAILABLE"] * 3
    assert {each.endpoint for each in caught.value.tries} == {each.address for each in replicas}


@KINDS
def test_the_time_of_a_stream_is_of_all_its_connections(serve: Callable[..., Replica], kind: str) -> None:
    """A stream whose next query never comes ends at its deadline."""
    replica, over = serve().wait_ready(), threading.Event()

    def queries() -> Iterator[Query]:
        yield QUERY
        over.wait(4)

    began = time.monotonic()
    with pytest.raises(CallError) as caught:
        try:
            streamed(kind, [replica.address], Options(), queries, lambda _: None, timeout=1.0)
        finally:
            took = time.monotonic() - began
            over.set()
    assert caught.value.code is grpc.StatusCode.DEADLINE_EXCEEDED and took >= 1.0


def test_what_an_old_connection_still_gets_goes_to_the_new_one() -> None:
    """Its thread waits for the source's next query when the connection is lost: that query is sent by the new one."""
    come, waits = threading.Event(), threading.Event()

    def source() -> Iterator[int]:
        yield 1
        waits.set()
        assert come.wait(20)
        yield 2
        yield 3

    feed = Feed(source())
    old = feed.connection()
    assert next(old) == 1
    with futures.ThreadPoolExecutor(2) as pool:
        stuck = pool.submit(next, old, None)
        assert waits.wait(20)
        new = feed.connection()
        assert next(new) == 1  # it has no answer yet
        second = pool.submit(next, new, None)
        come.set()
        assert (stuck.result(20), second.result(20)) == (None, 2)
    assert feed.answered() and feed.answered() and not feed.answered()
    assert (next(new), feed.done, next(new, None)) == (3, False, None)
    assert not feed.done and feed.answered() and feed.done


def test_an_error_of_the_queries_is_not_taken_for_their_end() -> None:
    """Also when the connection that met it is gone."""

    def source() -> Iterator[int]:
        yield 1
        raise RuntimeError("the caller's own")

    feed = Feed(source())
    old = feed.connection()
    assert next(old) == 1 and feed.answered()
    with pytest.raises(RuntimeError, match="own"):
        next(old)
    with pytest.raises(RuntimeError, match="own"):
        next(feed.connection())
    assert not feed.done


@KINDS
def test_a_server_that_answers_too_much_is_an_error(kind: str) -> None:
    """An answer to nothing would be taken for the next query's."""

    def twice(requests: Iterator[Any], _: grpc.ServicerContext) -> Iterator[Any]:
        for _request in requests:
            yield pb.ScoreResponse(total_blocks=1)
            yield pb.ScoreResponse(total_blocks=1)

    server = grpc.server(futures.ThreadPoolExecutor(4))
    health = HealthServicer()
    health.set("kvindex.v1.KVIndex", health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    handler = grpc.stream_stream_rpc_method_handler(
        twice, pb.ScoreRequest.FromString, pb.ScoreResponse.SerializeToString
    )
    service = grpc.method_handlers_generic_handler("kvindex.v1.KVIndex", {"ScoreStream": handler})
    server.add_generic_rpc_handlers((service,))
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        with pytest.raises(CallError) as caught:
            streamed(kind, [address], Options(), lambda: iter([QUERY]), lambda _: None)
    finally:
        server.stop(0).wait(10)
    assert caught.value.code is grpc.StatusCode.INTERNAL


@KINDS
def test_closing_ends_a_stream(serve: Callable[..., Replica], kind: str) -> None:
    """Whoever waits for an answer gets an error of the call, and no connection is made anew."""
    replica, over = serve().wait_ready(), threading.Event()

    def queries() -> Iterator[Query]:
        yield QUERY
        over.wait(20)

    async def run() -> None:
        client = AsyncClient(replica.address)
        asked = iter(queries())

        async def from_thread() -> AsyncIterator[Query]:
            while (query := await asyncio.to_thread(next, asked, None)) is not None:
                yield query

        async for _ in client.score_stream(from_thread()):
            asyncio.get_running_loop().call_later(0.2, lambda: asyncio.ensure_future(client.close()))
            threading.Timer(1.0, over.set).start()

    with pytest.raises(CallError) as caught:
        try:
            if kind == "asyncio":
                asyncio.run(asyncio.wait_for(run(), 20))
            else:
                client = Client(replica.address)
                for _ in client.score_stream(queries()):
                    threading.Timer(0.2, client.close).start()
        finally:
            over.set()
    assert caught.value.code is grpc.StatusCode.CANCELLED


@KINDS
def test_headers_are_sent_with_every_try(kind: str) -> None:
    """What makes the server's span the caller's child."""
    seen: list[str] = []

    def score(_: Any, context: grpc.ServicerContext) -> Any:
        seen.append(dict(context.invocation_metadata())["traceparent"])
        return pb.ScoreResponse(total_blocks=1)

    numbers = iter(range(10))
    options = Options(timeout=20, headers=lambda: {"traceparent": f"00-{next(numbers)}"}, token=TOKEN)
    with plain_server(score) as address:
        if kind == "threads":
            with Client(address, options) as client:
                client.score(QUERY)
                client.score(QUERY)
        else:

            async def ask() -> None:
                async with AsyncClient(address, options) as client:
                    await client.score(QUERY)
                    await client.score(QUERY)

            asyncio.run(ask())
    assert seen == ["00-0", "00-1"]


# --- the rules by themselves ---

UNAVAILABLE, EXHAUSTED = grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED


def race(options: Options, count: int = 2, *, read: bool = True, timeout: float = 10.0) -> tuple[Race, Endpoints]:
    endpoints = Endpoints([str(number) for number in range(count)], options, random.Random(1))
    return Race(endpoints, options, 0.0, timeout, read=read), endpoints


@pytest.mark.parametrize(
    ("code", "told", "read", "again"),
    [
        (UNAVAILABLE, None, True, True),
        (UNAVAILABLE, None, False, False),  # it may have been done
        (UNAVAILABLE, Pushback(0.1), False, True),  # the server had not begun
        (EXHAUSTED, None, True, False),  # a message too large stays too large
        (EXHAUSTED, Pushback(0.1), True, True),
        (EXHAUSTED, Pushback(-1.0), True, False),  # the server asks to be left alone
        (UNAVAILABLE, Pushback(-1.0), True, False),
        (grpc.StatusCode.INTERNAL, Pushback(0.1), True, False),
        (grpc.StatusCode.INVALID_ARGUMENT, None, True, False),
        (grpc.StatusCode.DEADLINE_EXCEEDED, None, True, False),
    ],
)
def test_only_what_is_safe_is_tried_again(
    code: grpc.StatusCode, told: Pushback | None, read: bool, again: bool
) -> None:
    """Reads after UNAVAILABLE, everything after a refusal that says when, nothing else."""
    one, _ = race(Options(), read=read)
    first = one.start(0.0)
    assert first is not None
    assert (one.lost(first, code, "", told, 1.0) is None) is again
    if again:
        assert one.start(1.0) == 1 - first  # at once, elsewhere


def test_a_pause_is_kept_and_a_hopeless_one_is_not_waited_for() -> None:
    """One endpoint alone waits as long as it said; beyond the deadline the error comes at once."""
    one, _ = race(Options(), count=1)
    assert one.start(0.0) == 0
    assert one.lost(0, EXHAUSTED, "", Pushback(2.0), 1.0) is None
    wake = one.wake()
    assert wake is not None and 3.0 <= wake <= 3.2
    assert one.start(2.99) is None and one.start(wake) == 0
    error = one.lost(0, EXHAUSTED, "full", Pushback(8.0), wake)
    assert error is not None and len(error.tries) == 2 and error.message == "full"


def test_back_off_grows_and_ends_with_an_answer() -> None:
    """Without a word from the server pauses double up to their bound; an answer ends them."""
    options = Options(backoff=1.0, backoff_max=4.0)
    endpoints = Endpoints(["a"], options, random.Random(1))
    now = 0.0
    for most in (1.0, 2.0, 4.0, 4.0):
        endpoints.failed(0, now, None)
        assert most / 2 <= endpoints.free_at(()) - now <= most
        now = endpoints.free_at(())
    endpoints.answered(0)
    assert endpoints.free_at(()) == 0.0


def test_the_budget_ends_extra_tries() -> None:
    """When nothing answers, retries stop although each call would have tries left; answers earn them back."""
    options = Options(retry_budget=2.0, retry_ratio=0.5)
    endpoints = Endpoints(["a", "b"], options)

    def retried() -> bool:
        one = Race(endpoints, options, 0.0, 100.0, read=True)
        first = one.start(0.0)
        assert first is not None
        return one.lost(first, UNAVAILABLE, "", None, 0.0) is None

    assert [retried() for _ in range(3)] == [True, True, False]
    endpoints.answered(0)
    assert not retried()
    endpoints.answered(0)
    assert retried()


def test_a_hedge_goes_only_where_it_helps() -> None:
    """Not to the endpoint that is asked already, not to one that pauses, never for a placement."""
    hedged = Options(hedge_after=0.5)
    one, _ = race(hedged)
    assert one.start(0.0) == 0 and one.wake() == 0.5
    assert one.start(0.4) is None and one.start(0.5) == 1
    one, _ = race(hedged, count=1)
    assert one.start(0.0) == 0 and one.start(0.5) is None
    one, endpoints = race(hedged)
    assert one.start(0.0) == 0
    endpoints.failed(1, 0.0, Pushback(5.0))
    assert one.start(0.5) is None
    one, _ = race(hedged, read=False)
    assert one.start(0.0) == 0 and one.wake() is None


def test_a_replica_that_loses_to_a_hedge_pauses() -> None:
    """A hung replica costs a hedge once in a while and not at each of its turns; one that wins pauses nobody."""
    options = Options(hedge_after=0.5, backoff=1.0, retry_budget=2.0)
    one, endpoints = race(options)
    assert (one.start(0.0), one.start(0.5)) == (0, 1)
    one.won(1, 0.6)
    assert endpoints.pick(0.7) == 1 and endpoints.pick(0.7) == 1
    assert endpoints.pick(5.0) == 0
    one, endpoints = race(options)
    assert (one.start(0.0), one.start(0.5)) == (0, 1)
    one.won(0, 0.6)
    assert {endpoints.pick(0.7), endpoints.pick(0.7)} == {0, 1}


def test_a_failed_try_waits_for_the_hedge_beside_it() -> None:
    """The last try still running can win; only its failure ends the call."""
    one, _ = race(Options(hedge_after=0.5, tries=2))
    assert (one.start(0.0), one.start(0.5)) == (0, 1)
    assert one.lost(0, UNAVAILABLE, "", None, 1.0) is None
    assert one.wake() is None
    error = one.lost(1, UNAVAILABLE, "", None, 2.0)
    assert error is not None and len(error.tries) == 2


def details(delay: float) -> bytes:
    info, packed = error_details_pb2.RetryInfo(), AnyMessage()
    info.retry_delay.FromMicroseconds(int(delay * 1e6))
    packed.Pack(info)
    return status_pb2.Status(code=8, details=[packed]).SerializeToString()


@pytest.mark.parametrize(
    ("trailers", "seconds"),
    [
        ((), None),
        ((("grpc-retry-pushback-ms", "250"),), 0.25),
        ((("grpc-retry-pushback-ms", "-1"),), -1.0),
        ((("grpc-retry-pushback-ms", "soon"),), -1.0),
        ((("grpc-status-details-bin", details(1.5)),), 1.5),
        ((("grpc-status-details-bin", details(1.5)), ("grpc-retry-pushback-ms", "250")), 0.25),
        ((("grpc-status-details-bin", b"\xff\xff"),), None),
        (None, None),
    ],
)
def test_both_ways_to_say_when_are_understood(trailers: Any, seconds: float | None) -> None:
    """`grpc-retry-pushback-ms` first, then RetryInfo; what nobody can read says nothing."""
    told = pushback(trailers)
    assert (told.seconds if told else None) == seconds


@pytest.mark.parametrize("wrong", [{"timeout": 0}, {"tries": 0}, {"hedge_after": -1}, {"backoff": float("nan")}])
def test_options_without_sense_are_refused(wrong: dict[str, Any]) -> None:
    """The error names the option."""
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Options(**wrong)


def test_a_client_loads_no_server() -> None:
    """What a scheduler imports brings neither the native core nor tokenizers into its process."""
    command = "import sys, kvindex_client; print(*sys.modules, sep='\\n')"
    loaded = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True, timeout=60)
    names = loaded.stdout.split()
    assert "kvindex_client.race" in names
    ours = [each for each in names if each.startswith("kvindex_server.") and not each.startswith("kvindex_server.pb")]
    assert [each for each in names if each in ("tokenizers", "zmq", "jinja2", "pydantic")] + ours == []


# --- the page ---


def test_the_snippets_of_the_page_run(pair: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """docs/clients.md, as it stands, against two replicas instead of the names it has."""
    page = (ROOT / "docs" / "clients.md").read_text(encoding="utf-8")
    snippets = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(snippets) == 3
    for snippet in snippets[:2]:
        names = ("kvindex-0.kvindex:50051", "kvindex-1.kvindex:50051")
        assert all(name in snippet for name in names)
        code = snippet.replace(names[0], pair[0]).replace(names[1], pair[1])
        exec(compile(code, "docs/clients.md", "exec"), {"__name__": "__main__"})
        assert "10.0.0.1:8000 COLD" in capsys.readouterr().out
    with grpc.insecure_channel(pair[0]) as channel:  # what it placed is there
        stats = KVIndexAdminStub(channel).GetStats(pb.GetStatsRequest(), timeout=5)
    assert [model.model for model in stats.models] == ["m"]


def test_the_snippet_of_a_traced_caller_sends_its_span() -> None:
    """docs/clients.md: what it makes of the present span is a `traceparent` of that span."""
    trace = pytest.importorskip("opentelemetry.sdk.trace")
    page = (ROOT / "docs" / "clients.md").read_text(encoding="utf-8")
    snippet = re.findall(r"```python\n(.*?)```", page, re.DOTALL)[2]
    names: dict[str, Any] = {}
    exec(compile(snippet, "docs/clients.md", "exec"), names)
    with trace.TracerProvider().get_tracer("t").start_as_current_span("caller") as span:
        sent = dict(names["options"].metadata())
    context = span.get_span_context()
    assert sent["traceparent"].startswith(f"00-{context.trace_id:032x}-{context.span_id:016x}-0")
