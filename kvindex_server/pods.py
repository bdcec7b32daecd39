"""What a registered pod is: its identity, model and the endpoints of its event streams."""

import ipaddress
import re
from dataclasses import dataclass

from kvindex_server.errors import InvalidArgument

MAX_RANKS = 1024
ENGINES = ("", "vllm", "sglang", "trtllm")
_TCP = re.compile(r"tcp://(\[[0-9A-Fa-f:.%]+\]|\*|[0-9A-Za-z._-]+):([0-9]{1,5})\Z")


def split_tcp(endpoint: str, field: str) -> tuple[str, int]:
    """Host and port of `tcp://host:port`; InvalidArgument naming `field` for anything else."""
    found = _TCP.match(endpoint)
    if found is None:
        raise InvalidArgument(field, "must have the form tcp://host:port")
    host, port = found.group(1), int(found.group(2))
    if not 0 < port < 65536:
        raise InvalidArgument(field, "port must be in 1..65535")
    if host.startswith("["):
        try:
            ipaddress.IPv6Address(host[1:-1].split("%")[0])
        except ValueError:
            raise InvalidArgument(field, "is not a valid IPv6 address") from None
    return host, port


def host(ip: str) -> str:
    """The address as it stands in an endpoint: IPv6 in brackets."""
    return f"[{ip}]" if ":" in ip else ip


def bound_address(host: str) -> str | None:
    """The IP address to bind for the host of an endpoint; None when that is a name."""
    try:
        return str(ipaddress.ip_address("0.0.0.0" if host == "*" else host.strip("[]")))
    except ValueError:
        return None


@dataclass(frozen=True, slots=True)
class PodSpec:
    """One registration. `endpoint` is rank 0's; rank r is at port + r on both endpoints."""

    pod: str
    model: str
    endpoint: str
    replay_endpoint: str = ""
    ranks: int = 1
    topic: str = ""
    engine: str = ""
    block_size: int = 0
    bind: bool = False
    incarnation: str = ""
    """One life of the engine, as whoever registers it knows it: another one drops every claim of the one before."""

    def validate(self) -> "PodSpec":
        """Itself, or InvalidArgument naming the first wrong field."""
        for field in ("pod", "model", "endpoint"):
            if not getattr(self, field):
                raise InvalidArgument(field, "must not be empty")
        for field in ("pod", "model", "topic", "incarnation"):
            if not getattr(self, field).isprintable():
                raise InvalidArgument(field, "has control characters")
        if len(self.topic) > 1024:
            raise InvalidArgument("topic", "is longer than 1024 characters")
        if len(self.incarnation) > 512:
            raise InvalidArgument("incarnation", "is longer than 512 characters")
        if len(self.pod) > 256:
            raise InvalidArgument("pod", "is longer than 256 characters")
        if len(self.model) > 512:
            raise InvalidArgument("model", "is longer than 512 characters")
        if not 1 <= self.ranks <= MAX_RANKS:
            raise InvalidArgument("ranks", f"must be in 1..{MAX_RANKS}")
        if self.engine not in ENGINES:
            raise InvalidArgument("engine", "must be vllm, sglang, trtllm or empty")
        if not 0 <= self.block_size <= 65536:
            raise InvalidArgument("block_size", "must be in 0..65536")
        host, port = split_tcp(self.endpoint, "endpoint")
        if port + self.ranks - 1 > 65535:
            raise InvalidArgument("endpoint", "port + ranks - 1 is above 65535")
        if host == "*" and not self.bind:
            raise InvalidArgument("endpoint", "host * can only be bound; set bind or name a host")
        if self.replay_endpoint:
            replay_host, replay_port = split_tcp(self.replay_endpoint, "replay_endpoint")
            if replay_host == "*":
                raise InvalidArgument("replay_endpoint", "host * can only be bound; name the host that answers")
            if replay_port + self.ranks - 1 > 65535:
                raise InvalidArgument("replay_endpoint", "port + ranks - 1 is above 65535")
            if replay_host == host and abs(replay_port - port) < self.ranks:
                raise InvalidArgument("replay_endpoint", "its ports overlap those of endpoint")
        return self

    def endpoint_of(self, rank: int) -> str:
        """Where rank's events come from."""
        return at_rank(self.endpoint, rank)

    def replay_endpoint_of(self, rank: int) -> str:
        """Where rank's events can be asked for again; empty when nowhere."""
        return at_rank(self.replay_endpoint, rank) if self.replay_endpoint else ""


def bind_the_same(one: PodSpec, other: PodSpec) -> bool:
    """Both are bound here, at a port of the same number: one may be in the other's way."""
    if not (one.bind and other.bind):
        return False
    first, second = split_tcp(one.endpoint, "endpoint")[1], split_tcp(other.endpoint, "endpoint")[1]
    return first < second + other.ranks and second < first + one.ranks


def named(topic: str) -> tuple[str, str] | None:
    """(pod, model) of a topic `kv@POD@MODEL`, either of which may be empty; None of another form."""
    kind, *names = topic.split("@", 2)
    return (names[0], names[1]) if kind == "kv" and len(names) == 2 else None


def is_whole(topic: str) -> bool:
    """It names one engine, `kv@POD@MODEL`, and is not the beginning of another one's, such as `kv@POD@MODEL-large`."""
    names = named(topic)
    return names is not None and all(names)


def topics_overlap(one: str, other: str) -> bool:
    """Whether one engine's topic could be both pods'."""
    shorter, longer = sorted((one, other), key=len)
    return longer == shorter if is_whole(shorter) else longer.startswith(shorter)


def share_an_endpoint(one: PodSpec, other: PodSpec) -> bool:
    """Both are bound here, at one endpoint, and told apart by topic."""
    if not (one.topic and other.topic and bind_the_same(one, other)):
        return False
    return split_tcp(one.endpoint, "endpoint")[0] == split_tcp(other.endpoint, "endpoint")[0]


def at_rank(endpoint: str, rank: int) -> str:
    """The endpoint of a rank from that of rank 0: rank r is at port + r."""
    host, port = split_tcp(endpoint, "endpoint")
    return f"tcp://{host}:{port + rank}"
