"""Compiles the pattern of a pre-tokenizer to a table of states, and finds where a text may be cut under it.

Understood is what the patterns of language models use: literals, character classes, groups, `|`, greedy
quantifiers, `(?i:…)` around literals and `(?!…)` of one character. Everything else is Unsupported, and the
text is then left to the reference encoder. Alternatives are tried in their order, as a backtracking engine
does; which characters a class holds is asked of the library itself (`charsets`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

MAX_STATES = 4096
MATCH = 0x8000
"""Flag in a table's entry: the text before this character is a match."""

_QUANTIFIERS = {"?": (0, 1), "*": (0, None), "+": (1, None)}
_CONTROLS = {"r": "\r", "n": "\n", "t": "\t", "f": "\f", "v": "\v"}
_MAX_REPEAT = 16

Op = Literal["set", "split", "jump", "not_ahead", "match"]


class Unsupported(Exception):
    """The text says what cannot be taken over from a tokenizer's definition."""


@dataclass(slots=True)
class _Step:
    """One instruction: `set` consumes a character, `split` prefers `to` over `other`."""

    op: Op
    charset: str = ""
    to: int = 0
    other: int = 0


@dataclass(slots=True)
class Program:
    """A compiled pattern; `charsets` are the regular expressions of one character that it uses."""

    steps: list[_Step] = field(default_factory=list)

    @property
    def charsets(self) -> list[str]:
        """In the order of first use, without repetition."""
        return list(dict.fromkeys(step.charset for step in self.steps if step.charset))


def parse(pattern: str) -> Program:
    """The program of a pattern. Unsupported when something in it is not understood."""
    parser = _Parser(pattern)
    node = parser.alternatives(folded=False)
    if parser.at != len(pattern):
        raise Unsupported("unbalanced parenthesis in the pattern")
    program = Program()
    _emit(node, program.steps)
    program.steps.append(_Step("match"))
    return program


# ---- the pattern's tree ----------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Set:
    charset: str


@dataclass(frozen=True, slots=True)
class _NotAhead:
    charset: str


@dataclass(frozen=True, slots=True)
class _Sequence:
    parts: tuple["_Node", ...]


@dataclass(frozen=True, slots=True)
class _Choice:
    options: tuple["_Node", ...]


@dataclass(frozen=True, slots=True)
class _Repeat:
    part: "_Node"
    least: int
    most: int | None


_Node = _Set | _NotAhead | _Sequence | _Choice | _Repeat


class _Parser:
    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.at = 0

    def alternatives(self, folded: bool) -> _Node:
        options = [self._sequence(folded)]
        while self._take("|"):
            options.append(self._sequence(folded))
        return options[0] if len(options) == 1 else _Choice(tuple(options))

    def _sequence(self, folded: bool) -> _Node:
        parts: list[_Node] = []
        while self.at < len(self.pattern) and self.pattern[self.at] not in "|)":
            parts.append(self._quantified(self._atom(folded)))
        if folded:
            _check_folding("".join(part.charset for part in parts if isinstance(part, _Set)))
        return _Sequence(tuple(parts))

    def _quantified(self, node: _Node) -> _Node:
        if self.at == len(self.pattern):
            return node
        char = self.pattern[self.at]
        if char in _QUANTIFIERS:
            self.at += 1
            least, most = _QUANTIFIERS[char]
        elif char == "{":
            least, most = self._counts()
        else:
            return node
        if self.at < len(self.pattern) and self.pattern[self.at] in "?+*{":
            raise Unsupported("a lazy or possessive quantifier")
        if isinstance(node, _NotAhead):
            raise Unsupported("a quantified assertion")
        return _Repeat(node, least, most)

    def _counts(self) -> tuple[int, int | None]:
        end = self.pattern.find("}", self.at)
        low, comma, high = self.pattern[self.at + 1 : end].partition(",")
        if end < 0 or not low.isdigit() or (high and not high.isdigit()):
            raise Unsupported("a quantifier in braces")
        self.at = end + 1
        least = int(low)
        most = least if not comma else int(high) if high else None
        if max(least, most or 0) > _MAX_REPEAT or (most is not None and most < least):
            raise Unsupported("a quantifier in braces")
        return least, most

    def _atom(self, folded: bool) -> _Node:
        char = self.pattern[self.at]
        if char == "(":
            return self._group(folded)
        if char == "[":
            return _Set(self._plain(self._bracket(), folded))
        if char == "\\":
            return _Set(self._escape(folded))
        if char in ".^$?*+{":
            raise Unsupported(f"{char} in the pattern")
        self.at += 1
        return _Set(_literal(char, folded))

    def _group(self, folded: bool) -> _Node:
        if self._take("(?!"):
            node = self.alternatives(folded=False)
            if isinstance(node, _Sequence) and len(node.parts) == 1:
                node = node.parts[0]
            if not isinstance(node, _Set):
                raise Unsupported("an assertion over more than one character")
            node = _NotAhead(node.charset)
        elif self._take("(?i:"):
            node = self.alternatives(folded=True)
        elif self._take("(?:"):
            node = self.alternatives(folded)
        elif self.pattern.startswith("(?", self.at):
            raise Unsupported("a group of an unknown kind")
        else:
            self.at += 1
            node = self.alternatives(folded)
        if not self._take(")"):
            raise Unsupported("unbalanced parenthesis in the pattern")
        return node

    def _bracket(self) -> str:
        start = self.at
        self.at += 1
        self._take("^")
        while self.at < len(self.pattern):
            char = self.pattern[self.at]
            if char == "[" or self.pattern.startswith("&&", self.at):
                raise Unsupported("a nested character class")
            self.at += 2 if char == "\\" else 1
            if char == "]":
                return self.pattern[start : self.at]
        raise Unsupported("an open character class")

    def _escape(self, folded: bool) -> str:
        start = self.at
        char = self.pattern[self.at + 1 : self.at + 2]
        self.at += 2
        if char in {"p", "P"}:
            end = self.pattern.find("}", self.at)
            if not self.pattern.startswith("{", self.at) or end < 0:
                raise Unsupported("a character property without braces")
            self.at = end + 1
            return self._plain(self.pattern[start : self.at], folded)
        if char in {"s", "S", "d", "D", "w", "W"}:
            return self._plain(self.pattern[start : self.at], folded)
        if char in _CONTROLS:
            return _literal(_CONTROLS[char], folded)
        if not char or char.isalnum():
            raise Unsupported("an escape in the pattern")
        return _literal(char, folded)

    @staticmethod
    def _plain(charset: str, folded: bool) -> str:
        if folded:
            raise Unsupported("a character class that ignores case")
        return charset

    def _take(self, text: str) -> bool:
        if not self.pattern.startswith(text, self.at):
            return False
        self.at += len(text)
        return True


def _literal(char: str, folded: bool) -> str:
    escaped = "\\" + char if not char.isalnum() and char.isascii() and char.isprintable() else char
    return f"(?i:{escaped})" if folded and char.isalpha() else escaped


def _check_folding(literal: str) -> None:
    """One character may equal several when case is ignored (`ﬆ` is `st`): such literals are left alone."""
    letters = literal.replace("(?i:", "").replace(")", "").replace("\\", "").casefold()
    if not letters.isascii():
        raise Unsupported("a literal beyond ASCII that ignores case")
    if any(each in letters for each in ("ss", "ff", "fi", "fl", "st")):
        raise Unsupported("a literal that equals one character when case is ignored")


def _emit(node: _Node, steps: list[_Step]) -> None:
    if isinstance(node, _Set):
        steps.append(_Step("set", node.charset))
    elif isinstance(node, _NotAhead):
        steps.append(_Step("not_ahead", node.charset))
    elif isinstance(node, _Sequence):
        for part in node.parts:
            _emit(part, steps)
    elif isinstance(node, _Choice):
        jumps = []
        for option in node.options[:-1]:
            split = _Step("split", to=len(steps) + 1)
            steps.append(split)
            _emit(option, steps)
            jumps.append(_Step("jump"))
            steps.append(jumps[-1])
            split.other = len(steps)
        _emit(node.options[-1], steps)
        for jump in jumps:
            jump.to = len(steps)
    else:
        _emit_repeat(node, steps)


def _emit_repeat(node: _Repeat, steps: list[_Step]) -> None:
    for _ in range(node.least):
        _emit(node.part, steps)
    if node.most is None:
        split = _Step("split", to=len(steps) + 1)
        begin = len(steps)
        steps.append(split)
        _emit(node.part, steps)
        steps.append(_Step("jump", to=begin))
        split.other = len(steps)
        return
    splits = []
    for _ in range(node.most - node.least):
        splits.append(_Step("split", to=len(steps) + 1))
        steps.append(splits[-1])
        _emit(node.part, steps)
    for split in splits:
        split.other = len(steps)


# ---- the table -------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Table:
    """States by class: `entries[state * (classes + 1) + class]` is the next state, with MATCH or without.

    State 0 is dead and 1 the start; the last column of a row is the end of the text.
    """

    classes: int
    entries: tuple[int, ...]

    def after(self, state: int, char_class: int) -> tuple[bool, int]:
        """(the text before is a match, next state)."""
        entry = self.entries[state * (self.classes + 1) + char_class]
        return bool(entry & MATCH), entry & ~MATCH

    @property
    def states(self) -> range:
        """All but the dead one."""
        return range(1, len(self.entries) // (self.classes + 1))

    def uncrossed(self, left: int, right: int) -> bool:
        """No match holds a character of class `left` followed by one of class `right`.

        And what precedes them is matched as if the text ended between them.
        """
        for state in self.states:
            _, then = self.after(state, left)
            if not then:
                continue
            matched, further = self.after(then, right)
            if further or matched != self.after(then, self.classes)[0]:
                return False
        return True

    def always_starts(self, char_class: int) -> bool:
        """Whatever follows, a match starts at a character of this class."""
        _, then = self.after(1, char_class)
        return bool(then) and all(self.after(then, each)[0] for each in range(self.classes + 1))


def compile_table(program: Program, members: Sequence[frozenset[str]]) -> Table:
    """The table over classes of characters; `members[c]` are the charsets that class c is part of."""
    classes = len(members)
    numbers: dict[tuple[int, ...], int] = {(): 0}
    rows: list[list[int]] = [[0] * (classes + 1)]
    pending = [tuple(_closure(program.steps, [0]))]
    numbers[pending[0]] = 1
    while pending:
        state = pending.pop(0)
        row = []
        for char_class in range(classes + 1):
            charsets = members[char_class] if char_class < classes else None
            matched, then = _step(program.steps, state, charsets)
            if then not in numbers:
                if len(numbers) >= MAX_STATES:
                    raise Unsupported("a pattern of too many states")
                numbers[then] = len(numbers)
                pending.append(then)
            row.append(numbers[then] | (MATCH if matched else 0))
        rows.append(row)
    if any(entry & MATCH for entry in rows[1]):
        raise Unsupported("a pattern that matches the empty text")
    return Table(classes, tuple(entry for row in rows for entry in row))


def _closure(steps: Sequence[_Step], starts: Sequence[int], seen: set[int] | None = None) -> Iterator[int]:
    """The steps to wait at, best first: those that need the next character, and the match."""
    seen = set() if seen is None else seen
    stack = list(reversed(starts))
    while stack:
        at = stack.pop()
        if at in seen:
            continue
        seen.add(at)
        step = steps[at]
        if step.op == "jump":
            stack.append(step.to)
        elif step.op == "split":
            stack += (step.other, step.to)
        else:
            yield at


def _step(
    steps: Sequence[_Step], state: Sequence[int], charsets: frozenset[str] | None
) -> tuple[bool, tuple[int, ...]]:
    """(a match ends before the next character, the state after it); charsets None = the text's end."""
    then: list[int] = []
    seen: set[int] = set()
    passed: set[int] = set()
    waiting = list(reversed(state))
    while waiting:
        at = waiting.pop()
        step = steps[at]
        holds = charsets is not None and step.charset in charsets
        if step.op == "match":
            return True, tuple(then)  # what is left is of lower rank
        if step.op == "set" and holds:
            then += _closure(steps, [at + 1], seen)
        elif step.op == "not_ahead" and not holds and at not in passed:
            passed.add(at)
            waiting += reversed(list(_closure(steps, [at + 1])))
    return False, tuple(then)
