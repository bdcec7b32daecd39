"""Files that others rotate while the server runs: read again when they change, the last good content kept."""

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from kvindex_server import logs

T = TypeVar("T")
_logger = logging.getLogger(__name__)
_CHECK_SECONDS = 1.0


class Rotated(Generic[T]):
    """What `read` made of the files; OSError and ValueError from `read` go to the caller only the first time.

    A change is seen within a second by whoever asks next: no thread waits for it. While the new content cannot be
    read (a rotation half done), the old one stays in force and the failure is logged once.
    """

    def __init__(self, paths: Sequence[Path], read: Callable[[], T]) -> None:
        self._paths = tuple(paths)
        self._read = read
        self._lock = threading.Lock()
        self._stamp = self._stamps()
        self._value = read()
        self._next_check = time.monotonic() + _CHECK_SECONDS

    @property
    def value(self) -> T:
        """The content in force."""
        if time.monotonic() >= self._next_check and self._lock.acquire(blocking=False):
            try:
                self._check()
            finally:
                self._lock.release()
        return self._value

    def _check(self) -> None:
        self._next_check = time.monotonic() + _CHECK_SECONDS
        stamp = self._stamps()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        names = ", ".join(str(path) for path in self._paths)
        try:
            self._value = self._read()
        except (OSError, ValueError) as error:
            logs.event(_logger, logging.ERROR, "rotated file refused", files=names, reason=type(error).__name__)
        else:
            logs.event(_logger, logging.INFO, "rotated file taken over", files=names)

    def _stamps(self) -> tuple[tuple[int, int, int] | None, ...]:
        return tuple(map(_stamp, self._paths))


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns
