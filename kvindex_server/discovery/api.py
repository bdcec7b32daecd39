"""Lists and watches pods at a Kubernetes API server; the only module that imports lightkube."""

import json
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvindex_server.config import ConfigError

if TYPE_CHECKING:
    from lightkube.config.kubeconfig import SingleConfig

PAGE = 100
"""Pods per page of a list: parsing one holds up other threads, some 20 KB of JSON a pod."""
MAX_LINE = 16 * 1024 * 1024
CONNECT_SECONDS = 10.0
READ_SECONDS = 30.0
KEY = "discovery.kubernetes"

Object = dict[str, Any]


class ApiFailed(Exception):
    """The API server did not do what was asked; `reason` is a metric's label."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(detail or reason)
        self.reason = reason


class Gone(ApiFailed):
    """410: the resource version is too old, and everything has to be listed anew."""

    def __init__(self) -> None:
        super().__init__("gone")


@dataclass(frozen=True, slots=True)
class Event:
    """One line of a watch. `kind` is ADDED, MODIFIED, DELETED or BOOKMARK."""

    kind: str
    object: Object
    version: str


class PodsApi:
    """One connection's worth of calls for one watcher; `interrupt` ends a running watch from another thread."""

    def __init__(self, kubeconfig: str = "") -> None:
        """ConfigError when lightkube is not installed or there are no credentials."""
        try:
            import httpx2  # noqa: PLC0415 - an optional extra
            from lightkube.config.client_adapter import Client, ConnectionParams  # noqa: PLC0415
        except ImportError:
            reason = "needs the Kubernetes client: pip install 'kvindex-server[kubernetes]'"
            raise ConfigError(f"{KEY}.enabled", reason) from None
        self._httpx = httpx2
        config = _credentials(kubeconfig)
        self.namespace = config.namespace
        timeout = httpx2.Timeout(READ_SECONDS, connect=CONNECT_SECONDS)
        try:
            self._client = Client(config, ConnectionParams(timeout=timeout))
        except (OSError, ValueError, AssertionError) as error:  # certificates that cannot be read, no user
            raise ConfigError(f"{KEY}.kubeconfig", f"cannot be used: {error}") from None
        self._stream: socket.socket | None = None
        self._interrupted = False

    def list(self, namespace: str, selector: str) -> tuple[str, list[Object]]:
        """(resource version, every pod that matches). `namespace` `*` means all of them."""
        pods: list[Object] = []
        params = {"labelSelector": selector, "limit": str(PAGE)}
        while True:
            try:
                page = self._page(namespace, params)
            except Gone:
                if "limit" not in params:
                    raise
                # The pages' own snapshot has expired: all in one answer.
                pods, params = [], {"labelSelector": selector}
                continue
            meta = _mapping(page, "metadata")
            items = page.get("items") or []
            if not isinstance(items, list) or not all(isinstance(each, dict) for each in items):
                raise ApiFailed("bad_answer", "a list without items")
            pods += items
            following = meta.get("continue")
            if not following:
                version = meta.get("resourceVersion")
                if not isinstance(version, str) or not version:
                    raise ApiFailed("bad_answer", "a list without a resource version")
                return version, pods
            params["continue"] = str(following)

    def watch(self, namespace: str, selector: str, version: str, seconds: float) -> Iterator[Event]:
        """What happens after `version`, until the server ends it after about `seconds`. Gone when it is too old."""
        params = {
            "labelSelector": selector,
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": version,
            "timeoutSeconds": str(max(1, round(seconds))),
        }
        # A server that dies without a word is noticed by its silence beyond the time it was to end at.
        timeout = self._httpx.Timeout(READ_SECONDS, connect=CONNECT_SECONDS, read=seconds + CONNECT_SECONDS)
        try:
            with self._client.stream("GET", _path(namespace), params=params, timeout=timeout) as response:
                _check(response.status_code)
                self._stream = response.extensions["network_stream"].get_extra_info("socket")
                if self._interrupted:
                    return
                for line in _lines(response.iter_bytes(), MAX_LINE):
                    yield _event(line)
        except self._httpx.HTTPError as error:
            raise ApiFailed("connection", repr(error)) from None
        except OSError as error:
            raise ApiFailed("connection", repr(error)) from None
        finally:
            self._stream = None

    def interrupt(self) -> None:
        """End the watch that runs, and every later one at once."""
        self._interrupted = True
        stream = self._stream
        if stream is not None:
            try:
                stream.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # it ended by itself

    def close(self) -> None:
        """Give the connections back."""
        self._client.close()

    def _page(self, namespace: str, params: dict[str, str]) -> Object:
        try:
            response = self._client.get(_path(namespace), params=params)
            _check(response.status_code)
            page = json.loads(response.content)
        except (self._httpx.HTTPError, OSError) as error:
            raise ApiFailed("connection", repr(error)) from None
        except ValueError:
            raise ApiFailed("bad_answer", "a list that is not JSON") from None
        if not isinstance(page, dict):
            raise ApiFailed("bad_answer", "a list that is no object")
        return page


def _credentials(kubeconfig: str) -> "SingleConfig":
    from lightkube.config.kubeconfig import KubeConfig  # noqa: PLC0415 - an optional extra
    from lightkube.core.exceptions import ConfigError as NoConfig  # noqa: PLC0415

    try:
        found = KubeConfig.from_file(Path(kubeconfig)) if kubeconfig else KubeConfig.from_env()
        config = found.get()
    except (NoConfig, OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{KEY}.kubeconfig", f"no usable credentials: {error}") from None
    except Exception as error:  # YAML and msgspec errors of a file that is no kubeconfig; their types are not ours
        if type(error).__module__.split(".")[0] not in ("yaml", "msgspec"):
            raise
        raise ConfigError(f"{KEY}.kubeconfig", "is not a kubeconfig file") from None
    if config is None:
        raise ConfigError(f"{KEY}.kubeconfig", "names no current context")
    return config


def _path(namespace: str) -> str:
    return "/api/v1/pods" if namespace == "*" else f"/api/v1/namespaces/{namespace}/pods"


def _check(status: int) -> None:
    if status == 410:
        raise Gone
    if status in (401, 403):
        raise ApiFailed("denied", f"status {status}: the credentials may not list and watch pods here")
    if status != 200:
        raise ApiFailed("throttled" if status == 429 else "status", f"status {status}")


def _event(line: bytes) -> Event:
    try:
        document = json.loads(line)
        kind, found = document["type"], document["object"]
        if kind == "ERROR":
            if found.get("code") == 410:
                raise Gone
            raise ApiFailed("watch_error", str(found.get("reason", "")))
        return Event(kind, found, found["metadata"]["resourceVersion"])
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ApiFailed("bad_answer", "a watch's line that is no event") from None


def _lines(parts: Iterator[bytes], longest: int) -> Iterator[bytes]:
    """Whole lines of a body. Splits at newlines alone: text inside a pod may hold any other separator."""
    rest: list[bytes] = []
    size = 0
    for part in parts:
        *whole, last = part.split(b"\n")
        for each in whole:
            yield b"".join([*rest, each])
            rest, size = [], 0
        rest.append(last)
        size += len(last)
        if size > longest:
            raise ApiFailed("bad_answer", "a line without an end")
    if size:
        raise ApiFailed("connection", "the watch broke off inside a line")


def _mapping(document: Object, key: str) -> Object:
    found = document.get(key)
    if not isinstance(found, dict):
        raise ApiFailed("bad_answer", f"no {key}")
    return found
