"""Takes a tokenizer's definition over into the native encoder, as far as that is provably the same.

Taken over are two shapes of BPE, with added tokens that may have `lstrip` and `rstrip`:

- byte-level behind pre-tokenizers that isolate matches of understood patterns, and NFC for characters that it
  leaves alone;
- character-level without pre-tokens, spaces as U+2581, bytes for characters without a token.

Everything else is Unsupported, with the reason that the operator is told, and the reference keeps the work.
"""

import itertools
import json
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer as FastTokenizer
from tokenizers import normalizers

from kvindex_server.tokenize import charsets
from kvindex_server.tokenize.pattern import Table, Unsupported, compile_table, parse

Plan = dict[str, Any]
"""What `_core.TextEncoder` takes."""

Added = tuple[str, int, bool, bool, bool]
"""An added token: content, id, lstrip, rstrip, normalized."""

_SPACE_SIGN = "\u2581"
_SPACE = "white space"
_CHANGED = "changed by the normalizer"

# What ByteLevel splits by when no pattern comes before it.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def plan(fast: FastTokenizer, word_slots: int) -> Plan:
    """The native encoder's plan. Unsupported when the tokenizer is not one it reproduces."""
    if fast.encode_special_tokens:
        raise Unsupported("special tokens that are split like text")
    definition: dict[str, Any] = json.loads(fast.to_str())
    model: dict[str, Any] = definition["model"]
    if model["type"] != "BPE":
        raise Unsupported(f"model {model['type']}")
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            raise Unsupported(f"BPE with {option}")
    added = [_added(each) for each in definition["added_tokens"]]
    if any(each[3] for each in added) and any(each[2] and each[0].isspace() for each in added):
        # Both take the same blanks; the library then fails in itself, or gives them to either.
        raise Unsupported("an added token of blanks with lstrip beside one with rstrip")
    shape = _by_character(definition, added) if model.get("byte_fallback") else _byte_level(definition, added)
    return {**shape, "added": added, "merges": _merges(model).tobytes(), "word_slots": word_slots}


def _byte_level(definition: Mapping[str, Any], added: Sequence[Added]) -> Plan:
    programs = [parse(pattern) for pattern in _patterns(definition["pre_tokenizer"])]
    kinds = {each["type"] for each in _flat(definition["normalizer"], "Sequence", "normalizers")}
    if kinds - {"NFC"}:
        raise Unsupported(f"normalizer {', '.join(sorted(kinds - {'NFC'}))}")
    nfc = normalizers.NFC()
    if kinds and any(normalized and nfc.normalize_str(content) != content for content, *_, normalized in added):
        raise Unsupported("an added token that the normalizer changes")
    vocab: dict[str, int] = definition["model"]["vocab"]
    letters = _byte_letters()
    if not all(letter in vocab for letter in letters):
        raise Unsupported("the vocabulary lacks a byte")
    named = {each: charsets.matched_by(each) for program in programs for each in program.charsets}
    named[_SPACE] = charsets.WHITE_SPACE
    if kinds:
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
        "byte_ids": array("I", [vocab[letter] for letter in letters]).tobytes(),
        "char_ids": b"",
        "joints": b"",
        "whole_words": _whole_words(vocab, letters) if definition["model"].get("ignore_merges") else {},
    }


def _whole_words(vocab: Mapping[str, int], letters: Sequence[str]) -> dict[bytes, int]:
    """Tokens by their bytes; one with other letters is no byte string, and no pre-token can equal it."""
    bytes_of = {letter: byte for byte, letter in enumerate(letters)}
    return {
        bytes(bytes_of[letter] for letter in token): number
        for token, number in vocab.items()
        if all(letter in bytes_of for letter in token)
    }


def _by_character(definition: Mapping[str, Any], added: Sequence[Added]) -> Plan:
    model: dict[str, Any] = definition["model"]
    vocab: dict[str, int] = model["vocab"]
    normalizer = definition["normalizer"]
    if normalizer != {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE_SIGN}:
        raise Unsupported("a normalizer that does more than replace spaces")
    # Once no space is left, splitting by spaces does nothing.
    split = definition["pre_tokenizer"]
    if split is not None and (split["type"] != "Split" or split["pattern"] != {"String": " "} or split["invert"]):
        raise Unsupported(f"pre-tokenizer {split['type']}")
    if model.get("ignore_merges"):
        raise Unsupported("ignore_merges without pre-tokens")
    if any(normalized for *_, normalized in added):
        raise Unsupported("an added token that is searched for after the spaces are replaced")
    bytes_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    if not all(token in vocab for token in bytes_tokens):
        raise Unsupported("the vocabulary lacks a byte")
    joints: set[tuple[str, str]] = set()
    of_bytes = set(bytes_tokens)
    for left, right in map(_pair, model["merges"]):
        if left in of_bytes or right in of_bytes:
            raise Unsupported("a merge of bytes")
        joints.add((left[-1], right[0]))
    for content, *_ in added:
        spaced = content.replace(" ", _SPACE_SIGN)
        joints.update(itertools.pairwise(spaced))
    classes, members = charsets.partition({_SPACE: charsets.WHITE_SPACE})
    return {
        "classes": classes,
        "inert": bytes([1] * len(members)),
        "space": bytes(_SPACE in each for each in members),
        "cuts": bytes(_strips_nothing(members, added, left, right) for left, right in _pairs(len(members))),
        "passes": [],
        "byte_ids": array("I", [vocab[token] for token in bytes_tokens]).tobytes(),
        "char_ids": _u32(value for token, number in vocab.items() if len(token) == 1 for value in (ord(token), number)),
        "joints": _u32(ord(char) for pair in sorted(joints) for char in pair),
        "whole_words": {},
    }


def _u32(values: Iterable[int]) -> bytes:
    return array("I", values).tobytes()


def _pairs(count: int) -> Iterator[tuple[int, int]]:
    return itertools.product(range(count), range(count))


def _strips_nothing(members: Sequence[frozenset[str]], added: Sequence[Added], left: int, right: int) -> bool:
    """No added token takes white space away across a cut between these classes."""
    lstrip, rstrip = any(each[2] for each in added), any(each[3] for each in added)
    return not (lstrip and _SPACE in members[left]) and not (rstrip and _SPACE in members[right])


def _merges(model: Mapping[str, Any]) -> "array[int]":
    vocab: dict[str, int] = model["vocab"]
    merges = array("I")
    for left, right in map(_pair, model["merges"]):
        merges.extend((vocab[left], vocab[right], vocab[left + right]))
    return merges


def _pair(merge: str | Sequence[str]) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


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


def _flat(step: dict[str, Any] | None, group: str, members: str) -> Iterator[dict[str, Any]]:
    if step is None:
        return
    if step["type"] != group:
        yield step
        return
    for each in step[members]:
        yield from _flat(each, group, members)


def _added(token: Mapping[str, Any]) -> Added:
    if token["single_word"]:
        raise Unsupported("an added token with single_word")
    return token["content"], token["id"], token["lstrip"], token["rstrip"], token["normalized"]


def _byte_letters() -> list[str]:
    """The letter that stands for each byte in a byte-level vocabulary."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    letters = []
    shifted = 0x100
    for byte in range(256):
        letters.append(chr(byte if byte in printable else shifted))
        shifted += byte not in printable
    return letters


def _cuts(tables: Sequence[Table], classes: bytes, members: Sequence[frozenset[str]], added: Sequence[Added]) -> bytes:
    """Per pair of classes, left * classes + right: whether a text may be cut between any two such characters.

    It may where no pass has a match across, where the last pass starts a match behind, where the normalizer leaves
    both alone (the left one may otherwise end as a character of another class, as U+0958 does), and where no added
    token reaches across, by itself or by the space it strips.
    """
    across = {
        (classes[ord(left)], classes[ord(right)])
        for content, *_ in added
        for left, right in itertools.pairwise(content)
    }
    return bytes(
        (left, right) not in across
        and _CHANGED not in members[left] | members[right]
        and _strips_nothing(members, added, left, right)
        and tables[-1].always_starts(right)
        and all(table.uncrossed(left, right) for table in tables)
        for left, right in _pairs(len(members))
    )
