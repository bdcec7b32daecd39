"""Engine block hashes exactly as vLLM's `sha256_cbor` computes them."""

import hashlib
from collections.abc import Sequence


def none_hash(seed: str) -> bytes:
    """The parent of every first block; vLLM takes the seed from PYTHONHASHSEED."""
    text = seed.encode()
    return hashlib.sha256(_head(3, len(text)) + text).digest()


def block_hash(parent: bytes, tokens: Sequence[int]) -> bytes:
    """Digest of one full block of plain text: canonical CBOR of (parent, tokens, None)."""
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


def _head(major: int, value: int) -> bytes:
    if value < 24:
        return bytes([major << 5 | value])
    for code, width in ((24, 1), (25, 2), (26, 4)):
        if value < 1 << (8 * width):
            return bytes([major << 5 | code]) + value.to_bytes(width, "big")
    return bytes([major << 5 | 27]) + value.to_bytes(8, "big")
