"""Exact match, facts of lists, intervals and blind guesses."""

from __future__ import annotations

import numpy as np
import pytest
from accuracy.questions import LAYOUTS, Item, Question, draw
from accuracy.scoring import Guesser, facts_right, is_right, learn_guesser, paired_difference, passes, prior, wilson


@pytest.mark.parametrize(
    ("answer", "truth", "right"),
    [("red star", "red star", True), (" red star\n", "red star", True), ("red  star", "red star", False),
     ("red", "red star", False), ("red star red", "red star", False), ("Red star", "red star", False),
     ("", "red star", False)],
)  # fmt: skip
def test_exact_match(answer, truth, right):
    assert is_right(answer, truth) is right


@pytest.mark.parametrize(
    ("answer", "truth", "share"),
    [
        ("red star, blue ring", "red star, blue ring", 1.0),
        ("blue ring , red star", "red star, blue ring", 1.0),  # order and blanks do not count
        ("red star", "red star, blue ring", 2 / 3),  # half is missing
        ("red star, blue ring, black star, red ring", "red star, blue ring", 2 / 3),  # half is made up
        ("red star, red star, red star", "red star, red star, blue ring", 2 / 3),  # twice counts twice
        ("red star, red star", "red star", 2 / 3),  # and once only once
        ("star", "red star", 0.0),
        ("", "red star", 0.0),
        (", ,", "red star", 0.0),
    ],
)
def test_facts_right(answer, truth, share):
    assert facts_right(answer, truth) == pytest.approx(share)


@pytest.mark.parametrize(  # Newcombe, Statistics in Medicine 17 (1998), table I, method 3
    ("right", "asked", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718),
     (20, 20, 0.8389, 1.0)],
)  # fmt: skip
def test_wilson_equals_published_intervals(right, asked, low, high):
    assert wilson(right, asked) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(("right", "asked"), [(1, 0), (3, 2), (-1, 2)])
def test_wilson_refuses_what_is_no_share(right, asked):
    with pytest.raises(ValueError, match=f"got {right} of {asked}"):
        wilson(right, asked)


@pytest.mark.parametrize(  # Clopper and Pearson: 5 of 10 begins at 18.71 %, 1 of 2 at 1.26 %, 10 of 10 at 69.15 %
    ("right", "asked", "low"), [(5, 10, 0.1871), (1, 2, 0.0126), (10, 10, 0.6915), (4, 200, 0.0055)]
)
def test_what_passes_a_share(right, asked, low):
    assert passes(right, asked, low - 5e-5)
    assert not passes(right, asked, low + 5e-5)
    assert not passes(0, asked, low)
    assert not passes(right, asked, 1.02)


def test_thousands_of_questions_are_no_overflow():
    """There the interval is the normal one: 0.55 - 1.96 * sqrt(0.55 * 0.45 / 2000) = 0.528."""
    assert passes(1100, 2000, 0.526)
    assert not passes(1100, 2000, 0.530)
    assert not passes(1, 5000, 1e-3)
    assert not passes(0, 5000, 0.0)
    assert passes(1, 5000, 0.0)


class TestPairedDifference:
    def test_agrees_with_the_normal_interval_where_samples_are_single_questions(self):
        dice = np.random.default_rng(1)
        ours, theirs = (dice.random(2000) < 0.7).astype(float), (dice.random(2000) < 0.6).astype(float)
        found = paired_difference([str(i) for i in range(2000)], ours, theirs)
        difference = ours - theirs
        half = 1.96 * difference.std() / 2000**0.5
        assert found.mean == pytest.approx(difference.mean())
        assert found.high - found.mean == pytest.approx(half, rel=0.1)
        assert found.mean - found.low == pytest.approx(half, rel=0.1)

    def test_questions_of_one_sample_count_as_one_observation(self):
        dice = np.random.default_rng(2)
        ours = np.repeat((dice.random(300) < 0.5).astype(float), 9)
        theirs = np.zeros_like(ours)
        clustered = paired_difference([str(i // 9) for i in range(2700)], ours, theirs)
        single = paired_difference([str(i) for i in range(2700)], ours, theirs)
        assert clustered.mean == single.mean
        assert clustered.high - clustered.low == pytest.approx(3 * (single.high - single.low), rel=0.1)

    def test_is_seeded_and_changes_its_sign_with_the_sides(self):
        names = [str(i // 3) for i in range(90)]
        ours, theirs = np.random.default_rng(3).random((2, 90))
        one, same = (paired_difference(names, ours, theirs) for _ in range(2))
        turned = paired_difference(names, theirs, ours)
        assert one == same
        assert (turned.mean, turned.low, turned.high) == pytest.approx((-one.mean, -one.high, -one.low))
        assert paired_difference(names, ours, theirs, seed=1) != one

    def test_no_difference(self):
        same = paired_difference(list("abc"), [1, 0, 1], [1, 0, 1])
        assert (same.mean, same.low, same.high) == (0, 0, 0)


def item(*questions: Question) -> Item:
    return Item(LAYOUTS[0], 0, questions)


def question(type: str, text: str, answer: str, chance: float = 0.0) -> Question:
    return Question("scene", type, text, answer, chance, 0)


class TestPrior:
    def test_the_most_frequent_answer_of_other_samples(self):
        guesser = Guesser([item(*(question("colour_of", "?", a) for a in ("red", "red", "blue")))])
        asked = [(item(), question("colour_of", "?", a, 0.125)) for a in ("red", "blue", "red", "red")]
        assert prior(asked, guesser) == 3 / 4
        asked = [(item(), question("colour_of", "?", a, 0.125)) for a in ("green", "blue", "green", "black")]
        assert prior(asked, guesser) == 1 / 8  # stated chance is better

    def test_one_of_two_named_alternatives(self):
        def compared(a: str, b: str, answer: str) -> Question:
            return question("higher", f"which is higher, the {a} or the {b}?", answer)

        guesser = Guesser([item(compared("red star", "blue ring", "blue ring"), compared("x", "y", "y"))])
        asked = compared("black heart", "cyan cross", "cyan cross"), compared("cyan ring", "red heart", "cyan ring")
        assert prior([(item(), one) for one in asked], guesser) == 1 / 2
        assert guesser.named(item(), question("higher", "how many?", "two")) == ""

    def test_an_unseen_type_is_not_guessed(self):
        assert prior([(item(), question("where_is", "?", "row one"))], Guesser([])) == 0

    def test_guesses_of_the_world_are_near_stated_chance(self):
        """Its answers are balanced: nothing is learnt that is worth more than 15 points."""
        items = draw(1500)
        guesser = learn_guesser(items, 200)
        asked: dict[tuple[str, str], list[tuple[Item, Question]]] = {}
        for one in items:
            for q in one.questions:
                asked.setdefault((q.kind, q.type), []).append((one, q))
        for key, pairs in asked.items():
            if len(pairs) >= 20:
                chance = sum(q.chance for _, q in pairs) / len(pairs)
                assert chance <= prior(pairs, guesser) < chance + 0.15, key
        comparisons = asked["clip", "which_first"]
        assert all(guesser.named(*pair) in pair[1].text for pair in comparisons)
        assert all(guesser.named(*pair) for pair in comparisons)
