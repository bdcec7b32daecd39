"""`kvindex replay`: plays recorded streams as their engine did, at any speed, and answers replay requests."""

import argparse
import contextlib
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from kvindex_server import wire
from kvindex_server.commands import recording, screen
from kvindex_server.commands.connection import Connection
from kvindex_server.commands.failure import USAGE, CommandError
from kvindex_server.commands.recording import Recording
from kvindex_server.errors import InvalidArgument
from kvindex_server.pb.kvindex.v1 import kvindex_pb2 as pb
from kvindex_server.pods import at_rank, split_tcp

END = wire.END_SEQUENCE.to_bytes(8, "big")
JOIN_SECONDS = 0.2
"""ZeroMQ drops what is published before a subscription has arrived."""
TURN_SECONDS = 0.05
PORT_TRIES = 64
BURST = 256
"""Messages between two looks at the replay socket, at full speed."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Beside those of the connection, which only --register needs."""
    parser.add_argument("directory", metavar="DIR", type=Path, help="a recording of `kvindex capture`")
    parser.add_argument("--endpoint", metavar="tcp://HOST:PORT", default="tcp://127.0.0.1:0", help="to publish at")
    parser.add_argument("--replay-endpoint", metavar="tcp://HOST:PORT", default="tcp://127.0.0.1:0")
    parser.add_argument("--speed", type=float, default=1.0, help="times the recorded speed; 0: as fast as it goes")
    parser.add_argument(
        "--wait", type=float, default=5.0, metavar="SECONDS", help="begin at the first replay request, or after so long"
    )
    parser.add_argument(
        "--linger", type=float, default=2.0, metavar="SECONDS", help="answer replay requests so long after the end"
    )
    parser.add_argument("--register", metavar="POD", help="register it at the server under this name while it plays")
    parser.add_argument("--model", default="", help="with --register")


class Rank:
    """The engine's side of one stream: what has been published, or was before the recording, can be replayed."""

    def __init__(self, played: Recording, endpoint: str, replay_endpoint: str) -> None:
        self.recording = played
        self._events = wire.publisher(endpoint)
        try:
            self.router = wire.replay_server(replay_endpoint)
        except wire.BindError:
            self._events.close()
            raise
        self.endpoint, self.replay_endpoint = self._events.endpoint, self.router.endpoint
        self.published = 0
        self.requests = 0
        self._head, self._end = _shapes(played)
        self._buffer = _before(played)

    def publish(self, message: list[bytes]) -> None:
        """The next recorded message."""
        sequence = message[1]
        if self._buffer and sequence <= self._buffer[-1][0]:  # the engine began another life
            self._buffer.clear()
        self._buffer.append((sequence, message[2]))
        self._events.send(message)
        self.published += 1

    def answer(self) -> None:
        """Every replay request that is there."""
        while (frames := self.router.receive()) is not None:
            if len(frames) == 3 and len(frames[2]) == 8:
                self._answer(frames[0], frames[2])

    def close(self) -> None:
        """Close both sockets."""
        self._events.close()
        self.router.close()

    def _answer(self, identity: bytes, start: bytes) -> None:
        self.requests += 1
        for sequence, payload in self._buffer:
            if sequence >= start:  # both big-endian and 8 long: they compare as numbers do
                self.router.send([identity, *self._head, sequence, payload])
        self.router.send([identity, *self._end])


class Player:
    """All ranks of one engine, in one rhythm."""

    def __init__(self, ranks: Sequence[Rank]) -> None:
        self.ranks = ranks
        self._waiter = wire.Waiter()
        self._of: dict[wire.Awaited, Rank] = {each.router: each for each in ranks}
        for each in ranks:
            self._waiter.add(each.router)
        self._messages = sorted(
            ((at, number, message) for number, each in enumerate(ranks) for at, message in each.recording.frames),
            key=lambda each: each[0],  # stable: the order of one rank stays
        )

    @property
    def messages(self) -> int:
        """How many there are to play."""
        return len(self._messages)

    @property
    def seconds(self) -> float:
        """From the first to the last."""
        return self._messages[-1][0] - self._messages[0][0] if self._messages else 0.0

    def play(self, speed: float, wait: float, linger: float) -> None:
        """Publish everything, then go on answering for a while."""
        self._serve(wait, until_asked=True)
        self._serve(JOIN_SECONDS)
        progress = screen.Progress("replay", self.messages)
        started = time.monotonic()
        for number, (at, rank, message) in enumerate(self._messages):
            if speed > 0:
                self._serve(started + (at - self._messages[0][0]) / speed - time.monotonic())
            elif number % BURST == 0:
                self._serve(0)
            self.ranks[rank].publish(message)
            progress.show(number, f"{number}/{self.messages} messages")
        progress.end()
        self._serve(linger)

    def _serve(self, seconds: float, *, until_asked: bool = False) -> None:
        """Answer replay requests for so long; a wait that is over still answers those that are there."""
        ends = time.monotonic() + seconds
        while True:
            left = ends - time.monotonic()
            for router in self._waiter.wait(max(0, round(1000 * min(left, TURN_SECONDS)))):
                self._of[router].answer()
            if left <= 0 or (until_asked and all(each.requests for each in self.ranks)):
                return


def run(args: argparse.Namespace) -> int:
    """Play the recording once."""
    for option, given in (("--speed", args.speed), ("--wait", args.wait), ("--linger", args.linger)):
        if not given >= 0:
            raise CommandError(f"{option}: must be 0 or more", USAGE)
    if args.register and not args.model:
        raise CommandError("--register needs --model", USAGE)
    recordings = recording.read(args.directory)
    _check_ports("--endpoint", args.endpoint, len(recordings))
    _check_ports("--replay-endpoint", args.replay_endpoint, len(recordings))
    ranks = _opened(recordings, args.endpoint, args.replay_endpoint)
    player = Player(ranks)
    try:
        if args.json:
            told = {"endpoint": ranks[0].endpoint, "replay_endpoint": ranks[0].replay_endpoint, "ranks": len(ranks)}
            screen.write_json({"messages": player.messages, "seconds": player.seconds, **told})
        else:
            many = f" of {len(ranks)} ranks" if len(ranks) > 1 else ""
            screen.write(
                f"{player.messages} messages{many} over {player.seconds:.1f} s",
                f"publishing endpoint={ranks[0].endpoint} replay_endpoint={ranks[0].replay_endpoint}",
            )
        with _registered(args, player), contextlib.suppress(KeyboardInterrupt):
            player.play(args.speed, args.wait, args.linger)
    finally:
        for each in ranks:
            each.close()
    published, requests = sum(each.published for each in ranks), sum(each.requests for each in ranks)
    if args.json:
        screen.write_json({"published": published, "replay_requests": requests, **told})
    else:
        screen.write(f"{published} messages published, {requests} replay requests answered")
    return 0


def _check_ports(option: str, endpoint: str, ranks: int) -> None:
    """ZeroMQ would take a port above 65535 for another one."""
    try:
        _, port = split_tcp(re.sub(r":0\Z", ":1", endpoint), option)
    except InvalidArgument as error:
        raise CommandError(str(error), USAGE) from None
    if port + ranks - 1 > 65535:
        raise CommandError(f"{option}: the ports of {ranks} ranks end above 65535", USAGE)


def _opened(recordings: Sequence[Recording], endpoint: str, replay_endpoint: str) -> list[Rank]:
    """The sockets of all ranks: rank r at port + r. For port 0 free ports are looked for that lie side by side."""
    for attempt in range(PORT_TRIES):
        ranks: list[Rank] = []
        try:
            for number, each in enumerate(recordings):
                places = [
                    at_rank(ranks[0].endpoint, number) if ranks else endpoint,
                    at_rank(ranks[0].replay_endpoint, number) if ranks else replay_endpoint,
                ]
                ranks.append(Rank(each, *places))
        except (wire.BindError, InvalidArgument) as error:
            for opened in ranks:
                opened.close()
            free = ":0" in (endpoint[-2:], replay_endpoint[-2:])
            if not (free and ranks) or attempt == PORT_TRIES - 1:
                raise CommandError(f"--endpoint or --replay-endpoint: {error}", USAGE) from None
        else:
            return ranks
    raise AssertionError("the last attempt returns or raises")


@contextlib.contextmanager
def _registered(args: argparse.Namespace, player: Player) -> Iterator[None]:
    if not args.register:
        yield
        return
    with Connection(args) as connection:
        request = pb.RegisterPodRequest(
            pod=args.register,
            model=args.model,
            endpoint=player.ranks[0].endpoint,
            replay_endpoint=player.ranks[0].replay_endpoint,
            ranks=len(player.ranks),
        )
        connection.call(connection.admin.RegisterPod, request)
        try:
            yield
        finally:
            gone = pb.UnregisterPodRequest(pod=args.register, model=args.model)
            connection.call(connection.admin.UnregisterPod, gone)


def _shapes(played: Recording) -> tuple[list[bytes], list[bytes]]:
    """Frames before sequence and payload in a reply, and the end marker, as the recorded engine sent them."""
    head = [b"", played.frames[0][1][0]] if played.frames else [b"", b""]
    end = [b"", b"", END, b""]
    for frames in played.replayed:
        if END in frames[-2:]:
            end = frames
        else:
            head = frames[:-2]
    return head, end


def _before(played: Recording) -> list[tuple[bytes, bytes]]:
    """What was replayed to the recorder and had been published before the first recorded message."""
    first = played.frames[0][1][1] if played.frames else END
    before: dict[bytes, bytes] = {}
    for frames in played.replayed:
        if END in frames[-2:]:
            continue
        try:
            wire.read_replay(frames)
        except wire.BadFrames:
            continue
        if frames[-2] < first:
            before[frames[-2]] = frames[-1]
    return sorted(before.items())
