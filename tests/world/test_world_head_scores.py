"""Scores of attention heads: which regions count, what a hit is, and what is written."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import head_scores
import pytest
import torch
from head_scores import checksum, frames_of, measure, readings, record, regions_of, watch
from world.sample import Sample
from world.splits import VALIDATION, make

import sparsevila
from sparsevila import Engine
from sparsevila.engine.head_scores import HEAD_SCORES, read_head_scores
from sparsevila.engine.prompt import encode_pieces

DEMO = Path(sparsevila.__file__).parent / "assets" / "demo"


def with_text(kind: str) -> Sample:
    """The first validation sample of a kind that is asked for a text."""
    return next(sample for seed in VALIDATION if any(readings(sample := make(kind, seed))))


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine.load(DEMO, device="cpu", dtype="float32") as engine:
        yield engine


def test_only_texts_that_stand_somewhere_are_asked_for() -> None:
    for kind in ("scene", "page", "clip"):
        sample = with_text(kind)
        asked = list(readings(sample))
        assert len({qa.question for qa in asked}) == len(asked)
        texts = {thing.text for thing in sample.things if thing.text}
        for qa in asked:
            assert qa.regions
            assert any(text in qa.answer for text in texts), qa


@pytest.mark.parametrize("kind", ["page", "clip"])
def test_hits_equal_the_whole_softmax(engine: Engine, kind: str) -> None:
    """With loops over heads and tokens, and the boxes compared in pixels."""
    sample = with_text(kind)
    qa = next(readings(sample))
    with torch.inference_mode():
        tokens = engine.model.encode(engine.model.preprocess(frames_of(sample)))
        hits, right, size = watch(engine, tokens, sample, qa)
        model, tokenizer, decoder = engine.model, engine.tokenizer, engine.model.decoder
        before = encode_pieces(tokenizer, model.prompt.opening(first=True, system=None), start=True)
        question = encode_pieces(tokenizer, model.prompt.question(qa.question, after_media=True), start=False)
        answer = tokenizer.encode(f" {qa.answer}", first=False)
        parts = [decoder.embed(torch.tensor(before)), model.embed_visual(tokens)]
        hidden = torch.cat([*parts, decoder.embed(torch.tensor([*question, *answer]))])
        M = len(hidden)
        angles = decoder.angles(torch.arange(M))
        _, height, width, _ = sample.rgb.shape
        where = tokens.token_map

        def touches(i: int) -> bool:
            y0, x0, y1, x1 = (where.box[i] * torch.tensor([height, width, height, width])).tolist()
            return not bool(where.structural[i]) and any(
                r.start <= int(where.frame[i]) < r.stop
                and y0 < r.y1 - 1e-3 and y1 > r.y0 + 1e-3 and x0 < r.x1 - 1e-3 and x1 > r.x0 + 1e-3
                for r in qa.regions
            )  # fmt: skip

        assert size == sum(map(touches, range(len(where))))
        for index, layer in enumerate(decoder.layers):
            q, k, v = layer.project(hidden, *angles)
            s = (q.double() @ k.double().transpose(1, 2)) * q.shape[-1] ** -0.5
            p = s.masked_fill(torch.ones(M, M, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)
            for head in range(len(q)):
                for i in range(len(answer)):
                    best = int(p[head, M - 1 - len(answer) + i].argmax()) - len(before)
                    assert bool(hits[index, head, i]) == (0 <= best < len(where) and touches(best))
            hidden = layer.finish(hidden, (p @ v.double()).float())
        said = decoder.logits(hidden)[M - 1 - len(answer) : M - 1].argmax(-1)
    assert right.tolist() == (said == torch.tensor(answer)).tolist()
    assert 0 < float(hits.float().mean()) < 1
    assert len(regions_of(sample, qa)) == len(qa.regions)


def test_what_is_written_can_be_read_and_depends_on_nothing_else(engine: Engine, tmp_path: Path) -> None:
    one, two = (measure(engine, 1) for _ in range(2))
    assert torch.equal(one.hits, two.hits)
    assert 0 < one.tokens <= one.asked
    found = record(one, model_sha256=checksum(DEMO), samples=1)
    (tmp_path / HEAD_SCORES).write_text(json.dumps(found))
    scores = read_head_scores(tmp_path / HEAD_SCORES, num_layers=6, num_heads=3)
    assert [list(row) for row in scores] == found["scores"]
    assert found["model_sha256"] == json.loads((DEMO / HEAD_SCORES).read_text())["model_sha256"]


def test_a_hit_counts_by_the_size_of_its_region() -> None:
    tally = head_scores.Tally(torch.zeros(1, 2, dtype=torch.float64))
    hits = torch.tensor([[[True, True, True], [False, True, False]]])
    tally.add(hits, torch.tensor([True, True, False]), 4)
    tally.add(hits, torch.tensor([True, False, False]), 2)
    assert record(tally, model_sha256="", samples=1)["scores"] == [[round((2 / 4 + 1 / 2) / 3, 6), round(1 / 4 / 3, 6)]]


def test_a_model_that_reads_nothing_is_refused(engine: Engine) -> None:
    tally = head_scores.Tally(torch.zeros(6, 3, dtype=torch.float64))
    tally.add(torch.ones(6, 3, 4, dtype=torch.bool), torch.zeros(4, dtype=torch.bool), 2)
    with pytest.raises(SystemExit, match="got 0 of 4 tokens right"):
        record(tally, model_sha256="", samples=1)
