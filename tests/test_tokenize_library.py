"""Texts for which the library has no ids: refused as the caller's, or an error of ours; never a server that dies."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, models, normalizers, trainers
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import pre_tokenizers as splits
from tokenizers_at_hand import CORPUS, byte_level

from kvindex_server.errors import InvalidArgument
from kvindex_server.tokenize import library, load_tokenizer, selftest
from kvindex_server.tokenize.chat import ChatTemplates
from kvindex_server.tokenize.tokenizer import Tokenizer

PANICS = "<m>\n\n\nx"


def ids(raw: bytes) -> list[int]:
    return list(struct.unpack(f"<{len(raw) // 4}I", raw))


def unigram() -> FastTokenizer:
    fast = FastTokenizer(models.Unigram())
    fast.pre_tokenizer = splits.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=["</s>"], show_progress=False)
    fast.train_from_iterator(CORPUS * 3, trainer)
    return fast


def words(model: type[models.WordLevel] | type[models.WordPiece]) -> FastTokenizer:
    fast = FastTokenizer(model({"hello": 0, "world": 1}, unk_token="[UNK]"))
    fast.pre_tokenizer = splits.Whitespace()
    fast.add_special_tokens(["</s>"])
    return fast


def panicking() -> FastTokenizer:
    """Two tokens that take the same blanks, which the library does not survive; it encodes the rest."""
    strips = AddedToken("<m>", rstrip=True, special=True), AddedToken("\n\n", lstrip=True, normalized=False)
    return byte_level(specials=("</s>", *strips), normalizer=normalizers.Lowercase())


@pytest.mark.parametrize(
    ("fast", "known"),
    [
        (unigram(), "the quick"),
        (words(models.WordLevel), "hello world</s>hello"),
        (words(models.WordPiece), "hello world</s>hello"),
    ],
    ids=["Unigram", "WordLevel", "WordPiece"],
)
def test_a_tokenizer_without_an_unknown_token_is_served(tmp_path: Path, fast: FastTokenizer, known: str) -> None:
    fast.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.mode == "reference"
    for _ in range(2):
        assert ids(tokenizer.encode_prompt(known)) == fast.encode(known).ids
        with pytest.raises(InvalidArgument, match="has no tokens for the text") as caught:
            tokenizer.encode_prompt("secret 中")
        assert caught.value.field == "prompt" and "secret" not in caught.value.message


def test_a_panic_of_the_library_is_an_ordinary_error(capfd: pytest.CaptureFixture[str]) -> None:
    """It is no Exception as it comes: nobody would answer, count or log the call."""
    tokenizer = Tokenizer(panicking(), ChatTemplates({}, {}), self_test_texts=200)
    for _ in range(2):
        with pytest.raises(library.Panicked):
            tokenizer.encode_prompt(PANICS)
        assert tokenizer.encode_prompt("<m> x")
    assert issubclass(library.Panicked, Exception)


def test_self_tests_pass_over_what_the_library_cannot_encode(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(selftest, "texts", lambda count, specials: iter(["<m> x", PANICS, "</s>a"][:count]))
    tokenizer = Tokenizer(panicking(), ChatTemplates({}, {}))
    assert tokenizer.cuts == "added_tokens"
    assert tokenizer.encode_prompt("<m> x")


@pytest.mark.parametrize(
    "broken",
    [
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},  # a panic
        {"model": {"type": "Unigram", "unk_id": 7, "vocab": [["a", 0.0]]}},
        {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(("}, "behavior": "Isolated", "invert": False}},
    ],
    ids=["panic", "model", "pattern"],
)
def test_a_file_that_the_library_cannot_take_is_named(
    tmp_path: Path, broken: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    definition = {**json.loads(byte_level().to_str()), **broken}
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition), encoding="utf-8")
    with pytest.raises(InvalidArgument, match=r"tokenizer\.json cannot be loaded"):
        load_tokenizer(tmp_path)


def test_a_failure_while_a_tokenizer_is_taken_over_is_named(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise KeyError("whatever")

    monkeypatch.setattr("kvindex_server.tokenize.tokenizer.plan", fails)
    with pytest.raises(InvalidArgument, match="cannot be loaded: 'whatever'"):
        load_tokenizer(directory)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    byte_level().save(str(tmp_path / "tokenizer.json"))
    return tmp_path
