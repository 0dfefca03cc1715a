"""Names and `re:` patterns of a quantisation config, matched without backtracking.

A pattern of a downloaded config is untrusted input: `re` can take longer than anyone waits for one of thirty
characters. What configs use is small, so it is read here and run over all positions at once: a name of n characters
costs at most n steps for each character of the pattern.

Understood, with the meaning of `re.match`: plain characters, `.`, `[...]`, `^`, `$`, `\\d`, `\\w`, an escaped
punctuation mark, `|`, `(...)`, `(?:...)`, `*`, `+` and `?` after a single character, and `?` after a group. Anything
else raises UnsupportedModel.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import reduce

from ..errors import UnsupportedModel

MAX_PATTERN_LEN = 256
_MAX_DEPTH = 8
_PREFIX = "re:"

_Positions = frozenset[int]
_Step = Callable[[str, _Positions], _Positions]  # name, where it may begin -> where it may end
_Test = Callable[[str], bool]


@dataclass(frozen=True)
class NamePattern:
    """One entry of `targets` or `ignore`: a layer's whole name, or a pattern behind `re:` for how names begin."""

    text: str
    _run: _Step = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        run = _Parser(self.text[len(_PREFIX) :]).pattern() if self.is_regex else _never
        object.__setattr__(self, "_run", run)

    @property
    def is_regex(self) -> bool:
        return self.text.startswith(_PREFIX)

    def matches(self, name: str) -> bool:
        return bool(self._run(name, frozenset((0,)))) if self.is_regex else name == self.text


def _never(name: str, at: _Positions) -> _Positions:
    return frozenset()


def _one(test: _Test) -> _Step:
    return lambda name, at: frozenset(i + 1 for i in at if i < len(name) and test(name[i]))


def _sequence(steps: list[_Step]) -> _Step:
    return lambda name, at: reduce(lambda reached, step: step(name, reached), steps, at)


def _either(steps: list[_Step]) -> _Step:
    return lambda name, at: frozenset().union(*(step(name, at) for step in steps))


def _optional(step: _Step) -> _Step:
    return lambda name, at: at | step(name, at)


def _repeated(step: _Step) -> _Step:
    def run(name: str, at: _Positions) -> _Positions:
        reached, new = at, at
        while new:
            new = step(name, new) - reached
            reached |= new
        return reached

    return run


def _begins(name: str, at: _Positions) -> _Positions:
    return at & {0}


def _ends(name: str, at: _Positions) -> _Positions:
    return at & {len(name)}


_CLASSES: dict[str, _Test] = {"d": str.isdecimal, "w": lambda c: c.isalnum() or c == "_"}


class _Parser:
    """Reads one pattern from left to right."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._depth = 0

    def pattern(self) -> _Step:
        if len(self._text) > MAX_PATTERN_LEN:
            raise self._unsupported(f"more than {MAX_PATTERN_LEN} characters")
        step = self._alternatives()
        if self._at < len(self._text):
            raise self._unsupported("an unmatched bracket")
        return step

    def _alternatives(self) -> _Step:
        found = [self._run_of_items()]
        while self._take("|"):
            found.append(self._run_of_items())
        return _either(found)

    def _run_of_items(self) -> _Step:
        steps = []
        while self._at < len(self._text) and self._peek() not in "|)":
            steps.append(self._item())
        return _sequence(steps)

    def _item(self) -> _Step:
        if self._take("("):
            step, repeats = self._group(), "?"
        elif self._take("^"):
            return _begins
        elif self._take("$"):
            return _ends
        else:
            step, repeats = _one(self._character()), "*+?"
        if self._peek() not in "*+?{" or not self._peek():
            return step
        mark = self._next()
        if mark not in repeats or self._peek() in ("*", "+", "{"):
            raise self._unsupported(f"the repeat {mark!r} at this place")
        self._take("?")  # a lazy repeat matches the same names
        return {"*": _repeated(step), "?": _optional(step), "+": _sequence([step, _repeated(step)])}[mark]

    def _group(self) -> _Step:
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise self._unsupported(f"more than {_MAX_DEPTH} brackets in each other")
        if self._take("?") and not self._take(":"):
            raise self._unsupported("a group that begins with '?'")
        step = self._alternatives()
        if not self._take(")"):
            raise self._unsupported("an unmatched bracket")
        self._depth -= 1
        return step

    def _character(self) -> _Test:
        if self._take("."):
            return lambda c: c != "\n"
        if self._take("["):
            return self._set()
        if self._take("\\"):
            return self._escape()
        literal = self._next()
        if literal in "*+?{":
            raise self._unsupported(f"the repeat {literal!r} at this place")
        return lambda c: c == literal

    def _escape(self) -> _Test:
        kind = self._next()
        if kind in _CLASSES:
            return _CLASSES[kind]
        if kind.isalnum() or not kind.isascii():
            raise self._unsupported(f"the escape '\\{kind}'")
        return lambda c: c == kind

    def _set(self) -> _Test:
        inverted = self._take("^")
        tests: list[_Test] = []
        while not self._take("]"):
            tests.append(self._set_member())
        if not tests:
            raise self._unsupported("an empty set")
        return lambda c: any(test(c) for test in tests) != inverted

    def _set_member(self) -> _Test:
        if self._take("\\"):
            return self._escape()
        low = self._next()
        if low == "[":  # `re` announces another meaning for it
            raise self._unsupported("a bracket in a set")
        if self._peek() != "-" or self._text[self._at + 1 : self._at + 2] in ("]", ""):
            return lambda c: c == low
        self._next()
        high = self._next()
        if high == "\\" or high < low:
            raise self._unsupported(f"the range {low}-{high}")
        return lambda c: low <= c <= high

    def _peek(self) -> str:
        return self._text[self._at : self._at + 1]

    def _next(self) -> str:
        if self._at >= len(self._text):
            raise self._unsupported("an end in the middle")
        self._at += 1
        return self._text[self._at - 1]

    def _take(self, wanted: str) -> bool:
        taken = self._peek() == wanted
        self._at += taken
        return taken

    def _unsupported(self, what: str) -> UnsupportedModel:
        return UnsupportedModel(f"name pattern {reprlib.repr(_PREFIX + self._text)}: {what} is not supported")
