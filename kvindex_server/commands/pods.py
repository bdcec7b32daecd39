"""`kvindex pods` and `kvindex watch`: every stream, once or live."""

import argparse
import sys
import time
from collections.abc import Sequence

from kvindex_server.commands import screen
from kvindex_server.commands.connection import Connection
from kvindex_server.commands.failure import UNREACHABLE, CommandError
from kvindex_server.commands.score import trust
from kvindex_server.commands.usage import above_zero, at_least_one
from kvindex_server.pb.kvindex.v1 import kvindex_pb2 as pb

BAR, SHORTEST_BAR = 20, 6
HEAD = (
    "pod",
    "rank",
    "model ",
    "state ",
    "trust ",
    "blocks",
    "by tier ",
    "lag",
    "age",
    "last seq",
    "holes",
    "restarts",
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Beside those of the connection."""
    parser.add_argument("--model", default="", help="only this model")


def add_watch_options(parser: argparse.ArgumentParser) -> None:
    """Beside those of the connection."""
    add_options(parser)
    parser.add_argument("--interval", type=above_zero, default=1.0, metavar="SECONDS", help="default 1")
    parser.add_argument(
        "--count", type=at_least_one, default=0, metavar="N", help="end after N views (default: at Ctrl-C)"
    )


def run(args: argparse.Namespace) -> int:
    """One table of all streams; those that are not EXACT say why."""
    with Connection(args) as connection:
        answer = connection.call(connection.admin.ListPods, pb.ListPodsRequest(model=args.model))
    if args.json:
        screen.write_json(answer)
        return 0
    screen.write(*_lines(answer.streams))
    for each in answer.streams:
        if each.trust != pb.TRUST_EXACT:
            said = f"{each.pod} rank {each.rank}: {trust(each.trust)}: {each.trust_reason}"
            screen.write(*screen.wrapped(said, 4))
    if not answer.streams:
        screen.note("no pod is registered")
    return 0


def watch(args: argparse.Namespace) -> int:
    """The same again and again, over itself on a terminal; with --json a line per view."""
    shown, last = 0, (0.0, 0)
    with Connection(args) as connection:
        while True:
            try:
                answer = connection.call(connection.admin.ListPods, pb.ListPodsRequest(model=args.model))
            except CommandError as error:
                if not shown or args.count or error.code != UNREACHABLE:
                    raise
                screen.note(f"kvindex: {error.message}")  # it may come back: that is what is watched
                time.sleep(max(0.05, args.interval))
                continue
            now, messages = time.monotonic(), sum(each.messages for each in answer.streams)
            rate = max(0, messages - last[1]) / (now - last[0]) if shown else 0.0
            last = (now, messages)
            shown += 1
            if args.json:
                screen.write_json(answer)
            else:
                clear = "\x1b[H\x1b[2J" if sys.stdout.isatty() else ""
                blocks = sum(each.blocks for each in answer.streams)
                sure = sum(each.trust == pb.TRUST_EXACT for each in answer.streams)
                head = (
                    f"{clear}{time.strftime('%H:%M:%S')}  {len(answer.streams)} streams, {sure} EXACT, "
                    f"{blocks} blocks, {rate:.1f} messages/s"
                )
                screen.write(head, *_lines(answer.streams))
            if args.count and shown >= args.count:
                return 0
            time.sleep(max(0.05, args.interval))


def _lines(streams: Sequence[pb.StreamInfo]) -> list[str]:
    most = max((each.blocks for each in streams), default=0)
    bar = BAR
    lines = screen.table(HEAD, [_row(each, most, bar) for each in streams])
    over = max(map(screen.breadth, lines)) - screen.columns() if screen.columns() else 0
    if over > 0:  # the bar gives way to the numbers
        bar = max(SHORTEST_BAR, BAR - over)
        lines = screen.table(HEAD, [_row(each, most, bar) for each in streams])
    return lines


def _row(stream: pb.StreamInfo, most: int, bar: int) -> tuple[str, ...]:
    return (
        stream.pod,
        str(stream.rank),
        stream.model,
        pb.StreamState.Name(stream.state).removeprefix("STREAM_STATE_"),
        trust(stream.trust),
        str(stream.blocks),
        screen.bar(stream.blocks_by_tier, most, bar),
        screen.seconds(stream.lag_seconds if stream.messages else -1.0),
        screen.seconds(stream.age_seconds),
        str(stream.last_sequence) if stream.HasField("last_sequence") else "-",
        str(stream.gaps),
        str(stream.restarts),
    )
