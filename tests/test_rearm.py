"""What could not be repaired is tried again, and mended when the engine's replay allows it."""

import itertools

import msgpack
import pytest
from test_ingest import Engine, Rig, removed, stored

from kvindex_server._core import Order
from kvindex_server.stream import Cause, StreamState, Trust

_times = itertools.count(9000)


def begun(*numbers: int, **bounds: object) -> tuple[Engine, Rig]:
    """An engine that was followed from its first message."""
    engine, rig = Engine(), Rig(**bounds)
    rig.ingest.replayed([], ended=True)
    rig.ingest.live([engine.publish(stored(number)) for number in numbers])
    return engine, rig


def wait(rig: Rig, seconds: float) -> None:
    rig.now += seconds
    rig.ingest.tick()


def unanswered_gap(engine: Engine, rig: Rig, number: int) -> None:
    """One message is lost and the replay stays silent."""
    engine.publish(stored(number))
    rig.ingest.live([engine.publish(stored(number + 1))])
    wait(rig, 6)
    assert rig.trust is Trust.STALE


def test_hole_is_mended_when_the_replay_answers_again() -> None:
    """The missing message is asked for alone; when it is to be had, the stream is built anew from the replay."""
    engine, rig = begun(1, 2)
    unanswered_gap(engine, rig, 3)
    status = rig.ingest.status()
    assert (status.state, status.trust_cause) == (StreamState.GAP, Cause.GAP)
    wait(rig, 5)
    assert rig.asked[-1] == 2 and rig.ingest.waiting_for_replay
    rig.ingest.live([engine.publish(stored(5))])
    assert rig.holds(1, 2, 4, 5), "live messages are not held up by the question"
    rig.ingest.replayed(engine.replay(2), ended=True)
    assert rig.asked[-1] == 0
    rig.ingest.replayed(engine.replay(0), ended=True)
    assert rig.trust is Trust.EXACT and rig.holds(1, 2, 3, 4, 5)
    assert rig.ingest.status().restarts == 0


def test_hole_the_engine_has_forgotten_is_not_asked_for_again() -> None:
    """When the oldest message to be had lies behind the hole, no later one can bring it; the claims stay, marked."""
    engine, rig = begun(1, 2)
    unanswered_gap(engine, rig, 3)
    wait(rig, 5)
    rig.ingest.replayed(engine.replay(2, oldest=3), ended=True)
    asked = len(rig.asked)
    for _ in range(20):
        wait(rig, 400)
    assert len(rig.asked) == asked and rig.trust is Trust.STALE and rig.holds(1, 2, 4)


def test_hole_within_a_shortened_replay_ends_sound() -> None:
    """The missing message is to be had but not the first ones: what the replay tells is sound, not complete."""
    engine, rig = begun(1, 2)
    unanswered_gap(engine, rig, 3)
    wait(rig, 5)
    rig.ingest.replayed(engine.replay(2, oldest=1), ended=True)
    rig.ingest.replayed(engine.replay(0, oldest=1), ended=True)
    assert rig.trust is Trust.PARTIAL and rig.holds(2, 3, 4)


def test_waits_double_up_to_the_longest() -> None:
    """A replay that stays silent is asked less and less often, and never given up."""
    engine, rig = begun(1, rearm_seconds=4.0, rearm_max_seconds=16.0, replay_timeout=1.0)
    unanswered_gap(engine, rig, 2)
    waits = []
    for _ in range(5):
        before, started = len(rig.asked), rig.now
        while len(rig.asked) == before:
            wait(rig, 0.5)
            assert rig.now < started + 100
        waits.append(rig.now - started)
        wait(rig, 1)
    assert waits == [pytest.approx(expected, abs=1.1) for expected in (4, 8, 16, 16, 16)]


def test_late_join_becomes_exact_when_the_replay_answers_at_last() -> None:
    """A first contact without an answer is PARTIAL only until the past can be had."""
    engine, rig = Engine(), Rig()
    for number in range(1, 4):
        engine.publish(stored(number))
    rig.ingest.live([engine.publish(stored(4))])
    wait(rig, 6)
    assert (rig.trust, rig.ingest.status().trust_cause) == (Trust.PARTIAL, Cause.JOINED_LATE) and rig.holds(4)
    assert not rig.ingest.synced
    wait(rig, 5)
    rig.ingest.replayed(engine.replay(0), ended=True)
    rig.ingest.replayed(engine.replay(0), ended=True)
    assert rig.trust is Trust.EXACT and rig.holds(1, 2, 3, 4) and rig.ingest.synced


def test_damaged_message_is_fetched_again() -> None:
    """What could not be read is compared with the engine's own copy at once; another one heals the stream."""
    engine, rig = begun(1, 2)
    sequence, payload = engine.publish(removed(1))
    rig.ingest.live([(sequence, payload[:-3])])
    status = rig.ingest.status()
    assert (status.trust, status.trust_cause) == (Trust.STALE, Cause.UNREADABLE)
    rig.ingest.tick()
    rig.ingest.replayed(engine.replay(rig.asked[-1]), ended=True)
    rig.ingest.replayed(engine.replay(rig.asked[-1]), ended=True)
    assert rig.trust is Trust.EXACT and rig.holds(2) and rig.ingest.status().restarts == 0


def test_message_the_engine_itself_cannot_say_stays_doubtful() -> None:
    """The same bytes again are the engine's own: asked once, marked until it clears or restarts."""
    engine, rig = begun(1)
    rig.ingest.live([engine.publish(b"\xc1")])
    rig.ingest.tick()
    rig.ingest.replayed(engine.replay(rig.asked[-1]), ended=True)
    asked = len(rig.asked)
    rig.ingest.live([engine.publish(b"\xc1" * 2), engine.publish(stored(2))])
    wait(rig, 400)
    assert len(rig.asked) == asked and rig.trust is Trust.STALE and rig.holds(1, 2)
    clear = bytes(msgpack.packb([float(next(_times)), [["AllBlocksCleared"]], 0]))
    rig.ingest.live([engine.publish(clear)])
    assert rig.trust is Trust.EXACT and rig.index.claims == 0


def test_returned_connection_is_doubtful_until_verified() -> None:
    """Between a reconnect and the engine's answer nothing tells whose claims these are."""
    engine, rig = begun(1, 2)
    rig.ingest.connection(False)
    rig.ingest.connection(True)
    assert rig.ingest.status().trust_cause is Cause.CONNECTION_LOST
    wait(rig, 6)
    assert rig.trust is Trust.STALE
    rig.ingest.live([engine.publish(stored(3))])
    wait(rig, 5)
    assert rig.asked[-1] == 1, "the message applied before the connection was lost, not the last one"
    rig.ingest.replayed(engine.replay(1), ended=True)
    assert rig.trust is Trust.EXACT and rig.holds(1, 2, 3)


def test_stranger_that_goes_on_where_the_dead_engine_stopped() -> None:
    """Another engine whose first seen number is the next one is found out by a message of before."""
    _, rig = begun(1, 2)
    reborn = Engine()
    for number in (8, 9):
        reborn.publish(stored(number))
    rig.ingest.connection(False)
    rig.ingest.connection(True)
    wait(rig, 6)
    rig.ingest.live([reborn.publish(stored(10))])
    assert rig.trust is Trust.STALE
    wait(rig, 5)
    rig.ingest.replayed(reborn.replay(1), ended=True)
    rig.ingest.replayed(reborn.replay(0), ended=True)
    assert rig.trust is Trust.EXACT and rig.holds(8, 9, 10) and rig.ingest.status().restarts == 1


def test_stranger_is_found_out_though_the_old_message_is_long_forgotten() -> None:
    """When its digest is no longer kept, the message proves nothing, and the claims go."""
    engine, rig = begun(1, 2)
    rig.ingest.connection(False)
    rig.ingest.connection(True)
    wait(rig, 6)
    rig.ingest.live([engine.publish(stored(3 + number)) for number in range(Order.REMEMBERED + 5)])
    wait(rig, 5)
    rig.ingest.replayed(engine.replay(1), ended=True)
    assert rig.index.claims == 0
    rig.ingest.replayed(engine.replay(0), ended=True)
    # So long a replay may have lost its end without a word: one more answer says that it did not.
    assert (rig.trust, rig.ingest.status().trust_cause) == (Trust.PARTIAL, Cause.CATCHING_UP)
    rig.ingest.replayed(engine.replay(Order.REMEMBERED + 6), ended=True)
    assert rig.trust is Trust.EXACT and rig.index.claims == Order.REMEMBERED + 7


def test_without_a_replay_endpoint_a_reconnect_stays_doubtful() -> None:
    """A restart whose first seen number is the next one cannot be told from the same engine: say so."""
    rig = Rig(replay=False)
    rig.ingest.live([(0, stored(1))])
    rig.ingest.connection(False)
    rig.ingest.connection(True)
    rig.ingest.live([(1, stored(2))])
    assert rig.trust is Trust.STALE and rig.holds(1, 2)
    rig.ingest.live([(0, stored(9))])
    assert rig.trust is Trust.EXACT and rig.holds(9)


def test_policy_drop_drops_only_what_stays_doubtful() -> None:
    """A reconnect that is verified costs nothing; one that is not costs the claims."""
    engine, rig = begun(1, 2, drop_on_gap=True)
    for _ in range(2):
        rig.ingest.connection(False)
        rig.ingest.connection(True)
        rig.ingest.replayed(engine.replay(1), ended=True)
        assert rig.trust is Trust.EXACT and rig.holds(1, 2)
    rig.ingest.connection(False)
    rig.ingest.connection(True)
    wait(rig, 6)
    assert (rig.trust, rig.ingest.status().trust_cause) == (Trust.PARTIAL, Cause.CLAIMS_DROPPED)
    assert rig.index.claims == 0


def test_answer_that_comes_while_the_connection_is_lost_is_not_believed() -> None:
    """It may be another engine's: its numbers go on by chance where the dead one's stopped."""
    engine, rig = begun(1, 2)
    engine.publish(stored(3))
    rig.ingest.live([engine.publish(stored(4))])
    rig.ingest.connection(False)
    rig.ingest.replayed([(2, stored(9))], ended=True)
    assert rig.holds(1, 2)
