"""What is read from a store is checked before it is believed, and asked from many threads at once."""

import random
import struct
import threading

import pytest

from kvindex_server._core import StoreView, split_keys

FULL = struct.pack("<IBI", 0, 0, 0)
KEYS = struct.pack("<3Q", 11, 12, 13)


def holder(life: int, group: int = 0, tiers: int = 1) -> bytes:
    return struct.pack("<Q", life)[:6] + bytes([group, tiers])


def reading(*blocks: list[bytes]) -> bytes:
    return b"".join(struct.pack("<H", len(each)) + b"".join(each) for each in blocks)


def test_a_holder_counts_only_in_its_streams_life() -> None:
    """Dead lives, unknown groups and tiers that have no place are passed over."""
    view = StoreView([("a", 0, 7, FULL, [0, 8]), ("b", 1, 2**47 + 5, FULL, [0, 1])])
    alive, other = holder(7), holder(2**47 + 5, tiers=2)
    found = view.holders(KEYS, [reading([alive, holder(6), other], [holder(7, group=1), other], [holder(7, 0, 2)])], [])
    assert found == [[("a", 0, 0, 0, False), ("b", 1, 1, 0, False)], [("b", 1, 1, 0, False)], []]
    scores = view.score(KEYS, [reading([alive, other], [other])], 16, [], [1.0, 0.5])
    assert sorted(each[:4] for each in scores) == [("a", 0, 1, 1.0), ("b", 1, 2, 1.0)]
    assert view.score(KEYS, [b""], 16, [], [1.0]) == []


def test_groups_beyond_those_there_can_be_are_passed_over() -> None:
    """A stream has 32 at most; whoever writes more into the store is not believed."""
    groups = b"".join(struct.pack("<IBI", each, 0, 0) for each in range(40))
    view = StoreView([("a", 0, 7, groups, [0, 1, 2])])
    held = reading([holder(7, group) for group in range(40)])
    assert [each[3] for each in view.holders(KEYS, [held], [])[0]] == list(range(32))
    assert view.score(KEYS, [held], 16, [], [1.0])[0][:3] == ("a", 0, 1)


def test_a_holder_without_tiers_is_a_placement() -> None:
    """It lengthens what its stream holds, counts apart, and means nothing in a dead life."""
    view = StoreView([("a", 0, 7, FULL, [0]), ("cold", 1, 8, b"", [0])])
    real, placed = holder(7), holder(7, tiers=0)
    assert view.score(KEYS, [reading([real], [placed], [holder(8, tiers=0)])], 16, [], [1.0]) == [
        ("a", 0, 1, 2.0, [1, 0, 0, 0, 0, 0, 0, 0], 1)
    ]
    assert view.score(KEYS, [reading([holder(8, tiers=0)], [holder(6, tiers=0)])], 16, [], [1.0]) == [
        ("cold", 1, 0, 1.0, [0, 0, 0, 0, 0, 0, 0, 0], 1)
    ]
    found = view.holders(KEYS, [reading([real, placed], [holder(8, tiers=0)])], [])
    assert found == [[("a", 0, 0, 0, False), ("a", 0, 0, 0, True)], [("cold", 1, 0, 0, True)], []]
    assert view.holders(KEYS, [reading([holder(8, tiers=0)])], ["a"]) == [[], [], []]


@pytest.mark.parametrize(
    "bad",
    [b"\1", b"\1\0", reading([holder(7)])[:-1], reading([holder(7)], [], [], []), b"\xff\xff" + holder(7)],
)
def test_a_malformed_reading_is_refused(bad: bytes) -> None:
    view = StoreView([("a", 0, 7, FULL, [0])])
    with pytest.raises(ValueError, match="malformed reading"):
        view.score(KEYS, [bad], 16, [], [1.0])
    with pytest.raises(ValueError, match="malformed reading"):
        view.holders(KEYS, [bad], [])
    assert view.score(KEYS, [reading([holder(7)])], 16, [], [1.0])[0][:3] == ("a", 0, 1)  # nothing stayed behind


def test_random_bytes_do_no_harm() -> None:
    rng = random.Random(1)
    for _ in range(2000):
        view = StoreView([("a", 0, rng.randrange(4), rng.randbytes(rng.randrange(40)), list(rng.randbytes(9)))])
        keys = struct.pack("<4Q", *(rng.choice((0, 1, 2, 2**64 - 1)) for _ in range(4)))
        for bad in (rng.randbytes(rng.randrange(60)), reading([holder(rng.randrange(4))] * rng.randrange(3))):
            try:
                view.score(keys, [bad], 16, [], [1.0])
            except ValueError:
                pass


def test_many_threads_ask_one_view() -> None:
    """Each gets its own answer, whatever the others lay out meanwhile."""
    view = StoreView([(f"p{number}", 0, number + 1, FULL, [0]) for number in range(8)])
    failures: list[object] = []

    def ask(number: int) -> None:
        rng = random.Random(number)
        for _ in range(300):
            keys = [rng.randrange(1, 2**64) for _ in range(rng.randrange(1, 90))]
            held = [rng.randrange(len(keys) + 1) for _ in range(8)]
            blocks = [[holder(of + 1) for of in range(8) if at < held[of]] for at in range(len(keys))]
            scores = view.score(struct.pack(f"<{len(keys)}Q", *keys), [reading(*blocks)], 16, [], [1.0])
            if {(pod, matched) for pod, _, matched, *_ in scores} != {(f"p{of}", n) for of, n in enumerate(held) if n}:
                failures.append((keys, held))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_keys_are_split_evenly_and_in_order() -> None:
    rng = random.Random(2)
    keys = [rng.randrange(2**64) for _ in range(4000)]
    parts = [struct.unpack(f"<{len(part) // 8}Q", part) for part in split_keys(struct.pack("<4000Q", *keys), 8)]
    assert sorted(each for part in parts for each in part) == sorted(keys)
    assert all(400 < len(part) < 600 for part in parts)
    assert all(list(part) == [each for each in keys if each in set(part)] for part in parts)
    with pytest.raises(ValueError, match="partitions"):
        split_keys(b"", 0)
