"""Servers as processes: killed and started again over their snapshots, and new ones that take over from a sibling."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from publisher import free_port
from test_processes import EngineProcess, ServerProcess, agrees, blocks, engine_of, eventually, running

from kvindex_server.pb.kvindex.v1 import kvindex_pb2 as pb
from kvindex_server.pb.kvindex.v1 import kvindex_pb2_grpc as rpc
from kvindex_server.peers import Peers
from kvindex_server.pull import fetch
from kvindex_server.snapshot import File


def kept_in(directory: Path, monkeypatch: pytest.MonkeyPatch, interval: float = 0.05) -> None:
    monkeypatch.setenv("KVINDEX_SNAPSHOT__DIRECTORY", str(directory))
    monkeypatch.setenv("KVINDEX_SNAPSHOT__INTERVAL_SECONDS", str(interval))


def test_killed_at_random_moments_over_its_snapshots(
    pod: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL while snapshots are written all the time: every start is exact again, and never wrong.

    Nobody configures the pod, and the engine keeps few messages: only the snapshot can bring back who is followed, and
    what came before.
    """
    kept_in(tmp_path, monkeypatch)
    rng = random.Random(11)
    listen = f"127.0.0.1:{free_port()}"
    engine = EngineProcess(str(pod["endpoint"]), str(pod["replay_endpoint"]), 3, buffer_steps=300)
    published = 200
    with running(engine):
        for life in range(6):
            server = ServerProcess(listen, [])
            with running(server):
                if not life:
                    server.register(pod)
                published += 100
                told = engine.load(published)
                told = engine.tell("drain")
                eventually(lambda told=told, server=server: agrees(server, told, set()))  # type: ignore[misc]
                published = int(str(told["published"]))
                newest = max(tmp_path.glob("*.kvix"), default=tmp_path)
                for _ in range(2):  # the one under way may have begun before the engine's last message
                    eventually(lambda newest=newest: max(tmp_path.glob("*.kvix"), default=tmp_path) > newest)  # type: ignore[misc]
                    newest = max(tmp_path.glob("*.kvix"))
                engine.load(published + 20)
                time.sleep(rng.uniform(0.0, 0.2))
            published += 20
    assert len(list(tmp_path.glob("*.kvix"))) <= 3  # two kept, and perhaps one whose elders were not deleted yet


def test_a_stopped_server_writes_a_last_snapshot(
    pod: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM: what is on disk is the state at the end, though no interval had passed."""
    kept_in(tmp_path, monkeypatch, interval=3600)
    engine = engine_of(pod, seed=4)
    with running(engine):
        server = ServerProcess("127.0.0.1:0", [pod])
        told = engine.load(300)
        told = engine.tell("drain")
        eventually(lambda: agrees(server, told, set()))
        server._popen.send_signal(signal.SIGTERM)
        server._popen.communicate(timeout=20)
        (path,) = tmp_path.glob("*.kvix")
        file = File(path)
        (place,) = file.streams
        assert place.saved.last_sequence + 1 == told["published"]
        assert place.saved.claims >= len(blocks(told, "resident"))
        file.close()


def test_a_new_replica_takes_over_from_a_sibling(pod: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    """It asks the first peer that has anything, goes on behind its state, and becomes ready when it is exact."""
    first_listen = f"127.0.0.1:{free_port()}"
    engine = engine_of(pod, seed=5)
    with running(engine):
        first = ServerProcess(first_listen, [])
        with running(first):
            first.register(pod)
            told = engine.load(300)
            told = engine.tell("drain")
            eventually(lambda: agrees(first, told, set()))
            peers = f'["127.0.0.1:{free_port()}", "{first_listen}"]'  # the first one is away
            monkeypatch.setenv("KVINDEX_SNAPSHOT__PEERS", peers)
            second = ServerProcess("127.0.0.1:0", [])
            with running(second):
                eventually(lambda: agrees(second, told, set()))
                told = engine.load(int(str(told["published"])) + 100)
                told = engine.tell("drain")
                eventually(lambda: agrees(second, told, set()) and agrees(first, told, set()))
                assert second.stream().restarts == 0


def test_what_a_sibling_does_not_have_comes_from_the_own_snapshot(
    pod: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replicas that start together: one finds the other with its port open, and its streams not verified yet."""
    first_listen, listen = (f"127.0.0.1:{free_port()}" for _ in range(2))
    engine = EngineProcess(str(pod["endpoint"]), str(pod["replay_endpoint"]), 5, buffer_steps=50)
    with running(engine), running(ServerProcess(first_listen, [])):  # it follows nobody
        kept_in(tmp_path, monkeypatch, interval=3600)
        monkeypatch.setenv("KVINDEX_SNAPSHOT__PEERS", f'["{first_listen}"]')
        server = ServerProcess(listen, [])
        with running(server):
            server.register(pod)
            told = engine.load(300)
            told = engine.tell("drain")
            eventually(lambda: agrees(server, told, set()))
            server._popen.send_signal(signal.SIGTERM)
            server._popen.communicate(timeout=20)
        again = ServerProcess(listen, [])
        with running(again):
            eventually(lambda: agrees(again, told, set()))


def test_without_any_peer_the_start_is_cold_and_not_late(
    pod: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replicas that start together find nobody; they go on by replay."""
    monkeypatch.setenv("KVINDEX_SNAPSHOT__PEERS", f'["127.0.0.1:{free_port()}"]')
    engine = engine_of(pod, seed=6)
    with running(engine):
        told = engine.load(100)
        server = ServerProcess("127.0.0.1:0", [pod])
        with running(server):
            told = engine.tell("drain")
            eventually(lambda: agrees(server, told, set()))


class Cutting:
    """A sibling whose connection breaks after every few parts."""

    def __init__(self, name: str, data: bytes) -> None:
        self._name = name
        self._data = data
        self.asked: list[int] = []

    def pull(self, request: pb.PullSnapshotRequest, context: grpc.ServicerContext) -> Iterator[pb.PullSnapshotChunk]:
        self.asked.append(request.offset)
        yield pb.PullSnapshotChunk(id=self._name, total=len(self._data))
        rest = self._data[request.offset :]
        for begin in range(0, len(rest), 500):
            if begin == 1500:
                context.abort(grpc.StatusCode.UNAVAILABLE, "cut")
            yield pb.PullSnapshotChunk(data=rest[begin : begin + 500])


def test_a_broken_transfer_is_taken_up_where_it_ended(pod: dict[str, object], tmp_path: Path) -> None:
    """Only what is missing is asked for again, of the same snapshot; an unknown one is refused."""
    engine = engine_of(pod, seed=8)
    listen = f"127.0.0.1:{free_port()}"
    server = ServerProcess(listen, [pod])
    with running(engine), running(server), grpc.insecure_channel(listen) as channel:
        told = engine.load(300)
        told = engine.tell("drain")
        eventually(lambda: agrees(server, told, set()))
        stub = rpc.KVIndexAdminStub(channel)
        whole = list(stub.PullSnapshot(pb.PullSnapshotRequest(), timeout=10))
        data = b"".join(each.data for each in whole)
        assert len(data) == whole[0].total > 6000
        tail = list(stub.PullSnapshot(pb.PullSnapshotRequest(id=whole[0].id, offset=4000), timeout=10))
        assert b"".join(each.data for each in tail) == data[4000:]
        for request, code in (
            (pb.PullSnapshotRequest(id="no such"), grpc.StatusCode.NOT_FOUND),
            (pb.PullSnapshotRequest(id=whole[0].id, offset=len(data) + 1), grpc.StatusCode.INVALID_ARGUMENT),
        ):
            with pytest.raises(grpc.RpcError) as error:
                list(stub.PullSnapshot(request, timeout=10))
            assert error.value.code() is code
    cutting = Cutting("one", data)
    sibling = grpc.server(ThreadPoolExecutor(2))
    handler = grpc.unary_stream_rpc_method_handler(
        cutting.pull,
        request_deserializer=pb.PullSnapshotRequest.FromString,
        response_serializer=pb.PullSnapshotChunk.SerializeToString,
    )
    generic = grpc.method_handlers_generic_handler("kvindex.v1.KVIndexAdmin", {"PullSnapshot": handler})
    sibling.add_generic_rpc_handlers((generic,))
    port = sibling.add_insecure_port("127.0.0.1:0")
    sibling.start()
    try:
        path = fetch(Peers([f"127.0.0.1:{port}"], timeout=20), tmp_path)
    finally:
        sibling.stop(0)
    assert path is not None and path.read_bytes() == data
    assert cutting.asked == list(range(0, len(data), 1500))


def test_a_client_that_goes_away_half_way_harms_nothing(pod: dict[str, object]) -> None:
    """Many pulls cancelled at once; the server goes on answering and pulling."""
    listen = f"127.0.0.1:{free_port()}"
    server = ServerProcess(listen, [pod])
    with running(server), grpc.insecure_channel(listen) as channel:
        stub = rpc.KVIndexAdminStub(channel)

        def pull_and_leave() -> None:
            call = stub.PullSnapshot(pb.PullSnapshotRequest(), timeout=10)
            try:
                next(call)
            except (StopIteration, grpc.RpcError):
                pass
            call.cancel()

        threads = [threading.Thread(target=pull_and_leave) for _ in range(20)]
        for each in threads:
            each.start()
        for each in threads:
            each.join(30)

        def pulled() -> bool:
            try:
                return bool(list(stub.PullSnapshot(pb.PullSnapshotRequest(), timeout=10)))
            except grpc.RpcError as error:
                assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
                return False

        eventually(pulled)


def test_an_unusable_directory_is_a_configuration_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said at start, by its key; not found out at the first snapshot."""
    file = tmp_path / "file"
    file.write_text("")
    env = {**os.environ, "KVINDEX_SNAPSHOT__DIRECTORY": str(file / "below")}
    command = [sys.executable, "-m", "kvindex_server", "serve", "--listen", "127.0.0.1:0", "--metrics-listen"]
    done = subprocess.run([*command, "127.0.0.1:0"], env=env, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 2 and "snapshot.directory" in done.stderr
