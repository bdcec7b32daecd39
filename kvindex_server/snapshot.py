"""Snapshots on disk: the saved state of streams in one file, written atomically, and refused when anything is wrong.

A file is `MAGIC`, then records, the last one of kind `end`. A record is: header length u32, header (JSON), body length
u64, body, XXH3-64 of header and body; little-endian. Kinds: `pod` (a registration to be made again), `stream` (one
rank, its state as the body), `end` (how many records there were).
"""

import contextlib
import json
import os
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import BinaryIO

from kvindex_server._core import xxh3_64
from kvindex_server.errors import InvalidArgument
from kvindex_server.pods import PodSpec
from kvindex_server.stream import Cause, Trust

MAGIC = b"KVIXSNP1"
SUFFIX = ".kvix"
MAX_HEADER = 1 << 20
MAX_BODY = 1 << 40
_LENGTH, _SIZE, _SUM = struct.Struct("<I"), struct.Struct("<Q"), struct.Struct("<Q")


class BadSnapshot(Exception):
    """A file that is damaged, foreign or of another version; the message says why in a few words."""


@dataclass(frozen=True, slots=True)
class SavedStream:
    """One rank as it was: whose it is, up to which message, and how far it could be trusted."""

    model: str
    pod: str
    rank: int
    endpoint: str
    replay_endpoint: str
    incarnation: str
    epoch: int
    last_sequence: int
    digest: int
    trust: Trust
    cause: Cause
    reason: str
    claims: int
    state: bytes

    def fits(self, spec: PodSpec) -> bool:
        """True when this may be the stream of that registration."""
        return (
            self.rank < spec.ranks
            and (self.model, self.pod, self.incarnation) == (spec.model, spec.pod, spec.incarnation)
            and self.endpoint == spec.endpoint_of(self.rank)
            and self.replay_endpoint == spec.replay_endpoint_of(self.rank)
        )


@dataclass(frozen=True, slots=True)
class Place:
    """Where a stream stands in a checked file; `saved.state` is empty until it is read."""

    saved: SavedStream
    offset: int
    size: int


class Writer:
    """Writes one file; it appears under its name only when `close` has returned."""

    def __init__(self, path: Path) -> None:
        self._path = path
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".part")
        self._part = Path(name)
        self._file: BinaryIO = os.fdopen(handle, "wb")
        self._records = 0
        self._file.write(MAGIC)

    def pod(self, spec: PodSpec) -> None:
        """A registration that nobody but this file would make again."""
        self._record({"kind": "pod", **asdict(spec)}, b"")

    def stream(self, saved: SavedStream) -> None:
        """One rank."""
        header = {name: getattr(saved, name) for name in saved.__slots__ if name != "state"}
        header |= {"kind": "stream", "trust": saved.trust.name, "cause": saved.cause.value}
        self._record(header, saved.state)

    def close(self) -> int:
        """Make the file durable and visible; its size in bytes."""
        self._record({"kind": "end", "records": self._records}, b"")
        self._file.flush()
        os.fsync(self._file.fileno())
        size = self._file.tell()
        self._file.close()
        self._part.rename(self._path)
        directory = os.open(self._path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
        return size

    def abandon(self) -> None:
        """Leave nothing behind."""
        self._part.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # it tries once more to write what the disk had no room for
            self._file.close()

    def _record(self, header: dict[str, object], body: bytes) -> None:
        encoded = json.dumps(header, separators=(",", ":")).encode()
        self._file.write(_LENGTH.pack(len(encoded)) + encoded + _SIZE.pack(len(body)))
        self._file.write(body)
        self._file.write(_SUM.pack(_checksum(encoded, body)))
        self._records += 1


class File:
    """A checked file, open for as long as streams may be read from it. BadSnapshot, or OSError, when it is no good."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self.pods: list[PodSpec] = []
        self.streams: list[Place] = []
        try:
            self._check()
        except BaseException:
            self._file.close()
            raise

    def read(self, place: Place) -> SavedStream:
        """The stream with its state."""
        state = os.pread(self._file.fileno(), place.size, place.offset)
        if len(state) != place.size:
            raise BadSnapshot("file was cut short after it was checked")
        return replace(place.saved, state=state)

    def close(self) -> None:
        """Nothing more can be read."""
        self._file.close()

    def _check(self) -> None:
        if self._take(len(MAGIC)) != MAGIC:
            raise BadSnapshot("no snapshot of this version")
        for number in range(1 << 32):
            header, offset, size = self._next()
            kind = header.pop("kind", None)
            if kind == "end":
                if header.get("records") != number or self._file.read(1):
                    raise BadSnapshot("records are missing, or something follows the end")
                return
            try:
                if kind == "pod":
                    self.pods.append(PodSpec(**header).validate())  # type: ignore[arg-type]
                elif kind == "stream":
                    self.streams.append(Place(_saved(header), offset, size))
            except (TypeError, ValueError, KeyError, InvalidArgument) as error:
                raise BadSnapshot(f"record {number} is not understood") from error

    def _next(self) -> tuple[dict[str, object], int, int]:
        (length,) = _LENGTH.unpack(self._take(_LENGTH.size))
        if length > MAX_HEADER:
            raise BadSnapshot("damaged: a header is too long")
        encoded = self._take(length)
        (size,) = _SIZE.unpack(self._take(_SIZE.size))
        if size > MAX_BODY or size > os.fstat(self._file.fileno()).st_size:
            raise BadSnapshot("damaged or cut short")
        offset = self._file.tell()
        body = self._take(size)
        if self._take(_SUM.size) != _SUM.pack(_checksum(encoded, body)):
            raise BadSnapshot("damaged: a checksum does not fit")
        try:
            header = json.loads(encoded)
        except (ValueError, RecursionError) as error:
            raise BadSnapshot("a header is not understood") from error
        if not isinstance(header, dict):
            raise BadSnapshot("a header is not understood")
        return header, offset, size

    def _take(self, size: int) -> bytes:
        taken = self._file.read(size)
        if len(taken) != size:
            raise BadSnapshot("damaged or cut short")
        return taken


class Directory:
    """The snapshots of one server: written under names that sort by time, a few kept."""

    def __init__(self, path: Path, keep: int) -> None:
        self.path = path
        self._keep = keep

    def prepare(self) -> None:
        """Make the directory, and take out what an interrupted writer left. OSError when it cannot be used."""
        self.path.mkdir(parents=True, exist_ok=True)
        for each in self.path.glob(".*.part"):
            each.unlink(missing_ok=True)

    def write(self, fill: Callable[[Writer], None]) -> tuple[Path, int]:
        """A new snapshot, filled by `fill`: path and size. OSError when there is no room; older ones stay then."""
        # Behind the newest one also when the clock was set back, or it would be the first to be deleted.
        numbers = (int(each.stem) for each in self.newest_first() if each.stem.isdecimal())
        path = self.path / f"{max(time.time_ns(), max(numbers, default=0) + 1):020d}{SUFFIX}"
        writer = Writer(path)
        try:
            fill(writer)
            size = writer.close()
        except BaseException:
            writer.abandon()
            raise
        for old in self.newest_first()[self._keep :]:
            old.unlink(missing_ok=True)
        return path, size

    def newest_first(self) -> list[Path]:
        """All snapshots there are."""
        return sorted(self.path.glob(f"*{SUFFIX}"), reverse=True)

    def open(self) -> Iterator[tuple[Path, File | str]]:
        """Each file, newest first: checked and open, or why not."""
        for path in self.newest_first():
            try:
                yield path, File(path)
            except (BadSnapshot, OSError) as error:
                yield path, str(error)


def _checksum(header: bytes, body: bytes) -> int:
    return xxh3_64(body, xxh3_64(header))


def _saved(header: dict[str, object]) -> SavedStream:
    fields = dict(header)
    trust, cause = Trust[str(fields.pop("trust"))], Cause(str(fields.pop("cause")))
    if trust not in (Trust.EXACT, Trust.PARTIAL):
        raise ValueError("doubtful claims are not saved")
    for name in ("rank", "epoch", "last_sequence", "digest", "claims"):
        if not isinstance(fields[name], int) or not 0 <= fields[name] < 1 << 64:  # type: ignore[operator]
            raise ValueError(name)
    return SavedStream(**fields, trust=trust, cause=cause, state=b"")  # type: ignore[arg-type]
