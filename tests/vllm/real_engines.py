"""Two real vLLM engines and the real server: what it says of them is what they find in their caches.

Not named as a test module, so that it runs only when asked for: `make test-vllm`.
"""

import json
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest
from engine import BLOCK_SIZE, Engine
from tiny_model import VOCABULARY, make_model

from kvindex_server.pb.kvindex.v1 import kvindex_pb2 as pb
from kvindex_server.pb.kvindex.v1 import kvindex_pb2_grpc as rpc
from tests.test_server import Process

BLOCKS = 64  # of the engine's cache: 63 to use, so that 60 requests evict
FIRST_PLAIN_TOKEN = 3
TEXT = Path(__file__).parents[2] / "docs" / "decisions.md"


class Server:
    """`python -m kvindex_server serve` with a config file that names the engines."""

    def __init__(self, config: Path) -> None:
        self._process = Process("--config", str(config))
        self._channel = grpc.insecure_channel(self._process.grpc)
        self._index, self._admin = rpc.KVIndexStub(self._channel), rpc.KVIndexAdminStub(self._channel)

    def stop(self) -> None:
        """Ends it and expects a clean end."""
        self._channel.close()
        code, errors = self._process.end()
        assert code == 0, errors

    def score(self, **query: object) -> pb.ScoreResponse:
        """Score of a prompt for all pods."""
        return self._index.Score(pb.ScoreRequest(model="tiny", **query), wait_for_ready=True, timeout=40)

    def matched(self, engine: Engine, tokens: list[int], **query: object) -> int:
        """Leading blocks that the engine is said to hold."""
        pod = str(engine.registration["pod"])
        (score,) = self.score(tokens=pb.Tokens(ids=tokens), pods=[pod], **query).scores
        return int(score.matched_blocks)

    def stream(self, engine: Engine) -> pb.StreamInfo:
        """The engine's one stream."""
        streams = self._admin.ListPods(pb.ListPodsRequest(), wait_for_ready=True, timeout=20).streams
        return next(each for each in streams if each.pod == engine.registration["pod"])

    def settle(self, engine: Engine) -> pb.StreamInfo:
        """Wait until nothing has come for a while: all that the idle engine had to say has been applied."""
        ends, since = time.monotonic() + 30, time.monotonic()
        seen = self.stream(engine)
        while time.monotonic() - since < 0.25 or seen.state != pb.STREAM_STATE_LIVE:
            assert time.monotonic() < ends, f"never quiet: {seen}"
            time.sleep(0.05)
            now = self.stream(engine)
            if (now.messages, now.state) != (seen.messages, seen.state):
                since = time.monotonic()
            seen = now
        return seen


class Fleet:
    """Two engines, one that binds its publisher and one that dials in, and the server that follows both."""

    def __init__(self, folder: Path, python: str) -> None:
        model = folder / "tiny"
        make_model(model, TEXT)
        self.engines = [
            Engine(python, model, folder / f"engine-{number}.log", blocks=BLOCKS, dials=bool(number))
            for number in (0, 1)
        ]
        self.config = folder / "kvindex.yaml"
        pods = [engine.registration for engine in self.engines]
        self.config.write_text(json.dumps({"models": [{"name": "tiny", "tokenizer": str(model)}], "pods": pods}))
        self.early: list[int] = []


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Engines that have answered a request before anybody listened."""
    python = os.environ.get("VLLM_PYTHON")
    if not python:
        pytest.skip("needs vLLM in an environment of its own: make test-vllm")
    made = Fleet(tmp_path_factory.mktemp("fleet"), python)
    with ExitStack() as stack:
        for engine in made.engines:
            stack.callback(engine.kill)
            engine.start()
        made.early = some_tokens(random.Random(0), 7)
        for engine in made.engines:
            engine.wait()
            assert engine.complete(made.early).cached == 0
        yield made


@pytest.fixture(scope="module")
def server(fleet: Fleet) -> Iterator[Server]:
    """One server for all tests, started after the engines' first requests."""
    made = Server(fleet.config)
    yield made
    made.stop()


def some_tokens(rng: random.Random, blocks: int, more: int = 1) -> list[int]:
    """Token ids of so many blocks and some more."""
    return rng.choices(range(FIRST_PLAIN_TOKEN, VOCABULARY), k=blocks * BLOCK_SIZE + more)


def eventually(check: Callable[[], bool], seconds: float = 30.0) -> None:
    """Polls until it is true."""
    ends = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < ends, "did not come true in time"
        time.sleep(0.05)


def reusable(matched_blocks: int, prompt_tokens: int) -> int:
    """Tokens that vLLM takes from its cache: the last prompt token is always computed anew."""
    return min(matched_blocks, (prompt_tokens - 1) // BLOCK_SIZE) * BLOCK_SIZE


def test_what_was_said_before_is_replayed(fleet: Fleet, server: Server) -> None:
    """A server that comes late knows it all the same, and says so."""
    for engine in fleet.engines:
        seen = server.settle(engine)
        assert seen.trust == pb.TRUST_EXACT, seen.trust_reason
        assert server.matched(engine, fleet.early) == 7
        assert (seen.gaps, seen.orphans, dict(seen.decode_errors), dict(seen.dropped)) == (0, 0, {}, {})


@pytest.mark.parametrize("winner", [0, 1])
def test_the_longer_prefix_wins(fleet: Fleet, server: Server, winner: int) -> None:
    """Both hold a part of one prompt; the blocks are counted exactly, for one more and one less token too."""
    rng = random.Random(100 + winner)
    prompt = some_tokens(rng, 12)
    best, other = fleet.engines[winner], fleet.engines[1 - winner]
    best.complete(prompt[: 9 * BLOCK_SIZE + 31])
    other.complete(prompt[: 4 * BLOCK_SIZE] + some_tokens(rng, 3))
    for engine in fleet.engines:
        server.settle(engine)
    answer = server.score(tokens=pb.Tokens(ids=prompt))
    assert (answer.block_size, answer.total_blocks, answer.total_tokens) == (BLOCK_SIZE, 12, len(prompt))
    assert [(each.pod, each.matched_blocks, each.matched_tokens, each.trust) for each in answer.scores] == [
        (best.registration["pod"], 9, 9 * BLOCK_SIZE, pb.TRUST_EXACT),
        (other.registration["pod"], 4, 4 * BLOCK_SIZE, pb.TRUST_EXACT),
    ]
    assert [dict(each.tier_blocks) for each in answer.scores] == [{"gpu": 9}, {"gpu": 4}]
    assert server.matched(best, prompt[: 9 * BLOCK_SIZE]) == 9
    assert server.matched(best, prompt[: 9 * BLOCK_SIZE - 1]) == 8
    assert best.complete(prompt).cached == 9 * BLOCK_SIZE
    assert other.complete(prompt).cached == 4 * BLOCK_SIZE


def test_text_and_chat_are_the_engines_tokens(fleet: Fleet, server: Server) -> None:
    """The same tokenizer directory on both sides: as many tokens, and what one said is found by the other."""
    engine, other = fleet.engines
    text = TEXT.read_text(encoding="utf-8")[:1500]
    usage = engine.complete(text)
    server.settle(engine)
    answer = server.score(prompt=text)
    assert answer.total_tokens == usage.prompt
    assert [(each.pod, each.matched_blocks) for each in answer.scores] == [
        (engine.registration["pod"], usage.prompt // BLOCK_SIZE),
        (other.registration["pod"], 0),
    ]
    body: dict[str, object] = {
        "messages": [{"role": "system", "content": text[300:1200]}, {"role": "user", "content": "What is a lane?"}]
    }
    usage = other.chat(body)
    server.settle(other)
    answer = server.score(chat=json.dumps(body))
    assert answer.total_tokens == usage.prompt
    assert (answer.scores[0].pod, answer.scores[0].matched_blocks) == (
        other.registration["pod"],
        usage.prompt // BLOCK_SIZE,
    )
    assert other.chat(body).cached == reusable(answer.scores[0].matched_blocks, usage.prompt)


def test_salted_blocks_are_apart(fleet: Fleet, server: Server) -> None:
    """Equal tokens under a salt are another prompt, to the engine and to the index."""
    engine = fleet.engines[0]
    prompt = some_tokens(random.Random(200), 5)
    engine.complete(prompt, cache_salt="tenant-a")
    server.settle(engine)
    for salt, blocks in (("tenant-a", 5), ("tenant-b", 0), ("", 0)):
        assert server.matched(engine, prompt, cache_salt=salt) == blocks
        fields = {"cache_salt": salt} if salt else {}
        assert engine.complete(prompt, **fields).cached == blocks * BLOCK_SIZE


def test_every_request_reuses_what_was_predicted(fleet: Fleet, server: Server) -> None:
    """60 turns of growing chats over a small cache: the match said before is what the engine then reuses."""
    rng = random.Random(300)
    systems = [some_tokens(rng, 3, 5), some_tokens(rng, 2, 17)]
    chats = [list(rng.choice(systems)) for _ in range(10)]
    reused = lost = 0
    for turn in range(60):
        engine = fleet.engines[turn % 2]
        number = rng.randrange(len(chats))
        chats[number] += some_tokens(rng, 1, rng.randrange(BLOCK_SIZE))
        prompt = chats[number]
        server.settle(engine)
        matched = server.matched(engine, prompt)
        usage = engine.complete(prompt, new_tokens=rng.choice((1, 2, 40)))
        assert usage.cached == reusable(matched, usage.prompt), f"turn {turn}"
        reused += usage.cached
        lost += usage.prompt - usage.cached
        if len(prompt) > 600:
            chats[number] = list(rng.choice(systems))
    assert reused > 5000 and lost > 5000
    for engine in fleet.engines:
        seen = server.settle(engine)
        assert seen.blocks < BLOCKS, "more than the engine has room for"
        assert seen.trust == pb.TRUST_EXACT, seen.trust_reason
        assert (seen.gaps, seen.orphans, dict(seen.decode_errors), dict(seen.dropped)) == (0, 0, {}, {})


def test_a_second_server_agrees(fleet: Fleet, server: Server, tmp_path: Path) -> None:
    """Rebuilt from the replay of all that was said so far, it holds the same blocks of the engine that binds."""
    engine = fleet.engines[0]
    first = server.settle(engine)
    config = tmp_path / "second.yaml"
    config.write_text(json.dumps({"pods": [engine.registration]}))
    second = Server(config)
    try:
        seen = second.settle(engine)
        assert (seen.trust, seen.blocks, seen.last_sequence) == (pb.TRUST_EXACT, first.blocks, first.last_sequence)
        assert second.matched(engine, fleet.early) == server.matched(engine, fleet.early)
    finally:
        second.stop()


def keep_busy(engine: Engine, stop: threading.Event) -> None:
    """Requests until it dies."""
    rng = random.Random(500)
    for _ in range(1000):
        if stop.is_set():
            return
        try:
            engine.complete(some_tokens(rng, 2), new_tokens=20)
        except OSError:
            return


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_engine_is_forgotten(fleet: Fleet, server: Server, victim: int) -> None:
    """SIGKILL under load and another life at the same addresses: only what the new one computed is scored."""
    engine, other = fleet.engines[victim], fleet.engines[1 - victim]
    rng = random.Random(400 + victim)
    prompt, fresh = some_tokens(rng, 10), some_tokens(rng, 6)
    for each in fleet.engines:
        each.complete(prompt)
        server.settle(each)
        assert server.matched(each, prompt) == 10
    restarts = server.stream(engine).restarts
    stop = threading.Event()
    load = threading.Thread(target=keep_busy, args=(engine, stop))
    load.start()
    try:
        before = server.stream(engine).messages
        eventually(lambda: server.stream(engine).messages > before + 5)
        engine.kill()
    finally:
        stop.set()
        load.join()

    engine.start()
    engine.wait()
    # It says nothing of its own accord; that it has no memory of what it said last tells that it is another one.
    eventually(lambda: server.matched(engine, prompt) == 0)
    assert server.stream(engine).trust == pb.TRUST_COLD
    # The new life holds the beginning of what the dead one held: sharper than holding nothing of it.
    assert engine.complete(prompt[: 3 * BLOCK_SIZE + 7]).cached == 0
    engine.complete(fresh)
    eventually(lambda: server.matched(engine, fresh) == 6)
    assert server.matched(engine, prompt) == 3, "blocks of the dead engine"
    seen = server.settle(engine)
    assert (seen.trust, seen.blocks, seen.restarts) == (pb.TRUST_EXACT, 9, restarts + 1), seen
    answer = server.score(tokens=pb.Tokens(ids=prompt))
    assert [(each.pod, each.matched_blocks, each.trust) for each in answer.scores] == [
        (other.registration["pod"], 10, pb.TRUST_EXACT),
        (engine.registration["pod"], 3, pb.TRUST_EXACT),
    ]
    assert engine.complete(prompt).cached == 3 * BLOCK_SIZE
