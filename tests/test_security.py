"""TLS, client certificates, tokens and sockets: real certificates, real connections, rotated while running."""

import contextlib
import hashlib
import http.server
import json
import os
import queue
import ssl
import stat
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import msgpack
import pytest
import trustme
import zmq
from cryptography import x509
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2

from kvindex_server.auth import ReviewSettings, Role, TokenReview
from kvindex_server.config import ConfigError, Settings, load_settings
from kvindex_server.interceptors import DESCRIPTIONS
from kvindex_server.pb.kvindex.v1 import kvindex_pb2 as pb
from kvindex_server.pb.kvindex.v1.kvindex_pb2_grpc import KVIndexAdminStub, KVIndexStub
from kvindex_server.server import Server

READER, OPERATOR, OTHER = "reader-token-0123456789", "operator-token-0123456789", "other-token-0123456789"
ROTATION = 1.2
"""Seconds after which a changed file counts."""


@contextlib.contextmanager
def serving(**settings: Any) -> Iterator[Server]:
    ports = {"listen": "127.0.0.1:0", "metrics_listen": "127.0.0.1:0"}
    server = Server(Settings.model_validate({**ports, **settings}))
    server.start()
    assert server.wait_ready(10)
    try:
        yield server
    finally:
        server.stop(0)


def pems(ca: trustme.CA, folder: Path, name: str = "127.0.0.1") -> tuple[Path, Path]:
    """A certificate for this name, as cert and key files of the folder."""
    made = ca.issue_cert(name, common_name=name)
    cert, key = folder / "tls.crt", folder / "tls.key"
    cert.write_bytes(b"".join(each.bytes() for each in made.cert_chain_pems))
    key.write_bytes(made.private_key_pem.bytes())
    return cert, key


def secure(server: Server, ca: trustme.CA, client: trustme.LeafCert | None = None, port: str = "") -> grpc.Channel:
    chain = b"".join(each.bytes() for each in client.cert_chain_pems) if client else None
    key = client.private_key_pem.bytes() if client else None
    return grpc.secure_channel(
        port or server.grpc_address, grpc.ssl_channel_credentials(ca.cert_pem.bytes(), key, chain)
    )


def stats(channel: grpc.Channel, token: str = "") -> str:
    """The code with which an operator's call ends."""
    metadata = (("authorization", f"Bearer {token}"),) if token else ()
    return code(lambda: KVIndexAdminStub(channel).GetStats(pb.GetStatsRequest(), timeout=5, metadata=metadata))


def score(channel: grpc.Channel, token: str = "") -> str:
    """The code with which a reader's call ends; NOT_FOUND is the answer of a server without any model."""
    metadata = (("authorization", f"Bearer {token}"),) if token else ()
    request = pb.ScoreRequest(model="m", tokens=pb.Tokens(ids=[1]))
    return code(lambda: KVIndexStub(channel).Score(request, timeout=5, metadata=metadata))


def code(call: Callable[[], object]) -> str:
    try:
        call()
    except grpc.RpcError as error:
        return str(error.code().name)
    return "OK"


def test_tls_and_a_rotated_certificate(tmp_path: Path) -> None:
    """Plain text is refused; a new certificate serves new connections without a restart, open ones live on."""
    old, new = trustme.CA(), trustme.CA()
    cert, key = pems(old, tmp_path)
    with serving(tls={"cert_file": str(cert), "key_file": str(key)}) as server, secure(server, old) as open_channel:
        assert stats(open_channel) == "OK"
        with grpc.insecure_channel(server.grpc_address) as plain:
            assert stats(plain) == "UNAVAILABLE"
        with secure(server, new) as early:
            assert stats(early) == "UNAVAILABLE"
        cert.write_bytes(b"half a certificate")  # a rotation half done: the old pair stays in force
        time.sleep(ROTATION)
        with secure(server, old) as still:
            assert stats(still) == "OK"
        pems(new, tmp_path)
        time.sleep(ROTATION)
        with secure(server, new) as rotated:
            assert stats(rotated) == "OK"
        assert stats(open_channel) == "OK"


def test_mtls_a_stranger_and_a_revoked_client(tmp_path: Path) -> None:
    """Only clients of the CA come in, and of them not those whose fingerprint is listed, also on open connections."""
    ca, strangers = trustme.CA(), trustme.CA()
    cert, key = pems(ca, tmp_path)
    client_ca, revoked = tmp_path / "ca.crt", tmp_path / "revoked"
    client_ca.write_bytes(ca.cert_pem.bytes())
    revoked.write_text("# nobody yet\n")
    good, bad = ca.issue_cert("good.example"), ca.issue_cert("bad.example")
    tls = {"cert_file": cert, "key_file": key, "client_ca_file": client_ca, "revoked_file": revoked}
    with serving(tls={name: str(path) for name, path in tls.items()}) as server:
        with secure(server, ca) as nobody, secure(server, ca, strangers.issue_cert("x.example")) as stranger:
            assert (stats(nobody), stats(stranger)) == ("UNAVAILABLE", "UNAVAILABLE")
        with secure(server, ca, good) as first, secure(server, ca, bad) as second:
            assert (stats(first), stats(second), described(second)) == ("OK", "OK", "OK")
            questions: queue.SimpleQueue[pb.ScoreRequest | None] = queue.SimpleQueue()
            questions.put(question := pb.ScoreRequest(model="m", tokens=pb.Tokens(ids=[1])))
            answers = KVIndexStub(second).ScoreStream(iter(questions.get, None), timeout=20)
            assert next(answers).status.code == grpc.StatusCode.NOT_FOUND.value[0]
            leaf = x509.load_pem_x509_certificate(bad.cert_chain_pems[0].bytes())
            from cryptography.hazmat.primitives.serialization import Encoding

            revoked.write_text(hashlib.sha256(leaf.public_bytes(Encoding.DER)).hexdigest().upper() + "  # bad\n")
            time.sleep(ROTATION)
            assert (stats(first), stats(second)) == ("OK", "UNAUTHENTICATED")
            assert (described(first), described(second)) == ("OK", "UNAUTHENTICATED")
            questions.put(question)
            assert code(lambda: next(answers)) == "UNAUTHENTICATED"  # a stream that was open before
            questions.put(None)


def test_the_admin_port_has_its_own_client_ca(tmp_path: Path) -> None:
    """A scheduler's certificate opens the read port and not the admin port."""
    ca, operators = trustme.CA(), trustme.CA()
    cert, key = pems(ca, tmp_path)
    for name, authority in (("readers", ca), ("operators", operators)):
        (tmp_path / name).write_bytes(authority.cert_pem.bytes())
    tls = {"cert_file": cert, "key_file": key, "client_ca_file": tmp_path / "readers"}
    tls["admin_client_ca_file"] = tmp_path / "operators"
    files = {name: str(path) for name, path in tls.items()}
    with serving(tls=files, admin_listen="127.0.0.1:0") as server:
        reader, operator = ca.issue_cert("reader"), operators.issue_cert("operator")
        with secure(server, ca, reader) as channel:
            assert score(channel) == "NOT_FOUND"
        with secure(server, ca, reader, server.admin_address) as channel:
            assert stats(channel) == "UNAVAILABLE"
        with secure(server, ca, operator, server.admin_address) as channel:
            assert stats(channel) == "OK"


def token_files(folder: Path) -> dict[str, str]:
    (folder / "tokens").write_text(f"# of the schedulers\n{READER}\n\n{OTHER}\n")
    (folder / "admins").write_text(OPERATOR + "\n")
    return {"tokens_file": str(folder / "tokens"), "admin_tokens_file": str(folder / "admins")}


def test_bearer_tokens_by_role_and_rotation(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Readers read, operators do both, others nothing; a token taken from the file is worth nothing a second later."""
    with serving(auth=token_files(tmp_path)) as server, grpc.insecure_channel(server.grpc_address) as channel:
        assert [score(channel, each) for each in ("", "wrong" * 5, READER, OTHER, OPERATOR)] == [
            *("UNAUTHENTICATED", "UNAUTHENTICATED"),
            *("NOT_FOUND", "NOT_FOUND", "NOT_FOUND"),
        ]
        assert [stats(channel, each) for each in ("", READER, OPERATOR)] == [
            *("UNAUTHENTICATED", "PERMISSION_DENIED", "OK"),
        ]
        stub = health_pb2_grpc.HealthStub(channel)  # kubelets have no token
        assert stub.Check(health_pb2.HealthCheckRequest(), timeout=5).status == health_pb2.HealthCheckResponse.SERVING
        (tmp_path / "tokens").write_text(OTHER + "\n")
        time.sleep(ROTATION)
        assert (score(channel, READER), score(channel, OTHER)) == ("UNAUTHENTICATED", "NOT_FOUND")
        (tmp_path / "tokens").write_text("short\n")  # refused: what was good stays good
        time.sleep(ROTATION)
        assert score(channel, OTHER) == "NOT_FOUND"
        with urllib.request.urlopen(f"http://{server.metrics_address}/metrics", timeout=5) as answer:
            text = answer.read().decode()
        assert 'kvindex_rpc_shed_total{method="/kvindex.v1.KVIndex/Score",reason="unauthenticated"} 3.0' in text
        assert 'method="/kvindex.v1.KVIndexAdmin/GetStats",reason="permission_denied"} 1.0' in text
    written = "".join(capfd.readouterr()) + text
    assert not any(secret in written for secret in (READER, OTHER, OPERATOR, str(tmp_path / "tls.key")))


def test_streams_and_reflection_need_the_token_too(tmp_path: Path) -> None:
    with serving(auth=token_files(tmp_path)) as server, grpc.insecure_channel(server.grpc_address) as channel:
        assert code(lambda: list(KVIndexStub(channel).ScoreStream(iter(()), timeout=5))) == "UNAUTHENTICATED"
        for version in ("v1", "v1alpha"):
            method = f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo"
            assert code(lambda m=method: list(channel.stream_stream(m)(iter(()), timeout=5))) == "UNAUTHENTICATED"  # type: ignore[misc]


REFLECTION = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"
LIST_SERVICES = reflection_pb2.ServerReflectionRequest(list_services="").SerializeToString()


def described(channel: grpc.Channel, token: str = "") -> str:
    """The code with which a call ends that asks which services there are."""
    metadata = (("authorization", f"Bearer {token}"),) if token else ()
    return code(lambda: list(channel.stream_stream(REFLECTION)(iter([LIST_SERVICES]), timeout=5, metadata=metadata)))


@pytest.mark.parametrize("transport", ["grpcio", "native"])
def test_descriptions_that_stay_open_leave_health_alone(transport: str) -> None:
    """Few are open at once, on threads of their own, and who asks nothing any more is ended."""
    own = [("grpc.use_local_subchannel_pool", 1)]
    release = threading.Event()

    def asked_once() -> Iterator[bytes]:
        yield LIST_SERVICES
        release.wait(30)

    with (
        serving(server={"transport": transport, "message_seconds": 0.5}) as server,
        grpc.insecure_channel(server.grpc_address, own) as busy,
        grpc.insecure_channel(server.grpc_address, own) as channel,
    ):
        try:
            calls = [busy.stream_stream(REFLECTION)(asked_once(), timeout=20) for _ in range(70)]
            answered = [code(lambda call=call: next(call)) for call in calls]  # type: ignore[misc]
            assert answered.count("OK") == DESCRIPTIONS and set(answered) == {"OK", "RESOURCE_EXHAUSTED"}
            stub = health_pb2_grpc.HealthStub(channel)
            assert stub.Check(health_pb2.HealthCheckRequest(), timeout=1).status  # while sixteen are open
            ended = [call.code().name for call, first in zip(calls, answered, strict=True) if first == "OK"]
            assert ended == ["DEADLINE_EXCEEDED"] * DESCRIPTIONS
            assert described(channel) == "OK"
        finally:
            release.set()


def test_a_description_needs_more_than_a_made_up_token(tmp_path: Path) -> None:
    """Kubernetes judges it as it does for every other call."""
    api = ApiServer(ca := trustme.CA())
    (tmp_path / "ca.crt").write_bytes(ca.cert_pem.bytes())
    api.users = {"router": ("router", [])}
    try:
        review = {"url": api.url, "ca_file": str(tmp_path / "ca.crt")}
        with serving(auth={"review": review}) as server, grpc.insecure_channel(server.grpc_address) as channel:
            assert [described(channel, each) for each in ("router", "made-up", "")] == [
                *("OK", "UNAUTHENTICATED", "UNAUTHENTICATED")
            ]
    finally:
        api.close()


def test_an_open_stream_ends_with_its_token(tmp_path: Path) -> None:
    """Its caller is asked again before a request is answered; the next stream is refused like any call."""
    questions: queue.SimpleQueue[pb.ScoreRequest | None] = queue.SimpleQueue()
    with serving(auth=token_files(tmp_path)) as server, grpc.insecure_channel(server.grpc_address) as channel:
        metadata = (("authorization", f"Bearer {READER}"),)
        answers = KVIndexStub(channel).ScoreStream(iter(questions.get, None), timeout=20, metadata=metadata)
        questions.put(question := pb.ScoreRequest(model="m", tokens=pb.Tokens(ids=[1])))
        assert next(answers).status.code == grpc.StatusCode.NOT_FOUND.value[0]
        (tmp_path / "tokens").write_text(OTHER + "\n")
        time.sleep(ROTATION)
        questions.put(question)
        assert code(lambda: next(answers)) == "UNAUTHENTICATED"
        questions.put(None)


def test_only_the_operators_role_can_be_guarded(tmp_path: Path) -> None:
    """With admin tokens alone, reading stays open."""
    (tmp_path / "admins").write_text(OPERATOR)
    auth = {"admin_tokens_file": str(tmp_path / "admins")}
    with serving(auth=auth) as server, grpc.insecure_channel(server.grpc_address) as channel:
        assert (score(channel), stats(channel), stats(channel, OPERATOR)) == ("NOT_FOUND", "UNAUTHENTICATED", "OK")


class ApiServer:
    """As much of a Kubernetes API server as TokenReview needs, over HTTPS."""

    def __init__(self, ca: trustme.CA) -> None:
        self.users: dict[str, tuple[str, list[str]]] = {}
        self.asked: list[dict[str, Any]] = []
        self.down = False
        self.answering = threading.Event()
        self.answering.set()
        api = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                api.answering.wait(20)
                api.asked.append({"path": self.path, "auth": self.headers["Authorization"], **body})
                user = api.users.get(body["spec"]["token"])
                status: dict[str, Any] = {"authenticated": user is not None}
                if user:
                    status |= {"user": {"username": user[0], "groups": []}, "audiences": user[1]}
                answer = json.dumps({"kind": "TokenReview", "status": status}).encode()
                self.send_response(500 if api.down else 201)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_: object) -> None: ...

        self._http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        ca.issue_cert("127.0.0.1").configure_cert(context)
        self._http.socket = context.wrap_socket(self._http.socket, server_side=True)
        self.url = f"https://127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


def test_kubernetes_judges_tokens(tmp_path: Path) -> None:
    """TokenReview: audience, users and roles; judgements are remembered; a silent API server lets nobody in."""
    ca = trustme.CA()
    api = ApiServer(ca)
    (tmp_path / "ca.crt").write_bytes(ca.cert_pem.bytes())
    (tmp_path / "own").write_text("own-token\n")
    review = {
        "url": api.url,
        "ca_file": str(tmp_path / "ca.crt"),
        "token_file": str(tmp_path / "own"),
        "audiences": ["kvindex"],
        "users": ["system:serviceaccount:llm:router"],
        "admin_users": ["system:serviceaccount:llm:operator"],
        "timeout_seconds": 1,
    }
    api.users = {
        "router": ("system:serviceaccount:llm:router", ["kvindex"]),
        "operator": ("system:serviceaccount:llm:operator", ["kvindex"]),
        "elsewhere": ("system:serviceaccount:llm:router", ["other"]),
        "somebody": ("system:serviceaccount:web:shop", ["kvindex"]),
    }
    try:
        with serving(auth={"review": review}) as server, grpc.insecure_channel(server.grpc_address) as channel:
            tokens = ("router", "operator", "elsewhere", "somebody", "made-up", "")
            assert [score(channel, each) for each in tokens] == ["NOT_FOUND"] * 2 + ["UNAUTHENTICATED"] * 4
            assert [stats(channel, each) for each in tokens[:2]] == ["PERMISSION_DENIED", "OK"]
            assert len(api.asked) == 5  # once per token, and not without one
            assert api.asked[0]["path"] == "/apis/authentication.k8s.io/v1/tokenreviews"
            assert api.asked[0]["auth"] == "Bearer own-token" and api.asked[0]["spec"]["audiences"] == ["kvindex"]
            api.down = True
            assert (score(channel, "router"), score(channel, "new")) == ("NOT_FOUND", "UNAVAILABLE")
            api.down = False
            assert score(channel, "new") == "UNAUTHENTICATED"  # the failure was not remembered as a judgement
    finally:
        api.close()


def test_made_up_tokens_crowd_nobody_out(tmp_path: Path) -> None:
    """While the API server keeps strangers waiting, who is known is let in at once, and most strangers do not wait."""
    ca = trustme.CA()
    api = ApiServer(ca)
    (tmp_path / "ca.crt").write_bytes(ca.cert_pem.bytes())
    review = {"url": api.url, "ca_file": str(tmp_path / "ca.crt"), "timeout_seconds": 15}
    api.users = {"router": ("router", [])}
    try:
        with serving(auth={"review": review}) as server, grpc.insecure_channel(server.grpc_address) as channel:
            assert score(channel, "router") == "NOT_FOUND"
            api.answering.clear()
            request = pb.ScoreRequest(model="m", tokens=pb.Tokens(ids=[1]))
            stub = KVIndexStub(channel)
            strangers = [
                stub.Score.future(request, timeout=60, metadata=(("authorization", f"Bearer made-up-{number}"),))
                for number in range(60)
            ]
            ends = time.monotonic() + 10
            while sum(each.done() for each in strangers) < 60 - TokenReview.AT_ONCE:
                assert time.monotonic() < ends
                time.sleep(0.05)
            assert score(channel, "router") == "NOT_FOUND"
            api.answering.set()
            codes = [each.code().name for each in strangers]
            assert codes.count("UNAUTHENTICATED") == TokenReview.AT_ONCE
            assert codes.count("UNAVAILABLE") == 60 - TokenReview.AT_ONCE
    finally:
        api.answering.set()
        api.close()


def test_refusals_are_remembered_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many tokens strangers make up, who was let in is not asked about again."""
    monkeypatch.setattr(TokenReview, "_REMEMBERED", 4)
    asked: list[str] = []

    def ask(_: TokenReview, token: str) -> Role | None:
        asked.append(token)
        return Role.READ if token == "good" else None

    monkeypatch.setattr(TokenReview, "_ask", ask)
    review = TokenReview(ReviewSettings("https://127.0.0.1:1"))
    assert review.role("good", b"good") is Role.READ
    for number in range(20):
        assert review.role(f"bad-{number}", b"%d" % number) is None
    assert review.role("good", b"good") is Role.READ
    assert asked.count("good") == 1 and len(asked) == 21


def test_a_unix_socket_for_a_sidecar(tmp_path: Path) -> None:
    """Owner and group may connect, others may not; the admin service can have a socket of its own."""
    path, admin = tmp_path / "kv.sock", tmp_path / "admin.sock"
    with serving(listen=f"unix:{path}", admin_listen=f"unix:{admin}") as server:
        assert server.grpc_address == f"unix:{path}"
        for each in (path, admin):
            assert stat.S_IMODE(os.stat(each).st_mode) == 0o660
        with grpc.insecure_channel(server.grpc_address) as channel, grpc.insecure_channel(f"unix:{admin}") as other:
            assert (score(channel), stats(channel), stats(other)) == ("NOT_FOUND", "UNIMPLEMENTED", "OK")


@pytest.mark.parametrize("key", ["right", "wrong"])
def test_events_over_curve(tmp_path: Path, key: str) -> None:
    """An engine with CURVE is heard with the right keys; with a wrong server key it is not, and nothing is believed."""
    engine_public, engine_secret = zmq.curve_keypair()
    own_public, own_secret = zmq.curve_keypair()
    keys = {"server": engine_public if key == "right" else zmq.curve_keypair()[0]}
    keys |= {"public": own_public, "secret": own_secret}
    (tmp_path / "curve").write_text("".join(f"{name}={value.decode()}\n" for name, value in keys.items()))
    socket = zmq.Context.instance().socket(zmq.PUB)
    socket.curve_server = True
    socket.curve_publickey, socket.curve_secretkey = engine_public, engine_secret
    port = socket.bind_to_random_port("tcp://127.0.0.1")
    pod = {"pod": "p", "model": "m", "endpoint": f"tcp://127.0.0.1:{port}"}
    settings = {"listen": "127.0.0.1:0", "metrics_listen": "127.0.0.1:0", "pods": [pod]}
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(settings | {"stream": {"curve_keys_file": str(tmp_path / "curve")}}))
    # A process of its own: the keys are those of the whole process.
    command = [sys.executable, "-m", "kvindex_server", "serve", "--config", str(config)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        address = process.stdout.readline().split("grpc=")[1].split()[0]
        event = {"type": "BlockStored", "block_hashes": [1], "parent_block_hash": None, "token_ids": list(range(16))}
        payload = msgpack.packb([1.0, [event | {"block_size": 16, "medium": "GPU"}]])
        with grpc.insecure_channel(address) as channel:
            admin = KVIndexAdminStub(channel)
            blocks = 0
            for sequence in range(60 if key == "right" else 10):
                socket.send_multipart([b"", sequence.to_bytes(8, "big"), payload])
                time.sleep(0.1)
                blocks = next(iter(admin.ListPods(pb.ListPodsRequest(), timeout=5).streams)).blocks
                if blocks:
                    break
        assert blocks == (key == "right")
    finally:
        process.terminate()
        process.wait(20)
        socket.close(linger=0)


def test_reflection_can_be_switched_off() -> None:
    with serving(server={"reflection": False}) as server, grpc.insecure_channel(server.grpc_address) as channel:
        assert described(channel) == "UNIMPLEMENTED"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tls": {"cert_file": "c"}}, "tls.key_file: is required too"),
        ({"tls": {"client_ca_file": "c"}}, "tls.client_ca_file: needs cert_file and key_file"),
        ({"auth": {"tokens_file": "t"}}, "auth.admin_tokens_file: is required with tokens_file"),
        ({"auth": {"review": {"url": "http://x"}}}, "auth.review.url: must start with https://"),
        ({"listen": "unix:kv.sock"}, "listen: must have the form unix:/absolute/path"),
        ({"listen": "unix:/a", "admin_listen": "unix:/a"}, "admin_listen: is the same address as listen"),
    ],
)
def test_settings_that_do_not_fit_together(settings: dict[str, object], message: str, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps(settings))
    with pytest.raises(ConfigError) as caught:
        load_settings({}, {}, file)
    assert str(caught.value).startswith(message)


def test_files_that_do_not_fit_are_told_at_the_start(tmp_path: Path) -> None:
    """A missing file, a token too short, a key of another certificate: one line that names the setting."""
    cert, _ = pems(trustme.CA(), tmp_path)
    (tmp_path / "b").mkdir()
    _, key = pems(trustme.CA(), tmp_path / "b")
    (tmp_path / "short").write_text("abc")
    for settings, message in (
        ({"auth": {"admin_tokens_file": str(tmp_path / "none")}}, "auth.admin_tokens_file: "),
        ({"auth": {"admin_tokens_file": str(tmp_path / "short")}}, "auth.admin_tokens_file: line 1: a token needs"),
        ({"tls": {"cert_file": str(cert), "key_file": str(key)}}, "tls: "),
    ):
        with pytest.raises(ConfigError) as caught, serving(**settings):
            pass
        assert str(caught.value).startswith(message) and "abc" not in str(caught.value)
