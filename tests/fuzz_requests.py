"""Coverage-guided fuzzing of encoded requests: native and reference path must be of one opinion about any bytes.

    python tests/fuzz_requests.py [SECONDS] [libFuzzer options] [CORPUS_DIR]

Coverage is measured in the Python of the reference path, which knows every rule that the native path keeps. A finding
ends the process and leaves its bytes in `crash-*`.
"""

import inspect
import json
import random
import sys
import tempfile
from pathlib import Path

import atheris
from google.protobuf.message import DecodeError
from test_service import Served

from kvindex_server import codec
from kvindex_server.errors import KvindexError
from kvindex_server.lookup import Lookup
from kvindex_server.pb.indexer.v1 import indexer_pb2
from kvindex_server.pb.kvindex.v1 import kvindex_pb2 as pb
from kvindex_server.stream import Trust

# One by one, because the import hook does not see modules of an editable install.
for _place in (codec, Lookup):
    for _each in vars(_place).values():
        if inspect.isfunction(_each):
            atheris.instrument_func(_each)

PODS = [f"pod-{number}" for number in range(6)]


def seeds() -> list[bytes]:
    """A request of every form, each behind the byte that says which RPC it is for."""
    tokens = pb.Tokens(ids=range(9))
    media = [pb.MmFeature(hash="h", offset=1, length=3)]
    keys = pb.Keys(values=[1, 2, 3])
    chat = json.dumps({"messages": [{"content": "abc"}]})
    scores = [
        pb.ScoreRequest(model="m", tokens=tokens, pods=[*PODS, "stranger"], top_k=3),
        pb.ScoreRequest(model="adapter", tokens=tokens, cache_salt="s", lora_name="l", mm_features=media),
        pb.ScoreRequest(model="alias", keys=keys, pods=["a"]),
        pb.ScoreRequest(model="m", prompt="abcdefgh"),
        pb.ScoreRequest(model="m", chat=chat),
    ]
    pods = [indexer_pb2.GetPodScoresRequest(model_name="m", prompt="abcdefgh", pod_identifiers=PODS)]
    blocks = [
        pb.GetPodsForBlocksRequest(model="m", keys=keys),
        pb.GetPodsForBlocksRequest(model="m", tokens=tokens, pods=["a"]),
        pb.GetPodsForBlocksRequest(model="m", engine_hashes=pb.EngineHashes(ints=[1000, 1001])),
        pb.GetPodsForBlocksRequest(model="alias", engine_hashes=pb.EngineHashes(bytes=[b"a", b"bc"]), pods=PODS),
    ]
    marked = zip((b"\0", b"\1", b"\2"), (scores, pods, blocks), strict=True)
    return [mark + each.SerializeToString() for mark, requests in marked for each in requests]


class Target:
    """Both paths over one index."""

    def __init__(self) -> None:
        self.served = Served()
        dice = random.Random(5)
        for pod in PODS:
            self.served.stored(pod, 0, [dice.randrange(3) for _ in range(24)], dice.choice(["GPU", "CPU", "FAR"]))
        self.served.fleet.names = [*PODS, "a", "b"]

        def trust(model: str, pod: str, rank: int | None = None) -> tuple[Trust, str, float]:
            known = model == "m" and pod in self.served.fleet.names
            return (Trust.EXACT, "every event applied", -1.0) if known else (Trust.COLD, "pod is not registered", -1.0)

        self.served.fleet.trust = trust  # type: ignore[method-assign]

    @atheris.instrument_func
    def one(self, data: bytes) -> None:
        """Either the same answer by both paths, or the same error; nothing else may be raised."""
        direct, body = self.served.direct, data[1:]
        which = data[0] % 3 if data else 0
        if which == 0:
            assert self.outcome(direct.score, body) == self.outcome(direct.reference, body)
        elif which == 1:
            assert self.outcome(direct.pod_scores, body) == self.outcome(direct.pod_scores_reference, body)
        else:
            assert self.outcome(direct.blocks, body) == self.outcome(direct.blocks_reference, body)

    @staticmethod
    def outcome(call: object, data: bytes) -> object:
        try:
            answer = call(data, lambda: None)  # type: ignore[operator]
        except KvindexError as error:
            return error.code, error.message
        try:
            message = pb.ScoreResponse.FromString(answer)  # a map's entries may come in any order
        except DecodeError:
            return answer
        return message.SerializeToString(deterministic=True)


def main() -> None:
    seconds = sys.argv[1] if len(sys.argv) > 1 else "60"
    target = Target()
    with tempfile.TemporaryDirectory() as corpus:
        for number, seed in enumerate(seeds()):
            (Path(corpus) / str(number)).write_bytes(seed)
            target.one(seed)
        options = [
            f"-max_total_time={seconds}",
            "-max_len=400",
            "-len_control=0",
            "-timeout=10",
            "-rss_limit_mb=2048",
            "-artifact_prefix=build/",
        ]
        atheris.Setup([sys.argv[0], *options, *sys.argv[2:], corpus], target.one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
