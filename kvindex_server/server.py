"""The composition root: builds every part, starts them in order, drains and stops them in reverse."""

import contextlib
import ctypes
import gc
import json
import logging
import os
import signal
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import grpc

from kvindex_server import (
    admin,
    compat,
    descriptors,
    health,
    interceptors,
    listening,
    logs,
    pull,
    query,
    reflection,
    service,
    web,
    wire,
)
from kvindex_server._core import Index, TextCache
from kvindex_server.auth import Gate, ReviewSettings, Revoked, Role, TokenFile, TokenReview
from kvindex_server.calls import CallLog
from kvindex_server.config import ConfigError, Settings, TlsSettings
from kvindex_server.direct import Direct
from kvindex_server.discovery.dial_in import DialInSource
from kvindex_server.discovery.dns import DnsSource
from kvindex_server.discovery.file import FileSource
from kvindex_server.discovery.kubernetes import KubernetesSource
from kvindex_server.discovery.reconciler import Reconciler
from kvindex_server.discovery.source import Source
from kvindex_server.errors import InvalidArgument
from kvindex_server.fleet import Fleet
from kvindex_server.front import Front, TransportMissing
from kvindex_server.health import Health
from kvindex_server.ingest import Bounds
from kvindex_server.interceptors import MAX_PING_MS, Guard
from kvindex_server.keeper import Keeper, register_again
from kvindex_server.lookup import Lookup
from kvindex_server.metrics import Metrics, MetricsServer
from kvindex_server.models import Model, Models
from kvindex_server.page import routes as page
from kvindex_server.page.fleet import FleetView
from kvindex_server.page.prompt import MAX_TEXT_BYTES, PromptView
from kvindex_server.peers import Peers
from kvindex_server.pods import PodSpec
from kvindex_server.rest import Calls
from kvindex_server.shared import SharedFleet, Stores
from kvindex_server.siblings import Siblings
from kvindex_server.tls import TlsFiles, server_credentials
from kvindex_server.tokenize.sources import Sources
from kvindex_server.tracing import Collector, Spans, TracingMissing
from kvindex_server.tracing import Metrics as MeasuredCalls

_log = logging.getLogger(__name__)

READ_SERVICES = ("kvindex.v1.KVIndex", "indexer.v1.IndexerService")
ADMIN_SERVICE = "kvindex.v1.KVIndexAdmin"
SWEEP_SECONDS = 1.0
ADMIN_CONNECTIONS = 256
"""Of a port of its own; few operators must find room beside the many clients."""


@dataclass(frozen=True, slots=True)
class _ModelSize:
    name: str
    blocks: int
    claims: int
    bytes: int
    block_size: int
    coverage: float
    placements: Mapping[str, int]


class Server:
    """The whole service in one process. `start` returns when the ports are bound."""

    def __init__(self, settings: Settings, sampler: logs.Sampler | None = None) -> None:
        self._settings = settings
        self.metrics = Metrics()
        self._spans = _spans(settings)
        self._measured = _measured(self.metrics, settings, self._spans)
        self.metrics.watch_logs(lambda: sampler.total if sampler else 0)
        if self._spans is not None:
            logs.correlate(self._spans.ids)
            self.metrics.watch_spans(self._spans.counts)
        if settings.stream.curve_keys_file:
            with _config_errors("stream.curve_keys_file"):
                wire.encrypt(*_curve_keys(Path(settings.stream.curve_keys_file)))
        self.texts = TextCache(settings.text.cache_bytes, settings.text.verify_every)
        self._stores = Stores(settings) if settings.store.addresses else None
        self.models = _models(settings, self.texts, self._stores)
        kept = settings.snapshot
        self._keeper = Keeper(
            Path(kept.directory) if kept.directory else None, kept.keep, kept.interval_seconds, kept.max_age_seconds
        )
        self.fleet = _fleet(settings, self.models, self._stores, self._keeper)
        self._instance = uuid.uuid4().hex
        self._siblings: Siblings | None = None
        # Behind a shared store each stream is one replica's, so that there is nothing to compare.
        if kept.peers and kept.compare_seconds and self._stores is None:
            self._siblings = Siblings(self.fleet, _peers(settings), self._instance, kept.compare_seconds)
        self.discovery = Reconciler(self.fleet, _sources(settings, self.fleet))
        self._guards: list[Guard] = []
        self._ready = threading.Event()
        self._stopping = threading.Event()
        self._health = Health(READ_SERVICES, always=(ADMIN_SERVICE,))
        gate = _gate(settings)
        guard = self._guard(settings, gate)
        lookup = Lookup(self.models, self.fleet, settings.tier_weights, self._measured, settings.limits.max_tokens)
        connections = _connections(settings)
        self._public = _grpc_server(settings, guard, connections)
        self._front: Front | None = None
        self._behind_front: tempfile.TemporaryDirectory[str] | None = None
        weights, limits = settings.tier_weights, settings.limits
        self._direct = Direct(lookup, self.models, self.fleet, weights, self._measured, limits)
        service.register(self._public, lookup, self._direct, guard, limits, settings.placement)
        compat.register(self._public, self._direct, guard)
        self._health.register(self._public, guard)
        self._admin: grpc.Server | None = None
        if settings.admin_listen is None:
            admin.register(self._public, self.fleet, self.models, lookup, limits, self._keeper, self._instance, guard)
            described: tuple[str, ...] = (*READ_SERVICES, ADMIN_SERVICE, health.SERVICE)
        else:
            described = (*READ_SERVICES, health.SERVICE)
            behind = self._guard(settings, gate)
            self._admin = _grpc_server(settings, behind, min(connections, ADMIN_CONNECTIONS))
            admin.register(self._admin, self.fleet, self.models, lookup, limits, self._keeper, self._instance, behind)
            self._health.register(self._admin, behind)
            if settings.server.reflection:
                reflection.register(self._admin, (ADMIN_SERVICE, health.SERVICE), behind)
        if settings.server.reflection:
            reflection.register(self._public, described, guard)
        self._metrics_server: MetricsServer | None = None
        self._page = self._page_routes(gate, guard, lookup) if settings.page.enabled else {}
        self._queries = query.routes(self._calls(guard), lookup, self.models, self.fleet, settings.limits)
        self._query_server: web.WebServer | None = None
        self.http_address = ""
        self.grpc_address = ""
        self.metrics_address = ""
        self.admin_address = ""

    def _guard(self, settings: Settings, gate: Gate) -> Guard:
        bounds = interceptors.Bounds(
            workers=settings.server.workers,
            max_in_flight=settings.limits.max_in_flight,
            max_streams=settings.limits.max_streams,
            message_seconds=settings.server.message_seconds,
            max_unread_bytes=settings.limits.max_unread_bytes,
        )
        guard = Guard(self._measured, self._ready.is_set, bounds, gate, self._spans)
        self._guards.append(guard)
        return guard

    def _calls(self, guard: Guard) -> Calls:
        """Of one HTTP port: its permits are not those of another one."""
        settings = self._settings
        return Calls(
            guard,
            workers=settings.server.workers,
            max_in_flight=settings.limits.max_in_flight,
            seconds=settings.http.request_seconds,
        )

    def _page_routes(self, gate: Gate, guard: Guard, lookup: Lookup) -> web.Routes:
        settings = self._settings
        box = None
        if settings.page.prompt:
            box = PromptView(lookup, settings.limits, self.fleet.statuses, self.fleet.adapters)
        how = "off" if box is None else "token" if gate.asks(Role.READ) else "open"
        fleet = FleetView(self.fleet.statuses, self._sizes, self.metrics, how)
        return page.routes(fleet, box, self._calls(guard))

    def start(self) -> None:
        """Bind the ports and begin to listen to the configured pods. ConfigError when a port cannot be bound."""
        settings = self._settings
        tls = settings.tls
        if settings.server.transport == "native":
            self.grpc_address = self._bind_front()
        else:
            self.grpc_address = _bind(self._public, settings.listen, "listen", tls, tls.client_ca_file)
        admin_ca = tls.admin_client_ca_file or tls.client_ca_file
        self.admin_address = (
            _bind(self._admin, settings.admin_listen, "admin_listen", tls, admin_ca)
            if self._admin is not None and settings.admin_listen
            else self.grpc_address
        )
        self.metrics.watch(self.fleet.statuses, self._sizes, self.discovery.statuses, listening.unclaimed)
        self.metrics.watch_text(self.texts.stats, self.models.tokenizers)
        self.metrics.watch_snapshots(lambda: self._keeper.stats)
        host, _, port = settings.metrics_listen.rpartition(":")
        try:
            self._metrics_server = self.metrics.serve(host, int(port), self._page, 8 * MAX_TEXT_BYTES)
        except OSError as error:
            raise ConfigError("metrics_listen", f"{settings.metrics_listen}: {error.strerror}") from error
        self.metrics_address = f"{host}:{self._metrics_server.port}"
        if settings.http.listen is not None:
            self._serve_queries(settings.http.listen)
        if self._stores is not None:
            self._stores.start()
            self.metrics.watch_store(self._stores.stats)
        again = self._load()
        try:
            self.fleet.start()
        except InvalidArgument as error:
            raise ConfigError(f"pods: {error.field}", error.reason) from error
        register_again(self.fleet, again)
        self._keeper.start(self.fleet)
        if (siblings := self._siblings) is not None:
            self.metrics.watch_replicas(lambda: siblings.states, lambda: siblings.repairs)
            siblings.start()
        self.discovery.start()
        self._public.start()
        if self._front is not None:
            self._front.start()
        if self._admin is not None:
            self._admin.start()
        threading.Thread(target=self._become_ready, name="ready", daemon=True).start()
        threading.Thread(target=self._sweep_placements, name="sweep", daemon=True).start()

    def _load(self) -> list[PodSpec]:
        """What a peer, or else the last snapshot, has kept; the registrations to be made again."""
        kept = self._settings.snapshot
        if kept.peers:
            with _config_errors("snapshot"):
                peers = replace(_peers(self._settings), own=self.admin_address)
                if (pulled := self._keeper.receive(lambda place: pull.fetch(peers, place))) is not None:
                    return pulled
        with _config_errors("snapshot.directory"):
            return self._keeper.load()

    def _serve_queries(self, address: str) -> None:
        settings = self._settings
        bounds = web.Bounds(
            settings.http.max_connections, settings.limits.max_message_bytes, settings.http.request_seconds
        )
        host, _, port = address.rpartition(":")
        try:
            self._query_server = web.WebServer("query", host, int(port), self._queries, bounds)
        except OSError as error:
            raise ConfigError("http.listen", f"{address}: {error.strerror}") from error
        self.http_address = f"{host}:{self._query_server.port}"

    def _become_ready(self) -> None:
        ends = time.monotonic() + self._settings.server.ready_timeout_seconds
        wanted = self._settings.server.ready_coverage
        while not (self.discovery.listed and self.fleet.readiness >= wanted) and time.monotonic() < ends:
            if self._stopping.wait(0.02):
                return
        if self._stopping.is_set():
            return
        if self._stores is None:
            self._set_ready(True)
            return
        while True:  # only while the store answers
            if self._stores.reachable != self._ready.is_set():
                self._set_ready(self._stores.reachable)
            if self._stopping.wait(0.1):
                return

    def _set_ready(self, ready: bool) -> None:
        (self._ready.set if ready else self._ready.clear)()
        self._health.set_serving(ready)
        self.metrics.ready(ready)
        fields = {"coverage": round(self.fleet.readiness, 3)}
        _log.info("ready" if ready else "not ready: the shared store does not answer", extra={"fields": fields})

    def _sweep_placements(self) -> None:
        """Gives the memory of expired placements back; no answer depends on it."""
        while not self._stopping.wait(SWEEP_SECONDS):
            for model in self.models.all():
                model.index.sweep_placements()

    def wait_ready(self, timeout: float) -> bool:
        """True when ready within `timeout` seconds."""
        return self._ready.wait(timeout)

    def stop(self, grace: float | None = None) -> None:
        """Refuse new calls, let those at work end within `grace` seconds, then take everything down."""
        grace = self._settings.server.drain_seconds if grace is None else grace
        self._stopping.set()
        self._health.stop()
        self.metrics.ready(False)
        if self._query_server is not None:
            self._query_server.stop()
        servers = [server for server in (self._public, self._admin) if server is not None]
        draining = [(guard, server.stop(grace)) for guard, server in zip(self._guards, servers, strict=True)]
        for guard, stopped in draining:
            guard.drain(grace, stopped)
            stopped.wait()
        if self._front is not None:
            self._front.stop()
        if self._behind_front is not None:
            self._behind_front.cleanup()
        for guard in self._guards:
            guard.close()
        self.discovery.stop()
        if self._siblings is not None:
            self._siblings.stop()
        self._keeper.stop()
        if self._settings.snapshot.directory and self._ready.is_set():
            self._keeper.write(self.fleet)
        self._keeper.close()
        self.fleet.stop()
        if self._stores is not None:
            self._stores.stop()
        if self._metrics_server is not None:
            self._metrics_server.stop()
        if self._spans is not None:
            logs.correlate(None)
            self._spans.close()

    def _bind_front(self) -> str:
        settings, limits = self._settings, self._settings.limits
        with _config_errors("server.transport: native needs a writable TMPDIR"):
            self._behind_front = tempfile.TemporaryDirectory(prefix="kvindex-")
        socket_path = f"{self._behind_front.name}/grpcio.sock"
        _bind_unix(self._public, f"unix:{socket_path}", "listen")
        try:
            self._front = Front(
                settings.listen,
                socket_path,
                self._guards[0],
                f"/{service.SERVICE}/Score",
                self._direct,
                max_message_bytes=limits.max_message_bytes,
                max_calls_per_connection=limits.max_calls_per_connection,
                max_metadata_bytes=limits.max_metadata_bytes,
                max_in_flight=limits.max_in_flight,
                keepalive_seconds=settings.server.keepalive_seconds,
            )
        except TransportMissing as error:
            raise ConfigError("server.transport", str(error)) from error
        except OSError as error:
            raise ConfigError("listen", f"{settings.listen} cannot be bound: {error.strerror or error}") from error
        if settings.listen.startswith("unix:"):
            os.chmod(settings.listen.removeprefix("unix:"), 0o660)
            return settings.listen
        return f"{settings.listen.rpartition(':')[0]}:{self._front.port}"

    def _sizes(self) -> list[_ModelSize]:
        return [
            _ModelSize(
                model.name,
                model.index.blocks,
                model.index.claims,
                model.index.bytes,
                model.index.block_size,
                self.fleet.coverage(model.name),
                model.index.placements,
            )
            for model in self.models.all()
        ]


def _keep_freed_memory() -> None:
    """2 MiB per heap: glibc gives 128 KiB back at once, and has it again page by page for the next answer."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-1, 1 << 21)  # M_TRIM_THRESHOLD
        mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD, which would no longer move by itself


def run(settings: Settings, sampler: logs.Sampler | None = None, *, as_json: bool = False) -> int:
    """Serve until SIGTERM or SIGINT; the exit code. Where it listens is told on one line of stdout."""
    # Blocked in every thread and waited for, instead of handled: a handler that sets an event can deadlock with the
    # very wait for it, and one that only sets a flag wakes nobody.
    ends = {signal.SIGTERM, signal.SIGINT}
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, ends)
    # A thread that must hold the GIL would otherwise keep a waiting call back for 5 ms at a time.
    sys.setswitchinterval(0.00005)
    _keep_freed_memory()
    # It logs a traceback for every header that is not UTF-8: any stranger could fill the log with them.
    logging.getLogger("grpc._cython").setLevel(logging.CRITICAL)
    descriptors.raise_limit()
    server: Server | None = None
    try:
        server = Server(settings, sampler)
        server.start()
        where = {"grpc": server.grpc_address, "metrics": server.metrics_address}
        if settings.admin_listen:
            where["admin"] = server.admin_address
        if server.http_address:
            where["http"] = server.http_address
        words = " ".join(f"{name}={address}" for name, address in where.items())
        sys.stdout.write(f"{json.dumps(where) if as_json else f'listening {words}'}\n")
        sys.stdout.flush()
        # What was built so far lives as long as the process: no collection need look at it again.
        gc.collect()
        gc.freeze()
        signal.sigwait(ends)
        _log.info("draining")
    except ConfigError as error:
        sys.stderr.write(f"kvindex-server: config: {error}\n")
        return 2
    finally:
        gc.unfreeze()
        if server is not None:
            server.stop()
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)
    return 0


def _spans(settings: Settings) -> Spans | None:
    tracing = settings.tracing
    if not tracing.endpoint:
        return None
    collector = Collector(tracing.endpoint, tracing.ca_file, tracing.sample_ratio, tracing.service_name)
    try:
        with _config_errors("tracing.ca_file"):
            return Spans(collector)
    except TracingMissing as error:
        raise ConfigError("tracing.endpoint", str(error)) from error


def _measured(metrics: Metrics, settings: Settings, spans: Spans | None) -> MeasuredCalls:
    """The metrics alone, or with those before them that were asked for: off costs nothing."""
    measured: MeasuredCalls = metrics
    if settings.log.calls:
        measured = CallLog(measured, settings.log.calls)
    return measured if spans is None else spans.measured(measured)


def _models(settings: Settings, texts: TextCache, stores: Stores | None) -> Models:
    sources = Sources(
        texts,
        directories=tuple(map(Path, settings.text.tokenizer_dirs)),
        download=settings.text.hub_download,
        word_slots=settings.text.known_words,
        max_reference_bytes=settings.text.max_reference_bytes,
        engines_at_once=max(1, settings.server.workers - 1),
    )
    limits, placement = settings.limits, settings.placement

    def in_process(_name: str, block_size: int) -> Index:
        return Index(
            block_size,
            settings.hash_seed,
            limits.max_claims_per_model,
            placement.max_blocks,
            limits.max_index_bytes,
            limits.remembered_removals,
            limits.max_claims_per_stream,
        )

    make_index = in_process if stores is None else stores.make
    models = []
    for each in settings.models:
        index = make_index(each.name, each.block_size)
        try:
            tokenizer = sources.configured(each.name, each.tokenizer, each.tokenize_url)
        except InvalidArgument as error:
            raise ConfigError(f"models: {each.name}: tokenizer", error.reason) from error
        models.append(Model(each.name, index, tokenizer, each.aliases, each.loras))
    return Models(
        models,
        make_index=make_index,
        discover=sources.discover,
    )


def _fleet(settings: Settings, models: Models, stores: Stores | None, keeper: Keeper) -> Fleet:
    stream = settings.stream
    specs = tuple(pod.spec() for pod in settings.pods)
    for spec in specs:
        models.seen(spec.model, spec.block_size)
    bounds = Bounds(
        messages=stream.buffer_messages,
        bytes=stream.buffer_bytes,
        seconds=stream.buffer_seconds,
        replay_timeout=stream.replay_timeout_seconds,
        disconnect_grace=stream.disconnect_grace_seconds,
        rearm_seconds=stream.rearm_seconds,
        rearm_max_seconds=stream.rearm_max_seconds,
        drop_on_gap=stream.on_gap == "drop",
    )
    if stores is not None:
        return SharedFleet(
            models,
            specs,
            stores,
            bounds=bounds,
            drain_messages=stream.drain_messages,
            max_pods=settings.limits.max_registered_pods,
        )
    return Fleet(
        models,
        specs,
        bounds=bounds,
        drain_messages=stream.drain_messages,
        max_pods=settings.limits.max_registered_pods,
        saved=keeper.saved,
    )


def _peers(settings: Settings) -> Peers:
    kept = settings.snapshot
    return Peers(kept.peers, kept.peer_timeout_seconds, kept.peer_token_file, kept.peer_ca_file)


def _sources(settings: Settings, fleet: Fleet) -> list[Source]:
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
    if discovery.dial_in.endpoint:
        sources.append(DialInSource(discovery.dial_in, defaults, fleet.is_connected))
    return sources


def _connections(settings: Settings) -> int:
    """How many a port may have open; told in the log when that is fewer than configured."""
    wanted = settings.limits.max_connections
    allowed = descriptors.for_connections(wanted)
    if allowed < wanted:
        fields = {"limit": descriptors.limit(), "max_connections": wanted, "allowed": allowed}
        _log.warning("too few file descriptors for limits.max_connections", extra={"fields": fields})
    return allowed


def _grpc_server(settings: Settings, guard: Guard, connections: int) -> grpc.Server:
    size = settings.limits.max_message_bytes
    silence_ms = int(settings.server.keepalive_seconds * 1000)
    answer_ms = min(silence_ms, MAX_PING_MS)
    age_ms = int(settings.server.max_connection_age_seconds * 1000)
    return grpc.server(
        guard.pool,
        options=[
            # Calls at work end as they would have, streams as late as they like: new calls take a new connection.
            *([("grpc.max_connection_age_ms", age_ms)] if age_ms else []),
            ("grpc.max_receive_message_length", size),
            ("grpc.max_send_message_length", -1),
            ("grpc.so_reuseport", 0),
            ("grpc.max_concurrent_streams", settings.limits.max_calls_per_connection),
            ("grpc.max_metadata_size", settings.limits.max_metadata_bytes),
            ("grpc.absolute_max_metadata_size", settings.limits.max_metadata_bytes),
            ("grpc.server_handshake_timeout_ms", 5000),
            ("grpc.max_allowed_incoming_connections", connections),
            # Without the second time-out a client that takes pings and answers none is kept for ever.
            ("grpc.keepalive_time_ms", silence_ms),
            ("grpc.keepalive_timeout_ms", answer_ms),
            ("grpc.http2.ping_timeout_ms", answer_ms),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.min_ping_interval_without_data_ms", 5000),
        ],
    )


def _gate(settings: Settings) -> Gate:
    auth, review, revoked = settings.auth, settings.auth.review, settings.tls.revoked_file

    def tokens(path: str, key: str) -> TokenFile | None:
        if not path:
            return None
        with _config_errors(key):
            return TokenFile(Path(path))

    judge = None
    if review.url:
        with _config_errors("auth.review"):
            judge = TokenReview(
                ReviewSettings(
                    url=review.url,
                    ca_file=Path(review.ca_file) if review.ca_file else None,
                    token_file=Path(review.token_file) if review.token_file else None,
                    audiences=review.audiences,
                    users=review.users,
                    admin_users=review.admin_users,
                    timeout_seconds=review.timeout_seconds,
                )
            )
    with _config_errors("tls.revoked_file"):
        return Gate(
            tokens(auth.tokens_file, "auth.tokens_file"),
            tokens(auth.admin_tokens_file, "auth.admin_tokens_file"),
            judge,
            Revoked(Path(revoked)) if revoked else None,
        )


def _curve_keys(path: Path) -> tuple[bytes, bytes, bytes]:
    """Keys for the engines' sockets; a message about them never quotes one."""
    found = {}
    for line in path.read_text(encoding="ascii").splitlines():
        name, equals, key = line.strip().partition("=")
        if equals:
            found[name.strip()] = key.strip().encode()
    if set(found) != {"server", "public", "secret"}:
        raise ValueError("must have one line each of server=, public=, secret=")
    return found["server"], found["public"], found["secret"]


@contextlib.contextmanager
def _config_errors(key: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(key, f"{error.filename or ''}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(key, str(error)) from error


def _bind(server: grpc.Server, address: str, key: str, tls: TlsSettings, client_ca: str) -> str:
    if address.startswith("unix:"):
        return _bind_unix(server, address, key)
    host, _, _ = address.rpartition(":")
    credentials = None
    if tls.cert_file:
        files = TlsFiles(Path(tls.cert_file), Path(tls.key_file), Path(client_ca) if client_ca else None)
        with _config_errors("tls"):
            credentials = server_credentials(files)
    try:
        port = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
    except RuntimeError:
        port = 0
    if port == 0:
        raise ConfigError(key, f"{address} cannot be bound: in use, or no address of this machine")
    return f"{host}:{port}"


def _bind_unix(server: grpc.Server, address: str, key: str) -> str:
    """The file's permissions say who may connect, so there is no TLS: owner and group only."""
    mask = os.umask(0o117)
    try:
        bound = server.add_insecure_port(address)
    except RuntimeError:
        bound = 0
    finally:
        os.umask(mask)
    if not bound:
        raise ConfigError(key, f"{address} cannot be bound: no such directory, or no right to write there")
    return address
