"""The shared store under faults: paused writers, a killed, slow or full server; never a wrong answer."""

import contextlib
import random
import re
import ssl
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from event_encoding import Cleared, Removed, Stored, as_map, batch

from kvindex_server.config import ConfigError, StoreSettings

valkey_server = pytest.importorskip("valkey_server")
from slow_proxy import SlowProxy  # noqa: E402

from kvindex_server._core import block_keys  # noqa: E402
from kvindex_server.errors import Unavailable  # noqa: E402
from kvindex_server.store import scripts  # noqa: E402
from kvindex_server.store.client import Client, StoreAway, StoreFull  # noqa: E402
from kvindex_server.store.index import StoreIndex  # noqa: E402
from kvindex_server.store.writer import StoreStream, packed  # noqa: E402

BLOCK = 4
LEASE = 1.0


@pytest.fixture
def server(tmp_path: Path) -> "Iterator[valkey_server.Valkey]":
    with valkey_server.valkey(tmp_path) as started:
        yield started


def replica(address: str, clock=time.monotonic, gained=None, **more: object) -> StoreIndex:
    """One replica of the model; its leases last a second."""
    settings = StoreSettings.model_validate(
        {"addresses": (address,), "lease_seconds": LEASE, "timeout_seconds": 0.3, **more}
    )
    told = {"gained": gained} if gained else {}
    return StoreIndex(Client(settings), settings, "model", BLOCK, clock=clock, **told)


def tokens_of(seed: int, blocks: int) -> tuple[list[int], bytes]:
    """Random token ids, and the keys of their blocks."""
    rng = random.Random(seed)
    tokens = [rng.randrange(2**32) for _ in range(blocks * BLOCK)]
    return tokens, block_keys(b"".join(each.to_bytes(4, "little") for each in tokens), BLOCK)


def stored(tokens: list[int], first: int = 1) -> bytes:
    return batch([as_map(Stored(list(range(first, first + len(tokens) // BLOCK)), None, tokens, BLOCK))])


def matches(index: StoreIndex, keys: bytes) -> dict[str, int]:
    return {pod: blocks for pod, _, blocks, *_ in index.score(keys, [], [1.0])}


def settle(index: StoreIndex, seconds: float = 10.0) -> None:
    """Flush until the store has everything."""
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        try:
            if index.flush():
                return
        except StoreAway:
            pass
        time.sleep(0.02)
    raise TimeoutError("the store did not get everything")


def test_a_paused_writer_resurrects_nothing(server: "valkey_server.Valkey") -> None:
    """A replica that slept through its lease wakes up with claims that are dead: not one of them is ever answered."""
    asked: list[tuple[str, int]] = []
    old, new = replica(server.address), replica(server.address, gained=lambda pod, rank: asked.append((pod, rank)))
    reader = replica(server.address)
    first, other = tokens_of(1, 8), tokens_of(2, 8)
    stream, standby = old.add_stream("pod", 0), new.add_stream("pod", 0)
    stream.apply([stored(first[0])])
    assert old.flush()
    assert new.flush()  # stands by
    assert standby.standby
    assert standby.apply([stored(other[0])]).messages == 1  # counted, not applied
    assert standby.claims == 0
    assert matches(reader, first[1]) == {"pod": 8}
    stream.apply([stored(other[0], 100)])  # decoded, but not sent: the process sleeps here
    time.sleep(LEASE + 0.1)
    settle(new)
    assert asked == [("pod", 0)]  # it knows nothing, and has the engine asked anew
    assert matches(reader, first[1]) == {}
    standby.apply([stored(first[0][: 3 * BLOCK])])
    settle(new)
    assert matches(reader, first[1]) == {"pod": 3}
    settle(old)  # the old one wakes up
    assert stream.standby
    assert stream.claims == 0
    assert matches(reader, first[1]) == {"pod": 3}
    assert matches(reader, other[1]) == {}


def test_a_reading_between_a_life_and_its_first_batch_is_not_kept(server: "valkey_server.Valkey") -> None:
    """Every state of the streams has a word of its own, so that no reader takes an old one for the present one."""
    index, reader = replica(server.address), replica(server.address)
    tokens, keys = tokens_of(1, 4)
    stream = index.add_stream("pod", 0)
    for _ in range(3):
        stream.clear()
        stream.begin(index._client, index._tags, index._owner, 1000)
        assert matches(reader, keys) == {}
        stream.apply([stored(tokens)])
        assert index.flush()
        assert matches(reader, keys) == {"pod": 4}


@pytest.mark.parametrize("partitions", [1, 4])
def test_a_batch_on_its_way_is_refused_after_the_fence(server: "valkey_server.Valkey", partitions: int) -> None:
    """Calls of a dead life do nothing at all, at any partition, in whatever order they arrive."""
    index = replica(server.address, partitions=partitions)
    stream = index.add_stream("pod", 0)
    tokens, keys = tokens_of(1, 16)
    stream.apply([stored(tokens)])
    stream_life = 0
    late: list[tuple[str, tuple[object, ...]]] = []
    index.flush()
    stream_life = stream.life
    stream.apply([stored(tokens_of(2, 16)[0], 100)])
    stream.take(0.0)
    late = [call for _, call in stream.next_batches(index._tags)]
    stream.clear()
    index.flush()
    assert stream.life > stream_life
    for tag, arguments in late:
        assert index._client.run(scripts.APPLY, tag, *arguments) == b"FENCED"
        assert index._client.run(scripts.RELEASE, tag, *arguments) == b"FENCED"
    for tag in index._tags[1:]:  # nor can it open a partition that the new life has opened
        assert index._client.run(scripts.OPEN, tag, stream.name, packed(stream_life), "x", 1000) == [0, 0]
    assert matches(index, keys) == {}
    assert matches(index, tokens_of(2, 16)[1]) == {}


def test_a_fence_costs_the_same_however_much_was_held(server: "valkey_server.Valkey") -> None:
    """One call ends all claims; what they leave behind is taken out bit by bit."""
    index = replica(server.address)
    stream = index.add_stream("pod", 0)
    tokens, keys = tokens_of(1, 3000)
    stream.apply([stored(tokens)])
    settle(index)
    before = server.client().info("commandstats")["cmdstat_evalsha"]["calls"]
    stream.apply([batch([as_map(Cleared())])])
    index.flush()
    assert server.client().info("commandstats")["cmdstat_evalsha"]["calls"] - before <= 3
    assert matches(index, keys) == {}
    swept = []
    while dead := index.sweep():
        swept.append(dead)
    assert sum(swept) == 3000
    assert max(swept) <= 256 * 8 * 2
    assert list(index._client.blocks(index._tags[0])) == []


def test_a_killed_server_comes_back_empty_and_is_filled_again(server: "valkey_server.Valkey") -> None:
    """After kill -9 and an empty restart answers are empty, then whole: from this process, without the engine."""
    index, reader = replica(server.address), replica(server.address)
    tokens, keys = tokens_of(1, 40)
    stream = index.add_stream("pod", 0)
    stream.apply([stored(tokens)])
    settle(index)
    index.renew()
    assert matches(reader, keys) == {"pod": 40}
    life = stream.life
    server.kill()
    with pytest.raises(StoreAway):
        reader.score(keys, [], [1.0])
    stream.apply([batch([as_map(Removed([40]))])])
    with pytest.raises(StoreAway):
        index.flush()
    server.start()
    assert matches(reader, keys) == {}
    settle(index)
    assert matches(reader, keys) == {"pod": 39}
    assert stream.life > life  # a store without memory gives no life twice
    assert stream.claims == 39


def test_an_answer_from_before_a_restart_that_comes_late_is_not_believed(
    server: "valkey_server.Valkey", monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread has heard the new server meanwhile: the answer is asked for again, and the new era stays."""
    index = replica(server.address)
    tokens, keys = tokens_of(1, 8)
    index.add_stream("pod", 0).apply([stored(tokens)])
    settle(index)
    index.renew()
    assert matches(index, keys) == {"pod": 8}
    ask = index._client.run_all
    asked = 0

    def late(*call: object) -> object:
        nonlocal asked
        asked += 1
        answers = ask(*call)
        if asked == 1:
            server.kill()
            server.start()
            for _ in range(20):
                with contextlib.suppress(Unavailable):
                    assert matches(index, keys) == {}
                    break
        return answers

    monkeypatch.setattr(index._client, "run_all", late)
    assert matches(index, keys) == {}
    assert asked >= 3
    assert index.counts["eras"] == 1
    assert index.standing("pod", 0)[0] != 3


def test_an_idle_stream_notices_a_restart_when_it_renews(server: "valkey_server.Valkey") -> None:
    """Without a single event, too."""
    index = replica(server.address)
    tokens, keys = tokens_of(1, 5)
    index.add_stream("pod", 0).apply([stored(tokens)])
    settle(index)
    server.kill()
    server.start()
    index.renew()
    settle(index)
    assert matches(index, keys) == {"pod": 5}


def test_a_store_that_lost_its_last_batches_is_filled_again(server: "valkey_server.Valkey") -> None:
    """A replica of the store that takes over may not have them: the number of the last batch shows it."""
    index = replica(server.address)
    tokens, keys = tokens_of(1, 6)
    stream = index.add_stream("pod", 0)
    stream.apply([stored(tokens)])
    settle(index)
    plain = server.client()
    saved = {key: plain.dump(key) for key in plain.scan_iter()}
    stream.apply([batch([as_map(Removed([2]))])])
    settle(index)
    assert matches(index, keys) == {"pod": 1}
    plain.flushall()
    for key, value in saved.items():
        plain.restore(key, 0, value)
    assert matches(index, keys) == {"pod": 6}  # as the store that took over believes
    index.renew()
    settle(index)
    assert matches(index, keys) == {"pod": 1}


def test_a_slow_store_is_said_and_nothing_is_applied_twice(server: "valkey_server.Valkey") -> None:
    """An answer that does not come leaves open what was done; asking again settles it."""
    proxy = SlowProxy(server.port)
    index, reader = replica(proxy.address), replica(server.address)
    tokens, keys = tokens_of(1, 4)
    stream = index.add_stream("pod", 0)
    settle(index)
    index.renew()
    assert index.reachable
    proxy.held.set()
    stream.apply([stored(tokens)])
    started = time.monotonic()
    with pytest.raises(StoreAway):
        index.flush()
    with pytest.raises(StoreAway):
        index.score(keys, [], [1.0])
    assert time.monotonic() - started < 3
    time.sleep(LEASE / 2)
    assert not index.reachable
    assert index.standing("pod", 0)[:2] == (4, "the shared store does not answer")
    proxy.held.clear()
    stream.apply([batch([as_map(Removed([4]))])])
    settle(index)
    assert matches(reader, keys) == {"pod": 3}
    index.renew()
    assert index.standing("pod", 0)[0] == 3
    proxy.delay = 0.05
    assert matches(index, keys) == {"pod": 3}
    proxy.close()


def lose_the_next_answer(index: StoreIndex) -> None:
    """The store does what the next batches ask, and their answers do not come."""
    ask = index._client.run_all

    def run_all(script: scripts.Script, calls: list) -> list:
        answers = ask(script, calls)
        if script is not scripts.APPLY:
            return answers
        index._client.run_all = ask  # type: ignore[method-assign]
        return [StoreAway("lost") for _ in answers]

    index._client.run_all = run_all  # type: ignore[method-assign]


def test_claims_after_a_lost_answer_are_not_lost(server: "valkey_server.Valkey") -> None:
    """A description went alone and its answer got lost: what is held by then goes under a number of its own."""
    index, reader = replica(server.address), replica(server.address)
    tokens, keys = tokens_of(1, 8)
    stream = index.add_stream("pod", 0)
    lose_the_next_answer(index)
    with pytest.raises(StoreAway, match="lost"):
        index.flush()
    assert not stream.idle
    stream.apply([stored(tokens)])
    settle(index)
    assert matches(reader, keys) == {"pod": 8}


def test_removals_after_a_lost_answer_are_not_lost(server: "valkey_server.Valkey") -> None:
    """The same with a description of which nobody stored anything: another stream's tier changed it."""
    index, reader = replica(server.address), replica(server.address)
    (tokens, keys), (other, _) = tokens_of(1, 8), tokens_of(2, 4)
    stream, neighbour = index.add_stream("a", 0), index.add_stream("b", 0)
    stream.apply([stored(tokens)])
    settle(index)
    neighbour.apply([batch([as_map(Stored([50, 51, 52, 53], None, other, BLOCK, medium="NVME"))])])
    lose_the_next_answer(index)
    with pytest.raises(StoreAway, match="lost"):
        index.flush()
    stream.apply([batch([as_map(Removed(list(range(1, 9))))])])
    settle(index)
    assert stream.claims == 0
    assert matches(reader, keys) == {}


def test_rows_after_a_lost_answer_are_sent_as_they_were(server: "valkey_server.Valkey") -> None:
    """Rows whose answer got lost, then their removal, over several partitions: the store ends where the stream is."""
    index, reader = replica(server.address, partitions=3), replica(server.address, partitions=3)
    tokens, keys = tokens_of(1, 20)
    stream = index.add_stream("pod", 0)
    settle(index)
    lose_the_next_answer(index)
    stream.apply([stored(tokens)])
    with pytest.raises(StoreAway, match="lost"):
        index.flush()
    stream.apply([batch([as_map(Removed([7]))])])
    settle(index)
    assert matches(reader, keys) == {"pod": 6}
    index.renew()
    assert stream.life


@pytest.mark.parametrize("partitions", [1, 3])
def test_whatever_answers_get_lost_the_store_ends_where_the_streams_are(
    server: "valkey_server.Valkey", partitions: int
) -> None:
    """Random events of two streams, while a call in three is not done, or done without an answer."""
    rng = random.Random(partitions)
    prompts = [tokens_of(seed, 6) for seed in range(4)]
    for _ in range(25):
        server.client().flushall()
        index = replica(server.address, partitions=partitions, batch_blocks=rng.choice((1, 4, 64)))
        ask = index._client.run_all

        def run_all(script: scripts.Script, calls: list, ask=ask) -> list:
            if rng.random() < 0.1:
                return [StoreAway("not done") for _ in calls]
            return [StoreAway("lost") if rng.random() < 0.3 else answer for answer in ask(script, calls)]

        index._client.run_all = run_all  # type: ignore[method-assign]
        streams = [index.add_stream(pod, 0) for pod in ("a", "b")]
        for _ in range(30):
            at = rng.randrange(len(prompts))
            other_tier = Stored([900 + at], None, prompts[at][0][:BLOCK], BLOCK, medium=rng.choice(("NVME", "CPU")))
            happens = rng.choice(
                (
                    [stored(prompts[at][0], 100 * at + 1)],
                    [batch([as_map(Removed([100 * at + 1 + rng.randrange(6)]))])],
                    [batch([as_map(other_tier)])],
                    [],
                )
            )
            rng.choice(streams).apply(happens)
            if not happens:
                with contextlib.suppress(StoreAway):
                    index.flush()
        index._client.run_all = ask  # type: ignore[method-assign]
        settle(index)
        reader = replica(server.address, partitions=partitions)
        for _, keys in prompts:
            assert matches(reader, keys) == {pod: n for pod, _, n, *_ in index._own.score(keys, [], [1.0])}


def half_of_a_prompt(
    server: "valkey_server.Valkey", now: list[float]
) -> tuple[StoreIndex, StoreStream, list[int], bytes]:
    """A replica by this clock whose stream holds 1,000 blocks of 2,000: (it, the stream, all tokens, all keys)."""
    index = replica(server.address, clock=lambda: now[0])
    tokens, keys = tokens_of(1, 2000)
    stream = index.add_stream("pod", 0)
    stream.apply([stored(tokens[: 1000 * BLOCK])])
    settle(index)
    return index, stream, tokens, keys


def other_half(tokens: list[int]) -> Stored:
    return Stored(list(range(1001, 2001)), 1000, tokens[1000 * BLOCK :], BLOCK)


def test_a_removal_just_before_all_is_sent_anew_is_not_forgotten(tmp_path: Path) -> None:
    """What did not fit is sent again from what is held, which says nothing of what has just gone."""
    with valkey_server.valkey(tmp_path) as server:
        now = [1000.0]
        index, stream, tokens, keys = half_of_a_prompt(server, now)
        server.client().config_set("maxmemory", 1024 * 1024)
        stream.apply([batch([as_map(other_half(tokens))])])
        index.flush()
        assert stream.full
        server.client().config_set("maxmemory", 0)
        stream.apply([batch([as_map(Removed([500]))])])
        now[0] += 61
        settle(index)
        assert not stream.full
        assert matches(index, keys) == {"pod": 499}


@pytest.mark.parametrize("partitions", [1, 3])
def test_a_stream_whose_replica_and_pod_are_gone_is_taken_out(server: "valkey_server.Valkey", partitions: int) -> None:
    """Nobody will ever take it over: after ten lease times its claims, its memory and its standing are gone."""
    dead, index = (replica(server.address, partitions=partitions) for _ in range(2))
    (tokens, keys), (other, held) = tokens_of(1, 8), tokens_of(2, 4)
    dead.add_stream("dead", 0).apply([stored(tokens)])
    settle(dead)
    stream = index.add_stream("pod", 0)
    stream.apply([stored(other, 500)])
    settle(index)
    index.renew()
    assert index.bury() == 0
    plain, leases_of = server.client(), f"{index._tags[0]}o"
    for name in (b"0 dead", b"0 pod"):  # as if all this had been two minutes ago
        ends, rest = plain.hget(leases_of, name).split(b" ", 1)
        plain.hset(leases_of, name, b"%d %b" % (int(ends) - 120_000, rest))
    index.renew()  # the one that lives has its lease again
    assert index.bury() == 1
    while index.sweep():
        pass
    index.renew()
    assert matches(index, keys) == {}
    assert matches(index, held) == {"pod": 4}
    assert index.standing("dead", 0)[:2] == (1, "no replica follows it")
    assert index.bury() == 0
    assert sum(plain.scard(f"{tag}a") for tag in index._tags) == len(index._tags)
    assert sum(len(list(index._client.blocks(tag))) for tag in index._tags) == 4
    index.start()
    try:  # no replica is missing any more
        assert [len(each) for _, each in index.holders_of_ints((500).to_bytes(8, "little"), [])] == [1]
    finally:
        index.stop()


def test_a_replica_that_slept_for_long_begins_anew(server: "valkey_server.Valkey") -> None:
    """Its stream was taken out meanwhile: it says again all that it holds."""
    slept, index = replica(server.address), replica(server.address)
    tokens, keys = tokens_of(1, 8)
    stream = slept.add_stream("pod", 0)
    stream.apply([stored(tokens)])
    settle(slept)
    slept.renew()
    plain = server.client()
    ends, rest = plain.hget(f"{index._tags[0]}o", b"0 pod").split(b" ", 1)
    plain.hset(f"{index._tags[0]}o", b"0 pod", b"%d %b" % (int(ends) - 120_000, rest))
    index.renew()
    assert index.bury() == 1
    assert matches(index, keys) == {}
    stream.apply([batch([as_map(Removed([8]))])])
    settle(slept)
    settle(slept)
    assert matches(index, keys) == {"pod": 7}


def test_a_full_store_misses_claims_but_keeps_none_that_is_gone(tmp_path: Path) -> None:
    """Removals go through, stores are refused and said; when there is room again all is sent."""
    with valkey_server.valkey(tmp_path) as server:
        now = [1000.0]
        index, stream, tokens, keys = half_of_a_prompt(server, now)
        index.renew()
        assert index.standing("pod", 0)[0] == 3
        plain = server.client()
        plain.config_set("maxmemory", 1024 * 1024)
        stream.apply([batch([as_map(other_half(tokens)), as_map(Removed([500]))])])
        index.flush()
        assert stream.full
        assert matches(index, keys) == {"pod": 499}
        index.renew()
        assert index.standing("pod", 0)[:2] == (2, "the shared store is full")
        stream.apply([batch([as_map(Stored([500], 499, tokens[499 * BLOCK : 500 * BLOCK], BLOCK))])])
        index.flush()
        assert matches(index, keys) == {"pod": 499}
        stream.clear()  # a fence needs no room
        index.flush()
        assert matches(index, keys) == {}
        stream.apply([stored(tokens)])
        index.flush()
        assert stream.full
        plain.config_set("maxmemory", 0)
        now[0] += 61
        settle(index)
        assert not stream.full
        assert matches(index, keys) == {"pod": 2000}


def test_trust_is_that_of_the_replica_that_follows(server: "valkey_server.Valkey") -> None:
    """Every replica says the same of a stream; when its replica is gone, the claims are STALE."""
    writer, reader = replica(server.address), replica(server.address)
    stream = writer.add_stream("pod", 0)
    writer._trust_of = lambda pod, rank: (2, "joined late", 1.5)
    settle(writer)
    reader.renew()
    assert reader.standing("pod", 0)[0] == 1  # nothing told yet
    writer.renew()
    reader.renew()
    trust, reason, age = reader.standing("pod", 0)
    assert (trust, reason) == (2, "joined late")
    assert 1.5 <= age < 2
    assert reader.standing("absent", 0)[:2] == (1, "no replica follows it")
    time.sleep(LEASE + 0.1)
    reader.renew()
    assert reader.standing("pod", 0)[:2] == (4, "the replica that followed it is gone")
    stream.close()
    writer.flush()
    reader.renew()
    assert reader.standing("pod", 0)[0] == 1


def test_threads_write_renew_and_hand_over(server: "valkey_server.Valkey") -> None:
    """With its threads running a replica needs no call; when it goes, the other one takes over."""
    one, two = replica(server.address), replica(server.address)
    tokens, keys = tokens_of(1, 12)
    stream = one.add_stream("pod", 0)
    one.start()
    deadline = time.monotonic() + 10
    stream.apply([stored(tokens)])
    while matches(two, keys) != {"pod": 12}:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    standby = two.add_stream("pod", 0)
    two.start()
    time.sleep(LEASE * 1.5)  # the lease is renewed
    assert standby.standby
    stream.close()
    one.stop()
    while not standby.life:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    standby.apply([stored(tokens[: 2 * BLOCK])])
    while matches(one, keys) != {"pod": 2}:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    two.stop()


def documented_rights() -> tuple[str, str]:
    """(the user and its rights, what a cluster's client needs beside them), as the documentation has them."""
    text = (Path(__file__).parent.parent / "docs/store.md").read_text()
    own = re.search(r"ACL SETUSER (kvindex [^`]*)```", text)
    further = re.search(r"A cluster's client also needs (.*)", text)
    assert own and further
    return own[1], " ".join(re.findall(r"`(\+[^`]+)`", further[1]))


def test_a_user_with_only_its_own_keys_is_enough(tmp_path: Path) -> None:
    """The rights that the documentation names suffice, and a wrong password is the store being away."""
    with valkey_server.valkey(tmp_path) as server:
        valkey_server.restrict(server, documented_rights()[0])
        password = tmp_path / "password"
        password.write_text("secret\n")
        index = replica(server.address, username="kvindex", password_file=str(password))
        tokens, keys = tokens_of(1, 3)
        stream = index.add_stream("pod", 0)
        stream.apply([stored(tokens)])
        settle(index)
        index.renew()
        stream.clear()
        settle(index)
        stream.apply([stored(tokens[:BLOCK])])
        settle(index)
        assert index.place("pod", 0, keys, 10.0) == ("recorded", 0, 1)
        stream.apply([stored(tokens[: 2 * BLOCK])])
        settle(index)
        assert index.placements["confirmed"] == 1
        stream.apply([batch([as_map(Removed([2]))])])
        settle(index)
        assert index.sweep() == 1
        assert index._client.run(scripts.GONE, index._tags[0], 1000) == []
        asked = index._client
        asked.run(scripts.ASK, index._tags[0], "number", b"question", 1000)
        asked.run(scripts.ANSWER, index._tags[0], "number", "me", b"answer", 1000)
        assert asked.run(scripts.ANSWERS, index._tags[0], "number") == [b"answer"]
        asked.run(scripts.FORGET, index._tags[0], "number")
        assert matches(index, keys) == {"pod": 1}
        password.write_text("other")
        with pytest.raises(StoreAway) as raised:
            replica(server.address, username="kvindex", password_file=str(password)).score(keys, [], [1.0])
        assert "other" not in str(raised.value)


def test_tls_checks_the_certificate(server: "valkey_server.Valkey", tmp_path: Path) -> None:
    """The store's certificate must be signed by the CA that was given."""
    trustme = pytest.importorskip("trustme")
    ca, stranger = trustme.CA(), trustme.CA()
    certificate = ca.issue_cert("127.0.0.1")
    certificate.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    certificate.private_key_pem.write_to_path(tmp_path / "key.pem")
    ca.cert_pem.write_to_path(tmp_path / "ca.pem")
    stranger.cert_pem.write_to_path(tmp_path / "stranger.pem")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    proxy = SlowProxy(server.port, context)  # the server of the package cannot do TLS itself
    _, keys = tokens_of(1, 3)
    assert matches(replica(proxy.address, tls=True, ca_file=str(tmp_path / "ca.pem")), keys) == {}
    with pytest.raises(StoreAway):
        replica(proxy.address, tls=True, ca_file=str(tmp_path / "stranger.pem")).score(keys, [], [1.0])
    with pytest.raises(StoreAway):
        replica(proxy.address).score(keys, [], [1.0])
    proxy.close()


@pytest.mark.parametrize("password", ["", "sesame"])
def test_sentinels_are_asked_for_the_server(server: "valkey_server.Valkey", tmp_path: Path, password: str) -> None:
    """The address is that of a sentinel; it tells where the server is, to whom knows its own password."""
    port = valkey_server.free_port()
    config, secret = tmp_path / "sentinel.conf", tmp_path / "password"
    lines = [f"port {port}", "bind 127.0.0.1", f"dir {tmp_path}", f"sentinel monitor main 127.0.0.1 {server.port} 1"]
    lines += [f"requirepass {password}"] if password else []
    config.write_text("\n".join(lines) + "\n")
    secret.write_text(f"{password}\n")
    known = {"sentinel_password_file": str(secret)} if password else {}
    command = [str(valkey_server.binary()), str(config), "--sentinel"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as sentinel:
        index = replica(f"127.0.0.1:{port}", mode="sentinel", sentinel_service="main", **known)
        tokens, keys = tokens_of(1, 3)
        index.add_stream("pod", 0).apply([stored(tokens)])
        try:
            settle(index)
            if password:
                stranger = replica(f"127.0.0.1:{port}", mode="sentinel", sentinel_service="main")
                with pytest.raises(StoreAway):
                    stranger.score(keys, [], [1.0])
            assert matches(replica(server.address), keys) == {"pod": 3}
        finally:
            sentinel.kill()


def test_a_primary_that_became_a_replica_answers_nothing(server: "valkey_server.Valkey", tmp_path: Path) -> None:
    """Nobody closed the connection: what it has may be of any time, so that it is as good as away."""
    with valkey_server.valkey(tmp_path) as other:
        index = replica(server.address)
        tokens, keys = tokens_of(1, 3)
        index.add_stream("pod", 0).apply([stored(tokens)])
        settle(index)
        index.renew()
        assert matches(index, keys) == {"pod": 3}
        plain = server.client()
        plain.execute_command("REPLICAOF", "127.0.0.1", other.port)
        for ask in (lambda: matches(index, keys), index.renew):
            with pytest.raises(StoreAway):
                ask()
        plain.execute_command("REPLICAOF", "NO", "ONE")
        ends = time.monotonic() + 10
        while index.standing("pod", 0)[0] != 3:
            assert time.monotonic() < ends
            settle(index)
            index.renew()
        assert matches(index, keys) == {"pod": 3}
        assert index.counts["eras"] == 1


def scores(index: StoreIndex, keys: bytes) -> list[tuple[int, int, float, int]]:
    """(rank, matched, score, speculative) per pod."""
    return [(rank, blocks, total, spec) for _, rank, blocks, total, _, spec in index.score(keys, [], [1.0])]


def test_a_placement_counts_for_every_replica_until_its_time_is_over(server: "valkey_server.Valkey") -> None:
    """By the store's own clock, and with nobody taking it out."""
    writer, router, reader = (replica(server.address) for _ in range(3))
    tokens, keys = tokens_of(1, 6)
    stream = writer.add_stream("pod", 0)
    with pytest.raises(Unavailable, match="no replica follows"):
        waiting = replica(server.address)
        waiting.add_stream("pod", 0)
        waiting.place("pod", 0, keys, 1.0)
    stream.apply([stored(tokens[: 2 * BLOCK])])
    settle(writer)
    started = time.monotonic()
    assert router.place("pod", -1, keys[: 8 * 4], 1.0) == ("recorded", 0, 2)
    assert scores(reader, keys) == [(0, 2, 4.0, 2)]
    assert [each[4] for found in reader.holders(keys, []) for each in found] == [False, False, True, True]
    stream.apply([stored(tokens[: 3 * BLOCK])])  # the engine has computed one of them
    settle(writer)
    assert scores(reader, keys) == [(0, 3, 4.0, 1)] or time.monotonic() - started > 0.9
    time.sleep(max(0.0, started + 1.0 - time.monotonic()) + 0.2)
    assert scores(reader, keys) == [(0, 3, 3.0, 0)]
    assert list(server.client().scan_iter(match="*}[pw]*")) == []
    assert router.place("nobody", 0, keys, 1.0)[0] == "no_pod"
    assert router.place("pod", 1, keys, 1.0)[0] == "no_rank"


def test_what_was_placed_on_a_dead_engine_is_gone(server: "valkey_server.Valkey") -> None:
    """A new life ends it, and a router that has not heard of that life yet does not bring it back."""
    writer, router = replica(server.address), replica(server.address)
    _, keys = tokens_of(1, 4)
    stream = writer.add_stream("pod", 0)
    settle(writer)
    router.place("pod", 0, keys, 100.0)
    assert scores(router, keys) == [(0, 0, 4.0, 4)]
    stream.clear()
    settle(writer)
    assert scores(router, keys) == []
    real, lives = router._read, dict(router._table.lives)

    def late(*arguments: object, **options: object):  # type: ignore[no-untyped-def]
        """Between its reading and its writing the engine restarts."""
        answer = real(*arguments, **options)  # type: ignore[arg-type]
        if router._table.lives == lives:
            stream.clear()
            settle(writer)
        return answer

    router._read = late  # type: ignore[method-assign]
    assert router.place("pod", 0, keys, 100.0) == ("recorded", 0, 0)
    assert router._table.lives != lives
    assert scores(writer, keys) == [(0, 0, 4.0, 4)]  # on the engine that lives


def test_placements_have_bounds(server: "valkey_server.Valkey") -> None:
    """As many as the model may have, over all replicas, and refused whole; a store without room takes none."""
    settings = StoreSettings.model_validate({"addresses": (server.address,)})
    one, other = (StoreIndex(Client(settings), settings, "model", BLOCK, max_placements=8) for _ in range(2))
    one.add_stream("pod", 0)
    settle(one)
    keys = [random.Random(at).randbytes(48) for at in range(2)]
    assert one.place("pod", 0, keys[0], 100.0)[0] == "recorded"
    assert other.place("pod", 0, keys[1], 100.0)[0] == "no_room"
    assert other.placements["refused"] == 6
    assert other.place("pod", 0, keys[0], 100.0)[0] == "recorded"  # once more needs no more room
    assert (other.placements["recorded"], other.placements["renewed"]) == (0, 6)
    server.client().config_set("maxmemory", 1024)
    with pytest.raises(StoreFull):
        one.place("pod", 0, keys[0], 100.0)


def test_engine_hashes_are_answered_by_all_replicas_or_not_at_all(server: "valkey_server.Valkey") -> None:
    """Two replicas write, a third one asks: it gets both parts, and while one of the two is silent it gets an error."""
    one, two, asker = (replica(server.address) for _ in range(3))
    tokens, keys = tokens_of(1, 3)
    streams = one.add_stream("one", 0), two.add_stream("two", 0)
    for index, stream in zip((one, two), streams, strict=True):
        stream.apply([stored(tokens)])
        settle(index)
    hashes = b"".join(each.to_bytes(8, "little") for each in (1, 2, 3, 4))
    with pytest.raises(StoreAway, match="not every replica"):
        asker.holders_of_ints(hashes, [])
    one.start()
    try:
        with pytest.raises(StoreAway, match="not every replica"):
            asker.holders_of_ints(hashes, [])
        assert [len(found) for _, found in asker.holders_of_ints(hashes, ["one"])] == [1, 1, 1, 0]
        two.start()
        expected = [int.from_bytes(keys[at : at + 8], "little") for at in range(0, 24, 8)]
        both = [("one", 0, 0, 0, False), ("two", 0, 0, 0, False)]
        assert asker.holders_of_ints(hashes, []) == [*((key, both) for key in expected), (0, [])]
        streams[0].clear()  # a new life: what was said under the old one does not count
        eventually_empty = time.monotonic() + 10
        while [len(found) for _, found in asker.holders_of_ints(hashes, [])] != [1, 1, 1, 0]:
            assert time.monotonic() < eventually_empty
        for index, stream, ids in zip((one, two), streams, (tokens[:BLOCK], tokens[BLOCK:]), strict=True):
            stream.apply([stored(ids[:BLOCK], 9)])  # one name for two different blocks
            settle(index)
        nine = (9).to_bytes(8, "little")
        assert asker.holders_of_ints(nine, []) == [(0, both)]
        assert asker.holders_of_ints(nine, ["one"]) == [(expected[0], both[:1])]
        names = [each.to_bytes(32, "big") for each in (7, 8)]
        streams[1].apply([batch([as_map(Stored(names, None, tokens[: 2 * BLOCK], BLOCK))])])
        assert [found for _, found in asker.holders_of_bytes(names, [])] == [both[1:]] * 2
        assert not list(server.client().scan_iter(match="*}[xy]*"))
    finally:
        one.stop()
        two.stop()


def test_a_saved_state_is_not_taken(server: "valkey_server.Valkey") -> None:
    """Another replica may have overtaken what it says."""
    assert not replica(server.address).add_stream("pod", 0).restore(b"")


def test_a_missing_password_file_names_the_setting() -> None:
    with pytest.raises(ConfigError, match=r"store\.password_file"):
        replica("127.0.0.1:1", password_file="/nowhere/password")
    with pytest.raises(ConfigError, match=r"store\.sentinel_password_file"):
        replica("127.0.0.1:1", mode="sentinel", sentinel_service="main", sentinel_password_file="/nowhere/password")
