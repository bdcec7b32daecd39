"""Calls by the clock, as a process: ADDRESS SHARE OTHERS FILE. Prints `capacity rate`; at a line of input the outcome.

FILE holds JSON: `request`, an encoded ScoreRequest in base64, and `expected`, [blocks, trust] by pod. The capacity is
what a closed loop of 16 such calls reaches in two seconds, median of three. SHARE of it less OTHERS, the calls per
second of somebody else, is asked for, every three seconds anew: when the server was behind, that does not grow into a
queue without end. Every fourth answer is read and compared with what is expected.

The outcome is a line of JSON: `seconds` since the rate was printed, `answered` calls in that time, `judged` and `wrong`
answers and the `first_wrong`, and `ends`, calls by their end, each call once: a status code's name, `reset N` for a
stream reset with HTTP/2 error N and no status, `no answer` for one still open ten seconds later; and `again`: streams
that the transport refused before any handler, which were sent again and are among the others by how they ended then.
"""

import base64
import json
import select
import statistics
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from raw_load import Grpc, closed_loop, open_loop

from kvindex_server.pb.kvindex.v1 import kvindex_pb2 as pb

SLICE_SECONDS = 3.0
SCORE = "/kvindex.v1.KVIndex/Score"


def main() -> None:
    address, share, others = sys.argv[1], float(sys.argv[2]), float(sys.argv[3])
    given = json.loads(Path(sys.argv[4]).read_text())
    message = base64.b64decode(given["request"])
    expected = {pod: (blocks, trust) for pod, (blocks, trust) in given["expected"].items()}

    first_wrong: list[str] = []

    def right(body: bytes) -> bool:
        answer = pb.ScoreResponse.FromString(body)
        found = {each.pod: (each.matched_blocks, each.trust) for each in answer.scores} == expected
        if not found and not first_wrong:
            first_wrong.append(str(answer.scores[:3]))
        return found

    ends = Counter[str]()
    rates = []
    for _ in range(3):
        client = Grpc(address, SCORE, message, statuses=True)
        rates.append(closed_loop(client, 16, 2).rate)
        ends += client.ends + Counter({"again": client.again})
        client.close()
    capacity = statistics.median(rates)
    rate = max(1.0, capacity * share - others)
    print(capacity, rate, flush=True)
    begun = time.monotonic()
    answered = judged = wrong = 0
    while not select.select([sys.stdin], [], [], 0)[0]:
        client = Grpc(address, SCORE, message, statuses=True, right=right)
        open_loop(client, rate, SLICE_SECONDS)
        ends += client.ends
        ends += Counter({"no answer": client.in_flight, "again": client.again})
        answered += client.ends["OK"]
        judged += client.judged
        wrong += client.wrong
        client.close()
    outcome = {"seconds": time.monotonic() - begun, "answered": answered, "judged": judged, "wrong": wrong}
    print(json.dumps({**outcome, "first_wrong": first_wrong, "ends": ends}), flush=True)


if __name__ == "__main__":
    main()
