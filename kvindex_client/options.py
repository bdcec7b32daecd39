"""How calls are made: deadlines, tries, hedging, TLS and tokens."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import grpc

HEALTH_SERVICE = "kvindex.v1.KVIndex"
"""The name under which the read path's health is served."""


@dataclass(frozen=True, slots=True)
class Tls:
    """PEM data; `ca` None means the system's. `cert` and `key` are the client's own, for mTLS."""

    ca: bytes | None = None
    cert: bytes | None = None
    key: bytes | None = field(default=None, repr=False)
    server_name: str = ""
    """Name in the server's certificate, when it is not the endpoint's."""


@dataclass(frozen=True, slots=True)
class Options:
    """Everything in seconds. ValueError for values without sense."""

    timeout: float = 1.0
    """Of one call with all its tries; every call can have its own."""
    tries: int = 3
    """At most, hedges included."""
    hedge_after: float | None = None
    """A read without an answer for so long is asked of one more endpoint; None = never."""
    backoff: float = 0.05
    """First pause of an endpoint that failed without saying how long; doubles, up to `backoff_max`."""
    backoff_max: float = 2.0
    retry_budget: float = 10.0
    """Extra tries in a row before they must be earned; each answer earns `retry_ratio` of one."""
    retry_ratio: float = 0.1
    tls: Tls | None = None
    token: str | Callable[[], str] | None = field(default=None, repr=False)
    """Bearer token, or what returns the current one; it is asked at every try."""
    headers: Callable[[], Mapping[str, str]] | None = field(default=None, repr=False)
    """What else is sent, such as a `traceparent`; asked at every try, by the thread or task that makes the call."""
    max_answer_bytes: int = 64 << 20

    def __post_init__(self) -> None:
        positive = {"timeout": self.timeout, "backoff": self.backoff, "tries": self.tries}
        for name, value in positive.items():
            if not value > 0:
                raise ValueError(f"options: {name} must be above 0")
        if self.hedge_after is not None and not self.hedge_after >= 0:
            raise ValueError("options: hedge_after must not be negative")

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Of one try."""
        sent = tuple(self.headers().items()) if self.headers is not None else ()
        if self.token is None:
            return sent
        token = self.token if isinstance(self.token, str) else self.token()
        return (*sent, ("authorization", f"Bearer {token}"))

    def unhedged(self) -> "Options":
        """The same for a call that has one connection at a time."""
        return replace(self, hedge_after=None)

    def credentials(self) -> grpc.ChannelCredentials | None:
        """None for a plain connection."""
        if self.tls is None:
            return None
        return grpc.ssl_channel_credentials(self.tls.ca, self.tls.key, self.tls.cert)

    def channel_arguments(self, *, watched: bool = True) -> list[tuple[str, str | int]]:
        """Of one endpoint's channel: a connection of its own, quick to come back.

        When `watched` by grpc.health.v1, calls fail at once while the endpoint is not serving.
        """
        service_config = {
            # Health is watched under round_robin only; there is one address to it all the same.
            "loadBalancingConfig": [{"round_robin": {}}],
            "healthCheckConfig": {"serviceName": HEALTH_SERVICE},
        }
        arguments: list[tuple[str, str | int]] = [
            ("grpc.service_config", json.dumps(service_config if watched else {})),
            # Retries are this client's own: it knows the other endpoints.
            ("grpc.enable_retries", 0),
            # Two endpoints of one address are two connections, so that a hedge does not queue behind the first try.
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.min_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 2000),
            ("grpc.max_receive_message_length", self.max_answer_bytes),
        ]
        if self.tls is not None and self.tls.server_name:
            arguments.append(("grpc.ssl_target_name_override", self.tls.server_name))
        return arguments
