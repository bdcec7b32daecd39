"""Connections to Valkey or Redis: single, sentinel or cluster; the only module that imports redis."""

import hashlib
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvindex_server.config import ConfigError, StoreSettings
from kvindex_server.errors import Unavailable

Argument = bytes | str | int

LOOK_SECONDS = 0.5
"""Between two questions to a cluster where the slots are."""


class StoreAway(Unavailable):
    """The store did not answer in time, or not as it should. Whether it did what was asked is not known."""


class StoreFull(Unavailable):
    """The store has no memory left; it did nothing of what was asked."""


@dataclass(frozen=True, slots=True)
class Script:
    """A script by its text; the store knows it by its digest."""

    text: str
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "digest", hashlib.sha1(self.text.encode(), usedforsecurity=False).hexdigest())


class Client:
    """Runs scripts, one or many at once; safe from many threads. Connects when first used."""

    def __init__(self, settings: StoreSettings) -> None:
        """ConfigError when the package is missing, a file cannot be read, or the URL makes no sense."""
        try:
            import redis  # noqa: PLC0415 - optional
            from redis import exceptions  # noqa: PLC0415
        except ImportError as error:
            raise ConfigError(
                "store.addresses", "needs the package redis: pip install 'kvindex-server[store]'"
            ) from error
        self._away = (exceptions.RedisError, OSError)
        self._missing = exceptions.NoScriptError
        self._full = exceptions.OutOfMemoryError
        self._connection_lost = exceptions.ConnectionError
        self._timeout = exceptions.TimeoutError
        self._redis: Any = _connect(redis, settings)
        self._cluster = settings.mode == "cluster"
        self._looked_at = 0.0
        self._looking = threading.Lock()

    def run(self, script: Script, tag: str, *arguments: Argument) -> Any:
        """The script's answer. StoreAway, StoreFull."""
        (answer,) = self.run_all(script, [(tag, arguments)])
        if isinstance(answer, Unavailable):
            raise answer
        return answer

    def run_all(self, script: Script, calls: Sequence[tuple[str, Sequence[Argument]]]) -> list[Any]:
        """Of each (tag, arguments) the answer, or what went wrong; sent together."""
        answers = self._send(script, calls)
        missing = [at for at, answer in enumerate(answers) if isinstance(answer, self._missing)]
        if missing:  # the store has restarted, or a node is new
            try:
                self._redis.script_load(script.text)
            except self._away as error:
                return [self._error(error)] * len(calls)
            for at, answer in zip(missing, self._send(script, [calls[at] for at in missing]), strict=True):
                answers[at] = answer
        return [self._error(answer) if isinstance(answer, Exception) else answer for answer in answers]

    def blocks(self, tag: str) -> Iterator[bytes]:
        """The keys of the blocks of one partition, some perhaps twice. StoreAway."""
        begin = f"{tag}b".encode()
        try:
            for name in self._redis.scan_iter(match=_literal(begin) + b"*", count=512):
                if len(name) == len(begin) + 8:
                    yield name[len(begin) :]
        except self._away as error:
            raise self._error(error) from error

    def close(self) -> None:
        """Close every connection."""
        try:
            self._redis.close()
        except self._away:
            pass  # it is gone already

    def _send(self, script: Script, calls: Sequence[tuple[str, Sequence[Argument]]]) -> list[Any]:
        answers = self._once(script, calls)
        late = any(isinstance(each, self._timeout) for each in answers)
        lost = isinstance(answers[0], self._connection_lost) and not isinstance(answers[0], self._timeout)
        if self._cluster and (late or lost):
            self._look_around()
        # A connection of the pool that died unnoticed; every script may run twice.
        return self._once(script, calls) if lost else answers

    def _look_around(self) -> None:
        """Ask the cluster who has which slots by now; without retries of its own the package does not get to it."""
        with self._looking:
            if time.monotonic() - self._looked_at < LOOK_SECONDS:
                return
            try:
                self._redis.nodes_manager.initialize()
            except self._away:
                pass  # none of them answers
            self._looked_at = time.monotonic()

    def _once(self, script: Script, calls: Sequence[tuple[str, Sequence[Argument]]]) -> list[Any]:
        try:
            if len(calls) == 1:
                tag, arguments = calls[0]
                return [self._redis.execute_command("EVALSHA", script.digest, 1, f"{tag}q", tag, *arguments)]
            pipeline = self._redis.pipeline(transaction=False)
            for tag, arguments in calls:
                pipeline.execute_command("EVALSHA", script.digest, 1, f"{tag}q", tag, *arguments)
            return list(pipeline.execute(raise_on_error=False))
        except self._away as error:
            return [error] * len(calls)

    def _error(self, error: Exception) -> Unavailable:
        # The kind only: what a server says may hold names and addresses.
        if isinstance(error, self._full) or "OOM" in str(error)[:4]:
            return StoreFull("the shared store is full")
        return StoreAway(f"the shared store does not answer: {type(error).__name__}")


def _literal(pattern: bytes) -> bytes:
    return b"".join(b"\\" + bytes([each]) if each in b"*?[]\\^" else bytes([each]) for each in pattern)


def _connect(redis: Any, settings: StoreSettings) -> Any:
    from redis.backoff import NoBackoff  # noqa: PLC0415
    from redis.cluster import ClusterNode, RedisCluster  # noqa: PLC0415
    from redis.retry import Retry  # noqa: PLC0415
    from redis.sentinel import Sentinel  # noqa: PLC0415

    options: dict[str, Any] = {
        "username": settings.username or None,
        "password": _password("password_file", settings.password_file) or None,
        "socket_timeout": settings.timeout_seconds,
        "socket_connect_timeout": settings.connect_timeout_seconds,
        "retry": Retry(NoBackoff(), 0),
        "protocol": 2,
        "client_name": "kvindex-server",
    }
    if settings.tls:
        options |= {
            "ssl": True,
            "ssl_ca_certs": settings.ca_file or None,
            "ssl_certfile": settings.cert_file or None,
            "ssl_keyfile": settings.key_file or None,
            "ssl_check_hostname": True,
        }
    nodes = settings.nodes()
    if settings.mode == "cluster":
        try:
            return RedisCluster(
                startup_nodes=[ClusterNode(host, port) for host, port in nodes],  # type: ignore[no-untyped-call]
                max_connections=settings.max_connections,
                **options,
            )
        except redis.exceptions.RedisError as error:
            raise ConfigError("store.addresses", f"no node of the cluster answers: {type(error).__name__}") from error
    if settings.mode == "sentinel":
        at_sentinel = options | {
            "username": settings.sentinel_username or None,
            "password": _password("sentinel_password_file", settings.sentinel_password_file) or None,
        }
        sentinel = Sentinel(nodes, sentinel_kwargs=at_sentinel, **options)  # type: ignore[no-untyped-call]
        return sentinel.master_for(settings.sentinel_service, db=settings.database)  # type: ignore[no-untyped-call]
    host, port = nodes[0]
    pool_of = redis.BlockingConnectionPool
    connection = redis.SSLConnection if options.pop("ssl", False) else redis.Connection
    pool = pool_of(
        host=host,
        port=port,
        db=settings.database,
        connection_class=connection,
        max_connections=settings.max_connections,
        timeout=settings.timeout_seconds,
        **options,
    )
    return redis.Redis(connection_pool=pool)


def _password(setting: str, file: str) -> str:
    if not file:
        return ""
    try:
        return Path(file).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"store.{setting}", f"cannot be read: {type(error).__name__}") from error
