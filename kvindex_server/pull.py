"""A new replica takes over the index of a running one: PullSnapshot, served and called."""

import contextlib
import logging
import os
import threading
import time
from collections.abc import Collection, Iterator
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
from kvindex_server.peers import CHUNK_BYTES, Peers
from kvindex_server.snapshot import File, SavedStream

_log = logging.getLogger(__name__)

MAX_ONLY = 1024
METHOD = "/kvindex.v1.KVIndexAdmin/PullSnapshot"
_TRY_AGAIN_SECONDS = 0.2
_SILENT_SECONDS = 5.0
"""After the first part of a snapshot; writing it may take long, reading it does not."""
_LOST_SECONDS = 3.0
"""Without a new byte: then the next peer is asked."""
_LOST_ROUNDS = 2
"""Of all peers, without a new byte: a start by replay is better than to wait for one that does not come back."""
_BROKEN = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.CANCELLED,  # it drains, or was silent for too long
    grpc.StatusCode.INTERNAL,  # a stream that was reset
    grpc.StatusCode.UNKNOWN,
)


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


def fetch(peers: Peers, directory: Path) -> Path | None:
    """A file in `directory` with the state of the first peer that has any; None when no peer has.

    A transfer that breaks is taken up where it ended, over a new connection. When its peer cannot be reached any more
    the others are asked, and names are resolved anew: whoever took the place of a replica is at another address.
    """
    ends = time.monotonic() + peers.timeout
    transfers: dict[str, Transfer] = {}
    lost = 0
    try:
        while lost < _LOST_ROUNDS:
            again, before = False, _here(transfers)
            for address, name in peers.found():
                if time.monotonic() >= ends:
                    break
                if address not in transfers:
                    transfers[address] = Transfer(peers, address, name, directory)
                transfer = transfers[address]
                try:
                    if transfer.run(ends):
                        return transfer.keep()
                    again = True
                except (grpc.RpcError, OSError) as error:
                    if _is_busy(error):
                        again, lost = True, -1
                    transfer.failed(error)
            lost = 0 if _here(transfers) != before else lost + 1
            if not again or time.monotonic() + _TRY_AGAIN_SECONDS >= ends:
                return None
            time.sleep(_TRY_AGAIN_SECONDS)
        return None
    finally:
        for each in transfers.values():
            each.close()


class Transfer:
    """One peer's snapshot on its way, for as long as connections to it come and go."""

    def __init__(self, peers: Peers, address: str, name: str, directory: Path) -> None:
        self._peers = peers
        self._address = address
        self._name = name
        self._path = directory / f".{os.urandom(8).hex()}.part"
        self._file = self._path.open("wb")
        self._id = ""
        self._total = -1
        self._resumed = 0
        self._kept = False

    def run(self, ends: float) -> bool:
        """True when all of it is here; False when the peer was lost on the way. grpc.RpcError when it gives nothing."""
        last, moved_at = self._file.tell(), time.monotonic()
        while time.monotonic() < ends:
            try:
                self._take(ends)
            except grpc.RpcError as error:
                if error.code() is grpc.StatusCode.NOT_FOUND and self._id:
                    # It has newer ones by now: what is here of the old one is of no use.
                    self._restart("")
                elif error.code() not in _BROKEN or not self._id:
                    raise
                else:
                    self._resumed += 1
                    self.failed(error)
            if self._file.tell() == self._total:
                return True
            if self._file.tell() != last:
                last, moved_at = self._file.tell(), time.monotonic()
            elif time.monotonic() - moved_at > _LOST_SECONDS:
                return False
            time.sleep(_TRY_AGAIN_SECONDS)
        return False

    def _take(self, ends: float) -> None:
        """What one connection brings."""
        request = pb.PullSnapshotRequest(id=self._id, offset=self._file.tell())
        with self._peers.channel(self._address, self._name) as channel:
            call = rpc.KVIndexAdminStub(channel).PullSnapshot(
                request, timeout=max(0.001, ends - time.monotonic()), metadata=self._peers.metadata()
            )
            for chunk in _lively(call):
                if chunk.id and chunk.id != self._id:
                    self._restart(chunk.id)
                self._total = chunk.total or self._total
                self._file.write(chunk.data)

    def _restart(self, snapshot: str) -> None:
        self._file.seek(0)
        self._file.truncate()
        self._id, self._total = snapshot, -1

    @property
    def here(self) -> int:
        """Bytes so far."""
        return self._file.tell()

    def failed(self, error: Exception) -> None:
        """Say so."""
        fields = {
            "peer": self._address,
            "reason": error.code().name if isinstance(error, grpc.RpcError) else getattr(error, "strerror", ""),
            "bytes": self._file.tell(),
        }
        what = "transfer of a snapshot broke" if self._id else "peer gave no snapshot"
        _log.warning(what, extra={"fields": fields})

    def keep(self) -> Path:
        """The whole file."""
        self._file.flush()
        self._kept = True
        fields = {"peer": self._address, "bytes": self._total, "resumed": self._resumed}
        _log.info("snapshot pulled", extra={"fields": fields})
        return self._path

    def close(self) -> None:
        """Leave nothing behind but what was kept."""
        with contextlib.suppress(OSError):  # a full disk says so once more
            self._file.close()
        if not self._kept:
            self._path.unlink(missing_ok=True)


def _lively(call: grpc.Call) -> Iterator[pb.PullSnapshotChunk]:
    """Its chunks; cancelled when none comes for long, as when the other machine is gone without a word."""
    watch: threading.Timer | None = None
    try:
        for chunk in call:
            if watch is not None:
                watch.cancel()
            yield chunk
            watch = threading.Timer(_SILENT_SECONDS, call.cancel)
            watch.daemon = True
            watch.start()
    finally:
        if watch is not None:
            watch.cancel()


def _here(transfers: dict[str, Transfer]) -> list[int]:
    return [each.here for each in transfers.values() if each.here]


def _is_busy(error: Exception) -> bool:
    """It serves others just now."""
    return isinstance(error, grpc.RpcError) and error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def fetch_streams(
    peers: Peers, channel: grpc.Channel, only: Collection[tuple[str, str, int]], directory: Path
) -> Iterator[SavedStream]:
    """These streams as one peer has them now. grpc.RpcError, OSError, BadSnapshot when they cannot be had."""
    names = [pb.StreamName(model=model, pod=pod, rank=rank) for model, pod, rank in only]
    path = directory / "streams"
    with path.open("wb") as out:
        for chunk in rpc.KVIndexAdminStub(channel).PullSnapshot(
            pb.PullSnapshotRequest(only=names), timeout=peers.timeout, metadata=peers.metadata()
        ):
            out.write(chunk.data)
    file = File(path)
    try:
        for place in file.streams:
            yield file.read(place)
    finally:
        file.close()
        path.unlink()
