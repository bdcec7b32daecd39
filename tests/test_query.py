"""HTTP `/query` and `/query_by_hash`: answers as Mooncake's and Dynamo's clients read them, and typed errors."""

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from email.message import Message
from pathlib import Path
from typing import Any

import pytest
from event_encoding import Stored, maps
from page_fleet import eventually, serving
from publisher import Publisher, free_port

from kvindex_server import _core
from kvindex_server.config import Settings
from kvindex_server.pods import PodSpec
from kvindex_server.query import _Reach, _reaches
from kvindex_server.rest import Calls, Fields
from kvindex_server.score import PodScore
from kvindex_server.server import Server
from kvindex_server.web import Request

BLOCK = 4
TOKENS = list(range(1, 8 * BLOCK + 1))
BLOCKS = len(TOKENS) // BLOCK
READER = "reader-token-0123456789"


def packed(tokens: list[int]) -> bytes:
    return b"".join(each.to_bytes(4, "little") for each in tokens)


def rolling(tokens: list[int] = TOKENS) -> list[int]:
    """Keys of the prefixes, as Mooncake's clients send them."""
    return list(memoryview(_core.block_keys(packed(tokens), BLOCK, 1337, "", "", ())).cast("Q"))


def local(tokens: list[int] = TOKENS) -> list[int]:
    """Hashes of the single blocks, signed, as Dynamo's clients send them."""
    blocks = [packed(tokens[at : at + BLOCK]) for at in range(0, len(tokens), BLOCK)]
    return [int.from_bytes(_core.xxh3_64(each, 1337).to_bytes(8, "little"), "little", signed=True) for each in blocks]


def post(server: Server, path: str, body: object, address: str = "", **headers: str) -> tuple[int, dict[str, str], Any]:
    connection = http.client.HTTPConnection(address or server.http_address, timeout=10)
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    given = {"Content-Type": "application/json", **{name.replace("_", "-"): value for name, value in headers.items()}}
    connection.request("POST", path, data, given)
    answer = connection.getresponse()
    text = answer.read()
    connection.close()
    kind = answer.getheader("Content-Type") or ""
    return answer.status, dict(answer.getheaders()), json.loads(text) if "json" in kind else text


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """Pod `one` holds 6 blocks: 4 on the GPU, of which the last two also in host memory, then 2 in host memory only.
    Pod `two` has two ranks: 3 blocks on the GPU of rank 0, 5 of rank 1. Pod `none` holds nothing.
    """
    models = [{"name": "m", "block_size": BLOCK, "aliases": ["alias"]}]
    with (
        serving(models=models, http={"listen": "127.0.0.1:0"}, limits={"max_tokens": 64, "max_keys": 16}) as server,
        Publisher() as one,
        Publisher() as first,
        Publisher(port=first.port + 1, replay_port=first.replay_port + 1) as second,
    ):
        one.publish(maps(Stored([1, 2, 3, 4], None, TOKENS[: 4 * BLOCK], BLOCK)))
        one.publish(maps(Stored([3, 4, 5, 6], 2, TOKENS[2 * BLOCK : 6 * BLOCK], BLOCK, medium="CPU")))
        first.publish(maps(Stored([1, 2, 3], None, TOKENS[: 3 * BLOCK], BLOCK)))
        second.publish(maps(Stored([1, 2, 3, 4, 5], None, TOKENS[: 5 * BLOCK], BLOCK), rank=1))
        server.fleet.register(PodSpec("one", "m", one.endpoint, one.replay_endpoint))
        server.fleet.register(PodSpec("two", "m", first.endpoint, first.replay_endpoint, ranks=2))
        server.fleet.register(PodSpec("none", "m", f"tcp://127.0.0.1:{free_port()}"))

        def settled() -> bool:
            found = post(server, "/query", {"model": "m", "token_ids": TOKENS})[2].get("default", {})
            return [found[pod]["longest_matched"] // BLOCK for pod in ("one", "two")] == [6, 5]

        eventually(settled)
        yield server


MOONCAKE = {
    "default": {
        "one": {"longest_matched": 24, "GPU": 16, "CPU": 0, "DISK": 0, "DP": {"0": 24}},
        "two": {"longest_matched": 20, "GPU": 20, "CPU": 0, "DISK": 0, "DP": {"0": 12, "1": 20}},
        "none": {"longest_matched": 0, "GPU": 0, "CPU": 0, "DISK": 0, "DP": {"0": 0}},
    }
}
DYNAMO = {
    "scores": {"one": {"0": 16}, "two": {"0": 12, "1": 20}, "none": {"0": 0}},
    # Of the ranks one/0, two/0, two/1: how many hold each block of the prefix on the device.
    "frequencies": [3, 3, 3, 2, 1],
    "instances": {
        "one": {"longest_matched": 24, "gpu": 16, "cpu": 24, "disk": 24, "dp": {"0": 16}},
        "two": {"longest_matched": 20, "gpu": 20, "cpu": 20, "disk": 20, "dp": {"0": 12, "1": 20}},
        "none": {"longest_matched": 0, "gpu": 0, "cpu": 0, "disk": 0, "dp": {"0": 0}},
    },
}


def test_mooncake(server: Server) -> None:
    """By `model`: tokens per instance, on each medium alone and per rank, under the tenant's name."""
    status, headers, answer = post(server, "/query", {"model": "m", "block_size": BLOCK, "token_ids": TOKENS})
    assert (status, headers["Content-Type"], headers["Cache-Control"]) == (200, "application/json", "no-store")
    assert answer == MOONCAKE
    for name in ("seq_hashes", "block_hash"):
        assert post(server, "/query_by_hash", {"model": "m", name: rolling(), "tenant_id": "default"})[2] == MOONCAKE
    one = post(server, "/query", {"model": "alias", "token_ids": TOKENS, "instance_id": "one", "lora_name": None})[2]
    assert one == {"default": {"one": MOONCAKE["default"]["one"]}}


def test_dynamo(server: Server) -> None:
    """By `model_name`: device tokens per rank, and per instance the reach through each tier and those before it."""
    assert post(server, "/query", {"model_name": "m", "token_ids": TOKENS})[2] == DYNAMO
    by_hash = {"model_name": "m", "block_hashes": local(), "routing_group": "default", "cache_salt": None}
    assert post(server, "/query_by_hash", by_hash)[2] == DYNAMO
    unsigned = [each % (1 << 64) for each in local()]
    assert min(local()) < 0 < max(local())
    assert post(server, "/query_by_hash", {"model_name": "m", "block_hashes": unsigned})[2] == DYNAMO


def test_device_only_is_the_same_by_the_short_way(server: Server) -> None:
    """An answer that needs no walk over the holders agrees with one that does."""
    short = TOKENS[: 2 * BLOCK]
    dynamo = post(server, "/query", {"model_name": "m", "token_ids": short})[2]
    mooncake = post(server, "/query", {"model": "m", "token_ids": short})[2]["default"]
    assert dynamo["instances"]["one"] == {"longest_matched": 8, "gpu": 8, "cpu": 8, "disk": 8, "dp": {"0": 8}}
    assert (mooncake["one"]["longest_matched"], mooncake["one"]["GPU"], mooncake["one"]["DP"]) == (8, 8, {"0": 8})


def test_salt_and_adapter_are_part_of_the_question(server: Server) -> None:
    for extra in ({"cache_salt": "s"}, {"lora_name": "l"}):
        answer = post(server, "/query", {"model": "m", "token_ids": TOKENS, **extra})[2]
        assert {each["longest_matched"] for each in answer["default"].values()} == {0}


@pytest.mark.parametrize(
    ("path", "body", "code", "field"),
    [
        ("/query", {"token_ids": [1]}, "INVALID_ARGUMENT", "model"),
        ("/query", {"model": "m", "model_name": "m", "token_ids": [1]}, "INVALID_ARGUMENT", "model"),
        ("/query", {"model": "x", "token_ids": [1]}, "NOT_FOUND", None),
        ("/query", {"model": "m"}, "INVALID_ARGUMENT", "token_ids"),
        ("/query", {"model": "m", "token_ids": []}, "INVALID_ARGUMENT", "token_ids"),
        ("/query", {"model": "m", "token_ids": "1"}, "INVALID_ARGUMENT", "token_ids"),
        ("/query", {"model": "m", "token_ids": [1.0]}, "INVALID_ARGUMENT", "token_ids"),
        ("/query", {"model": "m", "token_ids": [True]}, "INVALID_ARGUMENT", "token_ids"),
        ("/query", {"model": "m", "token_ids": [-1]}, "INVALID_ARGUMENT", "token_ids"),
        ("/query", {"model": "m", "token_ids": [1 << 32]}, "INVALID_ARGUMENT", "token_ids"),
        ("/query", {"model": "m", "token_ids": [1] * 65}, "INVALID_ARGUMENT", "token_ids"),
        ("/query", {"model": "m", "token_ids": [1], "block_size": 8}, "INVALID_ARGUMENT", "block_size"),
        ("/query", {"model": "m", "token_ids": [1], "tenant_id": "t"}, "INVALID_ARGUMENT", "tenant_id"),
        ("/query", {"model_name": "m", "token_ids": [1], "routing_group": "t"}, "INVALID_ARGUMENT", "routing_group"),
        ("/query", {"model": "m", "token_ids": [1], "instance_id": "x"}, "NOT_FOUND", None),
        ("/query", {"model": "m", "token_ids": [1], "lora_id": 3}, "INVALID_ARGUMENT", "lora_id"),
        ("/query", {"model": "m", "token_ids": [1], "medium": ["L1"]}, "INVALID_ARGUMENT", "medium"),
        ("/query", {"model": "m", "token_ids": [1], "lora_name": "x" * 1025}, "INVALID_ARGUMENT", "lora_name"),
        ("/query_by_hash", {"model": "m", "token_ids": [1]}, "INVALID_ARGUMENT", "seq_hashes"),
        ("/query_by_hash", {"model": "m", "seq_hashes": [1], "block_hash": [1]}, "INVALID_ARGUMENT", "block_hash"),
        ("/query_by_hash", {"model": "m", "block_hashes": [1]}, "INVALID_ARGUMENT", "seq_hashes"),
        ("/query_by_hash", {"model_name": "m", "seq_hashes": [1]}, "INVALID_ARGUMENT", "block_hashes"),
        ("/query_by_hash", {"model": "m", "seq_hashes": [1 << 64]}, "INVALID_ARGUMENT", "seq_hashes"),
        ("/query_by_hash", {"model": "m", "seq_hashes": [-1 - (1 << 63)]}, "INVALID_ARGUMENT", "seq_hashes"),
        ("/query_by_hash", {"model": "m", "seq_hashes": [1] * 17}, "INVALID_ARGUMENT", "seq_hashes"),
        ("/query_by_hash", {"model": "m", "seq_hashes": [1], "cache_salt": "s"}, "INVALID_ARGUMENT", "cache_salt"),
        ("/query_by_hash", {"model": "m", "seq_hashes": [1], "lora_name": "l"}, "INVALID_ARGUMENT", "lora_name"),
        ("/query", {"model": "\ud800", "token_ids": [1]}, "INVALID_ARGUMENT", "model"),
        ("/query", {"model": "m", "token_ids": [1], "cache_salt": "\udfff"}, "INVALID_ARGUMENT", "cache_salt"),
        ("/query", {"model": "m", "token_ids": [1], "\ud800": 1}, "INVALID_ARGUMENT", "\ud800"),
        ("/query", [1], "INVALID_ARGUMENT", "body"),
        ("/query", b"{", "INVALID_ARGUMENT", "body"),
        ("/query", b"\xff", "INVALID_ARGUMENT", "body"),
        ("/query", b"[" * 100_000, "INVALID_ARGUMENT", "body"),
        ("/query", b'{"model": "m", "model": "m"}', "INVALID_ARGUMENT", "model"),
        ("/query", b'{"model": "m", "token_ids": [' + b"9" * 5000 + b"]}", "INVALID_ARGUMENT", "body"),
    ],
)
def test_bad_requests_get_typed_errors(server: Server, path: str, body: object, code: str, field: str | None) -> None:
    """The field is named, as in gRPC's errors, and nothing is quietly passed over."""
    status, _, answer = post(server, path, body)
    assert status == {"INVALID_ARGUMENT": 400, "NOT_FOUND": 404}[code]
    assert answer["error"]["code"] == code
    assert answer["error"].get("field") == field
    assert answer["error"]["message"]


def test_what_is_no_request(server: Server) -> None:
    assert post(server, "/query", {}, Content_Type="text/plain")[2]["error"]["field"] == "Content-Type"
    assert post(server, "/other", {})[0] == 404
    assert raw(server, b"GET /query HTTP/1.1\r\n\r\n").startswith(b"HTTP/1.1 405 ")
    assert raw(server, b"POST /query HTTP/1.1\r\n\r\n").startswith(b"HTTP/1.1 411 ")
    assert raw(server, b"POST /query HTTP/1.1\r\nContent-Length: x\r\n\r\n").startswith(b"HTTP/1.1 400 ")
    assert raw(server, b"POST /query HTTP/1.1\r\nContent-Length: 999999999\r\n\r\n").startswith(b"HTTP/1.1 413 ")
    twice = b"POST /query HTTP/1.1\r\nContent-Length: 2\r\nContent-Length: 5\r\n\r\n{}"
    assert raw(server, twice).startswith(b"HTTP/1.1 400 ")
    chunked = b"POST /query HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"
    assert raw(server, chunked).startswith(b"HTTP/1.1 411 ")
    for line in (b"BAD <secret>", b"POST /query secret HTTP/1.1", b"GET / secret/1.1", b"SECRET / HTTP/1.1"):
        answer = raw(server, line + b"\r\n\r\n")
        assert b"HTTP/1.1 400 " in answer or b"HTTP/1.1 501 " in answer or answer == b"400\n", line
        assert b"secret" not in answer.lower()


def test_a_body_is_never_taken_for_a_request(server: Server) -> None:
    """What is refused before its body was read ends the connection, whatever the body looks like."""
    hidden = b"GET /query HTTP/1.1\r\n\r\n"
    for start in (b"GET /other", b"POST /other", b"GET /query"):
        answer = raw(server, start + b" HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(hidden) + hidden)
        assert answer.count(b"HTTP/1.1 ") == 1, start


def raw(server: Server, data: bytes) -> bytes:
    """Everything that comes back, until the server closes or a second is over."""
    host, _, port = server.http_address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        found = b""
        while part := connection.recv(65536):
            found += part
    return found


def test_one_connection_many_questions(server: Server) -> None:
    connection = http.client.HTTPConnection(server.http_address, timeout=10)
    connection.connect()
    socket_before = connection.sock
    for _ in range(5):
        body = json.dumps({"model": "m", "token_ids": TOKENS})
        connection.request("POST", "/query", body, {"Content-Type": "application/json"})
        assert json.loads(connection.getresponse().read()) == MOONCAKE
    assert connection.sock is socket_before
    connection.close()


def test_counted_as_calls_are(server: Server) -> None:
    post(server, "/query", {"model": "m", "token_ids": TOKENS})
    post(server, "/query", {"model": "x", "token_ids": TOKENS})
    connection = http.client.HTTPConnection(server.metrics_address, timeout=5)
    connection.request("GET", "/metrics")
    scraped = connection.getresponse().read().decode()
    connection.close()
    for code in ("OK", "NOT_FOUND", "INVALID_ARGUMENT"):
        assert f'kvindex_rpc_total{{code="{code}",method="/query"}}' in scraped


def test_not_ready_says_so() -> None:
    """Before the configured pods are synchronised a query is refused, and no silent miss."""
    with Publisher(mute=True) as engine:
        pod = {"pod": "p", "model": "m", "endpoint": engine.endpoint, "replay_endpoint": engine.replay_endpoint}
        ports = {"listen": "127.0.0.1:0", "metrics_listen": "127.0.0.1:0", "http": {"listen": "127.0.0.1:0"}}
        server = Server(Settings.model_validate({**ports, "pods": [pod]}))
        server.start()
        try:
            status, headers, answer = post(server, "/query", {"model": "m", "token_ids": [1]})
            assert (status, headers["Retry-After"], answer["error"]["code"]) == (503, "1", "UNAVAILABLE")
        finally:
            server.stop(0)


def test_tokens_are_asked_for(tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text(READER + "\n")
    (tmp_path / "admins").write_text("operator-token-0123456789\n")
    auth = {"tokens_file": str(tmp_path / "tokens"), "admin_tokens_file": str(tmp_path / "admins")}
    with serving(auth=auth, models=[{"name": "m"}], http={"listen": "127.0.0.1:0"}) as server:
        body = {"model": "m", "token_ids": [1]}
        for headers in ({}, {"Authorization": "Bearer " + "x" * 20}, {"Authorization": f"Basic {READER}"}):
            status, found, answer = post(server, "/query", body, **headers)
            assert (status, found["WWW-Authenticate"]) == (401, "Bearer")
            assert answer["error"]["code"] == "UNAUTHENTICATED"
        assert post(server, "/query", body, Authorization=f"Bearer {READER}")[0] == 200
        # On the other port there is no such path.
        assert post(server, "/query", body, server.metrics_address)[0] == 404


def test_off_by_default() -> None:
    with serving() as server:
        assert server.http_address == ""


def test_a_slow_sender_loses_its_connection() -> None:
    """A byte now and then does not hold a thread for longer than a request may take."""
    with serving(http={"listen": "127.0.0.1:0", "request_seconds": 0.5, "max_connections": 1}) as server:
        host, _, port = server.http_address.rpartition(":")
        with socket.create_connection((host, int(port)), timeout=5) as slow:
            slow.sendall(b"POST /query HTTP/1.1\r\nContent-Length: 50\r\n\r\n")
            began = time.monotonic()
            with pytest.raises(OSError):
                while time.monotonic() - began < 8:
                    slow.sendall(b" ")
                    time.sleep(0.1)
            assert time.monotonic() - began < 5
        # The only place is free again.
        eventually(lambda: answers(server))


def answers(server: Server) -> bool:
    try:
        return post(server, "/query", {"model": "m", "token_ids": [1]})[0] == 404
    except (OSError, http.client.HTTPException):
        return False


class Anybody:
    """A guard that lets everybody in and remembers what it turned away."""

    spans = None

    def __init__(self) -> None:
        self.shed_for: list[str] = []

    def at_arrival(self, *_: object) -> None:
        return None

    def identify(self, *_: object) -> None:
        return None

    def answer(self, _: str, work: Any) -> Any:
        return work()

    def shed(self, _: str, reason: str) -> None:
        self.shed_for.append(reason)

    def observe(self, *_: object) -> None:
        return None


def test_permits_and_time_limit() -> None:
    """One call too many is refused at once with 429; one that waited too long for its turn ends with 504."""
    guard = Anybody()
    calls = Calls(guard, workers=1, max_in_flight=2, seconds=0.3)  # type: ignore[arg-type]
    inside, leave = threading.Event(), threading.Event()

    def work(fields: Fields, check: Any) -> dict[str, object]:
        inside.set()
        assert leave.wait(5)
        return {}

    headers = Message()
    headers["Content-Type"] = "application/json"
    request = Request("POST", headers, b"{}")
    handle = calls.handler("/x", work)
    found: list[int] = []
    threads = [threading.Thread(target=lambda: found.append(handle(request).status)) for _ in range(2)]
    threads[0].start()
    assert inside.wait(5)
    threads[1].start()
    eventually(lambda: handle(request).status == 429)
    time.sleep(0.4)
    leave.set()
    for thread in threads:
        thread.join(5)
    assert sorted(found) == [200, 504]
    assert {"in_flight", "deadline"} == set(guard.shed_for)


def test_several_cache_groups() -> None:
    """Of a rank with several KV-cache groups only the core's own match is said: other ranks and tiers say less."""
    held = [[("p", 0, 0, 0, False), ("p", 0, 0, 1, False), ("p", 1, 0, 0, False), ("p", 1, 1, 1, False)]] * 3
    tiers = ["gpu", "cpu", "disk"]
    score = PodScore("p", 3.0, 3, 0, {"gpu": 3})
    assert _reaches([score], held, tiers) == {
        "p": {0: _Reach(3, {"gpu": 3}, {"gpu": 3, "cpu": 3, "disk": 3})},
    }
    score.tier_blocks = {"gpu": 2, "cpu": 1}
    assert _reaches([score], held, tiers)["p"][0] == _Reach(3, {}, {"cpu": 3, "disk": 3})


def test_what_is_only_placed_does_not_count() -> None:
    """A router's own decision is no match yet, on no tier."""
    held = [[("p", 0, 1, 0, False), ("p", 0, 0, 0, True)], [("p", 0, 0, 0, True)]]
    found = _reaches([PodScore("p", 2.0, 1, 0, {"cpu": 1}, 1)], held, ["gpu", "cpu"])
    assert found == {"p": {0: _Reach(1, {"gpu": 0, "cpu": 1}, {"gpu": 0, "cpu": 1})}}
