"""Times the match of 512 blocks in one process: `kvindex`, `dynamo` or `dict`, over claims from a pickle.

The pickle has `claims`, a list of (pod, parent engine hash, engine hashes, local hashes, payload), and `prompts`, lists
of 512 local hashes. Prints the median in µs and the sum of all matches, which must agree between the three.
"""

import itertools
import json
import pickle
import statistics
import sys
import time
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

TIMES = 2000

Matcher = Callable[[Any], dict[Any, int]]


def kvindex(claims: list[Any]) -> tuple[Matcher, Callable[[list[int]], Any]]:
    """The native core, asked with keys."""
    from contenders.dict_index import chained
    from kvindex_server._core import Index

    index = Index(16)
    streams = {pod: index.add_stream(str(pod), 0) for pod in {claim[0] for claim in claims}}
    for pod, _, _, _, payload in claims:
        streams[pod].apply([payload])

    def query(locals_: list[int]) -> bytes:
        return array("Q", itertools.accumulate(locals_, chained)).tobytes()

    def match(keys: bytes) -> dict[str, int]:
        assert streams  # one that nobody keeps takes its claims along
        return {each[0]: each[2] for each in index.score(keys, [], [1.0])}

    return match, query


def dynamo(claims: list[Any]) -> tuple[Matcher, Callable[[list[int]], Any]]:
    """Dynamo's RadixTree, asked with a list of local hashes."""
    from dynamo._core import RadixTree

    tree = RadixTree()
    for number, (pod, parent, hashes, locals_, _) in enumerate(claims):
        blocks = [{"block_hash": each, "tokens_hash": local} for each, local in zip(hashes, locals_, strict=True)]
        data = {"stored": {"parent_hash": parent, "blocks": blocks}}
        tree.apply_event(pod, json.dumps({"event_id": number, "data": data, "dp_rank": 0}).encode())
    return lambda locals_: tree.find_matches(locals_).scores, lambda locals_: locals_


def dictionary(claims: list[Any]) -> tuple[Matcher, Callable[[list[int]], Any]]:
    """The plain dictionaries, asked with keys."""
    from contenders.dict_index import DictIndex, chained

    index = DictIndex()
    for pod, _, _, _, payload in claims:
        index.apply(pod, payload)
    return index.match, lambda locals_: list(itertools.accumulate(locals_, chained))


def main() -> None:
    """NAME PICKLE."""
    given = pickle.loads(Path(sys.argv[2]).read_bytes())
    match, query = {"kvindex": kvindex, "dynamo": dynamo, "dict": dictionary}[sys.argv[1]](given["claims"])
    queries = [query(each) for each in given["prompts"]]
    total = sum(sum(match(each).values()) for each in queries)
    turn, samples = itertools.cycle(queries), []
    for _ in range(TIMES):
        asked = next(turn)
        begin = time.perf_counter_ns()
        match(asked)
        samples.append((time.perf_counter_ns() - begin) / 1000)
    print(json.dumps([statistics.median(samples), total]))


if __name__ == "__main__":
    main()
