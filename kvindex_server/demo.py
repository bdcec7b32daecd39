"""The demo: the real server against simulated pods, with chats routed by its scores and a live view."""

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import grpc

from kvindex_server import logs
from kvindex_server.config import ConfigError, ModelSettings, PageSettings, Settings
from kvindex_server.pb.kvindex.v1 import kvindex_pb2 as pb
from kvindex_server.pb.kvindex.v1 import kvindex_pb2_grpc as rpc
from kvindex_server.server import Server
from kvindex_server.simulate.events import Encoding
from kvindex_server.simulate.pod import Completion, SimulatedPod
from kvindex_server.simulate.workload import Shape, Traffic, Turn, Workload

MODEL = "demo-model"
BLOCK_SIZE = 16
POD_BLOCKS = 768
STEP_SECONDS = 0.005
RPC_SECONDS = 5.0
SETTLE_SECONDS = 10.0
ONCE_REQUESTS = 60
ONCE_SECONDS = 30.0
LOAD_WEIGHT = 12.0
"""Blocks that one request under way counts for: else every chat would end on the pod that was first."""

SYSTEM_TEXTS = (
    "You are a careful assistant of a small library. Answer briefly, and say so when you do not know. ",
    "You review code. Name file and line first, then the fault, then the smallest change that helps. ",
    "You plan journeys by train. Ask for dates before prices, and never propose a change under ten minutes. ",
    "You teach arithmetic to children. Give one hint at a time, and wait for an answer before the next. ",
)


def run(args: argparse.Namespace) -> int:
    """Show the demo until its time is up or a signal comes; the exit code."""
    logs.configure("console", "warning")
    try:
        with contextlib.ExitStack() as stack:
            return _Demo(args, stack).run()
    except ConfigError as error:
        sys.stderr.write(f"kvindex-server: config: {error}\n")
        return 2
    except grpc.RpcError as error:
        sys.stderr.write(f"kvindex-server: demo: {error.code().name}: {error.details()}\n")
        return 1
    except BrokenPipeError:  # the reader, `head` perhaps, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


@dataclass
class _Row:
    encoding: str
    last_score: float = 0.0
    trust: str = "COLD"
    blocks: int = 0
    last_sequence: int = -1


class _Demo:
    def __init__(self, args: argparse.Namespace, stack: contextlib.ExitStack) -> None:
        self._rate = float(args.rate)
        self._once = bool(args.once)
        self._json = bool(getattr(args, "json", False))
        self._seconds = float(args.seconds) or (ONCE_SECONDS if self._once else float("inf"))
        self._done = stack.enter_context(_signalled())
        self._server = _start_server(getattr(args, "tokenizer", None))
        stack.callback(self._server.stop, 1.0)
        channel = stack.enter_context(grpc.insecure_channel(self._server.grpc_address))
        self._scores = rpc.KVIndexStub(channel)
        self._admin = rpc.KVIndexAdminStub(channel)
        self._pods: dict[str, SimulatedPod] = {}
        self._rows: dict[str, _Row] = {}
        for number in range(int(args.pods)):
            encoding = Encoding.ARRAY if number % 2 == 0 else Encoding.MAP
            pod = SimulatedPod(
                f"pod-{number}",
                MODEL,
                blocks=POD_BLOCKS,
                block_size=BLOCK_SIZE,
                encoding=encoding,
                step_seconds=STEP_SECONDS,
                seed=number,
            )
            stack.callback(pod.stop)
            pod.start()
            self._pods[pod.pod] = pod
            self._rows[pod.pod] = _Row(encoding.value)
        self._system_prompts = self._tokenized_system_prompts()
        shape = Shape(sessions=max(24, 6 * len(self._pods)))
        self._workload = Workload(1, shape, self._system_prompts)
        self._system_prompts = self._workload.system_prompts
        self._traffic = Traffic(self._workload, self._pods, self._route, self._report)
        self._foreseen: dict[int, int] = {}
        self._predicted = 0
        self._scored = 0
        self._failures = 0
        self._screen = _Screen()

    def run(self) -> int:
        self._server.wait_ready(RPC_SECONDS)
        for pod in self._pods.values():
            self._admin.RegisterPod(
                pb.RegisterPodRequest(
                    pod=pod.pod, model=MODEL, endpoint=pod.endpoint, replay_endpoint=pod.replay_endpoint
                ),
                timeout=RPC_SECONDS,
            )
        if self._json:
            _write(json.dumps({"grpc": self._server.grpc_address, "metrics": self._server.metrics_address}))
        else:
            _write(*self._hints(), "")
        started = time.monotonic()
        self._serve_chats(started)
        elapsed = time.monotonic() - started
        self._settle()
        self._refresh()
        self._show(elapsed, final=True)
        return self._summary(elapsed)

    def _show(self, elapsed: float, *, final: bool = False) -> None:
        if not self._json:
            self._screen.show(self._table(elapsed), self._line(elapsed), final=final)

    def _serve_chats(self, started: float) -> None:
        next_send, next_view = started, started + self._screen.interval
        while not self._done.is_set() and (now := time.monotonic()) < started + self._seconds:
            if self._once and self._traffic.total.requests >= ONCE_REQUESTS:
                break
            if now >= next_send:
                next_send = max(next_send + 1 / self._rate, now - 1)
                self._send()
            self._traffic.collect()
            if now >= next_view:
                next_view = now + self._screen.interval
                self._refresh()
                self._show(now - started)
            self._done.wait(max(0.0, min(next_send - time.monotonic(), 0.01)))

    def _send(self) -> None:
        try:
            self._traffic.send()
        except grpc.RpcError:
            self._failures += 1

    def _route(self, turn: Turn) -> str:
        """What a router would do: ask for the scores, weigh them against the load."""
        answer = self._scores.Score(
            pb.ScoreRequest(model=MODEL, tokens=pb.Tokens(ids=turn.prompt), pods=list(self._pods)),
            timeout=RPC_SECONDS,
        )
        best = max(answer.scores, key=lambda each: self._preference(each.pod, each.score))
        for each in answer.scores:
            self._rows[each.pod].last_score = each.score
        self._scored += any(each.score > 0 for each in answer.scores)
        # An engine always computes at least the last token.
        foreseen = min(best.matched_tokens, (len(turn.prompt) - 1) // BLOCK_SIZE * BLOCK_SIZE)
        self._foreseen[turn.session] = foreseen
        self._predicted += foreseen
        return str(best.pod)

    def _report(self, turn: Turn, pod: str, completion: Completion) -> None:
        """What a router does with the engine's `usage`: the index measures by it how right it was."""
        usage = pb.ReportUsageRequest(
            model=MODEL,
            pod=pod,
            predicted_tokens=self._foreseen.pop(turn.session),
            cached_tokens=completion.cached_tokens,
            prompt_tokens=completion.prompt_tokens,
        )
        try:
            self._scores.ReportUsage(usage, timeout=RPC_SECONDS)
        except grpc.RpcError:
            self._failures += 1

    def _preference(self, pod: str, score: float) -> tuple[float, int]:
        # Of equals, the one that has served least: a new system prompt goes to a new pod.
        served = self._traffic.by_pod[pod].requests + self._traffic.load(pod)
        return score - LOAD_WEIGHT * self._traffic.load(pod), -served

    def _settle(self) -> None:
        """Let the requests under way end and the index read the last events, in bounded time."""
        deadline = time.monotonic() + SETTLE_SECONDS
        while self._traffic.under_way and time.monotonic() < deadline:
            self._traffic.collect()
            time.sleep(0.01)
        while time.monotonic() < deadline:
            self._refresh()
            if all(self._rows[name].last_sequence + 1 >= pod.published() for name, pod in self._pods.items()):
                break
            time.sleep(0.02)

    def _refresh(self) -> None:
        for stream in self._admin.ListPods(pb.ListPodsRequest(model=MODEL), timeout=RPC_SECONDS).streams:
            row = self._rows[stream.pod]
            row.trust = pb.Trust.Name(stream.trust).removeprefix("TRUST_")
            row.blocks = stream.blocks
            row.last_sequence = stream.last_sequence if stream.HasField("last_sequence") else -1

    def _table(self, elapsed: float) -> list[str]:
        total = self._traffic.total
        lines = [f"{'pod':<10} {'events':<7} {'trust':<8} {'blocks':>7} {'requests':>9} {'hit share':>10}  last score"]
        highest = max((row.last_score for row in self._rows.values()), default=0.0)
        shown = list(self._rows.items())[: self._screen.rows]
        for name, row in shown:
            tally = self._traffic.by_pod[name]
            lines.append(
                f"{name:<10} {row.encoding:<7} {row.trust:<8} {row.blocks:>7} {tally.requests:>9} "
                f"{tally.hit_ratio:>9.1%}  {row.last_score:>6.1f} {_bar(row.last_score, highest)}"
            )
        if len(shown) < len(self._rows):
            lines.append(f"... and {len(self._rows) - len(shown)} more")
        lines.append(
            f"{elapsed:6.1f} s   requests {total.requests}   hit ratio {total.hit_ratio:.1%}   "
            f"under way {self._traffic.under_way}"
        )
        return lines

    def _line(self, elapsed: float) -> str:
        pods = "  ".join(
            f"{name} {row.trust} blocks={row.blocks} hit={self._traffic.by_pod[name].hit_ratio:.2f} "
            f"score={row.last_score:.1f}"
            for name, row in list(self._rows.items())[: self._screen.rows]
        )
        total = self._traffic.total
        return f"{elapsed:.1f}s requests={total.requests} hit_ratio={total.hit_ratio:.2f}  {pods}"

    def _summary(self, elapsed: float) -> int:
        total = self._traffic.total
        exact = known = held = 0
        for name, pod in self._pods.items():
            resident = len(pod.resident())
            known += self._rows[name].blocks
            held += resident
            exact += self._rows[name].blocks == resident
        predicted = self._predicted / total.prompt_tokens if total.prompt_tokens else 0.0
        if self._json:
            told = {"requests": total.requests, "seconds": elapsed, "scored": self._scored, "failures": self._failures}
            ratios = {"hit_ratio": total.hit_ratio, "foreseen": predicted}
            agree = {"pods": len(self._pods), "pods_equal": exact, "blocks_known": known, "blocks_held": held}
            _write(json.dumps({**told, **ratios, **agree}))
        else:
            _write(
                "",
                f"{total.requests} requests in {elapsed:.1f} s, {self._scored} of them scored above 0",
                f"hit ratio {total.hit_ratio:.3f} measured by the engines, {predicted:.3f} foreseen by the index",
                f"index and engine count the same on {exact} of {len(self._pods)} pods: "
                f"{known} blocks known, {held} held",
                *([f"{self._failures} calls failed"] if self._failures else []),
            )
        return 0 if total.requests or not self._failures else 1

    def _hints(self) -> list[str]:
        address, metrics = self._server.grpc_address, self._server.metrics_address
        # The first blocks of a system prompt: whatever chat is live, some pod soon holds them.
        ids = list(self._system_prompts[0][: 2 * BLOCK_SIZE])
        by_tokens = json.dumps({"model": MODEL, "tokens": {"ids": ids}}, separators=(",", ":"))
        calls = [
            ("kvindex.v1.KVIndexAdmin/ListPods", json.dumps({"model": MODEL}, separators=(",", ":"))),
            ("kvindex.v1.KVIndex/Score", by_tokens),
            ("kvindex.v1.KVIndex/GetPodsForBlocks", by_tokens),
        ]
        if self._server.models.get(MODEL).tokenizer is not None:
            prompt = json.dumps({"model": MODEL, "prompt": SYSTEM_TEXTS[0] * 2}, separators=(",", ":"))
            calls.append(("kvindex.v1.KVIndex/Score", prompt))
        lines = [
            f"kvindex-server demo: {len(self._pods)} simulated pods of {MODEL}",
            f"listening grpc={address} metrics={metrics}",
            "",
            "Try in another terminal:",
        ]
        lines += [f"  grpcurl -plaintext -d '{body}' {address} {method}" for method, body in calls]
        lines += [
            f"  buf curl --protocol grpc --http2-prior-knowledge -d '{body}' http://{address}/{method}"
            for method, body in calls
        ]
        return [*lines, f"  curl http://{metrics}/metrics", f"or open http://{metrics}/ in a browser"]

    def _tokenized_system_prompts(self) -> Sequence[Sequence[int]]:
        tokenizer = self._server.models.get(MODEL).tokenizer
        if tokenizer is None:
            return ()
        encoded = (tokenizer.encode_prompt(_system_text(number)) for number in range(len(SYSTEM_TEXTS)))
        return [list(memoryview(ids).cast("I")) for ids in encoded]


class _Screen:
    """A table drawn over itself on a terminal, plain lines elsewhere."""

    def __init__(self) -> None:
        self._terminal = sys.stdout.isatty()
        self._drawn = 0
        self.interval = 0.25 if self._terminal else 1.0

    @property
    def rows(self) -> int:
        """How many pods there is room for."""
        return max(1, shutil.get_terminal_size().lines - 4) if self._terminal else 8

    def show(self, table: Sequence[str], line: str, *, final: bool = False) -> None:
        """Draw anew; a pipe gets the table only at the end."""
        if self._terminal:
            width = shutil.get_terminal_size().columns
            back = f"\x1b[{self._drawn}F\x1b[J" if self._drawn else ""
            sys.stdout.write(back + "".join(f"{each[: width - 1]}\n" for each in table))
            self._drawn = len(table)
        else:
            sys.stdout.write("\n".join(table if final else [line]) + "\n")
        sys.stdout.flush()


def _write(*lines: str) -> None:
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    sys.stdout.flush()


def _bar(value: float, highest: float, width: int = 24) -> str:
    return "█" * round(width * value / highest) if highest > 0 else ""


def _system_text(number: int) -> str:
    return SYSTEM_TEXTS[number] * 12


@contextlib.contextmanager
def _signalled() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set, where signals can be caught: in the main thread."""
    done = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield done
        return

    def finish(_signal: int, _frame: FrameType | None) -> None:
        done.set()

    previous = {each: signal.signal(each, finish) for each in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield done
    finally:
        for each, handler in previous.items():
            signal.signal(each, handler)


def _start_server(tokenizer: str | Path | None) -> Server:
    settings = Settings(
        listen=_address(50051),
        metrics_listen=_address(9090),
        models=(ModelSettings(name=MODEL, tokenizer=str(tokenizer) if tokenizer else None),),
        page=PageSettings(prompt=tokenizer is not None),
    )
    server = Server(settings)
    server.start()
    return server


def _address(port: int) -> str:
    """The usual port, or any free one when it is taken."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            port = 0
    return f"127.0.0.1:{port}"
