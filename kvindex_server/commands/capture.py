"""`kvindex capture`: records a real event stream with its replay, byte for byte."""

import argparse
import time
from dataclasses import dataclass, field
from pathlib import Path

from kvindex_server import wire
from kvindex_server.commands import screen
from kvindex_server.commands.connection import Connection
from kvindex_server.commands.failure import FAILED, USAGE, CommandError
from kvindex_server.commands.recording import Recorder
from kvindex_server.errors import InvalidArgument
from kvindex_server.pb.kvindex.v1 import kvindex_pb2 as pb
from kvindex_server.pods import split_tcp

REPLAY_SECONDS = 5.0
WAIT_MS = 100
SUMMARY = ("heard", "replayed", "bad", "holes", "first", "last", "replay")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Beside those of the connection, which only --pod needs."""
    parser.add_argument("directory", metavar="DIR", type=Path, help="where frames.jsonl and replay.jsonl go")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--endpoint", metavar="tcp://HOST:PORT", help="the stream's publishing socket")
    where.add_argument("--pod", help="a registered pod: the server is asked for its endpoints")
    parser.add_argument("--rank", type=int, default=0, help="with --pod (default 0)")
    parser.add_argument("--replay-endpoint", metavar="tcp://HOST:PORT", default="", help="its replay socket")
    parser.add_argument("--bind", action="store_true", help="bind --endpoint: the engine dials in")
    parser.add_argument("--topic", default="", help="only topics with this prefix")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="end after so long (default: Ctrl-C)")
    parser.add_argument("--messages", type=int, default=0, help="end after so many published messages")
    parser.add_argument("--overwrite", action="store_true", help="replace a recording in DIR")


@dataclass
class _Tally:
    heard: int = 0
    replayed: int = 0
    bad: int = 0
    holes: int = 0
    first: int | None = None
    last: int | None = None
    replay: str = "not asked for"
    _expected: int | None = field(default=None, repr=False)

    def count(self, frames: list[bytes]) -> None:
        self.heard += 1
        try:
            sequence, _ = wire.read_event(frames)
        except wire.BadFrames:
            self.bad += 1
            return
        if self._expected is not None and sequence > self._expected:
            self.holes += 1
        self.first = sequence if self.first is None else self.first
        self.last, self._expected = sequence, sequence + 1


def run(args: argparse.Namespace) -> int:
    """Subscribe, ask for the past, and write down whatever comes until told to end."""
    endpoint, replay_endpoint = _endpoints(args)
    tally = _Tally()
    try:
        socket = wire.subscriber(endpoint, args.topic, bind=args.bind)
    except wire.BindError as error:
        raise CommandError(f"--endpoint: {error}", USAGE) from None
    recorder = Recorder(args.directory, overwrite=args.overwrite)
    try:
        with socket:
            _record(args, socket, replay_endpoint, recorder, tally)
    except KeyboardInterrupt:
        pass  # the usual end
    finally:
        recorder.close()
    if tally.replay == "asked":
        tally.replay = "not answered"
    if args.json:
        screen.write_json(
            {
                **{name: getattr(tally, name) for name in SUMMARY},
                "endpoint": endpoint,
                "directory": str(args.directory),
            }
        )
    else:
        span = f", sequences {tally.first} to {tally.last}" if tally.first is not None else ""
        screen.write(
            f"{tally.heard} messages{span}, {tally.holes} holes, {tally.bad} not readable",
            f"{tally.replayed} replayed messages; replay {tally.replay}",
            f"written to {args.directory}",
        )
    if not tally.heard and not tally.replayed:
        screen.note(f"nothing came from {endpoint}: is it the events' port, and has the engine served a request?")
        return FAILED
    return 0


def _record(
    args: argparse.Namespace, socket: wire.Socket, replay_endpoint: str, recorder: Recorder, tally: _Tally
) -> None:
    waiter = wire.Waiter()
    waiter.add(socket)
    dealer = wire.replay_client(replay_endpoint) if replay_endpoint else None
    if dealer is not None:
        waiter.add(dealer)
        wire.request_replay(dealer, 0)
        tally.replay = "asked"
    started = replay_at = time.monotonic()
    progress = screen.Progress("capture", args.messages or args.seconds)
    try:
        while True:
            now = time.monotonic()
            waiter.wait(WAIT_MS)
            while (not args.messages or tally.heard < args.messages) and (frames := socket.receive()) is not None:
                recorder.heard(time.time(), frames)
                tally.count(frames)
            while dealer is not None and (frames := dealer.receive()) is not None:
                recorder.replayed(0, frames)
                replay_at = now
                if len(frames) > 1 and wire.END_SEQUENCE.to_bytes(8, "big") in frames[-2:]:
                    tally.replay = "complete"
                else:
                    tally.replayed += 1
            elapsed = time.monotonic() - started
            progress.show(
                tally.heard if args.messages else elapsed, f"{tally.heard} messages, {tally.replayed} replayed"
            )
            waiting = tally.replay == "asked" and now - replay_at < REPLAY_SECONDS
            if elapsed >= args.seconds or (args.messages and tally.heard >= args.messages and not waiting):
                return
    finally:
        progress.end()
        if dealer is not None:
            dealer.close()


def _endpoints(args: argparse.Namespace) -> tuple[str, str]:
    if args.endpoint:
        try:
            split_tcp(args.endpoint, "--endpoint")
            if args.replay_endpoint:
                split_tcp(args.replay_endpoint, "--replay-endpoint")
        except InvalidArgument as error:
            raise CommandError(error.message, USAGE) from None
        return args.endpoint, args.replay_endpoint
    with Connection(args) as connection:
        streams = connection.call(connection.admin.ListPods, pb.ListPodsRequest()).streams
    for each in streams:
        if each.pod == args.pod and each.rank == args.rank:
            return each.endpoint, args.replay_endpoint or each.replay_endpoint
    known = ", ".join(sorted({each.pod for each in streams})[:16]) or "none"
    raise CommandError(f"no pod {args.pod!r} with rank {args.rank} is registered; known are: {known}")
