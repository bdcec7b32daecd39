"""Follows the engines that dial into one endpoint and name pod and model in their topic: `kv@POD@MODEL`."""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from kvindex_server import listening
from kvindex_server._core import Listener
from kvindex_server.config import ConfigError, DialInSettings, DiscoveryDefaults
from kvindex_server.discovery.source import Changed, Found, Progress, Refusals, Sight
from kvindex_server.errors import InvalidArgument
from kvindex_server.pods import PodSpec, at_rank, bound_address, host, named, split_tcp

_log = logging.getLogger(__name__)

LOOK_SECONDS = 0.2
MOST_KNOWN = 16_384
MOST_MODELS = 1_024
"""Pods, registered or not, and all their models so far, each of which has an index for good: whoever reaches the port
may name as many as it likes."""


@dataclass(slots=True)
class _Known:
    spec: PodSpec
    address: str
    seen: float


class DialInSource:
    """The pods whose engines have dialled in; one whose connections stay away for long enough is gone.

    Its replays are asked for at the address that its connection came from, if `replay_port` says where.
    """

    name = "dial_in"

    def __init__(
        self, settings: DialInSettings, defaults: DiscoveryDefaults, is_connected: Callable[[PodSpec], bool]
    ) -> None:
        """`is_connected` tells whether any rank of a pod's registration has a connection now."""
        self._endpoint = settings.endpoint
        self._forget_seconds = settings.forget_seconds
        self._defaults = defaults
        self._is_connected = is_connected
        self.progress = Progress(self.name)
        self._refusals = Refusals(self.name)
        self._refused: dict[str, int] = {}
        self._listeners: list[tuple[tuple[str, int], Listener]] = []
        self._known: dict[bytes, _Known] = {}  # by topic
        self._models: set[str] = set()
        self._found: tuple[Found, ...] = ()
        self._halt = threading.Event()
        self._thread = threading.Thread(target=self._run, name="dial-in", daemon=True)
        self._changed: Changed = lambda: None

    def start(self, changed: Changed) -> None:
        """Bind the endpoint of each rank. ConfigError when one is in use."""
        self._changed = changed
        for rank in range(self._defaults.ranks):
            endpoint = at_rank(self._endpoint, rank)
            name, port = split_tcp(endpoint, "endpoint")
            address = bound_address(name)
            assert address is not None, "as the configuration was checked"
            try:
                self._listeners.append(((address, port), listening.join(address, port)))
            except OSError as error:
                self.stop()
                raise ConfigError("discovery.dial_in.endpoint", f"{endpoint}: {error.strerror}") from error
        self._thread.start()

    def stop(self) -> None:
        """The endpoint is free as soon as no pod uses it any more."""
        self._halt.set()
        if self._thread.ident is not None:
            self._thread.join(timeout=1.0)
        while self._listeners:
            at, listener = self._listeners.pop()
            del listener
            listening.leave(*at)

    def look(self) -> Sight:
        """The pods that have dialled in."""
        return Sight(self._found, self._refused)

    def _run(self) -> None:
        while not self._halt.is_set():
            try:
                self._renew()
            except Exception as error:  # noqa: BLE001 - one bad look must not end discovery; the next one tries again
                self.progress.failed("internal", repr(error))
                _log.exception("looking at who has dialled in failed")
            self._halt.wait(LOOK_SECONDS)

    def _renew(self) -> None:
        now = time.monotonic()
        refusals = self._refusals.begin()
        taken = dict(each for _, listener in self._listeners for each in listener.taken())
        here = dict(each for _, listener in self._listeners for each in listener.unclaimed())
        for topic, known in list(self._known.items()):
            if topic in here or not self._is_connected(known.spec):
                continue
            known.seen = now
            if taken.get(topic, known.address) != known.address:
                here[topic] = taken[topic]  # it has come again from elsewhere
        for topic, address in here.items():
            shown = topic.decode(errors="replace")
            try:
                spec = self._describe(topic, address)
            except InvalidArgument as problem:
                refusals.add(shown, "topic", str(problem))
                continue
            if topic not in self._known and len(self._known) >= MOST_KNOWN:
                refusals.add(shown, "limit", f"{MOST_KNOWN} pods are known, which is the limit")
            elif spec.model not in self._models and len(self._models) >= MOST_MODELS:
                refusals.add(shown, "limit", f"{MOST_MODELS} models are known, which is the limit")
            else:
                self._models.add(spec.model)
                self._known[topic] = _Known(spec, address, now)
        for topic, known in list(self._known.items()):
            if now - known.seen > self._forget_seconds:
                del self._known[topic]
        self._refused = refusals.end()
        self.progress.succeeded()
        found = tuple(Found(each.spec) for each in self._known.values())
        if found != self._found:
            self._found = found
            self._changed()

    def _describe(self, topic: bytes, address: str) -> PodSpec:
        try:
            names = named(topic.decode())
        except UnicodeDecodeError:
            names = None
        if names is None:
            raise InvalidArgument("topic", "is not of the form kv@POD@MODEL")
        pod, model = names
        defaults = self._defaults
        replay = defaults.replay_port if address else 0
        return PodSpec(
            pod=pod,
            model=model,
            endpoint=self._endpoint,
            replay_endpoint=f"tcp://{host(address)}:{replay}" if replay else "",
            ranks=defaults.ranks,
            topic=topic.decode(),
            engine=defaults.engine,
            block_size=defaults.block_size,
            bind=True,
        ).validate()
