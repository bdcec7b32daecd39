"""The prompt of a command: a text, a chat file, token ids or keys, and what makes equal tokens differ."""

import argparse
import json
import operator
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvindex_server.commands.failure import USAGE, CommandError
from kvindex_server.pb.kvindex.v1 import kvindex_pb2 as pb


def add_options(parser: argparse.ArgumentParser, *, needed: bool = True, keys: bool = True) -> None:
    """Options that `fields` reads."""
    group = parser.add_argument_group("prompt")
    one = group.add_mutually_exclusive_group(required=needed)
    one.add_argument("--prompt", metavar="TEXT", help="a completions prompt; @FILE reads it")
    one.add_argument("--chat", metavar="FILE", help="an OpenAI chat-completions body as JSON; - reads stdin")
    one.add_argument("--tokens", metavar="IDS", help="token ids, as 1,2,3 or @FILE")
    if keys:
        one.add_argument("--keys", metavar="KEYS", help="block keys, decimal or 0x..., as 1,2,3 or @FILE")
    group.add_argument("--lora", metavar="NAME", default="", help="LoRA adapter")
    group.add_argument("--salt", metavar="TEXT", default="", help="cache_salt")


def fields(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of any request that has a prompt, adapter and salt."""
    found: dict[str, Any] = {"lora_name": args.lora, "cache_salt": args.salt}
    if args.prompt is not None:
        found["prompt"] = _text(args.prompt[1:]) if args.prompt.startswith("@") else args.prompt
    elif args.chat is not None:
        found["chat"] = _text(args.chat)
    elif args.tokens is not None:
        found["tokens"] = pb.Tokens(ids=numbers(args.tokens, "--tokens", 32))
    elif getattr(args, "keys", None) is not None:
        found["keys"] = pb.Keys(values=numbers(args.keys, "--keys", 64))
    return found


def numbers(given: str, option: str, bits: int) -> Sequence[int]:
    """Unsigned numbers from `1,2,3`, or from @FILE with a JSON list an answer of /tokenize, or plain numbers."""
    text = _text(given[1:]) if given.startswith("@") else given
    try:
        if text.lstrip().startswith(("[", "{")):
            loaded: Any = json.loads(text)
            values = [operator.index(each) for each in (loaded["tokens"] if isinstance(loaded, dict) else loaded)]
        else:
            values = [int(each, 0) for each in text.replace(",", " ").split()]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise CommandError(f"{option}: must be numbers, as 1,2,3, or @FILE with a JSON list", USAGE) from None
    if not values:
        raise CommandError(f"{option}: must not be empty", USAGE)
    if not all(0 <= each < 1 << bits for each in values):
        raise CommandError(f"{option}: every number must be in 0..2^{bits}-1", USAGE)
    return values


def _text(name: str) -> str:
    try:
        return sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
    except OSError as error:
        raise CommandError(f"{name}: cannot be read: {error.strerror}", USAGE) from None
    except UnicodeDecodeError:
        raise CommandError(f"{name}: is not UTF-8", USAGE) from None
