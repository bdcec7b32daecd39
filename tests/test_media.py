"""A placeholder of a text takes the room that the engine gives its item."""

import struct

import pytest

from kvindex_server.errors import InvalidArgument
from kvindex_server.tokenize.media import spread

LIMIT = 1000


def ids(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}I", *values)


@pytest.mark.parametrize(
    ("tokens", "features", "expected"),
    [
        ((1, 9, 2), [("a", 1, 3)], (1, 9, 9, 9, 2)),
        ((1, 9, 2), [("a", 1, 1)], (1, 9, 2)),
        ((1, 9, 9, 9, 2), [("a", 1, 3)], (1, 9, 9, 9, 2)),  # written out by the caller
        ((1, 9, 2, 9, 3), [("b", 5, 2), ("a", 1, 3)], (1, 9, 9, 9, 2, 9, 9, 3)),
        ((9, 9, 3), [("a", 0, 4), ("b", 4, 4)], (9,) * 8 + (3,)),
        ((1, 8, 2, 9), [("a", 1, 2), ("b", 4, 3)], (1, 8, 8, 2, 9, 9, 9)),
    ],
)
def test_each_placeholder_is_repeated_over_its_range(
    tokens: tuple[int, ...], features: list[tuple[str, int, int]], expected: tuple[int, ...]
) -> None:
    assert spread(ids(*tokens), features, LIMIT) == ids(*expected)


@pytest.mark.parametrize(
    ("features", "reason"),
    [
        ([("a", 3, 1)], "offset 3 is beyond the 3 tokens"),
        ([("a", 1, 2), ("b", 4, 1)], "offset 4 is beyond the 4 tokens"),
        ([("a", 0, 3), ("b", 2, 1)], "two of them cover the same tokens"),
        ([("a", 0, 2**32 - 1)], "may exceed the limit of 1000"),
    ],
)
def test_a_range_that_is_not_the_texts_is_refused(features: list[tuple[str, int, int]], reason: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        spread(ids(1, 9, 2), features, LIMIT)
    assert caught.value.field == "mm_features"
    assert reason in caught.value.reason
