"""What two views of one stream say of each other, and that neither is believed without a reason."""

from dataclasses import replace

from kvindex_server.divergence import Finding, Repair, Side, compare
from kvindex_server.marks import EVERY, KEPT, Mark, Marks
from kvindex_server.stream import Cause, Trust

EXACT, PARTIAL, STALE = Trust.EXACT, Trust.PARTIAL, Trust.STALE
EQUAL, OTHER = 7, 8


def mark(sequence: int, held: int = EQUAL, trust: Trust = EXACT, claims: int = 10) -> Mark:
    return Mark(sequence, 1000 + sequence, held, claims, trust)


def side(*marks: Mark, trust: Trust = EXACT, cause: Cause | None = Cause.IN_SEQUENCE) -> Side:
    return Side("m", "p", 0, "tcp://a:1", "", 16, 1337, trust, cause, marks)


def test_equal_streams_need_nothing() -> None:
    """At the newest message both have a mark of."""
    assert compare(side(mark(1), mark(2)), side(mark(2), mark(3))) == Finding(2, 0, Repair.NONE)


def test_what_is_not_the_same_moment_is_not_compared() -> None:
    """No common message, another life's message under the number, another engine, block size or seed."""
    mine, theirs = side(mark(2)), side(mark(2, OTHER))
    assert compare(mine, side(mark(3, OTHER))) is None
    assert compare(mine, side(replace(mark(2, OTHER), message=1))) is None
    for change in ({"endpoint": "tcp://b:1"}, {"incarnation": "x"}, {"block_size": 32}, {"hash_seed": 1}, {"rank": 1}):
        assert compare(mine, replace(theirs, **change)) is None  # type: ignore[arg-type]


def test_two_that_were_sure_doubt_both() -> None:
    """Also the one that asks second, when the first one is in doubt already."""
    for theirs in (
        side(mark(2, OTHER, claims=13)),
        side(mark(2, OTHER, claims=13), mark(3, OTHER, STALE, 13), trust=STALE, cause=None),
    ):
        found = compare(side(mark(2), mark(3)), theirs)
        assert found is not None and (found.repair, found.blocks) == (Repair.DOUBT, 3)


def test_one_in_doubt_because_of_a_difference_takes_no_side() -> None:
    """Nor does one whose sibling knows no better; only the engine can tell."""
    doubting = side(mark(2, trust=EXACT), mark(3, trust=STALE), trust=STALE, cause=Cause.DIVERGED)
    found = compare(doubting, side(mark(2, OTHER), mark(3, OTHER)))
    assert found == Finding(3, 1, Repair.NONE)
    for cause in (Cause.NOT_TAKEN_IN, Cause.CLAIMS_DROPPED, Cause.UNREADABLE, Cause.CONNECTION_LOST):
        mine = side(mark(3, trust=PARTIAL), trust=PARTIAL, cause=cause)
        assert compare(mine, side(mark(3, OTHER))) == Finding(3, 1, Repair.NONE)


def test_one_that_knows_less_takes_over() -> None:
    """A late-comer from an exact one or an earlier one, one with a hole from any sound one; never the reverse."""
    late = side(mark(3, trust=PARTIAL), trust=PARTIAL, cause=Cause.JOINED_LATE)
    earlier = side(mark(3, OTHER, PARTIAL, 12), trust=PARTIAL, cause=Cause.JOINED_LATE)
    torn = side(mark(3, OTHER, STALE, 12), trust=STALE, cause=Cause.GAP)
    exact = side(mark(3, OTHER, claims=12))
    for mine, theirs, expected in (
        (late, exact, Repair.ADOPT),
        (late, earlier, Repair.ADOPT),
        (earlier, late, Repair.NONE),
        (late, torn, Repair.NONE),
        (replace(torn, marks=[mark(3, trust=STALE)]), late, Repair.NONE),  # they hold the same
        (torn, late, Repair.ADOPT),
        (torn, torn, Repair.NONE),
        (exact, late, Repair.NONE),
        (torn, replace(exact, trust=STALE, marks=[mark(3, EQUAL)]), Repair.NONE),  # in doubt by now
    ):
        found = compare(mine, theirs)
        assert found is not None and found.repair is expected, (mine, theirs)


def test_marks_are_of_the_same_messages_on_every_replica() -> None:
    """Multiples of a number, however the messages came in parts, and the last one; nothing of another life."""
    marks = Marks()
    last = EVERY * (KEPT + 2) + 1
    for sequence in range(last + 1):
        marks.add(mark(sequence))
    kept = [EVERY * number for number in range(3, KEPT + 3)]
    assert [each.sequence for each in marks.all()] == [*kept, last]
    marks.clear()
    assert marks.all() == []
