"""What is asked: the public conversation trace, seeded chats that grow turn by turn, bursts about one document."""

from __future__ import annotations

import json
import random
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from kvindex_server._core import block_keys

BLOCK = 64
"""Tokens per block, in the engines and in the index."""
SPAN = 512
"""Tokens that one id of the trace stands for."""


@dataclass(eq=False, slots=True)
class Request:
    """Prompt and answer are known beforehand; `tokens` holds both, as u32."""

    session: int
    tokens: array[int]
    prompt_tokens: int
    keys: array[int] = field(init=False)
    """Of every full block of prompt and answer."""

    def __post_init__(self) -> None:
        self.keys = array("Q", block_keys(self.tokens.tobytes(), BLOCK))

    @property
    def output_tokens(self) -> int:
        return len(self.tokens) - self.prompt_tokens

    @property
    def prompt_blocks(self) -> int:
        """Full blocks of the prompt; only those can be shared before the answer is there."""
        return self.prompt_tokens // BLOCK

    @property
    def prompt_keys(self) -> bytes:
        return self.keys[: self.prompt_blocks].tobytes()

    def block(self, number: int) -> tuple[int, ...]:
        """The tokens of one block."""
        return tuple(self.tokens[number * BLOCK : (number + 1) * BLOCK])


class Trace:
    """An open loop: each request comes at its own time, divided by `speed`, whatever became of the others."""

    def __init__(self, path: Path, requests: int, speed: float) -> None:
        self._path, self._requests, self._speed = path, requests, speed

    def begin(self) -> Iterator[tuple[float, Request]]:
        """(arrival in seconds, request)."""
        session_of: dict[int, int] = {}
        fresh = 1 << 28
        with self._path.open(encoding="utf-8") as lines:
            for number, line in zip(range(self._requests), lines, strict=False):
                row = json.loads(line)
                ids, length = row["hash_ids"], row["input_length"]
                # The trace names no sessions: a request belongs to the one that deepest shares its beginning, but the
                # first id is a system prompt of all.
                session = next((session_of[each] for each in reversed(ids[1:]) if each in session_of), number)
                session_of.update(dict.fromkeys(ids[1:], session))
                tokens = array("I")
                for each in ids:
                    tokens.extend(range(each * SPAN, (each + 1) * SPAN))
                del tokens[length:]
                output = row["output_length"]
                tokens.extend(range(fresh, fresh + output))  # never asked again under these ids
                fresh += output
                yield row["timestamp"] / 1000 / self._speed, Request(session, tokens, min(length, len(tokens) - output))

    def after(self, request: Request, now: float) -> tuple[float, Request] | None:
        """Nothing follows from an answer."""
        return None


@dataclass(slots=True)
class _Chat:
    session: int
    history: array[int]
    turns_left: int
    dice: random.Random


class Chats:
    """Sessions come at random (Poisson); inside one, the next turn follows the answer after some thought.

    Every session has its own random numbers, so that all policies are asked the same.
    """

    SYSTEM_PROMPTS = 32
    SYSTEM_TOKENS = 2048
    TURNS = (2, 12)
    USER_TOKENS = (32, 900)
    OUTPUT_TOKENS = (50, 600)
    THINK_SECONDS = 12.0

    def __init__(self, per_second: float, seconds: float, seed: int) -> None:
        self._per_second, self._seconds, self._seed = per_second, seconds, seed
        self._chats: dict[int, _Chat] = {}

    def begin(self) -> Iterator[tuple[float, Request]]:
        """(arrival in seconds, request) of first turns."""
        dice = random.Random(self._seed)
        systems = [_words(dice, self.SYSTEM_TOKENS) for _ in range(self.SYSTEM_PROMPTS)]
        popularity = [1 / (rank + 1) for rank in range(self.SYSTEM_PROMPTS)]
        now, session = dice.expovariate(self._per_second), 0
        while now < self._seconds:
            chat = _Chat(
                session,
                array("I", dice.choices(systems, popularity)[0]),
                dice.randint(*self.TURNS),
                random.Random(self._seed * 1_000_003 + session),
            )
            self._chats[session] = chat
            yield now, self._turn(chat)
            session += 1
            now += dice.expovariate(self._per_second)

    def after(self, request: Request, now: float) -> tuple[float, Request] | None:
        """The turn that follows an answered one."""
        chat = self._chats[request.session]
        if chat.turns_left == 0:
            del self._chats[request.session]
            return None
        return now + chat.dice.expovariate(1 / self.THINK_SECONDS), self._turn(chat)

    def _turn(self, chat: _Chat) -> Request:
        chat.turns_left -= 1
        prompt = chat.history + _words(chat.dice, chat.dice.randint(*self.USER_TOKENS))
        chat.history = prompt + _words(chat.dice, chat.dice.randint(*self.OUTPUT_TOKENS))
        return Request(chat.session, chat.history, len(prompt))


class Documents:
    """Bursts: a document that nobody has seen, and several questions about it within a second or two."""

    DOCUMENT_TOKENS = (8_000, 24_000)
    QUESTIONS = (4, 12)
    QUESTION_TOKENS = (32, 200)
    OUTPUT_TOKENS = (50, 300)
    APART_SECONDS = 0.2

    def __init__(self, per_second: float, seconds: float, seed: int) -> None:
        self._per_second, self._seconds, self._seed = per_second, seconds, seed

    def begin(self) -> Iterator[tuple[float, Request]]:
        """(arrival in seconds, request)."""
        dice = random.Random(self._seed)
        asked: list[tuple[float, int, array[int], int]] = []
        now, session = dice.expovariate(self._per_second), 0
        while now < self._seconds:
            document, moment = _words(dice, dice.randint(*self.DOCUMENT_TOKENS)), now
            for _ in range(dice.randint(*self.QUESTIONS)):
                prompt = document + _words(dice, dice.randint(*self.QUESTION_TOKENS))
                whole = prompt + _words(dice, dice.randint(*self.OUTPUT_TOKENS))
                asked.append((moment, session, whole, len(prompt)))
                moment += dice.expovariate(1 / self.APART_SECONDS)
            session += 1
            now += dice.expovariate(self._per_second)
        for moment, session, whole, length in sorted(asked, key=lambda each: each[0]):
            yield moment, Request(session, whole, length)

    def after(self, request: Request, now: float) -> tuple[float, Request] | None:
        """Nothing follows from an answer."""
        return None


def _words(dice: random.Random, count: int) -> array[int]:
    words = array("I", dice.randbytes(4 * count))
    return array("I", [word & 0x1FFFF for word in words])
