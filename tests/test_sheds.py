"""Every call that a client sees refused is one that the server counted, and no other; against the real process."""

import sys
from pathlib import Path

import pytest
from hostile_http2 import SCORE, frame, headers
from test_chaos import Target, send

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from raw_load import Grpc, closed_loop

from kvindex_server.pb.kvindex.v1 import kvindex_pb2 as pb

MESSAGE = pb.ScoreRequest(model="m", tokens=pb.Tokens(ids=range(64)), pods=["p"]).SerializeToString()


def wait_for_end(client: Grpc) -> None:
    """Of the calls still open."""
    for _ in range(500):
        if not client.in_flight:
            return
        client.poll(0.05)
    raise AssertionError("calls without an end")


@pytest.mark.parametrize("transport", ["grpcio", "native"])
def test_each_refusal_is_counted_by_its_reason(transport: str, tmp_path: Path) -> None:
    target = Target(transport, tmp_path / "log", limits={"max_in_flight": 2})
    try:
        before = target.codes()
        client = Grpc(target.address, SCORE, MESSAGE, statuses=True)
        closed_loop(client, 64, 1)
        wait_for_end(client)
        client.close()
        assert client.ends.keys() == {"OK", "RESOURCE_EXHAUSTED"}, client.ends
        counted = {code: count - before.get(code, 0) for code, count in target.codes().items()}
        assert counted == dict(client.ends)
        assert target.sheds() == {"in_flight": client.ends["RESOURCE_EXHAUSTED"]}
    finally:
        target.close()


@pytest.mark.parametrize("transport", ["grpcio", "native"])
def test_streams_beyond_what_a_connection_may_have_are_no_sheds(transport: str, tmp_path: Path) -> None:
    """The client keeps to what the server allows; what gRPC refuses before any handler is sent again and answered."""
    target = Target(transport, tmp_path / "log", limits={"max_calls_per_connection": 4})
    try:
        client = Grpc(target.address, SCORE, MESSAGE, statuses=True)
        closed_loop(client, 64, 1)
        wait_for_end(client)
        client.close()
        assert client.ends.keys() == {"OK"}, client.ends
        assert target.sheds() == {}
    finally:
        target.close()


def test_a_call_given_up_for_its_silence_is_counted(tmp_path: Path) -> None:
    target = Target("grpcio", tmp_path / "log")
    try:
        with target.connect() as connection:
            assert send(connection, headers(1) + headers(3) + frame(0, 0, 3, b"\0\0"))
            for _ in range(100):
                if target.sheds() == {"silent": 2}:
                    break
                connection.settimeout(0.1)
                try:
                    connection.recv(65536)
                except TimeoutError:
                    pass
        assert target.sheds() == {"silent": 2}
    finally:
        target.close()
