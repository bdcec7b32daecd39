"""An engine's event sockets as vLLM runs them: a PUB that numbers batches and a ROUTER that replays them."""

import socket
import threading
from collections.abc import Sequence
from types import TracebackType

import zmq

END = b"\xff" * 8


def free_port(*others: str) -> int:
    """A port of 127.0.0.1, and of these addresses too, that nobody has right now."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
            if all(_is_free(each, port) for each in others):
                return port


def _is_free(address: str, port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind((address, port))
        except OSError:
            return False
        return True


class Publisher:
    """One rank of one engine, one life. Sequences begin at 0 and the replay buffer is empty.

    `layout` "old" replays ["", seq, payload] (vLLM <= 0.25), "new" ["", topic, seq, payload]. With
    `connect` the publishing socket dials into the index. `replay` False leaves the replay socket out,
    `mute` keeps it from ever answering.
    """

    def __init__(
        self,
        port: int | None = None,
        replay_port: int | None = None,
        *,
        topic: bytes = b"",
        layout: str = "new",
        connect: str = "",
        replay: bool = True,
        mute: bool = False,
    ) -> None:
        self._topic = topic
        self._layout = layout
        self._mute = mute
        self.buffer: list[tuple[int, bytes]] = []
        self.replays = 0
        self.subscriptions = 0
        self.next_sequence = 0
        self._subscribed = threading.Event()
        self._stop = threading.Event()
        self._context = zmq.Context()
        self._feed: zmq.Socket[bytes] = self._context.socket(zmq.PUSH)
        self._inbox: zmq.Socket[bytes] = self._context.socket(zmq.PULL)
        address = f"inproc://{id(self)}"
        self._inbox.bind(address)
        self._feed.connect(address)
        # XPUB is PUB on the wire, and tells when somebody has subscribed.
        self._pub: zmq.Socket[bytes] = self._context.socket(zmq.XPUB)
        self._pub.setsockopt(zmq.XPUB_VERBOSE, 1)
        self._router: zmq.Socket[bytes] | None = None
        self.endpoint = self.replay_endpoint = ""
        if connect:
            self._pub.connect(connect)
        else:
            self.endpoint = f"tcp://127.0.0.1:{port or free_port()}"
            self._pub.bind(self.endpoint)
        if replay:
            self._router = self._context.socket(zmq.ROUTER)
            self.replay_endpoint = f"tcp://127.0.0.1:{replay_port or free_port()}"
            self._router.bind(self.replay_endpoint)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def __enter__(self) -> "Publisher":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def port(self) -> int:
        """Where it publishes."""
        return int(self.endpoint.rpartition(":")[2])

    @property
    def replay_port(self) -> int:
        """Where it replays."""
        return int(self.replay_endpoint.rpartition(":")[2])

    def publish(self, payload: bytes, *, lose: bool = False) -> int:
        """The next batch; `lose` keeps it from subscribers, as a full socket would."""
        sequence = self.next_sequence
        self.next_sequence += 1
        self._feed.send_multipart([b"lose" if lose else b"send", sequence.to_bytes(8, "big"), payload])
        return sequence

    def publish_frames(self, frames: Sequence[bytes]) -> None:
        """A recorded message, under its own sequence."""
        self.next_sequence = int.from_bytes(frames[1], "big")
        self.publish(frames[2])

    def wait_subscriber(self, seconds: float = 10.0) -> None:
        """Returns when a subscription has arrived."""
        assert self._subscribed.wait(seconds), "nobody subscribed"

    def close(self) -> None:
        """As SIGKILL: both sockets are gone, nothing is announced."""
        if self._stop.is_set():
            return
        self._stop.set()
        self._feed.send(b"stop")
        self._thread.join(5)
        self._feed.close(0)
        self._context.term()

    def _run(self) -> None:
        poller = zmq.Poller()
        sockets = [each for each in (self._inbox, self._pub, self._router) if each is not None]
        for each in sockets:
            poller.register(each, zmq.POLLIN)
        while not self._stop.is_set():
            ready = dict(poller.poll())
            if self._pub in ready and self._pub.recv()[:1] == b"\x01":
                self.subscriptions += 1
                self._subscribed.set()
            if self._inbox in ready:
                self._send(self._inbox.recv_multipart())
            if self._router is not None and self._router in ready:
                self._replay(self._router.recv_multipart())
        for each in sockets:
            each.close(0)

    def _send(self, command: list[bytes]) -> None:
        if len(command) != 3:
            return
        verb, sequence, payload = command
        self.buffer.append((int.from_bytes(sequence, "big"), payload))
        if verb == b"send":
            self._pub.send_multipart([self._topic, sequence, payload])

    def _replay(self, request: list[bytes]) -> None:
        if len(request) != 3 or request[1] or self._router is None:
            return  # vLLM logs it and never answers
        identity, _, start = request
        self.replays += 1
        if self._mute:
            return
        middle = [b""] if self._layout == "old" else [b"", self._topic]
        for sequence, payload in list(self.buffer):
            if sequence >= int.from_bytes(start, "big"):
                self._router.send_multipart([identity, *middle, sequence.to_bytes(8, "big"), payload])
        end = [b""] if self._layout == "old" else [b"", b""]
        self._router.send_multipart([identity, *end, END, b""])
