"""Questions: answered by the picture, by nothing else, and not by each other."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
from world.sample import QA, Plan
from world.splits import KINDS, PHRASES, make_plan, world_vocabulary
from world.vocabulary import COLOURS, SHAPES, SIZES, words_of

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "scene": ("scene", {}),
    "small scene": ("scene", {"width": 64, "height": 64}),
    "page": ("page", {}),
    "small page": ("page", {"width": 64, "height": 64}),
    "clip": ("clip", {}),
    "short clip": ("clip", {"frames": 4}),
    "long clip": ("clip", {"frames": 64}),
}
NUM_PLANS = {"scene": 4000, "page": 3600, "clip": 4000}  # the others: 800
SLACK = 0.05  # by which a blind guesser may pass the stated chance
MOST_ANSWERS = 100  # of a type for which elimination is tried: of the others it cannot leave few
FEWEST = 300  # turns of a type for which its guesses are judged
COMPARISONS = {"further_left": " the ", "higher": " the ", "which_first": " the ", "larger": " "}


@cache
def plans(variant: str) -> list[Plan]:
    kind, options = VARIANTS[variant]
    return [make_plan(kind, seed, **options)[0] for seed in range(NUM_PLANS.get(variant, 800))]


def turns(variant: str) -> Iterator[QA]:
    return (turn for plan in plans(variant) for turn in plan.dialogue)


@pytest.mark.parametrize("kind", KINDS)
def test_every_type_is_asked_in_several_ways(kind: str) -> None:
    asked = Counter(turn.type for plan in plans(kind) for turn in (*plan.dialogue, *plan.alone))
    assert set(asked) == set(PHRASES[kind])
    assert min(asked.values()) > 100
    assert all(len(set(phrases)) >= 3 for phrases in PHRASES[kind].values())


@pytest.mark.parametrize("variant", VARIANTS)
def test_words_are_lower_case_and_of_the_vocabulary(variant: str) -> None:
    known = set(world_vocabulary())
    for plan in plans(variant)[:500]:
        drawn = {thing.text for thing in plan.things}
        for turn in (*plan.dialogue, *plan.alone):
            assert re.fullmatch(r"[a-z0-9 ,]+[?.]", turn.question), turn.question
            assert re.fullmatch(r"[a-z0-9]+((,)? [a-z0-9]+)*", turn.answer), turn.answer
            for word in words_of(f"{turn.question} {turn.answer}"):
                assert word in known or word in drawn, f"{word!r} in {turn}"


def test_codes_are_not_words() -> None:
    known = set(world_vocabulary())
    for variant in ("scene", "page", "clip"):
        for plan in plans(variant)[:500]:
            for thing in plan.things:
                if thing.role == "code":
                    assert not any(thing.text.startswith(word) for word in known)


@pytest.mark.parametrize("variant", VARIANTS)
def test_dialogues_keep_their_rules(variant: str) -> None:
    for plan in plans(variant):
        assert 3 <= len(plan.dialogue) <= 8
        told: set[tuple[int, str]] = set()
        said: set[str] = set()
        closed: set[str] = set()
        regions = [frozenset(turn.regions) for turn in plan.dialogue if turn.regions]
        assert len(set(regions)) == len(regions)
        for turn in plan.dialogue:
            words = set(words_of(f"{turn.question} {turn.answer}"))
            assert turn.asks
            assert turn.asks <= turn.tells
            assert not turn.asks & told, f"{turn} was answered before"
            assert not words & closed, f"{turn} is about what was counted"
            if turn.type in ("count_colour", "count_shape"):
                counted = words & {*COLOURS, *SHAPES}
                assert len(counted) == 1
                assert not counted & said
                closed |= counted
            told |= turn.tells
            said |= words


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_read_was_not_said_before(variant: str) -> None:
    """Numbers, codes, words of rows and places are long answers to guess: none occurs in an earlier turn."""
    read = ("read_number", "read_code", "read_tag", "read_label", "read_row", "title", "reference", "shown_with")
    names = ("first", "last", "after", "what_changes", "shown_while")
    for plan in plans(variant):
        said: set[str] = set()
        pairs = ""
        for turn in plan.dialogue:
            if turn.type in read or turn.type.startswith("needle"):
                assert not said & set(words_of(turn.answer)), f"{turn} was said before"
            if turn.type in names:
                assert turn.answer not in pairs, f"{turn} was said before"
            said |= set(words_of(f"{turn.question} {turn.answer}"))
            pairs += f"{turn.question} {turn.answer}. "


@pytest.mark.parametrize("variant", ["scene", "page"])
def test_no_thing_is_the_subject_of_two_turns(variant: str) -> None:
    for plan in plans(variant):
        subjects = [{ident for ident, _ in turn.tells if ident} for turn in plan.dialogue]
        assert sum(len(found) for found in subjects) == len(set().union(*subjects))


@pytest.mark.parametrize("variant", VARIANTS)
def test_regions_lie_inside(variant: str) -> None:
    for plan in plans(variant)[:300]:
        for turn in (*plan.dialogue, *plan.alone):
            for box in turn.regions:
                assert 0 <= box.start < box.stop <= plan.frames
                assert 0 <= box.x0 < box.x1 <= plan.width
                assert 0 <= box.y0 < box.y1 <= plan.height


def accuracy(variant: str, key: Any) -> dict[str, tuple[float, float, int]]:
    """Of a guesser that learned the commonest answer to each `key(turn, earlier turns)` from the first half.

    By type: accuracy on the second half, the stated chance, the number of turns.
    """
    table: dict[Any, Counter[str]] = defaultdict(Counter)
    found = plans(variant)
    half = len(found) // 2
    right: dict[str, list[bool]] = defaultdict(list)
    chances: dict[str, list[float]] = defaultdict(list)
    for i, plan in enumerate(found):
        for j, turn in enumerate(plan.dialogue):
            keys = ((turn.type, key(turn, plan.dialogue[:j])), (turn.type, None))
            if i < half:
                for one in keys:
                    table[one][turn.answer] += 1
            else:
                counter = table.get(keys[0]) or table.get(keys[1]) or Counter([""])
                right[turn.type].append(counter.most_common(1)[0][0] == turn.answer)
                chances[turn.type].append(turn.chance)
    return {type: (mean(right[type]), mean(chances[type]), len(right[type])) for type in right}


def mean(values: list[Any]) -> float:
    return sum(values) / len(values)


BLIND = {
    "the type": lambda turn, earlier: "",
    "the question": lambda turn, earlier: turn.question,
    "what was named": lambda turn, earlier: tuple(w for w in words_of(turn.question) if w in {*COLOURS, *SHAPES}),
    "the answer before": lambda turn, earlier: earlier[-1].answer if earlier else "",
    "how many turns there were": lambda turn, earlier: len(earlier),
    "the types before": lambda turn, earlier: tuple(sorted({other.type for other in earlier})),
}


@pytest.mark.parametrize("variant", ["scene", "page", "clip"])
@pytest.mark.parametrize("known", BLIND)
def test_a_blind_guesser_stays_at_chance(variant: str, known: str) -> None:
    judged = 0
    for type, (right, chance, count) in accuracy(variant, BLIND[known]).items():
        if count >= FEWEST:
            judged += 1
            assert right <= chance + SLACK, f"{type}: {right:.3f} of {count} right, knowing {known}"
    assert judged >= 5


@pytest.mark.parametrize("variant", ["scene", "page", "clip"])
def test_chance_is_not_overstated(variant: str) -> None:
    """A stated chance is reached, but for comparisons, whose guess is one of the two that are named."""
    for type, (right, chance, count) in accuracy(variant, BLIND["the type"]).items():
        if count >= FEWEST and type not in COMPARISONS:
            assert right >= chance - SLACK, f"{type}: {right:.3f} of {count}, stated {chance:.3f}"


@pytest.mark.parametrize("variant", ["scene", "page", "clip"])
def test_comparisons_do_not_favour_a_side(variant: str) -> None:
    for type in COMPARISONS:
        asked = [turn for turn in turns(variant) if turn.type == type]
        if asked:
            seconds = [re.split(r" or ", turn.question)[1].strip(".?").endswith(turn.answer) for turn in asked]
            assert 0.46 < mean(seconds) < 0.54
            assert {turn.chance for turn in asked} == {0.5}


@pytest.mark.parametrize("variant", ["scene", "page", "clip"])
def test_elimination_is_worth_little(variant: str) -> None:
    """Guesses among the answers that no earlier turn said, and among those that one did."""
    possible: dict[str, set[str]] = defaultdict(set)
    for turn in turns(variant):
        possible[turn.type].add(turn.answer)
    gains: dict[tuple[str, str], list[float]] = defaultdict(list)
    for plan in plans(variant)[:1500]:
        said: set[str] = set()
        for turn in plan.dialogue:
            answers = possible[turn.type]
            for what in ("unsaid", "said") if len(answers) <= MOST_ANSWERS else ():
                left = [one for one in answers if said.isdisjoint(words_of(one)) == (what == "unsaid")]
                hit = 1 / len(left) if turn.answer in left else 0.0
                gains[turn.type, what].append(hit - turn.chance)
            said |= set(words_of(f"{turn.question} {turn.answer}"))
    for (type, what), gain in gains.items():
        assert mean(gain) <= SLACK, f"{type}: guessing what is {what}"


@pytest.mark.parametrize("variant", ["scene", "clip"])
def test_existence_is_a_coin(variant: str) -> None:
    said = Counter(turn.answer for turn in turns(variant) if turn.type == "exists")
    assert set(said) == {"yes", "no"}
    assert 0.45 < said["yes"] / said.total() < 0.55


def test_answers_are_long_enough_to_need_the_picture_again() -> None:
    """At least half of the types have answers whose later words, digits or letters are seen in the picture too."""
    known = set(world_vocabulary())
    for kind in KINDS:
        length: dict[str, list[int]] = defaultdict(list)
        for plan in plans(kind)[:1000]:
            for turn in (*plan.dialogue, *plan.alone):
                pieces = [1 if word in known else len(word) for word in words_of(turn.answer)]
                length[turn.type].append(sum(pieces))
        longer = [type for type, found in length.items() if mean(found) >= 2]
        assert len(longer) >= len(length) / 2
        tale = max(length.values(), key=mean)
        assert 10 <= mean(tale) <= 60


def test_sizes_are_told() -> None:
    answers = Counter(turn.answer.split()[0] for turn in turns("scene") if turn.type == "what_is_at")
    assert set(answers) == set(SIZES)
