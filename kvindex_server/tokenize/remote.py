"""The fallback for a model without a tokenizer here: the engine that serves it is asked over HTTP."""

import json
import sys
import threading
import time
import urllib.request
from array import array
from collections.abc import Callable
from typing import Any, Literal

from kvindex_server import _core
from kvindex_server.errors import DeadlineExceeded, InvalidArgument, ResourceExhausted, Unavailable
from kvindex_server.tokenize.tokenizer import NO_DEADLINE, UNLIMITED, Body, Keyed, checked, next_root

MAX_SECONDS = 10.0
PATIENCE_SECONDS = 0.02
"""How long a call waits for a place to ask from; a known text leaves its place much earlier."""
CHAT_SECONDS = 60
"""Chats are remembered until the next full minute: the engine's template may write the date into them."""
MAX_ANSWER_BYTES = 256 * 1024 * 1024


class RemoteTokenizer:
    """Asks `POST {url}` as vLLM's `/tokenize` understands it; whole texts are remembered, whole chats for a minute."""

    mode: Literal["remote"] = "remote"
    reason = "the engine is asked for every new text"
    cuts: Literal["nowhere"] = "nowhere"
    has_chat_template = True

    def __init__(
        self,
        url: str,
        model: str,
        cache: _core.TextCache,
        clock: Callable[[], float] = time.time,
        places: threading.Semaphore | None = None,
    ) -> None:
        """`places` bounds the calls that wait for engines, so that one that hangs does not hold every worker."""
        self._engine = Engine(url, model)
        self._cache = cache
        self._clock = clock
        self._places = threading.Semaphore(2) if places is None else places
        self._prompts = self._text(self._engine.prompt)
        self._of_minute = (0, self._text(self._engine.chat))

    def _text(self, ask: Callable[[str, float], bytes]) -> _core.Text:
        return _core.Text(self._cache, None, next_root(), (), (), ask)

    def _chats(self) -> _core.Text:
        minute, chats = self._of_minute
        if (now := int(self._clock() // CHAT_SECONDS)) != minute:
            chats = self._text(self._engine.chat)
            self._of_minute = now, chats
        return chats

    def encode_prompt(self, text: str, *, max_tokens: int = UNLIMITED, seconds: float = NO_DEADLINE) -> bytes:
        """As Tokenizer.encode_prompt."""
        return self._placed(lambda: self._prompts.ids(text, max_tokens, seconds), "prompt", max_tokens, seconds)[0]

    def encode_chat(self, body: str | bytes, *, max_tokens: int = UNLIMITED, seconds: float = NO_DEADLINE) -> bytes:
        """As Tokenizer.encode_chat."""
        text = body.decode() if isinstance(body, bytes) else body
        return self._placed(lambda: self._chats().ids(text, max_tokens, seconds), "chat", max_tokens, seconds)[0]

    def keys(
        self,
        kind: Literal["prompt", "chat"],
        body: Body,
        block_size: int,
        seed: int,
        lora_name: str = "",
        cache_salt: str = "",
        *,
        max_tokens: int = UNLIMITED,
        seconds: float = NO_DEADLINE,
    ) -> Keyed:
        """As Tokenizer.keys."""
        bound = self._prompts if kind == "prompt" else self._chats()
        ask = lambda: bound.keys(body, block_size, seed, lora_name, cache_salt, max_tokens, seconds)  # noqa: E731
        return Keyed(*self._placed(ask, kind, max_tokens, seconds))

    def _placed(
        self, ask: Callable[[], tuple[bytes, int] | str], field: str, max_tokens: int, seconds: float
    ) -> tuple[bytes, int]:
        if not self._places.acquire(timeout=max(0.0, min(seconds, PATIENCE_SECONDS))):
            raise ResourceExhausted("as many texts as may be are waiting for an engine's tokenize endpoint")
        try:
            return checked(ask, field, max_tokens)
        finally:
            self._places.release()


class Engine:
    """The endpoint, apart from the tokenizer that remembers its answers."""

    def __init__(self, url: str, model: str) -> None:
        self._url = url
        self._model = model

    def prompt(self, text: str, seconds: float) -> bytes:
        """Token ids as u32 little-endian. Unavailable when it gives none, DeadlineExceeded when it takes too long."""
        return self._ask({"model": self._model, "prompt": text, "add_special_tokens": True}, seconds)

    def chat(self, body: str, seconds: float) -> bytes:
        """The same of a chat-completions body; InvalidArgument when it is none."""
        try:
            request = json.loads(body)
        except (ValueError, RecursionError):
            raise InvalidArgument("chat", "not valid JSON") from None
        if not isinstance(request, dict):
            raise InvalidArgument("chat", "not a JSON object")
        if request.get("chat_template") is not None:
            raise InvalidArgument("chat", "chat_template in a request is not accepted")
        return self._ask({"add_special_tokens": False, **request, "model": self._model}, seconds)

    def _ask(self, body: dict[str, Any], seconds: float) -> bytes:
        started = time.monotonic()
        request = urllib.request.Request(
            self._url, json.dumps(body).encode(), {"Content-Type": "application/json"}, method="POST"
        )
        try:
            with urllib.request.urlopen(request, timeout=max(0.001, min(seconds, MAX_SECONDS))) as answer:
                data = answer.read(MAX_ANSWER_BYTES + 1)
            tokens = json.loads(data)["tokens"]
            ids = array("I", tokens)
        except (OSError, ValueError, KeyError, TypeError, OverflowError):
            if time.monotonic() - started >= seconds:
                raise DeadlineExceeded("the engine did not tokenize the text before the deadline") from None
            raise Unavailable("the engine's tokenize endpoint gives no tokens for this text") from None
        if sys.byteorder == "big":
            ids.byteswap()
        return ids.tobytes()
