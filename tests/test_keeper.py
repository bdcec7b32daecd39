"""Snapshots of a followed fleet: restored and verified, or refused; never a wrong claim."""

import errno
import os
import random
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from publisher import Publisher
from test_fleet import eventually, payload

from kvindex_server._core import xxh3_64
from kvindex_server.fleet import Fleet
from kvindex_server.ingest import Bounds
from kvindex_server.keeper import Keeper, register_again
from kvindex_server.models import Models
from kvindex_server.pods import PodSpec
from kvindex_server.snapshot import MAGIC, BadSnapshot, Directory, File, Writer
from kvindex_server.stream import Cause, StreamStatus, Trust


class Run:
    """One life of a server: a fleet over a snapshot directory."""

    def __init__(self, directory: Path, *, configured: tuple[PodSpec, ...] = (), max_age: float = 3600.0) -> None:
        self.keeper = Keeper(directory, keep=2, interval=3600.0, max_age=max_age)
        specs = self.keeper.load()
        self.models = Models([])
        bounds = Bounds(replay_timeout=0.3, rearm_seconds=0.2)
        self.fleet = Fleet(self.models, configured, bounds=bounds, saved=self.keeper.saved)
        self.fleet.start()
        register_again(self.fleet, specs)

    @property
    def status(self) -> StreamStatus:
        return self.fleet.statuses()[0]

    def holds(self, *numbers: int) -> bool:
        """Exactly these blocks."""
        index = self.models.get("m").index
        found = index.holders_of_ints(struct.pack(f"<{len(numbers)}Q", *numbers), [])
        return index.claims == len(numbers) and all(holders for _, holders in found)

    def stop(self) -> None:
        self.keeper.stop()
        self.fleet.stop()


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    runs: list[Run] = []

    def start(**options: object) -> Run:
        runs.append(Run(tmp_path, **options))  # type: ignore[arg-type]
        return runs[-1]

    yield start
    for run in runs:
        run.stop()


def spec_of(engine: Publisher, **fields: object) -> PodSpec:
    return PodSpec("pod", "m", engine.endpoint, engine.replay_endpoint, **fields)  # type: ignore[arg-type]


def follow(run: Run, engine: Publisher, count: int, **fields: object) -> None:
    """A pod with so many blocks, known exactly."""
    run.fleet.register(spec_of(engine, **fields))
    engine.wait_subscriber()
    for number in range(1, count + 1):
        engine.publish(payload(number))
    eventually(lambda: run.status.last_sequence == count - 1 and run.status.trust is Trust.EXACT)


def test_a_restart_goes_on_behind_the_snapshot(started: Callable[..., Run]) -> None:
    """Restored, verified, and only what came since is replayed: the engine may have forgotten the rest."""
    with Publisher() as engine:
        first = started()
        follow(first, engine, 5)
        assert first.keeper.write(first.fleet) is not None
        engine.publish(payload(6))
        eventually(lambda: first.holds(1, 2, 3, 4, 5, 6))
        first.stop()
        engine.publish(payload(7))
        engine.buffer[:] = engine.buffer[4:]  # the message applied last before the snapshot is the oldest one
        second = started()
        eventually(lambda: second.status.trust is Trust.EXACT)
        assert second.holds(1, 2, 3, 4, 5, 6, 7)
        assert (second.status.restarts, second.keeper.stats.restored_claims) == (0, 5)


def test_another_engine_at_the_same_address_gets_nothing(started: Callable[..., Run]) -> None:
    """The engine restarted while the server was down: nothing of its former life survives the first answer."""
    with Publisher() as engine:
        first = started()
        follow(first, engine, 3)
        first.keeper.write(first.fleet)
        first.stop()
        port, replay_port = engine.port, engine.replay_port
    with Publisher(port, replay_port) as reborn:
        for number in range(11, 16):
            reborn.publish(payload(number))
        second = started()
        eventually(lambda: second.status.trust is Trust.EXACT)
        assert second.holds(11, 12, 13, 14, 15) and second.status.restarts == 1


def test_an_engine_that_does_not_answer_leaves_the_claims_doubtful(started: Callable[..., Run]) -> None:
    """Until somebody can say whose they are; when the engine answers at last, they are believed again."""
    with Publisher() as engine:
        first = started()
        follow(first, engine, 3)
        first.keeper.write(first.fleet)
        first.stop()
        engine._mute = True
        second = started()
        eventually(lambda: second.status.last_sequence == 2)
        assert (second.status.trust, second.status.trust_cause) == (Trust.STALE, Cause.CONNECTION_LOST)
        eventually(lambda: second.holds(1, 2, 3))  # marked for what it is before it is there
        engine._mute = False
        eventually(lambda: second.status.trust is Trust.EXACT, 20)
        assert second.holds(1, 2, 3)


def test_what_an_engine_has_not_confirmed_yet_is_saved_as_it_was(started: Callable[..., Run]) -> None:
    """A second start before the engine has answered, and after two snapshots meanwhile, costs no claim."""
    with Publisher() as engine:
        first = started()
        follow(first, engine, 5)
        first.keeper.write(first.fleet)
        first.stop()
        engine._mute = True
        engine.buffer[:] = engine.buffer[4:]
        second = started()
        eventually(lambda: second.holds(1, 2, 3, 4, 5))
        for _ in range(2):
            assert second.keeper.write(second.fleet) is not None
        assert second.status.trust is Trust.STALE
        second.stop()
        engine._mute = False
        third = started()
        eventually(lambda: third.status.trust is Trust.EXACT)
        assert third.holds(1, 2, 3, 4, 5) and third.status.restarts == 0


def test_without_replay_restored_claims_stay_doubtful(started: Callable[..., Run]) -> None:
    """Nothing can tell what came since."""
    with Publisher(replay=False) as engine:
        first = started()
        first.fleet.register(PodSpec("pod", "m", engine.endpoint))
        engine.wait_subscriber()
        engine.publish(payload(1))
        eventually(lambda: first.status.trust is Trust.EXACT)
        first.keeper.write(first.fleet)
        first.stop()
        second = started()
        eventually(lambda: second.holds(1))
        assert second.status.trust is Trust.STALE


def test_only_the_same_registration_gets_its_claims(started: Callable[..., Run]) -> None:
    """Another incarnation, endpoint or configuration than the saved one is another engine."""
    with Publisher() as engine:
        first = started()
        follow(first, engine, 3, incarnation="a")
        first.keeper.write(first.fleet)
        first.stop()
        second = started(configured=(spec_of(engine, incarnation="b"),))
        eventually(lambda: second.status.trust is Trust.EXACT)
        assert second.keeper.stats.restored_claims == 0 and len(second.fleet.statuses()) == 1
        assert second.holds(1, 2, 3)  # by replay from 0


def test_doubtful_streams_are_not_saved(started: Callable[..., Run]) -> None:
    """A fresh start knows better than claims that may be wrong."""
    with Publisher(replay=False) as engine:
        run = started()
        run.fleet.register(PodSpec("pod", "m", engine.endpoint))
        engine.wait_subscriber()
        engine.publish(payload(1))
        engine.publish(payload(2), lose=True)
        engine.publish(payload(3))
        eventually(lambda: run.status.trust is Trust.STALE)
        path = run.keeper.write(run.fleet)
        assert path is not None
        saved = File(path)
        assert saved.streams == [] and [each.pod for each in saved.pods] == ["pod"]
        saved.close()


def write_some(directory: Path, run: Run) -> Path:
    path = run.keeper.write(run.fleet)
    assert path is not None and path.parent == directory
    return path


def test_damage_is_refused_and_the_older_file_is_used(started: Callable[..., Run], tmp_path: Path) -> None:
    """Truncated, changed in any byte, foreign, empty: refused with a reason, counted, and never half used."""
    with Publisher() as engine:
        first = started()
        follow(first, engine, 4)
        good = write_some(tmp_path, first)
        data = good.read_bytes()
        first.stop()
        rng = random.Random(5)
        target = tmp_path / f"{10**20 - 1}.kvix"
        damaged = [data[:end] for end in range(0, len(data), 11)]
        damaged += [b"", b"GIF89a" + data, data + b"\0", data[:-1]]
        for _ in range(200):
            changed = bytearray(data)
            changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            damaged.append(bytes(changed))
        for each in damaged:
            target.write_bytes(each)
            with pytest.raises(BadSnapshot):
                File(target)
        second = started()
        eventually(lambda: second.status.trust is Trust.EXACT)
        assert second.keeper.stats.refused == 1 and second.keeper.stats.restored_claims == 4


def test_an_old_snapshot_is_not_loaded(started: Callable[..., Run], tmp_path: Path) -> None:
    """Its engines will hardly have what came since."""
    with Publisher() as engine:
        first = started()
        follow(first, engine, 2)
        path = write_some(tmp_path, first)
        first.stop()
        os.utime(path, (1, 1))
        assert started().fleet.statuses() == []


def test_only_the_newest_are_kept_and_leftovers_go(started: Callable[..., Run], tmp_path: Path) -> None:
    """Retention by number; what an interrupted writer left is taken out at the next start."""
    run = started()
    paths = [write_some(tmp_path, run) for _ in range(4)]
    assert Directory(tmp_path, 2).newest_first() == paths[:1:-1]
    (tmp_path / ".x.part").write_bytes(b"half")
    started()
    assert sorted(tmp_path.iterdir()) == paths[2:]


def test_a_clock_that_was_set_back_loses_no_snapshot(
    started: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new one is the newest, whatever the time; else it would be deleted at once, as the oldest."""
    run = started()
    before = [write_some(tmp_path, run) for _ in range(2)]
    now = time.time_ns()
    monkeypatch.setattr(time, "time_ns", lambda: now - 3600 * 10**9)
    path = run.keeper.write(run.fleet)
    assert path is not None
    assert Directory(tmp_path, 2).newest_first() == [path, before[1]]


def test_a_header_nested_too_deeply_is_refused(tmp_path: Path) -> None:
    """Whoever wrote it knew how to make a checksum."""
    encoded = b"[" * 500_000
    body = struct.pack("<I", len(encoded)) + encoded + struct.pack("<Q", 0)
    path = tmp_path / "a.kvix"
    path.write_bytes(MAGIC + body + struct.pack("<Q", xxh3_64(b"", xxh3_64(encoded))))
    with pytest.raises(BadSnapshot, match="header"):
        File(path)


def test_a_full_disk_is_counted_and_costs_nothing_else(
    started: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The older snapshots stay, no half file remains, and the next try may work."""
    run = started()
    path = write_some(tmp_path, run)

    def full(_file: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        assert run.keeper.write(run.fleet) is None
    assert run.keeper.stats.failed == 1 and list(tmp_path.iterdir()) == [path]
    assert run.keeper.write(run.fleet) is not None


def test_a_writer_that_is_abandoned_leaves_nothing(tmp_path: Path) -> None:
    """Neither under its name nor under another."""
    writer = Writer(tmp_path / "a.kvix")
    writer.pod(PodSpec("pod", "m", "tcp://127.0.0.1:1"))
    writer.abandon()
    assert list(tmp_path.iterdir()) == []
