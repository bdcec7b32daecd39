"""Engine block hashes as engines compute them: for the simulated ones, and to tell which way a real one does it."""

import hashlib
import pickle
from collections.abc import Sequence

SEEDS = ("vllm-none-hash", "0", "42", "1337", "1")
"""Tried for PYTHONHASHSEED; the first is what vLLM takes from 0.29 on when it is not set."""


def none_hash(seed: str) -> bytes:
    """The parent of every first block with `sha256_cbor`; vLLM takes the seed from PYTHONHASHSEED."""
    text = seed.encode()
    return hashlib.sha256(_head(3, len(text)) + text).digest()


def block_hash(parent: bytes, tokens: Sequence[int]) -> bytes:
    """Digest of one full block of plain text with `sha256_cbor`: canonical CBOR of (parent, tokens, None)."""
    encoded = bytearray(b"\x83")
    encoded += _head(2, len(parent)) + parent
    encoded += _head(4, len(tokens))
    for token in tokens:
        encoded += _head(0, token)
    encoded += b"\xf6"
    return hashlib.sha256(encoded).digest()


def wire_hash(digest: bytes) -> int:
    """The integer that vLLM publishes for a digest: its last 8 bytes."""
    return int.from_bytes(digest[-8:], "big")


def recognised(published: int | bytes, tokens: Sequence[int]) -> str:
    """By which algorithm and seed a first block of plain text got this hash; empty when by none that is tried.

    An int is taken as unsigned 64-bit, as a negative one is kept.
    """
    for seed in SEEDS:
        digests = {
            "vLLM sha256_cbor": block_hash(none_hash(seed), tokens),
            "vLLM sha256": _pickled((_pickled(seed), tuple(tokens), None)),
        }
        for name, digest in digests.items():
            if published in (digest, wire_hash(digest)):
                return f"{name}, seed {seed!r}"
    # SGLang has no seed: each token as 4 bytes; its hash on the wire is the first 8 bytes.
    digest = hashlib.sha256(b"".join(token.to_bytes(4, "little") for token in tokens)).digest()
    if published in (digest, int.from_bytes(digest[:8], "big")):
        return "SGLang sha256"
    return ""


def _pickled(value: object) -> bytes:
    return hashlib.sha256(pickle.dumps(value, protocol=5)).digest()


def _head(major: int, value: int) -> bytes:
    if value < 24:
        return bytes([major << 5 | value])
    for code, width in ((24, 1), (25, 2), (26, 4)):
        if value < 1 << (8 * width):
            return bytes([major << 5 | code]) + value.to_bytes(width, "big")
    return bytes([major << 5 | 27]) + value.to_bytes(8, "big")
