"""What a model's configuration says of its tokens beside tokenizer.json, taken as transformers takes it."""

from collections.abc import Iterator, Mapping
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as FastTokenizer

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_UNNAMED, _UNNAMED_BEFORE = "extra_special_tokens", "additional_special_tokens"
_OWN = "model_specific_special_tokens"
_NUMBERED = "kvindex_added_tokens"
"""What added_tokens.json lists, by id; the name is ours, none of a file's."""


def merged(
    config: Mapping[str, Any], special_tokens_map: Mapping[str, Any], added_tokens: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """tokenizer_config.json with what counts of special_tokens_map.json and added_tokens.json: nothing where the
    first lists the added tokens; else the map wins, but for a model's own names."""
    extra = config.get(_UNNAMED) or config.get(_UNNAMED_BEFORE)
    own = {name: value for name, value in config.items() if _is_own(name) and isinstance(value, str)}
    rest = {name: value for name, value in config.items() if name not in (*own, _UNNAMED, _UNNAMED_BEFORE)}
    if isinstance(extra, dict):
        own |= extra
    elif isinstance(extra, list):
        rest[_UNNAMED] = extra
    if "added_tokens_decoder" not in config:
        rest |= special_tokens_map
        rest[_NUMBERED] = _numbered(rest, special_tokens_map, added_tokens or {})
    return {**rest, _OWN: own or config.get(_OWN) or {}}


def _numbered(
    config: Mapping[str, Any], special_tokens_map: Mapping[str, Any], added_tokens: Mapping[str, Any]
) -> dict[int, dict[str, Any]]:
    """By id. Special are those that are named as text, or by the map in any way."""
    names = [config.get(name) for name in _NAMED if isinstance(config.get(name), str)]
    names += [special_tokens_map.get(name) for name in _NAMED]
    extra = [each for each in config.get(_UNNAMED) or () if isinstance(each, str)]
    special = {_content(each) for each in (*names, *extra)}
    return {
        int(number): {"content": content, "special": content in special, "normalized": content not in special}
        for content, number in added_tokens.items()
    }


def named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens that have a name, as a chat template gets them."""
    return {name: content for name, value in _named(config) if (content := _content(value)) is not None}


def complete(fast: FastTokenizer, config: Mapping[str, Any]) -> None:
    """Give the tokenizer the added tokens that its file lacks or has otherwise, in the order that decides their ids."""
    numbers = fast.get_added_tokens_decoder()
    present = numbers.values()
    known = {repr(each) for each in present}
    # Of added_tokens.json and the file's own tokens, the later number's flags hold, and of one number the file's.
    own = {each.content: number for number, each in numbers.items()}
    listed = {
        number: each
        for number, each in (config.get(_NUMBERED) or {}).items()
        if number not in numbers and own.get(each["content"], -1) < number
    }
    listed |= {int(number): each for number, each in (config.get("added_tokens_decoder") or {}).items()}
    adding: list[str | AddedToken] = [
        token for _, each in sorted(listed.items()) if repr(token := _token(each)) not in known
    ]
    contents = {each.content for each in present} | {str(each) for each in adding}
    extra = config.get(_UNNAMED) or config.get(_UNNAMED_BEFORE) or ()
    for value in (*(value for _, value in _named(config)), *extra):
        content = _content(value)
        if content is None or content in contents:
            continue
        wanted = _token(value) if isinstance(value, dict) else content
        if wanted not in adding:  # one content may come twice, with other flags: the last ones count
            adding.append(wanted)
    named = set(named_tokens(config).values())
    tokens = [AddedToken(each, special=True) if isinstance(each, str) else each for each in adding]
    for each in tokens:
        each.special = each.special or each.content in named
    if tokens:
        fast.add_tokens(tokens)
    fast.encode_special_tokens = bool(config.get("split_special_tokens"))


def _named(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    yield from ((name, config.get(name)) for name in _NAMED)
    others = {name: value for name, value in config.items() if _is_own(name)}
    yield from {**others, **config[_OWN]}.items()


def _is_own(name: str) -> bool:
    return name.endswith("_token") and name not in _NAMED


def _content(value: Any) -> str | None:
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _token(fields: Mapping[str, Any]) -> AddedToken:
    # Those of special_tokens_map.json do not say what they are.
    known = {"special": True, **fields}
    return AddedToken(**{name: value for name, value in known.items() if name != "__type"})
