"""How a command fails: one line for a person, and an exit code for a script."""

import difflib
from collections.abc import Iterable

FAILED = 1
"""The server refused the request, or what was asked for is not well."""
USAGE = 2
UNREACHABLE = 3
"""Nobody answers, or the server is not ready."""
NOT_ALLOWED = 4
INTERRUPTED = 130


class CommandError(Exception):
    """Ends a command: `message` goes to stderr, `code` is the exit code."""

    def __init__(self, message: str, code: int = FAILED) -> None:
        super().__init__(message)
        self.message = message
        self.code = code


def meant(given: str, known: Iterable[str]) -> str:
    """`; did you mean NAME?` for something mistyped, or nothing."""
    close = difflib.get_close_matches(given, list(known), 1)
    return f"; did you mean {close[0]}?" if close else ""
