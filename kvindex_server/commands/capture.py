"""`kvindex capture`: records the real event streams of an engine, every rank with its replay, byte for byte."""

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kvindex_server import wire
from kvindex_server.commands import screen
from kvindex_server.commands.connection import Connection
from kvindex_server.commands.failure import FAILED, USAGE, CommandError, meant
from kvindex_server.commands.recording import Recorder, prepare
from kvindex_server.errors import InvalidArgument
from kvindex_server.pb.kvindex.v1 import kvindex_pb2 as pb
from kvindex_server.pods import MAX_RANKS, at_rank, split_tcp

REPLAY_SECONDS = 5.0
WAIT_MS = 100
SUMS = ("heard", "replayed", "bad", "holes")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Beside those of the connection, which only --pod needs."""
    parser.add_argument("directory", metavar="DIR", type=Path, help="where the recording goes")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--endpoint", metavar="tcp://HOST:PORT", help="the publishing socket of rank 0")
    where.add_argument("--pod", help="a registered pod: the server is asked for the endpoints of all its ranks")
    parser.add_argument("--ranks", type=int, default=1, help="with --endpoint: rank r is at port + r (default 1)")
    parser.add_argument("--rank", type=int, help="only this rank (default: all)")
    parser.add_argument("--replay-endpoint", metavar="tcp://HOST:PORT", default="", help="its replay socket, likewise")
    parser.add_argument("--bind", action="store_true", help="bind --endpoint: the engine dials in")
    parser.add_argument("--topic", default="", help="only topics with this prefix")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="end after so long (default: Ctrl-C)")
    parser.add_argument("--messages", type=int, default=0, help="end after so many published messages of all ranks")
    parser.add_argument("--overwrite", action="store_true", help="replace a recording in DIR")


@dataclass
class _Tally:
    rank: int
    endpoint: str
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

    def told(self) -> dict[str, object]:
        names = ("rank", "endpoint", *SUMS, "first", "last", "replay")
        return {name: getattr(self, name) for name in names}


class _Rank:
    """One rank's sockets, its recording, and what was counted."""

    def __init__(self, rank: int, endpoint: str, replay_endpoint: str, args: argparse.Namespace) -> None:
        self.tally = _Tally(rank, endpoint)
        self._replay_at = time.monotonic()
        try:
            self.socket = wire.subscriber(endpoint, args.topic, bind=args.bind)
            self.dealer = wire.replay_client(replay_endpoint) if replay_endpoint else None
        except wire.BindError as error:
            raise CommandError(f"--endpoint: {error}", USAGE) from None
        self._recorder: Recorder | None = None

    def begin(self, recorder: Recorder, waiter: wire.Waiter) -> None:
        """Ask for the past, and record from now on."""
        self._recorder = recorder
        waiter.add(self.socket)
        if self.dealer is not None:
            waiter.add(self.dealer)
            wire.request_replay(self.dealer, 0)
            self.tally.replay, self._replay_at = "asked", time.monotonic()

    @property
    def waits(self) -> bool:
        """A replay is under way."""
        return self.tally.replay == "asked" and time.monotonic() - self._replay_at < REPLAY_SECONDS

    def take(self, room: int) -> int:
        """Record what is there, at most `room` published messages; how many those were."""
        assert self._recorder is not None
        taken = 0
        while taken < room and (frames := self.socket.receive()) is not None:
            self._recorder.heard(time.time(), frames)
            self.tally.count(frames)
            taken += 1
        while self.dealer is not None and (frames := self.dealer.receive()) is not None:
            self._recorder.replayed(0, frames)
            self._replay_at = time.monotonic()
            if len(frames) > 1 and wire.END_SEQUENCE.to_bytes(8, "big") in frames[-2:]:
                self.tally.replay = "complete"
            else:
                self.tally.replayed += 1
        return taken

    def close(self) -> None:
        """End it; what was recorded is on disk."""
        if self.tally.replay == "asked":
            self.tally.replay = "not answered"
        if self._recorder is not None:
            self._recorder.close()
        self.socket.close()
        if self.dealer is not None:
            self.dealer.close()


def run(args: argparse.Namespace) -> int:
    """Subscribe to every rank, ask for the past, and write down whatever comes until told to end."""
    endpoints = _endpoints(args)
    ranks: list[_Rank] = []
    try:
        for rank, endpoint, replay_endpoint in endpoints:
            ranks.append(_Rank(rank, endpoint, replay_endpoint, args))
        waiter = wire.Waiter()
        numbers = [each.tally.rank for each in ranks]
        for each, recorder in zip(ranks, prepare(args.directory, numbers, overwrite=args.overwrite), strict=True):
            each.begin(recorder, waiter)
        _record(args, ranks, waiter)
    except KeyboardInterrupt:
        pass  # the usual end
    finally:
        for each in ranks:
            each.close()
    return _report(args, [each.tally for each in ranks])


def _report(args: argparse.Namespace, tallies: Sequence[_Tally]) -> int:
    sums = {name: sum(getattr(each, name) for each in tallies) for name in SUMS}
    if args.json:
        screen.write_json(
            {**sums, "directory": str(args.directory), "ranks": [each.told() for each in tallies]},
        )
    else:
        for each in tallies:
            rank = f"rank {each.rank}: " if len(tallies) > 1 else ""
            span = f", sequences {each.first} to {each.last}" if each.first is not None else ""
            screen.write(
                f"{rank}{each.heard} messages{span}, {each.holes} holes, {each.bad} not readable",
                f"{rank}{each.replayed} replayed messages; replay {each.replay}",
            )
        screen.write(f"written to {args.directory}")
    for each in tallies:
        if not each.heard and not each.replayed:
            screen.note(
                f"nothing came from {each.endpoint}: is it the events' port, and has the engine served a request?"
            )
    return 0 if sums["heard"] or sums["replayed"] else FAILED


def _record(args: argparse.Namespace, ranks: Sequence[_Rank], waiter: wire.Waiter) -> None:
    started = time.monotonic()
    progress = screen.Progress("capture", args.messages or args.seconds)
    heard = 0
    try:
        while True:
            waiter.wait(WAIT_MS)
            for each in ranks:
                heard += each.take(args.messages - heard if args.messages else 1 << 62)
            elapsed = time.monotonic() - started
            replayed = sum(each.tally.replayed for each in ranks)
            progress.show(heard if args.messages else elapsed, f"{heard} messages, {replayed} replayed")
            enough = args.messages and heard >= args.messages and not any(each.waits for each in ranks)
            if enough or elapsed >= args.seconds:
                return
    finally:
        progress.end()


def _endpoints(args: argparse.Namespace) -> list[tuple[int, str, str]]:
    """(rank, its endpoint, its replay endpoint or the empty string)."""
    if args.endpoint:
        try:
            for name, given in (("--endpoint", args.endpoint), ("--replay-endpoint", args.replay_endpoint)):
                if given and split_tcp(given, name)[1] + args.ranks - 1 > 65535:
                    raise InvalidArgument(name, "port + ranks - 1 is above 65535")
        except InvalidArgument as error:
            raise CommandError(error.message, USAGE) from None
        if not 1 <= args.ranks <= MAX_RANKS:
            raise CommandError(f"--ranks must be in 1..{MAX_RANKS}", USAGE)
        if args.rank is not None and not 0 <= args.rank < args.ranks:
            raise CommandError("--rank must be one of --ranks", USAGE)
        again = args.replay_endpoint
        wanted = range(args.ranks) if args.rank is None else (args.rank,)
        return [(rank, at_rank(args.endpoint, rank), again and at_rank(again, rank)) for rank in wanted]
    with Connection(args) as connection:
        streams = connection.call(connection.admin.ListPods, pb.ListPodsRequest()).streams
    # A pod that serves several models has a stream for each, but their sockets are the same.
    found = {each.rank: each for each in streams if each.pod == args.pod}
    if not found:
        pods = sorted({each.pod for each in streams})
        known = ", ".join(pods[:16]) or "none"
        raise CommandError(f"no pod {args.pod!r} is registered; known are: {known}{meant(args.pod, pods)}")
    if args.rank is not None and args.rank not in found:
        raise CommandError(f"pod {args.pod!r} has no rank {args.rank}; it has {', '.join(map(str, sorted(found)))}")
    again = args.replay_endpoint
    return [
        (rank, each.endpoint, at_rank(again, rank) if again else each.replay_endpoint)
        for rank, each in sorted(found.items())
        if args.rank in (None, rank)
    ]
