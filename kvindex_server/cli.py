"""The console command: reads flags, loads the settings and hands over to the server or the demo."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from kvindex_server import __version__, logs
from kvindex_server.config import ConfigError, Settings, load_settings

CONFIG_ERROR = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    args = parser().parse_args(argv)
    if args.command == "demo":
        return demo(args)
    return serve(args)


def parser() -> argparse.ArgumentParser:
    """The command line. Values are judged by the settings' schema, so that every source is alike."""
    top = argparse.ArgumentParser(
        prog="kvindex-server",
        description="Knows which engine pod holds which KV-cache blocks, and scores pods for a prompt.",
        allow_abbrev=False,
    )
    top.add_argument("--version", action="version", version=f"kvindex-server {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    add_commands(commands)
    return top


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `serve` and `demo`, whose arguments are for the functions of these names."""
    serving = commands.add_parser("serve", help="run the server", allow_abbrev=False)
    serving.add_argument("--listen", metavar="HOST:PORT", help="gRPC address (port 0: a free one)")
    serving.add_argument("--metrics-listen", metavar="HOST:PORT", help="HTTP address of the metrics")
    serving.add_argument("--admin-listen", metavar="HOST:PORT", help="separate address of the admin service")
    serving.add_argument("--config", metavar="FILE", type=Path, help="YAML file with settings")
    serving.add_argument(
        "--tokenizer",
        metavar="MODEL=DIR",
        action="append",
        default=[],
        help="tokenizer directory of a model; may be repeated",
    )
    serving.add_argument("--log-format", metavar="json|console", help="how logs are written")
    serving.add_argument("--log-level", metavar="debug|info|warning|error", help="the least that is logged")
    serving.add_argument("--json", action="store_true", help="JSON on stdout: where it listens")

    showing = commands.add_parser("demo", help="run a server against simulated pods", allow_abbrev=False)
    showing.add_argument("--pods", type=_positive_int, default=4, help="simulated pods (default 4)")
    showing.add_argument("--seconds", type=_seconds, default=0.0, help="time to run; 0 = until Ctrl-C (default)")
    showing.add_argument("--rate", type=_rate, default=20.0, help="simulated requests per second (default 20)")
    showing.add_argument("--tokenizer", metavar="DIR", type=Path, help="a tokenizer, to ask with texts")
    showing.add_argument("--once", action="store_true", help="show one round and end")
    showing.add_argument(
        "--json", action="store_true", help="JSON on stdout: where it listens, and at the end a summary"
    )


def serve(args: argparse.Namespace) -> int:
    """Run the server until it is told to end; the exit code."""
    try:
        settings = settings_from(args)
    except ConfigError as error:
        sys.stderr.write(f"kvindex-server: config: {error}\n")
        return CONFIG_ERROR
    log = settings.log
    sampler = logs.Sampler(log.burst, log.thereafter) if log.burst else None
    logs.configure(log.format, log.level, sampler=sampler)
    from kvindex_server import server  # noqa: PLC0415  heavy; --help, --version and config errors do without

    return server.run(settings, sampler, as_json=args.json)


def demo(args: argparse.Namespace) -> int:
    """Run the demo; the exit code."""
    from kvindex_server import demo as live  # noqa: PLC0415  heavy, and not needed to serve

    return live.run(args)


def settings_from(args: argparse.Namespace) -> Settings:
    """The settings of one `serve` command line, with this process's environment."""
    flags = {
        "listen": args.listen,
        "metrics_listen": args.metrics_listen,
        "admin_listen": args.admin_listen,
        "log.format": args.log_format,
        "log.level": args.log_level,
    }
    return load_settings(flags, os.environ, args.config, tokenizers=_tokenizers(args.tokenizer))


def _tokenizers(pairs: Sequence[str]) -> dict[str, str]:
    tokenizers: dict[str, str] = {}
    for pair in pairs:
        model, equals, directory = pair.partition("=")
        if not (model and equals and directory):
            raise ConfigError("--tokenizer", "must have the form MODEL=DIR")
        if model in tokenizers:
            raise ConfigError("--tokenizer", f"model {model} is given twice")
        tokenizers[model] = directory
    return tokenizers


def _positive_int(text: str) -> int:
    if not 1 <= int(text) <= 1024:
        raise argparse.ArgumentTypeError("must be in 1..1024")
    return int(text)


def _seconds(text: str) -> float:
    if not 0 <= float(text) < float("inf"):
        raise argparse.ArgumentTypeError("must be a number >= 0")
    return float(text)


def _rate(text: str) -> float:
    if not 0 < float(text) <= 100_000:
        raise argparse.ArgumentTypeError("must be a number above 0, at most 100000")
    return float(text)
