"""The one error of a call, and what a server says about trying again."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import grpc
from google.rpc import error_details_pb2, status_pb2


@dataclass(frozen=True, slots=True)
class Try:
    """How one try of a call ended."""

    endpoint: str
    code: grpc.StatusCode
    message: str


class CallError(Exception):
    """A call that got no answer: `code` and `message` of its last try, and all `tries` in the order they ended.

    `message` is the server's own; for INVALID_ARGUMENT it begins with the field. It never quotes a prompt.
    """

    def __init__(self, tries: Sequence[Try]) -> None:
        last = tries[-1]
        super().__init__(f"{last.code.name} from {last.endpoint}: {last.message}")
        self.code = last.code
        self.message = last.message
        self.tries = tuple(tries)


@dataclass(frozen=True, slots=True)
class Pushback:
    """What a refusal says about trying again: after `seconds`, or, when that is negative, not at all."""

    seconds: float


def pushback(trailers: Iterable[tuple[str, str | bytes]] | None) -> Pushback | None:
    """Of `grpc-retry-pushback-ms` if there, else of `google.rpc.RetryInfo`; None when the server said nothing."""
    found: Pushback | None = None
    for key, value in trailers or ():
        if key == "grpc-retry-pushback-ms":
            # As gRPC has it: whatever is not a number of milliseconds means "do not".
            text = value if isinstance(value, str) else value.decode("ascii", "replace")
            return Pushback(int(text) / 1000) if text.isascii() and text.isdigit() else Pushback(-1.0)
        if key == "grpc-status-details-bin" and isinstance(value, bytes):
            found = _retry_info(value)
    return found


CUT_OFF = (grpc.StatusCode.UNAVAILABLE, "the stream ended before all of it was answered")
TOO_MANY = (grpc.StatusCode.INTERNAL, "more answers than queries")
OF_THE_CORE = (grpc.StatusCode.INTERNAL, "Internal error from Core")
"""What grpc.aio says, and no server, when it could not write to a stream or read from it as the connection had gone."""


def broken(code: grpc.StatusCode, details: str | None) -> tuple[grpc.StatusCode, str]:
    """Why a stream broke. A server that drains cancels streams: that is nobody's wish but its own."""
    if code is grpc.StatusCode.CANCELLED or (code, details) == OF_THE_CORE:
        return CUT_OFF
    return code, details or ""


def _retry_info(data: bytes) -> Pushback | None:
    status, info = status_pb2.Status(), error_details_pb2.RetryInfo()
    try:
        status.ParseFromString(data)
        for detail in status.details:
            if detail.Is(info.DESCRIPTOR):
                detail.Unpack(info)
                return Pushback(info.retry_delay.ToMicroseconds() / 1e6)
    except Exception:  # noqa: BLE001 - protobuf has no common error; details nobody can read say nothing
        return None
    return None
