"""`kvindex replay`: plays a recorded stream as its engine did, at any speed, and answers replay requests."""

import argparse
import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

from kvindex_server import wire
from kvindex_server.commands import recording, screen
from kvindex_server.commands.connection import Connection
from kvindex_server.commands.failure import USAGE, CommandError
from kvindex_server.commands.recording import Recording
from kvindex_server.pb.kvindex.v1 import kvindex_pb2 as pb

END = wire.END_SEQUENCE.to_bytes(8, "big")
JOIN_SECONDS = 0.2
"""ZeroMQ drops what is published before a subscription has arrived."""
TURN_SECONDS = 0.05
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


class Player:
    """The engine's side of one stream: what has been published, or was before the recording, can be replayed."""

    def __init__(self, played: Recording, endpoint: str, replay_endpoint: str) -> None:
        self._recording = played
        try:
            self._events = wire.publisher(endpoint)
        except wire.BindError as error:
            raise CommandError(f"--endpoint: {error}", USAGE) from None
        try:
            self._router = wire.replay_server(replay_endpoint)
        except wire.BindError as error:
            self._events.close()
            raise CommandError(f"--replay-endpoint: {error}", USAGE) from None
        self.endpoint, self.replay_endpoint = self._events.endpoint, self._router.endpoint
        self.published = 0
        self.requests = 0
        self._head, self._end = _shapes(played)
        self._buffer = _before(played)

    def play(self, speed: float, wait: float, linger: float) -> None:
        """Publish everything, then go on answering for a while."""
        self._serve(wait, until_asked=True)
        self._serve(JOIN_SECONDS)
        frames = self._recording.frames
        progress = screen.Progress("replay", len(frames))
        started = time.monotonic()
        for at, message in frames:
            if speed > 0:
                self._serve(started + (at - frames[0][0]) / speed - time.monotonic())
            elif self.published % BURST == 0:
                self._serve(0)
            self._publish(message)
            progress.show(self.published, f"{self.published}/{len(frames)} messages")
        progress.end()
        self._serve(linger)

    def close(self) -> None:
        """Close both sockets."""
        self._events.close()
        self._router.close()

    def _publish(self, message: list[bytes]) -> None:
        sequence = message[1]
        if self._buffer and sequence <= self._buffer[-1][0]:  # the engine began another life
            self._buffer.clear()
        self._buffer.append((sequence, message[2]))
        self._events.send(message)
        self.published += 1

    def _serve(self, seconds: float, *, until_asked: bool = False) -> None:
        """Answer replay requests for so long; a wait that is over still answers those that are there."""
        ends = time.monotonic() + seconds
        while True:
            left = ends - time.monotonic()
            if self._router.wait(max(0, round(1000 * min(left, TURN_SECONDS)))):
                while (frames := self._router.receive()) is not None:
                    if len(frames) == 3 and len(frames[2]) == 8:
                        self._answer(frames[0], frames[2])
                if until_asked:
                    return
            if left <= 0:
                return

    def _answer(self, identity: bytes, start: bytes) -> None:
        self.requests += 1
        for sequence, payload in self._buffer:
            if sequence >= start:  # both big-endian and 8 long: they compare as numbers do
                self._router.send([identity, *self._head, sequence, payload])
        self._router.send([identity, *self._end])


def run(args: argparse.Namespace) -> int:
    """Play the recording once."""
    if not args.speed >= 0:
        raise CommandError("--speed: must be 0 or more", USAGE)
    if args.register and not args.model:
        raise CommandError("--register needs --model", USAGE)
    played = recording.read(args.directory)
    player = Player(played, args.endpoint, args.replay_endpoint)
    try:
        if not args.json:
            screen.write(
                f"{len(played.frames)} messages over {played.seconds:.1f} s",
                f"publishing endpoint={player.endpoint} replay_endpoint={player.replay_endpoint}",
            )
        with _registered(args, player), contextlib.suppress(KeyboardInterrupt):
            player.play(args.speed, args.wait, args.linger)
    finally:
        player.close()
    if args.json:
        screen.write_json(
            {"published": player.published, "replay_requests": player.requests, "endpoint": player.endpoint}
        )
    else:
        screen.write(f"{player.published} messages published, {player.requests} replay requests answered")
    return 0


@contextlib.contextmanager
def _registered(args: argparse.Namespace, player: Player) -> Iterator[None]:
    if not args.register:
        yield
        return
    with Connection(args) as connection:
        request = pb.RegisterPodRequest(
            pod=args.register,
            model=args.model,
            endpoint=player.endpoint,
            replay_endpoint=player.replay_endpoint,
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
