"""The load of every benchmark: vLLM-format payloads of a fleet that shares system prompts."""

import platform
import random
import struct
import time
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
