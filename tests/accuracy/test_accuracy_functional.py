"""What retrieval reads: figures of made-up dialogues by hand, and of a real one against the session's own sets."""

from __future__ import annotations

import itertools
from dataclasses import replace
from statistics import fmean

import pytest
from accuracy.answering import EngineAnswerer
from accuracy.functional import Looked, ask, example, look_at, summarise
from accuracy.questions import draw

from sparsevila import Engine, Sparsity

SPARSE = Sparsity(0.6, 0.75)


@pytest.fixture(scope="module")
def engine(student):
    with Engine.load(student, device="cpu", dtype="float32") as engine:
        yield engine


@pytest.fixture(scope="module")
def items():
    return {item.layout.kind: item for item in reversed(draw(200)) if len(item.dialogue) > 1}


@pytest.mark.parametrize("kind", ["scene", "clip"])
def test_a_dialogue_is_that_of_the_sessions_own_sets(engine, items, tmp_path, kind):
    answerer = EngineAnswerer(engine, tmp_path)
    looked = look_at(engine, answerer, items[kind], SPARSE)
    selections = ask(engine, answerer, items[kind], SPARSE)
    assert looked.turns == len(selections) == len(items[kind].dialogue)
    for layer in range(6):
        sets = [set(selection.active[layer].tolist()) for selection in selections]
        store = len(selections[0].store)
        always, ever = set.intersection(*sets), set.union(*sets)
        assert looked.sinks[layer] == pytest.approx(len(always) / store)
        assert looked.retrieval[layer] == pytest.approx(len(ever - always) / store)
        pairs = [len(a & b) / len(a | b) for a, b in itertools.pairwise(sets)]
        assert looked.jaccard[layer] == pytest.approx(fmean(pairs))
        mass = [float(s.scores[layer][s.active[layer]].sum() / s.scores[layer].sum()) for s in selections]
        assert looked.recovered[layer] == pytest.approx(fmean(mass))
        assert looked.read == pytest.approx(len(sets[0]) / store)
        assert 0 <= looked.needed[layer] <= 1


def test_rows_are_means_over_dialogues(items):
    one = Looked(items["scene"], 3, 0.25, [0.5], [0.1], [0.4], [0.8], [0.6], [1.0], [0.5], 0.3)
    other = replace(one, item=items["clip"], read=0.35, jaccard=[0.7], needed=[], ink_sinks=[None])
    rows = {row["kind"]: row for row in summarise([one, other])}
    assert rows["all"]["jaccard"] == pytest.approx(0.6)
    assert rows["all"]["jaccard_by_chance"] == pytest.approx(0.3 / 1.7)
    assert rows["all"]["needed"] == 0.6
    assert rows["all"]["ink_sinks"] == 1.0
    assert rows["clip"]["needed"] is None
    assert rows["clip"]["dialogues"] == 1


def test_an_example_names_tokens_of_the_picture(engine, items, tmp_path):
    shown = example(engine, EngineAnswerer(engine, tmp_path), items["scene"], SPARSE)
    assert len(shown["boxes"]) == len(shown["frames"])
    assert len(shown["read"]) == len(shown["questions"])
    for layer, sinks in enumerate(shown["sinks"]):
        assert all(set(sinks) <= set(turn[layer]) for turn in shown["read"])
    assert max(max(turn[0]) for turn in shown["read"]) < len(shown["boxes"])
