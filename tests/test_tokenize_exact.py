"""Whatever the tokenizer and the state of the cache, a text gives the ids of one plain encoding."""

import gc
import os
import random
import struct
import threading
import unicodedata
from collections.abc import Callable, Iterator
from itertools import islice

import pytest
from prompts import prompts
from tokenizers import AddedToken, normalizers
from tokenizers import Tokenizer as FastTokenizer
from tokenizers_at_hand import NASTY, NATIVE, WHOLE, byte_level, load, real

from kvindex_server import _core
from kvindex_server.tokenize import selftest
from kvindex_server.tokenize.chat import ChatTemplates
from kvindex_server.tokenize.tokenizer import Tokenizer

TEXTS = int(os.environ.get("TOKENIZER_TEXTS", "1500"))
SHARED_TEXTS = TEXTS if "TOKENIZER_TEXTS" in os.environ else 120
SEED = int(os.environ.get("TOKENIZER_SEED", "0"))
REAL = real()
ROUNDS = ("cold", "warm")


def tokenizer(fast: FastTokenizer, *, max_bytes: int = 64 << 20, chunk_bytes: int = 1) -> Tokenizer:
    """Cut wherever it is safe, so that every boundary is tried."""
    cache = _core.TextCache(max_bytes, 0, chunk_bytes)
    return Tokenizer(fast, ChatTemplates({}, {}), cache, self_test_texts=300)


def plain(fast: FastTokenizer, text: str, special: bool) -> bytes:
    ids = fast.encode(text, add_special_tokens=special).ids
    return struct.pack(f"<{len(ids)}I", *ids)


def specials(fast: FastTokenizer) -> list[str]:
    return [each.content for _, each in sorted(fast.get_added_tokens_decoder().items())]


def samples(fast: FastTokenizer, count: int, seed: int = 7) -> Iterator[str]:
    """The self-test's texts and others, by turns."""
    known, others = specials(fast), prompts(count - count // 2, specials(fast), seed + SEED)
    for text in selftest.texts(count // 2, known, seed + SEED):
        yield next(others)
        yield text
    yield from others


@pytest.fixture(scope="module", params=[*NASTY, *REAL])
def case(request: pytest.FixtureRequest) -> Iterator[tuple[str, FastTokenizer, Tokenizer]]:
    name = request.param
    fast = load(REAL[name]) if name in REAL else NASTY[name]()
    yield name, fast, tokenizer(fast)
    gc.collect()


Case = tuple[str, FastTokenizer, Tokenizer]


def test_each_shape_is_native_or_says_why_not(case: Case) -> None:
    name, _, tested = case
    if name in NASTY:
        assert (tested.mode == "native") == (name in NATIVE), tested.reason
        assert (tested.cuts == "anywhere") == (name in NATIVE)
        assert (tested.cuts == "nowhere") == (name in WHOLE)
    assert (tested.reason == "") == (tested.mode == "native")


def test_ids_equal_one_plain_encoding_cold_and_warm(case: Case) -> None:
    _, fast, tested = case
    for number, text in enumerate(samples(fast, TEXTS)):
        for special in (False, True):
            expected = plain(fast, text, special)
            for state in ROUNDS:
                assert tested.encode(text, special) == expected, (number, special, state)


def test_long_texts_share_prefixes_and_stay_equal(case: Case) -> None:
    """Grown, cut and changed in the middle: what is known of one text is not mistaken for another's."""
    _, fast, _ = case
    tested = tokenizer(fast, chunk_bytes=64)
    rng = random.Random(3)
    text = "".join(samples(fast, 150, 11))
    for _ in range(25):
        at = rng.randrange(len(text))
        text = rng.choice((text[:at], text[:at] + "x" + text[at + 1 :], text + "".join(samples(fast, 30, at))))
        text = text[:20_000]
        assert tested.encode(text, False) == plain(fast, text, False)


def test_every_place_around_a_boundary(case: Case) -> None:
    """Prefixes of every length of a text full of boundaries, one after the other before the same cache."""
    _, fast, tested = case
    around = "".join((each + " ") for each in islice(specials(fast), 3))
    text = "it's  the end\n\n of 1234 " + around + "\n  e\u0301\u0323 中文。\n👨‍👩‍👧 'LL\r\n ſ"
    for end in range(len(text) + 1):
        for special in (False, True):
            assert tested.encode(text[:end], special) == plain(fast, text[:end], special), end
            assert tested.encode(text[end:], special) == plain(fast, text[end:], special), end


def test_keys_are_those_of_the_ids(case: Case) -> None:
    _, fast, tested = case
    text = "".join(samples(fast, 120, 5))
    for context in ((4, 1337, "", ""), (16, 1337, "", ""), (16, 9, "lora", ""), (16, 9, "", "salt"), (4, 1337, "", "")):
        for end in (len(text), len(text) // 2, len(text), 3):
            ids = plain(fast, text[:end], True)
            keyed = tested.keys("prompt", text[:end], *context)
            assert keyed.tokens == len(ids) // 4
            assert keyed.keys == _core.block_keys(ids, *context), (context, end)


def test_threads_and_eviction_change_nothing(case: Case) -> None:
    _, fast, _ = case
    tested = tokenizer(fast, max_bytes=20_000, chunk_bytes=16)
    texts = list(samples(fast, SHARED_TEXTS, 21))
    expected = [plain(fast, text, True) for text in texts]
    wrong: list[int] = []

    def work(seed: int) -> None:
        order = list(range(len(texts)))
        random.Random(seed).shuffle(order)
        wrong.extend(number for number in order if tested.encode_prompt(texts[number]) != expected[number])

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(600)
    assert not any(thread.is_alive() for thread in threads)
    assert wrong == []


def test_an_added_token_that_the_normalizer_changes_is_left_to_the_library() -> None:
    """It is searched for as NFC makes it, and found in a text that NFC leaves alone."""
    token = AddedToken("<o\u0308>", normalized=True, special=False)
    fast = byte_level(normalizer=normalizers.NFC(), specials=("</s>", token))
    tested = tokenizer(fast)
    assert tested.reason == "an added token that the normalizer changes"
    for text in ("hello <\u00f6> world", "hello <o\u0308> world", "a<\u00f6>"):
        assert tested.encode(text, False) == plain(fast, text, False)
    kept = byte_level(normalizer=normalizers.NFC(), specials=("</s>", AddedToken("<\u00f6>", normalized=True)))
    assert tokenizer(kept).mode == "native"


def test_a_text_is_not_cut_behind_what_the_normalizer_changes() -> None:
    """U+0958 is a letter, but ends as a mark, which the next match begins with."""
    fast = NASTY["qwen_nfc"]()
    tested = tokenizer(fast)
    assert (tested.mode, tested.cuts) == ("native", "anywhere")
    changed = [char for char in map(chr, range(0x80, 0x20000)) if unicodedata.normalize("NFC", char) != char]
    assert len(changed) > 500
    for char in (*changed, "e\u0301", "\u1100\u1161", "\u0915\u093c"):
        for text in (f"{char}'t{char}'ll", f"a{char} the{char}\n{char}12{char}!!"):
            assert tested.encode(text, False) == plain(fast, text, False), text


def test_blanks_that_two_added_tokens_may_take_are_left_to_the_library() -> None:
    """Where one strips behind itself and a blank one before itself, the library itself may fail."""
    strips, blank = AddedToken("<m>", rstrip=True, special=True), AddedToken("\n\n", lstrip=True, normalized=False)
    fast = byte_level(specials=("</s>", strips, blank))
    tested = tokenizer(fast)
    assert tested.reason == "an added token of blanks with lstrip beside one with rstrip"
    for text in ("<m> \n\nx", "a \n\n b", "<m> x</s>\n\n"):
        assert tested.encode(text, False) == plain(fast, text, False)
    alone = (strips, AddedToken("\n\n", normalized=False)), (AddedToken("<m>", special=True), blank)
    assert all(tokenizer(byte_level(specials=("</s>", *each))).mode == "native" for each in alone)


def test_a_long_word_does_not_cost_its_square() -> None:
    fast = NASTY["llama3"]()
    tested = tokenizer(fast)
    for text in ("a" * 100_000, "the" * 30_000, "中" * 30_000, " " * 50_000, "<" * 50_000):
        assert tested.encode(text, False) == plain(fast, text, False)


def ids_of(text: str, left: float) -> bytes:
    """A reference that counts letters."""
    return struct.pack("<I", len(text))


def counting(calls: list[str]) -> Callable[[str, float], bytes]:
    def reference(text: str, left: float) -> bytes:
        calls.append(text)
        return ids_of(text, left)

    return reference
