"""The publishing half of a simulated engine: sequence numbers, a replay buffer and two sockets."""

import time
from collections import deque
from collections.abc import Callable, Sequence

from kvindex_server import wire
from kvindex_server.simulate.events import Encoding, Event, encode_batch

END = wire.END_SEQUENCE.to_bytes(8, "big")
REBIND_SECONDS = 5.0


class Publisher:
    """Sockets of one rank; made anywhere, then used and closed by one thread.

    `encoding` also settles the layout of replies: vLLM releases with array events leave the topic out.
    """

    def __init__(
        self,
        topic: str,
        *,
        endpoint: str = "tcp://127.0.0.1:0",
        replay_endpoint: str = "tcp://127.0.0.1:0",
        encoding: Encoding = Encoding.MAP,
        rank: int = 0,
        buffer_steps: int = 10_000,
    ) -> None:
        self._topic = topic.encode()
        self._encoding = encoding
        self._rank = rank
        self._buffer: deque[tuple[bytes, bytes]] = deque(maxlen=buffer_steps)
        self._sequence = 0
        self._to_lose = 0
        self._events = wire.publisher(endpoint)
        try:
            self._replay = wire.replay_server(replay_endpoint)
        except wire.BindError:
            self._events.close()
            raise
        self.endpoint = self._events.endpoint
        self.replay_endpoint = self._replay.endpoint

    @property
    def published(self) -> int:
        """Messages numbered so far, lost ones included."""
        return self._sequence

    def publish(self, events: Sequence[Event]) -> None:
        """Send one step's events under the next sequence number; a step without events sends nothing."""
        if not events:
            return
        payload = encode_batch(events, time.time(), self._rank, self._encoding)
        sequence = self._sequence.to_bytes(8, "big")
        self._sequence += 1
        self._buffer.append((sequence, payload))
        if self._to_lose:
            self._to_lose -= 1
            return
        self._events.send([self._topic, sequence, payload])

    def lose(self, messages: int) -> None:
        """Do not send the next messages, as a full socket would; they can still be replayed."""
        self._to_lose += messages

    def serve_replay(self, timeout_ms: int) -> None:
        """Wait for replay requests and answer them."""
        if not self._replay.wait(timeout_ms):
            return
        while (frames := self._replay.receive()) is not None:
            if len(frames) != 3 or len(frames[2]) != 8:
                continue  # real engines log it and never answer
            self._answer(frames[0], frames[2])

    def restart(self) -> None:
        """Die and live again at the same addresses: number 0, an empty buffer, and not a word about it."""
        self.close()
        self._sequence = 0
        self._to_lose = 0
        self._buffer.clear()
        deadline = time.monotonic() + REBIND_SECONDS
        self._events = _bind_again(lambda: wire.publisher(self.endpoint), deadline)
        self._replay = _bind_again(lambda: wire.replay_server(self.replay_endpoint), deadline)

    def close(self) -> None:
        """Close both sockets."""
        self._events.close()
        self._replay.close()

    def _answer(self, identity: bytes, start: bytes) -> None:
        with_topic = self._encoding is Encoding.MAP
        head = [identity, b"", self._topic] if with_topic else [identity, b""]
        for sequence, payload in self._buffer:
            if sequence >= start:  # both big-endian and 8 long: they compare as numbers do
                self._replay.send([*head, sequence, payload])
        end_head = [identity, b"", b""] if with_topic else [identity, b""]
        self._replay.send([*end_head, END, b""])


def _bind_again(bind: Callable[[], wire.Socket], deadline: float) -> wire.Socket:
    # ZeroMQ closes a socket in the background: its port is taken for a moment more.
    while True:
        try:
            return bind()
        except wire.BindError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
