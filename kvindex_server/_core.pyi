"""Native core: hashing, event decoding and the sharded block index. All calls release the GIL."""

import enum
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, overload

_Bytes: TypeAlias = bytes  # `bytes` is a property of Index

def xxh3_64(data: bytes, seed: int = 0) -> int: ...
def block_keys(
    tokens: bytes,  # u32 little-endian, 4 bytes a token
    block_size: int,
    seed: int = 1337,
    lora_name: str = "",
    cache_salt: str = "",
    mm_features: Sequence[tuple[str, int, int]] = (),  # (hash, offset, length) in tokens
) -> bytes: ...  # u64 little-endian, 8 bytes a full block
def scan_packed(message: bytes, outer_field: int, inner_field: int, width: int) -> bytes | None:
    """Values of `message.outer.inner` straight from the encoded request.

    width 4: packed (or unpacked) varint uint32 -> u32 LE bytes, ValueError for one above u32;
    width 8: packed or unpacked fixed64 -> u64 LE bytes. None when the outer field is absent.
    """

def scan_tags(message: bytes, outer_field: int = 0) -> list[int]:
    """Distinct tags (field << 3 | wire type) of the message, or of all its submessages `outer_field`.

    ValueError when it is malformed, holds a group, or has more than 256 different ones.
    """

class Index:
    """The blocks of one model. `block_size` 0 means learn it from the first event."""

    def __init__(
        self,
        block_size: int = 0,
        seed: int = 1337,
        max_claims: int = 0,
        max_placements: int = 1048576,
        max_bytes: int = 0,
        max_removals: int = 8192,  # remembered of each stream, rounded up to a power of two; 0 = none
        max_claims_per_stream: int = 0,
    ) -> None: ...  # max_claims, max_bytes and max_claims_per_stream: 0 means no limit
    @property
    def block_size(self) -> int: ...
    @property
    def seed(self) -> int: ...
    @property
    def blocks(self) -> int: ...  # distinct keys
    @property
    def claims(self) -> int: ...  # live (stream, group, tier, engine hash)
    @property
    def bytes(self) -> int: ...
    @property
    def tiers(self) -> list[str]: ...  # by bit: gpu, cpu, disk, then as engines named them
    @property
    def is_block_size_open(self) -> bool: ...  # none was given, and nothing is claimed
    def learn_block_size(self, size: int) -> int: ...  # the size in force: `size` only if none was known
    def set_block_size(self, size: int) -> int: ...  # likewise; while nothing is claimed, `size` if none was given
    def tier_of(self, name: str) -> int: ...  # its bit, given one if there is room; else 8
    def add_stream(self, pod: str, rank: int) -> Stream: ...
    def place(self, pod: str, rank: int, keys: _Bytes, seconds: float) -> tuple[str, int, int]:
        """A router has sent these keys (u64 LE) to this pod; they count as held for at most `seconds`.

        rank -1: not known, the one that matches best is guessed. Returns (outcome, rank, blocks it holds already);
        the outcome is "recorded", or "no_pod", "no_rank", "no_room" when nothing was.
        """

    def sweep_placements(self) -> None: ...  # gives back the memory of expired ones; answers leave them out anyway
    @property
    def placements(self) -> dict[str, int]:
        """In blocks: recorded = confirmed + expired + fenced + blocks; renewed and refused ones are beside that."""

    def advance_clock(self, seconds: float) -> None: ...  # of placements, for tests
    def score(
        self,
        keys: _Bytes,  # u64 LE
        pods: Sequence[str],  # candidates; empty = every pod of the index
        weights: Sequence[float],  # by tier bit, as `tiers`; missing ones weigh as the lowest given
    ) -> list[tuple[str, int, int, float, list[int], int]]:
        """(pod, rank, matched blocks, score, blocks per tier bit, speculative blocks) of each pod with any, unordered.

        The match is what engines have announced; the score is that of both kinds of blocks together.
        """

    def score_tokens(
        self,
        tokens: _Bytes,
        pods: Sequence[str],
        weights: Sequence[float],
        lora_name: str = "",
        cache_salt: str = "",
        mm_features: Sequence[tuple[str, int, int]] = (),
    ) -> list[tuple[str, int, int, float, list[int], int]]:
        """The same from token ids: hashing stops where the last match ends."""

    def holders(self, keys: _Bytes, pods: Sequence[str]) -> list[list[tuple[str, int, int, int, bool]]]:
        """Per key: (pod, rank, tier bit, group, speculative), ordered by (pod, rank, group, tier, speculative)."""

    def holders_of_ints(
        self, hashes: _Bytes, pods: Sequence[str]
    ) -> list[tuple[int | None, list[tuple[str, int, int, int, bool]]]]:
        """Per engine hash (u64 LE): (key, holders), of these pods alone. 0: not known; None: their streams differ."""

    def holders_of_bytes(
        self, hashes: Sequence[_Bytes], pods: Sequence[str]
    ) -> list[tuple[int | None, list[tuple[str, int, int, int, bool]]]]: ...
    def removals(
        self, pod: str, keys: _Bytes
    ) -> list[
        tuple[
            int,
            str,
            int | None,
            float,
            tuple[int | None, float] | None,
            int,
            list[list[tuple[int, int, Left, int | None, float, bool]]],
        ]
    ]:
        """What each rank of a pod remembers of blocks that left it.

        (rank, reach, sequence, time, cleared, unnamed, found). `reach` says from where on every block that left is
        remembered: "off" none is, "nothing" no message came yet, "start" from the life's first message, "restored" from
        the first after a saved state, "full" from behind a message, as older ones gave way; sequence and time are that
        message's. `cleared`: (sequence, time) of the life's last AllBlocksCleared. `unnamed`: blocks of this life that
        left before anyone had told their tokens. `found`: per key, latest first, how it left each (group, tier):
        (group, tier bit, how, sequence, time, earlier), `earlier` in a life before. Sequences are None and times 0 when
        not told; times are seconds since 1970 of the engine's clock for REMOVED and CLEARED, else of this host's.
        """

class Left(enum.Enum):
    """How a block left: by the engine's event, or dropped here."""

    REMOVED = 0
    CLEARED = 1
    RESTARTED = 2  # the engine was found to be another one
    REQUESTED = 3
    REBUILT = 4  # to be built anew from a replay or a sibling
    DOUBTED = 5  # after a hole; the engine may hold it still

class Applied:
    """What one `Stream.apply` did; counters of this call only."""

    @property
    def messages(self) -> int: ...  # payloads with a readable batch
    @property
    def events(self) -> int: ...  # events applied
    @property
    def blocks_stored(self) -> int: ...
    @property
    def blocks_removed(self) -> int: ...
    @property
    def clears(self) -> int: ...
    @property
    def timestamp(self) -> float: ...  # engine's time of the last batch, seconds; 0 when none
    @property
    def reasons(self) -> dict[str, int]: ...  # what was dropped or odd, by reason (names below)

class Outcome(enum.Enum):
    """What a message's sequence number means after those applied before it."""

    FIRST = 0
    NEXT = 1
    DUPLICATE = 2
    GAP = 3
    RESTART = 4

class Order:
    """The order of one event stream: pure, without sockets or a clock. One thread at a time, but for `last`."""

    REMEMBERED: int  # digests kept of the last applied messages
    def __init__(self) -> None: ...
    @property
    def last(self) -> int | None: ...  # the last applied sequence
    @property
    def last_digest(self) -> int: ...  # 0 before any
    def judge(self, sequence: int, digest: int) -> Outcome: ...  # digest: a hash of the payload
    def remembers(self, sequence: int) -> bool: ...  # the digest of this applied message is still kept
    def applied(self, sequence: int, digest: int) -> None: ...
    def restarted(self) -> None: ...  # forget the old life

class ZeroMq:
    """The libzmq that pyzmq has loaded; RuntimeError when it cannot be found."""

    def __init__(self) -> None: ...

class MessageSource:
    """Where a stream's thread takes published messages from; belongs to that thread."""

class SocketSource(MessageSource):
    """A socket of libzmq, by its address; to be dropped before the socket is closed."""

    def __init__(self, zmq: ZeroMq, socket: int) -> None: ...

class Listener:
    """An endpoint that many engines dial into: the topic of its first message tells for whom a connection is.

    `host` is an IP address. OSError when it cannot be bound. Closed when nobody refers to it any more.
    """

    def __init__(self, host: str, port: int, max_frame: int) -> None: ...
    def unclaimed(self) -> list[tuple[bytes, str]]:
        """(topic, IP address it came from) of connections that nobody takes; they wait for a subscription that does."""
    def taken(self) -> list[tuple[bytes, str]]:
        """The same of each subscription's latest connection, whether it is still there or not."""

class Subscription(MessageSource):
    """A subscription to one engine, over a TCP connection that is made again whenever it is lost.

    With a `listener`, to the engine that dials in and publishes with such a topic, or with this very one when it
    `is_whole`: ValueError when an engine there could be another subscription's too. One that dials in later stands for
    the one before.

    `host` is an address: ValueError when it is not. OSError when the process has no descriptor left. `topic` is a
    prefix. A frame above `max_frame` bytes ends the connection. A peer that is asked for a sign of life each
    `heartbeat_ms` and gives none for `heartbeat_timeout_ms` is lost.
    """

    @overload
    def __init__(
        self, host: str, port: int, topic: bytes, max_frame: int, heartbeat_ms: int, heartbeat_timeout_ms: int
    ) -> None: ...
    @overload
    def __init__(
        self, listener: Listener, topic: bytes, is_whole: bool, heartbeat_ms: int, heartbeat_timeout_ms: int
    ) -> None: ...
    def fileno(self) -> int: ...  # readable when `receive` has something to do; the same for as long as it is open
    @property
    def is_pending(self) -> bool: ...  # there is news or perhaps a message already: do not wait
    def receive(self) -> list[bytes] | None:
        """The next message's frames if one is there. None also while there is news; connects when it is time to."""

    def changes(self) -> list[str]:
        """MADE, LOST and ENDED of the connection since the last call; what is received from now on comes after it."""

    def close(self) -> None: ...

class Drained:
    """What one `Stream.drain` did."""

    @property
    def applied(self) -> Applied: ...
    @property
    def messages(self) -> int: ...  # applied by this call
    @property
    def first(self) -> int: ...  # sequence of the first of them
    @property
    def empty(self) -> bool: ...  # the source had no more
    @property
    def others(self) -> bool: ...  # another socket has a message, or the source has news
    @property
    def lags(self) -> list[float]: ...  # age of the last message, seconds, each time the source had no more
    @property
    def withheld(self) -> tuple[int, int] | None: ...  # (sequence, digest) of a last message the order is not told of
    @property
    def marks(self) -> list[tuple[int, int, int, int]]: ...  # (sequence, digest, held, claims), see marks.py
    @property
    def odd(self) -> list[bytes]: ...  # frames of a message that was received but not applied; [] when there is none

class Stream:
    """One (pod, rank). Calls to one stream come from one thread at a time; readers are free."""

    def apply(self, payloads: Sequence[bytes], first_sequence: int | None = None) -> Applied:
        """In sequence; the number of the first one only matters to what is told of removals."""

    def snapshot(self) -> bytes: ...  # the whole state
    def restore(self, snapshot: bytes) -> bool: ...  # into an unused stream; False when it does not fit
    def drain(
        self,
        source: MessageSource,
        order: Order,
        limit: int,
        max_payload: int,
        mark_every: int,
        zmq: ZeroMq,
        sockets: Sequence[int],
        descriptors: Sequence[int],
        idle_ms: int,
        further_ms: int,
    ) -> Drained:
        """Apply [topic, sequence, payload] messages of a source while each is the next one.

        Waits `idle_ms` for a first one and, from then on, `further_ms` for further ones, until one of the other
        sockets has a message. Ends at once when something was dropped or all was cleared.
        """

    def clear(self, left: Left = Left.REQUESTED) -> int:
        """Drop all claims (a fence); returns how many. All but Left.DOUBTED begin another life of the stream."""

    def touch(self) -> None: ...  # what is known of the stream beside its claims has changed
    def close(self) -> int: ...  # the same, and the stream is gone from answers
    def follow_changes(self, limit: int) -> None:
        """From now on note what comes to be held and no longer is, beginning with all that is held already.

        More than `limit` changes that nobody took are lost, which `take_changes` says.
        """

    def take_changes(self, partitions: int) -> tuple[bool, bool, list[bytes], bytes]:
        """(all that was held before was dropped, changes were lost, rows per partition, groups) since the last call.

        A row is 11 bytes: key u64 LE, group u8, tiers held u8, tiers no longer held u8, a bit each. A key and group
        have one row, and rows are in order of keys. Groups are 9 bytes each: index u32, kind u8, window u32.
        """

    @property
    def claims(self) -> int: ...
    @property
    def digest(self) -> int: ...  # of the (key, group, tier) held, in whatever order they came
    @property
    def claims_by_tier(self) -> list[int]: ...
    @property
    def orphans(self) -> int: ...  # blocks waiting for their parent
    @property
    def unresolved(self) -> int: ...  # claims whose key is not known
    @property
    def dialect(
        self,
    ) -> tuple[int, list[str], int, int, str, tuple[int | bytes, list[int]] | None, list[str], tuple[int, int]]:
        """How the engine writes its events, seen in a sample of its messages.

        (messages looked at, names of what was seen at least once, shortest and longest BlockStored array or 0, first
        unknown tag, a plain block at token 0 as (engine hash, tokens), the first 64 adapters named in any
        message, (stored beginnings of prompts, those of them with a salt) in all messages).
        """

    @property
    def closed(self) -> bool: ...

class TextEncoder:
    """A byte-level BPE tokenizer; the plan comes from tokenize/plan.py. ValueError for a malformed one."""

    def __init__(self, plan: dict[str, Any]) -> None: ...
    def encode(self, text: str) -> bytes | None:
        """Ids as u32 LE without the tokens a post-processor adds; None when the normalizer may change the text."""

    def next_cut(self, text: str, start: int) -> int: ...  # byte offsets; the text's size when there is none
    @property
    def refuted(self) -> bool: ...  # found to differ from the reference in service

class TextMarkers:
    """Cuts before these strings, which are what tokenize/markers.py allows."""

    def __init__(self, contents: Sequence[str]) -> None: ...
    def next_cut(self, text: str, start: int) -> int: ...  # as TextEncoder's

class TextCache:
    """What was tokenized before, bounded in bytes, shared by all tokenizers and threads."""

    def __init__(self, max_bytes: int, verify_every: int = 0, chunk_bytes: int = 4096) -> None: ...
    def stats(self) -> dict[str, int]: ...

class Text:
    """One tokenizer before the cache. Texts of different roots share nothing; roots are below 2**32.

    `reference(text, seconds_left)` gives ids as u32 LE; it may raise. Answers are (bytes, tokens), or
    "too_many_tokens", "too_late", or "too_long" for what the reference may be given of one text.
    """

    def __init__(
        self,
        cache: TextCache,
        encoder: TextEncoder | None,  # None: encoded by the reference
        root: int,
        prefix: Sequence[int],
        suffix: Sequence[int],
        reference: Callable[[str, float], bytes],
        max_reference_bytes: int = ...,  # of one text
        markers: TextMarkers | None = None,  # without an encoder: where a text may be cut; None: it is one piece
    ) -> None: ...
    def ids(self, text: str, max_tokens: int, seconds: float) -> tuple[bytes, int] | str: ...
    def keys(
        self,
        text: str | ScoreRequest,
        block_size: int,
        seed: int,
        lora_name: str,
        cache_salt: str,
        max_tokens: int,
        seconds: float,
    ) -> tuple[bytes, int] | str: ...

class RequestLimits:
    """Bounds that `read_score_request` keeps to."""

    def __init__(self, max_tokens: int, max_pods: int, max_keys: int, max_prompt_bytes: int) -> None: ...

class ScoreRequest:
    """A read ScoreRequest."""

    @property
    def model(self) -> str: ...
    @property
    def names_pods(self) -> bool: ...
    @property
    def is_prompt(self) -> bool: ...
    @property
    def is_chat(self) -> bool: ...
    @property
    def text(self) -> str: ...  # of a prompt or chat
    @property
    def media_fit(self) -> bool: ...  # every media item lies within the tokens, and there is not too much of them
    @property
    def lora_name(self) -> str: ...
    @property
    def cache_salt(self) -> str: ...
    @property
    def has_media(self) -> bool: ...
    def set_keys(
        self, keys: _Bytes, tokens: int
    ) -> None: ...  # of a prompt or chat: u64 LE, and how many tokens it has

def read_score_request(encoded: bytes, limits: RequestLimits) -> ScoreRequest | None:
    """None when it is malformed, beyond a limit or unusual: codec.decode_score then says what it is."""

def read_pod_scores_request(encoded: bytes, limits: RequestLimits) -> ScoreRequest | None:
    """The same of an indexer.v1 GetPodScoresRequest; Scorer.answer then gives an encoded GetPodScoresResponse."""

class BlocksRequest:
    """A read GetPodsForBlocksRequest that names its blocks by keys or engine hashes."""

    @property
    def model(self) -> str: ...
    def answer(self, index: Index) -> _Bytes:
        """An encoded GetPodsForBlocksResponse."""

def read_blocks_request(encoded: bytes, limits: RequestLimits) -> BlocksRequest | None:
    """None when it is of another kind, malformed, beyond a limit or unusual: see codec.decode_blocks."""

def answer_plain(
    encoded: bytes,
    limits: RequestLimits,
    routes: Mapping[
        str,  # the name a request may give
        tuple[
            Scorer,
            str,  # lora, where the request names none
            Callable[[], Sequence[str]],  # distinct candidates when the request names none
            Callable[[list[tuple[str, int]]], None],  # see Scorer.answer
            Callable[[str], None],
            Callable[[int, int, float], None] | None,
        ],
    ],
) -> _Bytes | None:
    """An encoded ScoreResponse; None when the request is not plainly good, has text, or asks for an unknown name."""

class Counter:
    """Counts; safe from many threads."""

    def add(self, amount: int) -> None: ...
    @property
    def total(self) -> int: ...

class Histogram:
    """Counts values by size; safe from many threads."""

    def __init__(self, bounds: Sequence[float]) -> None: ...  # rising upper bounds without infinity
    def observe(self, value: float) -> None: ...
    @property
    def counts(self) -> list[int]: ...  # of each bucket alone; the last is of those above all bounds
    @property
    def sum(self) -> float: ...

class LookupTallies:
    """What is counted of one model's lookups."""

    def __init__(
        self,
        looked_up: Counter,
        matched: Counter,
        best: Histogram,
        ratio: Histogram,
        match_time: Histogram,  # seconds
        all_time: Histogram,
    ) -> None: ...
    def looked(self, blocks: int, best_match: int) -> None: ...

class Scorer:
    """Answers read requests over one index; safe from many threads."""

    def __init__(self, index: Index, weights: Mapping[str, float], tallies: LookupTallies) -> None: ...
    def answer(
        self,
        request: ScoreRequest,
        lora: str,  # where the request names none
        known: Sequence[str],  # distinct candidates when the request names none
        refresh: Callable[[list[tuple[str, int]]], None],  # called with each (pod, rank) that is to be told anew
        unknown_tier: Callable[[str], None],  # called with each tier in the answer that has no weight
        heard: Callable[[int, int, float], None] | None,  # called with blocks, best match and seconds of matching
        started_ns: int,  # time.perf_counter_ns
    ) -> _Bytes:
        """An encoded ScoreResponse; the lookup is counted."""

    def tell(self, pod: str, rank: int, trust: int, reason: str, age_seconds: float, asked_at: int) -> None:
        """How far a stream can be believed, as it was at `asked_at` (time.monotonic_ns)."""

def split_keys(keys: _Bytes, partitions: int) -> list[_Bytes]:
    """The keys (u64 LE) of each partition, in their order."""

class StoreView:
    """Answers over holders read from a shared store, by the same walk as `Index`; safe from many threads.

    A reading is what one partition said of its keys (`split_keys`), in their order: per key a count u16, then so many
    holders of life u48, group u8 (its number in the stream), tiers u8 (a bit each, as the writer numbers them; without
    any it is a placement), all little-endian. It may end early. Holders of a life that no stream has count for nothing.
    ValueError when malformed.
    """

    def __init__(self, streams: Sequence[tuple[str, int, int, bytes, Sequence[int]]]) -> None:
        """`streams`: (pod, rank, life, groups as of `take_changes`, own bit of each of the writer's tiers)."""

    @property
    def prefix_only(self) -> bool: ...  # a block without any holder ends every match
    def score(
        self, keys: bytes, readings: Sequence[bytes], block_size: int, pods: Sequence[str], weights: Sequence[float]
    ) -> list[tuple[str, int, int, float, list[int], int]]: ...  # as `Index.score`
    def holders(
        self, keys: bytes, readings: Sequence[bytes], pods: Sequence[str]
    ) -> list[list[tuple[str, int, int, int, bool]]]: ...  # as `Index.holders`
