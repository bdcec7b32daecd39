"""The index of one model in a shared store: the same calls as the native `Index`, answered from pipelined reads."""

import itertools
import logging
import math
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgpack  # type: ignore[import-untyped]

from kvindex_server._core import Index, StoreView, block_keys, split_keys, xxh3_64
from kvindex_server.config import StoreSettings
from kvindex_server.errors import Unavailable
from kvindex_server.store import leases, scripts
from kvindex_server.store.client import Client, StoreAway
from kvindex_server.store.leases import Trusted
from kvindex_server.store.places import Places, Target
from kvindex_server.store.questions import Questions
from kvindex_server.store.writer import StoreStream, packed

_log = logging.getLogger(__name__)

_Bytes = bytes  # `bytes` is a property of the index

TELL_SECONDS = 0.25
"""How often trust is told and heard."""
ROUND = 64
"""Batches sent at once."""
LEAST_LINGER = 0.001
"""Between two turns of the writer, for whoever waits to renew."""
LATE_SECONDS = 1.0
"""A change that has waited for so long to get into the store, lingering aside, makes what is there doubtful."""
GONE_LEASES = 10
"""So many lease times after its lease ended, a stream that nobody took over is taken out of the store."""
SWEEP_BLOCKS = 256
SWEEP_ROUNDS = 8
MAX_DELAY = 1.0
MAX_READS = 4
_FULL = 0
"""A full-attention group, as a stream describes its groups; each takes so many bytes, the kind behind its number:"""
_GROUP_BYTES, _KIND_AT = 9, 4


@dataclass(frozen=True, slots=True)
class Table:
    """The streams as the store describes them, the word for that, and the life of each."""

    word: bytes
    view: StoreView
    lives: dict[tuple[str, int], int]
    full: dict[tuple[str, int], bytes]
    """The numbers of each stream's full-attention groups."""


class StoreIndex:
    """One model's index. Streams added here are decoded here and written to the store; answers are of all replicas'.

    `trust_of` tells how far this replica trusts a stream it follows. `gained` is called when a stream that another
    replica followed is this one's from now on. Without `start`, `flush` and `renew` do its threads' work.
    """

    def __init__(
        self,
        client: Client,
        settings: StoreSettings,
        model: str,
        block_size: int = 0,
        seed: int = 1337,
        max_claims: int = 0,
        max_placements: int = 1 << 20,
        *,
        max_removals: int = 0,
        max_claims_per_stream: int = 0,
        trust_of: Callable[[str, int], Trusted] = lambda _pod, _rank: (3, "", -1.0),
        gained: Callable[[str, int], None] = lambda _pod, _rank: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client = client
        self._settings = settings
        self._own = Index(
            block_size, seed, max_claims, max_removals=max_removals, max_claims_per_stream=max_claims_per_stream
        )
        # The format's version is in it: replicas that write another one never meet these keys.
        space = f"{xxh3_64(model.encode(), seed):016x}.{seed:x}.2"
        self._tags = [f"{settings.prefix}:{{{space}.{at}}}" for at in range(settings.partitions)]
        self._owner = os.urandom(8).hex()
        self._places = Places(client, self._tags, max_placements)
        self._trust_of = trust_of
        self._gained = gained
        self._clock = clock
        self._questions = Questions(client, self._tags[0], self._own, self._owner, self._writing_lives)
        self._lock = threading.Lock()
        self._streams: tuple[StoreStream, ...] = ()
        self._table = Table(b"-", StoreView([]), {}, {})
        self._leases: leases.Leases = {}
        # Of each partition, the era of the last answer; and those in which what was sent was last looked for.
        self._eras = [b""] * settings.partitions
        self._looked: list[bytes] = []
        self._era_changes = 0
        self._writing = threading.Lock()
        self._dirty = threading.Event()
        self._halt = threading.Event()
        self._threads: list[threading.Thread] = []
        self._garbage: Iterator[tuple[str, list[bytes]]] | None = None
        self._may_have_garbage = False
        self._told: dict[str, tuple[int, str]] = {}
        self._try_lease_at: dict[str, float] = {}
        self._stuck: set[str] = set()
        self._send_again_at = 0.0
        self._send_again_delay = 1.0
        self._heard_at: float | None = None
        self.counts: Counter[str] = Counter()
        """What happened, by kind; see the metric kvindex_store_events_total."""

    # --- as of a native index ---

    @property
    def block_size(self) -> int:
        """0 while nobody has told it."""
        return self._own.block_size

    @property
    def seed(self) -> int:
        return self._own.seed

    @property
    def blocks(self) -> int:
        """Distinct keys held by the streams that this replica writes."""
        return self._own.blocks

    @property
    def claims(self) -> int:
        """Of the streams that this replica writes."""
        return self._own.claims

    @property
    def bytes(self) -> int:
        """Memory in this process."""
        return self._own.bytes

    @property
    def tiers(self) -> list[str]:
        return self._own.tiers

    @property
    def placements(self) -> dict[str, int]:
        """See `Places.counts`: fewer than those of a native index."""
        return self._places.counts

    def learn_block_size(self, size: int) -> int:
        return self._own.learn_block_size(size)

    @property
    def is_block_size_open(self) -> bool:
        """Never: see `set_block_size`."""
        return False

    def set_block_size(self, size: int) -> int:
        """Other replicas may have learned the size already, so it is never changed here."""
        return self._own.learn_block_size(size)

    def sweep_placements(self) -> None:
        """The store forgets them by itself."""

    def place(self, pod: str, rank: int, keys: _Bytes, seconds: float) -> tuple[str, int, int]:
        """As of the native index; every replica counts it from now on. StoreAway, StoreFull; Unavailable when no
        replica has told the store of the pod yet."""
        for _ in range(MAX_READS):
            view, readings = self._read(keys if rank < 0 else b"", prefix=False)
            table = self._table
            ranks = sorted(of for name, of in table.lives if name == pod)
            if not ranks:
                if any(each.pod == pod and not each.closed for each in self._streams):
                    raise Unavailable("no replica follows this pod yet")
                return "no_pod", 0, 0
            at = rank
            if rank < 0:
                found = view.score(keys, readings, self.block_size, [pod], [1.0])
                at = found[0][1] if found else ranks[0]
            if at not in ranks:
                return "no_rank", 0, 0
            life, full = packed(table.lives[pod, at]), table.full[pod, at]
            outcome, held = self._places.record(Target(life, full, rank < 0 and len(ranks) > 1), keys, seconds)
            if outcome != "over":
                return outcome, at, held
        raise StoreAway("the shared store changes too fast to be written")

    def removals(self, pod: str, keys: _Bytes) -> list[Any]:
        """As of a native index, of the streams that this replica follows; the store keeps nothing of them."""
        return self._own.removals(pod, keys)

    def add_stream(self, pod: str, rank: int) -> StoreStream:
        """A stream that this replica would write, once it has the lease."""
        stream = StoreStream(
            self._own,
            pod,
            rank,
            batch_blocks=self._settings.batch_blocks,
            max_changes=self._settings.max_changes,
            dirty=self._dirty.set,
            gained=self._gained,
            clock=self._clock,
        )
        with self._lock:
            self._streams = (*self._streams, stream)
        self._dirty.set()
        return stream

    def score(
        self, keys: _Bytes, pods: Sequence[str], weights: Sequence[float]
    ) -> list[tuple[str, int, int, float, list[int], int]]:
        """As of the native index, as the store has it now. StoreAway."""
        view, readings = self._read(keys, prefix=True)
        return view.score(keys, readings, self.block_size, pods, weights)

    def score_tokens(
        self,
        tokens: _Bytes,
        pods: Sequence[str],
        weights: Sequence[float],
        lora_name: str = "",
        cache_salt: str = "",
        mm_features: Sequence[tuple[str, int, int]] = (),
    ) -> list[tuple[str, int, int, float, list[int], int]]:
        """The same from token ids."""
        if not self.block_size:
            return []
        keys = block_keys(tokens, self.block_size, self.seed, lora_name, cache_salt, mm_features)
        return self.score(keys, pods, weights)

    def holders(self, keys: _Bytes, pods: Sequence[str]) -> list[list[tuple[str, int, int, int, bool]]]:
        """As of the native index. StoreAway."""
        view, readings = self._read(keys, prefix=False)
        return view.holders(keys, readings, pods)

    def holders_of_ints(
        self, hashes: _Bytes, pods: Sequence[str]
    ) -> list[tuple[int, list[tuple[str, int, int, int, bool]]]]:
        """As of the native index, by asking every replica. StoreAway, also when one does not answer."""
        return self._questions.ask(hashes, pods, self._counting)

    def holders_of_bytes(
        self, hashes: Sequence[_Bytes], pods: Sequence[str]
    ) -> list[tuple[int, list[tuple[str, int, int, int, bool]]]]:
        """The same by byte strings."""
        return self._questions.ask(list(hashes), pods, self._counting)

    def _counting(self) -> dict[tuple[str, int], int]:
        self._read(b"", prefix=True)
        return self._table.lives

    def _writing_lives(self) -> dict[tuple[str, int], int]:
        return {(each.pod, each.rank): each.life for each in self._streams if each.life and not each.closed}

    # --- reading ---

    def _read(self, keys: _Bytes, *, prefix: bool, everywhere: bool = False) -> tuple[StoreView, list[_Bytes]]:
        """What the partitions of these keys say, or all of them: how it is laid out, and a reading of each."""
        split = split_keys(keys, len(self._tags))
        asked = [at for at, of_partition in enumerate(split) if at == 0 or of_partition or everywhere]
        for _ in range(MAX_READS):
            word, view = self._table.word, self._table.view
            stop = prefix and view.prefix_only
            calls = [(self._tags[at], (word if at == 0 else b"-", split[at], int(stop))) for at in asked]
            if word == b"-":  # never read: any word is new
                calls[0] = (self._tags[0], (b"none", split[0], 0))
            changes = self._era_changes
            answers = self._client.run_all(scripts.READ, calls)
            self.counts["reads"] += 1
            for answer in answers:
                if isinstance(answer, Exception):
                    self.counts["failed_reads"] += 1
                    raise answer
            if not self._see(asked, answers, changes):
                continue
            new_word, streams, _, _ = answers[0]
            if streams is not None:
                view = self._install(new_word, streams)
                if stop and len(calls) > 1:
                    continue  # the other partitions may have ended too early
            readings = [b""] * len(split)
            for at, answer in zip(asked, answers, strict=True):
                readings[at] = answer[2]
            return view, readings
        raise StoreAway("the shared store changes too fast to be read")

    def _see(self, asked: Sequence[int], answers: Sequence[Sequence[_Bytes]], changes: int) -> bool:
        """Before anybody judges what was read by what was told in another era; `changes` were known when it was asked.

        False when it has to be asked again: another thread has heard of a change, which may be later than the answer.
        """
        eras = {at: era for at, (*_, era) in zip(asked, answers, strict=True)}
        with self._lock:
            changed = [at for at, era in eras.items() if self._eras[at] != era]
            if not changed:
                return True
            if changes != self._era_changes:
                return False
            self._era_changes += 1
            for at in changed:
                if self._eras[at]:
                    self.counts["eras"] += 1
                    _log.warning("shared store has another primary, or was restarted")
                self._eras[at] = eras[at]
            return True

    def _install(self, word: _Bytes, streams: Sequence[_Bytes]) -> StoreView:
        described = []
        lives, full = {}, {}
        for each in streams:
            pod, rank, life, block_size, tiers, groups = msgpack.unpackb(each)
            if block_size and self._own.learn_block_size(block_size) != block_size:
                self.counts["other_block_size"] += 1  # its blocks are others than those asked for
                continue
            lives[pod, rank] = life
            kinds = groups[_KIND_AT::_GROUP_BYTES]
            full[pod, rank] = bytes(number for number, kind in enumerate(kinds) if kind == _FULL)
            described.append((pod, rank, life, groups, [self._own.tier_of(tier) for tier in tiers]))
        view = StoreView(described)
        self._table = Table(word, view, lives, full)
        return view

    # --- writing ---

    def flush(self, most_seconds: float = math.inf) -> bool:
        """Send what has changed, for so long; True when the store has all of it now. StoreAway."""
        with self._writing:
            now = self._clock()
            failure = self._open_and_close(now)
            again = now >= self._send_again_at
            writing = [each for each in self._streams if each.life]
            for stream in writing:
                if stream.full and again:
                    stream.take(now, anew=True)
                if stream.life:
                    stream.take(now)
                if not stream.life and failure is None:  # its engine began a new life
                    failure = self._open_and_close(now, [stream])
                    if stream.life:
                        stream.take(now)
            refused = self._send(writing, now + most_seconds)
            if refused:
                self._send_again_delay = min(self._send_again_delay * 2, 60.0)
                self._send_again_at = self._clock() + self._send_again_delay
            elif again:
                self._send_again_delay = 1.0
            if failure is not None:
                raise failure
            done = all(each.idle or each.standby for each in self._streams)
            if not done:  # it took long, or the store has lost something: a new life begins in the next turn, at once
                self._dirty.set()
            return done

    def _open_and_close(self, now: float, streams: Sequence[StoreStream] | None = None) -> StoreAway | None:
        """Streams that came and went, until the store does not answer: what is written already goes on all the same.

        Those at which that was come last next time: it may be their own partition that does not answer.
        """
        waiting = [each for each in (streams or self._streams) if each.closed or not each.life]
        for stream in sorted(waiting, key=lambda each: each.name in self._stuck):
            try:
                if stream.closed:
                    self._end(stream)
                else:
                    self._begin(stream, now)
            except StoreAway as error:
                if stream.name in self._stuck:  # all others had their turn
                    self._stuck.clear()
                self._stuck.add(stream.name)
                return error
            self._stuck.discard(stream.name)
        return None

    def _begin(self, stream: StoreStream, now: float) -> None:
        if now < self._try_lease_at.get(stream.name, 0.0):
            return
        wait = stream.begin(self._client, self._tags, self._owner, self._lease_ms)
        if wait:
            self._try_lease_at[stream.name] = now + min(wait, self._settings.lease_seconds) + 0.01
            return
        self.counts["lives"] += 1
        self._told.pop(stream.name, None)
        self._may_have_garbage = True

    def _end(self, stream: StoreStream) -> None:
        stream.end(self._client, self._tags)
        with self._lock:
            self._streams = tuple(each for each in self._streams if each is not stream)
        self._try_lease_at.pop(stream.name, None)
        self._told.pop(stream.name, None)
        self._may_have_garbage = True

    def _send(self, streams: Sequence[StoreStream], until: float) -> int:
        refused = 0
        # What was left over by the turn before goes first.
        streams = sorted(streams, key=lambda each: each.late_since)
        while True:
            sent = [(each, at, call) for each in streams for at, call in each.next_batches(self._tags)][:ROUND]
            if not sent:
                return refused
            answers = self._client.run_all(scripts.APPLY, [call for _, _, call in sent])
            failure: StoreAway | None = None
            for (stream, at, call), answer in zip(sent, answers, strict=True):
                try:
                    self._places.count(confirmed=stream.confirmed(answer))
                    full = stream.settle(at, call, answer, self._client)
                    refused += full
                    self.counts["full" if full else "batches"] += 1
                except StoreAway as error:
                    failure = error
            if failure is not None:
                raise failure
            if self._clock() >= until:
                return refused

    def renew(self, *, everything: bool = True) -> None:
        """Keep the leases, tell how far streams are trusted, and hear the same of the other replicas'. StoreAway.

        Without `everything`, only the trust that has changed is told.
        """
        with self._writing:
            trusted = {each: self._trusted_here(each) for each in self._streams if each.life and not each.closed}
            streams = [each for each, now in trusted.items() if everything or self._told.get(each.name) != now[:2]]
            eras = [b"-"] * len(self._tags)
            for at, tag in reversed(list(enumerate(self._tags))):  # the first one is told what the others said
                told: list[_Bytes | str | int] = []
                for stream in streams:
                    # A batch on its way has a number that the store may or may not have seen.
                    number = stream.numbers[at] if stream.idle else ""
                    if at == 0 and stream.idle:
                        stream.looked = tuple(eras[1:])
                    trust = msgpack.packb([*trusted[stream], stream.life, *stream.looked])
                    told += [stream.name, stream.life, number, trust]
                if not told:
                    break
                lease = self._lease_ms if at == 0 else ""
                eras[at], *said = self._client.run(scripts.RENEW, tag, self._owner, lease, *told)
                for stream, answer in zip(streams, said, strict=True):
                    if answer != b"OK":
                        stream.life = 0
                        self._dirty.set()
            if everything:
                self._looked = eras
            self._told |= {stream.name: trusted[stream][:2] for stream in streams if stream.life}
        self._read(b"", prefix=True, everywhere=True)
        now = self._clock()
        time_ms, told_leases, asked = self._client.run(scripts.LEASES, self._tags[0])
        self._leases = leases.heard(time_ms, told_leases, now)
        self._heard_at = now
        self.counts["answers"] += self._questions.answer(asked)

    def _trusted_here(self, stream: StoreStream) -> Trusted:
        if stream.blind:
            return 1, "its replica has just taken over", -1.0
        if self._clock() - stream.late_since > LATE_SECONDS + self._settings.linger_seconds:
            return 4, "its changes wait for the shared store", -1.0
        if stream.behind:
            return 2, "being sent to the shared store", -1.0
        trust, reason, age = self._trust_of(stream.pod, stream.rank)
        return (2, "the shared store is full", age) if stream.full and trust in (2, 3) else (trust, reason, age)

    def standing(self, pod: str, rank: int | None = None) -> Trusted:
        """How far answers about a stream can be believed, whichever replica follows it; STALE when the store is away.

        Without a rank, of the pod's least trusted one.
        """
        now = self._clock()
        if self._heard_at is None or now - self._heard_at > self._settings.lease_seconds / 2:
            return 4, "the shared store does not answer", -1.0
        return leases.standing(self._leases, self._table.lives, self._eras, pod, rank, now)

    @property
    def reachable(self) -> bool:
        """The store has answered of late."""
        return self._heard_at is not None and self._clock() - self._heard_at <= self._settings.lease_seconds / 2

    @property
    def _lease_ms(self) -> int:
        return int(self._settings.lease_seconds * 1000)

    # --- dead holders ---

    def bury(self) -> int:
        """Take streams out of the store whose replica and pod are gone, so that nobody ever will; how many. StoreAway.

        The first partition comes last: until then another replica finds the stream there, and begins a new life.
        """
        grace = GONE_LEASES * self._settings.lease_seconds
        if all(lease.ends + grace > self._clock() for lease in self._leases.values()):
            return 0
        gone = self._client.run(scripts.GONE, self._tags[0], int(grace * 1000))
        for name, life in zip(gone[::2], gone[1::2], strict=True):
            for tag in reversed(self._tags):
                self._client.run(scripts.CLOSE, tag, name, life, packed(int(life)))
            _log.warning("stream taken out of the shared store", extra={"fields": {"stream": name.decode()}})
        self._may_have_garbage = self._may_have_garbage or bool(gone)
        return len(gone) // 2

    def sweep(self) -> int:
        """Take some dead holders out, whatever epoch they died in; returns how many. StoreAway."""
        if self._garbage is None:
            if not self._may_have_garbage:
                return 0
            self._may_have_garbage = False
            self._garbage = self._blocks()
        dead = 0
        for _ in range(SWEEP_ROUNDS):
            tag, keys = next(self._garbage, ("", []))
            if not keys:
                self._garbage = None
                break
            dead += self._client.run(scripts.SWEEP, tag, *keys)
        self.counts["swept"] += dead
        return dead

    def _blocks(self) -> Iterator[tuple[str, list[_Bytes]]]:
        for tag in self._tags:
            keys = self._client.blocks(tag)
            while batch := list(itertools.islice(keys, SWEEP_BLOCKS)):
                yield tag, batch

    # --- threads ---

    def start(self) -> None:
        """Write and renew in the background."""
        for name, work in (("store-write", self._write), ("store-lease", self._keep)):
            self._threads.append(threading.Thread(target=work, name=name, daemon=True))
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Stop; what was not sent yet is sent, if the store answers, as long as the leases hold."""
        self._halt.set()
        self._dirty.set()
        for thread in self._threads:
            thread.join(10)
        try:
            self.flush(self._settings.lease_seconds)
        except StoreAway:
            _log.warning("shared store is away at the end")

    def _write(self) -> None:
        delay = 0.05
        while not self._halt.is_set():
            self._dirty.wait(self._settings.lease_seconds / 4)
            self._halt.wait(max(self._settings.linger_seconds, LEAST_LINGER))
            self._dirty.clear()
            try:
                self.flush(TELL_SECONDS)  # so that leases are renewed and trust is told between the turns
                delay = 0.05
                continue
            except StoreAway as error:
                self._failed("not written", error)
            except Exception:  # noqa: BLE001 - the next turn may work; it is logged and counted
                _log.exception("shared store not written")
                self.counts["failed_writes"] += 1
            self._dirty.set()
            self._halt.wait(delay)
            delay = min(delay * 2, MAX_DELAY)

    def _keep(self) -> None:
        renew_at = self._clock()
        while not self._halt.is_set():
            try:
                due = self._clock() >= renew_at or self._looked != self._eras
                self.renew(everything=due)
                if due:
                    renew_at = self._clock() + self._settings.lease_seconds / 4
                self.bury()
                self.sweep()
            except StoreAway as error:
                self._garbage = None
                self._may_have_garbage = True
                self._failed("not renewed", error)
            except Exception:  # noqa: BLE001 - the next turn may work; it is logged and counted
                _log.exception("leases not renewed")
                self.counts["failed_writes"] += 1
            self._halt.wait(TELL_SECONDS)

    def _failed(self, what: str, error: StoreAway) -> None:
        self.counts["failed_writes"] += 1
        _log.warning("shared store %s", what, extra={"fields": {"reason": error.message}})
