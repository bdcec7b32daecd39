"""The load of every benchmark: vLLM-format payloads of a fleet that shares system prompts."""

import json
import platform
import random
import struct
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgpack

BLOCK_SIZE = 16


def machine() -> str:
    """One line on where this ran."""
    cpu = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    return f"{time.strftime('%Y-%m-%d')}, {cpu}, Python {platform.python_version()}"


def stored(hashes: list[int], parent: int | None, tokens: list[int]) -> dict[str, object]:
    """A BlockStored event as vLLM >= 0.24 sends it."""
    return {
        "type": "BlockStored",
        "block_hashes": hashes,
        "parent_block_hash": parent,
        "token_ids": tokens,
        "block_size": BLOCK_SIZE,
        "lora_id": None,
        "medium": "GPU",
        "lora_name": None,
        "group_idx": 0,
        "kv_cache_spec_kind": "full_attention",
    }


def batch(events: list[dict[str, object]]) -> bytes:
    """One message's payload."""
    return bytes(msgpack.packb([time.time(), events, 0]))


def removals(hashes: list[int], per_message: int) -> list[bytes]:
    """Messages that remove these, one hash an event."""
    return [
        batch(
            [
                {"type": "BlockRemoved", "block_hashes": [each], "medium": "GPU", "group_idx": 0}
                for each in hashes[begin : begin + per_message]
            ]
        )
        for begin in range(0, len(hashes), per_message)
    ]


def pack(tokens: list[int]) -> bytes:
    """Token ids as the core takes them."""
    return struct.pack(f"<{len(tokens)}I", *tokens)


class Chains:
    """Seeded chains of blocks: random tokens, random engine hashes."""

    def __init__(self, seed: int = 1) -> None:
        self._random = random.Random(seed)

    def tokens(self, blocks: int) -> list[int]:
        """Token ids of so many blocks."""
        return self._random.choices(range(128_000), k=blocks * BLOCK_SIZE)

    def hashes(self, blocks: int) -> list[int]:
        """Engine hashes of so many blocks."""
        return [self._random.getrandbits(64) for _ in range(blocks)]

    def payloads(self, blocks: int, per_event: int) -> tuple[list[bytes], list[int], list[int]]:
        """Messages of one event each that store one chain; its hashes and tokens."""
        tokens, hashes = self.tokens(blocks), self.hashes(blocks)
        messages = []
        for begin in range(0, blocks, per_event):
            end = min(blocks, begin + per_event)
            parent = hashes[begin - 1] if begin else None
            messages.append(batch([stored(hashes[begin:end], parent, tokens[begin * BLOCK_SIZE : end * BLOCK_SIZE])]))
        return messages, hashes, tokens


# --- what a fleet's engines say while they serve requests ---

SPAN = 32
"""Blocks of a span: 512 tokens, what one id of the public conversation trace stands for."""

Request = tuple[int, list[int]]
"""The pod that serves it, and the spans of its prompt. A span's number stands for all of the prefix up to its end."""


@dataclass(frozen=True)
class Chain:
    """Blocks that a pod announces at once, at most 128."""

    pod: int
    parent: int | None
    hashes: list[int]
    tokens: list[int]


@dataclass
class Traffic:
    """What pods without a limit store for these requests, in order; and what each then removes, tails first."""

    chains: list[Chain] = field(default_factory=list)
    removed: dict[int, list[int]] = field(default_factory=dict)
    prompts: list[list[int]] = field(default_factory=list)

    @property
    def blocks(self) -> int:
        """Blocks stored, over all pods."""
        return sum(len(chain.hashes) for chain in self.chains)


def span_blocks(span: int) -> tuple[list[int], list[int]]:
    """(engine hashes, tokens) of a span, pseudo-random by its number."""
    seeded = random.Random(span)
    tokens = seeded.choices(range(128_000), k=SPAN * BLOCK_SIZE)
    return [seeded.getrandbits(64) for _ in range(SPAN)], tokens


def serve(requests: Iterable[Request], per_event: int = 128) -> Traffic:
    """The events of these requests. The least recently used block goes first, and of one request its last."""
    traffic = Traffic()
    held: dict[int, OrderedDict[int, None]] = {}
    for pod, spans in requests:
        mine = held.setdefault(pod, OrderedDict())
        known = next((place for place, span in enumerate(spans) if span not in mine), len(spans))
        fresh = [span_blocks(span) for span in spans[known:]]
        hashes = [each for span, _ in fresh for each in span]
        tokens = [each for _, span in fresh for each in span]
        before = span_blocks(spans[known - 1])[0][-1] if known else None
        for begin in range(0, len(hashes), per_event):
            end = min(len(hashes), begin + per_event)
            parent = hashes[begin - 1] if begin else before
            traffic.chains.append(Chain(pod, parent, hashes[begin:end], tokens[begin * BLOCK_SIZE : end * BLOCK_SIZE]))
        for span in reversed(spans):
            mine[span] = None
            mine.move_to_end(span)
        traffic.prompts.append(spans)
    for pod, mine in held.items():
        traffic.removed[pod] = [each for span in mine for each in reversed(span_blocks(span)[0])]
    return traffic


def chats(pods: int = 64, sessions: int = 6, turns: int = 4) -> Iterator[Request]:
    """Chats that begin with one of 8 system prompts of 256 blocks and grow by 128 blocks a turn, turn by turn."""
    chosen = random.Random(8)
    begun = [
        (pod, list(range(1_000 * (system := chosen.randrange(8)), 1_000 * system + 8)), 100_000 + 100 * number)
        for number, pod in enumerate(pod for _ in range(sessions) for pod in range(pods))
    ]
    for turn in range(1, turns + 1):
        chosen.shuffle(begun)
        for pod, system, first in begun:
            yield pod, [*system, *range(first, first + 4 * turn)]


def conversation_trace(path: Path, requests: int, pods: int = 64) -> Iterator[Request]:
    """The first requests of a trace of `hash_ids`, each conversation at one pod."""
    with path.open(encoding="utf-8") as lines:
        for _, line in zip(range(requests), lines, strict=False):
            spans = json.loads(line)["hash_ids"]
            yield spans[min(1, len(spans) - 1)] % pods, spans
