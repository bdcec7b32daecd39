"""Loads a model's tokenizer directory: tokenizer.json, its config and the chat templates."""

import ctypes
import ctypes.util
import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as FastTokenizer

from kvindex_server import _core
from kvindex_server.errors import InvalidArgument
from kvindex_server.tokenize import declared, library
from kvindex_server.tokenize.chat import ChatTemplates
from kvindex_server.tokenize.tokenizer import UNLIMITED, Tokenizer


def load_tokenizer(
    directory: Path,
    cache: _core.TextCache | None = None,
    *,
    word_slots: int = 1 << 17,
    max_reference_bytes: int = UNLIMITED,
) -> Tokenizer:
    """Reads tokenizer.json, its config and the chat templates. InvalidArgument when one is broken."""
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise InvalidArgument("tokenizer", f"{directory} has no tokenizer.json")
    config = _read_object(directory / "tokenizer_config.json")
    special_tokens_map = _read_object(directory / "special_tokens_map.json")
    added_tokens = _read_object(directory / "added_tokens.json")
    try:
        tokens = declared.merged(config, special_tokens_map, added_tokens)
        templates = ChatTemplates(_chat_templates(directory, config), declared.named_tokens(tokens))
        fast = FastTokenizer.from_file(str(path))
        declared.complete(fast, tokens)
        return Tokenizer(fast, templates, cache, word_slots=word_slots, max_reference_bytes=max_reference_bytes)
    except InvalidArgument:
        raise
    except BaseException as error:  # the library raises bare Exception for a bad file, or panics
        if not (isinstance(error, Exception) or library.panic(error)):
            raise
        raise InvalidArgument("tokenizer", f"{path} cannot be loaded: {str(error) or type(error).__name__}") from None
    finally:
        _give_back_memory()


def _give_back_memory() -> None:
    """Taking a definition over needs ten times its size for a moment, and glibc would keep it (measured: 240 MiB)."""
    libc = ctypes.util.find_library("c")
    trim = getattr(ctypes.CDLL(libc), "malloc_trim", None) if libc else None
    if trim is not None:
        trim(0)


def _chat_templates(directory: Path, config: dict[str, Any]) -> dict[str, str]:
    """Template sources by name, with the precedence that the engine and transformers give the files."""
    extra = {path.stem: _read_text(path) for path in sorted((directory / "additional_chat_templates").glob("*.jinja"))}
    single = directory / "chat_template.jinja"
    if single.is_file():
        return extra | {"default": _read_text(single)}
    if extra:
        return extra
    templates = _configured(config.get("chat_template"), directory / "tokenizer_config.json")
    processor_file = directory / "chat_template.json"
    processor = _configured(_read_object(processor_file).get("chat_template"), processor_file)
    if processor and "default" in templates:
        # The engine prefers the processor's template, but not for a request with tools.
        templates.setdefault("tool_use", templates["default"])
    return templates | processor


def _configured(value: Any, path: Path) -> dict[str, str]:
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, dict):
        entries = list(value.items())
    elif isinstance(value, list) and all(isinstance(each, dict) for each in value):
        entries = [(each.get("name"), each.get("template")) for each in value]
    else:
        entries = [(None, None)]
    if not all(isinstance(name, str) and isinstance(source, str) for name, source in entries):
        raise InvalidArgument("tokenizer", f"{path}: chat_template is neither text nor named templates")
    return dict(entries)


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(_read_text(path))
    except ValueError:
        raise InvalidArgument("tokenizer", f"{path} is not valid JSON") from None
    if not isinstance(value, dict):
        raise InvalidArgument("tokenizer", f"{path} is not a JSON object")
    return value


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeError):
        raise InvalidArgument("tokenizer", f"{path} cannot be read") from None
