"""Equal replicas compare what they hold of each engine, show by how much they differ, and repair what differs."""

import logging
import random
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc

from kvindex_server import __version__
from kvindex_server.codec import decode
from kvindex_server.divergence import Finding, Repair, Side, compare
from kvindex_server.fleet import Fleet
from kvindex_server.interceptors import Arrival, Guard
from kvindex_server.lookup import Check
from kvindex_server.marks import Mark
from kvindex_server.pb.kvindex.v1 import kvindex_pb2 as pb
from kvindex_server.pb.kvindex.v1 import kvindex_pb2_grpc as rpc
from kvindex_server.peers import Peers
from kvindex_server.pull import MAX_ONLY, fetch_streams
from kvindex_server.snapshot import BadSnapshot
from kvindex_server.stream import Trust

_log = logging.getLogger(__name__)

METHOD = "/kvindex.v1.KVIndexAdmin/PullDigests"
_LONGEST_PAUSE = 64


def arrival(fleet: Fleet, instance: str, guard: Guard) -> Arrival:
    """The handler of PullDigests, to be served with the admin service."""

    def pull(data: bytes, _: Check) -> Iterator[bytes]:
        decode(pb.PullDigestsRequest, data)
        yield pb.StreamDigests(instance=instance, version=__version__).SerializeToString()
        for side, _epoch in fleet.sides():
            yield _encoded(side).SerializeToString()

    return guard.download(METHOD, pull)


@dataclass(frozen=True, slots=True)
class PeerState:
    """What the last comparison with one peer said."""

    peer: str
    streams: int
    """Compared; 0 also when the peer did not answer."""
    blocks: int | None
    """By how many at least they differ; None when nothing could be compared."""


class Siblings:
    """Asks every peer at an interval, on a thread of its own."""

    def __init__(self, fleet: Fleet, peers: Peers, instance: str, interval: float) -> None:
        """`instance` is what this replica answers to others, so that it knows itself behind a common name."""
        self._fleet = fleet
        self._peers = peers
        self._instance = instance
        self._interval = interval
        self._states: dict[str, PeerState] = {}
        self._repairs = {Repair.ADOPT: 0, Repair.DOUBT: 0}
        # After a repair a stream is left alone for a while, longer every time: one that does not help is not repeated
        # all day. By stream: rounds still to wait, and how many next time.
        self._pauses: dict[tuple[str, str, int], tuple[int, int]] = {}
        self._halt = threading.Event()
        self._thread = threading.Thread(target=self._run, name="siblings", daemon=True)

    def start(self) -> None:
        """Compare from now on."""
        self._thread.start()

    def stop(self) -> None:
        """Compare no more; a call under way is left behind."""
        self._halt.set()
        if self._thread.ident is not None:
            self._thread.join(timeout=1.0)

    @property
    def states(self) -> list[PeerState]:
        """One per peer asked in the last round."""
        return list(self._states.values())

    @property
    def repairs(self) -> dict[str, int]:
        """How often a stream was repaired, by how."""
        return {each.value: times for each, times in self._repairs.items()}

    def compare_now(self) -> None:
        """One round with all peers."""
        states: dict[str, PeerState] = {}
        self._pauses = {name: (max(0, left - 1), after) for name, (left, after) in self._pauses.items()}
        for address, name in self._peers.found():
            try:
                state = self._compare_with(address, name)
            except (grpc.RpcError, OSError, BadSnapshot) as error:
                reason = error.code().name if isinstance(error, grpc.RpcError) else str(error)
                _log.warning("peer could not be compared", extra={"fields": {"peer": address, "reason": reason}})
                state = PeerState(address, 0, None)
            if state is not None:
                states[address] = state
        self._states = states

    def _compare_with(self, address: str, name: str) -> PeerState | None:
        """None when the peer is this replica itself."""
        with self._peers.channel(address, name) as channel:
            answers = rpc.KVIndexAdminStub(channel).PullDigests(
                pb.PullDigestsRequest(), timeout=self._peers.timeout, metadata=self._peers.metadata()
            )
            first = next(answers, None)
            if first is None:  # no server of ours: one tells of itself first
                return PeerState(address, 0, None)
            if first.instance == self._instance:
                answers.cancel()
                return None
            if first.version != __version__:  # another version may rightly make something else of the same messages
                answers.cancel()
                return PeerState(address, 0, None)
            theirs = {side.name: side for side in map(_decoded, answers)}
            # Read after the peer's: a doubt that the peer has by then has not made marks that were exact others.
            findings = [
                (side, epoch, found)
                for side, epoch in self._fleet.sides()
                if side.name in theirs and (found := compare(side, theirs[side.name])) is not None
            ]
            self._repair(channel, address, findings)
        blocks = sum(found.blocks for _, _, found in findings)
        return PeerState(address, len(findings), blocks if findings else None)

    def _repair(self, channel: grpc.Channel, peer: str, findings: list[tuple[Side, int, Finding]]) -> None:
        adopted: dict[tuple[str, str, int], int] = {}
        for side, epoch, found in findings:
            if found.repair is Repair.NONE:
                if not found.blocks:
                    self._pauses.pop(side.name, None)
                continue
            left, after = self._pauses.get(side.name, (0, 1))
            if left:
                continue
            if found.repair is Repair.ADOPT and len(adopted) == MAX_ONLY:
                continue  # in the next round
            self._pauses[side.name] = (after, min(after * 2, _LONGEST_PAUSE))
            fields = {"peer": peer, "pod": side.pod, "rank": side.rank, "sequence": found.sequence}
            _log.warning(
                "replicas differ", extra={"fields": {**fields, "blocks": found.blocks, "repair": found.repair.value}}
            )
            if found.repair is Repair.ADOPT:
                adopted[side.name] = epoch
            else:
                self._fleet.doubt(side, epoch, f"differs from replica {peer} at sequence {found.sequence}")
                self._repairs[Repair.DOUBT] += 1
        if not adopted:
            return
        with tempfile.TemporaryDirectory(prefix="kvindex-siblings-") as directory:
            for saved in fetch_streams(self._peers, channel, list(adopted), Path(directory)):
                name = (saved.model, saved.pod, saved.rank)
                if name in adopted:
                    self._fleet.adopt(saved, adopted[name])
                    self._repairs[Repair.ADOPT] += 1

    def _run(self) -> None:
        # Not all replicas of a deployment at the same moment.
        while not self._halt.wait(self._interval * random.uniform(0.75, 1.25)):
            try:
                self.compare_now()
            except Exception:  # noqa: BLE001 - the next round may work; it is logged
                _log.exception("comparison with the peers failed")


def _encoded(side: Side) -> pb.StreamDigests:
    return pb.StreamDigests(
        model=side.model,
        pod=side.pod,
        rank=side.rank,
        endpoint=side.endpoint,
        incarnation=side.incarnation,
        block_size=side.block_size,
        hash_seed=side.hash_seed,
        trust=pb.Trust.ValueType(side.trust),
        marks=[
            pb.StreamMark(
                sequence=mark.sequence,
                message=mark.message,
                held=mark.held,
                claims=mark.claims,
                trust=pb.Trust.ValueType(mark.trust),
            )
            for mark in side.marks
        ],
    )


def _decoded(told: pb.StreamDigests) -> Side:
    return Side(
        model=told.model,
        pod=told.pod,
        rank=told.rank,
        endpoint=told.endpoint,
        incarnation=told.incarnation,
        block_size=told.block_size,
        hash_seed=told.hash_seed,
        trust=_trust(told.trust),
        cause=None,
        marks=[Mark(each.sequence, each.message, each.held, each.claims, _trust(each.trust)) for each in told.marks],
    )


def _trust(value: int) -> Trust:
    """One that is not known is not to be believed."""
    return Trust(value) if value in Trust.__members__.values() else Trust.STALE
