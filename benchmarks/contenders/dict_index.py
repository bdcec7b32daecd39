"""The plain Python index: dictionaries, msgpack and xxhash; as a library, and as a process that listens to engines."""

import json
import sys
import threading
import time
from array import array

import msgpack
import xxhash
import zmq
from load import BLOCK_SIZE

SEED = 1337


class DictIndex:
    """Key -> pods, and per pod engine hash -> key. Exact for chains of one tier; counts no copies."""

    def __init__(self) -> None:
        self._holders: dict[int, set[int]] = {}
        self._keys: dict[int, dict[int, int]] = {}

    def apply(self, pod: int, payload: bytes) -> None:
        """One message."""
        known = self._keys.setdefault(pod, {})
        for event in msgpack.unpackb(payload)[1]:
            if event["type"] == "BlockStored":
                self._store(pod, known, event)
            elif event["type"] == "BlockRemoved":
                for each in event["block_hashes"]:
                    self._remove(pod, known.pop(each, None))

    def match(self, keys: list[int]) -> dict[int, int]:
        """Leading blocks per pod."""
        matched: dict[int, int] = {}
        alive: set[int] = set()
        for depth, key in enumerate(keys):
            holders = self._holders.get(key)
            still = (alive & holders if depth else set(holders)) if holders else set()
            for pod in alive - still:
                matched[pod] = depth
            alive = still
            if not alive:
                return matched
        return matched | dict.fromkeys(alive, len(keys))

    def _store(self, pod: int, known: dict[int, int], event: dict[str, list[int]]) -> None:
        key = known.get(event["parent_block_hash"])  # type: ignore[call-overload]
        for each, local in zip(event["block_hashes"], local_keys(event["token_ids"]), strict=True):
            key = local if key is None else chained(key, local)
            known[each] = key
            self._holders.setdefault(key, set()).add(pod)

    def _remove(self, pod: int, key: int | None) -> None:
        if key is None:
            return
        holders = self._holders[key]
        holders.discard(pod)
        if not holders:
            del self._holders[key]


def local_keys(tokens: list[int]) -> list[int]:
    """One hash per full block, of its tokens alone."""
    packed, width = array("I", tokens).tobytes(), 4 * BLOCK_SIZE
    return [xxhash.xxh3_64_intdigest(packed[at : at + width], SEED) for at in range(0, len(packed), width)]


def chained(parent: int, local: int) -> int:
    """A block's key from its parent's."""
    return xxhash.xxh3_64_intdigest(array("Q", (parent, local)).tobytes(), SEED)


def main() -> None:
    """First line of stdin: endpoints by pod. Then token ids, a line each; answers with how many pods hold them."""
    index = DictIndex()
    context = zmq.Context()
    endpoints = json.loads(sys.stdin.readline())
    poller = zmq.Poller()
    pods: dict[zmq.Socket[bytes], int] = {}
    for pod, endpoint in endpoints.items():
        socket = context.socket(zmq.SUB)
        socket.set_hwm(0)
        socket.subscribe(b"")
        socket.connect(endpoint)
        poller.register(socket, zmq.POLLIN)
        pods[socket] = int(pod)

    def listen() -> None:
        while True:
            for socket, _ in poller.poll():
                try:
                    for _ in range(512):
                        index.apply(pods[socket], socket.recv_multipart(zmq.NOBLOCK)[2])
                except zmq.Again:
                    pass

    threading.Thread(target=listen, daemon=True).start()
    print("up", flush=True)
    for line in sys.stdin:
        keys: list[int] = []
        for local in local_keys(json.loads(line)):
            keys.append(chained(keys[-1], local) if keys else local)
        while True:
            try:
                found = index.match(keys)
                break
            except RuntimeError:  # changed while it was copied
                time.sleep(0.01)
        print(sum(depth == len(keys) for depth in found.values()), flush=True)


if __name__ == "__main__":
    main()
