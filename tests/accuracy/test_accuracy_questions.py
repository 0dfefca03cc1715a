"""Which questions are asked: held-out, whole conversations, the same each time."""

from __future__ import annotations

import pytest
from accuracy.questions import LAYOUTS, LONG_TYPES, count, draw, first_items
from world.splits import PHRASES, TEST, make


def test_shares_make_a_whole():
    assert sum(layout.share for layout in LAYOUTS) == pytest.approx(1)
    assert len({layout.name for layout in LAYOUTS}) == len({layout.first for layout in LAYOUTS}) == len(LAYOUTS)


@pytest.mark.parametrize("number", [1, 150, 700])
def test_each_layout_gets_its_share(number):
    items = draw(number)
    assert items == draw(number)
    for layout in LAYOUTS:
        own = [item for item in items if item.layout == layout]
        assert number * layout.share <= count(own) < number * layout.share + max(len(i.questions) for i in own)
        assert sorted(item.seed for item in own) == [TEST[layout.first + i] for i in range(len(own))]


def test_more_questions_are_asked_of_more_samples():
    few, many = draw(100), draw(400)
    assert {item.key for item in few} < {item.key for item in many}


def test_seeds_are_held_out_and_no_wrong_picture_is_asked_about():
    items = draw(2000)
    asked = {item.seed for item in items}
    assert len(asked) == len(items)
    for item in items:
        assert item.seed in TEST
        assert item.wrong_seed in TEST
        assert item.wrong_seed not in asked


def test_questions_are_those_of_the_sample_the_dialogue_first():
    for item in draw(60):
        sample = make(item.layout.kind, item.seed, **item.layout.options)
        turns = (*sample.dialogue, *sample.alone)
        assert [(q.type, q.text, q.answer, q.chance) for q in item.questions] == [
            (qa.type, qa.question, qa.answer, qa.chance) for qa in turns
        ]
        assert [q.turn for q in item.questions] == [*range(len(sample.dialogue)), *[-1] * len(sample.alone)]
        assert item.dialogue == item.questions[: len(sample.dialogue)]


def test_the_first_part_holds_all_layouts():
    items = draw(1000)
    part = first_items(items, 150)
    chosen = [item for item in items if item.key in part]
    assert 150 <= count(chosen) < 165
    assert {item.layout.name for item in chosen} == {layout.name for layout in LAYOUTS}
    assert first_items(items, 0) == frozenset()
    assert len(first_items(items, 10**6)) == len(items)


def test_long_types_are_those_whose_answers_are_lists():
    assert {type for kind, type in LONG_TYPES} <= {type for table in PHRASES.values() for type in table}
    for item in draw(1500):
        for question in item.questions:
            assert question.is_long or "," not in question.answer
