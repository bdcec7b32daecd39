"""One model's tokenizer: the ids or block keys of a text, exactly as one plain encoding gives them."""

import itertools
import logging
import sys
import threading
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from tokenizers import Tokenizer as FastTokenizer

from kvindex_server import _core, logs
from kvindex_server.errors import DeadlineExceeded, InvalidArgument, ResourceExhausted
from kvindex_server.tokenize import library, selftest
from kvindex_server.tokenize.chat import ChatTemplates
from kvindex_server.tokenize.markers import markers
from kvindex_server.tokenize.pattern import Unsupported
from kvindex_server.tokenize.plan import plan

logger = logging.getLogger(__name__)

SELF_TEST_TEXTS = 2_000
MARKER_TEXTS = 500
"""Fewer, as the library encodes every part of them."""
RATED_BYTES = 16 * 1024
"""From here on an encoding by the reference tells how fast it is, and is refused when the time left is too short."""
LONG_BYTES = 256 * 1024
"""From here on it is long: few run at once."""
LONG_AT_ONCE = 2
UNLIMITED = 2**62
NO_DEADLINE = 1e9

Mode = Literal["native", "reference", "remote"]
Cuts = Literal["anywhere", "added_tokens", "nowhere"]
"""`anywhere` it is provably safe, about every 4 KiB; only before certain added tokens; or texts are encoded whole."""

_roots = itertools.count(1)


def next_root() -> int:
    """A root of the text cache of its own: texts of different roots share nothing."""
    return next(_roots)


@dataclass(frozen=True, slots=True)
class Keyed:
    """The full blocks of a text: keys as u64 little-endian, and how many tokens there are in all."""

    keys: bytes
    tokens: int


Body = str | _core.ScoreRequest
"""A prompt, a chat-completions body, or the request that holds it, whose text need not become a Python string."""


def text_of(body: Body) -> str:
    """The text itself."""
    return body if isinstance(body, str) else body.text


class AnyTokenizer(Protocol):
    """What the read path asks of a tokenizer; see Tokenizer for the methods."""

    @property
    def mode(self) -> Mode: ...
    @property
    def reason(self) -> str: ...
    @property
    def cuts(self) -> Cuts: ...
    @property
    def has_chat_template(self) -> bool: ...
    def encode_prompt(self, text: str, *, max_tokens: int = ..., seconds: float = ...) -> bytes: ...
    def encode_chat(self, body: str | bytes, *, max_tokens: int = ..., seconds: float = ...) -> bytes: ...
    def keys(
        self,
        kind: Literal["prompt", "chat"],
        body: Body,
        block_size: int,
        seed: int,
        lora_name: str = ...,
        cache_salt: str = ...,
        *,
        max_tokens: int = ...,
        seconds: float = ...,
    ) -> Keyed: ...


class Tokenizer:
    """One model's tokenizer and chat templates; safe from many threads.

    `mode` says whether texts are encoded natively, piece by piece, or whole by the reference library, and
    `reason` why not natively.
    """

    def __init__(
        self,
        fast: FastTokenizer,
        chat: ChatTemplates,
        cache: _core.TextCache | None = None,
        *,
        word_slots: int = 1 << 17,
        max_reference_bytes: int = UNLIMITED,
        self_test_texts: int = SELF_TEST_TEXTS,
    ) -> None:
        # A prompt is encoded whole and alone: what the file says for training batches must not apply.
        fast.no_truncation()
        fast.no_padding()
        self._fast = fast
        self._chat = chat
        cache = _core.TextCache(64 << 20) if cache is None else cache
        self._encoder, self._reason = _native(fast, word_slots, self_test_texts)
        affixes = _affixes(fast, self_test_texts)
        if self._encoder is not None and affixes is None:
            self._encoder, self._reason = None, "the post-processor does more than add tokens around a text"
        self._markers = _markers(fast, self_test_texts) if self._encoder is None else None
        reference = _Reference(fast)
        if self._encoder is None:
            reference.measure()
        plain, added = next_root(), next_root()

        def bound(root: int, prefix: Sequence[int], suffix: Sequence[int]) -> _core.Text:
            encoder, plain_ids = self._encoder, reference.plain
            return _core.Text(cache, encoder, root, prefix, suffix, plain_ids, max_reference_bytes, self._markers)

        self._plain = bound(plain, (), ())
        if affixes is None:
            self._added = _core.Text(cache, None, added, (), (), reference.added, max_reference_bytes)
        else:
            # What lies before the first token decides every key; without it both may share what they know.
            self._added = bound(added if affixes[0] else plain, *affixes)

    @property
    def mode(self) -> Mode:
        """`native` while the native encoder is in use."""
        return "native" if self._encoder is not None and not self._encoder.refuted else "reference"

    @property
    def reason(self) -> str:
        """Why texts are left to the reference; empty in native mode."""
        if self._encoder is not None and self._encoder.refuted:
            return "the native encoder was found to differ in service"
        return self._reason

    @property
    def cuts(self) -> Cuts:
        """Where texts are cut, so that of what was seen before nothing is encoded again."""
        if self._encoder is not None:
            return "nowhere" if self._encoder.refuted else "anywhere"
        return "added_tokens" if self._markers is not None else "nowhere"

    @property
    def has_chat_template(self) -> bool:
        """Whether chat bodies can be rendered."""
        return self._chat.available

    def encode(
        self,
        text: str,
        add_special_tokens: bool,
        field: str = "prompt",
        *,
        max_tokens: int = UNLIMITED,
        seconds: float = NO_DEADLINE,
    ) -> bytes:
        """Token ids as little-endian u32; `field` is the request's field that an error names.

        InvalidArgument above `max_tokens`, DeadlineExceeded when `seconds` pass, or surely will.
        """
        bound = self._added if add_special_tokens else self._plain
        return checked(lambda: bound.ids(text, max_tokens, seconds), field, max_tokens)[0]

    def encode_prompt(self, text: str, *, max_tokens: int = UNLIMITED, seconds: float = NO_DEADLINE) -> bytes:
        """Ids of a completions prompt: with the special tokens of the tokenizer's own post-processor."""
        return self.encode(text, True, "prompt", max_tokens=max_tokens, seconds=seconds)

    def render_chat(self, body: str | bytes, *, seconds: float = NO_DEADLINE) -> str:
        """The prompt text of an OpenAI chat-completions body."""
        return self._chat.render(body, seconds)

    def encode_chat(self, body: str | bytes, *, max_tokens: int = UNLIMITED, seconds: float = NO_DEADLINE) -> bytes:
        """Ids of a chat-completions body: the template writes the special tokens, and the body may ask for more."""
        ends = time.monotonic() + seconds
        chat = self._chat.rendered(body, seconds)
        left = ends - time.monotonic()
        return self.encode(chat.text, chat.add_special_tokens, "chat", max_tokens=max_tokens, seconds=left)

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
        """The block keys of a prompt or chat body; of a text seen before, nothing is encoded or hashed again."""
        ends = time.monotonic() + seconds
        text, special = body, True
        if kind == "chat":
            chat = self._chat.rendered(text_of(body), seconds)
            text, special = chat.text, chat.add_special_tokens
        bound = self._added if special else self._plain
        left = ends - time.monotonic()
        return Keyed(
            *checked(
                lambda: bound.keys(text, block_size, seed, lora_name, cache_salt, max_tokens, left),
                kind,
                max_tokens,
            )
        )


def checked(ask: Callable[[], tuple[bytes, int] | str], field: str, max_tokens: int) -> tuple[bytes, int]:
    """What the text cache answers, with its refusals as errors that name `field`."""
    try:
        answer = ask()
    except (TypeError, UnicodeError):
        raise InvalidArgument(field, "the text is not valid Unicode") from None
    except library.Refused:
        raise InvalidArgument(field, "the model's tokenizer has no tokens for the text") from None
    if answer == "too_many_tokens":
        raise InvalidArgument(field, f"its tokens exceed the limit of {max_tokens}")
    if answer == "too_long":
        raise InvalidArgument(field, "too many of its bytes cannot be encoded natively (text.max_reference_bytes)")
    if isinstance(answer, str):
        raise DeadlineExceeded("the deadline passed while the text was tokenized")
    return answer


class _Reference:
    """Encodes by the library itself; what is long must fit into the time that is left."""

    _long = threading.BoundedSemaphore(LONG_AT_ONCE)

    def __init__(self, fast: FastTokenizer) -> None:
        self._fast = fast
        # The most that was ever reached: what it says cannot be done surely cannot, and one slow moment does not count.
        self._bytes_per_second = 0.0

    def measure(self) -> None:
        """Know how fast the library is at best before the first long text comes."""
        easy = "the quick brown fox jumps over the lazy dog\n" * (2 * RATED_BYTES // 44)
        try:
            self.plain(easy, NO_DEADLINE)
        except library.NoIds:
            pass  # a vocabulary without these letters: the first text tells

    def plain(self, text: str, seconds: float) -> bytes:
        return self._encode(text, seconds, False)

    def added(self, text: str, seconds: float) -> bytes:
        return self._encode(text, seconds, True)

    def _encode(self, text: str, seconds: float, add_special_tokens: bool) -> bytes:
        size = len(text) if text.isascii() else len(text.encode())
        if size < RATED_BYTES:
            return _reference_ids(self._fast, text, add_special_tokens)
        if self._bytes_per_second and size / self._bytes_per_second > seconds:
            raise DeadlineExceeded("the text cannot be tokenized before the deadline")
        if size < LONG_BYTES:
            return self._rated(text, size, add_special_tokens)
        if not self._long.acquire(blocking=False):
            raise ResourceExhausted(f"more than {LONG_AT_ONCE} long texts are being tokenized")
        try:
            return self._rated(text, size, add_special_tokens)
        finally:
            self._long.release()

    def _rated(self, text: str, size: int, add_special_tokens: bool) -> bytes:
        started = time.perf_counter()
        ids = _reference_ids(self._fast, text, add_special_tokens)
        rate = size / max(time.perf_counter() - started, 1e-6)
        self._bytes_per_second = max(self._bytes_per_second, rate)
        return ids


def _reference_ids(fast: FastTokenizer, text: str, add_special_tokens: bool) -> bytes:
    ids = array("I", library.ids(fast, text, add_special_tokens))
    if sys.byteorder == "big":
        ids.byteswap()
    return ids.tobytes()


def _known_ids(fast: FastTokenizer, text: str) -> bytes | None:
    """Of a self-test's text; None when the library has no ids for it."""
    try:
        return _reference_ids(fast, text, False)
    except library.NoIds:
        return None


def _native(fast: FastTokenizer, word_slots: int, texts: int) -> tuple[_core.TextEncoder | None, str]:
    """(the native encoder, or None and why not); it has passed the self-test."""
    try:
        encoder = _core.TextEncoder(plan(fast, word_slots))
    except Unsupported as error:
        return None, str(error)
    specials = _added_contents(fast)
    wrong = selftest.first_difference(
        selftest.texts(texts, specials), encoder.encode, lambda text: _known_ids(fast, text)
    )
    if wrong is None:
        wrong = selftest.first_bad_cut(selftest.texts(texts, specials), encoder.encode, encoder.next_cut)
    if wrong is not None:
        logs.event(logger, logging.WARNING, "native encoder failed its self-test", sample=wrong)
        return None, f"the native encoder failed its self-test at sample {wrong}"
    return encoder, ""


def _markers(fast: FastTokenizer, texts: int) -> _core.TextMarkers | None:
    """Where texts may be cut that the library encodes; None when nowhere. They have passed the self-test."""
    contents = markers(fast)
    if not contents:
        return None
    cuts = _core.TextMarkers(contents)
    samples = selftest.texts(min(texts, MARKER_TEXTS), _added_contents(fast))
    wrong = selftest.first_bad_cut(samples, lambda text: _known_ids(fast, text), cuts.next_cut)
    if wrong is None:
        return cuts
    logs.event(logger, logging.WARNING, "cuts before added tokens failed their self-test", sample=wrong)
    return None


def _added_contents(fast: FastTokenizer) -> list[str]:
    return [token.content for _, token in sorted(fast.get_added_tokens_decoder().items())]


def _affixes(fast: FastTokenizer, texts: int) -> tuple[list[int], list[int]] | None:
    """The ids that the post-processor puts before and behind every text; None when it does anything else."""
    try:
        inner, outer = library.ids(fast, "a", False), library.ids(fast, "a", True)
    except library.NoIds:
        return None
    starts = [at for at in range(len(outer)) if outer[at : at + len(inner)] == inner]
    if len(starts) != 1:
        return None
    prefix, suffix = outer[: starts[0]], outer[starts[0] + len(inner) :]
    for text in selftest.texts(min(texts, 200), _added_contents(fast)):
        try:
            plain, added = library.ids(fast, text, False), library.ids(fast, text, True)
        except library.NoIds:
            continue
        if added != [*prefix, *plain, *suffix]:
            return None
    return prefix, suffix
