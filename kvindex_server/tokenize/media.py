"""Makes room for media in a text's tokens: a template writes one placeholder per item, the engine a range of them."""

from collections.abc import Sequence

from kvindex_server.errors import InvalidArgument


def spread(tokens: bytes, features: Sequence[tuple[str, int, int]], max_tokens: int) -> bytes:
    """The tokens (u32) with each feature's placeholder as often as its (hash, offset, length) says.

    Offsets count the engine's tokens, so those of media that come before. A text that has a placeholder often enough
    already stays as it is. InvalidArgument when a range does not begin within the text, or lies in another one.
    """
    if len(tokens) // 4 + sum(length for _, _, length in features) > max_tokens:
        raise InvalidArgument("mm_features", f"with their placeholders the tokens may exceed the limit of {max_tokens}")
    out = bytearray()
    read = 0
    for _, offset, length in sorted(features, key=lambda each: each[1]):
        before = offset * 4 - len(out)
        if before < 0:
            raise InvalidArgument("mm_features", "two of them cover the same tokens")
        placeholder = tokens[read + before : read + before + 4]
        if not placeholder:
            end = (len(out) + len(tokens) - read) // 4
            raise InvalidArgument("mm_features", f"offset {offset} is beyond the {end} tokens")
        whole = placeholder * length
        out += tokens[read : read + before]
        read += before
        read += len(whole) if tokens[read : read + len(whole)] == whole else 4
        out += whole
    return bytes(out + tokens[read:])
