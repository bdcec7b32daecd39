"""Hostile requests against the real server process: bytes no client library writes, huge ones, bad templates."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from kvindex_server.pb.kvindex.v1 import kvindex_pb2 as pb

SCORE = "/kvindex.v1.KVIndex/Score"
TEMPLATE = (
    "{% if messages[0].content == 'raise' %}{{ raise_exception('SECRET') }}"
    "{% elif messages[0].content == 'zero' %}{{ 1 / 0 }}"
    "{% elif messages[0].content == 'escape' %}{{ ''.__class__.__mro__ }}"
    "{% else %}{{ messages[0].nope.nope }}{% endif %}"
)
TOKENIZER = {"model": {"type": "WordLevel", "vocab": {"a": 0, "[UNK]": 1}, "unk_token": "[UNK]"}}


def varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def field(number: int, body: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(body)) + body


MODEL = field(1, b"m")
TOKENS = MODEL + field(4, field(1, bytes(range(16))))


@pytest.fixture(scope="module")
def channel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[grpc.Channel]:
    root: Path = tmp_path_factory.mktemp("tokenizer")
    (root / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    (root / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    pod = "{pod: a, model: m, endpoint: 'tcp://127.0.0.1:1', block_size: 16}"
    (root / "config.yaml").write_text(f"pods: [{pod}]\n")
    command = [sys.executable, "-m", "kvindex_server", "serve", "--listen", "127.0.0.1:0"]
    command += ["--metrics-listen", "127.0.0.1:0", "--config", str(root / "config.yaml"), "--tokenizer", f"m={root}"]
    log = root / "log"
    with log.open("wb") as err:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=err, text=True)
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith("listening grpc="), log.read_text()
            address = line.split()[1].removeprefix("grpc=")
            with grpc.insecure_channel(address, options=[("grpc.max_send_message_length", -1)]) as opened:
                opened.unary_unary(SCORE)(TOKENS, timeout=10, wait_for_ready=True)
                yield opened
            assert process.poll() is None, "the server died"
            process.send_signal(signal.SIGTERM)
            assert process.wait(12) == 0
        finally:
            process.kill()
            process.wait(5)
    assert "SECRET" not in log.read_text()


def refusal(channel: grpc.Channel, data: bytes) -> tuple[str, str]:
    with pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary(SCORE)(data, timeout=10)
    return caught.value.code().name, caught.value.details()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (MODEL + field(4, field(1, varint(1) + varint(1 << 32))), "tokens.ids: value above 2^32-1"),
        (MODEL + field(4, b"\x08" + varint(1 << 35)), "tokens.ids: value above 2^32-1"),
        (MODEL + field(4, field(1, varint(2**64 - 1))), "tokens.ids: value above 2^32-1"),
        (MODEL + field(4, field(1, b"\xff" * 10 + b"\x01")), "request: not a valid ScoreRequest"),
        (MODEL + field(4, field(1, b"\xff")), "request: not a valid ScoreRequest"),
        (MODEL + field(5, field(1, b"1234567")), "request: not a valid ScoreRequest"),
        (MODEL + b"\x7b" * 200_000, "request: not a valid ScoreRequest"),
        (MODEL + field(2, b"") + field(5, b""), "input: only one of prompt, chat, tokens, keys may be given"),
        (MODEL + field(2, b"a") + b"\x32\x00" * 200_000, "pods: 200000 pods exceed the limit of 16384"),
        (
            MODEL + field(4, field(1, b"\x05" * 4_000_000)),
            "tokens.ids: 4000000 tokens exceed the limit of 2097152",
        ),
    ],
    ids=["packed", "unpacked", "u64", "long-varint", "cut", "odd-keys", "groups", "two-empty", "pods", "tokens"],
)
def test_hostile_bytes(channel: grpc.Channel, data: bytes, message: str) -> None:
    assert refusal(channel, data) == ("INVALID_ARGUMENT", message)


@pytest.mark.parametrize("content", ["raise", "zero", "escape", "undefined"])
def test_a_template_that_fails(channel: grpc.Channel, content: str) -> None:
    body = json.dumps({"messages": [{"role": "user", "content": content}]}).encode()
    code, message = refusal(channel, MODEL + field(3, body))
    assert code == "INVALID_ARGUMENT" and message.startswith("chat: ") and "SECRET" not in message


@pytest.mark.parametrize("body", [b"{", b"[]", b"NaN", b'{"messages":' + b"[" * 100_000, b"9" * 5000])
def test_a_chat_body_that_is_no_request(channel: grpc.Channel, body: bytes) -> None:
    code, message = refusal(channel, MODEL + field(3, body))
    assert code == "INVALID_ARGUMENT" and message.startswith("chat: not ")


def test_a_stream_outlives_hostile_requests(channel: grpc.Channel) -> None:
    requests = [TOKENS, b"\xff\xff", MODEL, MODEL + field(4, field(1, varint(1 << 40))), TOKENS]
    answers = channel.stream_stream("/kvindex.v1.KVIndex/ScoreStream")(iter(requests), timeout=10)
    assert [pb.ScoreResponse.FromString(each).status.code for each in answers] == [0, 3, 3, 3, 0]
