"""Calls by HTTP and JSON, through the same guard as gRPC: who may call, readiness, permits, time limits, errors."""

import json
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import grpc

from kvindex_server.auth import Role
from kvindex_server.codec import MAX_NAME
from kvindex_server.errors import DeadlineExceeded, InvalidArgument, KvindexError, Overloaded
from kvindex_server.interceptors import MAX_MESSAGE, Guard
from kvindex_server.lookup import Check
from kvindex_server.web import Answer, Handler, Request

JSON = "application/json"

_STATUS = {
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.FAILED_PRECONDITION: 400,
    grpc.StatusCode.UNAUTHENTICATED: 401,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
}

Work = Callable[["Fields", Check], Mapping[str, object]]
"""A call: the request's JSON object in, the answer's out."""


class Calls:
    """Makes HTTP handlers of plain functions; every one needs the role that reading needs."""

    def __init__(self, guard: Guard, *, workers: int, max_in_flight: int, seconds: float) -> None:
        self._guard = guard
        self._turns = threading.BoundedSemaphore(workers)
        self._permits = threading.BoundedSemaphore(max_in_flight)
        self._seconds = seconds

    def handler(self, method: str, work: Work) -> Handler:
        """`method` names the call in metrics."""

        def handle(request: Request) -> Answer:
            started = time.perf_counter()
            try:
                body = self._call(method, work, request, started)
            except KvindexError as error:
                self._guard.observe(method, error.code, started)
                return failed(error)
            self._guard.observe(method, grpc.StatusCode.OK, started)
            return Answer(200, JSON, body, _UNCACHED)

        spans = self._guard.spans

        def traced(request: Request) -> Answer:
            assert spans is not None
            with spans.call(method, [(name.lower(), str(value)) for name, value in request.headers.items()]):
                return handle(request)

        return handle if spans is None else traced

    def _call(self, method: str, work: Work, request: Request, started: float) -> bytes:
        if not self._permits.acquire(blocking=False):
            self._guard.shed(method, "in_flight")
            raise Overloaded("too many calls of this kind in flight")
        try:
            caller = _Caller(request)
            refusal = self._guard.at_arrival(method, Role.READ, caller.invocation_metadata())
            if refusal is not None:
                raise refusal
            self._guard.identify(method, Role.READ, caller)
            check = self._checker(method, started)
            with self._turns:
                check()
                return self._guard.answer(method, lambda: encoded(work(Fields(parsed(request)), check)))
        finally:
            self._permits.release()

    def _checker(self, method: str, started: float) -> Check:
        def remaining() -> float:
            return self._seconds - (time.perf_counter() - started)

        def check() -> None:
            if remaining() <= 0:
                self._guard.shed(method, "deadline")
                raise DeadlineExceeded("the time for one call was over before the answer was ready")

        check.remaining = remaining  # type: ignore[attr-defined]
        return check


class Fields:
    """The members of a request's JSON object, taken one by one; `done` refuses those that nobody took."""

    def __init__(self, members: dict[str, object]) -> None:
        # A member that is null is one that is not there.
        self._members = {name: value for name, value in members.items() if value is not None}

    def __contains__(self, name: str) -> bool:
        return name in self._members

    def text(self, name: str, default: str | None = None, limit: int = MAX_NAME) -> str:
        """A string of at most `limit` characters; required without a default."""
        value = self._members.pop(name, default)
        if value is None:
            raise InvalidArgument(name, "is required")
        if not isinstance(value, str):
            raise InvalidArgument(name, "must be a string")
        if len(value) > limit:
            raise InvalidArgument(name, f"is longer than {limit} characters")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise InvalidArgument(name, "has half of a surrogate pair") from None
        return value

    def number(self, name: str) -> int | None:
        """A whole number, None when it is not there."""
        value = self._members.pop(name, None)
        if value is not None and type(value) is not int:
            raise InvalidArgument(name, "must be a whole number")
        return value

    def numbers(self, name: str, limit: int) -> list[int]:
        """A list of 1 to `limit` numbers; of what size they are the caller checks."""
        value = self._members.pop(name, None)
        if not isinstance(value, list):
            raise InvalidArgument(name, "is required" if value is None else "must be a list of whole numbers")
        if not value:
            raise InvalidArgument(name, "must not be empty")
        if len(value) > limit:
            raise InvalidArgument(name, f"{len(value)} of them exceed the limit of {limit}")
        if set(map(type, value)) != {int}:
            raise InvalidArgument(name, "must be a list of whole numbers")
        return value

    def done(self) -> None:
        """What is passed over could be what the caller relies on."""
        for name in self._members:
            raise InvalidArgument(name[:MAX_NAME], "is not a known field")


def parsed(request: Request) -> dict[str, object]:
    """The JSON object that a request holds."""
    if request.headers.get_content_type() != JSON:
        raise InvalidArgument("Content-Type", f"must be {JSON}")
    try:
        value = json.loads(request.body, object_pairs_hook=_members)
    except (ValueError, RecursionError):
        raise InvalidArgument("body", "is not valid JSON") from None
    if not isinstance(value, dict):
        raise InvalidArgument("body", "must be a JSON object")
    return value


def encoded(value: Mapping[str, object]) -> bytes:
    """Compact JSON."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()


def failed(error: KvindexError) -> Answer:
    """A typed JSON error: gRPC's status code by name, the message, and the field when one is to blame."""
    told: dict[str, object] = {"code": error.code.name, "message": error.message[:MAX_MESSAGE]}
    headers: list[tuple[str, str]] = [*_UNCACHED]
    if isinstance(error, InvalidArgument):
        told["field"] = error.field
    if error.code is grpc.StatusCode.UNAUTHENTICATED:
        headers.append(("WWW-Authenticate", "Bearer"))
    if error.retry_seconds:
        told["retry_seconds"] = error.retry_seconds
        headers.append(("Retry-After", str(max(1, round(error.retry_seconds)))))
    return Answer(_STATUS.get(error.code, 500), JSON, encoded({"error": told}), tuple(headers))


_UNCACHED = (("Cache-Control", "no-store"),)


def _members(pairs: Iterable[tuple[str, object]]) -> dict[str, object]:
    found: dict[str, object] = {}
    for name, value in pairs:
        if name in found:
            raise InvalidArgument(name[:MAX_NAME], "is given twice")
        found[name] = value
    return found


class _Caller:
    """An HTTP request in the gate's eyes: metadata, and no certificate."""

    def __init__(self, request: Request) -> None:
        self._metadata = [("authorization", str(each)) for each in request.headers.get_all("Authorization", [])]

    def auth_context(self) -> Mapping[str, Iterable[bytes]]:
        return {}

    def invocation_metadata(self) -> Sequence[tuple[str, str | bytes]]:
        return self._metadata
