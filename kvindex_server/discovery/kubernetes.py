"""Follows the engines' pods of a cluster: list, watch, list anew when the server has forgotten, wait when it fails."""

import logging
import random
import threading
import time
from collections.abc import Callable

from kvindex_server.config import DiscoveryDefaults, KubernetesSettings
from kvindex_server.discovery.api import ApiFailed, Event, Gone, Object, PodsApi
from kvindex_server.discovery.describe import NotDescribed, describe
from kvindex_server.discovery.engine import Engines, EventSources, Known, Life
from kvindex_server.discovery.kubepod import KubePod, read_pod
from kvindex_server.discovery.source import NOT_ANSWERED, Backoff, Changed, Found, Progress, Refusals, Sight
from kvindex_server.pods import host

_log = logging.getLogger(__name__)

FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0
STEADY_SECONDS = 5.0
"""A watch that lasted so long has worked: the next failure starts with the shortest wait again."""


class KubernetesSource:
    """The pods of the configured namespaces. One thread lists and watches each namespace."""

    name = "kubernetes"

    def __init__(
        self,
        settings: KubernetesSettings,
        defaults: DiscoveryDefaults,
        *,
        waits: tuple[float, float] = (FIRST_WAIT, LONGEST_WAIT),
        chance: random.Random | None = None,
    ) -> None:
        """ConfigError when the client is missing or there are no credentials."""
        self._settings = settings
        self._defaults = defaults
        first = PodsApi(settings.kubeconfig)
        namespaces = tuple(dict.fromkeys(settings.namespaces)) or (first.namespace,)
        self.progress = Progress(self.name, namespaces)
        self._engines = Engines(self.progress) if defaults.ask_engine else None
        # What the engine of a pod answered in its last life stands until its present one answers.
        self._last_answer: dict[str, EventSources] = {}
        self._refusals = Refusals(self.name)
        self._changed: Changed = lambda: None
        apis = [first, *(PodsApi(settings.kubeconfig) for _ in namespaces[1:])]
        self._parts = [
            _Namespace(each, api, settings, self.progress, Backoff(*waits, chance), self._notify)
            for each, api in zip(namespaces, apis, strict=True)
        ]

    def start(self, changed: Changed) -> None:
        """List and watch from now on."""
        self._changed = changed
        if self._engines is not None:
            self._engines.start(changed)
        for part in self._parts:
            part.start()

    def stop(self) -> None:
        """End the watches."""
        for part in self._parts:
            part.halt()
        if self._engines is not None:
            self._engines.stop()
        for part in self._parts:
            part.join(timeout=2.0)

    def look(self) -> Sight:
        """The pods that run, and which of them cannot be described."""
        found: dict[str, Found] = {}
        refusals = self._refusals.begin()
        known: dict[Life, Known] = {}
        listed = all(part.listed for part in self._parts)  # before the pods are taken, or some may be missing
        # Newest first: where an address is used again before the old pod is known to be gone, the new one counts.
        pods = sorted((pod for part in self._parts for pod in part.pods()), key=_age, reverse=True)
        for pod in pods:
            if not pod.running or not pod.ip or (self._settings.ready_only and not pod.ready):
                continue
            try:
                each = self._found(pod, known)
            except NotDescribed as problem:
                refusals.add(f"{pod.namespace}/{pod.name}", problem.reason, problem.detail)
                continue
            if found.setdefault(each.spec.pod, each) is not each:
                refusals.add(f"{pod.namespace}/{pod.name}", "same_name", "a newer pod has this name")
        if self._engines is not None:
            self._engines.keep(known)
            uids = {pod.uid for pod in pods}
            self._last_answer = {uid: answer for uid, answer in self._last_answer.items() if uid in uids}
        whole = listed and all(each.asked for each in known.values())
        return Sight(list(found.values()), refusals.end(), whole)

    def _found(self, pod: KubePod, known: dict[Life, Known]) -> Found:
        if pod.problem is not None:
            raise pod.problem
        port = pod.told.serving_port or self._defaults.serving_port
        sources: EventSources | None = None
        if self._engines is not None and pod.told.events_port is None:
            # An engine that becomes Ready is asked at once, however long it was to be waited for.
            life = (f"{pod.life}/{pod.ready}", host(pod.ip), port)
            known[life] = self._engines.known(life)
            sources = known[life].sources
            if sources is not None:
                self._last_answer[pod.uid] = sources
            elif not known[life].answered:
                sources = self._last_answer.get(pod.uid)
                if sources is None:
                    raise NotDescribed(NOT_ANSWERED, "the engine has not told yet where it publishes")
        fields = {"ip": host(pod.ip), "port": port, "name": pod.name, "namespace": pod.namespace}
        name = self._settings.pod_name.format(**fields)
        return Found(describe(name, pod.ip, pod.told, sources, self._defaults, pod.life), pod.ready)

    def _notify(self) -> None:
        self._changed()


def _age(pod: KubePod) -> tuple[str, int, str, str]:
    # Creation times have whole seconds; the version tells what the server heard of last.
    return pod.created, len(pod.version), pod.version, pod.uid


class _Namespace(threading.Thread):
    """Keeps the pods of one namespace, as the server tells them."""

    def __init__(
        self,
        namespace: str,
        api: PodsApi,
        settings: KubernetesSettings,
        progress: Progress,
        backoff: Backoff,
        changed: Callable[[], None],
    ) -> None:
        super().__init__(name=f"kubernetes-{namespace}", daemon=True)
        self._namespace = namespace
        self._api = api
        self._settings = settings
        self._progress = progress
        self._backoff = backoff
        self._changed = changed
        self._halt = threading.Event()
        self._lock = threading.Lock()
        self._pods: dict[str, KubePod] = {}
        self._gone: set[str] = set()
        self.listed = False

    def pods(self) -> list[KubePod]:
        """Every pod the server has told of and not taken back."""
        with self._lock:
            return list(self._pods.values())

    def halt(self) -> None:
        """End soon, also out of a watch that says nothing."""
        self._halt.set()
        self._api.interrupt()

    def run(self) -> None:
        """List and watch until halted."""
        while not self._halt.is_set():
            try:
                self._follow(self._list())
            except Gone:
                self._progress.failed("gone", part=self._namespace, lost=False)
            except ApiFailed as failed:
                if not self._halt.is_set():
                    self._progress.failed(failed.reason, str(failed), self._namespace)
            except Exception:  # noqa: BLE001 - a Pod object that surprises must not end discovery
                if self._halt.is_set():  # an interrupted TLS read may fail in any way
                    break
                self._progress.failed("internal", part=self._namespace)
                _log.exception("discovery turn failed")
            self._halt.wait(self._backoff.next())
        self._api.close()

    def _list(self) -> str:
        version, documents = self._api.list(self._namespace, self._settings.selector)
        pods: dict[str, KubePod] = {}
        for document in documents:
            pod = self._read(document)
            if pod is not None:
                pods[pod.uid] = pod
        with self._lock:
            self._pods = pods
            self._gone.clear()
        self.listed = True
        self._progress.succeeded(self._namespace)
        self._changed()
        return version

    def _follow(self, version: str) -> None:
        """Watch from `version` on; returns when it is time to list anew."""
        ends = time.monotonic() + self._settings.relist_seconds
        while not self._halt.is_set():
            left = ends - time.monotonic()
            if left <= 0:
                self._backoff.reset()
                return
            began = time.monotonic()
            try:
                seconds = min(self._settings.watch_seconds, left)
                for event in self._api.watch(self._namespace, self._settings.selector, version, seconds):
                    version = event.version
                    self._take(event)
                    self._backoff.reset()
            except Gone:
                raise
            except ApiFailed as failed:
                if self._halt.is_set():
                    return
                # What was heard so far stands, and the watch goes on where it broke off.
                self._progress.failed(failed.reason, str(failed), self._namespace)
                self._halt.wait(self._backoff.next())
                continue
            self._progress.succeeded(self._namespace)
            lasted = time.monotonic() - began
            if lasted >= min(STEADY_SECONDS, seconds / 2):
                self._backoff.reset()
            else:  # a server that ends every watch at once must not be asked without a pause
                self._halt.wait(self._backoff.next())

    def _take(self, event: Event) -> None:
        self._progress.succeeded(self._namespace)
        if event.kind == "BOOKMARK":
            return
        pod = self._read(event.object)
        if pod is None:
            return
        with self._lock:
            standing = self._pods.get(pod.uid)
            if event.kind == "DELETED":
                self._pods.pop(pod.uid, None)
                # A deleted pod never returns: whatever is still heard of it is late news.
                self._gone.add(pod.uid)
            elif event.kind in ("ADDED", "MODIFIED"):
                if pod.uid in self._gone or (standing is not None and _older(pod.version, standing.version)):
                    return
                self._pods[pod.uid] = pod
        self._changed()

    def _read(self, document: Object) -> KubePod | None:
        try:
            return read_pod(document, self._settings)
        except (KeyError, TypeError, AttributeError):
            self._progress.failed("bad_pod", part=self._namespace, lost=False)
            return None


def _older(version: str, than: str) -> bool:
    """Versions of one object are compared as numbers; those that are none are taken as newer."""
    return version.isdigit() and than.isdigit() and int(version) < int(than)
