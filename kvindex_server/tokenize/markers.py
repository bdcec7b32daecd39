"""Added tokens before which a text may be cut, whatever else the tokenizer does with it.

The library first takes the added tokens out of the text as it came, leftmost and of those the longest, and only then
normalizes, splits and encodes each piece between them by itself. So a text may be cut before an added token that is
taken out wherever it stands: no other may reach across the cut, and none may strip it away. Before, not behind: what
comes first in a text may be treated apart (Metaspace's `first`), and behind the cut the token still comes first.
"""

import itertools
import json
from collections.abc import Iterator, Sequence
from typing import Any

from tokenizers import Tokenizer as FastTokenizer

MAX_BYTES = 1 << 20
"""Of all added tokens together; more would take too long to compare."""


def markers(fast: FastTokenizer) -> list[str]:
    """The contents of the added tokens before which every text may be cut; empty when there are none."""
    if fast.encode_special_tokens:
        return []  # it does not take them out at all
    definition: dict[str, Any] = json.loads(fast.to_str())
    if any(definition["model"].get(option) for option in ("dropout", "alpha", "nbest_size")):
        return []  # ids that are drawn cannot be put together
    # The others are searched for later, piece by piece.
    early = [each for each in definition["added_tokens"] if not each["normalized"] and each["content"]]
    if sum(len(each["content"]) ** 2 for each in early) > MAX_BYTES:
        return []
    contents = [each["content"] for each in early]
    inner = set(_inner(contents))
    tails = {content[start:] for content in contents for start in range(1, len(content))}
    shifting = tuple(each["content"] for each in early if each["lstrip"] or each["single_word"])
    looks_behind = any(each["single_word"] for each in early)
    return [
        content
        for content in contents
        if not (looks_behind and _may_be_of_a_word(content[0]))  # a token just before it is looked for by what follows
        and not content[0].isspace()  # a token before it with rstrip would take that away
        and content not in inner  # another token has it inside, and may have begun before
        and not any(content[:end] in tails for end in range(1, len(content) + 1))  # another may end within it
        and not any(each.startswith(content) for each in shifting)  # what is found there is this or a longer one
    ]


def _may_be_of_a_word(char: str) -> bool:
    return not char.isascii() or char.isalnum() or char == "_"


def _inner(contents: Sequence[str]) -> Iterator[str]:
    """All that stands in a token behind its first character."""
    for content in contents:
        for start, end in itertools.combinations(range(1, len(content) + 1), 2):
            yield content[start:end]
