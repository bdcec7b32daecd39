"""Everything at once for a while: load, churn, lost messages, engine restarts and bad clients, against an oracle.

Seconds in ordinary runs, `KVINDEX_SOAK_MINUTES` (30) with KVINDEX_SOAK=1; then a process of its own adds calls by the
clock up to `KVINDEX_SOAK_SHARE` (0.7) of what the server was measured to do at the start. Prints a line at the end.
"""

import base64
import contextlib
import json
import os
import random
import socket
import statistics
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import grpc
import pytest
from hostile_http2 import ACK, CONTINUATION, PREFACE, RESET, SETTINGS, call, frame, headers
from soak_fleet import SIZE, Engine
from test_chaos import SOAK, Target, send

from kvindex_server.pb.kvindex.v1 import kvindex_pb2 as pb
from kvindex_server.pb.kvindex.v1.kvindex_pb2_grpc import KVIndexAdminStub, KVIndexStub

SECONDS = 60 * float(os.environ.get("KVINDEX_SOAK_MINUTES", "30")) if SOAK else 6.0
PODS, PROMPTS, BLOCKS = 6, 40, 8
RATE = 100
"""Calls per second of the client that looks at every answer."""
SHARE = float(os.environ.get("KVINDEX_SOAK_SHARE", "0.7"))
DICE = random.Random(11)
TOKENS = [[DICE.randrange(100_000) for _ in range(BLOCKS * SIZE)] for _ in range(PROMPTS)]
LONG = [[DICE.randrange(100_000) for _ in range(512 * SIZE)]]
"""What two pods beside the churn hold all the time, one of them the half: the pressure asks for it."""
CANDIDATES = 16
REPORT_SECONDS = 300.0
GROWTH_MIB, GROWTH_SHARE = 8.0, 0.03
"""The last third's median may be above the middle third's by the larger of the two; the first third is warm-up."""


class Pressure:
    """Calls by the clock from a process of its own, at a share of the server's capacity."""

    def __init__(self, target: Target, share: float, file: Path, request: pb.ScoreRequest, expected: object) -> None:
        encoded = base64.b64encode(request.SerializeToString()).decode()
        file.write_text(json.dumps({"request": encoded, "expected": expected}))
        script = str(Path(__file__).with_name("soak_load.py"))
        command = [sys.executable, script, target.address, str(share), str(RATE), str(file)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.capacity, self.rate = map(float, self._process.stdout.readline().split())
        self.seconds = 0.0
        self.answered = self.judged = self.wrong = 0
        self.first_wrong: list[str] = []
        self.ends: dict[str, int] = {}

    def stop(self) -> None:
        """What the calls came to; see soak_load."""
        out, _ = self._process.communicate("stop\n", timeout=30)
        outcome = json.loads(out)
        self.seconds, self.answered = outcome["seconds"], outcome["answered"]
        self.judged, self.wrong, self.ends = outcome["judged"], outcome["wrong"], outcome["ends"]
        self.first_wrong = outcome["first_wrong"]

    def kill(self) -> None:
        self._process.kill()
        self._process.wait(5)


class Clients:
    """Load and mischief on threads of their own, until stopped."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._stop = threading.Event()
        self.answers = self.refused = 0
        self.mischief = Counter[str]()
        self.errors: list[str] = []
        self._threads = [threading.Thread(target=each) for each in (self._load, self._bad)]
        for each in self._threads:
            each.start()

    def stop(self) -> None:
        self._stop.set()
        for each in self._threads:
            each.join()

    def _load(self) -> None:
        with grpc.insecure_channel(self._target.address) as channel:
            stub = KVIndexStub(channel)
            begun, due = time.monotonic(), 0
            while not self._stop.wait(0.005):
                while due < (time.monotonic() - begun) * RATE and not self._stop.is_set():
                    due += 1
                    request = pb.ScoreRequest(model="m", tokens=pb.Tokens(ids=TOKENS[due % PROMPTS]))
                    try:
                        answer = stub.Score(request, timeout=5)
                        if answer.total_blocks != BLOCKS or any(each.matched_blocks > BLOCKS for each in answer.scores):
                            self.errors.append(str(answer))
                        self.answers += 1
                    except grpc.RpcError as error:
                        if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
                            self.refused += 1
                        else:
                            self.errors.append(str(error.code()))

    def _bad(self) -> None:
        dice = random.Random(5)
        kinds = (
            self._resets,
            self._garbage,
            self._cancels,
            self._reads_nothing,
            self._giant,
            self._silent,
            self._crowd,
        )
        while not self._stop.wait(0.2):
            kind = dice.choice(kinds)
            try:
                kind()
            except OSError as error:  # it is the server's right to end such a connection at any time
                assert isinstance(error, ConnectionError | TimeoutError), error
            self.mischief[kind.__name__.strip("_")] += 1

    def _resets(self) -> None:
        with self._target.connect() as connection:
            for stream in range(1, 200, 2):
                if not send(connection, headers(stream) + frame(RESET, 0, stream, struct.pack(">I", 8))):
                    break

    def _garbage(self) -> None:
        with socket.create_connection((self._target.host, self._target.port), 5) as made:
            send(made, os.urandom(512))

    def _cancels(self) -> None:
        for _ in range(20):
            KVIndexStub(self._target.channel).Score.future(pb.ScoreRequest(model="m"), timeout=1).cancel()

    def _reads_nothing(self) -> None:
        pods = [f"nobody-{number}" for number in range(200)]
        request = pb.ScoreRequest(model="m", tokens=pb.Tokens(ids=TOKENS[0]), pods=pods).SerializeToString()
        with socket.create_connection((self._target.host, self._target.port), 5) as made:
            closed_window = frame(SETTINGS, 0, 0, struct.pack(">HI", 4, 0)) + frame(SETTINGS, ACK, 0)
            send(made, PREFACE + closed_window + b"".join(call(stream, request) for stream in range(1, 30, 2)))
            self._stop.wait(0.2)

    def _giant(self) -> None:
        with self._target.connect() as connection:
            send(connection, headers(1, ("x", "y" * 15_000), flags=0))
            for _ in range(20):
                if not send(connection, frame(CONTINUATION, 0, 1, b"\x00\x01x\x7f\x81\x7e" + b"z" * 16_000)):
                    break

    def _silent(self) -> None:
        with self._target.connect() as connection:
            send(connection, b"".join(headers(stream) for stream in range(1, 20, 2)))
            self._stop.wait(0.2)

    def _crowd(self) -> None:
        with contextlib.ExitStack() as stack:
            for _ in range(100):
                stack.enter_context(self._target.connect())


class Watch:
    """What the process takes, and what was compared, over time."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._begun = time.monotonic()
        self._sizes: list[tuple[float, float]] = []
        self.compared = Counter[str]()
        self.wrong: list[str] = []
        self.checkpoints = 0

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._begun

    def look(self) -> None:
        self._sizes.append((self.seconds, self._target.rss()))

    def third(self, number: int) -> float:
        """Median of the resident set in this third of the time, MiB."""
        length = self._sizes[-1][0] / 3
        found = [size for at, size in self._sizes if number * length <= at <= (number + 1) * length]
        return statistics.median(found or [self._sizes[-1][1]])

    def check(self, engines: list[Engine]) -> None:
        """Each prompt's score and trust at each pod against the oracle, and the truth where EXACT."""
        stub = KVIndexStub(self._target.channel)
        names = [each.name for each in engines]
        for prompt in range(PROMPTS):
            request = pb.ScoreRequest(model="m", tokens=pb.Tokens(ids=TOKENS[prompt]), pods=names)
            answer = stub.Score(request, timeout=10, wait_for_ready=True)
            scores = {each.pod: each for each in answer.scores}
            if len(scores) != len(engines) or answer.total_blocks != BLOCKS:
                self.wrong.append(str(answer))
                continue
            for engine in engines:
                self._compare(engine, prompt, scores[engine.name])
        self.checkpoints += 1

    def _compare(self, engine: Engine, prompt: int, score: pb.PodScore) -> None:
        told, truth = engine.matched(prompt), engine.held[prompt]
        right = score.matched_blocks == told and score.trust == engine.trust
        if score.trust == pb.TRUST_EXACT:
            right = right and score.matched_blocks == truth
        elif score.trust in (pb.TRUST_PARTIAL, pb.TRUST_COLD):
            right = right and score.matched_blocks <= truth
        name = pb.Trust.Name(score.trust).removeprefix("TRUST_")
        self.compared[name] += 1
        self.compared["not the truth, and marked so"] += right and score.matched_blocks != truth
        if not right:
            self.wrong.append(f"{engine.name}, prompt {prompt}: told {told}, truth {truth}, {engine.trust}; {score}")


@pytest.fixture(params=["grpcio", "native"] if SOAK else ["grpcio"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Target]:
    made = Target(request.param, tmp_path / "log")
    yield made
    made.close()


def settled(target: Target, engines: list[Engine]) -> None:
    """Every message sent has been applied."""
    admin = KVIndexAdminStub(target.channel)
    ends = time.monotonic() + 20
    while True:
        last = {each.pod: each.last_sequence for each in admin.ListPods(pb.ListPodsRequest(), timeout=5).streams}
        if all(last[each.name] == each.sequence - 1 for each in engines):
            return
        assert time.monotonic() < ends, (last, [each.sequence for each in engines])
        time.sleep(0.05)


def heard(target: Target, engine: Engine, restarts: int = 0, late: bool = False) -> None:
    """Publish what leaves nothing behind until the server follows this life of the engine."""
    admin = KVIndexAdminStub(target.channel)
    ends = time.monotonic() + 20
    while True:
        (engine.say_nothing if late else engine.clear)()
        time.sleep(0.05)
        stream = next(
            each for each in admin.ListPods(pb.ListPodsRequest(), timeout=5).streams if each.pod == engine.name
        )
        # Without `messages`, a last sequence of 0 may be none at all.
        if stream.restarts >= restarts and stream.messages and stream.last_sequence == engine.sequence - 1:
            return
        assert time.monotonic() < ends, stream


def register(target: Target, engine: Engine) -> None:
    """Follow it; nothing has been heard yet."""
    request = pb.RegisterPodRequest(pod=engine.name, model="m", endpoint=engine.endpoint)
    KVIndexAdminStub(target.channel).RegisterPod(request, timeout=5)
    engine.joined()


def unregister(target: Target, engine: Engine) -> None:
    KVIndexAdminStub(target.channel).UnregisterPod(pb.UnregisterPodRequest(pod=engine.name, model="m"), timeout=5)


def steady(target: Target) -> list[Engine]:
    """Two pods that hold the long prompt, whole and half, for as long as the soak lasts."""
    found = [Engine(f"steady-{number}", LONG, 1_000_000 * (number + 1)) for number in range(2)]
    for engine, blocks in zip(found, (512, 256), strict=True):
        register(target, engine)
        heard(target, engine)
        engine.store(0, blocks)
    settled(target, found)
    return found


def pressure_on(target: Target, holders: list[Engine], file: Path) -> Pressure:
    keys = pb.Keys(values=holders[0].keys(0))
    strangers = [f"stranger-{number}" for number in range(CANDIDATES - len(holders))]
    request = pb.ScoreRequest(model="m", keys=keys, pods=[*(each.name for each in holders), *strangers])
    expected = {each.name: [each.held[0], pb.TRUST_EXACT] for each in holders}
    return Pressure(target, SHARE, file, request, expected | {each: [0, pb.TRUST_COLD] for each in strangers})


def change(dice: random.Random, engine: Engine) -> None:
    """One event as engines send them; a few are lost on the way, and now and then everything goes."""
    act = engine.store if dice.random() < 0.6 else engine.evict
    act(dice.randrange(PROMPTS), dice.randint(0, BLOCKS), lost=dice.random() < 0.002)
    if dice.random() < 0.01:
        engine.clear()


@pytest.mark.soak
@pytest.mark.timeout(SECONDS * 2 + 300)
def test_nothing_wears_out(target: Target, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """No wrong answer at any time, no failed call, no descriptor lost, memory flat after the first third."""
    dice = random.Random(7)
    engines = [Engine(f"pod-{number}", TOKENS) for number in range(PODS)]
    restarts = dict.fromkeys(range(PODS), 0)
    for engine in engines:
        register(target, engine)
        heard(target, engine)
    holders = steady(target)
    files = target.open_files()
    pressure = pressure_on(target, holders, tmp_path / "pressure.json") if SOAK else None
    clients, watch = Clients(target), Watch(target)
    lives = Counter[str]()
    report = REPORT_SECONDS
    try:
        while watch.seconds < SECONDS and len(watch.wrong) < 10:
            for _ in range(300):
                change(dice, dice.choice(engines))
            for engine in engines:
                if engine.unsaid:
                    engine.say_nothing()  # it shows that a message is missing
            settled(target, engines)
            watch.check(engines)
            watch.look()
            number = dice.randrange(PODS)
            engine, throw = engines[number], dice.random()
            if throw < 0.3:
                lives["restarted"] += 1
                engine.restart()
                restarts[number] += 1
                heard(target, engine, restarts[number])
            elif throw < 0.4:
                lives["replaced"] += 1
                unregister(target, engine)
                engine.restart()
                register(target, engine)
                restarts[number] = 0
                watch.check(engines)  # nothing is known of it
                heard(target, engine)
            elif throw < 0.5:
                lives["joined late"] += 1
                unregister(target, engine)
                register(target, engine)
                restarts[number] = 0
                heard(target, engine, late=True)
            if watch.seconds > report:
                report += REPORT_SECONDS
                with capfd.disabled():
                    print(f"\n{target.transport}: {watch.seconds:.0f} s, {watch.checkpoints} checkpoints,", flush=True)
    finally:
        clients.stop()
        if pressure:
            try:
                pressure.stop()
            finally:
                pressure.kill()
        lost = sum(each.lost for each in engines)
        for engine in [*engines, *holders]:
            engine.socket.close()
        summary = summarised(target, watch, clients, pressure, lives, lost)
        with capfd.disabled():
            print(f"\n{summary}", flush=True)
    judge(target, watch, clients, pressure)
    target.assert_no_call_is_left(30)
    target.assert_unharmed()
    ends = time.monotonic() + 20
    while target.open_files() > files + 32:
        assert time.monotonic() < ends, (files, target.open_files())
        time.sleep(0.1)


def summarised(
    target: Target, watch: Watch, clients: Clients, pressure: Pressure | None, lives: Counter[str], lost: int
) -> str:
    """One line."""
    parts = [f"soak {target.transport}: {watch.seconds:.0f} s"]
    if pressure:
        reached = pressure.answered / max(pressure.seconds, 1e-9)
        parts += [
            f"capacity {pressure.capacity:,.0f} calls/s, asked {pressure.rate + RATE:,.0f},"
            f" reached {reached + RATE:,.0f} ({(reached + RATE) / pressure.capacity:.0%})",
            f"{pressure.answered:,} answers under pressure, of {pressure.judged:,} looked at {pressure.wrong} wrong"
            f" ({counted(pressure.ends)})",
        ]
    parts += [
        f"{clients.answers:,} answers to another client, {clients.refused} refused, {len(clients.errors)} wrong",
        f"{watch.checkpoints} checkpoints, {sum(watch.compared[each] for each in TRUSTS):,} scores by the oracle"
        f" ({counted(watch.compared)}): {len(watch.wrong)} wrong",
        f"engines {counted(lives)}, {lost} messages lost",
        f"mischief {clients.mischief.total():,}",
        f"RSS MiB by thirds {', '.join(f'{watch.third(number):.1f}' for number in range(3))}",
        "alive" if target.process.poll() is None else f"ended with {target.process.poll()}",
    ]
    return "; ".join(parts)


def counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in sorted(counts.items()))


TRUSTS = ("EXACT", "PARTIAL", "STALE", "COLD")


def judge(target: Target, watch: Watch, clients: Clients, pressure: Pressure | None) -> None:
    """Everything that must hold at the end."""
    assert target.process.poll() is None
    assert watch.wrong == []
    assert watch.checkpoints >= 3 and clients.answers > 100 and clients.errors == [], clients.errors[:3]
    codes = target.codes()
    assert set(codes) <= {"OK", "RESOURCE_EXHAUSTED", "INVALID_ARGUMENT", "CANCELLED", "DEADLINE_EXCEEDED"}, codes
    growth = watch.third(2) - watch.third(1)
    if SECONDS >= 60:
        assert all(watch.compared[each] for each in TRUSTS), watch.compared
        assert growth <= max(GROWTH_MIB, GROWTH_SHARE * watch.third(1)), growth
    else:
        assert growth < 32
    if pressure is None:
        return
    # Each refusal that somebody saw is one that the server counted, by its reason. What gRPC refuses because a
    # connection has too many streams is no shed of ours: clients send it again, and so does the pressure.
    sheds, ends = target.sheds(), pressure.ends
    assert ends.keys() <= {"OK", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED", "again"}, ends
    assert ends.get("RESOURCE_EXHAUSTED", 0) + clients.refused <= sheds.get("in_flight", 0), (ends, sheds)
    assert ends.get("DEADLINE_EXCEEDED", 0) <= sheds.get("silent", 0), (ends, sheds)
    assert pressure.wrong == 0 and pressure.judged > 100, pressure.first_wrong
    assert pressure.answered / pressure.seconds > 0.5 * pressure.rate, (pressure.answered, pressure.seconds)
