"""The command line of `kvindex`: one parser for all commands, and every failure as one line with an exit code."""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType, ModuleType
from typing import cast

from kvindex_server import __version__, cli
from kvindex_server.commands import (
    bench,
    blocks,
    capture,
    check,
    completion,
    connection,
    explain,
    pods,
    replay,
    score,
    simulate,
)
from kvindex_server.commands.failure import INTERRUPTED, USAGE, CommandError
from kvindex_server.commands.usage import Parser

EPILOG = """exit codes: 0 well; 1 refused, or something is not well; 2 wrong usage; 3 no answer, or not ready; \
4 not allowed; 130 interrupted"""


@dataclass(frozen=True)
class _Command:
    """One that talks to a server or to engines; `kvindex NAME --help` shows its options."""

    help: str
    add_options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def _of(module: ModuleType, help_: str) -> _Command:
    return _Command(help_, module.add_options, module.run)


COMMANDS = {
    "score": _of(score, "how much of a prompt each pod holds"),
    "explain": _of(explain, "where each pod's match ends, and why"),
    "check": _of(check, "what makes hits be missed, and what to do"),
    "pods": _of(pods, "every event stream: state, trust, blocks, lag"),
    "watch": _Command("the same, live", pods.add_watch_options, pods.watch),
    "blocks": _of(blocks, "who holds each block"),
    "capture": _of(capture, "record an engine's event streams with their replay"),
    "replay": _of(replay, "play a recording back"),
    "simulate": _of(simulate, "run simulated engines"),
    "bench": _of(bench, "load a server a little and time it"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    top = parser()
    given = sys.argv[1:] if argv is None else argv
    if not given:
        top.print_help(sys.stderr)
        return USAGE
    args = top.parse_args(given)
    if args.command in ("serve", "demo"):
        return cli.serve(args) if args.command == "serve" else cli.demo(args)
    if args.command == "completion":
        return completion.write(args.shell, top)
    signal.signal(signal.SIGTERM, _interrupt)
    # A bar must not fail a command on a terminal that is not UTF-8.
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="replace")
    try:
        return COMMANDS[args.command].run(args)
    except CommandError as error:
        sys.stderr.write(f"kvindex: {error.message}\n")
        return error.code
    except UnicodeEncodeError:
        odd = next((each for each in given if not _is_text(each)), None)
        if odd is None:
            raise
        sys.stderr.write(f"kvindex: {odd!a} is not UTF-8\n")
        return USAGE
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader, `head` perhaps, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def parser() -> Parser:
    """The command line."""
    top = Parser(
        prog="kvindex",
        description="Asks a kvindex-server, records and plays event streams, and runs the server.",
        epilog=EPILOG,
    )
    top.add_argument("--version", action="version", version=f"kvindex {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        own = commands.add_parser(name, help=command.help, allow_abbrev=False)
        command.add_options(own)
        own.add_argument("--json", action="store_true", help="JSON on stdout")
        connection.add_options(own)
    cli.add_commands(cast("argparse._SubParsersAction[argparse.ArgumentParser]", commands))
    shells = commands.add_parser("completion", help="print a shell completion script", allow_abbrev=False)
    completion.add_options(shells)
    return top


def _is_text(given: str) -> bool:
    """Whether it holds no byte that is no UTF-8; a file's name may hold such, what is sent may not."""
    try:
        given.encode()
    except UnicodeEncodeError:
        return False
    return True


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
