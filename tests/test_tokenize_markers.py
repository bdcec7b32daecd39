"""Cuts before added tokens: only where nothing reaches across, and what was seen before is not encoded again."""

import struct

import pytest
from tokenizers import AddedToken, normalizers
from tokenizers import Tokenizer as FastTokenizer
from tokenizers_at_hand import NASTY, byte_level

from kvindex_server import _core, checkup
from kvindex_server.tokenize import tokenizer as tokenizer_module
from kvindex_server.tokenize.chat import ChatTemplates
from kvindex_server.tokenize.markers import markers
from kvindex_server.tokenize.tokenizer import Tokenizer


def lowercase(*tokens: str | AddedToken) -> FastTokenizer:
    """One that only the library encodes."""
    return byte_level(normalizer=normalizers.Lowercase(), specials=tokens)


def ids(fast: FastTokenizer, text: str) -> bytes:
    plain = fast.encode(text, add_special_tokens=False).ids
    return struct.pack(f"<{len(plain)}I", *plain)


@pytest.mark.parametrize(
    ("tokens", "safe"),
    [
        (("<a>", "<b>"), ["<a>", "<b>"]),
        (("<a>", "<a><b>"), ["<a>", "<a><b>"]),
        (("<a>", "x<a>"), ["x<a>"]),
        (("<a>", "x<"), ["x<"]),  # in `x<a>` the first is never found
        (("aa",), []),
        (("<a>", " <b>", "\n"), ["<a>"]),
        (("<a>", AddedToken("<a>b", lstrip=True, normalized=False)), []),
        (("<a>", AddedToken("<a>b", single_word=True, normalized=False)), []),
        (("<a>", AddedToken("<b>", rstrip=True, normalized=False)), ["<a>", "<b>"]),
        ((AddedToken("<a>", normalized=True), "<b>"), ["<b>"]),
        ((AddedToken("x", single_word=True, normalized=False), "a_", "_b", "é", "1", "<b>"), ["<b>"]),
        ((AddedToken("x", single_word=True, normalized=True), "a_", "<b>"), ["<b>", "a_"]),
    ],
)
def test_no_other_token_may_reach_across(tokens: tuple[str | AddedToken, ...], safe: list[str]) -> None:
    fast = lowercase(*tokens)
    assert sorted(markers(fast)) == sorted(safe)


def test_drawn_ids_are_never_put_together() -> None:
    fast = lowercase("<a>")
    fast.model.dropout = 0.1
    assert markers(fast) == []


def test_of_a_grown_chat_only_the_end_is_encoded_again() -> None:
    fast = NASTY["llama2"]()
    cache = _core.TextCache(1 << 20, 0, 64)
    tested = Tokenizer(fast, ChatTemplates({}, {}), cache, self_test_texts=50)
    assert (tested.mode, tested.cuts) == ("reference", "added_tokens")
    text = ""
    for turn in range(40):
        text += f"<|user|> the quick fox {turn} jumps over the lazy dog<|end|> \n"
        before = cache.stats()
        assert tested.encode(text, False) == ids(fast, text)
        assert cache.stats()["chunk_misses"] - before["chunk_misses"] <= 2
    assert cache.stats()["tokens_saved"] > 3 * cache.stats()["tokens_encoded"]


def test_a_token_that_stands_alone_looks_across_the_cut() -> None:
    """`fox` is none where a letter follows, though that letter begins a token."""
    fast = lowercase("</s>", AddedToken("fox", single_word=True, normalized=False, special=True), "agl_Latn")
    tested = Tokenizer(fast, ChatTemplates({}, {}), _core.TextCache(1 << 20, 0, 1), self_test_texts=50)
    assert tested.cuts == "added_tokens"
    for text in ("foxagl_Latn hello", "the foxagl_Latn", "the fox agl_Latn</s>fox"):
        assert tested.encode(text, False) == ids(fast, text)


def test_without_safe_cuts_a_text_is_whole_and_the_check_says_so() -> None:
    cache = _core.TextCache(1 << 20, 0, 1)
    fast = lowercase("aa")
    tested = Tokenizer(fast, ChatTemplates({}, {}), cache, self_test_texts=50)
    assert tested.cuts == "nowhere"
    assert tested.encode("aa b aaa aa", False) == ids(fast, "aa b aaa aa")
    assert cache.stats()["chunks"] == 1
    assert checkup._why(tested) == "normalizer Lowercase; texts are encoded whole"
    cut = Tokenizer(lowercase("<a>"), ChatTemplates({}, {}), cache, self_test_texts=50)
    assert checkup._why(cut) == "normalizer Lowercase; texts are cut only before added tokens"


def test_cuts_that_fail_their_self_test_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_module, "markers", lambda fast: ["o", " "])
    tested = Tokenizer(lowercase("<a>"), ChatTemplates({}, {}), self_test_texts=200)
    assert tested.cuts == "nowhere"
