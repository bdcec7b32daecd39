"""A recorded event stream on disk: `frames.jsonl` and `replay.jsonl` in one directory."""

import base64
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from kvindex_server import wire
from kvindex_server.commands.failure import USAGE, CommandError

FRAMES, REPLAY = "frames.jsonl", "replay.jsonl"


@dataclass
class Recording:
    """What a subscriber heard, each with the time (seconds since the epoch), and what replays answered."""

    frames: list[tuple[float, list[bytes]]] = field(default_factory=list)
    replayed: list[list[bytes]] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """From the first frame to the last."""
        return self.frames[-1][0] - self.frames[0][0] if self.frames else 0.0


class Recorder:
    """Writes a recording as it comes; nothing is kept in memory."""

    def __init__(self, directory: Path, *, overwrite: bool = False) -> None:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            mode: Literal["w", "x"] = "w" if overwrite else "x"
            self._frames = (directory / FRAMES).open(mode, encoding="ascii")
            self._replay = (directory / REPLAY).open(mode, encoding="ascii")
        except FileExistsError:
            raise CommandError(f"{directory} has a recording already (--overwrite)", USAGE) from None
        except OSError as error:
            raise CommandError(f"{directory}: cannot be written: {error.strerror}", USAGE) from None

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


def read(directory: Path) -> Recording:
    """A recording, whole in memory. CommandError that names the file and line of what is wrong."""
    recording = Recording()
    for number, entry in _lines(directory / FRAMES):
        where = f"{directory / FRAMES}:{number}"
        frames = _decoded(entry, where)
        try:
            wire.read_event(frames)
        except wire.BadFrames as error:
            raise CommandError(f"{where}: no event message: {error.reason}", USAGE) from None
        recording.frames.append((float(entry.get("t", 0.0)), frames))
    if (directory / REPLAY).exists():
        for number, entry in _lines(directory / REPLAY):
            recording.replayed.append(_decoded(entry, f"{directory / REPLAY}:{number}"))
    if not recording.frames and not recording.replayed:
        raise CommandError(f"{directory}: the recording is empty", USAGE)
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
    except ValueError:
        raise CommandError(f"{path}: is no recording: each line must be a JSON object", USAGE) from None


def _encoded(frames: Sequence[bytes]) -> list[str]:
    return [base64.b64encode(frame).decode() for frame in frames]


def _decoded(entry: dict[str, Any], where: str) -> list[bytes]:
    try:
        return [base64.b64decode(frame, validate=True) for frame in entry["frames"]]
    except (KeyError, TypeError, ValueError):
        raise CommandError(f"{where}: frames must be a list of base64 strings", USAGE) from None
