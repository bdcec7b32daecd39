"""What text costs: Score(prompt) and Score(chat) over gRPC, against plain `tokenizers` on the same prompts.

    python benchmarks/text.py [TOKENIZER_DIRECTORY]

The text is the source of CPython's own library. Plain encoding is `encode_batch_fast([text])` in this process.
"""

import json
import random
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import msgpack
from load import machine
from tokenizers import Tokenizer as FastTokenizer

from kvindex_server import wire
from kvindex_server.pb.kvindex.v1 import kvindex_pb2 as pb
from kvindex_server.pb.kvindex.v1 import kvindex_pb2_grpc as rpc

BLOCK_SIZE = 16
ROUNDS = 15
SHARED = Path(__file__).resolve().parents[2] / "shared" / "tokenizers" / "qwen3"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class Corpus:
    """Real text in the order of the files, cut to a number of tokens."""

    def __init__(self, fast: FastTokenizer) -> None:
        self.fast = fast
        library = Path(sysconfig.get_paths()["stdlib"])
        self.text = "".join(path.read_text(errors="ignore") for path in sorted(library.glob("*.py")))
        self.lines = self.text.splitlines(keepends=True)
        self.per_token = len(self.text[:400_000]) / len(self.ids(self.text[:400_000]))

    def ids(self, text: str) -> list[int]:
        """The plain encoding."""
        return self.fast.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def piece(self, tokens: int, start: int) -> str:
        """About so many tokens from a place on."""
        size = int(tokens * self.per_token)
        start %= len(self.text) - size
        return self.text[start : start + size]

    def shuffled(self, tokens: int, seed: int) -> str:
        """About so many tokens of known lines in an order of its own."""
        rng = random.Random(seed)
        out: list[str] = []
        size = 0
        while size < tokens * self.per_token:
            out.append(rng.choice(self.lines))
            size += len(out[-1])
        return "".join(out)


@contextmanager
def server(directory: Path, *flags: str) -> Iterator[tuple[grpc.Channel, int]]:
    """A server of its own process with one model; the channel and the process id."""
    command = [sys.executable, "-m", "kvindex_server", "serve", "--listen", "127.0.0.1:0"]
    command += ["--metrics-listen", "127.0.0.1:0", "--tokenizer", f"m={directory}", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        address = process.stdout.readline().split("grpc=")[1].split()[0]
        with grpc.insecure_channel(address, options=[("grpc.max_receive_message_length", -1)]) as channel:
            yield channel, process.pid
    finally:
        process.terminate()
        process.wait(20)


def hold(channel: grpc.Channel, ids: list[int]) -> wire.Socket:
    """One pod that holds the blocks of these tokens."""
    admin = rpc.KVIndexAdminStub(channel)
    publisher = wire.publisher("tcp://127.0.0.1:*")
    admin.RegisterPod(pb.RegisterPodRequest(pod="pod", model="m", endpoint=publisher.endpoint, block_size=BLOCK_SIZE))
    blocks = len(ids) // BLOCK_SIZE
    event = {
        "type": "BlockStored",
        "block_hashes": list(range(1, blocks + 1)),
        "parent_block_hash": None,
        "token_ids": ids[: blocks * BLOCK_SIZE],
        "block_size": BLOCK_SIZE,
        "medium": "GPU",
    }
    message = msgpack.packb([time.time(), [event], 0])
    ends = time.monotonic() + 30
    number = 0
    while not any(stream.blocks == blocks for stream in admin.ListPods(pb.ListPodsRequest()).streams):
        assert time.monotonic() < ends, "the pod was not filled"
        publisher.send([b"", number.to_bytes(8, "big"), message])
        number += 1
        time.sleep(0.3)
    return publisher


def cpu_seconds(pid: int) -> float:
    """CPU time of all threads of a process, in steps of 10 ms."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / 100


def rss_mib(pid: int) -> float:
    """Resident memory."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 / 2**20


def times(work: Callable[[int], object], rounds: int = ROUNDS) -> float:
    """Median milliseconds of `work(round)`."""
    taken = []
    for number in range(rounds):
        started = time.perf_counter()
        work(number)
        taken.append((time.perf_counter() - started) * 1000)
    return statistics.median(taken)


def both(pid: int, work: Callable[[int], object], rounds: int) -> tuple[float, float]:
    """(median, server CPU per round), both in milliseconds."""
    before = cpu_seconds(pid)
    median = times(work, rounds)
    return median, (cpu_seconds(pid) - before) * 1000 / rounds


def own_cpu(work: Callable[[int], object], rounds: int) -> float:
    """CPU milliseconds of this process per round."""
    before = time.process_time()
    for number in range(rounds):
        work(number)
    return (time.process_time() - before) * 1000 / rounds


def row(case: str, bar: str, measured: str, cpu: str, plain: str) -> None:
    print(f"| {case} | {bar} | {measured} | {cpu} | {plain} |", flush=True)


def run(corpus: Corpus, channel: grpc.Channel, pid: int) -> None:
    call = channel.unary_unary("/kvindex.v1.KVIndex/Score")

    def score(text: str, kind: str = "prompt") -> pb.ScoreResponse:
        return pb.ScoreResponse.FromString(call(pb.ScoreRequest(model="m", **{kind: text}).SerializeToString()))

    prompt = corpus.piece(100_000, 0)
    ids = corpus.ids(prompt)
    publisher = hold(channel, ids)
    answer = score(prompt)
    assert (answer.total_tokens, answer.scores[0].matched_blocks) == (len(ids), len(ids) // BLOCK_SIZE), answer
    plain_ms = times(lambda _: corpus.ids(prompt), 5)
    plain = f"{plain_ms:.0f} ms, {own_cpu(lambda _: corpus.ids(prompt), 5):.0f} ms CPU"
    print("| case | bar | p50 | server CPU | plain `tokenizers` |\n| --- | --- | --- | --- | --- |")
    p50, cpu = both(pid, lambda _: score(prompt), 40)
    row(f"{len(ids)} tokens seen before", "2 ms", f"{p50:.2f} ms", f"{cpu:.1f} ms", plain)

    for begin in range(0, len(corpus.text), 4 << 20):  # the words
        score(corpus.text[begin : begin + (4 << 20)])
    shuffled = [corpus.shuffled(100_000, seed) for seed in range(30)]
    p50, cpu = both(pid, lambda number: score(shuffled[number]), 30)
    row("100k tokens of known words, never seen", "6 ms", f"{p50:.2f} ms", f"{cpu:.1f} ms", plain)
    assert score(shuffled[0]).total_tokens == len(corpus.ids(shuffled[0]))

    shared = corpus.piece(95_000, 0)
    tails = [corpus.shuffled(5_000, 100 + seed) for seed in range(40)]
    score(shared + "x")
    p50, cpu = both(pid, lambda number: score(shared + tails[number]), 40)
    whole = own_cpu(lambda number: corpus.ids(shared + tails[number]), 5)
    new = times(lambda number: corpus.ids(tails[number]))
    row(
        "95k shared + 5k new",
        f"{new + 2:.1f} ms, {whole / 12:.1f} ms CPU",
        f"{p50:.2f} ms",
        f"{cpu:.1f} ms",
        f"5k new: {new:.1f} ms, whole: {whole:.0f} ms CPU",
    )

    messages = [{"role": "user", "content": corpus.piece(30_000, 1_000_000)}]
    score(json.dumps({"messages": messages}), "chat")
    bodies = []
    for turn in range(50):
        role = "assistant" if turn % 2 == 0 else "user"
        messages.append({"role": role, "content": corpus.shuffled(200, 1000 + turn)})
        bodies.append(json.dumps({"messages": messages}))
    p50, cpu = both(pid, lambda turn: score(bodies[turn], "chat"), 50)
    row("30k chat growing by 200 a turn, 50 turns", "1.5 ms", f"{p50:.2f} ms", f"{cpu:.1f} ms", "")

    small = [corpus.piece(2_000, 3_000_000 + 9_000 * number) for number in range(200)]
    p50, cpu = both(pid, lambda number: score(small[number]), 200)
    plain_small = times(lambda number: corpus.ids(small[number]), 200)
    row(
        "2k tokens, none shared",
        f"{plain_small * 1.1:.2f} ms",
        f"{p50:.2f} ms",
        f"{cpu:.1f} ms",
        f"{plain_small:.2f} ms",
    )

    ends = time.monotonic() + 20
    number = 0
    while time.monotonic() < ends:
        score(corpus.shuffled(100_000, 10_000 + number))
        number += 1
        time.sleep(0.02)
    row(f"RSS after {number} unshared prompts of 100k tokens", "1 GiB", f"{rss_mib(pid):.0f} MiB", "", "")
    publisher.close()


def main() -> None:
    directory = Path(sys.argv[1]) if len(sys.argv) > 1 else SHARED
    if not (directory / "tokenizer.json").is_file():
        print(f"no tokenizer at {directory}: give a directory", file=sys.stderr)
        return
    print(machine())
    fast = FastTokenizer.from_file(str(directory / "tokenizer.json"))
    fast.no_truncation()
    fast.no_padding()
    corpus = Corpus(fast)
    with tempfile.TemporaryDirectory() as copy:
        (Path(copy) / "tokenizer.json").write_bytes((directory / "tokenizer.json").read_bytes())
        (Path(copy) / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
        with server(Path(copy)) as (channel, pid):
            run(corpus, channel, pid)


if __name__ == "__main__":
    main()
