"""A vLLM process with the tiny model: its OpenAI API, its event sockets, and its end without a word."""

import json
import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.publisher import free_port

BLOCK_SIZE = 32  # the CPU backend takes multiples of 32
START_SECONDS = 240


@dataclass(frozen=True)
class Usage:
    """What the engine itself says of one request, in tokens."""

    prompt: int
    cached: int


class Engine:
    """One engine; `start` after `kill` begins another life at the same addresses.

    `dials` makes it connect its publisher to the index, which then has to bind; else the engine binds.
    """

    def __init__(self, python: str, model: Path, log: Path, *, blocks: int, dials: bool) -> None:
        self._python, self._model, self._log, self._blocks = python, model, log, blocks
        self.dials = dials
        self.port, self._events, self._replay = free_port(), free_port(), free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def registration(self) -> dict[str, object]:
        """How the index hears of it."""
        return {
            "pod": f"127.0.0.1:{self.port}",
            "model": "tiny",
            "endpoint": f"tcp://127.0.0.1:{self._events}",
            "replay_endpoint": f"tcp://127.0.0.1:{self._replay}",
            "bind": self.dials,
        }

    def start(self) -> None:
        """Start it; returns at once."""
        # vLLM binds only an endpoint with a `*` in it. ZeroMQ overlooks one behind the port: the host stays loopback.
        events = {
            "enable_kv_cache_events": True,
            "publisher": "zmq",
            "endpoint": f"tcp://127.0.0.1:{self._events}" + ("" if self.dials else "*"),
            "replay_endpoint": f"tcp://127.0.0.1:{self._replay}",
        }
        options = {
            "model": self._model,
            "served-model-name": "tiny",
            "host": "127.0.0.1",
            "port": self.port,
            "load-format": "dummy",
            "dtype": "bfloat16",
            "max-model-len": 1024,
            "max-num-seqs": 8,
            "block-size": BLOCK_SIZE,
            "num-gpu-blocks-override": self._blocks,
            "kv-events-config": json.dumps(events),
        }
        flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONHASHSEED"} | {
            "HF_HUB_OFFLINE": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_HOST_IP": "127.0.0.1",
            "VLLM_NO_USAGE_STATS": "1",
            "OMP_NUM_THREADS": "1",
        }
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [
                    *(self._python, "-m", "vllm.entrypoints.openai.api_server"),
                    *("--enforce-eager", "--enable-prompt-tokens-details", *flags),
                ],
                stdout=log,
                stderr=log,
                env=environment,
                cwd=self._model.parent,
                start_new_session=True,  # the engine core is a process of its own; both have to die at once
            )

    def wait(self) -> None:
        """Until it answers."""
        assert self._process is not None
        ends = time.monotonic() + START_SECONDS
        while time.monotonic() < ends:
            assert self._process.poll() is None, f"vLLM ended at its start:\n{self._log.read_text()[-4000:]}"
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5):
                    return
            except OSError:
                time.sleep(0.5)
        raise AssertionError(f"vLLM did not come up in {START_SECONDS} s:\n{self._log.read_text()[-4000:]}")

    def kill(self) -> None:
        """SIGKILL to all its processes."""
        if self._process is None:
            return
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self._process.wait(20)
        self._process = None

    def complete(self, prompt: str | list[int], *, new_tokens: int = 1, **fields: object) -> Usage:
        """One request to /v1/completions."""
        return self._ask("/v1/completions", {"prompt": prompt, "max_tokens": new_tokens, **fields})

    def chat(self, body: dict[str, object]) -> Usage:
        """One request to /v1/chat/completions."""
        return self._ask("/v1/chat/completions", {"max_tokens": 1, **body})

    def _ask(self, path: str, body: dict[str, object]) -> Usage:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            json.dumps({"model": "tiny", "ignore_eos": True, **body}).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                usage: dict[str, Any] = json.load(answer)["usage"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{path}: {error.code} {error.read().decode()}") from error
        return Usage(usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"])
