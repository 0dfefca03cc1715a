"""The metrics of public benchmarks, each as its authors define it. A score is a number from 0 to 1.

exact           GQA, POPE: the same words
relaxed         ChartQA (arXiv 2203.10244): numbers within five parts in a hundred, other answers exactly
anls            DocVQA (arXiv 1905.13648): normalised Levenshtein similarity, 0 below a half
choice          AI2D, Video-MME, MLVU, NExT-QA, LongVideoBench: the letter of the right option
vqa             TextVQA (VQA, arXiv 1505.00468): what share of ten people said so, three being enough
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Sequence

Metric = Callable[[str, Sequence[str]], float]  # (what the model said, the right answers) -> 0 to 1

RELAXED_TOLERANCE = 0.05
ANLS_THRESHOLD = 0.5
PEOPLE_NEEDED = 3

_ARTICLES = frozenset({"a", "an", "the"})
_NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6",
    "seven": "7", "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
_COMMA_IN_NUMBER = re.compile(r"(?<=\d),(?=\d{3})")
_DOT_OUTSIDE_NUMBER = re.compile(r"\.(?!\d)")
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_LETTER = re.compile(r"(?:^|\b(?:answer|option|choice)\b(?:\s+is)?\s*:?\s*)\(?([A-Z])\)?(?=[\s.:),]|$)", re.IGNORECASE)


def exact(answer: str, truths: Sequence[str]) -> float:
    """The same but for case, blanks around it and a full stop at the end."""
    return float(any(_plain(answer) == _plain(truth) for truth in truths))


def _plain(text: str) -> str:
    return " ".join(text.strip().rstrip(".").lower().split())


def yes_or_no(answer: str, truths: Sequence[str]) -> float:
    """Whether the first yes or no of an answer is the right one; an answer with neither is wrong."""
    found = re.search(r"\b(yes|no)\b", answer.lower())
    return float(found is not None and found[1] in {truth.strip().lower() for truth in truths})


def relaxed(answer: str, truths: Sequence[str]) -> float:
    """Numbers may be off by 5 % of the right one; 0 has to be said exactly. A percentage is a hundredth."""
    return max((float(_is_close(answer, truth)) for truth in truths), default=0.0)


def _is_close(answer: str, truth: str) -> bool:
    said, right = _number(answer), _number(truth)
    if said is None or right is None:
        return _plain(answer) == _plain(truth)
    return said == right if right == 0 else abs(said - right) <= RELAXED_TOLERANCE * abs(right)


def _number(text: str) -> float | None:
    text = _COMMA_IN_NUMBER.sub("", text.strip().rstrip("."))
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def anls(answer: str, truths: Sequence[str]) -> float:
    """1 - distance / length of the longer, of the nearest truth; 0 where the distance is half of it or more."""
    return max((_similarity(_words(answer), _words(truth)) for truth in truths), default=0.0)


def _words(text: str) -> str:
    return " ".join(text.lower().split())


def _similarity(a: str, b: str) -> float:
    longer = max(len(a), len(b))
    if longer == 0:
        return 1.0
    ratio = levenshtein(a, b) / longer
    return 1 - ratio if ratio < ANLS_THRESHOLD else 0.0


def levenshtein(a: str, b: str) -> int:
    """Letters to insert, delete or replace."""
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, right in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (left != right))
    return row[-1]


def choice(answer: str, truths: Sequence[str]) -> float:
    """Whether the letter that an answer begins with, or names as its answer, is that of the right option."""
    return float(chosen_letter(answer) in {truth.strip().upper() for truth in truths})


def chosen_letter(answer: str) -> str | None:
    """The letter of "B", "(B) a cat", "B. a cat", "The answer is B"; None where there is none."""
    found = _LETTER.search(answer.strip())
    return None if found is None else found[1].upper()


def vqa(answer: str, truths: Sequence[str]) -> float:
    """Mean over each person left out of min(1, how many of the others said so / 3).

    Spelling is levelled as the authors do, but for their list of contractions without an apostrophe.
    """
    said, people = level(answer), [level(truth) for truth in truths]
    if not people:
        return 0.0
    same = sum(person == said for person in people)
    shares = [min(1.0, (same - (person == said)) / PEOPLE_NEEDED) for person in people]
    return sum(shares) / len(shares)


def level(text: str) -> str:
    """Lower case, digits for small numbers, without articles and without punctuation that parts no number."""
    text = _COMMA_IN_NUMBER.sub("", text.lower().replace("\n", " ").replace("\t", " ").strip())
    text = _DOT_OUTSIDE_NUMBER.sub("", text.translate(str.maketrans(_PUNCTUATION, " " * len(_PUNCTUATION))))
    words = (_NUMBERS.get(word, word) for word in text.split())
    return " ".join(word for word in words if word not in _ARTICLES).strip(string.whitespace + "'")
