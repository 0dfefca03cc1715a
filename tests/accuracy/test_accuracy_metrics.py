"""Metrics of public benchmarks on cases worked out by hand."""

from __future__ import annotations

import pytest
from accuracy.metrics import anls, choice, chosen_letter, exact, level, levenshtein, relaxed, vqa, yes_or_no
from hypothesis import given
from hypothesis import strategies as st


@pytest.mark.parametrize(("answer", "score"), [("Yes", 1), (" yes. ", 1), ("no", 0), ("yes it is", 0), ("", 0)])
def test_exact(answer: str, score: float) -> None:
    assert exact(answer, ["yes"]) == score


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("No, there is no car.", 1),
        ("yes", 0),
        ("There is none.", 0),
        ("I know", 0),
        ("NO", 1),
        ("nobody", 0),
        ("yes, no", 0),
    ],
)
def test_yes_or_no(answer: str, score: float) -> None:
    assert yes_or_no(answer, ["no"]) == score


@pytest.mark.parametrize(
    ("answer", "truth", "score"),
    [
        ("105", "100", 1), ("105.1", "100", 0), ("95", "100", 1), ("94.9", "100", 0), ("-105", "-100", 1),
        ("100", "-100", 0), ("0", "0", 1), ("0.01", "0", 0), ("1,030", "1000", 1), ("12%", "0.12", 1),
        ("12", "12%", 0), ("Blue", "blue", 1), ("blue", "1", 0), ("2019.", "2019", 1),
    ],
)  # fmt: skip
def test_relaxed(answer: str, truth: str, score: float) -> None:
    assert relaxed(answer, [truth]) == score


@pytest.mark.parametrize(
    ("answer", "truths", "score"),
    [
        ("kitten", ["sitting"], 1 - 3 / 7), ("abcd", ["abxy"], 0.0), ("abc", ["abx", "abc"], 1.0),
        ("  The  Cat ", ["the cat"], 1.0), ("", [""], 1.0), ("", ["a"], 0.0), ("abcde", ["abxyz"], 0.0),
        ("abcde", ["abcyz"], 0.6),
    ],
)  # fmt: skip
def test_anls(answer: str, truths: list[str], score: float) -> None:
    assert anls(answer, truths) == pytest.approx(score)


@given(st.text("ab", max_size=6), st.text("ab", max_size=6))
def test_levenshtein_is_a_distance(a: str, b: str) -> None:
    """Against the definition, letter by letter."""

    def slow(x: str, y: str) -> int:
        if not x or not y:
            return len(x) + len(y)
        return min(slow(x[1:], y) + 1, slow(x, y[1:]) + 1, slow(x[1:], y[1:]) + (x[0] != y[0]))

    assert levenshtein(a, b) == slow(a, b)


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"), ("b", "B"), ("(B) a cat", "B"), ("B. a cat", "B"), ("The answer is B.", "B"), ("Answer: (C)", "C"),
        ("A cat sits there", "A"), ("Because of it", None), ("", None), ("option D", "D"), ("it is D", None),
    ],
)  # fmt: skip
def test_chosen_letter(answer: str, letter: str | None) -> None:
    assert chosen_letter(answer) == letter
    assert choice(answer, ["B"]) == float(letter == "B")


@pytest.mark.parametrize(
    ("answer", "people", "score"),
    [
        ("dog", ["dog"] * 10, 1.0),
        ("dog", ["cat"] * 10, 0.0),
        ("dog", ["dog"] + ["cat"] * 9, 0.3),  # nine leave a cat out and see one dog, one leaves the dog out
        ("dog", ["dog"] * 3 + ["cat"] * 7, (7 * 1.0 + 3 * 2 / 3) / 10),
        ("dog", ["dog"] * 4 + ["cat"] * 6, 1.0),
        ("The Dog!", ["dog"] * 10, 1.0),
        ("two", ["2"] * 10, 1.0),
        ("dog", [], 0.0),
    ],
)
def test_vqa(answer: str, people: list[str], score: float) -> None:
    assert vqa(answer, people) == pytest.approx(score)


@pytest.mark.parametrize(
    ("text", "levelled"),
    [("A red, big car.", "red big car"), ("1,000", "1000"), ("3.5 km", "3.5 km"), ("co-op", "co op"), ("none", "0")],
)
def test_level(text: str, levelled: str) -> None:
    assert level(text) == levelled
