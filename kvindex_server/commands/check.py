"""`kvindex check`: the doctor's findings, with what to do about each."""

import argparse
import struct
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from kvindex_server.commands import prompt, screen
from kvindex_server.commands.connection import Connection
from kvindex_server.commands.failure import FAILED, UNREACHABLE, USAGE, CommandError
from kvindex_server.errors import InvalidArgument, KvindexError
from kvindex_server.pb.kvindex.v1 import kvindex_pb2 as pb

MARKS = {
    pb.CHECK_STATUS_PASS: "pass",
    pb.CHECK_STATUS_WARN: "WARN",
    pb.CHECK_STATUS_FAIL: "FAIL",
    pb.CHECK_STATUS_SKIP: "skip",
}
PROBLEMS = (pb.CHECK_STATUS_WARN, pb.CHECK_STATUS_FAIL)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Beside those of the connection."""
    parser.add_argument("--model", default="", help="only this model; needed with a probe")
    parser.add_argument("--pod", action="append", default=[], help="pod as the router names it; may be repeated")
    engine = parser.add_mutually_exclusive_group()
    engine.add_argument(
        "--engine", metavar="URL", help="an engine's HTTP address: it is asked to tokenize the probe, too"
    )
    engine.add_argument(
        "--engine-tokens", metavar="IDS", help="what the engine's POST /tokenize makes of the probe, as 1,2,3 or @FILE"
    )
    parser.add_argument("--problems", action="store_true", help="leave out what is well or cannot be judged")
    parser.add_argument("--strict", action="store_true", help="exit code 1 also for a WARN")
    prompt.add_options(parser, needed=False, keys=False)


def run(args: argparse.Namespace) -> int:
    """Exit code 1 when a check fails."""
    fields = prompt.fields(args)
    if args.engine_tokens is not None:
        fields["engine_tokens"] = pb.Tokens(ids=prompt.numbers(args.engine_tokens, "--engine-tokens", 32))
    elif args.engine is not None:
        fields["engine_tokens"] = pb.Tokens(ids=_tokenized(args.engine, args.model, fields, args.timeout))
    with Connection(args) as connection:
        request = pb.CheckRequest(model=args.model, pods=args.pod, **fields)
        answer = connection.call(connection.admin.Check, request)
    shown = [each for each in answer.checks if not args.problems or each.status in PROBLEMS]
    if args.json:
        screen.write_json(pb.CheckResponse(checks=shown, status=answer.status))
    else:
        _show(answer, shown)
    worst = pb.CHECK_STATUS_WARN if args.strict else pb.CHECK_STATUS_FAIL
    return FAILED if answer.status in (worst, pb.CHECK_STATUS_FAIL) else 0


def _tokenized(url: str, model: str, fields: Mapping[str, Any], seconds: float) -> Sequence[int]:
    """The probe as the engine at `url` tokenizes it, which knows the model by the same name."""
    from kvindex_server.tokenize.remote import Engine  # noqa: PLC0415  it loads the native core

    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise CommandError("--engine: must have the form http://HOST:PORT", USAGE)
    if "prompt" not in fields and "chat" not in fields:
        raise CommandError("--engine: needs --prompt or --chat, which the engine is asked to tokenize", USAGE)
    endpoint = url if parts.path.strip("/") else f"{parts.scheme}://{parts.netloc}/tokenize"
    engine = Engine(endpoint, model)
    try:
        told = engine.prompt(fields["prompt"], seconds) if "prompt" in fields else engine.chat(fields["chat"], seconds)
    except InvalidArgument as error:
        raise CommandError(str(error), USAGE) from None
    except KvindexError as error:
        hint = "is it the engine's HTTP port, and does it serve the model by this name?"
        raise CommandError(f"--engine {endpoint}: {error.message}; {hint}", UNREACHABLE) from None
    return struct.unpack(f"<{len(told) // 4}I", told)


def _show(answer: pb.CheckResponse, shown: Sequence[pb.CheckResult]) -> None:
    model = ""
    for each in shown:
        if each.model != model:
            model = each.model
            screen.write(f"model {model}")
        rank = f" rank {each.rank}" if each.HasField("rank") else ""
        subject = f"{each.pod}{rank}: " if each.pod else ""
        screen.write(*screen.wrapped(f"  {MARKS[each.status]}  {each.name:<14} {subject}{each.evidence}", 23))
        if each.remedy:
            screen.write(*screen.wrapped(f"{'':<23}-> {each.remedy}", 26))
    counts = {mark: sum(each.status == status for each in answer.checks) for status, mark in MARKS.items()}
    screen.write(", ".join(f"{count} {mark.lower()}" for mark, count in counts.items()))
