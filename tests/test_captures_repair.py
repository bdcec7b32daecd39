"""Recorded frames of real engines with some cut out, repaired from what the engines' replay sockets answered."""

import base64
import json
import random

import pytest
from test_captures import CASES, GOLDEN, Capture, load, words

from kvindex_server import wire
from kvindex_server._core import Index
from kvindex_server.ingest import Bounds, Ingest
from kvindex_server.stream import StreamStatus, Trust

SEEDS = 60


def replays(name: str) -> list[list[tuple[int, bytes]]]:
    """Each recorded answer to a request from 0, without its end marker."""
    answers: list[list[tuple[int, bytes]]] = [[]]
    for line in (GOLDEN / name / "replay.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row["start_seq"]:
            continue
        sequence, payload = wire.read_replay([base64.b64decode(frame) for frame in row["frames"]])
        if sequence == wire.END_SEQUENCE:
            answers.append([])
        else:
            answers[-1].append((sequence, payload))
    return answers[:-1]


class Follower:
    """An ingest whose questions are answered from a recording."""

    def __init__(self) -> None:
        self.index = Index()
        self.asked: list[int] = []
        self.ingest = Ingest(
            self.index.add_stream("pod", 0), StreamStatus("pod", 0, "m"), Bounds(), self.asked.append, clock=lambda: 0.0
        )
        self.ingest.start()

    def answer(self, recorded: list[tuple[int, bytes]], until: int) -> None:
        """As the engine would have when `until` was its newest message."""
        for _ in range(20):
            if not self.ingest.waiting_for_replay:
                return
            start = self.asked[-1]
            self.ingest.replayed([each for each in recorded if start <= each[0] <= until], ended=True)
        raise AssertionError("asks without end")

    def held(self, capture: Capture) -> set[int]:
        answers = self.index.holders_of_ints(words(capture.hashes), [])
        return {value for value, (_, holders) in zip(capture.hashes, answers, strict=True) if holders}


@pytest.mark.parametrize("name", CASES)
def test_cut_frames_are_repaired(name: str) -> None:
    """Whatever was lost, at every message that came the index holds what the engine held, or asks."""
    capture, (recorded, *_) = load(name), replays(name)
    assert len(recorded) == len(capture.frames)
    for seed in range(SEEDS):
        rng = random.Random(seed)
        lost = rng.uniform(0.05, 0.9)
        follower = Follower()
        follower.answer([], -1)
        for number, frames in enumerate(capture.frames):
            if rng.random() < lost and number + 1 < len(capture.frames):
                continue
            follower.ingest.live([wire.read_event(frames)])
            follower.answer(recorded, number)
            assert follower.ingest.status().trust is Trust.EXACT
            for label, after, resident in capture.checkpoints:
                if after == number:
                    assert follower.held(capture) == resident, (seed, label)


def test_cut_frames_of_two_lives_are_repaired() -> None:
    """The engine was killed and started again; each life's losses are repaired from its own replay."""
    capture = load("vllm-0.32.0/serve-restart")
    first, second = replays("vllm-0.32.0/serve-restart")
    sequences = [int.from_bytes(frames[1], "big") for frames in capture.frames]
    restart = sequences.index(0, 1)
    reference = Index()
    living = reference.add_stream("pod", 0)
    for frames in capture.frames[restart:]:
        living.apply([frames[2]])
    for seed in range(SEEDS):
        rng = random.Random(seed)
        follower = Follower()
        follower.answer([], -1)
        for number, frames in enumerate(capture.frames):
            life = first if number < restart else second
            if number == restart and rng.random() < 0.5:
                follower.ingest.connection(False)
                follower.ingest.connection(True)
                follower.answer(life, sequences[number])
            if rng.random() < 0.4 and number + 1 < len(capture.frames):
                continue
            follower.ingest.live([wire.read_event(frames)])
            follower.answer(life, sequences[number])
        assert follower.ingest.status().trust is Trust.EXACT, seed
        assert follower.index.claims == reference.claims, seed
