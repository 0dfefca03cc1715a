"""What an answer is worth, how sure a share is, and what a guesser would reach."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from accuracy.questions import Item, Question, item_of
from world.splits import TRAIN

Z_95 = 1.959963984540054  # of the normal distribution, for two-sided 95 %
RESAMPLES = 2000
_ALTERNATIVES = re.compile(r", (?:the )?(?P<a>[a-z0-9 ]+?) or (?:the )?(?P<b>[a-z0-9 ]+)[.?]$")


def is_right(answer: str, truth: str) -> bool:
    """Exact match but for blanks around it."""
    return answer.strip() == truth


def facts_right(answer: str, truth: str) -> float:
    """F1 of the items of two lists: 2 x items in both / (items of one + items of the other), 0 to 1.

    Items are what commas part, without blanks around them. An item that is said twice counts twice; their order does
    not count. So what is missing and what is made up both cost.
    """
    said, true = Counter(_items(answer)), Counter(_items(truth))
    both = (said & true).total()
    return 2 * both / (said.total() + true.total()) if both else 0.0


def _items(text: str) -> list[str]:
    return [item for item in (part.strip() for part in text.split(",")) if item]


def wilson(right: int, asked: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson, 1927)."""
    if not 0 <= right <= asked or asked == 0:
        raise ValueError(f"expected 0 <= right <= asked and asked > 0, got {right} of {asked}")
    share, square = right / asked, Z_95**2 / asked
    centre = (share + square / 2) / (1 + square)
    half = Z_95 / (1 + square) * math.sqrt(share * (1 - share) / asked + square / asked / 4)
    return max(0.0, centre - half), min(1.0, centre + half)


def passes(right: int, asked: int, share: float) -> bool:
    """Whether the 95 % interval lies above `share`, by the binomial tail itself.

    It is the interval of Clopper and Pearson, which can be trusted where a type has few questions or a share is small.
    """
    if not 0 < share < 1:
        return share <= 0 < right
    rate, rest = math.log(share), math.log1p(-share)

    def chance(k: int) -> float:
        """Of k right answers by guessing. In logarithms: of a thousand questions the counts are beyond any float."""
        ways = math.lgamma(asked + 1) - math.lgamma(k + 1) - math.lgamma(asked - k + 1)
        return math.exp(ways + k * rate + (asked - k) * rest)

    return math.fsum(map(chance, range(right, asked + 1))) < 0.025


@dataclass(frozen=True)
class Difference:
    """The mean of paired differences and its 95 % interval."""

    mean: float
    low: float
    high: float


def paired_difference(
    samples: Sequence[str], ours: Sequence[float], theirs: Sequence[float], *, seed: int = 0
) -> Difference:
    """Mean of `ours - theirs` over questions, with a bootstrap interval.

    Whole samples are drawn, because questions about one picture stand and fall together. `samples` names each
    question's sample; values are scores from 0 to 1. Where no question differs the interval has no width: it knows
    nothing beyond these questions.
    """
    numbers = {key: number for number, key in enumerate(dict.fromkeys(samples))}
    rows = np.array([numbers[key] for key in samples])
    difference = np.asarray(ours, dtype=np.float64) - np.asarray(theirs, dtype=np.float64)
    sums = np.bincount(rows, weights=difference)
    asked = np.bincount(rows).astype(np.float64)
    drawn = np.random.default_rng(seed).integers(0, len(sums), (RESAMPLES, len(sums)))
    means = sums[drawn].sum(axis=1) / asked[drawn].sum(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return Difference(float(difference.mean()), float(low), float(high))


class Guesser:
    """What can be had without a picture, learnt from other samples of the same layouts.

    Two guesses per (layout, type): the answer that is the most frequent one, and, where a question names two
    alternatives, the place of the one that is more often right.
    """

    def __init__(self, learnt_from: Iterable[Item]) -> None:
        answers: defaultdict[tuple[str, str], Counter[str]] = defaultdict(Counter)
        places: defaultdict[tuple[str, str], Counter[str]] = defaultdict(Counter)
        for item in learnt_from:
            for question in item.questions:
                key = item.layout.name, question.type
                answers[key][question.answer] += 1
                places[key].update(name for name, text in _alternatives(question).items() if text == question.answer)
        self._answers = {key: _most_common(counter) for key, counter in answers.items()}
        self._places = {key: _most_common(counter) for key, counter in places.items() if counter}

    def constant(self, item: Item, question: Question) -> str:
        """The most frequent answer; empty for a type that was never seen."""
        return self._answers.get((item.layout.name, question.type), "")

    def named(self, item: Item, question: Question) -> str:
        """One of two alternatives that the question names; empty where it names none."""
        place = self._places.get((item.layout.name, question.type), "")
        return _alternatives(question).get(place, "")


def _alternatives(question: Question) -> dict[str, str]:
    found = _ALTERNATIVES.search(question.text)
    return found.groupdict() if found else {}


def _most_common(counter: Counter[str]) -> str:
    """Ties go to the first in the alphabet, so that the order of the samples does not matter."""
    return min(counter, key=lambda text: (-counter[text], text))


def learn_guesser(items: Sequence[Item], num_samples: int) -> Guesser:
    """From `num_samples` TRAIN samples of each layout of `items`."""
    layouts = {item.layout.name: item.layout for item in items}
    return Guesser(item_of(layout, TRAIN[i]) for layout in layouts.values() for i in range(num_samples))


def prior(asked: Sequence[tuple[Item, Question]], guesser: Guesser) -> float:
    """Accuracy of the best blind guess at these questions, which should be of one type.

    The largest of the mean stated chance, the most frequent answer and the better of two named alternatives.
    """
    chance = sum(question.chance for _, question in asked)
    constant = sum(guesser.constant(item, question) == question.answer for item, question in asked)
    named = sum(guesser.named(item, question) == question.answer for item, question in asked)
    return max(chance, constant, named) / len(asked)
