"""The doctor finds each silent miss, says nothing of a healthy fleet, and explains where matches end."""

import re
import socket
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from event_encoding import Removed, Stored, maps
from publisher import Publisher, free_port

from kvindex_server import checkup
from kvindex_server._core import Index
from kvindex_server.config import ModelSettings, PodSettings, Settings
from kvindex_server.doctor.examination import CHECKS, MAX_FINDINGS, examine, worst
from kvindex_server.doctor.facts import NO_SALT, Facts, Finding, Probe, Status
from kvindex_server.explain import End, Explainer, PodExplanation
from kvindex_server.lookup import Lookup, Query
from kvindex_server.metrics import Metrics
from kvindex_server.models import Model, Models
from kvindex_server.pb.kvindex.v1 import kvindex_pb2 as pb
from kvindex_server.pb.kvindex.v1 import kvindex_pb2_grpc as rpc
from kvindex_server.pods import PodSpec
from kvindex_server.reach import ACCEPTED, NO_ANSWER, reach
from kvindex_server.server import Server
from kvindex_server.stream import LAG_BOUNDS, Cause, Dialect, StreamState, StreamStatus, Trust

OPERATIONS = Path(__file__).parent.parent / "docs" / "operations.md"


# --- judgements: one healthy fleet, one thing wrong at a time ---


def stream(**other: Any) -> StreamStatus:
    """One that is well: in sequence, a few milliseconds late."""
    status = StreamStatus(
        "a:8000",
        0,
        "m",
        state=StreamState.LIVE,
        trust=Trust.EXACT,
        trust_reason="in sequence from the first event",
        trust_cause=Cause.IN_SEQUENCE,
        endpoint="tcp://a:5557",
        replay_endpoint="tcp://a:5558",
        last_sequence=9,
        lag_seconds=0.004,
        messages=10,
        lag_buckets=lag_buckets(0.004, 10),
        lag_sum=0.04,
    )
    return replace(status, **other)


def lag_buckets(seconds: float, count: int) -> list[int]:
    """Cumulative, as the applier keeps them, of batches that were all so late."""
    return [count if seconds <= bound else 0 for bound in LAG_BOUNDS] + [count]


SILENT: dict[str, Any] = {
    "state": StreamState.CONNECTING,
    "trust": Trust.COLD,
    "trust_reason": "nothing heard",
    "trust_cause": Cause.NOTHING_HEARD,
    "last_sequence": None,
    "messages": 0,
    "lag_buckets": [0] * (len(LAG_BOUNDS) + 1),
}
SPEC = PodSpec("a:8000", "m", "tcp://a:5557", "tcp://a:5558")
DIALECT = Dialect("a:8000", 0, 10, ["array_batch", "map_events", "unsigned_hashes"], 0, 0, "", None)
WELL = Facts(
    model="m",
    block_size=16,
    seed=1337,
    coverage=1.0,
    streams=(stream(),),
    specs={"a:8000": SPEC},
    dialects=(DIALECT,),
    loras=("adapter",),
    tokenizer=("native", "", True),
    candidates=("a:8000",),
    descriptors=(100, 1024),
    probe=Probe(
        "chat",
        tokens=(1, 2, 3),
        engine_tokens=(1, 2, 3),
        total_blocks=4,
        blocks={"a:8000": 3},
        salted=True,
        other_contexts={"adapter 'adapter'": 0, NO_SALT: 0},
    ),
)


def with_stream(**other: Any) -> Facts:
    return replace(WELL, streams=(stream(**other),))


def with_probe(**other: Any) -> Facts:
    assert WELL.probe is not None
    return replace(WELL, probe=replace(WELL.probe, **other))


SICK: dict[str, tuple[Facts, str, Status, str]] = {
    "no pods": (replace(WELL, specs={}, streams=()), "model", Status.FAIL, "no pod is registered"),
    "stranger": (replace(WELL, candidates=("a:8000", "b:8000")), "candidates", Status.FAIL, "nobody publishes"),
    "other port": (
        replace(WELL, candidates=("a:8000", "a:80")),
        "candidates",
        Status.FAIL,
        "'a:8000' has the same host",
    ),
    "other model": (
        replace(WELL, candidates=("a:8000", "b:1"), pods_of_others={"b:1": "n"}),
        "candidates",
        Status.FAIL,
        "registered for model 'n' only",
    ),
    "not a candidate": (
        replace(WELL, specs={"a:8000": SPEC, "c:8000": replace(SPEC, pod="c:8000")}),
        "candidates",
        Status.WARN,
        "does not have it as a candidate",
    ),
    "nobody there": (
        replace(with_stream(**SILENT), reached={"tcp://a:5557": "connection refused"}),
        "events_heard",
        Status.FAIL,
        "connection refused",
    ),
    "nobody's": (
        replace(WELL, unclaimed={"tcp://0.0.0.0:5557": ["kv@z@another", "kv@z@m"]}),
        "topic",
        Status.FAIL,
        "'kv@z@m', and no pod is registered for it",
    ),
    "idle": (
        replace(with_stream(**SILENT), reached={"tcp://a:5557": ACCEPTED}),
        "events_heard",
        Status.WARN,
        "accepts connections",
    ),
    "dials in": (with_stream(**SILENT), "events_heard", Status.WARN, "not known"),
    "topic": (
        replace(with_stream(**SILENT), specs={"a:8000": replace(SPEC, topic="kv@x")}),
        "topic",
        Status.WARN,
        "'kv@x'",
    ),
    "another pod's port": (
        replace(with_stream(topic="kv@b:8000@m"), specs={"a:8000": SPEC, "b:8000": replace(SPEC, pod="b:8000")}),
        "topic",
        Status.FAIL,
        "'b:8000' in its topic, which is the name of another registered pod",
    ),
    "another name": (with_stream(topic="kv@vllm-0@m"), "topic", Status.WARN, "'vllm-0' in its topic"),
    "another model": (with_stream(topic="kv@a:8000@n"), "topic", Status.WARN, "serves 'n'"),
    "no block size": (replace(WELL, block_size=0), "block_size", Status.FAIL, "not known"),
    "block size": (with_stream(dropped={"block_size_mismatch": 3}), "block_size", Status.FAIL, "3 events"),
    "seed": (replace(WELL, seed=7), "hash_seed", Status.WARN, "7"),
    "orphans": (with_stream(orphans=2), "engine_hashes", Status.WARN, "2 blocks wait"),
    "removals": (with_stream(dropped={"unknown_removal": 2}), "engine_hashes", Status.WARN, "never stored"),
    "no replay": (with_stream(replay_endpoint=""), "replay", Status.WARN, "no replay endpoint"),
    "replay refused": (
        replace(WELL, reached={"tcp://a:5558": "connection refused"}),
        "replay",
        Status.FAIL,
        "connection refused",
    ),
    "replay mute": (
        with_stream(trust_reason="joined at sequence 4: replay was not answered", replays=2),
        "replay",
        Status.FAIL,
        "2 replays",
    ),
    "replay mute, and nothing missing yet": (
        with_stream(replay_unanswered=True, replays=3),
        "replay",
        Status.FAIL,
        "3 replays were asked for at tcp://a:5558, and the last was not answered; EXACT",
    ),
    "silent rank": (
        replace(WELL, streams=(stream(), stream(rank=1, endpoint="tcp://a:5558", **SILENT))),
        "rank_ports",
        Status.WARN,
        "rank 1 never spoke at tcp://a:5558, 1 of 2",
    ),
    "rank mismatch": (with_stream(dropped={"rank_mismatch": 4}), "rank_ports", Status.FAIL, "4 batches"),
    "no tokenizer": (replace(WELL, tokenizer=None), "tokenizer", Status.FAIL, "no tokenizer"),
    "no tokenizer, no need": (replace(WELL, tokenizer=None, probe=None), "tokenizer", Status.WARN, "no tokenizer"),
    "self-test": (
        replace(WELL, tokenizer=("reference", "the native encoder failed its self-test at sample 3", True)),
        "tokenizer",
        Status.WARN,
        "sample 3",
    ),
    "other tokens": (with_probe(engine_tokens=(1, 2, 4, 5)), "tokens_agree", Status.FAIL, "differ from 2 on"),
    "fewer tokens": (with_probe(engine_tokens=(1, 2)), "tokens_agree", Status.FAIL, "differ from 2 on"),
    "no tokens": (with_probe(error="chat: not valid JSON"), "tokens_agree", Status.FAIL, "not valid JSON"),
    "other template": (
        with_probe(engine_tokens=(1, 2, 4, 5)),
        "chat_template",
        Status.FAIL,
        "does not become the engine's tokens",
    ),
    "no template": (replace(WELL, tokenizer=("native", "", False)), "chat_template", Status.FAIL, "no chat template"),
    "adapter": (
        with_probe(other_contexts={"no adapter": 4}),
        "lora",
        Status.FAIL,
        "4 blocks of the probe are held with no",
    ),
    "salt": (with_probe(other_contexts={NO_SALT: 4}), "salt", Status.FAIL, "4 blocks"),
    "salts in use, none asked with": (
        replace(with_probe(salted=False, blocks={}), dialects=(replace(DIALECT, beginnings=(9, 4)),)),
        "salt",
        Status.WARN,
        "nothing of the probe is held, and no salt was asked with; 4 of 9 prompts that engines began to store had one",
    ),
    "probe error": (with_probe(error="chat: not valid JSON"), "probe", Status.FAIL, "not valid JSON"),
    "short probe": (with_probe(total_blocks=0, blocks={}), "probe", Status.FAIL, "fill no block"),
    "missed probe": (with_probe(blocks={}), "probe", Status.WARN, "no pod holds the first"),
    "clock ahead": (
        with_stream(lag_seconds=0.0, lag_sum=0.0, lag_buckets=lag_buckets(0.0, 10)),
        "clock_skew",
        Status.WARN,
        "ahead",
    ),
    "clock behind": (
        with_stream(lag_seconds=40.0, lag_sum=400.0, lag_buckets=lag_buckets(40.0, 10)),
        "clock_skew",
        Status.WARN,
        "behind",
    ),
    "late": (with_stream(lag_seconds=1.5), "lag", Status.WARN, "1.5 s"),
    "unknown event": (
        replace(
            with_stream(decode_errors={"unknown_event": 1}),
            dialects=(replace(DIALECT, odd_tag="BlockPondered"),),
        ),
        "event_encoding",
        Status.FAIL,
        "'BlockPondered'",
    ),
    "two forms": (
        replace(WELL, dialects=(replace(DIALECT, traits=["unsigned_hashes", "bytes_32"]),)),
        "hash_version",
        Status.FAIL,
        "unsigned ints and 32 bytes",
    ),
    "unreadable": (with_stream(decode_errors={"bad_batch": 2}), "decode_errors", Status.FAIL, "bad_batch 2"),
    "limit": (with_stream(dropped={"orphan_limit": 5}), "dropped", Status.WARN, "orphan_limit 5"),
    "stale": (
        with_stream(trust=Trust.STALE, trust_cause=Cause.GAP, trust_reason="2 messages missing"),
        "trust",
        Status.FAIL,
        "STALE (gap): 2 messages missing",
    ),
    "partial": (
        with_stream(trust=Trust.PARTIAL, trust_cause=Cause.JOINED_LATE, trust_reason="joined at 4"),
        "trust",
        Status.WARN,
        "PARTIAL (joined_late)",
    ),
    "cold": (with_stream(**SILENT), "trust", Status.WARN, "COLD"),
    "down": (with_stream(state=StreamState.DOWN, gaps=2), "stream_state", Status.FAIL, "DOWN, 2 holes"),
    "down and gone": (
        replace(with_stream(state=StreamState.DOWN), reached={"tcp://a:5557": NO_ANSWER}),
        "stream_state",
        Status.FAIL,
        "DOWN: tcp://a:5557 does not accept a connection (no answer), 0 holes",
    ),
    "down and back": (
        replace(with_stream(state=StreamState.DOWN), reached={"tcp://a:5557": ACCEPTED}),
        "stream_state",
        Status.FAIL,
        "DOWN, though tcp://a:5557 accepts connections, 0 holes",
    ),
    "not reached": (
        replace(
            with_stream(
                trust=Trust.STALE,
                trust_cause=Cause.CONNECTION_LOST,
                trust_reason="event socket not reached: what is known comes from a replay",
            ),
            reached={"tcp://a:5557": NO_ANSWER},
        ),
        "trust",
        Status.FAIL,
        "comes from a replay: tcp://a:5557 does not accept a connection (no answer)",
    ),
    "gap": (with_stream(state=StreamState.GAP, gaps=1), "stream_state", Status.FAIL, "GAP, 1 holes"),
    "adapter and salt": (
        with_probe(blocks={}, other_contexts={"no adapter": 0, NO_SALT: 0, "no adapter and no salt": 4}),
        "lora",
        Status.FAIL,
        "4 blocks of the probe are held with no adapter and no salt, 0 as it was asked",
    ),
    "syncing": (with_stream(state=StreamState.SYNCING), "stream_state", Status.WARN, "under way"),
    "few descriptors left": (replace(WELL, descriptors=(900, 1024)), "descriptors", Status.WARN, "900 of 1024"),
    "too few for a stream": (replace(WELL, descriptors=(1020, 1024)), "descriptors", Status.FAIL, "1020 of 1024"),
    "no descriptor": (replace(WELL, descriptors=(-1, 1024)), "descriptors", Status.FAIL, "1024 of 1024"),
    "coverage": (replace(WELL, coverage=0.5), "coverage", Status.WARN, "50%"),
}


def of(found: list[Finding], name: str) -> list[Finding]:
    return [each for each in found if each.name == name]


def test_a_healthy_fleet_passes_every_check() -> None:
    found = examine(WELL)
    assert [each.name for each in found] == list(CHECKS)
    assert {each.name: each.status for each in found if each.status is not Status.PASS} == {}
    assert worst(found) is Status.PASS


def test_where_engines_dial_in_no_pod_can_do_without_its_topic() -> None:
    """Elsewhere a topic is only a filter."""
    for bind, remedy in ((False, "Register the pod with an empty topic"), (True, "Compare it with the topic")):
        specs = {"a:8000": replace(SPEC, topic="kv@a@m", bind=bind)}
        found = of(examine(replace(with_stream(**SILENT), specs=specs)), "topic")
        assert [each.remedy.startswith(remedy) for each in found if each.status is Status.WARN] == [True]


@pytest.mark.parametrize("case", SICK)
def test_what_is_wrong_is_found(case: str) -> None:
    """One finding with the evidence and, unless time cures it, a remedy; PASS of that check is gone."""
    facts, name, status, evidence = SICK[case]
    found = of(examine(facts), name)
    assert Status.PASS not in {each.status for each in found}
    hits = [each for each in found if evidence in each.evidence]
    assert [each.status for each in hits] == [status], found
    assert hits[0].remedy or case == "cold"
    assert hits[0].model == "m"


def test_every_check_can_fail() -> None:
    """No check is there that no case turns away from PASS."""
    assert {name for _, name, _, _ in SICK.values()} == set(CHECKS)


def test_findings_of_one_check_are_bounded() -> None:
    streams = [stream(rank=rank, decode_errors={"bad_batch": 1}) for rank in range(200)]
    found = of(examine(replace(WELL, streams=streams)), "decode_errors")
    assert len(found) == MAX_FINDINGS + 1
    assert (found[-1].status, found[-1].evidence) == (Status.FAIL, "136 more")


def test_the_worst_findings_come_first() -> None:
    """However many streams have a lesser trouble before it, the one that fails is told."""
    streams = [stream(rank=rank, trust=Trust.PARTIAL) for rank in range(100)]
    streams.append(stream(rank=100, trust=Trust.STALE))
    found = of(examine(replace(WELL, streams=streams)), "trust")
    assert [each.rank for each in found[:3]] == [100, 0, 1]
    assert (found[-1].status, found[-1].evidence) == (Status.WARN, "37 more")


def test_a_lost_connection_has_the_runbooks_remedy() -> None:
    lost = with_stream(trust=Trust.STALE, trust_cause=Cause.CONNECTION_LOST)
    (found,) = of(examine(lost), "trust")
    assert found.remedy.lower() in OPERATIONS.read_text(encoding="utf-8").replace("`", "").lower()


def test_a_connection_is_tried_to_whom_nothing_is_heard_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """Never a word, lost, or only replayed; not to those that are well, nor to engines that dial in."""
    tried: list[str] = []
    monkeypatch.setattr(checkup, "reach", lambda endpoints, _seconds: tried.extend(endpoints) or {})
    streams = [
        stream(endpoint="tcp://well:1"),
        stream(endpoint="tcp://silent:1", replay_endpoint="", messages=0),
        stream(endpoint="tcp://down:1", replay_endpoint="", state=StreamState.DOWN),
        stream(endpoint="tcp://deaf:1", trust_reason="event socket not reached: what is known comes from a replay"),
        stream(pod="dials", endpoint="tcp://*:1", replay_endpoint="", messages=0),
    ]
    checkup._reached(streams, [PodSpec("dials", "m", "tcp://*:1", bind=True)])
    assert tried == ["tcp://silent:1", "tcp://down:1", "tcp://deaf:1", "tcp://a:5558"]


def test_what_both_differences_explain_is_told_of_neither_alone() -> None:
    """Without the salt as much is held as without salt and adapter: the adapter is not to blame, nor the other way."""
    for alone in ("no adapter", NO_SALT):
        others = {"no adapter": 0, NO_SALT: 0, "no adapter and no salt": 4, alone: 4}
        found = examine(with_probe(blocks={}, other_contexts=others))
        told = [each.evidence for name in ("lora", "salt") for each in of(found, name) if each.status is Status.FAIL]
        assert len(told) == 1 and "and no salt" not in told[0]


def test_salts_in_use_are_told_but_blamed_only_for_a_miss() -> None:
    salty = replace(WELL, dialects=(replace(DIALECT, beginnings=(9, 4)),))
    assert salty.probe is not None
    for facts in (replace(salty, probe=None), replace(salty, probe=replace(salty.probe, salted=False))):
        (found,) = of(examine(facts), "salt")
        assert (found.status, "4 of 9 prompts" in found.evidence) == (Status.SKIP, True)
    (unsalted,) = of(examine(with_probe(salted=False, blocks={})), "salt")
    assert (unsalted.status, "0 of 0 prompts" in unsalted.evidence) == (Status.SKIP, True)


def test_a_salt_is_not_cleared_by_a_prompt_that_nobody_holds() -> None:
    nothing = examine(with_probe(blocks={}, other_contexts={"no adapter": 0, NO_SALT: 0}))
    assert [each.status for each in of(nothing, "salt")] == [Status.SKIP]


@pytest.mark.parametrize(
    "other", [{"engine_tokens": ()}, {"kind": "prompt"}, {"error": "chat: not valid JSON"}], ids=str
)
def test_a_template_that_was_not_compared_is_not_called_well(other: dict[str, Any]) -> None:
    (found,) = of(examine(with_probe(**other)), "chat_template")
    assert (found.status, found.remedy.startswith("Give both")) == (Status.SKIP, True)


def test_what_cannot_be_judged_is_skipped() -> None:
    silent = replace(WELL, streams=(stream(**SILENT),), dialects=())
    found = examine(replace(silent, probe=None, candidates=(), tokenizer=None))
    skipped = {each.name for each in found if each.status is Status.SKIP}
    assert skipped == {
        "event_encoding",
        "hash_version",
        "candidates",
        "tokens_agree",
        "chat_template",
        "lora",
        "salt",
        "probe",
        "clock_skew",
    }


def test_statuses_and_ends_are_those_of_the_proto() -> None:
    assert {f"CHECK_STATUS_{each.name}": each.value for each in Status} | {"CHECK_STATUS_UNSPECIFIED": 0} == dict(
        pb.CheckStatus.items()
    )
    assert {f"MATCH_END_{each.name}": each.value for each in End} | {"MATCH_END_UNSPECIFIED": 0} == dict(
        pb.MatchEnd.items()
    )


def test_every_check_and_end_has_its_row_in_the_runbook() -> None:
    rows = set(re.findall(r"^\| `([a-zA-Z_]+)` \|", OPERATIONS.read_text(encoding="utf-8"), re.MULTILINE))
    assert rows == set(CHECKS) | {each.name for each in End}


# --- who answers ---


def test_reach_tells_open_ports_from_closed_ones() -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        there = f"tcp://127.0.0.1:{listening.getsockname()[1]}"
        closed = f"tcp://127.0.0.1:{free_port()}"
        found = reach([there, closed, there, "tcp://no-such-host.invalid:1"], 2.0)
    assert found == {there: ACCEPTED, closed: "connection refused", "tcp://no-such-host.invalid:1": "name not found"}


def test_reach_gives_up_in_time() -> None:
    """A full backlog does not answer: the wait ends when its time is over."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(0)
        endpoint = listening.getsockname()
        crowd = [socket.socket() for _ in range(8)]
        try:
            for each in crowd:
                each.setblocking(False)
                each.connect_ex(endpoint)
            started = time.monotonic()
            found = reach([f"tcp://127.0.0.1:{endpoint[1]}"], 0.2)
            assert time.monotonic() - started < 1.0
            assert list(found.values()) == [NO_ANSWER]
        finally:
            for each in crowd:
                each.close()


# --- through the door: a real server, real sockets ---

MODEL = "m"
TOKENS = list(range(1, 65))  # 16 blocks of 4


def stored(first: int, blocks: int, *, parent: int | None = None, medium: str = "GPU", **other: Any) -> Stored:
    """`blocks` blocks of TOKENS from block `first` on; hashes are 100 + the block's number."""
    hashes = [100 + first + each for each in range(blocks)]
    return Stored(hashes, parent, TOKENS[first * 4 : (first + blocks) * 4], 4, medium, **other)


class Running:
    """A server whose pods publish under the test's control."""

    def __init__(self, server: Server, channel: grpc.Channel, publishers: dict[str, Publisher]) -> None:
        self.server = server
        self.read, self.admin = rpc.KVIndexStub(channel), rpc.KVIndexAdminStub(channel)
        self.publishers = publishers

    def publish(self, pod: str, *events: Stored | Removed) -> None:
        """Sent, and applied when this returns."""
        publisher = self.publishers[pod]
        sequence = publisher.publish(maps(*events))
        self.until(
            lambda: any((each.pod, each.rank, each.messages) == (pod, 0, sequence + 1) for each in self.streams())
        )

    def streams(self) -> list[pb.StreamInfo]:
        return list(self.admin.ListPods(pb.ListPodsRequest(), timeout=5).streams)

    def until(self, true: Callable[[], bool]) -> None:
        ends = time.monotonic() + 10
        while not true():
            assert time.monotonic() < ends
            time.sleep(0.01)

    def check(self, **fields: Any) -> dict[str, list[pb.CheckResult]]:
        answer = self.admin.Check(pb.CheckRequest(**fields), timeout=10)
        assert answer.status == max(each.status for each in answer.checks if each.status != pb.CHECK_STATUS_SKIP)
        return {name: [each for each in answer.checks if each.name == name] for name in CHECKS}

    def explain(self, **fields: Any) -> dict[str, pb.PodExplanation]:
        asked = {"model": MODEL, "tokens": pb.Tokens(ids=TOKENS), **fields}
        answer = self.admin.Explain(pb.ExplainRequest(**asked), timeout=10)
        return {each.score.pod: each for each in answer.pods}


def port_pair() -> tuple[int, socket.socket]:
    """A free port; the one behind it refuses connections, and nobody gets it, until the socket is closed."""
    for _ in range(100):
        port, beside = free_port(), socket.socket()
        try:
            beside.bind(("127.0.0.1", port + 1))
        except (OSError, OverflowError):
            beside.close()
            continue
        return port, beside
    raise AssertionError("no two free ports in a row")


@pytest.fixture
def running() -> Iterator[Running]:
    """Pods a and b publish; c has a closed port; d has two ranks, of which the second has a closed port."""
    publishers = {name: Publisher() for name in ("a", "b")}
    base, beside = port_pair()
    publishers["d"] = Publisher(port=base, replay=False)
    pods = [
        PodSettings(pod=name, model=MODEL, endpoint=each.endpoint, replay_endpoint=each.replay_endpoint)
        for name, each in publishers.items()
        if name != "d"
    ]
    pods.append(PodSettings(pod="c", model=MODEL, endpoint=f"tcp://127.0.0.1:{free_port()}"))
    pods.append(PodSettings(pod="d", model=MODEL, endpoint=f"tcp://127.0.0.1:{base}", ranks=2))
    settings = Settings(
        listen="127.0.0.1:0",
        metrics_listen="127.0.0.1:0",
        models=(ModelSettings(name=MODEL, block_size=4, loras=("adapter",)), ModelSettings(name="empty")),
        pods=tuple(pods),
    )
    server = Server(settings)
    server.start()
    try:
        with grpc.insecure_channel(server.grpc_address) as channel:
            for each in publishers.values():
                each.wait_subscriber()
            assert server.wait_ready(20)
            yield Running(server, channel, publishers)
    finally:
        server.stop(0.5)
        beside.close()
        for each in publishers.values():
            each.close()


def test_check_names_what_is_silent(running: Running) -> None:
    running.publish("a", stored(0, 4))
    running.publish("d", stored(0, 1))
    found = running.check(model=MODEL, pods=["a", "b", "x"])
    heard = {(each.pod, each.rank): each for each in found["events_heard"]}
    assert heard[("c", 0)].status == pb.CHECK_STATUS_FAIL
    assert "connection refused" in heard[("c", 0)].evidence
    assert heard[("b", 0)].status == pb.CHECK_STATUS_WARN
    assert ("a", 0) not in heard
    assert [(each.pod, each.rank) for each in found["rank_ports"]] == [("d", 1)]
    strangers = {each.pod: each.status for each in found["candidates"]}
    assert strangers == {"x": pb.CHECK_STATUS_FAIL, "c": pb.CHECK_STATUS_WARN, "d": pb.CHECK_STATUS_WARN}
    assert {each.pod for each in found["replay"]} == {"c", "d"}
    assert [each.status for each in found["block_size"]] == [pb.CHECK_STATUS_PASS]


@pytest.mark.parametrize("topic", ["", "events", "kv@a@alias", "kv@a:8000@m", "kv@a:9999@adapter", "kv@a"])
def test_a_topic_that_is_right_or_says_nothing_is_well(topic: str) -> None:
    found = of(examine(replace(with_stream(topic=topic), aliases=("alias",))), "topic")
    assert [each.status for each in found] == [Status.PASS]


@pytest.mark.parametrize("first_heard", ["live", "replayed"])
def test_check_reads_the_topics_of_engines(running: Running, first_heard: str) -> None:
    """A pod registered with another one's endpoint: all seems well, and each hit is credited to the wrong pod."""
    with Publisher(topic=b"kv@a@m") as publisher:
        if first_heard == "replayed":
            publisher.publish(maps(stored(0, 1)))
        endpoints = {"endpoint": publisher.endpoint, "replay_endpoint": publisher.replay_endpoint}
        running.admin.RegisterPod(pb.RegisterPodRequest(pod="e", model=MODEL, **endpoints), timeout=10)
        publisher.wait_subscriber()
        if first_heard == "live":
            running.until(lambda: publisher.replays > 0)
            publisher.publish(maps(stored(0, 1)))
        running.until(lambda: any(each.pod == "e" and each.messages for each in running.streams()))
        (found,) = running.check(model=MODEL)["topic"]
        assert (found.pod, found.status) == ("e", pb.CHECK_STATUS_FAIL)
        assert "calls itself 'a'" in found.evidence and "credited" in found.remedy
        running.admin.UnregisterPod(pb.UnregisterPodRequest(pod="e", model=MODEL), timeout=10)


def test_check_looks_the_probe_up(running: Running) -> None:
    running.publish("a", stored(0, 4, lora_name="adapter"))
    asked = {"model": MODEL, "tokens": pb.Tokens(ids=TOKENS)}
    bare = running.check(**asked)
    assert [each.status for each in bare["probe"]] == [pb.CHECK_STATUS_WARN]
    assert [each.evidence for each in bare["lora"]] == [
        "4 blocks of the probe are held with adapter 'adapter', 0 as it was asked"
    ]
    right = running.check(**asked, lora_name="adapter")
    assert [each.evidence for each in right["probe"]] == ["4 of 16 blocks are held by a"]
    assert [each.status for each in right["lora"]] == [pb.CHECK_STATUS_PASS]
    salted = running.check(**asked, lora_name="adapter", cache_salt="s")
    assert [each.evidence for each in salted["salt"]] == ["4 blocks of the probe are held without the salt, 0 with it"]
    both = running.check(**asked, cache_salt="s")
    assert [each.evidence for each in both["lora"]] == [
        "4 blocks of the probe are held with adapter 'adapter' and no salt, 0 as it was asked"
    ]
    assert [each.status for each in both["salt"]] == [pb.CHECK_STATUS_SKIP]


def test_check_of_all_models_and_of_an_unknown_one(running: Running) -> None:
    answer = running.admin.Check(pb.CheckRequest(), timeout=10)
    assert {each.model for each in answer.checks} == {MODEL, "empty"}
    unknown = running.admin.Check(pb.CheckRequest(model="nope"), timeout=10)
    assert [(each.name, each.status) for each in unknown.checks] == [("model", pb.CHECK_STATUS_FAIL)]
    assert "known are: empty, m" in unknown.checks[0].evidence


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": "hello"}, "model: must not be empty when a probe is given"),
        ({"model": "m", "tokens": pb.Tokens()}, "tokens.ids: must not be empty"),
        (
            {"model": "m", "engine_tokens": pb.Tokens(ids=[1])},
            "engine_tokens: must come with the prompt or chat that they were made of",
        ),
        ({"pods": [""]}, "pods: the name at position 0 is empty"),
    ],
)
def test_bad_checks_are_refused(running: Running, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        running.admin.Check(pb.CheckRequest(**fields), timeout=10)
    assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.INVALID_ARGUMENT, message)


def test_explain_says_where_each_match_ends(running: Running) -> None:
    running.publish("a", stored(0, 6), stored(6, 2, parent=105, medium="CPU"))
    running.publish("b", stored(0, 4))
    running.publish("b", Removed([102]))
    running.publish("d", stored(0, 1))
    found = running.explain(pods=["a", "b", "c", "d", "x"])
    assert {pod: pb.MatchEnd.Name(each.end).removeprefix("MATCH_END_") for pod, each in found.items()} == {
        "a": "NEVER_STORED",
        "b": "REMOVED",
        "c": "NOTHING_HEARD",
        "d": "NEVER_STORED",
        "x": "NOT_REGISTERED",
    }
    assert [(each.tier, each.blocks) for each in found["a"].runs] == [("gpu", 6), ("cpu", 2)]
    assert found["a"].score.matched_blocks == 8
    assert (found["b"].score.matched_blocks, found["b"].score.trust) == (2, pb.TRUST_EXACT)
    assert "block 2 was removed from gpu by message 1 (2025-11-24 16:00:00Z)" in found["b"].why
    assert found["d"].why == "block 1 is held by a, b; here it was never stored since the engine's first event"
    whole = running.explain(tokens=pb.Tokens(ids=TOKENS[:32]), pods=["a"])
    assert whole["a"].end == pb.MATCH_END_WHOLE_PROMPT


def test_explain_knows_other_adapters_and_salts(running: Running) -> None:
    running.publish("a", stored(0, 4, lora_name="adapter"))
    found = running.explain(pods=["a", "b"])
    assert found["a"].end == pb.MATCH_END_OTHER_CONTEXT
    assert found["a"].why == "with adapter 'adapter' the pod holds 4 blocks of the same tokens"
    assert found["b"].end == pb.MATCH_END_NOTHING_HEARD
    salted = running.explain(pods=["a"], lora_name="adapter", cache_salt="s")
    assert salted["a"].why == "with no salt the pod holds 4 blocks of the same tokens"
    both = running.explain(pods=["a"], cache_salt="s")
    assert both["a"].why == "with adapter 'adapter' and no salt the pod holds 4 blocks of the same tokens"


def test_an_adapter_that_only_events_have_named_is_known(running: Running) -> None:
    """Nobody has configured it: the engine's own events tell which name the prompt is held under."""
    running.publish("a", stored(0, 4, lora_name="sql-lora"))
    for asked in ("", "sql_lora"):
        found = running.explain(pods=["a"], lora_name=asked)
        assert found["a"].end == pb.MATCH_END_OTHER_CONTEXT
        assert found["a"].why == "with adapter 'sql-lora' the pod holds 4 blocks of the same tokens"
        (lora,) = running.check(model=MODEL, tokens=pb.Tokens(ids=TOKENS), lora_name=asked)["lora"]
        assert lora.status == pb.CHECK_STATUS_FAIL
        assert lora.evidence == "4 blocks of the probe are held with adapter 'sql-lora', 0 as it was asked"
    (unasked,) = running.check(model=MODEL)["lora"]
    assert "adapters known by name: sql-lora, adapter" in unasked.evidence


def test_a_salt_that_was_forgotten_is_suspected(running: Running) -> None:
    """The router does not pass the salt on: which one it was nobody knows here, but that there are salts is known."""
    running.publish("a", stored(0, 4, cache_salt="tenant-1"))
    (missed,) = running.check(model=MODEL, tokens=pb.Tokens(ids=TOKENS))["salt"]
    assert missed.status == pb.CHECK_STATUS_WARN
    assert missed.evidence.endswith("1 of 1 prompts that engines began to store had one")
    assert "cache_salt" in missed.remedy and "tenant-1" not in str(missed)
    (held,) = running.check(model=MODEL, tokens=pb.Tokens(ids=TOKENS), cache_salt="tenant-1")["salt"]
    assert held.status == pb.CHECK_STATUS_PASS


def test_a_replay_that_is_never_answered_is_found_before_it_is_needed(running: Running) -> None:
    """All is in sequence from the first event, so nothing is missing; but the next loss could not be mended."""
    with Publisher(mute=True) as publisher:
        spec = pb.RegisterPodRequest(
            pod="e", model=MODEL, endpoint=publisher.endpoint, replay_endpoint=publisher.replay_endpoint
        )
        running.admin.RegisterPod(spec, timeout=5)
        publisher.wait_subscriber()
        publisher.publish(maps(stored(0, 4)))
        running.until(lambda: any((each.pod, each.trust) == ("e", pb.TRUST_EXACT) for each in running.streams()))
        found = [each for each in running.check(model=MODEL)["replay"] if each.pod == "e"]
        assert [each.status for each in found] == [pb.CHECK_STATUS_FAIL]
        assert "and the last was not answered; EXACT" in found[0].evidence


def test_explain_shows_tokens_and_keys_and_the_other_rank(running: Running) -> None:
    running.publish("a", stored(0, 2))
    answer = running.admin.Explain(
        pb.ExplainRequest(model="m", tokens=pb.Tokens(ids=TOKENS[:9]), lora_name=""), timeout=10
    )
    assert list(answer.tokens) == TOKENS[:9]
    assert (answer.total_tokens, answer.total_blocks, answer.block_size, len(answer.keys)) == (9, 2, 4, 2)
    by_keys = running.explain(tokens=None, keys=pb.Keys(values=answer.keys), pods=["a"])
    assert by_keys["a"].end == pb.MATCH_END_WHOLE_PROMPT
    short = running.explain(tokens=pb.Tokens(ids=[1]), pods=["a"])
    assert short["a"].end == pb.MATCH_END_NO_FULL_BLOCK
    empty = running.admin.Explain(
        pb.ExplainRequest(model="empty", tokens=pb.Tokens(ids=TOKENS), pods=["a"]), timeout=10
    )
    assert [each.end for each in empty.pods] == [pb.MATCH_END_NO_BLOCK_SIZE]


def test_explain_of_an_unknown_model_is_not_found(running: Running) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        running.explain(model="nope")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


# --- predicted against actual ---


def test_reported_usage_is_measured(running: Running) -> None:
    def report(predicted: int, cached: int, **other: Any) -> None:
        request = pb.ReportUsageRequest(
            **{"model": MODEL, "pod": "a", "predicted_tokens": predicted, "cached_tokens": cached, **other}
        )
        running.read.ReportUsage(request, timeout=5)

    report(64, 64)
    report(64, 32, prompt_tokens=100)
    report(0, 16)
    value = running.server.metrics.registry.get_sample_value
    assert value("kvindex_usage_predicted_tokens_total", {"model": MODEL}) == 128
    assert value("kvindex_usage_cached_tokens_total", {"model": MODEL}) == 112
    for direction, total in (("exact", 0), ("over", 32), ("under", 16)):
        labels = {"model": MODEL, "direction": direction}
        assert value("kvindex_usage_error_tokens_count", labels) == 1
        assert value("kvindex_usage_error_tokens_sum", labels) == total
    for fields, code, message in (
        ({"pod": "x"}, "NOT_FOUND", "pod: 'x' is not registered for model 'm'"),
        ({"model": "nope"}, "NOT_FOUND", "model: 'nope' is neither configured nor seen"),
        ({"pod": ""}, "INVALID_ARGUMENT", "pod: must not be empty"),
        ({"prompt_tokens": 3}, "INVALID_ARGUMENT", "predicted_tokens: is above prompt_tokens, which is 3"),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            report(4, 4, **fields)
        assert (caught.value.code().name, caught.value.details()) == (code, message)
    assert value("kvindex_usage_predicted_tokens_total", {"model": MODEL}) == 128


# --- the runbook ---


def test_every_alert_has_its_entry() -> None:
    """Each question of metrics.md is a heading, and each alert of the chart is named under one."""
    page = OPERATIONS.read_text(encoding="utf-8")
    metrics = (OPERATIONS.parent / "metrics.md").read_text(encoding="utf-8").partition("## Worth an alert")[2]
    questions = re.findall(r"^\| ([A-Z][^|]*\?) \|", metrics, re.MULTILINE)
    headings = re.findall(r"^### (.*)$", page, re.MULTILINE)
    assert len(questions) > 10
    assert [each for each in questions if each not in headings] == []
    alerts = (OPERATIONS.parent.parent / "deploy/helm/kvindex-server/files/alerts.yaml").read_text(encoding="utf-8")
    names = re.findall(r"alert: (\w+)", alerts)
    assert len(names) > 5
    assert [each for each in names if f"`{each}`" not in page] == []


# --- ends that need ranks or groups of their own ---


class OnePod:
    """A fleet of one pod that is trusted."""

    def pods(self, model: str) -> list[str]:
        return ["p"]

    def trust(self, model: str, pod: str, rank: int | None = None) -> tuple[Trust, str, float]:
        return Trust.EXACT, "", 0.1


def explained(index: Index) -> PodExplanation:
    lookup = Lookup(Models([Model(MODEL, index)]), OnePod(), {"gpu": 1.0, "cpu": 0.8}, Metrics())
    query = Query(MODEL, "tokens", tokens=struct.pack(f"<{len(TOKENS)}I", *TOKENS))
    (found,) = Explainer(lookup, lambda _model: [], lambda _model: ()).explain(query, lambda: None).pods
    return found


def test_a_block_that_another_rank_holds() -> None:
    index = Index(4)
    first, second = index.add_stream("p", 0), index.add_stream("p", 1)
    first.apply([maps(stored(0, 2))])
    second.apply([maps(stored(0, 3), Removed([100]), rank=1)])
    found = explained(index)
    assert (found.end, found.why) == (End.OTHER_RANK, "block 2 is held by rank 1, the match is rank 0's")
    assert (found.score.rank, found.runs) == (0, [("gpu", 2)])


def test_a_block_that_a_window_alone_holds() -> None:
    index = Index(4)
    stream = index.add_stream("p", 0)
    stream.apply(
        [
            maps(
                stored(0, 3, group=0, kind="full_attention"),
                stored(0, 3, group=1, kind="sliding_window", window=8),
                Removed([102], group=0),
            )
        ],
        7,
    )
    found = explained(index)
    assert (found.end, found.why) == (
        End.OTHER_GROUP,
        "block 2 is held in KV-cache group 1 only; "
        "block 2 was removed from gpu by message 7 (2025-11-24 16:00:00Z), by the engine's clock",
    )
