"""The page's paths: static files with strict headers, and its JSON, for browsers of the same origin only."""

from collections.abc import Mapping
from dataclasses import replace
from importlib import resources
from urllib.parse import urlsplit

from kvindex_server.errors import PermissionDenied
from kvindex_server.page.fleet import FleetView
from kvindex_server.page.prompt import PromptView
from kvindex_server.rest import JSON, Calls, encoded, failed
from kvindex_server.web import Answer, Handler, Request, Routes

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)
HEADERS = (
    ("Content-Security-Policy", _CSP),
    ("X-Content-Type-Options", "nosniff"),
    ("X-Frame-Options", "DENY"),
    ("Referrer-Policy", "no-referrer"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("Cross-Origin-Opener-Policy", "same-origin"),
    ("Permissions-Policy", "camera=(), geolocation=(), microphone=()"),
    ("Cache-Control", "no-store"),
)
"""On everything the page consists of."""


def routes(fleet: FleetView, prompt: PromptView | None, calls: Calls) -> Routes:
    """Without `prompt` there is no way to ask about one."""

    def fleet_json(_: Request) -> Answer:
        return Answer(200, JSON, encoded(fleet.shown()))

    found: dict[tuple[str, str], Handler] = {("GET", "/api/fleet"): _own(fleet_json)}
    if prompt is not None:
        found["POST", "/api/score"] = _own(calls.handler("/api/score", prompt.shown))
    for path, answer in _files().items():
        found["GET", path] = _always(answer)
    return found


def _files() -> Mapping[str, Answer]:
    folder = resources.files("kvindex_server.page") / "assets"
    files = {}
    for each in folder.iterdir():
        suffix = each.name[each.name.rfind(".") :]
        path = "/" if each.name == "index.html" else f"/page/{each.name}"
        files[path] = Answer(200, _TYPES[suffix], each.read_bytes(), HEADERS)
    return files


def _always(answer: Answer) -> Handler:
    return lambda _: answer


def _own(handler: Handler) -> Handler:
    """For the page itself only: whatever another site's script asks is refused, whatever its answer would be."""

    def handle(request: Request) -> Answer:
        if _foreign(request):
            answer = failed(PermissionDenied("this is for the page of the same origin only"))
        else:
            answer = handler(request)
        return replace(answer, headers=_merged(answer.headers))

    return handle


def _foreign(request: Request) -> bool:
    # Sent by every browser of today where the connection is trustworthy, else its Origin tells.
    if request.headers.get("Sec-Fetch-Site", "same-origin") not in ("same-origin", "none"):
        return True
    origin = request.headers.get("Origin")
    try:
        return origin is not None and urlsplit(origin).netloc != request.headers.get("Host")
    except ValueError:  # no URL at all
        return True


def _merged(headers: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
    known = {name for name, _ in HEADERS}
    return (*HEADERS, *((name, value) for name, value in headers if name not in known))
