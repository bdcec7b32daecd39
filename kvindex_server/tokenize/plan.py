"""Takes a tokenizer's definition over into the native encoder, as far as that is provably the same.

Taken over: byte-level BPE behind pre-tokenizers that isolate matches of understood patterns, added tokens with
`lstrip` and `rstrip`, and NFC for characters that it leaves alone. Everything else is Unsupported, with the
reason that the operator is told, and the reference encoder keeps the work.
"""

import itertools
import json
from array import array
from collections.abc import Iterator, Mapping
from typing import Any

from tokenizers import Tokenizer as FastTokenizer

from kvindex_server.tokenize import charsets
from kvindex_server.tokenize.pattern import Table, Unsupported, compile_table, parse

Plan = dict[str, Any]
"""What `_core.TextEncoder` takes."""

_SPACE = "white space"
_CHANGED = "changed by the normalizer"

# What ByteLevel splits by when no pattern comes before it.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def plan(fast: FastTokenizer, word_slots: int) -> Plan:
    """The native encoder's plan. Unsupported when the tokenizer is not one it reproduces."""
    definition: dict[str, Any] = json.loads(fast.to_str())
    programs = [parse(pattern) for pattern in _patterns(definition["pre_tokenizer"])]
    normalizes = _normalizes(definition["normalizer"])
    model = _Model(definition["model"])
    added = [_added(each) for each in definition["added_tokens"]]
    named = {each: charsets.matched_by(each) for program in programs for each in program.charsets}
    named[_SPACE] = charsets.WHITE_SPACE
    if normalizes:
        named[_CHANGED] = charsets.changed_by_nfc()
    try:
        classes, members = charsets.partition(named)
    except ValueError as error:
        raise Unsupported(str(error)) from None
    tables = [compile_table(program, members) for program in programs]
    return {
        "classes": classes,
        "inert": bytes(_CHANGED not in each for each in members),
        "space": bytes(_SPACE in each for each in members),
        "cuts": _cuts(tables, classes, members, added),
        "passes": [array("H", table.entries).tobytes() for table in tables],
        "added": added,
        "byte_ids": model.byte_ids,
        "merges": model.merges,
        "whole_words": model.whole_words,
        "word_slots": word_slots,
    }


def _patterns(pre_tokenizer: dict[str, Any] | None) -> list[str]:
    """The patterns in order; ByteLevel must come last, as it changes the text."""
    steps = list(_flat(pre_tokenizer, "Sequence", "pretokenizers"))
    if not steps or steps[-1]["type"] != "ByteLevel":
        raise Unsupported("the pre-tokenizer does not end with ByteLevel")
    patterns = []
    for step in steps[:-1]:
        regex = step.get("pattern", {}).get("Regex") if step["type"] == "Split" else None
        if regex is None or step["behavior"] != "Isolated" or step["invert"]:
            raise Unsupported(f"pre-tokenizer {step['type']}")
        patterns.append(regex)
    if steps[-1]["add_prefix_space"]:
        raise Unsupported("ByteLevel with add_prefix_space")
    if steps[-1]["use_regex"]:
        patterns.append(_GPT2)
    if not patterns:
        raise Unsupported("no pattern splits the text")
    return patterns


def _normalizes(normalizer: dict[str, Any] | None) -> bool:
    kinds = {each["type"] for each in _flat(normalizer, "Sequence", "normalizers")}
    if kinds - {"NFC"}:
        raise Unsupported(f"normalizer {', '.join(sorted(kinds - {'NFC'}))}")
    return bool(kinds)


def _flat(step: dict[str, Any] | None, group: str, members: str) -> Iterator[dict[str, Any]]:
    if step is None:
        return
    if step["type"] != group:
        yield step
        return
    for each in step[members]:
        yield from _flat(each, group, members)


def _added(token: Mapping[str, Any]) -> tuple[str, int, bool, bool, bool]:
    if token["single_word"]:
        raise Unsupported("an added token with single_word")
    return token["content"], token["id"], token["lstrip"], token["rstrip"], token["normalized"]


class _Model:
    """The vocabulary and merges of a byte-level BPE, in bytes."""

    def __init__(self, model: Mapping[str, Any]) -> None:
        if model["type"] != "BPE":
            raise Unsupported(f"model {model['type']}")
        for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
            if model.get(option):
                raise Unsupported(f"BPE with {option}")
        vocab: dict[str, int] = model["vocab"]
        letters = _byte_letters()
        missing = [letter for letter in letters if letter not in vocab]
        if missing:
            raise Unsupported("the vocabulary lacks a byte")
        self.byte_ids = array("I", [vocab[letter] for letter in letters]).tobytes()
        merges = array("I")
        for merge in model["merges"]:
            left, right = merge.split(" ") if isinstance(merge, str) else merge
            merges.extend((vocab[left], vocab[right], vocab[left + right]))
        self.merges = merges.tobytes()
        self.whole_words: dict[bytes, int] = {}
        if model.get("ignore_merges"):
            bytes_of = {letter: byte for byte, letter in enumerate(letters)}
            for token, number in vocab.items():
                # A token with other letters is no byte string, and no pre-token can equal it.
                if all(letter in bytes_of for letter in token):
                    self.whole_words[bytes(bytes_of[letter] for letter in token)] = number


def _byte_letters() -> list[str]:
    """The letter that stands for each byte in a byte-level vocabulary."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    letters = []
    shifted = 0x100
    for byte in range(256):
        letters.append(chr(byte if byte in printable else shifted))
        shifted += byte not in printable
    return letters


def _cuts(
    tables: list[Table],
    classes: bytes,
    members: list[frozenset[str]],
    added: list[tuple[str, int, bool, bool, bool]],
) -> bytes:
    """Per pair of classes, left * classes + right: whether a text may be cut between any two such characters.

    It may where no pass has a match across, where the last pass starts a match behind, where the normalizer
    leaves the right one alone, and where no added token reaches across, by itself or by the space it strips.
    """
    count = len(members)
    across = {
        (classes[ord(left)], classes[ord(right)])
        for content, *_ in added
        for left, right in itertools.pairwise(content)
    }
    lstrip = any(each[2] for each in added)
    rstrip = any(each[3] for each in added)
    safe = bytearray(count * count)
    for right in range(count):
        if _CHANGED in members[right] or not tables[-1].always_starts(right):
            continue
        if rstrip and _SPACE in members[right]:
            continue
        for left in range(count):
            if (left, right) in across or (lstrip and _SPACE in members[left]):
                continue
            safe[left * count + right] = all(table.uncrossed(left, right) for table in tables)
    return bytes(safe)
