"""Who may call: bearer tokens from files or judged by Kubernetes, and client certificates that were revoked."""

import enum
import functools
import hashlib
import hmac
import json
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from kvindex_server.errors import KvindexError, PermissionDenied, Unauthenticated, Unavailable
from kvindex_server.files import Rotated

MIN_TOKEN = 16
"""Characters; a shorter secret is refused at the start."""
MAX_TOKEN = 8192
_ANSWER_BYTES = 1 << 20


class Role(enum.IntEnum):
    """What a caller may do; a higher role may do all that a lower one may."""

    READ = 1
    ADMIN = 2


class TokenFile:
    """Bearer tokens, one a line; blank lines and those with `#` first are skipped. Only digests are kept."""

    def __init__(self, path: Path) -> None:
        self._digests = Rotated([path], lambda: _digests(path))

    def knows(self, digest: bytes) -> bool:
        """Whether a token has this SHA-256; the time taken does not tell which one nearly had."""
        found = False
        for each in self._digests.value:
            found |= hmac.compare_digest(each, digest)
        return found


@dataclass(frozen=True, slots=True)
class ReviewSettings:
    """How to ask a Kubernetes API server about a token."""

    url: str
    ca_file: Path | None = None
    token_file: Path | None = None
    audiences: tuple[str, ...] = ()
    users: tuple[str, ...] = ()
    admin_users: tuple[str, ...] = ()
    timeout_seconds: float = 2.0
    good_seconds: float = 60.0
    bad_seconds: float = 5.0


class TokenReview:
    """Kubernetes' own judgement of service-account tokens; each is remembered for a while.

    Strangers can make up tokens without end, so refusals are remembered apart from what is let in, and only so many
    questions are asked at once: neither crowds out whoever is known already.
    """

    _REMEMBERED = 4096
    AT_ONCE = 8

    def __init__(self, settings: ReviewSettings) -> None:
        self._settings = settings
        self._url = settings.url.rstrip("/") + "/apis/authentication.k8s.io/v1/tokenreviews"
        # The cluster's CA and our own token are rotated under a running pod.
        files = [each for each in (settings.ca_file, settings.token_file) if each is not None]
        self._access = Rotated(files, self._read_access)
        self._lock = threading.Lock()
        self._known: OrderedDict[bytes, tuple[float, Role | None]] = OrderedDict()
        self._strangers: OrderedDict[bytes, tuple[float, Role | None]] = OrderedDict()
        self._questions = threading.BoundedSemaphore(self.AT_ONCE)

    def role(self, token: str, digest: bytes) -> Role | None:
        """The role, None when the token is no good. Waits for the API server; Unavailable when it is silent or busy."""
        with self._lock:
            known = self._known.get(digest) or self._strangers.get(digest)
        if known is not None and known[0] > time.monotonic():
            return known[1]
        if not self._questions.acquire(blocking=False):
            raise Unavailable("the token cannot be verified now: too many others are being verified")
        try:
            role = self._ask(token)
        finally:
            self._questions.release()
        settings = self._settings
        with self._lock:
            self._known.pop(digest, None)
            self._strangers.pop(digest, None)
            remembered = self._strangers if role is None else self._known
            remembered[digest] = (
                time.monotonic() + (settings.bad_seconds if role is None else settings.good_seconds),
                role,
            )
            while len(remembered) > self._REMEMBERED:
                remembered.popitem(last=False)
        return role

    def _read_access(self) -> tuple[ssl.SSLContext, str]:
        settings = self._settings
        context = ssl.create_default_context(cafile=str(settings.ca_file) if settings.ca_file else None)
        return context, settings.token_file.read_text().strip() if settings.token_file else ""

    def _ask(self, token: str) -> Role | None:
        context, own = self._access.value
        spec: dict[str, object] = {"token": token}
        if self._settings.audiences:
            spec["audiences"] = list(self._settings.audiences)
        body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "spec": spec}
        request = urllib.request.Request(self._url, json.dumps(body).encode(), {"Content-Type": "application/json"})
        if own:
            request.add_header("Authorization", f"Bearer {own}")
        try:
            with urllib.request.urlopen(request, timeout=self._settings.timeout_seconds, context=context) as answer:
                status = json.loads(answer.read(_ANSWER_BYTES))["status"]
            return self._judge(status)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise Unavailable("the token cannot be verified: the Kubernetes API server gave no answer") from None

    def _judge(self, status: dict[str, object]) -> Role | None:
        if status.get("authenticated") is not True:
            return None
        # A server that does not know audiences answers without them, and would let any token of the cluster pass.
        audiences = status.get("audiences") or ()
        if self._settings.audiences and not set(self._settings.audiences) & set(_strings(audiences)):
            return None
        user = status["user"]
        name = user["username"] if isinstance(user, dict) else ""
        if name in self._settings.admin_users:
            return Role.ADMIN
        return Role.READ if not self._settings.users or name in self._settings.users else None


class Revoked:
    """SHA-256 fingerprints (hex, colons allowed) of client certificates that are no longer welcome."""

    def __init__(self, path: Path) -> None:
        self._fingerprints = Rotated([path], lambda: frozenset(_fingerprints(path)))

    def holds(self, pem: bytes) -> bool:
        """Whether this certificate is one of them."""
        return _fingerprint(pem) in self._fingerprints.value


class Caller(Protocol):
    """What is asked of a call on its own thread; gRPC's context is one."""

    def auth_context(self) -> Mapping[str, Iterable[bytes]]: ...
    def invocation_metadata(self) -> Sequence[tuple[str, str | bytes]] | None: ...


@dataclass(frozen=True)
class Gate:
    """Lets calls in by role. Without any credential configured everybody may do everything."""

    tokens: TokenFile | None = None
    admin_tokens: TokenFile | None = None
    review: TokenReview | None = None
    revoked: Revoked | None = None
    _guarded: frozenset[Role] = field(init=False)

    def __post_init__(self) -> None:
        guarded = set()
        if self.tokens or self.review:
            guarded |= {Role.READ, Role.ADMIN}
        if self.admin_tokens:
            guarded.add(Role.ADMIN)
        object.__setattr__(self, "_guarded", frozenset(guarded))

    def asks(self, role: Role) -> bool:
        """Whether this role needs a token."""
        return role in self._guarded

    def at_arrival(self, role: Role, metadata: Sequence[tuple[str, str | bytes]] | None) -> KvindexError | None:
        """What can be refused at once, without waiting for anybody."""
        if role not in self._guarded:
            return None
        token = _bearer(metadata)
        if token is None:
            return Unauthenticated("a bearer token is required in the metadata 'authorization'")
        known = self._by_file(_digest(token))
        if known is None:
            return None if self.review else Unauthenticated("the bearer token is not known")
        return None if known >= role else _not_enough(role)

    def in_call(self, role: Role, context: Caller) -> KvindexError | None:
        """The rest, on the call's own thread."""
        if self.revoked is not None:
            for pem in context.auth_context().get("x509_pem_cert", ()):
                if self.revoked.holds(pem):
                    return Unauthenticated("the client certificate was revoked")
        if self.review is None or role not in self._guarded:
            return None
        token = _bearer(context.invocation_metadata()) or ""
        digest = _digest(token)
        if self._by_file(digest) is not None:
            return None  # judged at arrival
        try:
            known = self.review.role(token, digest)
        except Unavailable as error:
            return error
        if known is None:
            return Unauthenticated("the bearer token is not known")
        return None if known >= role else _not_enough(role)

    def _by_file(self, digest: bytes) -> Role | None:
        if self.admin_tokens is not None and self.admin_tokens.knows(digest):
            return Role.ADMIN
        if self.tokens is not None and self.tokens.knows(digest):
            return Role.READ
        return None


def _not_enough(role: Role) -> PermissionDenied:
    return PermissionDenied(f"this caller may not use what needs the role {role.name}")


def _bearer(metadata: Iterable[tuple[str, str | bytes]] | None) -> str | None:
    for key, value in metadata or ():
        if key == "authorization" and isinstance(value, str):
            scheme, _, token = value.partition(" ")
            if scheme.lower() == "bearer" and 0 < len(token) <= MAX_TOKEN:
                return token
    return None


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()


def _digests(path: Path) -> tuple[bytes, ...]:
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        token = line.strip()
        if not token or token.startswith("#"):
            continue
        if not MIN_TOKEN <= len(token) <= MAX_TOKEN:
            raise ValueError(f"line {number}: a token needs {MIN_TOKEN} to {MAX_TOKEN} characters")
        found.append(_digest(token))
    return tuple(found)


def _fingerprints(path: Path) -> Iterable[str]:
    for number, line in enumerate(path.read_text(encoding="ascii").splitlines(), 1):
        text = line.partition("#")[0].strip().replace(":", "").lower()
        if not text:
            continue
        if len(text) != 64 or not set(text) <= set("0123456789abcdef"):
            raise ValueError(f"line {number}: not a SHA-256 fingerprint")
        yield text


@functools.lru_cache(maxsize=1024)
def _fingerprint(pem: bytes) -> str:
    return hashlib.sha256(ssl.PEM_cert_to_DER_cert(pem.decode("ascii"))).hexdigest()


def _strings(values: object) -> list[str]:
    return [each for each in values if isinstance(each, str)] if isinstance(values, list) else []
