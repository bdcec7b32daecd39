"""Texts made to break an encoder, and the check that two encoders agree on them."""

import random
from collections.abc import Callable, Iterator, Sequence

_SCRIPTS = (
    "the quick brown fox jumps over the lazy dog and doesn't stop at 12345 or 3.14159",
    "def f(x: int) -> int:\n    return x ** 2  # comment\n\n\nclass A:\n\tpass\n",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich, naïve façade Ångström",
    "Съешь же ещё этих мягких французских булок, да выпей чаю №5",
    "敏捷的棕色狐狸跳过了懒狗。今天天气很好,我们去公园吧!",
    "いろはにほへと ちりぬるを カタカナ 東京都渋谷区",
    "다람쥐 헌 쳇바퀴에 타고파 각",
    "صِف خَلقَ خَودٍ كَمِثلِ الشَمسِ إِذ بَزَغَت",
    "ऋषियों को सताने वाले दुष्ट राक्षसों के राजा रावण का",
    "เป็นมนุษย์สุดประเสริฐเลิศคุณค่า",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία ἄρμα",
    "דג סקרן שט בים מאוכזב ולפתע מצא לו חברה",
)
_CHARS = (
    *" \t\n\r\f\v\0\x1f\x7f\x85\xa0\xad",
    *"\u1680\u2003\u2028\u2029\u202f\u205f\u3000\u180e\u200b\u200d\u2060\ufeff\ufe0f\ufffd",
    *"aAzZsStTéßſKıİǅʼnﬁﬆ㎏ªº",
    *"09٣७Ⅷ½²①㊷",
    *"'’`\"!/\\|<>[]{}()#$%&*+-=_~^@.,:;?…—、。,﹏€№™",
    *"\u0301\u0308\u0323\u0327\u0338\u093c\u0e38\u3099\u20dd",
    *"\u0344\u0958\u095c\u2126\u212b\ufb1d",  # NFC takes them apart, or makes another letter of them
    *"\u1100\u1161\u11a8한가각",
    *"👍👨🏽🇩🇪❤😀",
    *"▁Ġ中あア한ก",
    *"\ue000\U000e0041\U0001d49c\U00020000\U0010fffd",
)
_PIECES = (
    *("'s", "'S", "'ſ", "'ll", "'LL", "n't", "'re", "'VE", "'d", "''", "I'm"),
    *("  ", "   ", "\n\n", "\r\n", " \n ", "\n \n", "\t\t", " \t", "\u3000 "),
    *("👨‍👩‍👧", "👍🏽", "❤️", "🇩🇪🇫🇷", "é", "e\u0301\u0323", "각"),
    *("123", "1234567", "3.14", "a1b2", "x²", "CamelCaseWord", "HTTPServer", "snake_case", "foo/bar", "a//b\n"),
    *("http://example.com/?q=1&r=2#x", "!!!???", "...---...", "{'k': [1, 2]}", "<b>bold</b>", "a" * 70, "中" * 20),
)


def texts(count: int, specials: Sequence[str], seed: int = 1) -> Iterator[str]:
    """`count` texts, the same for the same seed: prose, mixed characters, and added tokens whole and broken."""
    rng = random.Random(seed)
    fixed = ["", " ", "a", "\n", *_SCRIPTS, *_PIECES, *(special + " x" for special in specials[:32])]
    for number in range(count):
        if number < len(fixed):
            yield fixed[number]
            continue
        yield "".join(_part(rng, specials) for _ in range(rng.choice((1, 2, 3, 5, 8, 20))))


def _part(rng: random.Random, specials: Sequence[str]) -> str:
    kind = rng.random()
    if kind < 0.3:
        words = rng.choice(_SCRIPTS)
        start = rng.randrange(len(words))
        return words[start : start + rng.randrange(1, 40)]
    if kind < 0.5:
        return "".join(rng.choices(_CHARS, k=rng.randrange(1, 8)))
    if kind < 0.7:
        return rng.choice(_PIECES)
    if kind < 0.75:
        return rng.choice((" ", "\n", "a", "\t", "0", "=", "é")) * rng.randrange(1, 60)
    if kind < 0.8:
        return chr(rng.choice((rng.randrange(0x80), rng.randrange(0x80, 0x3000), rng.randrange(0xE000, 0x110000))))
    if specials and kind < 0.95:
        special = rng.choice(specials)
        if rng.random() < 0.3:
            cut = rng.randrange(len(special) + 1)
            return special[:cut] if rng.random() < 0.5 else special[cut:]
        return rng.choice(("", "", " ", "\n", "x")) + special + rng.choice(("", "", " ", "\n", "x"))
    return rng.choice((" ", "")) + "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randrange(1, 14)))


def first_difference(
    samples: Iterator[str], encode: Callable[[str], bytes | None], reference: Callable[[str], bytes | None]
) -> int | None:
    """The number of the first text on which they disagree; None is no answer, and agrees with anything."""
    for number, text in enumerate(samples):
        ids = encode(text)
        expected = ids if ids is None else reference(text)
        if expected is not None and ids != expected:
            return number
    return None


def first_bad_cut(
    samples: Iterator[str], encode: Callable[[str], bytes | None], next_cut: Callable[[str, int], int]
) -> int | None:
    """The number of the first text whose parts, cut at any safe place, do not give the ids of the whole."""
    for number, text in enumerate(samples):
        data = text.encode()
        at = next_cut(text, 1)
        if at >= len(data):
            continue
        whole = encode(text)
        while whole is not None and at < len(data):
            left, right = encode(data[:at].decode()), encode(data[at:].decode())
            if left is None or right is None or left + right != whole:
                return number
            at = next_cut(text, at + 1)
    return None
