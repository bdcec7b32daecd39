"""`kvindex bench`: a small closed-loop load of Score, to see what a running server gives from here."""

import argparse
import random
import threading
import time
from array import array

from kvindex_server.commands import screen
from kvindex_server.commands.connection import Connection
from kvindex_server.commands.failure import USAGE, CommandError
from kvindex_server.pb.kvindex.v1 import kvindex_pb2 as pb

PROMPTS = 64
VOCABULARY = 32_000


def add_options(parser: argparse.ArgumentParser) -> None:
    """Beside those of the connection."""
    parser.add_argument("--model", required=True)
    parser.add_argument("--pod", action="append", default=[], help="candidate; may be repeated (default: all)")
    parser.add_argument("--length", type=int, default=2048, metavar="TOKENS", help="of a prompt (default 2048)")
    parser.add_argument("--in-flight", type=int, default=4, metavar="N", help="calls at once (default 4)")
    parser.add_argument("--seconds", type=float, default=5.0, help="default 5")
    parser.add_argument("--seed", type=int, default=1)


class _Worker(threading.Thread):
    """Asks one prompt after another until the end, and keeps how long each took."""

    def __init__(self, connection: Connection, requests: list[pb.ScoreRequest], ends: float) -> None:
        super().__init__(daemon=True)
        self._connection = connection
        self._requests = requests
        self._ends = ends
        self.took = array("d")
        self.error: CommandError | None = None

    def run(self) -> None:
        number = 0
        while (started := time.perf_counter()) < self._ends:
            try:
                self._connection.call(self._connection.read.Score, self._requests[number % len(self._requests)])
            except CommandError as error:
                self.error = error
                return
            self.took.append(time.perf_counter() - started)
            number += 1


def run(args: argparse.Namespace) -> int:
    """Calls per second and latencies; the first failure ends it."""
    if not (1 <= args.in_flight <= 256 and 0 < args.seconds <= 3600 and 1 <= args.length <= 1_000_000):
        raise CommandError("--in-flight must be in 1..256, --seconds in 0..3600, --length in 1..1000000", USAGE)
    rng = random.Random(args.seed)
    requests = [
        pb.ScoreRequest(
            model=args.model,
            pods=args.pod,
            tokens=pb.Tokens(ids=[rng.randrange(VOCABULARY) for _ in range(args.length)]),
        )
        for _ in range(PROMPTS)
    ]
    with Connection(args) as connection:
        connection.call(connection.read.Score, requests[0])
        started = time.perf_counter()
        ends = started + args.seconds
        workers = [_Worker(connection, requests[number:] + requests[:number], ends) for number in range(args.in_flight)]
        for worker in workers:
            worker.start()
        progress = screen.Progress("bench", args.seconds)
        for worker in workers:
            while worker.is_alive():
                worker.join(0.1)
                progress.show(time.perf_counter() - started, f"{sum(len(each.took) for each in workers)} calls")
        elapsed = time.perf_counter() - started
        progress.end()
    failed = next((each.error for each in workers if each.error), None)
    if failed is not None:
        raise failed
    took = sorted(each for worker in workers for each in worker.took)
    if not took:
        raise CommandError(f"--seconds: {args.seconds:g} s are too short for a single call", USAGE)
    result = {
        "calls": len(took),
        "calls_per_second": len(took) / elapsed,
        **{f"p{share}_ms": 1000 * took[min(len(took) - 1, len(took) * share // 100)] for share in (50, 90, 99)},
        "max_ms": 1000 * took[-1],
    }
    if args.json:
        screen.write_json(result)
        return 0
    screen.write(
        f"{result['calls']} calls in {elapsed:.1f} s, {result['calls_per_second']:.0f}/s: "
        f"{args.in_flight} at once, closed loop, {args.length} tokens each",
        f"p50 {result['p50_ms']:.2f} ms  p90 {result['p90_ms']:.2f} ms  p99 {result['p99_ms']:.2f} ms  "
        f"max {result['max_ms']:.2f} ms",
    )
    screen.note("This client's own time is in it; `make bench-service` measures under an open-loop load.")
    return 0
