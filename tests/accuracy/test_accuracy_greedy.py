"""The greedy oracle: groups that cover a picture, growth by the likelihood of the true answer, rows."""

from __future__ import annotations

import itertools

import pytest
from accuracy import greedy
from accuracy.answering import EngineAnswerer, Setting
from accuracy.greedy import GREEDY, Asked, ask_about, groups_of, grow, samples, summarise
from accuracy.limits import finest

from sparsevila import Engine


@pytest.fixture(scope="module")
def engine(student):
    with Engine.load(student, device="cpu", dtype="float32") as engine:
        yield engine


@pytest.fixture
def shown(engine, tmp_path):
    answerer = EngineAnswerer(engine, tmp_path)
    item = samples("scene 128x128", 1)[0]
    return answerer, item, answerer.show(item, "own").media


def test_groups_cover_every_view_once(engine, shown):
    _, _, media = shown
    where = greedy._encoded_map(engine, media)
    groups = groups_of(where)
    members = sorted(i for group in groups for i in group)
    assert members == [i for i in range(len(where)) if not where.structural[i]]
    assert {len(group) for group in groups} == {4}
    fine = finest(where)
    for group in groups:
        assert len({bool(fine[i]) for i in group}) == 1  # of one view
        box = where.box[list(group)]
        sides = box[0, 2:] - box[0, :2]
        assert (box[:, 2:].max(0).values - box[:, :2].min(0).values).tolist() == pytest.approx((2 * sides).tolist())


def test_it_takes_what_makes_the_answer_likeliest(engine, shown, monkeypatch):
    """A likelihood that is the number of wanted tokens: the greedy set holds their groups first."""
    _, item, media = shown
    groups = [(0, 1), (2, 3), (4, 5), (6, 7, 8)]
    monkeypatch.setattr(greedy, "_likelihood", lambda engine, media, question, keep: len({3, 4, 7} & set(keep)))
    question = item.dialogue[0]
    assert grow(engine, media, question, groups, 4) == (2, 3, 4, 5)
    assert grow(engine, media, question, groups, 1) == ()
    assert grow(engine, media, question, groups, 7) == (2, 3, 4, 5, 6, 7, 8)


def test_the_true_answer_is_likelier_with_what_was_grown_for_it(engine, shown):
    _, item, media = shown
    question = item.dialogue[0]
    groups = groups_of(greedy._encoded_map(engine, media))[:6]
    kept = grow(engine, media, question, groups, 8)
    pairs = [tuple(sorted(a + b)) for a, b in itertools.combinations(groups, 2)]
    likelihoods = sorted(greedy._likelihood(engine, media, question, pair) for pair in pairs)
    assert kept in pairs
    assert greedy._likelihood(engine, media, question, kept) > likelihoods[len(likelihoods) // 2]


def test_a_dialogue_is_asked_over_the_set_of_its_first_question(engine, shown, monkeypatch):
    answerer, item, _ = shown
    grown = []
    monkeypatch.setattr(greedy, "grow", lambda *rest: grown.append(rest[2]) or (1, 2, 3))
    answers = list(ask_about(engine, answerer, item, [Setting.parse("sparsevila:0.9/0")], 0.9))
    short = [question for question in item.dialogue if not question.is_long]
    assert grown == [short[0]]
    assert [one.setting for one in answers] == [GREEDY] * len(short) + ["sparsevila:0.9/0"] * len(short)
    assert [one.later for one in answers] == 2 * [False, *[True] * (len(short) - 1)]
    assert {one.active for one in answers if one.setting == GREEDY} == {3}


def test_rows():
    answers = []
    for i in range(4):
        answers += [Asked(f"s{i}", GREEDY, False, 1.0, 8), Asked(f"s{i}", GREEDY, True, 0.0, 8)]
        answers += [Asked(f"s{i}", "other", False, float(i % 2), 9), Asked(f"s{i}", "other", True, 1.0, 9)]
    rows = {(row["setting"], row["questions"]): row for row in summarise(answers)}
    assert rows[GREEDY, "first"]["accuracy"] == 1.0
    assert rows["other", "later"]["greedy_minus_this"]["mean"] == -1.0
    assert rows["other", "first"]["greedy_minus_this"]["mean"] == 0.5
    assert rows["other", "first"]["active"] == 9
    assert len(rows) == 4
