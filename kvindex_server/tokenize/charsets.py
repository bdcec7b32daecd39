"""Which characters a regular expression of one character matches, asked of the tokenizers library itself."""

import itertools
import sys
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache

from tokenizers import PreTokenizedString, Regex, normalizers, pre_tokenizers

CODE_POINTS = 0x110000
_SURROGATES = (0xD800, 0xE000)

Ranges = tuple[tuple[int, int], ...]
"""Sorted half-open ranges of code points."""

# Unicode's White_Space: what `lstrip` and `rstrip` of an added token take away.
WHITE_SPACE: Ranges = (
    (0x09, 0x0E),
    (0x20, 0x21),
    (0x85, 0x86),
    (0xA0, 0xA1),
    (0x1680, 0x1681),
    (0x2000, 0x200B),
    (0x2028, 0x202A),
    (0x202F, 0x2030),
    (0x205F, 0x2060),
    (0x3000, 0x3001),
)


# Planes without a single assigned character, and those for private use: one character speaks for a plane.
_UNIFORM_PLANES = (*range(0x4, 0xE), 0xF, 0x10)
# Nothing in these differs by case.
_CASELESS = ((0x3400, 0xA000), (0xAC00, 0xF900), (0x20000, CODE_POINTS))


@lru_cache(maxsize=1)
def _asked() -> str:
    """Every character that has to be asked for by itself, in order."""
    alone = (point for point in range(CODE_POINTS) if point >> 16 not in _UNIFORM_PLANES or point & 0xFFFF == 0x100)
    return "".join(chr(point) for point in alone if not _SURROGATES[0] <= point < _SURROGATES[1])


@lru_cache(maxsize=1)
def _cased() -> str:
    return "".join(char for char in _asked() if not any(start <= ord(char) < stop for start, stop in _CASELESS))


@lru_cache(maxsize=256)
def matched_by(charset: str) -> Ranges:
    """The code points that the expression matches, by the library's own engine and Unicode version."""
    if len(charset) == 1 or (len(charset) == 2 and charset[0] == "\\" and not charset[1].isalnum()):
        return ((ord(charset[-1]), ord(charset[-1]) + 1),)
    text = _cased() if charset.startswith("(?i:") else _asked()
    runs = _runs(text)
    starts = [index for index, _ in runs]
    ranges: list[tuple[int, int]] = []
    at = 0
    for size in _matches(charset, text):
        if size > 0:
            _add_run(ranges, text, runs[bisect_right(starts, at) - 1 : bisect_left(starts, at + size)], at, at + size)
        at += abs(size)
    return tuple(ranges)


def _matches(charset: str, text: str) -> Iterator[int]:
    """The text's parts by turns, in characters: matched ones, and the others as negative sizes."""
    pieces = PreTokenizedString(text)
    pre_tokenizers.Split(Regex(f"(?:{charset})+"), "removed").pre_tokenize(pieces)
    data = text.encode()
    end = 0
    # In bytes, as the library is slow to count characters.
    for piece, (start, stop), _ in pieces.get_splits("original", "byte"):
        yield len(data[end:start].decode())
        yield -len(piece)
        end = stop
    yield len(data[end:].decode())


@lru_cache(maxsize=2)
def _runs(text: str) -> list[tuple[int, int]]:
    """Where in the text, and with what, a run of consecutive code points begins."""
    points = array("I", text.encode("utf-32-le" if sys.byteorder == "little" else "utf-32-be"))
    return [(at, point) for at, point in enumerate(points) if at == 0 or points[at - 1] + 1 != point]


def _add_run(ranges: list[tuple[int, int]], text: str, runs: Sequence[tuple[int, int]], begin: int, end: int) -> None:
    for number, (index, _) in enumerate(runs):
        first = max(index, begin)
        last = min(end, runs[number + 1][0]) if number + 1 < len(runs) else end
        start, stop = ord(text[first]), ord(text[last - 1]) + 1
        if start >> 16 in _UNIFORM_PLANES:
            start, stop = start & ~0xFFFF, (start & ~0xFFFF) + 0x10000
        if ranges and ranges[-1][1] == start:
            ranges[-1] = (ranges[-1][0], stop)
        else:
            ranges.append((start, stop))


def _add(ranges: list[tuple[int, int]], matched: str) -> None:
    for char in matched:
        point = ord(char)
        plane = point & ~0xFFFF
        start, stop = (plane, plane + 0x10000) if point >> 16 in _UNIFORM_PLANES else (point, point + 1)
        if ranges and ranges[-1][1] == start:
            ranges[-1] = (ranges[-1][0], stop)
        else:
            ranges.append((start, stop))


def _ranges(points: set[int]) -> Ranges:
    ranges: list[tuple[int, int]] = []
    _add(ranges, "".join(map(chr, sorted(points))))
    return tuple(ranges)


@lru_cache(maxsize=1)
def changed_by_nfc() -> Ranges:
    """The code points that NFC may change, reorder or compose: a text without them is left as it is.

    Marks that stand for themselves, such as the variation selector of emoji, are not among them.
    """
    import unicodedata  # noqa: PLC0415 - only for tokenizers that normalize

    nfc, nfd = normalizers.NFC(), normalizers.NFD()
    touched: set[int] = set()
    for char in _asked():
        point = ord(char)
        if point < 0x80:
            continue
        category = unicodedata.category(char)
        # A character this Python does not know may be a mark to the library.
        if category == "Cn" or unicodedata.combining(char):
            touched.add(point)
        elif category != "Co":
            if nfc.normalize_str(char) != char:
                touched.add(point)
            decomposed = nfd.normalize_str(char)
            if decomposed != char:
                touched.update(map(ord, decomposed[1:]))
    # A mark of a Unicode version that the two sides see differently.
    for start, stop in matched_by(r"\p{M}"):
        touched.update(point for point in range(start, stop) if not unicodedata.category(chr(point)).startswith("M"))
    return _ranges(touched)


def partition(named: Mapping[str, Ranges]) -> tuple[bytes, list[frozenset[str]]]:
    """(class of every code point, per class the names of the sets it is part of). ValueError above 255 classes."""
    starts = {name: [start for start, _ in ranges] for name, ranges in named.items()}
    edges = sorted({0, CODE_POINTS, *(edge for ranges in named.values() for pair in ranges for edge in pair)})
    classes: dict[frozenset[str], int] = {}
    table = bytearray(CODE_POINTS)
    for start, stop in itertools.pairwise(edges):
        names = frozenset(name for name, ranges in named.items() if _holds(ranges, starts[name], start))
        number = classes.setdefault(names, len(classes))
        if number > 255:
            raise ValueError("more than 255 classes of characters")
        table[start:stop] = bytes([number]) * (stop - start)
    return bytes(table), list(classes)


def _holds(ranges: Ranges, starts: Sequence[int], point: int) -> bool:
    at = bisect_right(starts, point) - 1
    return at >= 0 and point < ranges[at][1]
