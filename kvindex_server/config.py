"""Settings of the server: one frozen schema, filled from a YAML file, the environment and flags."""

import difflib
import json
import math
import re
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from kvindex_server.errors import InvalidArgument
from kvindex_server.pods import MAX_RANKS, PodSpec, bound_address, split_tcp

PREFIX = "KVINDEX_"
MIB = 1024 * 1024

# Kubernetes puts these into every container of a namespace that has a Service called kvindex-something.
_SERVICE_LINK = re.compile(r"_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)\Z")
_NAMESPACE = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?\Z")
_WILDCARDS = ("0.0.0.0", "[::]")


class ConfigError(Exception):
    """A setting is wrong: `key` names it as the user wrote it, `reason` says why; one line as a string."""

    def __init__(self, key: str, reason: str) -> None:
        self.key = _one_line(key)
        self.reason = _one_line(reason)
        super().__init__(f"{self.key}: {self.reason}")


class _WrongField(ValueError):
    """A check across fields failed; carries the key relative to the model that checked."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(reason)
        self.key = key


def split_address(address: str) -> tuple[str, int]:
    """Host and port of `host:port` or `[ipv6]:port` (brackets kept); ValueError for anything else."""
    host, colon, port = address.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]") and len(host) > 2
    if not colon or not host or any(c.isspace() for c in host) or (":" in host and not bracketed):
        raise ValueError("must have the form host:port")
    if not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise ValueError("port must be in 0..65535")
    return host, int(port)


def _address(value: str) -> str:
    split_address(value)
    return value


def _url(value: str) -> str:
    if not value.startswith(("http://", "https://")):
        raise ValueError("must begin with http:// or https://")
    return value


def _url_or_none(value: str) -> str:
    return _url(value) if value else value


def _listen_address(value: str) -> str:
    if value.startswith("unix:"):
        if not value.startswith("unix:/") or len(value.encode()) > 100:
            raise ValueError("must have the form unix:/absolute/path, of at most 100 bytes")
        return value
    return _address(value)


def _no_boolean(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("must be a number, not a boolean")
    return value


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


def _tier_weights(weights: dict[str, float]) -> dict[str, float]:
    if not weights:
        raise ValueError("must name at least one tier")
    lowered: dict[str, float] = {}
    for tier, weight in weights.items():
        if not tier:
            raise ValueError("a tier's name must not be empty")
        if not math.isfinite(weight) or weight < 0:
            raise _WrongField(tier, "must be a finite number >= 0")
        if tier.lower() in lowered:
            raise _WrongField(tier, "is given twice; case does not matter")
        lowered[tier.lower()] = weight
    return lowered


def _check_pod_name(template: str, fields: tuple[str, ...]) -> None:
    try:
        shown = template.format(**dict.fromkeys(fields, "x"))
    except (KeyError, IndexError, ValueError, AttributeError):
        raise _WrongField("pod_name", f"may only use {', '.join(f'{{{each}}}' for each in fields)}") from None
    if shown == template:
        raise _WrongField("pod_name", "must use at least one of the fields, or all pods have one name")


Address = Annotated[str, AfterValidator(_address)]
Url = Annotated[str, AfterValidator(_url)]
ListenAddress = Annotated[str, AfterValidator(_listen_address)]
Name = Annotated[str, Field(min_length=1, max_length=512)]
Integer = Annotated[int, BeforeValidator(_no_boolean)]
Number = Annotated[float, BeforeValidator(_no_boolean)]
Seconds = Annotated[float, BeforeValidator(_no_boolean), Field(ge=0, le=86_400, allow_inf_nan=False)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelSettings(_Section):
    """A model known from the start."""

    name: Name = Field(description="Base model name, as requests and pods call it")
    tokenizer: str | None = Field(
        default=None,
        description="Directory with the model's tokenizer files; without it text cannot be scored",
    )
    tokenize_url: Url | None = Field(
        default=None,
        description="An engine's `/tokenize` endpoint, asked when the model has no tokenizer here",
    )
    block_size: Integer = Field(default=0, ge=0, le=65_536, description="Tokens per block; 0 = learn from events")
    aliases: tuple[Name, ...] = Field(default=(), description="Other names requests may use for the model")
    loras: tuple[Name, ...] = Field(default=(), description="LoRA adapters that requests name in place of the model")


class PodSettings(_Section):
    """A pod subscribed to from the start; the same fields as RegisterPodRequest."""

    pod: str = Field(description="The identifier the router uses, normally ip:port")
    model: str = Field(description="Model the pod serves")
    endpoint: str = Field(description="`tcp://host:port` of rank 0's events; rank r is at port + r")
    replay_endpoint: str = Field(default="", description="Where rank 0's events can be asked for again; likewise")
    ranks: Integer = Field(default=1, ge=1, le=MAX_RANKS, description="Data-parallel ranks of the pod")
    topic: str = Field(default="", description="Subscription prefix; empty = everything")
    incarnation: str = Field(default="", description="Names one life of the engine, such as a container id; any text")
    engine: str = Field(default="", description="`vllm`, `sglang` or `trtllm`; empty = detect")
    block_size: Integer = Field(default=0, ge=0, le=65_536, description="Tokens per block; 0 = learn from events")
    bind: bool = Field(default=False, description="Bind `endpoint`; the engine dials in")

    def spec(self) -> PodSpec:
        """The registration, as the fleet takes it."""
        return PodSpec(**self.model_dump())

    @model_validator(mode="after")
    def _valid(self) -> "PodSettings":
        try:
            self.spec().validate()
        except InvalidArgument as error:
            raise _WrongField(error.field, error.reason) from None
        return self


class DiscoveryDefaults(_Section):
    """What is taken for a found pod that does not tell otherwise."""

    model: str = Field(default="", max_length=512, description="Model; empty = the only one of `models`, if it is one")
    serving_port: Integer = Field(default=8000, ge=1, le=65_535, description="HTTP port, as the router names the pod")
    events_port: Integer = Field(default=5557, ge=1, le=65_535, description="Port of rank 0's events")
    replay_port: Integer = Field(default=0, ge=0, le=65_535, description="Port of rank 0's replays; 0 = there is none")
    ranks: Integer = Field(default=1, ge=1, le=MAX_RANKS, description="Data-parallel ranks of a pod")
    topic: str = Field(default="", max_length=1024, description="Subscription prefix; empty = everything")
    engine: Literal["", "vllm", "sglang", "trtllm"] = Field(default="", description="Engine; empty = detect")
    block_size: Integer = Field(default=0, ge=0, le=65_536, description="Tokens per block; 0 = learn from events")
    ask_engine: bool = Field(
        default=False, description="Ask each engine's `GET /kv_event_sources` for ports, ranks and topic"
    )


class KubernetesSettings(_Section):
    """Pods by label, watched at the API server."""

    enabled: bool = Field(default=False, description="Follow the pods that the API server lists")
    namespaces: tuple[Name, ...] = Field(
        default=(), description="Where to look; empty = the server's own namespace, `*` = all of them"
    )
    selector: str = Field(default="llm-d.ai/inference-serving=true", description="Label selector of the engines' pods")
    kubeconfig: str = Field(
        default="", description="Credentials; empty = the pod's service account, else `$KUBECONFIG` or `~/.kube/config`"
    )
    pod_name: str = Field(
        default="{ip}:{port}",
        description="The identifier the router uses, made of `{ip}`, `{port}` (serving), `{name}`, `{namespace}`",
    )
    annotations: str = Field(default="kvindex.io/", description="Prefix of the annotations that describe a pod")
    container: str = Field(
        default="", description="The engine's container; empty = the pod's default container, else its first"
    )
    ready_only: bool = Field(default=False, description="Follow a pod only while it is Ready, not already when it runs")
    watch_seconds: Seconds = Field(default=60.0, ge=1, description="A watch is renewed this often")
    relist_seconds: Seconds = Field(default=600.0, ge=1, description="Everything is listed anew this often")

    @model_validator(mode="after")
    def _valid(self) -> "KubernetesSettings":
        if "*" in self.namespaces and len(self.namespaces) > 1:
            raise _WrongField("namespaces", "`*` stands alone")
        for index, namespace in enumerate(self.namespaces):
            if namespace != "*" and not _NAMESPACE.match(namespace):
                raise _WrongField(f"namespaces[{index}]", "is not a namespace's name")
        _check_pod_name(self.pod_name, ("ip", "port", "name", "namespace"))
        return self


class DnsSettings(_Section):
    """Pods by the addresses of headless services."""

    hosts: tuple[Name, ...] = Field(default=(), description="Names whose A and AAAA records are the pods")
    interval_seconds: Seconds = Field(default=10.0, gt=0, description="The names are resolved this often")


class PodFileSettings(_Section):
    """Pods by a file that something else writes."""

    path: str = Field(default="", description="YAML or JSON list with the members of `pods`; read again on change")
    interval_seconds: Seconds = Field(default=1.0, gt=0, description="The file is looked at this often")


class DialInSettings(_Section):
    """Pods by the topics of engines that dial in: `kv@POD@MODEL`."""

    endpoint: str = Field(
        default="",
        description="`tcp://*:PORT` or `tcp://ADDRESS:PORT` that engines' rank 0 dials into; rank r's is at PORT + r",
    )
    forget_seconds: Seconds = Field(
        default=600.0, description="A pod is taken away when its engine has been away for so long"
    )

    @model_validator(mode="after")
    def _valid(self) -> "DialInSettings":
        if self.endpoint:
            try:
                host, _ = split_tcp(self.endpoint, "endpoint")
            except InvalidArgument as error:
                raise _WrongField("endpoint", error.reason) from error
            if bound_address(host) is None:
                raise _WrongField("endpoint", "must have * or an IP address for a host")
        return self


class DiscoverySettings(_Section):
    """Where pods are found while running."""

    defaults: DiscoveryDefaults = Field(default=DiscoveryDefaults(), description="What a found pod does not tell")
    kubernetes: KubernetesSettings = Field(default=KubernetesSettings(), description="Pods by label")
    dns: DnsSettings = Field(default=DnsSettings(), description="Pods by name")
    file: PodFileSettings = Field(default=PodFileSettings(), description="Pods by file")
    dial_in: DialInSettings = Field(default=DialInSettings(), description="Pods by topic")

    @model_validator(mode="after")
    def _ports(self) -> "DiscoverySettings":
        if self.dial_in.endpoint and split_tcp(self.dial_in.endpoint, "endpoint")[1] + self.defaults.ranks > 65_536:
            raise _WrongField("dial_in.endpoint", "port + defaults.ranks - 1 is above 65535")
        return self


class LimitSettings(_Section):
    """Bounds on what one caller or one fleet may cost."""

    max_tokens: Integer = Field(default=2_097_152, ge=1, description="Token ids in one request")
    max_pods: Integer = Field(default=16_384, ge=1, description="Candidate pods in one request")
    max_keys: Integer = Field(default=262_144, ge=1, description="Keys or engine hashes in one request")
    max_prompt_bytes: Integer = Field(default=16 * MIB, ge=1, description="Bytes of a prompt or chat body")
    max_message_bytes: Integer = Field(default=20 * MIB, ge=1024, le=2**31 - 1, description="Bytes of one gRPC message")
    max_in_flight: Integer = Field(
        default=256, ge=1, description="Calls of one RPC at work or waiting; the rest are refused"
    )
    max_streams: Integer = Field(default=256, ge=1, le=4096, description="Open ScoreStreams; each has a thread")
    max_calls_per_connection: Integer = Field(
        default=128, ge=1, le=2**31 - 1, description="Calls one connection may have open; its client queues the rest"
    )
    max_connections: Integer = Field(
        default=12_288,
        ge=1,
        description="Open gRPC connections of a port, at most 3/4 of the file descriptors; others are closed at once",
    )
    max_unread_bytes: Integer = Field(
        default=256 * MIB,
        ge=MIB,
        description="Memory of unary answers that clients have not read yet; above it the oldest calls are ended",
    )
    max_metadata_bytes: Integer = Field(default=16_384, ge=1024, le=MIB, description="Bytes of one call's metadata")
    max_claims_per_model: Integer = Field(default=0, ge=0, description="Claims kept per model; 0 = unlimited")
    max_claims_per_stream: Integer = Field(default=0, ge=0, description="Claims kept per stream; 0 = unlimited")
    max_index_bytes: Integer = Field(
        default=0, ge=0, description="Bytes of a model's index above which new claims are refused; 0 = unlimited"
    )
    remembered_removals: Integer = Field(
        default=8_192,
        ge=0,
        le=2**24,
        description="Removed blocks remembered per stream, for Explain: 12 bytes each; a power of two, 0 = none",
    )
    max_registered_pods: Integer = Field(default=4096, ge=1, description="Pods registered at once")


class StreamSettings(_Section):
    """How event streams are followed and repaired."""

    on_gap: Literal["keep", "drop"] = Field(
        default="keep", description="What becomes of a stream's claims after a hole that cannot be repaired"
    )
    buffer_messages: Integer = Field(default=100_000, ge=1, description="Messages buffered per stream during a replay")
    buffer_bytes: Integer = Field(default=256 * MIB, ge=1, description="Bytes buffered per stream during a replay")
    buffer_seconds: Seconds = Field(default=30.0, gt=0, description="Longest time to buffer during a replay")
    replay_timeout_seconds: Seconds = Field(default=5.0, gt=0, description="Wait for a replay's next message")
    rearm_seconds: Seconds = Field(default=5.0, gt=0, description="First wait before a failed repair is tried again")
    rearm_max_seconds: Seconds = Field(default=300.0, gt=0, description="Longest such wait; it doubles each time")
    disconnect_grace_seconds: Seconds = Field(
        default=10.0, description="A connection lost for longer makes the stream DOWN and its claims STALE"
    )
    curve_keys_file: str = Field(
        default="",
        description="ZMQ CURVE keys, `server=`, `public=` and `secret=` one a line in Z85; empty = plain text",
    )
    drain_messages: Integer = Field(default=512, ge=1, description="Messages taken from one stream per turn")


class PlacementSettings(_Section):
    """How long and how many of a router's own decisions are believed."""

    default_ttl_seconds: Seconds = Field(
        default=2.0, gt=0, description="How long a placement holds when the router does not say"
    )
    max_ttl_seconds: Seconds = Field(default=30.0, gt=0, description="Longest time a router may ask for")
    max_blocks: Integer = Field(
        default=1_048_576, ge=1, description="Blocks placed at once per model; more are refused"
    )

    @model_validator(mode="after")
    def _consistent(self) -> "PlacementSettings":
        if self.default_ttl_seconds > self.max_ttl_seconds:
            raise _WrongField("default_ttl_seconds", f"is above max_ttl_seconds, {self.max_ttl_seconds:g}")
        return self


class TextSettings(_Section):
    """How text becomes tokens, and what is remembered of it."""

    cache_bytes: Integer = Field(
        default=256 * MIB, ge=0, description="Memory for texts seen before, their tokens and keys, over all models"
    )
    known_words: Integer = Field(
        default=131_072, ge=1024, le=2**26, description="Words remembered per tokenizer, 48 bytes each; a power of two"
    )
    verify_every: Integer = Field(
        default=1024,
        ge=0,
        description="Of the pieces of text encoded natively, every so many-th is compared with the reference; 0 = none",
    )
    max_reference_bytes: Integer = Field(
        default=4 * MIB, ge=1, description="Bytes of one text that may be encoded by the reference library"
    )
    tokenizer_dirs: tuple[str, ...] = Field(
        default=(), description="Where tokenizers are looked for by the model's name: plain directories or hub caches"
    )
    hub_download: bool = Field(
        default=False, description="Fetch tokenizers that are not found from the Hugging Face hub"
    )

    @model_validator(mode="after")
    def _valid(self) -> "TextSettings":
        if self.known_words & (self.known_words - 1):
            raise _WrongField("known_words", "must be a power of two")
        return self


class SnapshotSettings(_Section):
    """How the index survives a restart and reaches new replicas."""

    directory: str = Field(default="", description="Where snapshots are kept; empty = none are, and a restart is cold")
    interval_seconds: Seconds = Field(default=60.0, gt=0, description="Time between two snapshots")
    keep: Integer = Field(default=2, ge=1, le=1000, description="Snapshots kept; older ones are deleted")
    max_age_seconds: Seconds = Field(default=3600.0, description="An older snapshot is not loaded")
    peers: tuple[ListenAddress, ...] = Field(
        default=(), description="Replicas asked for their state at start, in this order; a name may stand for several"
    )
    peer_timeout_seconds: Seconds = Field(default=30.0, gt=0, description="Longest time to pull from the peers")
    peer_token_file: str = Field(default="", description="Bearer token for the peers' admin service")
    compare_seconds: Seconds = Field(
        default=60.0, description="Time between two comparisons with the peers' streams; 0 = none are made"
    )
    peer_ca_file: str = Field(default="", description="CA of the peers' certificates; empty = no TLS to them")


class ServerSettings(_Section):
    """The gRPC server's own behaviour."""

    transport: Literal["grpcio", "native"] = Field(
        default="grpcio",
        description="`native`: Score through the optional package pygrpc-native; only among trusted clients",
    )
    workers: Integer = Field(default=4, ge=1, le=1024, description="Calls of one RPC worked on at once")
    message_seconds: Seconds = Field(
        default=10.0,
        gt=0,
        description="Time for a call's message to come; then the call is ended. ScoreStreams may wait as they like",
    )
    keepalive_seconds: Seconds = Field(
        default=60.0,
        ge=1,
        description="A connection silent for so long is pinged, and closed if nothing comes for as long again, or 20 s",
    )
    max_connection_age_seconds: Seconds = Field(
        default=0.0,
        description="After so long, a tenth more or less, new calls take a new connection, to any replica; 0 = never",
    )
    reflection: bool = Field(default=True, description="Describe the services to clients that ask")
    drain_seconds: Seconds = Field(default=10.0, description="Time for requests at work to end after SIGTERM")
    ready_timeout_seconds: Seconds = Field(
        default=30.0,
        description="Longest wait for the configured pods' first synchronisation before being ready",
    )
    ready_coverage: Number = Field(
        default=1.0,
        ge=0,
        le=1,
        description="Share of the configured pods' streams that must be synchronised to be ready",
    )


class TlsSettings(_Section):
    """TLS of the gRPC ports; the files may be rotated while the server runs."""

    cert_file: str = Field(default="", description="PEM certificate chain of the server; empty = no TLS")
    key_file: str = Field(default="", description="PEM private key of the server, not encrypted")
    client_ca_file: str = Field(default="", description="CAs of client certificates, which are required then (mTLS)")
    admin_client_ca_file: str = Field(
        default="", description="The same for `admin_listen`; empty = those of `client_ca_file`"
    )
    revoked_file: str = Field(
        default="", description="SHA-256 fingerprints of client certificates to turn away, one a line"
    )

    @model_validator(mode="after")
    def _complete(self) -> "TlsSettings":
        if bool(self.cert_file) != bool(self.key_file):
            raise _WrongField("key_file" if self.cert_file else "cert_file", "is required too")
        for key in ("client_ca_file", "admin_client_ca_file"):
            if getattr(self, key) and not self.cert_file:
                raise _WrongField(key, "needs cert_file and key_file")
        if self.revoked_file and not (self.client_ca_file or self.admin_client_ca_file):
            raise _WrongField("revoked_file", "needs client_ca_file")
        return self


class ReviewSection(_Section):
    """Kubernetes TokenReview of bearer tokens."""

    url: str = Field(default="", description="API server, `https://...`; empty = tokens come from files only")
    ca_file: str = Field(default="", description="CA of the API server; empty = the system's")
    token_file: str = Field(default="", description="The server's own token for the API server")
    audiences: tuple[Name, ...] = Field(default=(), description="Audiences of which a token must have one")
    users: tuple[Name, ...] = Field(default=(), description="Users let in to read; empty = every authenticated one")
    admin_users: tuple[Name, ...] = Field(default=(), description="Users let in to operate")
    timeout_seconds: Seconds = Field(default=2.0, gt=0, description="Wait for the API server's answer")

    @model_validator(mode="after")
    def _https(self) -> "ReviewSection":
        if self.url and not self.url.startswith("https://"):
            raise _WrongField("url", "must start with https://")
        return self


class AuthSettings(_Section):
    """Bearer tokens of callers; without any of these everybody who reaches a port may use it."""

    tokens_file: str = Field(default="", description="Tokens that may read, one a line; may be rotated")
    admin_tokens_file: str = Field(default="", description="Tokens that may read and operate, one a line")
    review: ReviewSection = Field(default=ReviewSection(), description="Kubernetes TokenReview")

    @model_validator(mode="after")
    def _admins(self) -> "AuthSettings":
        if self.tokens_file and not self.admin_tokens_file and not self.review.url:
            raise _WrongField("admin_tokens_file", "is required with tokens_file, or nobody could operate the server")
        return self


class PageSettings(_Section):
    """The page for people on `metrics_listen`."""

    enabled: bool = Field(default=True, description="Serve the page at `/`")
    prompt: bool = Field(
        default=False,
        description="Let it ask who holds a prompt; with `auth` for a bearer token, without for everybody",
    )


class HttpSettings(_Section):
    """`/query` and `/query_by_hash` by HTTP and JSON, plain text on the wire."""

    listen: Address | None = Field(default=None, description="HTTP address; unset = off, port 0 picks a free one")
    max_connections: Integer = Field(default=64, ge=1, le=4096, description="Open connections; each has a thread")
    request_seconds: Seconds = Field(default=10.0, gt=0, description="Time for a request to come, and for its answer")


class StoreSettings(_Section):
    """An index kept in Valkey or Redis, shared by all replicas, instead of one in each process."""

    mode: Literal["single", "sentinel", "cluster"] = Field(default="single", description="How the store is reached")
    addresses: tuple[Address, ...] = Field(
        default=(),
        description="Of the server, of the sentinels, or of some nodes of the cluster; empty = the index is kept here",
    )
    sentinel_service: str = Field(default="", description="What the sentinels call the server")
    database: Integer = Field(default=0, ge=0, description="Number of the database; a cluster has only 0")
    username: str = Field(default="", description="ACL user; empty = the default one")
    password_file: str = Field(default="", description="File with the user's password; empty = none")
    tls: bool = Field(default=False, description="Connect by TLS, and check the server's certificate")
    ca_file: str = Field(default="", description="CA of the store's certificate; empty = the system's")
    cert_file: str = Field(default="", description="Client certificate, where the store asks for one")
    key_file: str = Field(default="", description="Its private key")
    timeout_seconds: Seconds = Field(default=0.5, gt=0, description="Wait for an answer; beyond it the store is away")
    connect_timeout_seconds: Seconds = Field(default=0.5, gt=0, description="Wait for a connection")
    max_connections: Integer = Field(default=16, ge=2, le=1024, description="Connections to the store, or to each node")
    prefix: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:-]{1,32}$")] = Field(
        default="kvindex", description="What all keys begin with; one for each fleet that shares a store"
    )
    partitions: Integer = Field(
        default=1, ge=1, le=64, description="Parts of a model's index that may lie on different nodes of a cluster"
    )
    lease_seconds: Seconds = Field(
        default=10.0, ge=1, le=600, description="A replica that is silent for so long loses its streams to another one"
    )
    linger_seconds: Seconds = Field(default=0.002, le=1, description="Wait for more changes before a batch is sent")
    batch_blocks: Integer = Field(default=1024, ge=1, le=8192, description="Blocks changed by one batch")
    max_changes: Integer = Field(
        default=1_048_576,
        ge=1024,
        description="Changes of a stream kept for a store that is away; then all is sent anew",
    )

    def nodes(self) -> list[tuple[str, int]]:
        """(host, port) of each address."""
        return [(host.strip("[]"), port) for host, port in map(split_address, self.addresses)]

    @model_validator(mode="after")
    def _complete(self) -> "StoreSettings":
        if self.mode == "single" and len(self.addresses) > 1:
            raise _WrongField("addresses", "must be one, unless mode is sentinel or cluster")
        if self.mode == "sentinel" and self.addresses and not self.sentinel_service:
            raise _WrongField("sentinel_service", "is required when mode is sentinel")
        if self.mode == "cluster" and self.database:
            raise _WrongField("database", "must be 0 when mode is cluster")
        if bool(self.cert_file) != bool(self.key_file):
            raise _WrongField("key_file" if self.cert_file else "cert_file", "is required too")
        if (self.ca_file or self.cert_file) and not self.tls:
            raise _WrongField("tls", "must be true with ca_file or cert_file")
        return self


class LogSettings(_Section):
    """What is written to stderr."""

    format: Annotated[Literal["json", "console"], BeforeValidator(_lower)] = Field(
        default="json", description="One JSON object per line, or text for people"
    )
    level: Annotated[Literal["debug", "info", "warning", "error"], BeforeValidator(_lower)] = Field(
        default="info", description="Least severe level written"
    )
    calls: Number = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Share of the calls that get a line; above 0, failed ones all do, but for strangers'",
    )
    burst: Integer = Field(
        default=100, ge=0, description="Lines of one event per second before they are thinned out; 0 = never are"
    )
    thereafter: Integer = Field(
        default=100, ge=0, description="Of further ones within the second every so many-th is written; 0 = none"
    )


class TracingSettings(_Section):
    """Spans for OpenTelemetry; needs the extra `tracing`."""

    endpoint: Annotated[str, AfterValidator(_url_or_none)] = Field(
        default="", description="Collector, OTLP over gRPC: `http://host:4317`, or `https://` for TLS; empty = off"
    )
    ca_file: str = Field(default="", description="CA of the collector's certificate; empty = the system's")
    sample_ratio: Number = Field(
        default=0.01, ge=0, le=1, description="Share traced of the calls that bring no traceparent; with one it decides"
    )
    service_name: Name = Field(default="kvindex-server", description="`service.name` of the spans")


class Settings(_Section):
    """Everything that can be configured."""

    listen: ListenAddress = Field(
        default="0.0.0.0:50051", description="gRPC address, or `unix:/path`; port 0 picks a free one"
    )
    admin_listen: ListenAddress | None = Field(
        default=None, description="Separate address of the admin service; unset = it shares `listen`"
    )
    metrics_listen: Address = Field(
        default="0.0.0.0:9090", description="HTTP address of `/metrics`, `/healthz`, `/readyz` and the page"
    )
    models: tuple[ModelSettings, ...] = Field(default=(), description="Models known from the start")
    pods: tuple[PodSettings, ...] = Field(default=(), description="Pods subscribed to from the start")
    discovery: DiscoverySettings = Field(default=DiscoverySettings(), description="Pods found while running")
    tier_weights: Annotated[dict[str, Number], AfterValidator(_tier_weights)] = Field(
        default_factory=lambda: {"gpu": 1.0, "cpu": 0.8, "disk": 0.5},
        description="Score of one block by the best tier it lies on; unnamed tiers weigh as the lowest named",
    )
    hash_seed: Integer = Field(
        default=1337, ge=0, le=2**64 - 1, description="Seed of the block keys; above 2^53 quoted in the chart"
    )
    limits: LimitSettings = Field(default=LimitSettings(), description="Bounds on requests and memory")
    stream: StreamSettings = Field(default=StreamSettings(), description="How event streams are followed")
    placement: PlacementSettings = Field(default=PlacementSettings(), description="Placements that routers record")
    text: TextSettings = Field(default=TextSettings(), description="Tokenizing")
    snapshot: SnapshotSettings = Field(default=SnapshotSettings(), description="Surviving a restart")
    store: StoreSettings = Field(default=StoreSettings(), description="An index shared by all replicas")
    tls: TlsSettings = Field(default=TlsSettings(), description="TLS of the gRPC ports")
    auth: AuthSettings = Field(default=AuthSettings(), description="Who may call")
    server: ServerSettings = Field(default=ServerSettings(), description="The gRPC server")
    page: PageSettings = Field(default=PageSettings(), description="The page")
    http: HttpSettings = Field(default=HttpSettings(), description="Queries by HTTP")
    log: LogSettings = Field(default=LogSettings(), description="Logging")
    tracing: TracingSettings = Field(default=TracingSettings(), description="Spans for OpenTelemetry")

    @model_validator(mode="after")
    def _consistent(self) -> "Settings":
        self._check_addresses()
        self._check_transport()
        self._check_plain()
        self._check_dial_in()
        self._check_names()
        self._check_pods()
        return self

    def _check_addresses(self) -> None:
        taken: list[tuple[str, str, int]] = []
        addresses = {key: getattr(self, key) for key in ("listen", "metrics_listen", "admin_listen")}
        for key, address in {**addresses, "http.listen": self.http.listen}.items():
            if address is None:
                continue
            if address.startswith("unix:"):
                if key == "admin_listen" and self.admin_listen == self.listen:
                    raise _WrongField(key, "is the same address as listen")
                continue
            host, port = split_address(address)
            for other, other_host, other_port in taken:
                same_host = host == other_host or host in _WILDCARDS or other_host in _WILDCARDS
                if port and port == other_port and same_host:
                    raise _WrongField(key, f"is the same address as {other}")
            taken.append((key, host, port))

    def _check_transport(self) -> None:
        if self.server.transport == "native":
            wanted = {
                "tls.cert_file": self.tls.cert_file,
                "auth.review.url": self.auth.review.url,
                "server.max_connection_age_seconds": self.server.max_connection_age_seconds,
            }
            for key, given in wanted.items():
                if given:
                    raise _WrongField("server.transport", f"native does not go with {key}")

    def _check_plain(self) -> None:
        # Neither port has TLS: each would let in those whom the gRPC port asks for a certificate.
        for key, given in (("page.prompt", self.page.prompt), ("http.listen", self.http.listen)):
            if given and self.tls.cert_file:
                raise _WrongField(key, "is plain HTTP and does not go with tls.cert_file")

    def _check_dial_in(self) -> None:
        if self.discovery.dial_in.endpoint and self.stream.curve_keys_file:
            raise _WrongField("discovery.dial_in.endpoint", "does not go with stream.curve_keys_file")

    def _check_names(self) -> None:
        seen: dict[str, str] = {}
        for index, model in enumerate(self.models):
            keys = [(f"models[{index}].name", model.name)]
            keys += [(f"models[{index}].aliases[{i}]", alias) for i, alias in enumerate(model.aliases)]
            keys += [(f"models[{index}].loras[{i}]", lora) for i, lora in enumerate(model.loras)]
            for key, name in keys:
                if name in seen:
                    raise _WrongField(key, f"the name {name!r} is already used by {seen[name]}")
                seen[name] = key

    def _check_pods(self) -> None:
        names = {name: model.name for model in self.models for name in (*model.aliases, *model.loras)}
        seen: dict[tuple[str, str], int] = {}
        ports: dict[tuple[str, int, str], int] = {}
        for index, pod in enumerate(self.pods):
            first = seen.setdefault((pod.pod, names.get(pod.model, pod.model)), index)
            if first != index:
                raise _WrongField(f"pods[{index}].pod", f"{pod.pod!r} is already given by pods[{first}]")
            # Two pods reading one publisher would both be credited with its blocks.
            host, port = split_tcp(pod.endpoint, "endpoint")
            for rank in range(pod.ranks):
                first = ports.setdefault((host, port + rank, pod.topic), index)
                if first != index:
                    raise _WrongField(
                        f"pods[{index}].endpoint",
                        f"port {port + rank} (rank {rank}) is read by pods[{first}] too, with the same topic",
                    )


def load_settings(
    argv_overrides: Mapping[str, object],
    env: Mapping[str, str],
    file: Path | None,
    *,
    tokenizers: Mapping[str, str] | None = None,
) -> Settings:
    """Settings by precedence: flags, then environment, then file, then defaults. ConfigError when wrong.

    `argv_overrides` has dotted keys ("log.format"); None means the flag was not given. `tokenizers` maps a
    model's name to a directory and adds to `models`.
    """
    sources: dict[tuple[str | int, ...], str] = {}
    values: dict[str, Any] = {}
    if file is not None:
        values = _read_yaml(file)
        sources[()] = str(file)
    for name, path, value in _from_env(env):
        _put(values, path, value, name)
        sources[path] = name
    for key, value in argv_overrides.items():
        if value is not None:
            path = tuple(key.split("."))
            flag = f"--{key.replace('.', '-').replace('_', '-')}"
            _put(values, path, value, flag)
            sources[path] = flag
    if tokenizers:
        values["models"] = _with_tokenizers(values.get("models"), tokenizers)
    try:
        settings = Settings.model_validate(values)
    except ValidationError as error:
        raise _config_error(error, sources) from None
    for index, model in enumerate(settings.models):
        if model.tokenizer is not None and not Path(model.tokenizer).is_dir():
            raise ConfigError(f"models[{index}].tokenizer", f"{model.tokenizer} is not a directory")
    for index, directory in enumerate(settings.text.tokenizer_dirs):
        if not Path(directory).is_dir():
            raise ConfigError(f"text.tokenizer_dirs[{index}]", f"{directory} is not a directory")
    return settings


def load_pods(file: Path) -> tuple[PodSpec, ...]:
    """The pods of a file that holds the list `pods` and nothing else. ConfigError when anything in it is wrong."""
    document = _read_document(file)
    if not isinstance(document, list):
        raise ConfigError(str(file), "must be a list of pods; `[]` is none")
    try:
        settings = Settings.model_validate({"pods": document})
    except ValidationError as error:
        raise _config_error(error, {(): str(file)}) from None
    return tuple(pod.spec() for pod in settings.pods)


@dataclass(frozen=True, slots=True)
class Described:
    """One row of the reference table."""

    key: str
    environment: str
    type: str
    default: str
    meaning: str


def describe() -> list[Described]:
    """Every setting, in the schema's order."""
    return list(_describe(Settings, ()))


def settings_table() -> str:
    """The reference table of docs/configuration.md."""
    rows = ["| key | environment | type | default | meaning |", "|---|---|---|---|---|"]
    for row in describe():
        environment = f"`{row.environment}`" if row.environment else ""
        default = f"`{row.default}`" if row.default not in ("", "required") else row.default
        rows.append(f"| `{row.key}` | {environment} | {row.type} | {default} | {row.meaning} |")
    return "\n".join(rows) + "\n"


def _describe(section: type[BaseModel], path: tuple[str, ...]) -> Iterator[Described]:
    for name, field in section.model_fields.items():
        here = (*path, name)
        inner = _inner_section(field.annotation)
        is_list = get_origin(field.annotation) is tuple
        if inner is not None and not is_list:
            yield from _describe(inner, here)
            continue
        default = "required" if field.is_required() else _shown(field.get_default(call_default_factory=True))
        # Members of a list have no variable of their own: the list is given whole, as JSON.
        in_list = any(part.endswith("[]") for part in path)
        environment = "" if in_list else PREFIX + "__".join(here).upper()
        meaning = field.description or ""
        yield Described(".".join(here), environment, _type_name(field.annotation), default, meaning)
        if inner is not None:
            yield from _describe(inner, (*path, f"{name}[]"))


def _shown(default: object) -> str:
    if default is None or default == "":
        return ""
    if isinstance(default, tuple):
        return json.dumps(list(default))
    return default if isinstance(default, str) else json.dumps(default)


def _type_name(annotation: Any) -> str:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type_name(args[0])
    if origin in (Union, types.UnionType):
        return " or ".join(_type_name(arg) for arg in args if arg is not type(None))
    if origin is Literal:
        return " or ".join(f"`{arg}`" for arg in args)
    if origin is tuple:
        return f"list of {_type_name(args[0])}s"
    if origin is dict:
        return f"map of {_type_name(args[1])}s"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "mapping"
    return {str: "string", int: "integer", float: "number", bool: "boolean"}[annotation]


def _inner_section(annotation: Any) -> type[BaseModel] | None:
    if get_origin(annotation) is tuple:
        annotation = get_args(annotation)[0]
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return None


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML silently lets the last of two equal keys win; here that is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[object] = set()
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode) and key_node.tag != "tag:yaml.org,2002:merge":
                if key_node.value in seen:
                    raise yaml.MarkedYAMLError(
                        problem=f"key {key_node.value} is given twice", problem_mark=key_node.start_mark
                    )
                seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def _read_document(file: Path) -> object:
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(str(file), f"cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(str(file), "is not UTF-8") from None
    try:
        document = yaml.load(text, Loader=_UniqueKeyLoader)  # a SafeLoader: builds plain data only
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ConfigError(str(file), f"{line}{error.problem or 'is not valid YAML'}") from None
    except (yaml.YAMLError, ValueError, RecursionError):
        raise ConfigError(str(file), "is not valid YAML") from None
    return cast(object, document)


def _read_yaml(file: Path) -> dict[str, Any]:
    document = _read_document(file)
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise ConfigError(str(file), "must be a mapping of settings")
    for key in document:
        if not isinstance(key, str):
            raise ConfigError(str(key), f"unknown key (from {file})")
    return document


def _from_env(env: Mapping[str, str]) -> Iterator[tuple[str, tuple[str, ...], object]]:
    # Sorted, a section comes before its members, so that KVINDEX_LIMITS__MAX_PODS refines KVINDEX_LIMITS.
    for name in sorted(name for name in env if name.startswith(PREFIX)):
        path = tuple(name.removeprefix(PREFIX).lower().split("__"))
        annotation: Any = Settings
        for part in path:
            fields = annotation.model_fields if _is_section(annotation) else {}
            if part not in fields or name != name.upper():
                annotation = None
                break
            annotation = fields[part].annotation
        if annotation is None:
            if _SERVICE_LINK.search(name):
                continue
            known = [row.environment for row in describe()]
            raise ConfigError(name, "unknown setting" + _suggestion(name, known))
        yield name, path, _env_value(name, env[name], annotation)


def _env_value(name: str, text: str, annotation: Any) -> object:
    if _is_section(annotation) or get_origin(annotation) in (tuple, dict):
        try:
            return cast(object, json.loads(text))
        except (ValueError, RecursionError):
            raise ConfigError(name, "is not valid JSON") from None
    if not text and type(None) in get_args(annotation):
        return None
    return text


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _put(values: dict[str, Any], path: tuple[str, ...], value: object, source: str) -> None:
    """Set one value, going into sections and replacing anything else."""
    for depth, part in enumerate(path[:-1]):
        inner = values.get(part)
        if inner is None:
            inner = {}
        if not isinstance(inner, dict):
            raise ConfigError(".".join(path[: depth + 1]), f"must be a mapping, to be refined by {source}")
        values[part] = dict(inner)
        values = values[part]
    section = values.get(path[-1])
    if isinstance(section, dict) and isinstance(value, dict) and path[-1] != "tier_weights":
        value = {**section, **value}
    values[path[-1]] = value


def _with_tokenizers(models: object, tokenizers: Mapping[str, str]) -> object:
    if models is None:
        models = []
    if not isinstance(models, list):
        return models  # the schema says what is wrong with it
    merged = [dict(model) if isinstance(model, dict) else model for model in models]
    for name, directory in tokenizers.items():
        for model in merged:
            if isinstance(model, dict) and model.get("name") == name:
                model["tokenizer"] = directory
                break
        else:
            merged.append({"name": name, "tokenizer": directory})
    return merged


def _config_error(error: ValidationError, sources: Mapping[tuple[str | int, ...], str]) -> ConfigError:
    """The first thing wrong, in the user's words."""
    first = error.errors(include_url=False, include_input=False)[0]
    location = tuple(part for part in first["loc"] if part != "[key]")
    key = ""
    for part in location:
        key += f"[{part}]" if isinstance(part, int) else f".{part}" if key else str(part)
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, _WrongField):
        key = f"{key}.{cause.key}" if key else cause.key
    if first["type"] == "extra_forbidden":
        reason = "unknown key" + _suggestion(str(location[-1]), _siblings(location))
    elif first["type"] == "missing":
        reason = "is required"
    elif cause is not None:
        reason = str(cause)
    else:
        reason = first["msg"].replace("Input should", "must").replace("Value should", "must")
        if first["type"] in ("model_type", "model_attributes_type"):
            reason = "must be a mapping"
    top = location or tuple(re.split(r"[.\[]", key)[:1])
    for length in range(len(top), -1, -1):
        if top[:length] in sources:
            return ConfigError(key, f"{reason} (from {sources[top[:length]]})")
    return ConfigError(key, reason)


def _siblings(location: tuple[str | int, ...]) -> list[str]:
    section: Any = Settings
    for part in location[:-1]:
        if isinstance(part, str) and _is_section(section) and part in section.model_fields:
            section = _inner_section(section.model_fields[part].annotation)
    return list(section.model_fields) if _is_section(section) else []


def _suggestion(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, [each for each in known if each], n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _one_line(text: str) -> str:
    return " ".join(text.split())
