"""Every command that the documentation tells to type is typed: against a real server with real streams.

Blocks marked `<!-- runnable -->` are run whole by test_docs.py; here it is all other shell blocks, line by line. A
command that nobody here knows how to run fails the test.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
import yaml
from event_encoding import Stored, maps
from publisher import Publisher
from test_kvindex_cli import tokenizing
from tokenizers_at_hand import byte_level

from kvindex_server.commands.main import COMMANDS, parser
from kvindex_server.config import load_settings
from kvindex_server.pb.kvindex.v1 import kvindex_pb2 as pb
from kvindex_server.pb.kvindex.v1 import kvindex_pb2_grpc as rpc
from kvindex_server.tokenize.registry import load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
TOOLS = Path(sys.executable).parent
PAGES = (
    ROOT / "README.md",
    ROOT / "SECURITY.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "integrations" / "llm-d-router" / "README.md",
)
FENCE = re.compile(r"(<!-- runnable -->\n)?^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`((?:kvindex|kvindex-server|make) [^`\n]+)`")
MODEL = "Qwen/Qwen3-32B"
CHAT = {"messages": [{"role": "user", "content": "You are a helpful assistant. Answer in one line, and say why."}]}
TEMPLATE = "{% for m in messages %}<|user|>{{ m.content }}<|end|>{% endfor %}"

BOUNDED = {
    "watch": ("--count", "1"),
    "capture": ("--seconds", "1.5", "--overwrite"),
    "replay": ("--speed", "0", "--wait", "3", "--linger", "0.5"),
    "simulate": ("--seconds", "2"),
    "bench": ("--seconds", "0.3"),
}
"""What a command gets besides, so that it ends soon; later values win."""

NOT_HERE = {
    "go mod edit": "needs the router's own module, which is not at hand everywhere",
    "go get": "likewise",
    "go mod tidy": "likewise",
    "cd": "leads to those",
}


def blocks(language: str) -> list[tuple[str, str]]:
    """(page, text) of every block of this language that test_docs.py does not run."""
    found = []
    for page in PAGES:
        for runnable, said, text in FENCE.findall(page.read_text(encoding="utf-8")):
            if said == language and not runnable:
                found.append((page.relative_to(ROOT).as_posix(), text))
    return found


def lines() -> list[tuple[str, str]]:
    """(page, command), continued lines joined, comments and empty lines left out."""
    found = []
    for page, text in blocks("sh"):
        for line in text.replace("\\\n", " ").splitlines():
            if line.strip() and not line.lstrip().startswith("#"):
                found.append((page, " ".join(line.split())))
    return found


@dataclass
class Site:
    """A server as the pages take it for granted, and a directory with the files they name."""

    directory: Path
    grpc: str
    http: str
    publisher: Publisher
    engine: str

    def here(self, word: str) -> str:
        """A word of a command with this site's addresses."""
        given = {
            "localhost:50051": self.grpc,
            "127.0.0.1:50051": self.grpc,
            "localhost:8090": self.http,
            "tcp://10.0.0.7:5557": self.publisher.endpoint,
            "tcp://10.0.0.7:5558": self.publisher.replay_endpoint,
            "tcp://10.0.0.7:5657": self.publisher.replay_endpoint,
            "http://10.0.0.7:8000": self.engine,
        }
        for said, real in given.items():
            word = word.replace(said, real)
        return word

    def run(self, *words: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            words,
            cwd=self.directory,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env={**os.environ, "PATH": f"{TOOLS}:{os.environ['PATH']}", **(env or {})},
        )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    directory = tmp_path_factory.mktemp("site")
    byte_level().save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    tokens = list(memoryview(load_tokenizer(directory).encode_chat(json.dumps(CHAT))).cast("I"))
    (directory / "request.json").write_text(json.dumps(CHAT))
    for name in ("tokens.json", "tokenized.json"):
        (directory / name).write_text(json.dumps({"tokens": tokens}))
    with Publisher() as publisher, Publisher() as other, tokenizing(tokens) as (engine, _):
        publisher.publish(maps(Stored([1], None, tokens[:16], 16)))
        pods = [
            {"pod": f"10.0.0.{n}:8000", "model": MODEL, "endpoint": p.endpoint, "replay_endpoint": p.replay_endpoint}
            for n, p in ((7, publisher), (8, other))
        ]
        models = [
            {
                "name": MODEL,
                "block_size": 16,
                "tokenizer": str(directory),
                "loras": ["summaries"],
                "aliases": ["m", "M"],
            },
            {"name": "simulated"},
            {"name": "recorded"},
        ]
        config = directory / "kvindex.yaml"
        config.write_text(json.dumps({"models": models, "pods": pods, "http": {"listen": "127.0.0.1:0"}}))
        server = subprocess.Popen(
            [
                *(TOOLS / "kvindex-server", "serve", "--config", config),
                *("--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0"),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        try:
            assert server.stdout is not None
            found = re.search(r"grpc=(\S+) .*http=(\S+)", server.stdout.readline())
            assert found is not None
            with grpc.insecure_channel(found[1]) as channel:
                ends = time.monotonic() + 20
                asked = pb.ScoreRequest(model=MODEL, tokens=pb.Tokens(ids=tokens))
                while True:
                    try:
                        if rpc.KVIndexStub(channel).Score(asked, timeout=5).scores[0].matched_blocks:
                            break
                    except grpc.RpcError:
                        pass
                    assert time.monotonic() < ends
                    time.sleep(0.05)
            yield Site(directory, found[1], found[2], publisher, engine)
        finally:
            server.send_signal(signal.SIGTERM)
            server.communicate(timeout=20)


def _kvindex(site: Site, words: list[str]) -> None:
    """Of kvindex: really run, against the site's server. A check may find something; everything else must be well."""
    command = words[1]
    if command == "completion":
        assert site.run("bash", "-c", f"source <({shlex.join(words)}); complete -p kvindex").returncode == 0
        return
    words = [site.here(each) for each in words]
    if "--server" not in words:
        words += ["--server", site.grpc]
    done = site.run(*words, *BOUNDED.get(command, ()))
    allowed = (0, 1) if command == "check" else (0,)
    assert done.returncode in allowed, done.stdout + done.stderr
    assert done.stdout


def _serve(_: Site, words: list[str], env: dict[str, str] | None = None) -> None:
    """Of kvindex-server: it starts, says where it listens, and ends with 0."""
    ports = ["--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0"]
    popen = subprocess.Popen(
        [TOOLS / words[0], *words[1:], *ports],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **(env or {})},
    )
    assert popen.stdout is not None
    said = popen.stdout.readline()
    popen.send_signal(signal.SIGTERM)
    _, errors = popen.communicate(timeout=30)
    assert said.startswith("listening grpc="), errors
    assert popen.returncode == 0


def _grpcurl(site: Site, words: list[str]) -> None:
    if not (TOOLS / "grpcurl").exists() and shutil.which("grpcurl") is None:
        pytest.skip("grpcurl is not installed")
    done = site.run(*map(site.here, words))
    assert done.returncode == 0, done.stdout + done.stderr


def _curl(site: Site, words: list[str]) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    done = site.run(words[0], "--fail-with-body", *map(site.here, words[1:]))
    assert done.returncode == 0, done.stdout + done.stderr
    json.loads(done.stdout)


def _make(_: Site, words: list[str]) -> None:
    """What a target does is shown where it does it (`make test` is this very run); here, that it is there."""
    done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def _helm(_: Site, words: list[str]) -> None:
    fetched = subprocess.run(
        [ROOT / "scripts" / "helm.sh"], capture_output=True, text=True, timeout=120, check=False, cwd=ROOT
    )
    if fetched.returncode:
        pytest.skip("Helm cannot be fetched")
    assert words[1] == "install"
    # A release's chart is this one, with another image.
    chart = "deploy/helm/kvindex-server"
    ours = [chart if each.startswith("oci://") and each.endswith("/kvindex-server") else each for each in words]
    done = subprocess.run(
        [fetched.stdout.strip(), "template", *ours[2:]],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def _docker(_: Site, words: list[str]) -> None:
    """What the file starts is started as processes in tests/test_compose.py; here, that it is one."""
    assert words[1:3] == ["compose", "-f"]
    assert yaml.safe_load((ROOT / words[3]).read_text("utf-8"))["services"]


def _engine(_: Site, words: list[str]) -> None:
    """An engine's own command: its flags are those that tests/vllm starts real engines with; here, that it is JSON."""
    config = json.loads(words[words.index("--kv-events-config") + 1])
    assert {"publisher", "endpoint", "replay_endpoint"} <= set(config)


def _pip(_: Site, words: list[str]) -> None:
    """The extra exists."""
    found = re.fullmatch(r"kvindex-server\[(.+)\]", words[-1])
    assert found is not None
    assert re.search(rf"^{found[1]} = \[", (ROOT / "pyproject.toml").read_text("utf-8"), re.MULTILINE)


RUN: dict[str, Callable[[Site, list[str]], None]] = {
    "kvindex": _kvindex,
    "kvindex-server": _serve,
    "grpcurl": _grpcurl,
    "curl": _curl,
    "make": _make,
    "helm": _helm,
    "docker": _docker,
    "vllm": _engine,
    "python": _engine,
    "pip": _pip,
}


@pytest.mark.parametrize(("page", "line"), lines(), ids=lambda each: each[:60])
def test_a_documented_command_does_what_it_says(site: Site, page: str, line: str) -> None:
    if any(line.startswith(each) for each in NOT_HERE):
        assert page.startswith("integrations/")
        return
    if line.startswith("source <("):
        line = line.removeprefix("source <(").removesuffix(")")
    words = shlex.split(line.replace(".venv/bin/", ""), comments=True)
    env = {}
    while "=" in words[0]:
        name, _, value = words.pop(0).partition("=")
        env[name] = value
    assert words[0] in RUN, f"{page}: nobody here knows how to run {line}"
    if env:
        _serve(site, words, env)
    else:
        RUN[words[0]](site, words)


def test_the_pages_with_commands_are_found() -> None:
    pages = {page for page, _ in lines()}
    assert {"README.md", "docs/cli.md", "docs/operations.md", "docs/kubernetes.md", "docs/http.md"} <= pages
    assert len(lines()) > 40


def test_commands_inside_a_sentence_are_understood() -> None:
    """Options and targets that exist; what they do is shown elsewhere."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    seen = 0
    for page in PAGES:
        for command in INLINE.findall(page.read_text(encoding="utf-8")):
            words = shlex.split(command)
            if words[0] == "make":
                wanted = {each for each in words[1:] if each.islower()}
                assert wanted <= targets, f"{page.name}: {command}"
            elif words[1] in COMMANDS and len(words) > 2 and not any(each.isupper() and "-" in each for each in words):
                _understood(page, words)
            seen += 1
    assert seen > 10


def _understood(page: Path, words: list[str]) -> None:
    known = parser().commands()[words[1]]
    options = {option for action in known._actions for option in action.option_strings}
    given = {each.partition("=")[0] for each in words[2:] if each.startswith("--")}
    assert given <= options, f"{page.name}: {' '.join(words)}"


@pytest.mark.parametrize(("page", "text"), blocks("yaml"), ids=lambda each: each[:40])
def test_documented_settings_load(tmp_path: Path, page: str, text: str) -> None:
    """Every YAML block is settings of the server, values of the chart, a manifest, or of the router."""
    # Directories of models must be there.
    loaded, *more = yaml.safe_load_all(re.sub(r"/models/\w+", str(tmp_path), text))
    if isinstance(loaded, list):  # a pod file
        loaded = {"pods": loaded}
    values = yaml.safe_load((ROOT / "deploy/helm/kvindex-server/values.yaml").read_text("utf-8"))
    if more or "apiVersion" in loaded or page.startswith("integrations/"):
        return
    if set(loaded) <= set(values):
        loaded = loaded.get("config", {})
    file = tmp_path / "kvindex.yaml"
    file.write_text(yaml.safe_dump(loaded))
    load_settings({}, {}, file)
