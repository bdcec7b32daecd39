"""Native core: hashing, event decoding and the sharded block index. All calls release the GIL."""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

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

    def __init__(self, block_size: int = 0, seed: int = 1337, max_claims: int = 0) -> None: ...
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
    def learn_block_size(self, size: int) -> int: ...  # the size in force: `size` only if none was known
    def add_stream(self, pod: str, rank: int) -> Stream: ...
    def score(
        self,
        keys: _Bytes,  # u64 LE
        pods: Sequence[str],  # candidates; empty = every pod of the index
        weights: Sequence[float],  # by tier bit, as `tiers`; missing ones weigh as the lowest given
    ) -> list[tuple[str, int, int, float, list[int]]]:
        """(pod, rank, matched blocks, score, blocks per tier bit) of each pod with a match > 0, unordered."""

    def score_tokens(
        self,
        tokens: _Bytes,
        pods: Sequence[str],
        weights: Sequence[float],
        lora_name: str = "",
        cache_salt: str = "",
        mm_features: Sequence[tuple[str, int, int]] = (),
    ) -> list[tuple[str, int, int, float, list[int]]]:
        """The same from token ids: hashing stops where the last match ends."""

    def holders(self, keys: _Bytes, pods: Sequence[str]) -> list[list[tuple[str, int, int, int]]]:
        """Per key: (pod, rank, tier bit, group), ordered by (pod, rank, group, tier)."""

    def holders_of_ints(self, hashes: _Bytes, pods: Sequence[str]) -> list[tuple[int, list[tuple[str, int, int, int]]]]:
        """Per engine hash (u64 LE): (key or 0, holders)."""

    def holders_of_bytes(
        self, hashes: Sequence[_Bytes], pods: Sequence[str]
    ) -> list[tuple[int, list[tuple[str, int, int, int]]]]: ...

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

class Stream:
    """One (pod, rank). Calls to one stream come from one thread at a time; readers are free."""

    def apply(self, payloads: Sequence[bytes]) -> Applied: ...
    def clear(self) -> int: ...  # drops all claims (a fence); returns how many
    def close(self) -> int: ...  # the same, and the stream is gone from answers
    @property
    def claims(self) -> int: ...
    @property
    def claims_by_tier(self) -> list[int]: ...
    @property
    def orphans(self) -> int: ...  # blocks waiting for their parent
    @property
    def unresolved(self) -> int: ...  # claims whose key is not known
    @property
    def closed(self) -> bool: ...

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
    def media_fit(self) -> bool: ...  # every media item lies within the tokens
    def set_tokens(self, tokens: _Bytes) -> None: ...  # u32 LE; those of a prompt or chat

def read_score_request(encoded: bytes, limits: RequestLimits) -> ScoreRequest | None:
    """None when it is malformed, beyond a limit or unusual: codec.decode_score then says what it is."""

class Scorer:
    """Answers read requests over one index; safe from many threads."""

    def __init__(self, index: Index, weights: Mapping[str, float]) -> None: ...
    def answer(
        self,
        request: ScoreRequest,
        lora: str,  # where the request names none
        known: Sequence[str],  # distinct candidates when the request names none
        refresh: Callable[[list[tuple[str, int]]], None],  # called with each (pod, rank) that is to be told anew
    ) -> tuple[_Bytes, int, int, list[str]]:
        """(encoded ScoreResponse, total blocks, blocks the best pod held, tiers in it without a weight)."""

    def tell(self, pod: str, rank: int, trust: int, reason: str, age_seconds: float, asked_at: int) -> None:
        """How far a stream can be believed, as it was at `asked_at` (time.monotonic_ns)."""
