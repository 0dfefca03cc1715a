"""The oracle itself: `transformers` gives the engine's answers from its own pixels and ids, and can disagree."""

from __future__ import annotations

import pytest
from accuracy.answering import EngineAnswerer
from accuracy.oracle import Oracle, compare
from accuracy.questions import draw

from sparsevila import Engine


@pytest.fixture(scope="module")
def oracle(student):
    return Oracle(student)


@pytest.fixture(scope="module")
def engine(student):
    with Engine.load(student, device="cpu", dtype="float32") as engine:
        yield engine


@pytest.fixture(scope="module")
def asked():
    """A question of each layout, and a long one of the first."""
    items = list({item.layout.name: item for item in draw(100)}.values())
    return [(item, item.questions[0]) for item in items] + [(items[0], items[0].questions[-1])]


def test_answers_are_identical(engine, oracle, asked):
    compared = compare(engine, oracle, asked)
    assert len(compared) == 8
    assert [one.engine for one in compared] == [one.transformers for one in compared]
    assert sum(len(one.engine) for one in compared) > 10
    assert len({one.engine for one in compared}) > 3


def test_another_picture_would_show(engine, oracle, asked, tmp_path):
    answerer = EngineAnswerer(engine, tmp_path)
    for kind in ("scene", "clip"):
        pairs = [(item, question) for item, question in asked if item.layout.kind == kind]
        own, wrong = (
            [oracle.answer(answerer.show(item, picture).media[0], question) for item, question in pairs]
            for picture in ("own", "wrong")
        )
        assert own != wrong, kind
