"""Keeps the index across restarts: writes snapshots in the background, and gives saved streams back as pods come."""

import contextlib
import logging
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from kvindex_server.errors import InvalidArgument, ResourceExhausted
from kvindex_server.fleet import Fleet
from kvindex_server.pods import PodSpec
from kvindex_server.snapshot import BadSnapshot, Directory, File, Place, SavedStream, Writer

_log = logging.getLogger(__name__)


@dataclass
class KeeperStats:
    """What metrics show; changed by the keeper only."""

    written: int = 0
    failed: int = 0
    refused: int = 0
    last_bytes: int = 0
    last_seconds: float = 0.0
    last_time: float = 0.0
    """Unix time of the last one that was written or loaded; 0 when none was."""
    restored_streams: int = 0
    restored_claims: int = 0


@dataclass
class Kept:
    """A loaded file, and what nobody has asked for yet."""

    file: File
    streams: dict[tuple[str, str, int], Place] = field(default_factory=dict)


class Keeper:
    """Loads the newest good snapshot at start, and writes one every `interval` seconds and at the end.

    A snapshot older than `max_age` seconds is not loaded: the engines will not have what came since.
    """

    def __init__(
        self, directory: Path | None, keep: int, interval: float, max_age: float, wall: Callable[[], float] = time.time
    ) -> None:
        """Without a `directory` nothing is kept: snapshots are made for others only, in a temporary place."""
        self._place = directory
        self._keep = keep
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._interval = interval
        self._max_age = max_age
        self._wall = wall
        self._lock = threading.Lock()
        self._writing = threading.Lock()
        self._kept: list[Kept] = []
        self._halt = threading.Event()
        self._thread: threading.Thread | None = None
        self.stats = KeeperStats()

    def load(self) -> list[PodSpec]:
        """Open the newest good snapshot, for what nothing adopted before has; the registrations it asks for.

        OSError when the directory cannot be used.
        """
        if self._place is None:
            return []
        directory = self._directory()
        directory.prepare()
        for path, opened in directory.open():
            if isinstance(opened, str):
                self.stats.refused += 1
                _log.warning("snapshot refused", extra={"fields": {"file": path.name, "reason": opened}})
                continue
            written = path.stat().st_mtime
            if self._wall() - written > self._max_age:
                opened.close()
                _log.warning("snapshot is too old", extra={"fields": {"file": path.name}})
                return []
            return self.adopt(opened, written)
        return []

    def adopt(self, file: File, written: float) -> list[PodSpec]:
        """Give this file's streams back as their pods come, but for those of files before; what it has registered."""
        places = {(each.saved.model, each.saved.pod, each.saved.rank): each for each in file.streams}
        with self._lock:
            self._kept.append(Kept(file, places))
        self.stats.last_time = max(self.stats.last_time, written)
        claims = sum(each.saved.claims for each in file.streams)
        _log.info("snapshot loaded", extra={"fields": {"streams": len(places), "claims": claims}})
        return file.pods

    def saved(self, spec: PodSpec, rank: int) -> SavedStream | None:
        """The state in which this rank was left, once; None when there is none, or it was another engine's."""
        key = (spec.model, spec.pod, rank)
        with self._lock:
            places = [(kept.file, place) for kept in self._kept if (place := kept.streams.pop(key, None)) is not None]
            for file, place in places:
                if not place.saved.fits(spec):
                    continue
                try:
                    found = file.read(place)
                except (OSError, BadSnapshot) as error:
                    _log.warning("saved stream cannot be read", extra={"fields": {"reason": str(error)}})
                    continue
                self.stats.restored_streams += 1
                self.stats.restored_claims += found.claims
                return found
        return None

    def receive(self, fetch: Callable[[Path], Path | None]) -> list[PodSpec] | None:
        """Adopt what `fetch` puts into the directory it is given; None when that is nothing good.

        OSError when there is no place for it.
        """
        directory = self._directory()
        directory.prepare()
        path = fetch(directory.path)
        if path is None:
            return None
        try:
            return self.adopt(File(path), self._wall())
        except BadSnapshot as error:
            self.stats.refused += 1
            _log.warning("pulled snapshot refused", extra={"fields": {"reason": str(error)}})
            return None
        finally:
            path.unlink(missing_ok=True)  # what is open can still be read

    def find(self, name: str) -> Path | None:
        """A snapshot that was written before, by its name; None when it is gone."""
        if self._place is None and self._temporary is None:
            return None
        return next((path for path in self._directory().newest_first() if path.stem == name), None)

    def start(self, fleet: Fleet) -> None:
        """Write in the background from now on."""
        if self._place is None:
            return
        self._thread = threading.Thread(target=self._run, args=(fleet,), name="snapshots", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Write no more in the background; `write` still can."""
        self._halt.set()
        if self._thread is not None:
            self._thread.join(60)
        with self._lock:
            self._forget()

    def close(self) -> None:
        """Take the temporary place away."""
        if self._temporary is not None:
            self._temporary.cleanup()

    def write(self, fleet: Fleet) -> Path | None:
        """A snapshot of now; None when it could not be written, which is counted and logged."""

        def fill(writer: Writer) -> None:
            for spec in fleet.registered:
                writer.pod(spec)
            for saved in fleet.save():
                writer.stream(saved)

        with self._writing:
            started = time.monotonic()
            try:
                path, size = self._directory().write(fill)
            except OSError as error:
                self.stats.failed += 1
                _log.error("snapshot not written", extra={"fields": {"reason": error.strerror or str(error)}})
                return None
            self.stats.written += 1
            self.stats.last_bytes = size
            self.stats.last_seconds = time.monotonic() - started
            self.stats.last_time = self._wall()
            return path

    @contextlib.contextmanager
    def extract(self, fleet: Fleet, only: Collection[tuple[str, str, int]]) -> Iterator[Path]:
        """A file with these streams alone, for a sibling; it is nobody's to load at a start. OSError without room."""
        with tempfile.TemporaryDirectory(prefix="kvindex-streams-") as directory:
            path = Path(directory) / "streams"
            with self._writing:
                writer = Writer(path)
                for saved in fleet.save(only):
                    writer.stream(saved)
                writer.close()
            yield path

    def _directory(self) -> Directory:
        if self._place is not None:
            return Directory(self._place, self._keep)
        if self._temporary is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="kvindex-snapshots-")
        return Directory(Path(self._temporary.name), self._keep)

    def _run(self, fleet: Fleet) -> None:
        while not self._halt.wait(self._interval):
            try:
                self.write(fleet)
            except Exception:  # noqa: BLE001 - the next one may work; it is logged and counted
                self.stats.failed += 1
                _log.exception("snapshot failed")

    def _forget(self) -> None:
        for each in self._kept:
            each.file.close()
        self._kept = []


def register_again(fleet: Fleet, specs: list[PodSpec]) -> None:
    """Follow the pods that a snapshot names, unless they are followed already; readiness waits for them."""
    for spec in specs:
        if spec.pod in fleet.pods(spec.model):
            continue
        try:
            fleet.register(spec, awaited=True)
        except (InvalidArgument, ResourceExhausted) as error:
            _log.warning(
                "pod of the snapshot not registered", extra={"fields": {"pod": spec.pod, "reason": str(error)}}
            )
