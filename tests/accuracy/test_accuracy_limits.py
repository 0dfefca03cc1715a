"""What pruning takes away, and why: the truth that hands are given, what stayed of it, and the tables."""

from __future__ import annotations

import pytest
import torch
from accuracy import limits
from accuracy.answering import EngineAnswerer
from accuracy.limits import Asked, ask_about, drawn_regions, finest, hands, ink_of_tokens, needed_regions, summarise
from accuracy.questions import draw
from world.splits import make

from sparsevila import Engine
from sparsevila.engine.sparsity.oracle import touched
from sparsevila.models.interface import Frames, TokenMap


@pytest.fixture(scope="module")
def engine(student):
    with Engine.load(student, device="cpu", dtype="float32") as engine:
        yield engine


def token_map(engine: Engine, sample) -> TokenMap:
    kind = "video" if sample.kind == "clip" else "image"
    times = torch.arange(len(sample.rgb)).double().numpy()
    return engine.model.preprocess(Frames(kind, sample.rgb, times, "<world>", 0.0, sample.kind)).token_map


@pytest.mark.parametrize(("kind", "seed"), [("scene", 5), ("page", 6), ("clip", 7)])
class TestTruth:
    def test_ink_is_that_of_the_pixels_under_a_token(self, engine, kind, seed):
        sample = make(kind, seed)
        where = token_map(engine, sample)
        ink = ink_of_tokens(sample, where)
        _, height, width = sample.mask.shape
        for i in range(0, len(where), 7):
            edges = where.box[i].double() * torch.tensor([height, width, height, width])
            y0, x0, y1, x1 = edges.round().int().tolist()
            want = 0.0 if where.structural[i] else (sample.mask[int(where.frame[i]), y0:y1, x0:x1] > 0).mean()
            assert float(ink[i]) == pytest.approx(want)

    def test_all_ink_is_where_something_is_drawn(self, engine, kind, seed):
        sample = make(kind, seed)
        where = token_map(engine, sample)
        inked = ink_of_tokens(sample, where) > 0
        assert inked.any()
        assert not (inked & ~touched(where, drawn_regions(sample))).any()

    def test_what_is_needed_carries_ink_and_is_seen_in_the_finest_view(self, engine, kind, seed):
        sample = make(kind, seed)
        where = token_map(engine, sample)
        ink, fine = ink_of_tokens(sample, where), finest(where)
        assert not (fine & where.structural).any()
        visual = int((~where.structural).sum())
        assert int(fine.sum()) == (visual if kind == "clip" else visual - 64)  # but for the base view
        for qa in (*sample.dialogue, *sample.alone):
            needed = touched(where, needed_regions(sample, qa)) & fine
            assert (ink[needed] > 0).any(), qa.question


def test_the_tiles_are_the_finest_view(engine):
    where = token_map(engine, make("scene", 5, width=128, height=128))
    fine = finest(where)
    assert not fine[:64].any()
    assert fine[64:].sum() == 4 * 64


def test_hands_keep_what_they_know(engine, tmp_path):
    item = next(item for item in draw(40) if item.layout.kind == "scene")
    chosen = hands(0.6, 0.75)
    some = {name: chosen[name] for name in ("dense", "SparseVILA", "knows the question", "dice")}
    answers = list(ask_about(engine, EngineAnswerer(engine, tmp_path), item, some))
    assert [one.hand for one in answers] == list(some) * len(item.questions)
    for one in answers:
        assert one.needed > 0
        assert 0 <= one.kept <= one.needed
        if one.hand == "dense":
            assert one.kept == one.needed
    by_hand = {name: [one.kept for one in answers if one.hand == name] for name in some}
    assert all(a >= b for a, b in zip(by_hand["knows the question"], by_hand["SparseVILA"], strict=True))
    assert sum(by_hand["knows the question"]) > sum(by_hand["dice"])
    assert len({one.ink for one in answers}) == 1


def test_tables_pair_each_hand_with_dense_answers_to_the_same_questions():
    def asked(hand: str, number: int, right: float, kept: int, ink: float) -> Asked:
        off = 0 if right else 2
        return Asked(f"sample {number}", "scene", "colour", False, hand, right, None, ink, 4, kept, off)

    answers = []
    for number in range(20):
        odd = number % 2
        answers += [asked("dense", number, 1.0, 4, 0.1 + 0.5 * odd)]
        answers += [asked("pruned", number, 1.0 - odd, 1 if odd else 4, 0.1 + 0.5 * odd)]
    tables = summarise(answers)
    rows = {(row["hand"], row["kind"]): row for row in tables["rows"]}
    assert rows["pruned", "all"]["accuracy"] == 0.5
    assert rows["pruned", "all"]["dense"] == 1.0
    assert rows["pruned", "all"]["difference"]["mean"] == -0.5
    assert rows["pruned", "all"]["kept_of_needed"] == pytest.approx(2.5 / 4)
    kept = {row["stayed"]: row for row in tables["by_kept"] if row["hand"] == "pruned"}
    assert kept["all of it"]["accuracy"] == 1.0
    assert kept["less than half"]["accuracy"] == 0.0
    assert "half or more" not in kept
    ink = {row["ink_from"]: row["accuracy"] for row in tables["by_ink"] if row["hand"] == "pruned"}
    assert ink == {0.0: 1.0, 0.6: 0.0}
    (of_type,) = [row for row in tables["by_type"] if row["hand"] == "pruned"]
    assert (of_type["kind"], of_type["type"], of_type["accuracy"]) == ("scene", "colour", 0.5)
    assert {row["hand"]: (row["n"], row["low"], row["high"]) for row in tables["counts"]} == {
        "dense": (20, 0, 0), "pruned": (20, 0, 10)
    }  # fmt: skip


def test_numbers_in_words():
    assert limits._off("four", "two") == 2
    assert limits._off("one", "two") == -1
    assert limits._off("red", "two") is None
    assert limits._off("two", "number 2") is None
