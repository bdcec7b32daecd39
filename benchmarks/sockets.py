"""How many blocks and events a CPU-second of the whole write path takes in, ZeroMQ's threads included."""

import argparse
import multiprocessing
import statistics
import time
from multiprocessing.synchronize import Event

from load import Chains, machine

from kvindex_server import wire
from kvindex_server.fleet import Fleet
from kvindex_server.ingest import Bounds
from kvindex_server.models import Models
from kvindex_server.pods import PodSpec


def publish(endpoint: str, per_event: int, messages: int, go: Event, done: Event) -> None:
    """An engine's side in a process of its own: one event per message, as fast as it can."""
    chains = Chains(per_event)
    payloads: list[bytes] = []
    while len(payloads) < messages:
        payloads += chains.payloads(2048, per_event)[0]
    with wire.publisher(endpoint, hwm=0) as socket:
        while not go.wait(0.02):  # the first message again and again, until the subscription stands
            socket.send([b"", bytes(8), payloads[0]])
        for sequence, payload in enumerate(payloads[:messages]):
            socket.send([b"", sequence.to_bytes(8, "big"), payload])
        done.wait(120)


def one_round(per_event: int, messages: int) -> float:
    """Blocks per CPU-second of this process, from the first message to the last one applied."""
    context = multiprocessing.get_context("spawn")
    go, done = context.Event(), context.Event()
    endpoint = f"tcp://127.0.0.1:{_free_port()}"
    engine = context.Process(target=publish, args=(endpoint, per_event, messages, go, done), daemon=True)
    engine.start()
    fleet = Fleet(Models([]), bounds=Bounds())
    try:
        fleet.register(PodSpec("pod", "m", endpoint))
        ends = time.monotonic() + 180
        while fleet.statuses()[0].last_sequence is None and time.monotonic() < ends:
            time.sleep(0.01)
        begin = time.process_time()
        go.set()
        while (fleet.statuses()[0].last_sequence or 0) < messages - 1:
            if time.monotonic() > ends:
                raise TimeoutError("messages were lost")
            time.sleep(0.05)
        spent = time.process_time() - begin
        assert fleet.statuses()[0].gaps == 0
        return messages * per_event / spent
    finally:
        done.set()
        fleet.stop()
        engine.join(10)


def _free_port() -> int:
    with wire.publisher("tcp://127.0.0.1:*") as probe:
        return int(probe.endpoint.rpartition(":")[2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    print(machine())
    print(f"| case | blocks per CPU-second, sockets included (median of {rounds}) |\n|---|---|")
    for per_event, messages in ((128, 8_000), (1, 200_000)):
        median = statistics.median(one_round(per_event, messages) for _ in range(rounds))
        print(f"| {per_event} blocks per event and message | {median / 1e6:.3f} M |")


if __name__ == "__main__":
    main()
