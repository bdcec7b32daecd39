"""A new replica takes over the index of a running one: PullSnapshot, served and called."""

import logging
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc

from kvindex_server.codec import decode
from kvindex_server.errors import InvalidArgument, NotFound, Unavailable
from kvindex_server.fleet import Fleet
from kvindex_server.interceptors import Arrival, Guard
from kvindex_server.keeper import Keeper
from kvindex_server.lookup import Check
from kvindex_server.pb.kvindex.v1 import kvindex_pb2 as pb
from kvindex_server.pb.kvindex.v1 import kvindex_pb2_grpc as rpc
from kvindex_server.snapshot import File, SavedStream

_log = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 20
MAX_ONLY = 1024
METHOD = "/kvindex.v1.KVIndexAdmin/PullSnapshot"
_TRY_AGAIN_SECONDS = 0.2
_MAX_RESUMES = 1000
_CONNECT_MS = 2_000


def arrival(keeper: Keeper, fleet: Fleet, guard: Guard) -> Arrival:
    """The handler of PullSnapshot, to be served with the admin service."""

    def pull(data: bytes, check: Check) -> Iterator[bytes]:
        request = decode(pb.PullSnapshotRequest, data)
        if request.only:
            yield from _streams(keeper, fleet, request)
            return
        path = keeper.find(request.id) if request.id else keeper.write(fleet)
        if path is None and request.id:
            raise NotFound("id: this snapshot is gone; ask for a fresh one")
        if path is None:
            raise Unavailable("no snapshot can be written here; see the server's log")
        check()
        try:
            file = path.open("rb")
        except FileNotFoundError:
            raise NotFound("id: this snapshot is gone; ask for a fresh one") from None
        with file:
            total = path.stat().st_size
            if request.offset > total:
                raise InvalidArgument("offset", f"is beyond the snapshot's {total} bytes")
            file.seek(request.offset)
            yield pb.PullSnapshotChunk(id=path.stem, total=total).SerializeToString()
            while part := file.read(CHUNK_BYTES):
                yield pb.PullSnapshotChunk(data=part).SerializeToString()

    return guard.download(METHOD, pull)


def _streams(keeper: Keeper, fleet: Fleet, request: pb.PullSnapshotRequest) -> Iterator[bytes]:
    if request.id or request.offset:
        raise InvalidArgument("only", "cannot be taken up where it ended; ask anew, without id and offset")
    if len(request.only) > MAX_ONLY:
        raise InvalidArgument("only", f"has {len(request.only)} streams, at most {MAX_ONLY} are given at once")
    only = {(each.model, each.pod, each.rank) for each in request.only}
    try:
        with keeper.extract(fleet, only) as path, path.open("rb") as file:
            yield pb.PullSnapshotChunk(total=path.stat().st_size).SerializeToString()
            while part := file.read(CHUNK_BYTES):
                yield pb.PullSnapshotChunk(data=part).SerializeToString()
    except OSError as error:
        raise Unavailable("no snapshot can be written here; see the server's log") from error


@dataclass(frozen=True, slots=True)
class Peers:
    """Where to ask, in this order, and how."""

    addresses: Sequence[str]
    timeout: float
    token_file: str = ""
    ca_file: str = ""

    def fetch(self, directory: Path) -> Path | None:
        """A file in `directory` with the state of the first peer that has any; None when no peer has."""
        ends = time.monotonic() + self.timeout
        for address in self.addresses:
            if time.monotonic() >= ends:
                break
            try:
                path = self._fetch_from(address, directory, ends)
            except (grpc.RpcError, OSError) as error:
                reason = error.code().name if isinstance(error, grpc.RpcError) else error.strerror
                _log.warning("peer gave no snapshot", extra={"fields": {"peer": address, "reason": reason}})
                continue
            if path is not None:
                _log.info("snapshot pulled", extra={"fields": {"peer": address, "bytes": path.stat().st_size}})
                return path
        return None

    def fetch_streams(
        self, channel: grpc.Channel, only: Collection[tuple[str, str, int]], directory: Path
    ) -> Iterator[SavedStream]:
        """These streams as one peer has them now. grpc.RpcError, OSError, BadSnapshot when they cannot be had."""
        names = [pb.StreamName(model=model, pod=pod, rank=rank) for model, pod, rank in only]
        path = directory / "streams"
        with path.open("wb") as out:
            for chunk in rpc.KVIndexAdminStub(channel).PullSnapshot(
                pb.PullSnapshotRequest(only=names), timeout=self.timeout, metadata=self.metadata()
            ):
                out.write(chunk.data)
        file = File(path)
        try:
            for place in file.streams:
                yield file.read(place)
        finally:
            file.close()
            path.unlink()

    def _fetch_from(self, address: str, directory: Path, ends: float) -> Path | None:
        handle, name = tempfile.mkstemp(dir=directory, prefix=".", suffix=".part")
        path = Path(name)
        with self.channel(address) as channel, open(handle, "wb") as file:
            stub = rpc.KVIndexAdminStub(channel)
            known, total = "", -1
            for _ in range(_MAX_RESUMES):
                request = pb.PullSnapshotRequest(id=known, offset=file.tell() if known else 0)
                try:
                    for chunk in stub.PullSnapshot(
                        request, timeout=max(0.001, ends - time.monotonic()), metadata=self.metadata()
                    ):
                        if chunk.id and chunk.id != known:
                            file.seek(0)
                            file.truncate()
                            known = chunk.id
                        total = chunk.total or total
                        file.write(chunk.data)
                except grpc.RpcError as error:
                    if error.code() is grpc.StatusCode.NOT_FOUND and known:
                        known = ""  # begin anew
                    elif error.code() is not grpc.StatusCode.UNAVAILABLE or not known:
                        path.unlink(missing_ok=True)
                        raise
                    time.sleep(_TRY_AGAIN_SECONDS)
                    if time.monotonic() < ends:
                        continue
                if file.tell() == total:
                    return path
                if time.monotonic() >= ends:
                    break
        path.unlink(missing_ok=True)
        return None

    def channel(self, address: str, name: str = "") -> grpc.Channel:
        """A channel to a peer, whose certificate is for `name` when that is not what is dialled."""
        options: list[tuple[str, int | str]] = [
            ("grpc.max_receive_message_length", 4 * CHUNK_BYTES),
            # A replica that starts, which may be this one, has its port open and does not answer yet.
            ("grpc.min_reconnect_backoff_ms", _CONNECT_MS),
        ]
        if name and self.ca_file:
            options.append(("grpc.ssl_target_name_override", name))
        if not self.ca_file:
            return grpc.insecure_channel(address, options)
        credentials = grpc.ssl_channel_credentials(Path(self.ca_file).read_bytes())
        return grpc.secure_channel(address, credentials, options)

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What a call to a peer carries. OSError when the token cannot be read."""
        if not self.token_file:
            return ()
        lines = Path(self.token_file).read_text(encoding="utf-8").splitlines()
        token = next((line.strip() for line in lines if line.strip() and not line.startswith("#")), "")
        return (("authorization", f"Bearer {token}"),)
