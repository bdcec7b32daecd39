"""HTTP/2 by hand, for clients that no library would be: frames, gRPC calls, and pieces of them."""

import struct

import hpack

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RESET, SETTINGS, PING, GOAWAY, WINDOW, CONTINUATION = 0, 1, 3, 4, 6, 7, 8, 9
ACK = END_STREAM = 1
END_HEADERS = 4
SCORE = "/kvindex.v1.KVIndex/Score"


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """One frame."""
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def frames(data: bytes) -> tuple[list[tuple[int, int, int, bytes]], bytes]:
    """(kind, flags, stream, payload) of each whole frame, and the bytes that are none yet."""
    found, at = [], 0
    while len(data) - at >= 9:
        end = at + 9 + int.from_bytes(data[at : at + 3], "big")
        if end > len(data):
            break
        found.append((data[at + 3], data[at + 4], int.from_bytes(data[at + 5 : at + 9], "big"), data[at + 9 : end]))
        at = end
    return found, data[at:]


def headers(stream: int, *more: tuple[str, str], path: str = SCORE, flags: int = END_HEADERS) -> bytes:
    """The beginning of a call."""
    fields = [(":method", "POST"), (":scheme", "http"), (":path", path), (":authority", "x")]
    fields += [("content-type", "application/grpc"), ("te", "trailers"), *more]
    return frame(HEADERS, flags, stream, hpack.Encoder().encode(fields, huffman=False))


def call(stream: int, message: bytes) -> bytes:
    """A whole call."""
    body = b"\0" + struct.pack(">I", len(message)) + message
    pieces = [body[at : at + 16384] for at in range(0, len(body), 16384)]
    data = [frame(DATA, END_STREAM * (piece is pieces[-1]), stream, piece) for piece in pieces]
    return headers(stream) + b"".join(data)
