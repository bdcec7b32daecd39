"""The other replicas: the addresses behind their names, this replica's own left out, and how to call one."""

import ipaddress
import logging
import socket
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc

from kvindex_server.pods import host

_log = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 20
_CONNECT_MS = 2_000

Resolve = Callable[[str], Iterable[tuple[str, str]]]
"""(address to dial, name) of every replica behind `host:port`. OSError when the name has no addresses."""


def resolve(address: str) -> Iterable[tuple[str, str]]:
    """By the system's resolver; a socket's path stands for itself."""
    if address.startswith("unix:"):
        yield address, ""
        return
    name, port = _split(address)
    for *_, found in socket.getaddrinfo(name, int(port), type=socket.SOCK_STREAM):
        ip = str(found[0])
        yield f"{host(ip)}:{port}", name


@dataclass(frozen=True, slots=True)
class Peers:
    """Where to ask, in this order, and how."""

    addresses: Sequence[str]
    timeout: float
    token_file: str = ""
    ca_file: str = ""
    own: str = ""
    """Where this replica serves the same itself; empty when that is not known yet."""
    resolve: Resolve = resolve

    def found(self) -> list[tuple[str, str]]:
        """(address to dial, name it was found by), as names resolve now; not the own one, and none twice."""
        found: dict[str, str] = {}
        for address in self.addresses:
            try:
                for each, name in self.resolve(address):
                    if not self._is_own(each):
                        found.setdefault(each, name)
            except (OSError, ValueError) as error:  # a name that cannot be encoded is a ValueError
                _log.warning("peers not found", extra={"fields": {"peer": address, "reason": str(error)}})
        return list(found.items())

    def _is_own(self, address: str) -> bool:
        if address.startswith("unix:") or not self.own or self.own.startswith("unix:"):
            return address == self.own
        (host, port), (own_host, own_port) = _split(address), _split(self.own)
        if port != own_port:
            return False
        own = ipaddress.ip_address(own_host) if _is_ip(own_host) else None
        return host == own_host or (own is not None and own.is_unspecified and _is_here(host))

    def channel(self, address: str, name: str = "") -> grpc.Channel:
        """A channel to a peer, whose certificate is for `name` when that is not what is dialled."""
        options: list[tuple[str, int | str]] = [
            ("grpc.max_receive_message_length", 4 * CHUNK_BYTES),
            # A replica that starts, which may be this one, has its port open and does not answer yet.
            ("grpc.min_reconnect_backoff_ms", _CONNECT_MS),
            # A new channel is to be a new connection: the old one may be dead without anybody having said so.
            ("grpc.use_local_subchannel_pool", 1),
        ]
        if name and self.ca_file:
            options.append(("grpc.ssl_target_name_override", name))
        if not self.ca_file:
            return grpc.insecure_channel(address, options)
        credentials = grpc.ssl_channel_credentials(Path(self.ca_file).read_bytes())
        return grpc.secure_channel(address, credentials, options)

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What a call to a peer carries. OSError when the token cannot be read."""
        if not self.token_file:
            return ()
        lines = Path(self.token_file).read_text(encoding="utf-8").splitlines()
        token = next((line.strip() for line in lines if line.strip() and not line.startswith("#")), "")
        return (("authorization", f"Bearer {token}"),)


def _split(address: str) -> tuple[str, str]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), port


def _is_ip(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _is_here(host: str) -> bool:
    """Whether what is sent to this address stays on this machine (or in this pod)."""
    if not _is_ip(host):
        return False
    ip = ipaddress.ip_address(host)
    if ip.is_loopback:
        return True
    # The way to an own address begins at that address. Nothing is sent, and binding would say yes to anything where
    # the kernel allows foreign addresses.
    with socket.socket(socket.AF_INET6 if ip.version == 6 else socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))
        except OSError:
            return False
        return str(probe.getsockname()[0]) == host
