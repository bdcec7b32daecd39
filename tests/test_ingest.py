"""Order, repair and trust of one stream, driven without sockets and with a clock of the test's own."""

import itertools

import msgpack
import pytest

from kvindex_server._core import Index, Order, Outcome
from kvindex_server.ingest import Bounds, Ingest
from kvindex_server.stream import Cause, StreamState, StreamStatus, Trust

_times = itertools.count(1000)


def stored(number: int, parent: int | None = None) -> bytes:
    """A batch that stores one block of 4 tokens named `number`; every call has its own timestamp."""
    event = ["BlockStored", [number], parent, [number] * 4, 4, None, "GPU"]
    return bytes(msgpack.packb([float(next(_times)), [event], 0]))


def removed(number: int) -> bytes:
    return bytes(msgpack.packb([float(next(_times)), [["BlockRemoved", [number], "GPU"]], 0]))


class Engine:
    """A publisher's memory: what it sent, and what a replay would answer."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []

    def publish(self, payload: bytes) -> tuple[int, bytes]:
        self.sent.append(payload)
        return len(self.sent) - 1, payload

    def replay(self, start: int, oldest: int = 0) -> list[tuple[int, bytes]]:
        return [(i, p) for i, p in enumerate(self.sent) if i >= max(start, oldest)]


class Rig:
    def __init__(self, *, replay: bool = True, watched: bool = False, **bounds: object) -> None:
        self.index = Index()
        self.stream = self.index.add_stream("pod", 0)
        self.now = 0.0
        self.asked: list[int] = []
        self.ingest = Ingest(
            self.stream,
            StreamStatus("pod", 0, "m"),
            Bounds(**bounds),  # type: ignore[arg-type]
            self.asked.append if replay else None,
            clock=lambda: self.now,
            watched=watched,
        )
        self.ingest.start()

    def holds(self, *numbers: int) -> bool:
        return self.index.claims == len(numbers) and all(
            holders for _, holders in self.index.holders_of_ints(b"".join(n.to_bytes(8, "little") for n in numbers), [])
        )

    @property
    def trust(self) -> Trust:
        return self.ingest.status().trust


def test_sequence_names_every_outcome() -> None:
    """First, next, duplicate, gap and restart are told apart by number and digest."""
    order = Order()
    assert order.judge(5, 50) is Outcome.FIRST
    order.applied(5, 50)
    assert order.judge(6, 60) is Outcome.NEXT
    assert order.judge(8, 80) is Outcome.GAP
    assert order.judge(5, 50) is Outcome.DUPLICATE
    assert order.judge(5, 51) is Outcome.RESTART
    assert order.judge(0, 1) is Outcome.RESTART


def test_a_stream_that_is_being_cleared_is_not_exact() -> None:
    """Between an operator's ClearPod and the new beginning nobody may be told that nothing is held."""
    rig = Rig(replay=False)
    rig.ingest.live([(0, stored(1))])
    assert rig.trust is Trust.EXACT
    rig.ingest.clearing()
    assert rig.trust is Trust.COLD
    rig.ingest.resync()
    rig.ingest.live([(0, stored(2))])
    assert rig.trust is Trust.EXACT


def test_two_clearings_that_overlap_are_both_waited_for() -> None:
    """The second ClearPod's claims are going while the first one's new beginning is made: nobody is told EXACT."""
    rig = Rig(replay=False)
    rig.ingest.clearing()
    rig.ingest.clearing()
    rig.ingest.resync()
    rig.ingest.live([(0, stored(1))])
    assert rig.trust is Trust.COLD
    rig.ingest.resync()
    rig.ingest.live([(0, stored(1))])
    assert rig.trust is Trust.EXACT


def test_what_is_being_cleared_is_not_saved() -> None:
    """A snapshot must not call a state exact whose claims are just being dropped."""
    engine, rig = Engine(), Rig()
    rig.ingest.replayed([engine.publish(stored(1))], ended=True)
    assert rig.ingest.save() is not None
    rig.ingest.clearing()
    rig.stream.clear()
    assert rig.ingest.save() is None


def test_the_first_question_waits_for_the_subscription() -> None:
    """Asked before, what is published between the answer and the subscription would be missed."""
    engine, rig = Engine(), Rig(watched=True)
    engine.publish(stored(1))
    assert rig.asked == [] and rig.ingest.waiting_for_replay and rig.ingest.status().state is StreamState.CONNECTING
    rig.ingest.connection(True)
    assert rig.asked == [0]
    rig.ingest.replayed(engine.replay(0), ended=True)
    assert rig.trust is Trust.EXACT and rig.asked == [0] and rig.ingest.synced


def test_a_subscription_that_comes_after_the_replay_is_not_exact_before_it_asked_again() -> None:
    """Nobody listened while the engine went on; the replay port alone proves nothing."""
    engine, rig = Engine(), Rig(watched=True)
    engine.publish(stored(1))
    rig.now += 1.5
    rig.ingest.tick()
    rig.ingest.replayed(engine.replay(0), ended=True)
    status = rig.ingest.status()
    assert (status.state, status.trust, status.trust_cause) == (
        StreamState.CONNECTING,
        Trust.STALE,
        Cause.CONNECTION_LOST,
    )
    assert "event socket not reached" in status.trust_reason and not rig.ingest.synced
    engine.publish(removed(1))
    rig.ingest.connection(True)
    assert rig.asked == [0, 0] and rig.trust is Trust.STALE
    rig.ingest.replayed(engine.replay(0), ended=True)
    assert rig.trust is Trust.EXACT and rig.holds() and rig.ingest.status().state is StreamState.LIVE


def test_an_engine_that_was_replaced_before_the_subscription_is_found_out() -> None:
    """The replay was the dead one's; its claims go when the living one has no such message."""
    engine, rig, reborn = Engine(), Rig(watched=True), Engine()
    rig.now += 1.5
    rig.ingest.tick()
    rig.ingest.replayed([engine.publish(stored(1)), engine.publish(stored(2))], ended=True)
    reborn.publish(stored(9))
    rig.ingest.connection(True)
    rig.ingest.replayed(reborn.replay(1), ended=True)
    rig.ingest.replayed(reborn.replay(0), ended=True)
    assert rig.trust is Trust.EXACT and rig.holds(9)


def test_what_is_heard_shows_that_the_event_socket_is_reached() -> None:
    """The monitor may tell of a connection later than the message that came over it."""
    engine, rig = Engine(), Rig(watched=True)
    rig.ingest.live([engine.publish(stored(1))])
    assert rig.asked == [0]
    rig.ingest.connection(True)
    rig.ingest.replayed(engine.replay(0), ended=True)
    assert rig.trust is Trust.EXACT and rig.asked == [0]


def test_without_replay_a_watched_stream_waits_for_nothing() -> None:
    """There is nothing to ask, connected or not."""
    rig = Rig(replay=False, watched=True)
    assert rig.ingest.synced and not rig.ingest.waiting_for_replay
    rig.ingest.connection(True)
    rig.ingest.live([(0, stored(1))])
    assert rig.trust is Trust.EXACT and rig.ingest.in_order


@pytest.mark.parametrize("replay", [True, False])
def test_of_two_peers_one_goes(replay: bool) -> None:
    """Whether the one that stays is the engine that was followed is asked, or said to be unknown."""
    engine, rig = Engine(), Rig(replay=replay)
    rig.ingest.connection(True)
    if replay:
        rig.ingest.replayed([], ended=True)
    rig.ingest.live([engine.publish(stored(1))])
    rig.ingest.connection(True)
    rig.ingest.peer_left()
    assert rig.trust is Trust.STALE
    if replay:
        rig.ingest.replayed(engine.replay(0), ended=True)
        assert rig.trust is Trust.EXACT and rig.holds(1)


def test_without_replay_the_numbers_tell_that_the_newcomer_is_followed() -> None:
    """A handover: the next engine dials in, begins at 0, and only then the old connection is seen to end."""
    rig = Rig(replay=False)
    rig.ingest.connection(True)
    rig.ingest.live([(0, stored(1)), (1, stored(2))])
    rig.ingest.connection(True)
    rig.ingest.live([(0, stored(9))])
    rig.ingest.peer_left()
    assert rig.trust is Trust.EXACT and rig.holds(9)


@pytest.mark.parametrize("replay", [True, False])
def test_a_last_message_that_was_dropped_unread_is_missed(replay: bool) -> None:
    """No later message has to come to show the hole; an engine that cannot tell it otherwise is not asked for ever."""
    engine, rig = Engine(), Rig(replay=replay)
    if replay:
        rig.ingest.replayed([], ended=True)
    rig.ingest.live([engine.publish(stored(1))])
    engine.publish(removed(1))
    rig.ingest.unread("oversized", 1)
    status = rig.ingest.status()
    assert (status.trust, status.trust_cause, status.decode_errors) == (Trust.STALE, Cause.GAP, {"oversized": 1})
    if not replay:
        return
    rig.now += 6
    rig.ingest.tick()
    assert rig.asked == [0, 1]
    rig.ingest.unread("oversized", 1, replayed=True)
    rig.ingest.replayed([], ended=True)
    rig.now += 1000
    rig.ingest.tick()
    assert rig.asked == [0, 1] and rig.trust is Trust.STALE and rig.ingest.status().restarts == 0


def test_a_dropped_message_that_the_engine_still_has_is_fetched() -> None:
    """What was lost on the way only, as by a connection that ended over it, heals."""
    engine, rig = Engine(), Rig()
    rig.ingest.replayed([], ended=True)
    rig.ingest.live([engine.publish(stored(1))])
    engine.publish(removed(1))
    rig.ingest.ended()
    assert rig.trust is Trust.STALE and rig.ingest.status().decode_errors == {"protocol": 1}
    rig.now += 6
    rig.ingest.tick()
    rig.ingest.replayed(engine.replay(1), ended=True)
    rig.ingest.replayed(engine.replay(0), ended=True)
    assert rig.trust is Trust.EXACT and rig.holds()


@pytest.mark.parametrize("replayed", [True, False])
def test_a_message_dropped_while_a_replay_runs_is_missed_at_its_end(replayed: bool) -> None:
    """The end marker does not make complete what was not read."""
    engine, rig = Engine(), Rig()
    engine.publish(stored(1))
    rig.ingest.unread("oversized", 1, replayed=replayed)
    rig.ingest.replayed(engine.replay(0), ended=True)
    assert rig.trust is Trust.STALE and "message 1 or a later one was not read" in rig.ingest.status().trust_reason


def test_numbers_of_dropped_messages_are_not_believed_blindly() -> None:
    """One that no stream can reach, one long applied, and none at all are counted, and change nothing."""
    rig = Rig(replay=False)
    rig.ingest.live([(0, stored(1))])
    for number in (None, 0, 1 << 63):
        rig.ingest.unread("oversized", number)
    assert rig.trust is Trust.EXACT and rig.ingest.status().decode_errors == {"oversized": 3}


def test_policy_drop_keeps_all_when_one_event_cannot_be_read() -> None:
    """One undecodable event spoils only itself, whatever is done about gaps."""
    rig = Rig(drop_on_gap=True)
    rig.ingest.replayed([(0, stored(1)), (1, stored(2))], ended=True)
    bad = [["BlockStored", [9], None, [9] * 4, "four", None, "GPU"]]
    rig.ingest.live([(2, bytes(msgpack.packb([1.0, bad, 0])))])
    assert rig.trust is Trust.STALE and rig.holds(1, 2)


def test_a_new_life_fences_the_old_one_though_a_replay_runs() -> None:
    """From its first message on no claim of the dead engine is held, also when nothing else waits."""
    engine, rig, reborn = Engine(), Rig(), Engine()
    rig.ingest.replayed([], ended=True)
    rig.ingest.live([engine.publish(stored(number)) for number in (1, 2, 3)])
    rig.ingest.connection(False)
    rig.ingest.connection(True)
    rig.ingest.live([reborn.publish(stored(9))])
    assert rig.holds() and rig.trust is Trust.COLD and rig.ingest.status().restarts == 1
    rig.ingest.replayed(reborn.replay(0), ended=True)
    assert rig.trust is Trust.EXACT and rig.holds(9)


def test_messages_from_before_all_that_the_engine_keeps_are_no_other_life() -> None:
    """They waited while the replay was asked for; it begins behind them, and the engine says that it is the same."""
    engine, rig = Engine(), Rig()
    for number in range(1, 102):
        engine.publish(stored(number))
    rig.ingest.live(engine.replay(85)[:6])
    rig.ingest.replayed(engine.replay(0, oldest=91), ended=True)
    assert rig.asked == [0, 100]
    rig.ingest.replayed(engine.replay(100), ended=True)
    assert rig.trust is Trust.PARTIAL and rig.index.claims == 10 and rig.ingest.status().restarts == 0


def test_low_numbers_of_another_life_are_not_taken_for_old_ones() -> None:
    """Joined late, the first numbers cannot be compared: the engine that has them lacks the last applied one."""
    engine, rig, reborn = Engine(), Rig(), Engine()
    for number in range(1, 102):
        engine.publish(stored(number))
    rig.ingest.replayed(engine.replay(0, oldest=91), ended=False)
    rig.ingest.live([reborn.publish(stored(900))])
    rig.ingest.replayed([], ended=True)
    assert rig.asked == [0, 100] and rig.trust is not Trust.EXACT
    rig.ingest.replayed(reborn.replay(100), ended=True)
    rig.ingest.replayed(reborn.replay(0), ended=True)
    assert rig.trust is Trust.EXACT and rig.holds(900) and rig.ingest.status().restarts == 1


def test_without_replay_first_sequence_decides_trust() -> None:
    """From sequence 0 on all is known; a later first message leaves the past unknown."""
    rig = Rig(replay=False)
    assert rig.trust is Trust.COLD
    rig.ingest.live([(0, stored(1)), (1, stored(2))])
    assert rig.trust is Trust.EXACT and rig.holds(1, 2)
    late = Rig(replay=False)
    late.ingest.live([(7, stored(1))])
    assert late.trust is Trust.PARTIAL and late.holds(1)


def test_gap_without_replay_is_stale_and_counted() -> None:
    """A hole nobody can fill is counted and shown; the claims stay by default."""
    rig = Rig(replay=False)
    rig.ingest.live([(0, stored(1)), (2, stored(3))])
    status = rig.ingest.status()
    assert (status.gaps, status.trust, status.state) == (1, Trust.STALE, StreamState.GAP)
    assert "1 messages missing before sequence 2" in status.trust_reason
    assert rig.holds(1, 3)


def test_gap_policy_drop_clears_what_may_be_wrong() -> None:
    """With on_gap=drop the claims go and what follows is sound."""
    rig = Rig(replay=False, drop_on_gap=True)
    rig.ingest.live([(0, stored(1)), (2, stored(3))])
    assert rig.trust is Trust.PARTIAL and rig.holds(3)


def test_first_contact_replays_from_zero() -> None:
    """Joining late, everything published before is fetched, live messages wait, nothing is applied twice."""
    engine, rig = Engine(), Rig()
    for number in range(1, 6):
        engine.publish(stored(number))
    assert rig.asked == [0] and rig.ingest.status().state is StreamState.SYNCING
    rig.ingest.live([engine.publish(stored(6))])
    assert rig.index.claims == 0
    rig.ingest.replayed(engine.replay(0), ended=True)
    rig.ingest.live([engine.publish(removed(1))])
    assert rig.trust is Trust.EXACT and rig.holds(2, 3, 4, 5, 6)
    assert rig.ingest.synced


def test_nothing_is_exact_while_its_past_is_still_coming() -> None:
    """The first messages of a replay say nothing of those behind them, a removal among them."""
    engine = Engine()
    for payload in (stored(1), stored(2, 1), removed(2)):
        engine.publish(payload)
    rig = Rig()
    for message in engine.replay(0):
        rig.ingest.replayed([message], ended=False)
        status = rig.ingest.status()
        assert (status.trust, status.trust_cause) == (Trust.PARTIAL, Cause.CATCHING_UP)
    rig.ingest.replayed([], ended=True)
    assert rig.trust is Trust.EXACT and rig.holds(1) and not rig.holds(2)


def test_a_gap_is_not_exact_until_it_is_filled() -> None:
    """Live messages that wait for the replay are not applied, so what they say is missing too."""
    engine = Engine()
    rig = Rig()
    rig.ingest.replayed([engine.publish(stored(1))], ended=True)
    engine.publish(stored(2, 1))
    rig.ingest.live([engine.publish(removed(1))])
    assert (rig.trust, rig.ingest.status().trust_cause) == (Trust.PARTIAL, Cause.CATCHING_UP)
    rig.ingest.replayed(engine.replay(0), ended=True)
    assert rig.trust is Trust.EXACT and not rig.holds(1) and rig.ingest.status().last_sequence == 2


def test_a_replay_that_takes_long_is_waited_for() -> None:
    """Its time is for those who wait behind it; while it gets on and nobody does, it is not given up for complete."""
    engine = Engine()
    for number in range(1, 41):
        engine.publish(stored(number, number - 1 or None))
    rig = Rig(seconds=3.0, replay_timeout=2.0)
    for message in engine.replay(0):
        rig.ingest.replayed([message], ended=False)
        rig.now += 0.5
        rig.ingest.tick()
        assert rig.trust is Trust.PARTIAL
    rig.ingest.replayed([], ended=True)
    assert rig.trust is Trust.EXACT and rig.index.claims == 40


def test_first_contact_with_forgotten_past_is_partial() -> None:
    """An engine whose replay buffer begins later tells so by its first sequence."""
    engine, rig = Engine(), Rig()
    for number in range(1, 6):
        engine.publish(stored(number))
    rig.ingest.replayed(engine.replay(0, oldest=3), ended=True)
    assert rig.trust is Trust.PARTIAL and rig.holds(4, 5)


def test_gap_is_repaired_by_replay() -> None:
    """The hole is fetched from the last applied message on; afterwards nothing is missing."""
    engine, rig = Engine(), Rig()
    rig.ingest.replayed([], ended=True)
    rig.ingest.live([engine.publish(stored(1))])
    engine.publish(stored(2))
    rig.ingest.live([engine.publish(stored(3))])
    assert rig.asked == [0, 0] and rig.ingest.status().gaps == 1
    rig.ingest.live([engine.publish(stored(4))])
    rig.ingest.replayed(engine.replay(0), ended=True)
    assert rig.trust is Trust.EXACT and rig.holds(1, 2, 3, 4)


def test_replay_that_loses_messages_is_asked_again_from_the_hole() -> None:
    """Engines before vLLM 0.33 drop replayed messages and even the end marker."""
    engine, rig = Engine(), Rig()
    for number in range(1, 101):
        engine.publish(stored(number))
    rig.ingest.replayed(engine.replay(0)[:40] + engine.replay(0)[60:], ended=True)
    assert rig.asked == [0, 39]
    rig.ingest.replayed(engine.replay(39)[:30], ended=False)
    rig.now += 6
    rig.ingest.tick()
    assert rig.asked == [0, 39, 68]
    rig.ingest.replayed(engine.replay(68), ended=True)
    assert rig.trust is Trust.EXACT and rig.index.claims == 100


def test_replay_not_answered_ends_at_its_deadline() -> None:
    """A pod without a working replay socket must not stay silent for ever: live messages are used."""
    rig = Rig()
    rig.ingest.live([(4, stored(1)), (5, stored(2))])
    rig.now += 6
    rig.ingest.tick()
    assert rig.trust is Trust.PARTIAL and rig.holds(1, 2) and not rig.ingest.synced


def test_uncovered_hole_is_stale() -> None:
    """When the engine has forgotten the missing messages too, the claims are marked."""
    engine, rig = Engine(), Rig()
    rig.ingest.replayed([], ended=True)
    rig.ingest.live([engine.publish(stored(1))])
    for number in range(2, 5):
        engine.publish(stored(number))
    rig.ingest.live([engine.publish(stored(5))])
    rig.ingest.replayed(engine.replay(0, oldest=3), ended=True)
    assert rig.trust is Trust.STALE and rig.holds(1, 5)


@pytest.mark.parametrize("replay", [True, False])
def test_restart_fences_the_old_life(replay: bool) -> None:
    """When the sequence falls back, nothing of the dead engine is held after the new one's first message."""
    rig = Rig(replay=replay)
    first, second = Engine(), Engine()
    if replay:
        rig.ingest.replayed([], ended=True)
    rig.ingest.live([first.publish(stored(number)) for number in range(1, 4)])
    rig.ingest.live([second.publish(stored(9))])
    status = rig.ingest.status()
    assert (status.restarts, status.epoch) == (1, 1)
    assert rig.holds(9) and rig.trust is Trust.EXACT


def test_restart_in_the_middle_of_one_drain() -> None:
    """Old and new life read by one wake-up are still told apart."""
    rig = Rig(replay=False)
    rig.ingest.live([(0, stored(1)), (1, stored(2)), (0, stored(8)), (1, stored(9))])
    assert rig.holds(8, 9) and rig.ingest.status().restarts == 1


def test_restart_hidden_by_a_gap_is_seen_in_the_replay() -> None:
    """A new life that has passed the old sequence sends another message under the last applied number."""
    engine, rig = Engine(), Rig()
    rig.ingest.replayed([], ended=True)
    rig.ingest.live([engine.publish(stored(number)) for number in range(1, 4)])
    reborn = Engine()
    for number in range(11, 21):
        reborn.publish(stored(number))
    rig.ingest.live([(9, reborn.sent[9])])
    rig.ingest.replayed(reborn.replay(2), ended=True)
    assert rig.index.claims == 0
    rig.ingest.replayed(reborn.replay(0), ended=True)
    assert rig.trust is Trust.EXACT and rig.holds(*range(11, 21)) and rig.ingest.status().restarts == 1


def test_duplicates_are_counted_and_change_nothing() -> None:
    """The same message again is not applied again, though stores are counted per copy."""
    rig = Rig(replay=False)
    message = (0, stored(1))
    rig.ingest.live([message, message])
    rig.ingest.live([message, (1, removed(1))])
    assert rig.ingest.status().duplicates == 2 and rig.index.claims == 0


def test_buffer_overflow_gives_the_replay_up() -> None:
    """Live messages waiting for a stuck replay are bounded."""
    rig = Rig(messages=3)
    rig.ingest.live([(number, stored(number)) for number in range(5)])
    status = rig.ingest.status()
    assert status.dropped == {"sync_buffer_full": 1} and status.trust is Trust.EXACT
    assert rig.index.claims == 5


def test_unreadable_batch_makes_claims_doubtful() -> None:
    """A batch nobody could read may have removed something: counted, and said."""
    rig = Rig(replay=False)
    rig.ingest.live([(0, stored(1)), (1, b""), (2, stored(2))])
    status = rig.ingest.status()
    assert status.decode_errors == {"bad_batch": 1}
    assert status.trust is Trust.STALE and rig.holds(1, 2)


def test_clear_event_makes_the_stream_exact_again() -> None:
    """After an all-blocks-cleared everything is known, whatever was missed before."""
    rig = Rig(replay=False)
    rig.ingest.live([(5, stored(1))])
    rig.ingest.live([(6, bytes(msgpack.packb([1.0, [["AllBlocksCleared"]], 0])))])
    assert rig.trust is Trust.EXACT and rig.index.claims == 0


def test_lost_connection_is_shown_after_the_grace_time() -> None:
    """A connection that stays away makes the claims doubtful; its return is checked by a replay."""
    engine, rig = Engine(), Rig()
    rig.ingest.replayed([], ended=True)
    rig.ingest.live([engine.publish(stored(1))])
    rig.ingest.connection(False)
    rig.now += 11
    status = rig.ingest.status()
    assert (status.state, status.trust) == (StreamState.DOWN, Trust.STALE)
    rig.ingest.connection(True)
    rig.ingest.replayed(engine.replay(0), ended=True)
    assert rig.trust is Trust.EXACT and rig.holds(1)


def test_lag_is_measured_from_the_engines_clock() -> None:
    """Batch timestamp to applied, as a histogram and a last value."""
    index = Index()
    wall = 100.0
    ingest = Ingest(index.add_stream("pod", 0), StreamStatus("pod", 0, "m"), Bounds(), None, wall=lambda: wall)
    ingest.live([(0, bytes(msgpack.packb([99.98, [["AllBlocksCleared"]], 0])))])
    status = ingest.status()
    assert status.lag_seconds == pytest.approx(0.02)
    assert status.lag_buckets[3] == 0 and status.lag_buckets[4] == 1 and status.lag_buckets[-1] == 1


def test_restart_seen_by_a_replay_that_lacks_the_last_message() -> None:
    """An engine that came back with fewer messages than were applied is another life, though it says nothing."""
    engine, rig = Engine(), Rig()
    rig.ingest.replayed([], ended=True)
    rig.ingest.live([engine.publish(stored(number)) for number in range(1, 6)])
    reborn = Engine()
    reborn.publish(stored(9))
    rig.ingest.connection(False)
    rig.ingest.connection(True)
    rig.ingest.replayed([], ended=True)
    assert rig.index.claims == 0 and rig.asked[-1] == 0
    rig.ingest.replayed(reborn.replay(0), ended=True)
    assert rig.trust is Trust.EXACT and rig.holds(9) and rig.ingest.status().restarts == 1


def test_mooncake_envelope_is_read() -> None:
    """The master's own field names, alone or beside the engines' names, tell the same."""
    rig = Rig(replay=False)
    beside = {"event_type": "stored", "type": "BlockStored", "seq_hashes": [1, 2], "block_hashes": [1, 2]}
    alone = {"event_type": "stored", "seq_hashes": [3], "medium": "cpu", "backend_id": "a", "tenant_id": "default"}
    gone = {"event_type": "removed", "seq_hashes": [2]}
    rig.ingest.live([(0, bytes(msgpack.packb({"ts": 1.0, "events": [beside, alone, gone]})))])
    assert rig.holds(1, 3) and rig.ingest.status().decode_errors == {}
    rig.ingest.live([(1, bytes(msgpack.packb([1.0, [{"event_type": "cleared"}]])))])
    assert rig.index.claims == 0


@pytest.mark.parametrize("medium", [b"\xff\xfe", "with space", "x" * 65])
def test_medium_that_is_no_name_is_made_one(medium: object) -> None:
    """A medium becomes a tier's name in answers and metrics; what a name cannot have is replaced or cut off."""
    rig = Rig(replay=False)
    text = medium if isinstance(medium, str) else medium.decode("utf-8", "surrogateescape")
    events = [["BlockStored", [1], None, [1] * 4, 4, None, text], ["BlockStored", [2], None, [2] * 4, 4, None, "GPU"]]
    rig.ingest.live([(0, bytes(msgpack.packb([1.0, events, 0], unicode_errors="surrogateescape")))])
    assert rig.ingest.status().decode_errors == {}
    assert rig.holds(1, 2) and rig.index.tiers[3] in ("__", "with_space", "x" * 64)


def test_an_extra_key_nobody_knows_is_counted_and_the_pod_may_hold_more() -> None:
    """The stream stays sound: only the blocks in question have no key."""
    rig = Rig(replay=False)
    event = {"type": "BlockStored", "block_hashes": [1], "token_ids": [1] * 4, "block_size": 4}
    rig.ingest.live([(0, bytes(msgpack.packb([1.0, [event | {"extra_keys": [[["future", "x"]]]}]])))])
    assert rig.ingest.status().decode_errors == {"unread_extras": 1}
    assert (rig.trust, rig.holds(1)) == (Trust.PARTIAL, True)
    rig.ingest.live([(1, bytes(msgpack.packb([1.0, [event | {"block_hashes": [2], "base_block_idx": 3}]])))])
    assert rig.ingest.status().dropped == {"missing_parent": 1}
