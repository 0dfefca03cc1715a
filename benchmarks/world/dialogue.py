"""Dialogues in which no answer follows from what was said before.

The rules, kept by `Talk.add` for every kind of sample:
1. A turn never asks for a fact that an earlier question or answer told. A fact is (thing, attribute), for example the
   colour of thing 3, or the identity of the shape that came first.
2. A turn that counts a colour or a shape comes before that word is said, and closes the word: no later turn says it.
   Else turns about single red things would tell how many there are at least, and the count would tell of them.
3. No two turns need the same regions (unless both need the whole sample).
The kinds add: counts come first; in pictures and pages no thing is the subject of two turns; a question about
existence is asked only where both answers would be possible, and then a coin decides.

What stays is elimination: "the only star is red" tells that another thing is no star. It is worth a few points and is
measured in the tests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

from world.dice import Dice
from world.sample import QA, Fact, Region
from world.vocabulary import words_of

MIN_TURNS, MAX_TURNS = 3, 8


class Asker(Protocol):
    """What asks about a sample."""

    dice: Dice

    def converse(self, talk: Talk) -> bool: ...


def further_talks(
    count: int, dice: Dice, phrases: Mapping[str, Sequence[str]], asker: Asker
) -> tuple[tuple[QA, ...], ...]:
    """`count` more conversations about one sample, none of which knows of the others; some may be short.

    The sample is drawn the same however many there are, with other dice.
    """
    asker.dice = dice.aside()
    talks = [Talk(asker.dice, phrases) for _ in range(count)]
    for talk in talks:
        asker.converse(talk)
    return tuple(tuple(talk.turns) for talk in talks)


class Talk:
    """A dialogue that is being built."""

    def __init__(self, dice: Dice, phrases: Mapping[str, Sequence[str]]) -> None:
        self.dice = dice
        self.turns: list[QA] = []
        self.told: set[Fact] = set()
        self._phrases = phrases
        self._said: set[str] = set()
        self._closed: set[str] = set()

    def is_fresh(self, ident: int) -> bool:
        """Nothing was told about this thing."""
        return all(known != ident for known, _ in self.told)

    def is_open(self, *words: str) -> bool:
        """No earlier turn counted by one of these words."""
        return self._closed.isdisjoint(words)

    def add(
        self,
        type: str,
        names: Mapping[str, str],
        answer: str,
        regions: Iterable[Region],
        chance: float,
        asks: Iterable[Fact] = (),
        tells: Iterable[Fact] = (),
        closes: Iterable[str] = (),
    ) -> bool:
        """Adds a turn of this type unless a rule forbids it. `tells` may leave out what `asks` holds."""
        turn = self.compose(type, names, answer, regions, chance, asks, tells)
        words, counted = set(words_of(f"{turn.question} {answer}")), set(closes)
        regions = set(turn.regions)
        repeats_region = regions and any(regions == set(earlier.regions) for earlier in self.turns)
        if turn.asks & self.told or words & self._closed or counted & self._said or repeats_region:
            return False
        self.turns.append(turn)
        self.told |= turn.tells
        self._said |= words
        self._closed |= counted
        return True

    def compose(
        self,
        type: str,
        names: Mapping[str, str],
        answer: str,
        regions: Iterable[Region],
        chance: float,
        asks: Iterable[Fact] = (),
        tells: Iterable[Fact] = (),
    ) -> QA:
        """A turn in one of its type's phrasings, without looking at the others."""
        question = self.dice.pick(self._phrases[type]).format_map(names)
        asked = frozenset(asks)
        return QA(type, question, answer, tuple(regions), chance, asked, asked | frozenset(tells))

    def converse(self, openers: Sequence[Callable[[], bool]], others: Sequence[Callable[[], bool]]) -> bool:
        """The openers, then the others in random order, twice round. False if that gave too few turns.

        Each of them tries to add one turn and says whether it did.
        """
        length = self.dice.between(MIN_TURNS, MAX_TURNS)
        for ask in (*openers, *self.dice.shuffled(others), *self.dice.shuffled(others)):
            if len(self.turns) < length:
                ask()
        return len(self.turns) >= MIN_TURNS
