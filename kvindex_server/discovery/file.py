"""Follows the pods that a file lists, and reads it again whenever it changes, also when a symlink is swapped."""

import os
import threading
from pathlib import Path

from kvindex_server.config import ConfigError, PodFileSettings, load_pods
from kvindex_server.discovery.source import Changed, Found, Progress, Sight

Version = tuple[int, int, int, int]


class FileSource:
    """The pods of one file. A file that is missing or broken keeps the last good one."""

    name = "file"

    def __init__(self, settings: PodFileSettings) -> None:
        self._path = Path(settings.path)
        self._interval = settings.interval_seconds
        self.progress = Progress(self.name)
        self._found: tuple[Found, ...] = ()
        self._seen: Version | None = None
        self._done: Version | None = None
        self._broken = False
        self._halt = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pod-file", daemon=True)
        self._changed: Changed = lambda: None
        self._listed = False

    def start(self, changed: Changed) -> None:
        """Read it now, and look at it at every interval."""
        self._changed = changed
        self._thread.start()

    def stop(self) -> None:
        """Look at it no longer."""
        self._halt.set()
        self._thread.join(timeout=1.0)

    def look(self) -> Sight:
        """The pods of the last good file."""
        listed = self._listed  # before the pods: they are set first
        return Sight(self._found, whole=listed)

    def _run(self) -> None:
        while not self._halt.is_set():
            self._renew()
            self._halt.wait(self._interval)

    def _renew(self) -> None:
        try:
            version = self._version()
        except OSError as error:
            self._seen = self._done = None
            self.progress.failed("unreadable", error.strerror or "")
            return
        settled, self._seen = version == self._seen or not self._listed, version
        # Half a YAML list is a shorter list: a file is read only when it has not changed for an interval.
        if version != self._done and settled:
            self._read(version)
        elif version == self._done and not self._broken:
            self.progress.succeeded()

    def _read(self, version: Version) -> None:
        self._broken = True
        try:
            pods = load_pods(self._path)
            if self._version() != version:
                self._seen = None
                return
        except ConfigError as error:
            self._done = version
            self.progress.failed("broken", str(error))
            return
        except OSError as error:
            self.progress.failed("unreadable", error.strerror or "")
            return
        self._broken = False
        self._done = version
        self._found = tuple(Found(spec) for spec in pods)
        self._listed = True
        self.progress.succeeded()
        self._changed()

    def _version(self) -> Version:
        # Follows symlinks: a ConfigMap volume swaps the link of a whole directory.
        found = os.stat(self._path)
        return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size
