"""Follows the pods behind headless services: every address that a name resolves to is one pod."""

import ipaddress
import socket
import threading
from collections.abc import Callable, Iterable

from kvindex_server.config import DiscoveryDefaults, DnsSettings
from kvindex_server.discovery.describe import NotDescribed, Told, describe
from kvindex_server.discovery.engine import Engines, EventSources, Known, Life
from kvindex_server.discovery.source import NOT_ANSWERED, Changed, Found, Progress, Refusals, Sight
from kvindex_server.pods import host

Resolve = Callable[[str], Iterable[str]]
"""A name's addresses. OSError when they cannot be had."""


def resolve(name: str) -> set[str]:
    """The name's A and AAAA records, by the system's resolver."""
    return {str(each[4][0]) for each in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)}


class DnsSource:
    """The addresses of the configured names. A name that does not resolve keeps its last known addresses.

    Nameservers answer the same for a service without pods and for a name they have lost, so that no records are a
    failure too: pods that are really gone show by themselves as DOWN and STALE.
    """

    name = "dns"

    def __init__(self, settings: DnsSettings, defaults: DiscoveryDefaults, resolve: Resolve = resolve) -> None:
        self._settings = settings
        self._defaults = defaults
        self._resolve = resolve
        self.progress = Progress(self.name, settings.hosts)
        self._engines = Engines(self.progress) if defaults.ask_engine else None
        self._refusals = Refusals(self.name)
        self._addresses: dict[str, frozenset[str]] = {}
        self._halt = threading.Event()
        self._thread = threading.Thread(target=self._run, name="dns", daemon=True)
        self._changed: Changed = lambda: None

    def start(self, changed: Changed) -> None:
        """Resolve now and at every interval."""
        self._changed = changed
        if self._engines is not None:
            self._engines.start(changed)
        self._thread.start()

    def stop(self) -> None:
        """Resolve no more; a resolver that hangs is left behind."""
        self._halt.set()
        if self._engines is not None:
            self._engines.stop()
        self._thread.join(timeout=1.0)

    def look(self) -> Sight:
        """One pod per address."""
        found: list[Found] = []
        refusals = self._refusals.begin()
        known: dict[Life, Known] = {}
        by_name = self._addresses
        addresses = sorted(set().union(*by_name.values()))
        port = self._defaults.serving_port
        for ip in addresses:
            name = f"{host(ip)}:{port}"
            try:
                found.append(Found(describe(name, ip, Told(), self._answer(ip, port, known), self._defaults)))
            except NotDescribed as problem:
                refusals.add(name, problem.reason, problem.detail)
        if self._engines is not None:
            self._engines.keep(known)
        whole = len(by_name) == len(set(self._settings.hosts)) and all(each.asked for each in known.values())
        return Sight(found, refusals.end(), whole)

    def _answer(self, ip: str, port: int, known: dict[Life, Known]) -> EventSources | None:
        if self._engines is None:
            return None
        life = ("", host(ip), port)
        known[life] = self._engines.known(life)
        if not known[life].answered:
            raise NotDescribed(NOT_ANSWERED, "the engine has not told yet where it publishes")
        return known[life].sources

    def _run(self) -> None:
        while not self._halt.is_set():
            for name in dict.fromkeys(self._settings.hosts):
                self._renew(name)
            self._halt.wait(self._settings.interval_seconds)

    def _renew(self, name: str) -> None:
        try:
            addresses = frozenset(_plain(each) for each in self._resolve(name))
        except (OSError, ValueError) as error:  # a name that cannot be encoded is a ValueError
            self.progress.failed("unresolved", repr(error), name)
            return
        if not addresses:
            self.progress.failed("unresolved", "no records", name)
            return
        self.progress.succeeded(name)
        if self._addresses.get(name) != addresses:
            self._addresses = {**self._addresses, name: addresses}
            self._changed()


def _plain(address: str) -> str:
    """One spelling per address, so that one pod has one name. ValueError when it is none."""
    return str(ipaddress.ip_address(address))
