"""Prompts as people and programs send them, broken in every way, to compare encoders on."""

import random
import sysconfig
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

MAX_CHARS = 3_000

_CJK = (
    "我们的研究表明,大规模语言模型可以处理超过十万个标记的上下文。"
    "東京都庁は新宿区にある。한국어 문장도 넣어 보자。「引用」、(括弧)!?"
)
_EMOJI = (
    "👨‍👩‍👧‍👦",
    "🏳️‍🌈",
    "👩🏽‍💻",
    "🇩🇪🇫🇷🇯🇵",
    "❤️‍🔥",
    "1️⃣",
    "☠️",
    "🧑🏿‍🤝‍🧑🏻",
    "\u200d",
    "\ufe0f",
    "🏴\U000e0067\U000e0062\U000e007f",
)
_MARKS = (
    *("e\u0301", "a\u0308\u0323", "\u0301", "ก\u0e38\u0e49", "क\u094d\u0937\u093f", "\u1100\u1161\u11a8", "o\u0338"),
    *("A\u030a", "s\u0323\u0307", "\u0344", "\u212b", "\ufb01", "\u0958", "\u095b", "\u0a33", "\ufb2c"),
)
_BLANKS = (
    *(" ", "  ", "   ", "\n", "\n\n", "\r\n", "\t", " \n", " \n \n", "\u00a0", "\u3000", "\u2028", "\u2003"),
    *("\x0b", "\x0c", "\x85", "\x1c", " " * 17, "\n" * 9, "\t \t "),
)
_BITS = (
    *("'s", "'LL", "'ſ", "'re", "n't", "1", "12", "1234", "٣٤", "½", "_", "__init__", "://", "?!", "...", "```"),
    *("{{", "}}", "</", "<|", "|>", "▁", "Ġ", "<0x0A>"),
)


@lru_cache(maxsize=1)
def _real() -> tuple[str, ...]:
    """Source and prose that every machine with this Python has."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[::4]
    docs = sorted((Path(__file__).resolve().parents[1] / "docs").glob("*.md"))
    return tuple(path.read_text(encoding="utf-8", errors="ignore") for path in (*files, *docs) if path.stat().st_size)


def prompts(count: int, specials: Sequence[str], seed: int) -> Iterator[str]:
    """`count` prompts, the same for the same seed and machine; a third begin as one of the last ones does."""
    rng = random.Random(seed)
    named = [each for each in specials if each]
    # Models reserve hundreds of alike tokens: most draws are of others.
    named = [*named[:24], *rng.sample(named, min(24, len(named)))]
    before: list[str] = []
    for _ in range(count):
        text = "".join(_part(rng, named) for _ in range(rng.choice((1, 2, 3, 5, 8, 13))))
        if before and rng.random() < 0.33:
            start = rng.choice(before)
            text = start[: rng.randrange(len(start) + 1)] + text
        text = text[:MAX_CHARS]
        before = [*before[-19:], text]
        yield text


def _part(rng: random.Random, specials: Sequence[str]) -> str:
    kind = rng.random()
    if kind < 0.3:
        text = rng.choice(_real())
        start = rng.randrange(len(text))
        return text[start : start + 1 + int(rng.expovariate(1 / 150))]
    if kind < 0.4:
        start = rng.randrange(len(_CJK))
        return _CJK[start : start + rng.randrange(1, 30)]
    if kind < 0.48:
        return "".join(rng.choices(_EMOJI, k=rng.randrange(1, 4)))
    if kind < 0.58:
        return "".join(rng.choices(_MARKS, k=rng.randrange(1, 4)))
    if kind < 0.7:
        return "".join(rng.choices(_BLANKS, k=rng.randrange(1, 4)))
    if kind < 0.76 or not specials:
        return rng.choice(_BITS)
    return _special(rng, specials)


def _special(rng: random.Random, specials: Sequence[str]) -> str:
    """Whole with something around, a part, or one inside another."""
    token = rng.choice(specials)
    at = rng.randrange(len(token) + 1)
    around = ("", "", " ", "\n")
    return rng.choice(
        (
            rng.choice(around) + token + rng.choice(around),
            token[:at],
            token[at:],
            token[:at] + rng.choice(specials) + token[at:],
        )
    )
