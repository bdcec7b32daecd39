"""The committed stubs are what proto/ generates, and the proto files pass buf."""

import subprocess
import sys
from pathlib import Path

from kvindex_server.pb.indexer.v1 import indexer_pb2, indexer_pb2_grpc
from kvindex_server.pb.kvindex.v1 import kvindex_pb2, kvindex_pb2_grpc
from kvindex_server.stream import StreamState, Trust

ROOT = Path(__file__).resolve().parent.parent
PB = ROOT / "kvindex_server" / "pb"


def _contents(root: Path) -> dict[str, str]:
    files = (path for path in root.rglob("*.py*") if "__pycache__" not in path.parts)
    return {str(path.relative_to(root)): path.read_text(encoding="utf-8") for path in files}


def test_stubs_are_up_to_date(tmp_path: Path) -> None:
    subprocess.run(
        ["scripts/proto.sh", str(tmp_path / "pb")],
        cwd=ROOT,
        check=True,
        timeout=60,
        env={"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "PYTHON": sys.executable},
    )
    generated, committed = _contents(tmp_path / "pb"), _contents(PB)
    assert sorted(generated) == sorted(committed)
    assert generated == committed, "run `make proto`"


def test_buf_lint() -> None:
    buf = Path(sys.executable).parent / "buf"
    found = subprocess.run([str(buf), "lint"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert found.returncode == 0, found.stdout + found.stderr


def test_stubs_live_in_our_package() -> None:
    assert kvindex_pb2_grpc.KVIndexStub.__module__ == "kvindex_server.pb.kvindex.v1.kvindex_pb2_grpc"
    assert indexer_pb2_grpc.IndexerServiceStub.__module__ == "kvindex_server.pb.indexer.v1.indexer_pb2_grpc"
    assert indexer_pb2.GetPodScoresRequest.DESCRIPTOR.full_name == "indexer.v1.GetPodScoresRequest"


def test_enums_of_code_and_proto_agree() -> None:
    for trust in Trust:
        assert kvindex_pb2.Trust.Name(trust.value) == f"TRUST_{trust.name}"
    for state in StreamState:
        assert kvindex_pb2.StreamState.Name(state.value) == f"STREAM_STATE_{state.name}"
    assert len(kvindex_pb2.Trust.keys()) == len(Trust) + 1
    assert len(kvindex_pb2.StreamState.keys()) == len(StreamState) + 1
