"""The connection to a running server: its options, its calls, and what a failure means."""

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import grpc
from google.protobuf.message import Message

from kvindex_server.commands.failure import FAILED, NOT_ALLOWED, UNREACHABLE, USAGE, CommandError, meant
from kvindex_server.commands.usage import above_zero
from kvindex_server.pb.kvindex.v1 import kvindex_pb2 as pb
from kvindex_server.pb.kvindex.v1 import kvindex_pb2_grpc as rpc

DEFAULT_SERVER = "127.0.0.1:50051"
MAX_ANSWER_BYTES = 256 * 1024 * 1024

M = TypeVar("M", bound=Message)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of every command that asks a server."""
    group = parser.add_argument_group("connection")
    group.add_argument("--server", metavar="HOST:PORT", default=DEFAULT_SERVER, help=f"default {DEFAULT_SERVER}")
    group.add_argument("--admin", metavar="HOST:PORT", help="the admin service, when it has a port of its own")
    group.add_argument("--tls-ca", metavar="FILE", type=Path, help="use TLS, and trust these certificates")
    group.add_argument("--tls-cert", metavar="FILE", type=Path, help="client certificate, for mutual TLS")
    group.add_argument("--tls-key", metavar="FILE", type=Path, help="its key")
    group.add_argument("--token-file", metavar="FILE", type=Path, help="bearer token to send")
    group.add_argument("--timeout", metavar="SECONDS", type=above_zero, default=10.0, help="per call (default 10)")


class Connection:
    """Channels to the read service and to the admin service, which are often the same."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._timeout = args.timeout
        self._metadata: tuple[tuple[str, str], ...] = ()
        if args.token_file:
            self._metadata = (("authorization", f"Bearer {_token(args.token_file)}"),)
        credentials = _credentials(args)
        self._tls = credentials is not None
        self.server = args.server
        self._admin_server = args.admin or args.server
        self._channels = [_channel(args.server, credentials)]
        if self._admin_server != args.server:
            self._channels.append(_channel(self._admin_server, credentials))
        self.read = rpc.KVIndexStub(self._channels[0])
        self.admin = rpc.KVIndexAdminStub(self._channels[-1])

    def __enter__(self) -> "Connection":
        return self

    def __exit__(self, *_: object) -> None:
        for channel in self._channels:
            channel.close()

    def call(self, method: Callable[..., M], request: Message) -> M:
        """The answer, or CommandError."""
        try:
            return method(request, timeout=self._timeout, metadata=self._metadata)
        except grpc.RpcError as error:
            raise self._failure(error, of_admin=method in vars(self.admin).values()) from None

    def _failure(self, error: Any, *, of_admin: bool) -> CommandError:
        code, details = error.code(), error.details() or ""
        server = self._admin_server if of_admin else self.server
        if code is grpc.StatusCode.UNAVAILABLE:
            return CommandError(unavailable(server, details, tls=self._tls), UNREACHABLE)
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            return CommandError(
                f"{server} gave no answer within {self._timeout:g} s (--timeout): {details}", UNREACHABLE
            )
        if code is grpc.StatusCode.UNIMPLEMENTED and of_admin:
            return CommandError(
                f"{server} has no admin service, or an older one; when it has a port of its own, name it with --admin"
            )
        if code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
            return CommandError(f"{server} does not allow this: {details} (--token-file, --tls-cert)", NOT_ALLOWED)
        if code is grpc.StatusCode.NOT_FOUND and details.startswith("model:"):
            details += self._known_models(details)
        return CommandError(f"{code.name}: {details}", FAILED)

    def _known_models(self, details: str) -> str:
        try:
            stats = self.admin.GetStats(pb.GetStatsRequest(), timeout=self._timeout, metadata=self._metadata)
        except grpc.RpcError:
            return ""
        names = [each.model for each in stats.models]
        if not names:
            return "; no model is known yet: register a pod or configure one"
        given = re.search(r"'(.*?)'", details)
        return f"; known are: {', '.join(names[:16])}{meant(given[1], names) if given else ''}"


def unavailable(server: str, details: str, *, tls: bool) -> str:
    """What UNAVAILABLE means, by the words of gRPC or of the server that came with it."""
    lowered = details.lower()
    if lowered.startswith("not ready"):
        return f"{server} is not ready: {details}. `kvindex pods` shows which streams are still synchronising"
    if "connection refused" in lowered:
        return f"nobody listens at {server}: connection refused. Is kvindex-server running there? (--server)"
    if any(word in lowered for word in ("dns", "resolv", "resolution")):
        return f"{server} cannot be resolved (--server HOST:PORT)"
    if "hostname verification" in lowered:
        return f"no TLS connection to {server}: its certificate is for another name (--server)"
    if "handshake" in lowered or "ssl" in lowered or "certificate" in lowered:
        return f"no TLS connection to {server}: {details} (--tls-ca)"
    if "connect" in lowered or "socket closed" in lowered:
        hint = "a client certificate (--tls-cert, --tls-key)" if tls else "TLS (--tls-ca)"
        return f"no connection to {server}: {details}; does it want {hint}?"
    return f"{server} cannot answer: {details}"


def _credentials(args: argparse.Namespace) -> grpc.ChannelCredentials | None:
    if bool(args.tls_cert) != bool(args.tls_key):
        raise CommandError("--tls-cert and --tls-key go together", USAGE)
    if not args.tls_ca:
        if args.tls_cert:
            raise CommandError("--tls-cert needs --tls-ca", USAGE)
        return None
    return grpc.ssl_channel_credentials(
        _read(args.tls_ca, "certificates"),
        _read(args.tls_key, "key") if args.tls_key else None,
        _read(args.tls_cert, "certificate") if args.tls_cert else None,
    )


def _channel(server: str, credentials: grpc.ChannelCredentials | None) -> grpc.Channel:
    options = [("grpc.max_receive_message_length", MAX_ANSWER_BYTES), ("grpc.enable_retries", 0)]
    if credentials is None:
        return grpc.insecure_channel(server, options)
    return grpc.secure_channel(server, credentials, options)


def _token(path: Path) -> str:
    token = _read(path, "token").strip()
    if not token or not all(0x21 <= byte <= 0x7E for byte in token):
        raise CommandError(f"{path}: must hold one token, on one line and in printable ASCII", USAGE)
    return token.decode("ascii")


def _read(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CommandError(f"{path}: cannot read the {what}: {error.strerror}", USAGE) from None
