"""Errors a caller can cause, each with its gRPC status code and a message that is safe to send."""

import grpc


class KvindexError(Exception):
    """Base: `code` and `message` go to the client as they are; `retry_seconds` > 0 tells when to try again."""

    code: grpc.StatusCode = grpc.StatusCode.INTERNAL
    retry_seconds: float = 0.0

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class InvalidArgument(KvindexError):
    """A field of the request is wrong; names the field and the reason, never the value's content."""

    code = grpc.StatusCode.INVALID_ARGUMENT

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field = field
        self.reason = reason


class NotFound(KvindexError):
    """A model or pod that is neither configured nor seen."""

    code = grpc.StatusCode.NOT_FOUND


class FailedPrecondition(KvindexError):
    """The request is well-formed, but the server is not set up for it; the message tells the remedy."""

    code = grpc.StatusCode.FAILED_PRECONDITION


class ResourceExhausted(KvindexError):
    """A limit of the server is reached."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED


class Overloaded(ResourceExhausted):
    """Too much at once; it passes by itself."""

    retry_seconds = 0.1


class Unavailable(KvindexError):
    """Not ready yet, or draining."""

    code = grpc.StatusCode.UNAVAILABLE
    retry_seconds = 1.0


class Unauthenticated(KvindexError):
    """No credential, or none that is known."""

    code = grpc.StatusCode.UNAUTHENTICATED


class PermissionDenied(KvindexError):
    """A known caller without the role that this RPC needs."""

    code = grpc.StatusCode.PERMISSION_DENIED


class DeadlineExceeded(KvindexError):
    """The caller's deadline passed before the answer was ready."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED
