"""The composition root: builds every part, starts them in order, drains and stops them in reverse."""

import logging
import resource
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import grpc

from kvindex_server import admin, compat, health, reflection, service
from kvindex_server._core import Index
from kvindex_server.config import ConfigError, Settings
from kvindex_server.discovery.dns import DnsSource
from kvindex_server.discovery.file import FileSource
from kvindex_server.discovery.kubernetes import KubernetesSource
from kvindex_server.discovery.reconciler import Reconciler
from kvindex_server.discovery.source import Source
from kvindex_server.errors import InvalidArgument
from kvindex_server.fleet import Fleet
from kvindex_server.health import Health
from kvindex_server.ingest import Bounds
from kvindex_server.interceptors import Guard
from kvindex_server.lookup import Lookup
from kvindex_server.metrics import Metrics, MetricsServer
from kvindex_server.models import Model, Models
from kvindex_server.tokenize.registry import load_tokenizer

_log = logging.getLogger(__name__)

READ_SERVICES = ("kvindex.v1.KVIndex", "indexer.v1.IndexerService")
ADMIN_SERVICE = "kvindex.v1.KVIndexAdmin"


@dataclass(frozen=True, slots=True)
class _ModelSize:
    name: str
    blocks: int
    claims: int
    bytes: int
    block_size: int
    coverage: float


class Server:
    """The whole service in one process. `start` returns when the ports are bound."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.metrics = Metrics()
        self.models = _models(settings)
        self.fleet = _fleet(settings, self.models)
        self.discovery = Reconciler(self.fleet, _sources(settings))
        self._guards: list[Guard] = []
        self._ready = threading.Event()
        self._stopping = threading.Event()
        self._health = Health(READ_SERVICES, always=(ADMIN_SERVICE,))
        guard = self._guard(settings)
        lookup = Lookup(self.models, self.fleet, settings.tier_weights, self.metrics, settings.limits.max_tokens)
        self._public = _grpc_server(settings, guard)
        service.register(self._public, lookup, guard, settings.limits)
        compat.register(self._public, lookup, guard, settings.limits)
        self._health.register(self._public, guard)
        self._admin: grpc.Server | None = None
        if settings.admin_listen is None:
            admin.register(self._public, self.fleet, self.models, guard)
            reflection.register(self._public, (*READ_SERVICES, ADMIN_SERVICE, health.SERVICE), guard)
        else:
            reflection.register(self._public, (*READ_SERVICES, health.SERVICE), guard)
            behind = self._guard(settings)
            self._admin = _grpc_server(settings, behind)
            admin.register(self._admin, self.fleet, self.models, behind)
            self._health.register(self._admin, behind)
            reflection.register(self._admin, (ADMIN_SERVICE, health.SERVICE), behind)
        self._metrics_server: MetricsServer | None = None
        self.grpc_address = ""
        self.metrics_address = ""
        self.admin_address = ""

    def _guard(self, settings: Settings) -> Guard:
        guard = Guard(self.metrics, self._ready.is_set, settings.server.workers, settings.limits.max_in_flight)
        self._guards.append(guard)
        return guard

    def start(self) -> None:
        """Bind the ports and begin to listen to the configured pods. ConfigError when a port cannot be bound."""
        settings = self._settings
        self.grpc_address = _bind(self._public, settings.listen, "listen")
        self.admin_address = (
            _bind(self._admin, settings.admin_listen, "admin_listen")
            if self._admin is not None and settings.admin_listen
            else self.grpc_address
        )
        self.metrics.watch(self.fleet.statuses, self._sizes, self.discovery.statuses)
        host, _, port = settings.metrics_listen.rpartition(":")
        try:
            self._metrics_server = self.metrics.serve(host.strip("[]"), int(port))
        except OSError as error:
            raise ConfigError("metrics_listen", f"{settings.metrics_listen}: {error.strerror}") from error
        self.metrics_address = f"{host}:{self._metrics_server.port}"
        try:
            self.fleet.start()
        except InvalidArgument as error:
            raise ConfigError(f"pods: {error.field}", error.reason) from error
        self.discovery.start()
        self._public.start()
        if self._admin is not None:
            self._admin.start()
        threading.Thread(target=self._become_ready, name="ready", daemon=True).start()

    def _become_ready(self) -> None:
        ends = time.monotonic() + self._settings.server.ready_timeout_seconds
        wanted = self._settings.server.ready_coverage
        while not (self.discovery.listed and self.fleet.readiness >= wanted) and time.monotonic() < ends:
            if self._stopping.wait(0.02):
                return
        if self._stopping.is_set():
            return
        self._ready.set()
        self._health.set_serving(True)
        self.metrics.ready(True)
        _log.info("ready", extra={"fields": {"coverage": round(self.fleet.readiness, 3)}})

    def wait_ready(self, timeout: float) -> bool:
        """True when ready within `timeout` seconds."""
        return self._ready.wait(timeout)

    def stop(self, grace: float | None = None) -> None:
        """Refuse new calls, let those at work end within `grace` seconds, then take everything down."""
        grace = self._settings.server.drain_seconds if grace is None else grace
        self._stopping.set()
        self._health.stop()
        self.metrics.ready(False)
        draining = [server.stop(grace) for server in (self._public, self._admin) if server is not None]
        for each in draining:
            each.wait()
        for guard in self._guards:
            guard.close()
        self.discovery.stop()
        self.fleet.stop()
        if self._metrics_server is not None:
            self._metrics_server.stop()

    def _sizes(self) -> list[_ModelSize]:
        return [
            _ModelSize(
                model.name,
                model.index.blocks,
                model.index.claims,
                model.index.bytes,
                model.index.block_size,
                self.fleet.coverage(model.name),
            )
            for model in self.models.all()
        ]


def run(settings: Settings) -> int:
    """Serve until SIGTERM or SIGINT; the exit code."""
    done = threading.Event()

    def finish(_signal: int, _frame: FrameType | None) -> None:
        done.set()

    previous = {each: signal.signal(each, finish) for each in (signal.SIGTERM, signal.SIGINT)}
    # A thread that must hold the GIL would otherwise keep a waiting call back for 5 ms at a time.
    sys.setswitchinterval(0.0005)
    # A stream needs some ten descriptors, and the soft limit is often 1,024.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    server: Server | None = None
    try:
        server = Server(settings)
        server.start()
        line = f"listening grpc={server.grpc_address} metrics={server.metrics_address}"
        if settings.admin_listen:
            line += f" admin={server.admin_address}"
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
        done.wait()
        _log.info("draining")
    except ConfigError as error:
        sys.stderr.write(f"kvindex-server: config: {error}\n")
        return 2
    finally:
        if server is not None:
            server.stop()
        for each, handler in previous.items():
            signal.signal(each, handler)
    return 0


def _models(settings: Settings) -> Models:
    models = []
    for each in settings.models:
        index = Index(each.block_size, settings.hash_seed, settings.limits.max_claims_per_model)
        tokenizer = None
        if each.tokenizer:
            try:
                tokenizer = load_tokenizer(Path(each.tokenizer))
            except InvalidArgument as error:
                raise ConfigError(f"models: {each.name}: tokenizer", error.reason) from error
        models.append(Model(each.name, index, tokenizer, each.aliases, each.loras))
    return Models(models, hash_seed=settings.hash_seed, max_claims=settings.limits.max_claims_per_model)


def _fleet(settings: Settings, models: Models) -> Fleet:
    stream = settings.stream
    specs = tuple(pod.spec() for pod in settings.pods)
    for spec in specs:
        models.seen(spec.model, spec.block_size)
    return Fleet(
        models,
        specs,
        bounds=Bounds(
            messages=stream.buffer_messages,
            bytes=stream.buffer_bytes,
            seconds=stream.buffer_seconds,
            replay_timeout=stream.replay_timeout_seconds,
            disconnect_grace=stream.disconnect_grace_seconds,
            rearm_seconds=stream.rearm_seconds,
            rearm_max_seconds=stream.rearm_max_seconds,
            drop_on_gap=stream.on_gap == "drop",
        ),
        drain_messages=stream.drain_messages,
        max_pods=settings.limits.max_registered_pods,
    )


def _sources(settings: Settings) -> list[Source]:
    """The configured sources, the most explicit first: it wins where two of them find one pod."""
    discovery, defaults = settings.discovery, settings.discovery.defaults
    if not defaults.model and len(settings.models) == 1:
        defaults = defaults.model_copy(update={"model": settings.models[0].name})
    sources: list[Source] = []
    if discovery.file.path:
        sources.append(FileSource(discovery.file))
    if discovery.kubernetes.enabled:
        sources.append(KubernetesSource(discovery.kubernetes, defaults))
    if discovery.dns.hosts:
        sources.append(DnsSource(discovery.dns, defaults))
    return sources


def _grpc_server(settings: Settings, guard: Guard) -> grpc.Server:
    size = settings.limits.max_message_bytes
    return grpc.server(
        guard.pool,
        options=[
            ("grpc.max_receive_message_length", size),
            ("grpc.max_send_message_length", -1),
            ("grpc.so_reuseport", 0),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.min_ping_interval_without_data_ms", 5000),
        ],
    )


def _bind(server: grpc.Server, address: str, key: str) -> str:
    host, _, _ = address.rpartition(":")
    try:
        port = server.add_insecure_port(address)
    except RuntimeError:
        port = 0
    if port == 0:
        raise ConfigError(key, f"{address} cannot be bound: in use, or no address of this machine")
    return f"{host}:{port}"
