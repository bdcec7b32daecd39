"""The command `kvindex` as a person runs it: processes of their own against a real server and real sockets."""

import base64
import contextlib
import http.server
import json
import os
import pty
import re
import select
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
import zmq
from event_encoding import Stored, maps
from publisher import Publisher, free_port
from tokenizers_at_hand import byte_level

from kvindex_server.commands import completion, screen
from kvindex_server.commands.connection import unavailable
from kvindex_server.commands.main import COMMANDS, parser
from kvindex_server.pb.kvindex.v1 import kvindex_pb2 as pb
from kvindex_server.pb.kvindex.v1 import kvindex_pb2_grpc as rpc
from kvindex_server.tokenize.registry import load_tokenizer

KVINDEX = str(Path(sys.executable).parent / "kvindex")
GOLDEN = Path(__file__).parent / "golden"
PROMPT = "the quick brown fox jumps over the lazy dog, doesn't it? I'll say we've 1234 reasons"
TEMPLATE = "{% for m in messages %}<|user|>{{ m.content }}<|end|>{% endfor %}"
CHAT = json.dumps({"messages": [{"role": "user", "content": PROMPT}]})


@dataclass(frozen=True)
class Done:
    """An ended process."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def kvindex(*words: str, stdin: str = "", timeout: float = 60) -> Done:
    """Runs the installed command."""
    done = subprocess.run(
        [KVINDEX, *words],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
    )
    return Done(done.returncode, done.stdout, done.stderr)


class ServerProcess:
    """`kvindex serve` with these flags."""

    def __init__(self, *flags: str) -> None:
        command = [KVINDEX, "serve", "--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0", *flags]
        self._popen = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert self._popen.stdout is not None
        self.line = self._popen.stdout.readline()
        found = re.search(r"listening grpc=(\S+) metrics=\S+(?: admin=(\S+))?", self.line)
        assert found is not None, self.line
        self.address, self.admin_address = found[1], found[2] or found[1]

    def close(self) -> int:
        self._popen.send_signal(signal.SIGTERM)
        self._popen.communicate(timeout=20)
        return self._popen.returncode


@dataclass
class Site:
    """A server with a tokenizer, and a pod `a` that holds the chat's blocks, the last one on cpu."""

    address: str
    tokens: list[int]
    prompt_tokens: list[int]
    publisher: Publisher

    @property
    def server(self) -> tuple[str, str]:
        return "--server", self.address

    @property
    def blocks(self) -> int:
        return len(self.tokens) // 4


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    directory = tmp_path_factory.mktemp("site")
    byte_level().save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    tokenizer = load_tokenizer(directory)
    tokens, prompt_tokens = (
        list(struct.unpack(f"<{len(raw) // 4}I", raw))
        for raw in (tokenizer.encode_chat(CHAT), tokenizer.encode_prompt(PROMPT))
    )
    config = directory / "k.yaml"
    with Publisher() as publisher:
        pod = {"pod": "a", "model": "m", "endpoint": publisher.endpoint, "replay_endpoint": publisher.replay_endpoint}
        config.write_text(
            json.dumps({"models": [{"name": "m", "block_size": 4, "tokenizer": str(directory)}], "pods": [pod]})
        )
        last = len(tokens) // 4 - 1
        publisher.publish(
            maps(
                Stored([100 + each for each in range(last)], None, tokens[: last * 4], 4),
                Stored([100 + last], 100 + last - 1, tokens[last * 4 : last * 4 + 4], 4, "CPU"),
            )
        )
        server = ServerProcess("--config", str(config))
        try:
            with grpc.insecure_channel(server.address) as channel:
                read = rpc.KVIndexStub(channel)
                ends = time.monotonic() + 20
                while time.monotonic() < ends:
                    try:
                        answer = read.Score(
                            pb.ScoreRequest(model="m", tokens=pb.Tokens(ids=tokens)), wait_for_ready=True, timeout=10
                        )
                    except grpc.RpcError:
                        time.sleep(0.05)
                        continue
                    if answer.scores[0].matched_blocks == last + 1:
                        break
                else:
                    raise AssertionError("the events did not arrive")
            yield Site(server.address, tokens, prompt_tokens, publisher)
        finally:
            assert server.close() == 0


# --- asking ---


def test_score_of_a_chat_file_draws_a_bar_by_tier(site: Site, tmp_path: Path) -> None:
    file = tmp_path / "chat.json"
    file.write_text(CHAT)
    done = kvindex("score", *site.server, "--model", "m", "--chat", str(file))
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert lines[0] == f"{len(site.tokens)} tokens, {site.blocks} full blocks of 4"
    assert re.match(rf"a +0 +[0-9.]+ +{site.blocks}/{site.blocks} 100%  █+▓+  EXACT$", lines[2]), lines[2]
    piped = kvindex("score", *site.server, "--model", "m", "--chat", "-", stdin=CHAT)
    assert piped.out == done.out


def test_score_takes_text_tokens_and_keys_and_says_the_same(site: Site, tmp_path: Path) -> None:
    file = tmp_path / "tokens.json"
    file.write_text(json.dumps({"tokens": site.tokens}))
    base = ("score", *site.server, "--model", "m", "--json")
    by_tokens = kvindex(*base, "--tokens", ",".join(map(str, site.tokens))).json
    assert kvindex(*base, "--tokens", f"@{file}").json["scores"][0]["score"] == by_tokens["scores"][0]["score"]
    assert by_tokens["scores"][0]["tier_blocks"] == {"gpu": site.blocks - 1, "cpu": 1}
    explained = kvindex("explain", *site.server, "--model", "m", "--json", "--chat", "-", stdin=CHAT).json
    by_keys = kvindex(*base, "--keys", " ".join(explained["keys"])).json
    assert by_keys["scores"][0]["matched_blocks"] == site.blocks
    by_text = kvindex(*base, "--prompt", PROMPT).json
    assert by_text["total_tokens"] == len(site.prompt_tokens)


def test_pods_shows_the_stream(site: Site) -> None:
    done = kvindex("pods", *site.server)
    assert done.code == 0
    head, row = done.out.splitlines()
    assert head.split()[:6] == ["pod", "rank", "model", "state", "trust", "blocks"]
    assert row.split()[:6] == ["a", "0", "m", "LIVE", "EXACT", str(site.blocks)]
    (stream,) = kvindex("pods", *site.server, "--json").json["streams"]
    assert (stream["pod"], stream["trust"], stream["blocks"]) == ("a", "TRUST_EXACT", str(site.blocks))


def test_watch_shows_it_again_and_again(site: Site) -> None:
    done = kvindex("watch", *site.server, "--count", "2", "--interval", "0.1")
    assert done.code == 0
    assert len(re.findall(r"1 streams, 1 EXACT", done.out)) == 2
    lines = kvindex("watch", *site.server, "--count", "2", "--interval", "0.1", "--json").out.splitlines()
    assert [json.loads(line)["streams"][0]["pod"] for line in lines] == ["a", "a"]


def test_watch_ends_with_a_signal(site: Site) -> None:
    # A job in the background of a shell, as these tests may be, is born with this signal ignored.
    command = ["env", "--default-signal=INT", KVINDEX, "watch", *site.server]
    popen = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert popen.stdout is not None
    assert "1 EXACT" in popen.stdout.readline()
    popen.send_signal(signal.SIGINT)
    _, err = popen.communicate(timeout=20)
    assert (popen.returncode, err) == (130, "")


def test_watch_outlives_a_restart_of_the_server(tmp_path: Path) -> None:
    address, config = f"127.0.0.1:{free_port()}", tmp_path / "k.yaml"
    config.write_text(json.dumps({"pods": [{"pod": "p", "model": "m", "endpoint": f"tcp://127.0.0.1:{free_port()}"}]}))
    server = ServerProcess("--listen", address)
    popen = subprocess.Popen(
        [KVINDEX, "watch", "--server", address, "--interval", "0.2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert popen.stdout is not None and popen.stderr is not None
    try:
        assert "0 streams" in popen.stdout.readline()
        server.close()
        assert address in popen.stderr.readline()
        server = ServerProcess("--listen", address, "--config", str(config))
        assert any("1 streams" in line for line in popen.stdout)
    finally:
        server.close()
        popen.send_signal(signal.SIGTERM)
        popen.communicate(timeout=20)


def test_blocks_by_prompt_and_by_engine_hash(site: Site) -> None:
    done = kvindex("blocks", *site.server, "--model", "m", "--chat", "-", stdin=CHAT)
    assert done.code == 0
    rows = [line.split() for line in done.out.splitlines()[1:]]
    assert [row[2] for row in rows] == ["a/0:gpu"] * (site.blocks - 1) + ["a/0:cpu"]
    by_hash = kvindex("blocks", *site.server, "--model", "m", "--engine-hashes", "100 0x1")
    assert [line.split()[1:] for line in by_hash.out.splitlines()[1:]] == [[rows[0][1], "a/0:gpu"], ["-", "-"]]
    none = kvindex("blocks", *site.server, "--model", "m")
    assert (none.code, none.err.count("\n")) == (2, 1)


def test_explain_says_where_the_match_ends(site: Site) -> None:
    longer = [*site.tokens[: site.blocks * 4], 1, 2, 3, 4]
    done = kvindex("explain", *site.server, "--model", "m", "--tokens", ",".join(map(str, longer)))
    assert done.code == 0
    assert f"a: NEVER_STORED: no pod holds block {site.blocks}; here it was never stored" in done.out


def test_check_fails_by_exit_code_with_a_remedy(site: Site) -> None:
    well = kvindex("check", *site.server, "--model", "m", "--pod", "a", "--chat", "-", stdin=CHAT)
    assert well.code == 0, well.out
    assert re.search(rf"pass +probe +{site.blocks} of {site.blocks} blocks are held by a", well.out)
    same = ",".join(map(str, site.tokens))
    base = ("check", *site.server, "--model", "m", "--pod", "a", "--chat", "-", "--engine-tokens")
    agreed = kvindex(*base, same, stdin=CHAT)
    assert agreed.code == 0
    assert f"all {len(site.tokens)} tokens of the probe are equal" in agreed.out
    wrong = kvindex(*base, same + ",5", "--problems", stdin=CHAT)
    assert wrong.code == 1
    assert "FAIL  tokens_agree" in wrong.out
    assert "-> Give the server the engine's own tokenizer directory and chat template." in wrong.out
    assert "pass  " not in wrong.out
    stranger = kvindex("check", *site.server, "--model", "m", "--pod", "b", "--json")
    assert stranger.code == 1
    bad = [each for each in stranger.json["checks"] if each["name"] == "candidates"]
    assert [(each["pod"], each["status"]) for each in bad] == [("b", "CHECK_STATUS_FAIL"), ("a", "CHECK_STATUS_WARN")]


@contextlib.contextmanager
def tokenizing(tokens: list[int] | None) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """An engine's HTTP port: its address, and what it was asked. Without tokens it knows no such model."""
    asked: list[dict[str, Any]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append({"path": self.path, **body})
            answer = json.dumps({"tokens": tokens}).encode()
            self.send_response(200 if tokens is not None else 404)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


def test_check_asks_the_engine_itself_for_its_tokens(site: Site) -> None:
    """Chat and prompt as /tokenize wants them; equal is well, another template or tokenizer is not."""
    base = ("check", *site.server, "--model", "m", "--pod", "a", "--engine")
    with tokenizing(site.tokens) as (url, asked):
        agreed = kvindex(*base, url, "--chat", "-", stdin=CHAT)
        assert agreed.code == 0, agreed.out + agreed.err
        assert f"all {len(site.tokens)} tokens of the probe are equal" in agreed.out
        assert "the chat becomes the engine's tokens, its template included" in agreed.out
        (chat,) = asked
        assert (chat["path"], chat["model"], chat["add_special_tokens"]) == ("/tokenize", "m", False)
        assert chat["messages"] == json.loads(CHAT)["messages"]
        other = kvindex(*base, f"{url}/tokenize", "--prompt", PROMPT, "--problems")
        assert (other.code, asked[1]["prompt"], asked[1]["add_special_tokens"]) == (1, PROMPT, True)
        assert "FAIL  tokens_agree" in other.out
    with tokenizing(None) as (url, _):
        refused = kvindex(*base, url, "--prompt", PROMPT)
    assert (refused.code, refused.out) == (3, "")
    assert refused.err.startswith(f"kvindex: --engine {url}/tokenize: the engine's tokenize endpoint gives no tokens")
    assert kvindex(*base, "http://127.0.0.1:1", "--prompt", PROMPT).code == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--engine", "10.0.0.7:8000", "--prompt", "x"), "--engine: must have the form http://HOST:PORT"),
        (("--engine", "http://e:1", "--tokens", "1"), "--engine: needs --prompt or --chat"),
        (("--engine", "http://e:1", "--chat", "-"), "chat: not valid JSON"),
    ],
)
def test_an_engine_that_cannot_be_asked_is_wrong_usage(words: tuple[str, ...], message: str) -> None:
    done = kvindex("check", "--model", "m", *words, stdin="{")
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(f"kvindex: {message}")


def test_check_leaves_out_what_is_well_from_json_too(site: Site) -> None:
    everything = kvindex("check", *site.server, "--json").json
    problems = kvindex("check", *site.server, "--json", "--problems").json
    bad = ("CHECK_STATUS_WARN", "CHECK_STATUS_FAIL")
    assert problems["checks"] == [each for each in everything["checks"] if each["status"] in bad]
    assert 0 < len(problems["checks"]) < len(everything["checks"])
    assert problems["status"] == everything["status"]


def test_serve_tells_where_it_listens_as_json_too() -> None:
    with subprocess.Popen(
        [KVINDEX, "serve", "--json", "--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as popen:
        assert popen.stdout is not None
        where = json.loads(popen.stdout.readline())
        popen.send_signal(signal.SIGTERM)
        assert popen.wait(20) == 0
    assert sorted(where) == ["grpc", "metrics"]
    assert all(re.fullmatch(r"127\.0\.0\.1:[1-9]\d*", address) for address in where.values())


def test_strict_check_fails_for_a_warning(site: Site) -> None:
    asked = ("check", *site.server, "--model", "m", "--tokens", "1,2,3,4,1,2,3,4")
    assert kvindex(*asked).code == 0
    assert kvindex(*asked, "--strict").code == 1


def test_bench_times_calls(site: Site) -> None:
    words = ("bench", *site.server, "--model", "m", "--seconds", "0.5", "--in-flight", "2", "--length", "64", "--json")
    done = kvindex(*words)
    assert done.code == 0
    assert done.json["calls"] > 0
    assert 0 < done.json["p50_ms"] <= done.json["p99_ms"] <= done.json["max_ms"]


def test_bench_without_time_for_a_call_is_wrong_usage(site: Site) -> None:
    done = kvindex("bench", *site.server, "--model", "m", "--length", "1", "--seconds", "1e-7")
    assert (done.code, done.out) == (2, "")
    assert done.err == "kvindex: --seconds: 1e-07 s are too short for a single call\n"


def on_terminal(columns: int, *words: str) -> list[str]:
    """The lines that a command writes to a terminal of this width."""
    child, terminal = pty.fork()
    if child == 0:
        os.execve(KVINDEX, [KVINDEX, *words], {**os.environ, "COLUMNS": str(columns), "PYTHONIOENCODING": "utf-8"})
    seen = b""
    try:
        while True:
            try:
                part = os.read(terminal, 65536)
            except OSError:  # the child has ended
                break
            if not part:
                break
            seen += part
    finally:
        os.close(terminal)
        os.waitpid(child, 0)
    return seen.decode().replace("\r", "").splitlines()


def test_on_a_terminal_everything_fits(site: Site) -> None:
    """Sentences are wrapped between words, and the bar gives way to the numbers; a pipe gets whole lines."""
    pods = on_terminal(96, "pods", *site.server)
    assert max(map(screen.breadth, pods)) <= 96
    assert "█" in "".join(pods) and "restarts" in pods[0]
    check = ("check", *site.server, "--model", "m", "--pod", "nobody")
    shown, piped = on_terminal(80, *check), kvindex(*check).out
    assert max(map(screen.breadth, shown)) < 80
    assert " ".join(" ".join(shown).split()) == " ".join(piped.split())
    assert max(map(len, piped.splitlines())) > 100


def test_alone_it_says_what_there_is() -> None:
    done = kvindex()
    assert (done.code, done.out) == (2, "")
    assert all(name in done.err for name in COMMANDS)


# --- failures ---


def test_nobody_listens() -> None:
    server = f"127.0.0.1:{free_port()}"
    done = kvindex("pods", "--server", server)
    assert (done.code, done.out) == (3, "")
    assert done.err == (
        f"kvindex: nobody listens at {server}: connection refused. Is kvindex-server running there? (--server)\n"
    )


def test_an_unknown_model_names_the_known_ones(site: Site) -> None:
    done = kvindex("score", *site.server, "--model", "nope", "--tokens", "1")
    assert done.code == 1
    assert done.err == "kvindex: NOT_FOUND: model: 'nope' is neither configured nor seen; known are: m\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("score", "--model", "m", "--tokens", "1,x"),
            "--tokens: must be numbers, as 1,2,3, or @FILE with a JSON list",
        ),
        (("score", "--model", "m", "--tokens", "[1, 2.5]"), "--tokens: must be numbers, as 1,2,3, or @FILE"),
        (("pods", "--token-file", os.devnull), "/dev/null: must hold one token, on one line and in printable ASCII"),
        (("score", "--model", "m", "--tokens", "4294967296"), "--tokens: every number must be in 0..2^32-1"),
        (("score", "--model", "m", "--tokens", ""), "--tokens: must not be empty"),
        (("score", "--model", "m", "--chat", "/nowhere"), "/nowhere: cannot be read: No such file or directory"),
        (("pods", "--token-file", "/nowhere"), "/nowhere: cannot read the token: No such file or directory"),
        (("pods", "--tls-cert", "x"), "--tls-cert and --tls-key go together"),
        (("capture", "/tmp/none", "--endpoint", "x"), "--endpoint: must have the form tcp://host:port"),
        (("replay", "/nowhere"), "/nowhere/frames.jsonl: cannot be read: No such file or directory"),
        (("replay", "/nowhere", "--register", "p"), "--register needs --model"),
        (("replay", "/nowhere", "--linger", "nan"), "--linger: must be 0 or more"),
        (("simulate", "--pods", "0"), "--pods must be in 1..256"),
        (("simulate", "--rate", "nan"), "--pods must be in 1..256, --rate above 0"),
        (("score", "--model", "m", "--tokens", "1", "--top", "-1"), "--top must be in 0..2^32-1"),
        (("score", "--model", "m", "--tokens", "1", "--top", "5000000000"), "--top must be in 0..2^32-1"),
        (("score", "--model", "\udcff", "--tokens", "1"), "'\\udcff' is not UTF-8"),
        (("pods", "--model", "a\udce9"), "'a\\udce9' is not UTF-8"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_2(words: tuple[str, ...], message: str) -> None:
    done = kvindex(*words)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(f"kvindex: {message}")
    assert done.err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "last"),
    [
        (("simulate", "--seconds", "-1"), "kvindex simulate: argument --seconds: must be above 0"),
        (("simulate", "--restart-every", "nan"), "kvindex simulate: argument --restart-every: must be 0 or more"),
        (("watch", "--interval", "-1"), "kvindex watch: argument --interval: must be above 0"),
        (("watch", "--count", "0"), "kvindex watch: argument --count: must be a whole number of 1 or more"),
        (("pods", "--timeout", "0"), "kvindex pods: argument --timeout: must be above 0"),
        (("pods", "--timeout", "soon"), "kvindex pods: argument --timeout: must be a number, not 'soon'"),
    ],
)
def test_a_number_out_of_bounds_is_wrong_usage(words: tuple[str, ...], last: str) -> None:
    done = kvindex(*words)
    assert (done.code, done.out) == (2, "")
    assert done.err.splitlines()[-1] == last


def test_a_list_nested_without_end_is_wrong_usage(tmp_path: Path) -> None:
    (tmp_path / "deep.json").write_text("[" * 100_000)
    done = kvindex("score", "--model", "m", "--tokens", f"@{tmp_path / 'deep.json'}")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert done.err.startswith("kvindex: --tokens: must be numbers")


@pytest.mark.parametrize("option", ["--endpoint", "--replay-endpoint"])
def test_a_port_that_there_is_not_is_refused(option: str) -> None:
    """ZeroMQ itself takes 99999 for 34463."""
    done = kvindex("replay", str(GOLDEN / "sglang-0.5.23" / "page16"), option, "tcp://127.0.0.1:99999")
    assert (done.code, done.out, done.err) == (2, "", f"kvindex: {option}: port must be in 1..65535\n")


@pytest.mark.parametrize(
    ("details", "tls", "message"),
    [
        ("not ready: the first synchronisation is not over", False, "s:1 is not ready: not ready: the first"),
        ("failed to connect to all addresses; last error: UNKNOWN: connect: Connection refused (111)", False, "nobody"),
        ("errors resolving dns-less.example:50051: [Domain name not found]", False, "s:1 cannot be resolved"),
        ("DNS resolution failed for s:1", False, "s:1 cannot be resolved"),
        ("empty address list: name resolution", False, "s:1 cannot be resolved"),
        ("last error: UNKNOWN: Hostname Verification Check failed.", True, "no TLS connection to s:1: its certificate"),
        ("Ssl handshake failed: CERTIFICATE_VERIFY_FAILED", True, "no TLS connection to s:1: Ssl handshake failed"),
        ("Socket closed", False, "no connection to s:1: Socket closed; does it want TLS (--tls-ca)?"),
        ("Socket closed", True, "no connection to s:1: Socket closed; does it want a client certificate (--tls-cert, "),
        ("failed to connect to all addresses; last error: timeout", False, "no connection to s:1: failed to connect"),
        ("no replica follows this pod yet", False, "s:1 cannot answer: no replica follows this pod yet"),
    ],
)
def test_unavailable_says_what_is_meant(details: str, tls: bool, message: str) -> None:
    assert unavailable("s:1", details, tls=tls).startswith(message)


def test_a_mistyped_host_is_not_called_a_server_that_is_not_ready() -> None:
    done = kvindex("pods", "--server", "nowhere.invalid:50051")
    assert (done.code, done.err) == (3, "kvindex: nowhere.invalid:50051 cannot be resolved (--server HOST:PORT)\n")


@pytest.mark.parametrize(
    ("words", "last"),
    [
        (("scroe",), "kvindex: argument COMMAND: invalid choice: 'scroe'; did you mean score? (one of score, "),
        (
            ("score", "--modle", "m", "--tokens", "1"),
            "kvindex score: the following arguments are required: --model; unknown option: --modle; "
            "did you mean --model?",
        ),
        (("score", "--tokens", "1"), "kvindex score: the following arguments are required: --model"),
        (("pods", "--modle", "m"), "kvindex pods: unknown option: --modle; did you mean --model?"),
        (("pods", "--sever=x"), "kvindex pods: unknown option: --sever; did you mean --server?"),
        (("pods", "x"), "kvindex pods: unknown argument: x"),
        (("completion", "bahs"), "kvindex completion: argument shell: invalid choice: 'bahs'; did you mean bash?"),
        (("serve", "--metric-listen", "x"), "kvindex serve: unknown option: --metric-listen; did you mean --metrics-"),
    ],
)
def test_something_mistyped_names_what_was_meant(words: tuple[str, ...], last: str) -> None:
    done = kvindex(*words)
    assert (done.code, done.out) == (2, "")
    assert done.err.splitlines()[-1].startswith(last)


def test_a_mistyped_name_is_met_with_the_known_one(site: Site, tmp_path: Path) -> None:
    with Publisher() as publisher, grpc.insecure_channel(site.address) as channel:
        admin = rpc.KVIndexAdminStub(channel)
        spec = pb.RegisterPodRequest(pod="10.0.0.7:8000", model="qwen3-32b", endpoint=publisher.endpoint)
        admin.RegisterPod(spec, timeout=10)
        model = kvindex("score", *site.server, "--model", "qwen-32b", "--tokens", "1")
        pod = kvindex("capture", str(tmp_path / "c"), *site.server, "--pod", "10.0.0.7:800")
        admin.UnregisterPod(pb.UnregisterPodRequest(pod=spec.pod, model=spec.model), timeout=10)
    assert model.err.rstrip().endswith("did you mean qwen3-32b?")
    assert pod.err.rstrip().endswith("; did you mean 10.0.0.7:8000?")


@pytest.mark.parametrize("words", [("fly",), ("score",), ("score", "--model", "m", "--prompt", "a", "--keys", "1")])
def test_argparse_refuses(words: tuple[str, ...]) -> None:
    done = kvindex(*words)
    assert done.code == 2
    assert "usage: kvindex" in done.err


def test_a_server_that_is_not_ready_says_so(tmp_path: Path) -> None:
    config = tmp_path / "k.yaml"
    pod = {"pod": "p", "model": "m", "endpoint": f"tcp://127.0.0.1:{free_port()}"}
    pod["replay_endpoint"] = f"tcp://127.0.0.1:{free_port()}"
    config.write_text(json.dumps({"server": {"ready_timeout_seconds": 600}, "pods": [pod]}))
    server = ServerProcess("--config", str(config))
    try:
        done = kvindex("score", "--server", server.address, "--model", "m", "--tokens", "1")
        assert done.code == 3
        assert "is not ready" in done.err
        # The doctor answers all the same.
        check = kvindex("check", "--server", server.address)
        assert check.code == 1
        assert re.search(r"FAIL  events_heard +p rank 0: nothing heard, and tcp://\S+ does not accept", check.out)
    finally:
        server.close()


def test_tls_tokens_and_an_admin_port_of_its_own(tmp_path: Path) -> None:
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    certificate.private_key_pem.write_to_path(str(tmp_path / "key.pem"))
    certificate.cert_chain_pems[0].write_to_path(str(tmp_path / "cert.pem"))
    (tmp_path / "reader").write_text("reader-token-0123456789abcdef\n")
    (tmp_path / "operator").write_text("operator-token-0123456789abcdef\n")
    config = tmp_path / "k.yaml"
    config.write_text(
        json.dumps(
            {
                "models": [{"name": "m", "block_size": 4}],
                "tls": {"cert_file": str(tmp_path / "cert.pem"), "key_file": str(tmp_path / "key.pem")},
                "auth": {"tokens_file": str(tmp_path / "reader"), "admin_tokens_file": str(tmp_path / "operator")},
            }
        )
    )
    server = ServerProcess("--config", str(config), "--admin-listen", "127.0.0.1:0")
    try:
        assert server.admin_address != server.address
        tls = ("--server", server.address, "--tls-ca", str(tmp_path / "ca.pem"))
        admin = (*tls, "--admin", server.admin_address)
        score = ("score", "--model", "m", "--tokens", "1,2,3,4")
        reader, operator = ("--token-file", str(tmp_path / "reader")), ("--token-file", str(tmp_path / "operator"))
        assert kvindex(*score, *tls, *reader).code == 0
        assert kvindex("pods", *admin, *operator).code == 0
        assert kvindex(*score, *tls).code == 4
        refused = kvindex("pods", *admin, *reader)
        assert refused.code == 4
        assert f"{server.admin_address} does not allow this" in refused.err
        misplaced = kvindex("pods", *tls, *operator)
        assert misplaced.code == 1
        assert "--admin" in misplaced.err
        plain = kvindex(*score, "--server", server.address, *reader)
        assert plain.code == 3
        assert "--tls-ca" in plain.err
    finally:
        server.close()


# --- recording and playing ---


def test_a_capture_is_what_was_sent_byte_for_byte(tmp_path: Path) -> None:
    with Publisher(topic=b"kv@a@m") as publisher:
        payloads = [maps(Stored([number], None, [number] * 4, 4)) for number in range(1, 6)]
        for payload in payloads[:2]:
            publisher.publish(payload)
        where = ("--endpoint", publisher.endpoint, "--replay-endpoint", publisher.replay_endpoint)
        popen = subprocess.Popen(
            [KVINDEX, "capture", str(tmp_path / "c"), *where, "--messages", "3", "--json"],
            stdout=subprocess.PIPE,
            text=True,
        )
        publisher.wait_subscriber(30)
        for payload in payloads[2:]:
            publisher.publish(payload)
        out, _ = popen.communicate(timeout=30)
    assert popen.returncode == 0
    told = json.loads(out)
    assert (told["heard"], told["holes"], told["bad"]) == (3, 0, 0)
    assert [(each["rank"], each["first"], each["last"], each["replay"]) for each in told["ranks"]] == [
        (0, 2, 4, "complete")
    ]
    frames = [json.loads(line)["frames"] for line in (tmp_path / "c" / "frames.jsonl").read_text().splitlines()]
    assert [[base64.b64decode(each) for each in message] for message in frames] == [
        [b"kv@a@m", number.to_bytes(8, "big"), payloads[number]] for number in (2, 3, 4)
    ]
    replayed = [json.loads(line)["frames"] for line in (tmp_path / "c" / "replay.jsonl").read_text().splitlines()]
    assert [base64.b64decode(each) for each in replayed[0]] == [b"", b"kv@a@m", bytes(8), payloads[0]]
    assert base64.b64decode(replayed[-1][-2]) == b"\xff" * 8


@contextlib.contextmanager
def engine_of(ranks: int) -> Iterator[list[Publisher]]:
    """Publishers at ports side by side."""
    for _ in range(50):
        ports = [free_port() for _ in range(2)]
        with contextlib.ExitStack() as stack:
            try:
                opened = [
                    stack.enter_context(Publisher(ports[0] + rank, ports[1] + rank, topic=b"kv"))
                    for rank in range(ranks)
                ]
            except zmq.ZMQError:  # one of them is somebody else's
                continue
            yield opened
            return
    raise AssertionError("no ports side by side")


@pytest.mark.parametrize("known_by", ["pod", "endpoint"])
def test_all_ranks_of_an_engine_are_recorded_and_played_again(site: Site, tmp_path: Path, known_by: str) -> None:
    """Each with its replay; played back, every rank holds what the engine's did, and nothing of another's."""
    with engine_of(3) as engine, grpc.insecure_channel(site.address) as channel:
        admin = rpc.KVIndexAdminStub(channel)
        for rank, publisher in enumerate(engine):
            publisher.publish(maps(Stored([rank + 1], None, [rank] * 4, 4)))
        first = engine[0]
        where: tuple[str, ...] = ("--pod", "engine", *site.server)
        if known_by == "pod":
            admin.RegisterPod(
                pb.RegisterPodRequest(
                    pod="engine",
                    model="ranks",
                    endpoint=first.endpoint,
                    replay_endpoint=first.replay_endpoint,
                    ranks=3,
                ),
                timeout=10,
            )
        else:
            where = ("--endpoint", first.endpoint, "--replay-endpoint", first.replay_endpoint, "--ranks", "3")
        popen = subprocess.Popen(
            [KVINDEX, "capture", str(tmp_path / "c"), *where, "--messages", "3", "--json"],
            stdout=subprocess.PIPE,
            text=True,
        )
        listeners = 2 if known_by == "pod" else 1  # the server is one
        ends = time.monotonic() + 30
        while not all(each.replays >= listeners and each.subscriptions >= listeners for each in engine):
            assert time.monotonic() < ends
            time.sleep(0.02)
        for rank, publisher in enumerate(engine):
            publisher.publish(maps(Stored([rank + 11], rank + 1, [rank + 100] * 4, 4)))
        out, _ = popen.communicate(timeout=30)
        if known_by == "pod":
            admin.UnregisterPod(pb.UnregisterPodRequest(pod="engine", model="ranks"), timeout=10)
    assert popen.returncode == 0
    told = json.loads(out)
    assert [
        (each["rank"], each["heard"], each["replayed"], each["first"], each["replay"]) for each in told["ranks"]
    ] == [(rank, 1, 1, 1, "complete") for rank in range(3)]
    played = subprocess.Popen(
        [KVINDEX, "replay", str(tmp_path / "c"), *site.server, "--register", "again", "--model", f"by-{known_by}"],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        with grpc.insecure_channel(site.address) as channel:
            read, admin = rpc.KVIndexStub(channel), rpc.KVIndexAdminStub(channel)
            ends = time.monotonic() + 30
            while True:
                streams = [each for each in admin.ListPods(pb.ListPodsRequest()).streams if each.pod == "again"]
                if [each.blocks for each in streams] == [2] * 3:
                    break
                assert time.monotonic() < ends, streams
                time.sleep(0.02)
            assert {each.trust for each in streams} == {pb.TRUST_EXACT}
            tokens = [pb.Tokens(ids=[rank] * 4 + [rank + 100] * 4) for rank in range(3)]
            answers = [read.Score(pb.ScoreRequest(model=f"by-{known_by}", tokens=each), timeout=5) for each in tokens]
        assert [(each.scores[0].rank, each.scores[0].matched_blocks) for each in answers] == [(0, 2), (1, 2), (2, 2)]
    finally:
        played.send_signal(signal.SIGTERM)
        out, _ = played.communicate(timeout=30)
    assert "3 messages of 3 ranks" in out and "3 messages published" in out


def test_one_rank_of_several_is_recorded_alone(site: Site, tmp_path: Path) -> None:
    with engine_of(2) as engine:
        for publisher in engine:
            publisher.publish(maps(Stored([1], None, [7] * 4, 4)))
        where = ("--endpoint", engine[0].endpoint, "--replay-endpoint", engine[0].replay_endpoint, "--ranks", "2")
        done = kvindex("capture", str(tmp_path / "c"), *where, "--rank", "1", "--seconds", "1.5", "--json")
        assert [each.replays for each in engine] == [0, 1]
    assert [(each["rank"], each["replayed"]) for each in done.json["ranks"]] == [(1, 1)]
    assert (tmp_path / "c" / "replay.jsonl").exists()
    none = kvindex("capture", str(tmp_path / "d"), "--pod", "a", "--rank", "4", *site.server)
    assert (none.code, none.err) == (1, "kvindex: pod 'a' has no rank 4; it has 0\n")


def test_a_recording_without_one_of_its_ranks_is_refused(tmp_path: Path) -> None:
    for rank in (0, 2):
        (tmp_path / f"rank-{rank}").mkdir()
        (tmp_path / f"rank-{rank}" / "frames.jsonl").write_text("")
    done = kvindex("replay", str(tmp_path))
    assert (done.code, done.err) == (2, f"kvindex: {tmp_path}: the recording has no rank-1\n")


@pytest.mark.parametrize("place", [".", "rank-1"])
def test_a_capture_is_never_overwritten_unasked(tmp_path: Path, place: str) -> None:
    """Of one rank or of several; asked to, it leaves nothing of the old one and all that is not a recording."""
    old = tmp_path / place / "frames.jsonl"
    old.parent.mkdir(exist_ok=True)
    old.write_text("precious")
    (tmp_path / place / "notes").write_text("mine")
    words = ("capture", str(tmp_path), "--endpoint", f"tcp://127.0.0.1:{free_port()}", "--seconds", "0.1")
    done = kvindex(*words)
    assert (done.code, done.err) == (2, f"kvindex: {tmp_path} has a recording already (--overwrite)\n")
    assert old.read_text() == "precious"
    kvindex(*words, "--overwrite")
    assert (tmp_path / "frames.jsonl").read_text() == ""
    assert place == "." or not old.exists()
    assert (tmp_path / place / "notes").read_text() == "mine"


def test_a_capture_that_hears_nothing_fails(tmp_path: Path) -> None:
    words = ("capture", str(tmp_path / "c"), "--endpoint", f"tcp://127.0.0.1:{free_port()}", "--seconds", "0.2")
    done = kvindex(*words)
    assert done.code == 1
    assert "nothing came from" in done.err


@pytest.mark.parametrize("speed", ["0", "200"])
def test_a_replayed_recording_leaves_the_index_as_the_engine_was(site: Site, tmp_path: Path, speed: str) -> None:
    """A recording of a real engine; its second half only in replay.jsonl's reach is asked for, too."""
    case = GOLDEN / "vllm-0.32.0" / "basic-cbor-seed0"
    checkpoint = json.loads((case / "expected.json").read_text())["checkpoints"][-1]
    resident = [entry["hash_u64"] for entry in checkpoint["resident"]]
    # The first half as if it had been published before the recorder came.
    frames = (case / "frames.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "frames.jsonl").write_text("".join(frames[len(frames) // 2 :]))
    shutil.copy(case / "replay.jsonl", tmp_path)
    words = ("--register", "rec", "--model", f"rec-{speed}", "--speed", speed, "--linger", "30")
    popen = subprocess.Popen(
        [KVINDEX, "replay", str(tmp_path), *site.server, *words],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        with grpc.insecure_channel(site.address) as channel:
            admin, read = rpc.KVIndexAdminStub(channel), rpc.KVIndexStub(channel)
            ends = time.monotonic() + 30
            while True:
                assert time.monotonic() < ends
                streams = [each for each in admin.ListPods(pb.ListPodsRequest()).streams if each.pod == "rec"]
                if streams and streams[0].last_sequence == len(frames) - 1:
                    break
                time.sleep(0.05)
            assert (streams[0].trust, streams[0].gaps) == (pb.TRUST_EXACT, 0)
            assert streams[0].blocks == len(resident)
            asked = pb.GetPodsForBlocksRequest(model=f"rec-{speed}", engine_hashes=pb.EngineHashes(ints=resident))
            assert all(block.holders for block in read.GetPodsForBlocks(asked).blocks)
    finally:
        popen.send_signal(signal.SIGTERM)
        out, _ = popen.communicate(timeout=30)
    assert popen.returncode == 0
    assert f"{len(frames) - len(frames) // 2} messages published, 1 replay requests answered" in out
    assert not [each for each in kvindex("pods", *site.server, "--json").json["streams"] if each["pod"] == "rec"]


def test_what_is_played_is_what_was_recorded(tmp_path: Path) -> None:
    """replay into capture: the same frames come out."""
    case = GOLDEN / "sglang-0.5.23" / "page16"
    port, replay_port = free_port(), free_port()
    where = ("--endpoint", f"tcp://127.0.0.1:{port}", "--replay-endpoint", f"tcp://127.0.0.1:{replay_port}")
    frames = (case / "frames.jsonl").read_text().splitlines()
    recorder = subprocess.Popen(
        [KVINDEX, "capture", str(tmp_path / "c"), *where, "--messages", str(len(frames)), "--seconds", "40"],
        stdout=subprocess.PIPE,
        text=True,
    )
    played = kvindex("replay", str(case), *where, "--speed", "0", "--wait", "30", "--linger", "3")
    out, _ = recorder.communicate(timeout=60)
    assert (played.code, recorder.returncode) == (0, 0), out
    copied = (tmp_path / "c" / "frames.jsonl").read_text().splitlines()
    assert [json.loads(each)["frames"] for each in copied] == [json.loads(each)["frames"] for each in frames]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("not json", "is no recording"),
        ("[]", "is no recording"),
        ('{"frames": ["*"]}', ":1: frames must be a list of base64 strings"),
        ('{"frames": ["", "AA==", ""]}', ":1: no event message: sequence_frame"),
        *(
            (f'{{"frames": ["", "AAAAAAAAAAA=", ""], "t": {time}}}', ":1: t must be a time in seconds")
            for time in ('"x"', "null", "NaN", "1e400", "true", "1" * 400)
        ),
        ("[" * 100_000, "is no recording"),
        ("", "the recording is empty"),
    ],
)
def test_a_broken_recording_names_the_line(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "frames.jsonl").write_text(line)
    done = kvindex("replay", str(tmp_path))
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert message in done.err


# --- engines, completion, the rest ---


def test_simulated_engines_are_followed_and_gone_afterwards(site: Site) -> None:
    words = ("simulate", *site.server, "--register", "--model", "sim", "--pods", "2", "--rate", "50", "--seconds", "3")
    popen = subprocess.Popen([KVINDEX, *words, "--json"], stdout=subprocess.PIPE, text=True)
    with grpc.insecure_channel(site.address) as channel:
        admin = rpc.KVIndexAdminStub(channel)
        seen: set[str] = set()
        while popen.poll() is None:
            seen |= {
                each.pod
                for each in admin.ListPods(pb.ListPodsRequest()).streams
                if each.model == "sim" and each.trust == pb.TRUST_EXACT
            }
            time.sleep(0.1)
    out, _ = popen.communicate(timeout=30)
    assert popen.returncode == 0
    *pods, summary = [json.loads(line) for line in out.splitlines()]
    assert seen == {each["pod"] for each in pods} == {"sim-0", "sim-1"}
    assert summary["requests"] > 0
    assert summary["hit_ratio"] > 0
    assert not [each for each in kvindex("pods", *site.server, "--json").json["streams"] if each["model"] == "sim"]


def test_demo_runs_under_this_name_too() -> None:
    done = kvindex("demo", "--once", "--pods", "2", "--seconds", "5", "--rate", "50")
    assert done.code == 0
    assert "requests in" in done.out


def test_demo_as_json() -> None:
    done = kvindex("demo", "--once", "--pods", "2", "--seconds", "5", "--rate", "50", "--json")
    where, summary = [json.loads(line) for line in done.out.splitlines()]
    assert done.code == 0
    assert where.keys() == {"grpc", "metrics"}
    assert (summary["pods"], summary["pods_equal"], summary["failures"]) == (2, 2, 0)
    assert summary["requests"] > 0 and 0 < summary["hit_ratio"] < 1


def test_the_demo_is_asked_by_text_and_its_accuracy_is_seen_live(tmp_path: Path) -> None:
    """With a tokenizer prompts and the page's box work; without anything, predictions meet what engines found."""
    byte_level().save(str(tmp_path / "tokenizer.json"))
    with subprocess.Popen(
        [KVINDEX, "demo", "--pods", "2", "--rate", "50", "--seconds", "60", "--tokenizer", str(tmp_path), "--json"],
        stdout=subprocess.PIPE,
        text=True,
    ) as demo:
        assert demo.stdout is not None
        where = json.loads(demo.stdout.readline())
        ends, held, counted = time.monotonic() + 40, 0, 0.0
        while not (held and counted > 10):
            assert time.monotonic() < ends
            time.sleep(0.1)
            text = "You review code. Name file and line first, then the fault, then the smallest change that helps. "
            asked = ("--server", where["grpc"], "--model", "demo-model", "--prompt", text * 12, "--json")
            held = max((each["matched_blocks"] for each in kvindex("score", *asked).json["scores"]), default=0)
            with urllib.request.urlopen(f"http://{where['metrics']}/metrics", timeout=10) as answer:
                metrics = answer.read().decode()
            found = re.findall(r"^kvindex_usage_error_tokens_count\{.*\} (\S+)$", metrics, re.MULTILINE)
            counted = sum(map(float, found))
        with urllib.request.urlopen(f"http://{where['metrics']}/api/fleet", timeout=10) as answer:
            assert json.loads(answer.read())["prompt"] == "open"
        demo.send_signal(signal.SIGINT)
        assert demo.wait(20) == 0


def complete(script: Path, *words: str) -> list[str]:
    """What bash offers behind these words."""
    line = " ".join(f"'{word}'" for word in words)
    program = (
        f"source {script}; COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _kvindex; "
        "printf '%s\\n' \"${COMPREPLY[@]}\""
    )
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, timeout=20, check=True)
    return done.stdout.split()


def test_bash_completes_commands_options_and_files(tmp_path: Path) -> None:
    script = tmp_path / "kvindex.bash"
    script.write_text(kvindex("completion", "bash").out)
    assert complete(script, "kvindex", "s") == ["score", "simulate", "serve"]
    assert complete(script, "kvindex", "score", "--to") == ["--top", "--tokens", "--token-file"]
    (tmp_path / "recorded").mkdir()
    assert complete(script, "kvindex", "replay", f"{tmp_path}/rec") == [f"{tmp_path}/recorded"]
    assert complete(script, "kvindex", "completion", "f") == ["fish"]
    assert complete(script, "kvindex", "completion", "") == ["--help", "bash", "zsh", "fish"]
    assert complete(script, "kvindex", "serve", "--log-level", "") == ["debug", "info", "warning", "error"]
    assert complete(script, "kvindex", "score", "--chat", f"{tmp_path}/rec") == [f"{tmp_path}/recorded"]
    assert complete(script, "kvindex", "score", "--model", f"{tmp_path}/rec") == []


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not installed")
def test_fish_completes_commands_options_and_files(tmp_path: Path) -> None:
    script = tmp_path / "kvindex.fish"
    script.write_text(kvindex("completion", "fish").out)
    (tmp_path / "recorded").mkdir()

    def offered(line: str) -> list[str]:
        program = f"source {script}; cd {tmp_path}; complete -C '{line}'"
        done = subprocess.run(
            ["fish", "--no-config", "-c", program], capture_output=True, text=True, timeout=30, check=True
        )
        assert done.stderr == ""
        return sorted(each.partition("\t")[0] for each in done.stdout.splitlines())

    assert offered("kvindex sc") == ["score"]
    assert offered("kvindex score --to") == ["--token-file", "--tokens", "--top"]
    assert offered("kvindex replay rec") == ["recorded/"]
    assert offered("kvindex capture --pod rec") == []
    assert offered("kvindex completion f") == ["fish"]


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
def test_zsh_completes_commands_options_and_files(tmp_path: Path) -> None:
    """In an interactive shell on a terminal of its own, by Tab."""
    script = tmp_path / "kvindex.zsh"
    script.write_text(kvindex("completion", "zsh").out)
    (tmp_path / "recorded").mkdir()
    shell, terminal = pty.fork()
    if shell == 0:
        os.chdir(tmp_path)
        os.execvpe("zsh", ["zsh", "-f", "-i"], {**os.environ, "PS1": "", "TERM": "dumb", "HOME": str(tmp_path)})
    seen = b""

    def read_until(words: bytes) -> None:
        nonlocal seen
        ends = time.monotonic() + 20
        while words not in seen:
            assert time.monotonic() < ends and select.select([terminal], [], [], 20)[0], seen
            seen += os.read(terminal, 65536)

    try:
        setup = f"unsetopt zle_bracketed_paste; autoload -U compinit; compinit -u -D; source {script}; print re''ady\n"
        os.write(terminal, setup.encode())
        read_until(b"\r\nready")
        for typed, becomes in (
            (b"kvindex sco\t", b"kvindex score "),
            (b"kvindex score --toke\t", b"kvindex score --token"),
            (b"kvindex pods --token-f\t", b"kvindex pods --token-file "),
            (b"kvindex replay rec\t", b"kvindex replay recorded/"),
            (b"kvindex completion f\t", b"kvindex completion fish "),
        ):
            seen = b""
            os.write(terminal, typed)
            read_until(becomes)
            os.write(terminal, b"\x15")  # takes the line away
    finally:
        os.close(terminal)
        os.kill(shell, signal.SIGKILL)
        os.waitpid(shell, 0)


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_every_completion_script_is_its_shells_language(tmp_path: Path, shell: str) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    script = tmp_path / "script"
    script.write_text(completion.script(shell, parser()))
    done = subprocess.run([shell, "-n", str(script)], capture_output=True, text=True, timeout=20, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_every_command_is_in_every_completion_script() -> None:
    for shell in completion.SHELLS:
        script = completion.script(shell, parser())
        for name in (*COMMANDS, "serve", "demo", "completion"):
            assert re.search(rf"\b{name}\b", script)
        assert "replay-endpoint" in script


def test_help_of_every_command_names_its_options() -> None:
    for name in COMMANDS:
        with pytest.raises(SystemExit) as caught:
            parser().parse_args([name, "--help"])
        assert caught.value.code == 0


def test_a_reader_that_has_seen_enough_is_no_error(site: Site) -> None:
    done = subprocess.run(
        f"{KVINDEX} watch --server {site.address} --interval 0.05 --count 200 | head -n 1",
        shell=True,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "Traceback" not in done.stderr


# --- drawing ---


@pytest.mark.parametrize(
    ("blocks", "total", "placed", "line"),
    [
        ({"gpu": 5}, 10, 0, "█████·····"),
        ({"cpu": 5, "gpu": 5}, 10, 0, "█████▓▓▓▓▓"),
        ({"gpu": 1, "cpu": 1, "disk": 1, "shared": 1}, 4, 0, "██▓▓▓▒▒▒░░"),
        ({"gpu": 1}, 1000, 0, "█·········"),
        ({"gpu": 2}, 10, 3, "██+++·····"),
        ({}, 0, 0, "··········"),
        ({"gpu": 30}, 10, 0, "██████████"),
    ],
)
def test_bar(blocks: dict[str, int], total: int, placed: int, line: str) -> None:
    assert screen.bar(blocks, total, 10, placed) == line


def test_table_aligns_wide_characters() -> None:
    assert screen.table(("pod", "n", "why "), [("節点", "1", "x"), ("a", "22", "y")]) == [
        "pod    n  why",
        "節点   1  x",
        "a     22  y",
    ]


def test_every_documented_command_is_understood() -> None:
    """Of docs/cli.md; what they do is shown above."""
    page = (Path(__file__).parent.parent / "docs" / "cli.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("kvindex ")]
    assert len(lines) > 10
    for line in lines:
        parser().parse_args(shlex.split(line)[1:])
    rows = set(re.findall(r"`([a-z]+)`", page.partition("## Asking")[0]))
    assert rows - {"kvindex"} == {*COMMANDS, "serve", "demo"}
