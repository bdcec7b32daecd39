"""Recorded event streams on disk: `frames.jsonl` and `replay.jsonl` of one rank, or of each in `rank-N`."""

import base64
import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvindex_server import wire
from kvindex_server.commands.failure import USAGE, CommandError

FRAMES, REPLAY = "frames.jsonl", "replay.jsonl"
MAX_TIME = 1e12
"""Seconds since 1970; some ten thousand years."""


@dataclass
class Recording:
    """What a subscriber heard, each with the time (seconds since the epoch), and what replays answered."""

    frames: list[tuple[float, list[bytes]]] = field(default_factory=list)
    replayed: list[list[bytes]] = field(default_factory=list)


class Recorder:
    """Writes one rank's recording as it comes; nothing is kept in memory."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._frames = (directory / FRAMES).open("x", encoding="ascii")
        self._replay = (directory / REPLAY).open("x", encoding="ascii")

    def heard(self, at: float, frames: list[bytes]) -> None:
        """A published message: topic, sequence, payload."""
        self._frames.write(json.dumps({"t": at, "frames": _encoded(frames)}) + "\n")

    def replayed(self, start: int, frames: list[bytes]) -> None:
        """A replayed message, as the DEALER got it."""
        self._replay.write(json.dumps({"start_seq": start, "frames": _encoded(frames)}) + "\n")

    def close(self) -> None:
        """Everything is on disk."""
        self._frames.close()
        self._replay.close()


def prepare(directory: Path, ranks: Sequence[int], *, overwrite: bool = False) -> list[Recorder]:
    """A recorder per rank; CommandError when there is a recording already that shall not be replaced."""
    try:
        there = [each for each in (directory, *directory.glob("rank-*")) if (each / FRAMES).exists()]
        if there and not overwrite:
            raise CommandError(f"{directory} has a recording already (--overwrite)", USAGE)
        for each in there:
            for name in (FRAMES, REPLAY):
                (each / name).unlink(missing_ok=True)
            if each != directory:
                with contextlib.suppress(OSError):  # something else is in it
                    each.rmdir()
        places = [directory] if len(ranks) == 1 else [directory / f"rank-{rank}" for rank in ranks]
        return [Recorder(each) for each in places]
    except OSError as error:
        raise CommandError(f"{directory}: cannot be written: {error.strerror}", USAGE) from None


def read(directory: Path) -> list[Recording]:
    """The recordings of all ranks, whole in memory. CommandError that names the file and line of what is wrong."""
    found = {_rank(each): each for each in directory.glob("rank-*") if (each / FRAMES).exists()}
    missing = sorted(set(range(max(found, default=-1) + 1)) - set(found))
    if missing:
        raise CommandError(f"{directory}: the recording has no rank-{missing[0]}", USAGE)
    recordings = [_read(found[rank]) for rank in sorted(found)] or [_read(directory)]
    if not any(each.frames or each.replayed for each in recordings):
        raise CommandError(f"{directory}: the recording is empty", USAGE)
    return recordings


def _rank(directory: Path) -> int:
    number = directory.name.removeprefix("rank-")
    if not (number.isascii() and number.isdigit()):
        raise CommandError(f"{directory}: must be named rank-N", USAGE)
    return int(number)


def _read(directory: Path) -> Recording:
    recording = Recording()
    for number, entry in _lines(directory / FRAMES):
        where = f"{directory / FRAMES}:{number}"
        frames = _decoded(entry, where)
        try:
            wire.read_event(frames)
        except wire.BadFrames as error:
            raise CommandError(f"{where}: no event message: {error.reason}", USAGE) from None
        recording.frames.append((_time(entry, where), frames))
    if (directory / REPLAY).exists():
        for number, entry in _lines(directory / REPLAY):
            recording.replayed.append(_decoded(entry, f"{directory / REPLAY}:{number}"))
    return recording


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                entry = json.loads(line)
                if not isinstance(entry, dict):
                    raise ValueError
                yield number, entry
    except OSError as error:
        raise CommandError(f"{path}: cannot be read: {error.strerror}", USAGE) from None
    except (ValueError, RecursionError):
        raise CommandError(f"{path}: is no recording: each line must be a JSON object", USAGE) from None


def _encoded(frames: Sequence[bytes]) -> list[str]:
    return [base64.b64encode(frame).decode() for frame in frames]


def _time(entry: dict[str, Any], where: str) -> float:
    value = entry.get("t", 0.0)
    if type(value) not in (int, float) or not abs(value) <= MAX_TIME:
        raise CommandError(f"{where}: t must be a time in seconds", USAGE)
    return float(value)


def _decoded(entry: dict[str, Any], where: str) -> list[bytes]:
    try:
        return [base64.b64decode(frame, validate=True) for frame in entry["frames"]]
    except (KeyError, TypeError, ValueError):
        raise CommandError(f"{where}: frames must be a list of base64 strings", USAGE) from None
