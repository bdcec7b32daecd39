"""Answers on their way: what is counted, and who is ended when they are too many."""

from collections.abc import Callable

from kvindex_server.unread import COPIES, PER_CALL, Unread


class Call:
    """A call that ends when told, by its client or by the server."""

    def __init__(self, over: bool = False) -> None:
        self.over = over
        self.cancelled = False
        self._callbacks: list[Callable[[], None]] = []

    def add_callback(self, callback: Callable[[], None]) -> bool:
        self._callbacks.append(callback)
        return not self.over

    def cancel(self) -> None:
        self.cancelled = True
        self.end()

    def end(self) -> None:
        for each in self._callbacks:
            each()


def cost(size: int) -> int:
    return COPIES * size + PER_CALL


def test_what_was_read_counts_no_more() -> None:
    unread = Unread(1 << 20, lambda _: None)
    calls = [Call(), Call()]
    for each in calls:
        unread.add("/m", 1000, each)
    assert unread.bytes == 2 * cost(1000)
    calls[0].end()
    calls[0].end()  # twice counts once
    assert unread.bytes == cost(1000)
    calls[1].end()
    assert unread.bytes == 0


def test_a_call_that_is_over_already_is_not_kept() -> None:
    unread = Unread(1 << 20, lambda _: None)
    unread.add("/m", 1000, Call(over=True))
    assert unread.bytes == 0


def test_the_oldest_are_ended_until_the_rest_fits() -> None:
    ended: list[str] = []
    unread = Unread(2 * cost(1000) + 10, ended.append)
    calls = [Call() for _ in range(5)]
    for number, each in enumerate(calls):
        unread.add(f"/{number}", 1000, each)
    assert [each.cancelled for each in calls] == [True, True, True, False, False]
    assert ended == ["/0", "/1", "/2"] and unread.bytes == 2 * cost(1000)


def test_one_answer_beyond_the_bound_is_sent_all_the_same() -> None:
    unread = Unread(1000, lambda _: None)
    small, large = Call(), Call()
    unread.add("/small", 10, small)
    unread.add("/large", 100_000, large)
    assert (small.cancelled, large.cancelled) == (True, False)
