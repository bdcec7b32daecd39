"""What a command writes: tables, bars by tier, progress on stderr, and JSON."""

import json
import os
import shutil
import sys
import textwrap
import time
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

GLYPHS = {"gpu": "█", "cpu": "▓", "disk": "▒"}
OTHER, PLACED, NOTHING = "░", "+", "·"
LEGEND = "  ".join([f"{glyph} {tier}" for tier, glyph in GLYPHS.items()] + [f"{OTHER} other", f"{PLACED} placed"])
PROGRESS_SECONDS = 0.1


def write(*lines: str) -> None:
    """Lines to stdout, at once."""
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    sys.stdout.flush()


def note(line: str) -> None:
    """A line for the person, not for the pipe."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def write_json(value: Message | Mapping[str, Any]) -> None:
    """One JSON document on one line; 64-bit numbers of messages are strings, as in every proto JSON."""
    plain = as_dict(value) if isinstance(value, Message) else value
    write(json.dumps(plain, ensure_ascii=False))


def as_dict(message: Message) -> dict[str, Any]:
    """A message with the proto's field names, empty fields included."""
    return MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)


def table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> list[str]:
    """Columns as wide as they need be; the first `left` and those that end in a space are aligned left."""
    cells = [[each.strip() for each in row] for row in ([*head], *rows)]
    to_left = [number < left or name.endswith(" ") for number, name in enumerate(head)]
    widths = [max(breadth(row[column]) for row in cells) for column in range(len(head))]
    return ["  ".join(map(_padded, row, widths, to_left)).rstrip() for row in cells]


def columns() -> int:
    """Width of the terminal that stdout is; 0 when it is none."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else 0


def wrapped(line: str, indent: int) -> list[str]:
    """A line as it fits the terminal, its further lines indented; whole when stdout is a pipe."""
    width = columns()
    # Words only: a name with hyphens must stay one that can be copied.
    return (
        textwrap.wrap(
            line,
            width - 1,
            subsequent_indent=" " * indent,
            break_long_words=False,
            break_on_hyphens=False,
            drop_whitespace=True,
            replace_whitespace=False,
        )
        if width > 2 * indent
        else [line]
    )


def bar(blocks: Mapping[str, int], total: int, width: int, placed: int = 0) -> str:
    """Blocks by tier out of `total`; whatever is there shows, however small."""
    parts = [(GLYPHS.get(tier, OTHER), blocks[tier]) for tier in sorted(blocks, key=_tier_order)]
    parts.append((PLACED, placed))
    line = ""
    done = 0
    for glyph, count in parts:
        if not count or not total:
            continue
        done += count
        until = round(width * min(done, total) / total)
        line += glyph * max(1, until - len(line))
    return line[:width].ljust(width, NOTHING)


def _tier_order(tier: str) -> tuple[int, str]:
    known = list(GLYPHS)
    return (known.index(tier) if tier in known else len(known), tier)


def breadth(text: str) -> int:
    """Columns of a terminal."""
    return sum(2 if unicodedata.east_asian_width(each) in "WF" else 1 for each in text)


def _padded(text: str, width: int, left: bool) -> str:
    fill = " " * (width - breadth(text))
    return text + fill if left else fill + text


def seconds(value: float) -> str:
    """A duration in few characters; a dash below zero, which means never."""
    if value < 0:
        return "-"
    if 0 < value < 0.001:
        return "<1 ms"
    if value < 1:
        return f"{value * 1000:.0f} ms"
    if value < 120:
        return f"{value:.1f} s"
    return f"{value / 60:.0f} min" if value < 7200 else f"{value / 3600:.1f} h"


class Progress:
    """A line on stderr that fills up, on a terminal only."""

    def __init__(self, what: str, total: float) -> None:
        self._what = what
        self._total = total
        self._shown = 0.0
        self._on = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"

    def show(self, done: float, words: str = "") -> None:
        """How far it is, now and then; with an endless total only the words are shown."""
        now = time.monotonic()
        if not self._on or now - self._shown < PROGRESS_SECONDS:
            return
        self._shown = now
        share = min(1.0, done / self._total) if 0 < self._total < float("inf") else 0.0
        meter = "█" * round(24 * share) + NOTHING * (24 - round(24 * share)) if share else ""
        sys.stderr.write(f"\r\x1b[K{self._what} {meter} {words}")
        sys.stderr.flush()

    def end(self) -> None:
        """Take the line away."""
        if self._on and self._shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
