"""Whether endpoints accept a TCP connection right now: many at once, in bounded time."""

import errno
import os
import selectors
import socket
import time
from collections.abc import Iterable

from kvindex_server.pods import split_tcp

ACCEPTED = ""
NO_ANSWER = "no answer"


def reach(endpoints: Iterable[str], seconds: float) -> dict[str, str]:
    """By `tcp://host:port`: empty when it accepts a connection, else why not.

    Names are resolved one after another; an endpoint for which no time was left is not in the answer.
    """
    ends = time.monotonic() + seconds
    found: dict[str, str] = {}
    with selectors.DefaultSelector() as selector:
        try:
            for endpoint in dict.fromkeys(endpoints):
                if time.monotonic() >= ends:
                    break
                _begin(selector, endpoint, found)
            while selector.get_map() and (left := ends - time.monotonic()) > 0:
                for key, _ in selector.select(left):
                    found[key.data] = _reason(_socket(key).getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))
                    _close(selector, key)
        finally:
            for key in list(selector.get_map().values()):
                found[key.data] = NO_ANSWER
                _close(selector, key)
    return found


def _begin(selector: selectors.BaseSelector, endpoint: str, found: dict[str, str]) -> None:
    host, port = split_tcp(endpoint, "endpoint")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
    except OSError:
        found[endpoint] = "name not found"
        return
    probe = socket.socket(family, kind, protocol)
    probe.setblocking(False)
    code = probe.connect_ex(address)
    if code in (0, errno.EINPROGRESS):
        selector.register(probe, selectors.EVENT_WRITE, endpoint)
    else:
        probe.close()
        found[endpoint] = _reason(code)


def _socket(key: selectors.SelectorKey) -> socket.socket:
    assert isinstance(key.fileobj, socket.socket)
    return key.fileobj


def _close(selector: selectors.BaseSelector, key: selectors.SelectorKey) -> None:
    probe = _socket(key)
    selector.unregister(probe)
    probe.close()


def _reason(code: int) -> str:
    return os.strerror(code).lower() if code else ACCEPTED
