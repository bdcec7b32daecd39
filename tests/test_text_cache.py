"""The text cache: bounded, one encoder per missing piece, limits and deadlines before work, counted."""

import contextlib
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from tokenizers import normalizers
from tokenizers_at_hand import byte_level

from kvindex_server import _core
from kvindex_server.errors import (
    DeadlineExceeded,
    InvalidArgument,
    KvindexError,
    ResourceExhausted,
    Unavailable,
)
from kvindex_server.tokenize import library
from kvindex_server.tokenize import tokenizer as tokenizer_module
from kvindex_server.tokenize.chat import ChatTemplates
from kvindex_server.tokenize.plan import plan
from kvindex_server.tokenize.remote import RemoteTokenizer
from kvindex_server.tokenize.sources import Sources
from kvindex_server.tokenize.tokenizer import Tokenizer

FOREVER = 1e9
WORDS = "the quick brown fox jumps over the lazy dog and does not stop "


def letters(calls: list[str]) -> Callable[[str, float], bytes]:
    """A reference of one token per letter that remembers what it was asked."""

    def reference(text: str, left: float) -> bytes:
        calls.append(text)
        return struct.pack(f"<{len(text)}I", *map(ord, text))

    return reference


def whole(cache: _core.TextCache, calls: list[str], root: int = 1) -> _core.Text:
    return _core.Text(cache, None, root, (), (), letters(calls))


def native(**fast: Any) -> tuple[_core.TextEncoder, list[str]]:
    return _core.TextEncoder(plan(byte_level(**fast), 1024)), []


def test_a_known_text_is_not_encoded_again_but_another_root_shares_nothing() -> None:
    cache, calls = _core.TextCache(1 << 20), []
    first, other = whole(cache, calls), whole(cache, calls, 2)
    assert first.ids("abc", 9, FOREVER) == first.ids("abc", 9, FOREVER) == (struct.pack("<3I", 97, 98, 99), 3)
    assert calls == ["abc"]
    other.ids("abc", 9, FOREVER)
    assert calls == ["abc", "abc"]
    stats = cache.stats()
    assert (stats["chunk_hits"], stats["chunk_misses"], stats["tokens_saved"], stats["tokens_encoded"]) == (1, 2, 3, 6)
    assert stats["reference_chunks"] == 2


def test_only_what_is_new_of_a_grown_text_is_encoded() -> None:
    encoder, calls = native()
    cache = _core.TextCache(8 << 20)
    text = _core.Text(cache, encoder, 1, (), (), letters(calls))
    _, tokens = text.ids(WORDS * 1000, 10**6, FOREVER)
    before = cache.stats()["tokens_encoded"]
    assert before == tokens
    assert text.ids(WORDS * 1000 + "a few more", 10**6, FOREVER)[1] > tokens
    assert 0 < cache.stats()["tokens_encoded"] - before < tokens / 10
    assert calls == []


def test_memory_stays_within_its_bound_and_the_oldest_go_first() -> None:
    bound = 200_000
    cache, calls = _core.TextCache(bound), []
    text = whole(cache, calls)
    for number in range(300):
        text.ids(f"{number} " * 200, 10**6, FOREVER)
        text.ids("kept", 9, FOREVER)
        assert cache.stats()["bytes"] <= bound
    assert calls.count("kept") == 1
    stats = cache.stats()
    assert stats["evictions"] > 200 and stats["chunks"] == 301 - stats["evictions"]
    text.ids("0 " * 200, 10**6, FOREVER)
    assert calls.count("0 " * 200) == 2


def test_what_does_not_fit_is_answered_and_not_kept() -> None:
    cache, calls = _core.TextCache(0), []
    text = whole(cache, calls)
    assert text.ids("ab", 9, FOREVER) == text.ids("ab", 9, FOREVER) == (struct.pack("<2I", 97, 98), 2)
    assert (cache.stats()["bytes"], cache.stats()["chunks"], len(calls)) == (0, 0, 2)


def test_keys_count_towards_the_bound_and_follow_their_context() -> None:
    cache, calls = _core.TextCache(1 << 20), []
    text = whole(cache, calls)
    empty = cache.stats()["bytes"]
    ids, _ = text.ids("x" * 1000, 10**6, FOREVER)
    without = cache.stats()["bytes"]
    assert text.keys("x" * 1000, 4, 1337, "", "", 10**6, FOREVER)[0] == _core.block_keys(ids, 4)
    assert cache.stats()["bytes"] - without >= 250 * 8 and without - empty >= 5000
    for context in ((4, 1337, "lora", ""), (4, 1, "", ""), (8, 1, "", "salt"), (4, 1337, "", "")):
        assert text.keys("x" * 1000, *context, 10**6, FOREVER)[0] == _core.block_keys(ids, *context)
    assert len(calls) == 1


def test_a_missing_piece_is_encoded_once_however_many_ask() -> None:
    cache, calls = _core.TextCache(1 << 20), []
    started, go = threading.Event(), threading.Event()

    def slow(text: str, left: float) -> bytes:
        calls.append(text)
        started.set()
        assert go.wait(10)
        return struct.pack("<I", 7)

    text = _core.Text(cache, None, 1, (), (), slow)
    answers: list[object] = []
    threads = [threading.Thread(target=lambda: answers.append(text.ids("a", 9, FOREVER))) for _ in range(6)]
    for thread in threads:
        thread.start()
    assert started.wait(10)
    ends = time.monotonic() + 10
    while cache.stats()["waits"] < 5 and time.monotonic() < ends:
        time.sleep(0.005)
    assert text.ids("a", 9, 0.01) == "too_late"  # another's work does not outlast the deadline
    go.set()
    for thread in threads:
        thread.join(10)
    assert answers == [(struct.pack("<I", 7), 1)] * 6
    assert calls == ["a"]
    assert cache.stats()["waits"] == 6


def test_a_failed_encoding_is_its_callers_error_and_the_next_one_tries_again() -> None:
    cache, fail = _core.TextCache(1 << 20), [True]

    def reference(text: str, left: float) -> bytes:
        if fail.pop():
            raise Unavailable("gone")
        return struct.pack("<I", 1)

    text = _core.Text(cache, None, 1, (), (), reference)
    with pytest.raises(Unavailable):
        text.ids("a", 9, FOREVER)
    fail.append(False)
    assert text.ids("a", 9, FOREVER)[1] == 1


def test_counting_stops_at_the_limit() -> None:
    encoder, _ = native()
    cache = _core.TextCache(0)
    text = _core.Text(cache, encoder, 1, (), (), letters([]))
    assert text.ids(WORDS * 10_000, 1000, FOREVER) == "too_many_tokens"
    assert cache.stats()["tokens_encoded"] < 4000
    exact = text.ids("the fox", 10**6, FOREVER)[1]
    assert isinstance(exact, int)
    assert text.ids("the fox", exact, FOREVER)[1] == exact
    assert text.ids("the fox", exact - 1, FOREVER) == "too_many_tokens"
    closed = _core.Text(cache, encoder, 1, (5,), (6,), letters([]))
    assert closed.ids("the fox", exact + 2, FOREVER)[1] == exact + 2
    assert closed.ids("the fox", exact + 1, FOREVER) == "too_many_tokens"


def test_what_the_reference_may_be_given_of_one_text_is_bounded() -> None:
    encoder, calls = native(normalizer=normalizers.NFC())
    cache = _core.TextCache(0, 0, 64)
    text = _core.Text(cache, encoder, 1, (), (), letters(calls), 1000)
    marks = "e\u0301 e\u0323 " * 50
    assert text.ids(WORDS * 100 + marks, 10**6, FOREVER) != "too_long"  # the words go another way
    assert 0 < sum(len(each.encode()) for each in calls) <= 1000
    calls.clear()
    assert text.ids(marks * 10, 10**6, FOREVER) == "too_long"
    assert sum(len(each.encode()) for each in calls) <= 1000
    whole = _core.Text(cache, None, 2, (), (), letters(calls), 10)
    calls.clear()
    assert whole.ids("x" * 11, 10**6, FOREVER) == "too_long" and calls == []


def test_a_deadline_that_has_passed_is_told() -> None:
    encoder, _ = native()
    text = _core.Text(_core.TextCache(0), encoder, 1, (), (), letters([]))
    assert text.ids(WORDS, 10**6, -1.0) == "too_late"


def test_a_wrong_encoder_is_found_in_service_and_never_used_again() -> None:
    encoder, _ = native()
    cache, calls = _core.TextCache(8 << 20, 3, 16), []
    text = _core.Text(cache, encoder, 1, (), (), letters(calls))
    expected = struct.pack(f"<{len(WORDS)}I", *map(ord, WORDS))
    # The letters are not what the encoder makes of them; nor does the answer keep what it made of the begin.
    assert text.ids(WORDS * 3, 10**6, FOREVER)[0] == expected * 3
    assert encoder.refuted
    assert cache.stats()["verified_chunks"] == 1
    assert text.ids(WORDS, 10**6, FOREVER)[0] == expected
    assert text.ids(WORDS, 10**6, FOREVER)[0] == expected


def test_a_refuted_encoder_cuts_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is wrong may be the pattern, and the cuts come from it too."""
    fast, other = byte_level(), byte_level(pattern=r"\p{L}+|\p{N}| |[^ \p{L}\p{N}]")
    taken_over = tokenizer_module.plan
    monkeypatch.setattr(tokenizer_module, "plan", lambda _, slots: taken_over(other, slots))
    monkeypatch.setattr(tokenizer_module.selftest, "first_difference", lambda *_: None)
    tested = Tokenizer(fast, ChatTemplates({}, {}), _core.TextCache(1 << 20, 1, 8), self_test_texts=50)
    assert (tested.mode, tested.cuts) == ("native", "anywhere")
    for text in ("the quick brown fox jumps over 1234567 dogs", "another quick brown fox jumps over 1234567 dogs"):
        plain = fast.encode(text, add_special_tokens=False).ids
        assert tested.encode(text, False) == struct.pack(f"<{len(plain)}I", *plain)
        assert (tested.mode, tested.cuts) == ("reference", "nowhere")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("classes", b"\0" * 10),
        ("inert", b"\1"),
        ("cuts", b""),
        ("byte_ids", b"\0" * 4),
        ("merges", b"\0" * 8),
        ("passes", []),
        ("passes", [b"\0\0"]),
        ("joints", b"\0" * 4),
    ],
)
def test_a_malformed_plan_is_refused(field: str, value: object) -> None:
    with pytest.raises(ValueError):
        _core.TextEncoder({**plan(byte_level(), 1024), field: value})


# ---- a tokenizer before it -------------------------------------------------


def reference_only(**options: int) -> Tokenizer:
    fast = byte_level(add_prefix_space=True)
    return Tokenizer(fast, ChatTemplates({}, {}), _core.TextCache(1 << 20), self_test_texts=10, **options)


def raised(ask: Callable[[], object]) -> KvindexError:
    with pytest.raises(KvindexError) as caught:
        ask()
    return caught.value


def test_a_long_text_for_whole_encoding_is_refused_before_work(monkeypatch: pytest.MonkeyPatch) -> None:
    tested = reference_only(max_reference_bytes=50_000)
    assert tested.mode == "reference" and tested.reason == "ByteLevel with add_prefix_space"
    asked = []

    def ids(*_: object) -> list[int]:
        asked.append(time.monotonic())
        time.sleep(0.02)
        return [1]

    monkeypatch.setattr(library, "ids", ids)
    error = raised(lambda: tested.encode_prompt("a" * 60_000))
    assert isinstance(error, InvalidArgument)
    assert error.field == "prompt" and "max_reference_bytes" in error.reason
    # How fast the library is was found at load: the very first long text is refused.
    error = raised(lambda: tested.encode_prompt("c" * 20_000, seconds=1e-6))
    assert isinstance(error, DeadlineExceeded) and "cannot be tokenized" in str(error)
    assert not asked
    # A slow moment does not have later texts refused.
    for letter in "defg":
        assert tested.encode_prompt(letter * 20_000, seconds=0.01)
    assert len(asked) == 4


def test_long_texts_for_whole_encoding_do_not_take_every_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_module, "RATED_BYTES", 10)
    monkeypatch.setattr(tokenizer_module, "LONG_BYTES", 10)
    tested = reference_only()
    slots = tokenizer_module._Reference._long
    for _ in range(tokenizer_module.LONG_AT_ONCE):
        slots.acquire()
    try:
        error = raised(lambda: tested.encode_prompt("a long text"))
        assert isinstance(error, ResourceExhausted)
        assert tested.encode_prompt("short")
    finally:
        for _ in range(tokenizer_module.LONG_AT_ONCE):
            slots.release()
    assert tested.encode_prompt("a long text")


def test_limits_name_the_field() -> None:
    tested = Tokenizer(byte_level(), ChatTemplates({"default": "{{ messages[0].content }}"}, {}), self_test_texts=10)
    body = json.dumps({"messages": [{"role": "user", "content": WORDS}]})
    error = raised(lambda: tested.keys("chat", body, 4, 1337, max_tokens=3))
    assert isinstance(error, InvalidArgument)
    assert (error.field, "limit of 3" in error.reason) == ("chat", True)
    assert isinstance(raised(lambda: tested.keys("prompt", WORDS, 4, 1337, seconds=-1)), DeadlineExceeded)
    error = raised(lambda: tested.keys("prompt", "a\ud800", 4, 1337))
    assert isinstance(error, InvalidArgument) and "Unicode" in error.reason


# ---- where tokenizers come from --------------------------------------------


def saved(directory: Path) -> Path:
    directory.mkdir(parents=True)
    byte_level().save(str(directory / "tokenizer.json"))
    return directory


def sources(*directories: Path, download: bool = False) -> Sources:
    return Sources(_core.TextCache(1 << 20), directories=directories, download=download)


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "no-hub"))


def test_a_model_is_found_by_its_name(tmp_path: Path) -> None:
    found = sources(tmp_path)
    assert found.find("org/a") is None
    last = saved(tmp_path / "a")
    assert found.find("org/a") == last
    full = saved(tmp_path / "org" / "a")
    assert found.find("org/a") == full
    tokenizer = found.discover("org/a")
    assert tokenizer is not None and tokenizer.mode == "native" and not tokenizer.has_chat_template


def test_a_hub_cache_gives_the_snapshot_of_main(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = tmp_path / "hub"
    model = hub / "models--org--b"
    saved(model / "snapshots" / "old")
    main = saved(model / "snapshots" / "new")
    monkeypatch.setenv("HF_HUB_CACHE", str(hub))
    assert sources().find("org/b") in (main, model / "snapshots" / "old")
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("new\n")
    assert sources().find("org/b") == main
    assert sources().configured("any", str(model), None) is not None


@pytest.mark.parametrize("name", ["../x", "/etc", "a/../b", "a/b/c", "", "a\\b", ".hidden", "a/.git", "a\n"])
def test_a_name_never_leads_out_of_the_directories(tmp_path: Path, name: str) -> None:
    saved(tmp_path / "x")
    (tmp_path / "inner").mkdir()
    assert sources(tmp_path / "inner").find(name) is None


def test_a_broken_tokenizer_is_none_by_name_and_an_error_when_configured(tmp_path: Path) -> None:
    (saved(tmp_path / "c") / "tokenizer.json").write_text("{}")
    assert sources(tmp_path).discover("c") is None
    with pytest.raises(InvalidArgument):
        sources().configured("c", str(tmp_path / "c"), None)


def test_the_hub_is_asked_only_when_that_is_turned_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    fetched = saved(tmp_path / "fetched")
    asked: list[str] = []

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.append(name)
        if name == "org/none":
            raise OSError("no network")
        return str(fetched)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert sources().find("org/d") is None and asked == []
    assert sources(download=True).find("org/d") == fetched
    assert sources(download=True).find("org/none") is None


class Engine(BaseHTTPRequestHandler):
    """An engine's /tokenize: one token per letter of what it was asked."""

    asked: list[dict[str, Any]] = []  # noqa: RUF012 - one server per test

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body)
        text = body.get("prompt") or body["messages"][0]["content"]
        answer = {"tokens": [ord(each) for each in text]} if text != "bad" else {"error": "?"}
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextlib.contextmanager
def engine() -> Iterator[str]:
    Engine.asked.clear()
    server = HTTPServer(("127.0.0.1", 0), Engine)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/tokenize"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


def test_chats_of_an_engine_are_remembered_for_a_minute_only() -> None:
    """Its template may write the date; this side does not see which one does."""
    now = [119.0]
    with engine() as url:
        remote = RemoteTokenizer(url, "m", _core.TextCache(1 << 20), clock=lambda: now[0])
        body = json.dumps({"messages": [{"role": "user", "content": "xy"}]})
        for _ in range(2):
            assert remote.encode_chat(body) == struct.pack("<2I", *b"xy")
            assert remote.keys("chat", body, 2, 1337).tokens == 2
        assert len(Engine.asked) == 1
        now[0] = 120.0
        remote.encode_chat(body)
        remote.keys("chat", body, 2, 1337)
        assert len(Engine.asked) == 2
        remote.encode_prompt("abcd")
        now[0] += 86_400
        remote.encode_prompt("abcd")
        assert len(Engine.asked) == 3


def test_an_engine_can_be_asked_instead() -> None:
    with engine() as url:
        remote = sources().configured("m", None, url)
        assert isinstance(remote, RemoteTokenizer) and remote.mode == "remote"
        ids = struct.pack("<4I", *b"abcd")
        assert remote.encode_prompt("abcd") == remote.encode_prompt("abcd") == ids
        assert remote.keys("prompt", "abcd", 2, 1337).keys == _core.block_keys(ids, 2)
        assert Engine.asked == [{"model": "m", "prompt": "abcd", "add_special_tokens": True}]
        body = json.dumps({"messages": [{"role": "user", "content": "xy"}], "tools": None})
        assert remote.encode_chat(body) == struct.pack("<2I", *b"xy")
        assert Engine.asked[1]["add_special_tokens"] is False and Engine.asked[1]["model"] == "m"
        assert isinstance(raised(lambda: remote.encode_prompt("bad")), Unavailable)
        assert isinstance(raised(lambda: remote.encode_chat("{")), InvalidArgument)
        refused = json.dumps({"messages": [], "chat_template": "{{ x }}"})
        assert isinstance(raised(lambda: remote.encode_chat(refused)), InvalidArgument)
    assert isinstance(raised(lambda: remote.encode_prompt("new")), Unavailable)


def test_an_engine_that_hangs_does_not_hold_every_worker() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/tokenize"
        source = Sources(_core.TextCache(1 << 20), engines_at_once=2)
        one, other = source.configured("one", None, url), source.configured("other", None, url)
        assert isinstance(one, RemoteTokenizer) and isinstance(other, RemoteTokenizer)
        ends: list[KvindexError] = []
        threads = [
            threading.Thread(target=lambda text=text: ends.append(raised(lambda: one.encode_prompt(text, seconds=1.5))))
            for text in ("same", "same")
        ]
        for thread in threads:
            thread.start()
        time.sleep(0.3)
        started = time.monotonic()
        error = raised(lambda: other.keys("prompt", "another", 2, 1337, seconds=5))
        assert isinstance(error, ResourceExhausted) and time.monotonic() - started < 1
        for thread in threads:
            thread.join(10)
        assert [type(each) for each in ends] == [DeadlineExceeded] * 2
        assert isinstance(raised(lambda: other.encode_prompt("x", seconds=0.2)), DeadlineExceeded)
