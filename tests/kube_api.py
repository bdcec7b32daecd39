"""A small Kubernetes API server for tests: lists and watches pods over HTTP, and misbehaves on a seeded schedule."""

import contextlib
import json
import random
import ssl
import threading
import time
from collections.abc import Iterator
from copy import deepcopy
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

Object = dict[str, Any]
LABELS = {"llm-d.ai/inference-serving": "true"}


def pod(
    name: str,
    uid: str,
    ip: str,
    *,
    namespace: str = "llm",
    restarts: int = 0,
    ready: bool = True,
    phase: str = "Running",
    labels: dict[str, str] | None = None,
    annotations: dict[str, str] | None = None,
    created: str = "2026-01-01T00:00:00Z",
) -> Object:
    """A Pod object as an API server shows it, as far as anybody here reads it."""
    return {
        "metadata": {
            "name": name,
            "namespace": namespace,
            "uid": uid,
            "creationTimestamp": created,
            "labels": LABELS if labels is None else labels,
            "annotations": annotations or {},
        },
        "spec": {"containers": [{"name": "vllm"}, {"name": "sidecar"}]},
        "status": {
            "phase": phase,
            "podIP": ip,
            "conditions": [{"type": "Ready", "status": str(ready)}],
            "containerStatuses": [
                {"name": "sidecar", "restartCount": 0, "containerID": f"containerd://side-{uid}"},
                {"name": "vllm", "restartCount": restarts, "containerID": f"containerd://{uid}-{restarts}"},
            ],
        },
    }


class KubeApi:
    """The server's pods and their history. `hostile` is the chance of each kind of trouble per request or event."""

    def __init__(self, seed: int = 0, hostile: float = 0.0, tls: ssl.SSLContext | None = None) -> None:
        self.tls = tls
        self.token = ""
        """When given, the only one that is let in."""
        self.chance = random.Random(seed)
        self.hostile = hostile
        self.changed = threading.Condition()
        self.pods: dict[tuple[str, str], Object] = {}
        self.history: list[tuple[int, Object | None, Object | None]] = []
        self.version = 100
        self.compacted = 100
        self.silent = False
        """Watches are accepted and say nothing any more, not even that they end: a machine that lost its power."""
        self.reverse = False
        """News that come together are told in the wrong order."""
        self.denied = False
        self.tells_gone: str | None = None
        """How a version that is forgotten is told of: by the answer's "status" or as an "event"; either when None."""
        self.expires_pages = False
        """Every list that goes on is told that its snapshot is forgotten."""
        self.counts: dict[str, int] = {}
        self._snapshots: dict[int, list[Object]] = {}
        self._http: ThreadingHTTPServer | None = None
        self.port = 0
        self.up()

    def up(self) -> None:
        """Listen, on the same port as before."""
        self._http = _Http(("127.0.0.1", self.port), type("Bound", (_Handler,), {"api": self}))
        self.port = self._http.server_address[1]
        if self.tls is not None:
            self._http.socket = self.tls.wrap_socket(self._http.socket, server_side=True)
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()

    def down(self) -> None:
        """Refuse every connection, and break those that are open."""
        assert self._http is not None
        http, self._http = self._http, None
        http.shutdown()
        http.server_close()
        with self.changed:
            self.changed.notify_all()

    @property
    def is_up(self) -> bool:
        return self._http is not None

    def count(self, what: str) -> None:
        with self.changed:
            self.counts[what] = self.counts.get(what, 0) + 1

    def put(self, document: Object) -> None:
        """Create a pod, or replace it."""
        key = (document["metadata"]["namespace"], document["metadata"]["name"])
        with self.changed:
            self._record(self.pods.get(key), deepcopy(document))
            self.pods[key] = self.history[-1][2] or {}

    def delete(self, name: str, namespace: str = "llm") -> None:
        """Take a pod away at once."""
        with self.changed:
            self._record(self.pods.pop((namespace, name)), None)

    def compact(self) -> None:
        """Forget the history: whoever asks for any of it is answered 410."""
        with self.changed:
            self.compacted = self.version
            self.history.clear()
            self._snapshots.clear()

    def _record(self, old: Object | None, new: Object | None) -> None:
        self.version += 1
        if new is not None:
            new["metadata"]["resourceVersion"] = str(self.version)
        self.history.append((self.version, old, new))
        self.changed.notify_all()

    def trouble(self, times: int = 1) -> bool:
        with self.changed:
            return self.chance.random() < times * self.hostile

    def snapshot(self, namespace: str) -> tuple[int, list[Object]]:
        with self.changed:
            pods = [deepcopy(each) for key, each in self.pods.items() if namespace in ("", key[0])]
            self._snapshots[self.version] = pods
            return self.version, pods

    def snapshot_at(self, version: int) -> list[Object] | None:
        with self.changed:
            return self._snapshots.get(version)


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 64

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are part of the test."""


class _Handler(BaseHTTPRequestHandler):
    api: KubeApi
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        api = self.api
        url = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        parts = url.path.strip("/").split("/")
        namespace = parts[3] if parts[:3] == ["api", "v1", "namespaces"] else ""
        if parts[-1] != "pods":
            self._answer(404, {})
        elif api.token and self.headers["Authorization"] != f"Bearer {api.token}":
            self._answer(401, {"kind": "Status", "code": 401})
        elif api.denied:
            self._answer(403, {"kind": "Status", "code": 403})
        elif api.trouble():
            api.count("refused")
            self._answer(api.chance.choice((500, 503, 429)), {"kind": "Status"})
        elif query.get("watch") == "true":
            api.count("watches")
            self._watch(namespace, query)
        else:
            api.count("lists")
            self._list(namespace, query)

    def _list(self, namespace: str, query: dict[str, str]) -> None:
        if token := query.get("continue"):
            version, offset = (int(part) for part in token.split("."))
            kept = self.api.snapshot_at(version)
            if kept is None or self.api.expires_pages:
                self.api.count("expired_pages")
                self._answer(410, {"kind": "Status", "code": 410})
                return
            pods = kept
        else:
            version, pods = self.api.snapshot(namespace)
            offset = 0
        matching = [each for each in pods if _matches(each, query.get("labelSelector", ""))]
        limit = int(query.get("limit", len(matching) or 1))
        page = matching[offset : offset + limit]
        meta: Object = {"resourceVersion": str(version)}
        if offset + limit < len(matching):
            meta["continue"] = f"{version}.{offset + limit}"
        self._answer(200, {"kind": "PodList", "metadata": meta, "items": page})

    def _watch(self, namespace: str, query: dict[str, str]) -> None:
        api = self.api
        since = int(query["resourceVersion"])
        if since < api.compacted:
            api.count("gone")
            if (api.tells_gone or api.chance.choice(("status", "event"))) == "status":
                self._answer(410, {"kind": "Status", "code": 410})
                return
            self._begin()
            self._line({"type": "ERROR", "object": {"kind": "Status", "code": 410, "reason": "Expired"}})
            self._end()
            return
        self._begin()
        ends = time.monotonic() + float(query["timeoutSeconds"])
        for burst in self._bursts(namespace, query, since, ends):
            lines = [json.dumps(each).encode() + b"\n" for each in burst]
            if len(lines) > 1 and api.trouble(times=5):
                api.count("reordered")
                api.chance.shuffle(lines)
            for line in reversed(lines) if api.reverse else lines:
                if api.trouble():
                    api.count("cut")
                    self._chunk(line[: api.chance.randrange(len(line))])
                    self.close_connection = True
                    return
                # Chunks end anywhere, also inside a line.
                middle = api.chance.randrange(len(line))
                self._chunk(line[:middle])
                self._chunk(line[middle:])
        self._end()

    def _bursts(self, namespace: str, query: dict[str, str], since: int, ends: float) -> Iterator[list[Object]]:
        api, selector = self.api, query.get("labelSelector", "")
        bookmark = time.monotonic() + 0.2
        while time.monotonic() < ends and api.is_up:
            with api.changed:
                if since < api.compacted:
                    api.count("gone")
                    yield [{"type": "ERROR", "object": {"kind": "Status", "code": 410, "reason": "Expired"}}]
                    return
                news = [each for each in api.history if each[0] > since][:4]
                if not news or api.silent:
                    api.changed.wait(0.05)
            if api.silent:
                ends = time.monotonic() + 1.0
                continue
            events = [event for each in news if (event := _event(each, namespace, selector)) is not None]
            if news:
                since = news[-1][0]
            if not news and query.get("allowWatchBookmarks") == "true" and time.monotonic() > bookmark:
                bookmark = time.monotonic() + 0.2
                events = [{"type": "BOOKMARK", "object": {"kind": "Pod", "metadata": {"resourceVersion": str(since)}}}]
            if events:
                yield events

    def _answer(self, status: int, document: Object) -> None:
        body = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _begin(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def _line(self, event: Object) -> None:
        self._chunk(json.dumps(event).encode() + b"\n")

    def _chunk(self, data: bytes) -> None:
        if data:
            self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
            self.wfile.flush()

    def _end(self) -> None:
        with contextlib.suppress(OSError):
            self.wfile.write(b"0\r\n\r\n")
        self.close_connection = True


def _matches(document: Object, selector: str) -> bool:
    labels = document["metadata"]["labels"]
    return all(labels.get(each.split("=")[0]) == each.split("=")[1] for each in selector.split(",") if each)


def _event(entry: tuple[int, Object | None, Object | None], namespace: str, selector: str) -> Object | None:
    """What a watcher with this selector is told: a pod that leaves the selection is DELETED for it."""
    version, old, new = entry

    def seen(document: Object | None) -> bool:
        return (
            document is not None
            and namespace in ("", document["metadata"]["namespace"])
            and _matches(document, selector)
        )

    if seen(new):
        return {"type": "MODIFIED" if seen(old) else "ADDED", "object": new}
    if not seen(old):
        return None
    assert old is not None
    last = deepcopy(new or old)
    last["metadata"]["resourceVersion"] = str(version)
    return {"type": "DELETED", "object": last}
