"""The random control: SparseVILA's counts, other tokens, the same ones each time."""

from __future__ import annotations

import pytest
import torch
from oracles import write_clip

from sparsevila import Engine, SamplingParams, Sparsity, Video
from sparsevila.engine.sparsity.random import RandomTokens
from sparsevila.engine.sparsity.registry import make_method
from sparsevila.engine.sparsity.sparsevila import SparseVILA
from sparsevila.models.interface import TokenMap, VisualTokens


def video(frames: int, per_frame: int, seed: int = 0) -> VisualTokens:
    n = frames * per_frame
    flat = torch.zeros(n, dtype=torch.int32)
    frame = torch.arange(frames, dtype=torch.int32).repeat_interleave(per_frame)
    where = TokenMap(flat, frame, torch.zeros(n, 4), flat.bool(), flat - 1)
    return drawn(where, seed)


def picture(rows: int, cols: int, base: int, seed: int = 0) -> VisualTokens:
    """A base picture, then rows closed by a newline."""
    line = torch.cat([torch.full((base,), -1), torch.arange(rows).repeat_interleave(cols + 1)]).to(torch.int32)
    column = torch.arange(rows * (cols + 1)) % (cols + 1)
    structural = torch.cat([torch.zeros(base, dtype=torch.bool), column == cols])
    zeros = torch.zeros(len(line), dtype=torch.int32)
    return drawn(TokenMap(zeros, zeros, torch.zeros(len(line), 4), structural, line), seed)


def drawn(where: TokenMap, seed: int) -> VisualTokens:
    generator = torch.Generator().manual_seed(seed)
    features = torch.rand(len(where), 5, generator=generator)
    return VisualTokens(features, where, torch.rand(len(where), generator=generator).masked_fill(where.structural, 0))


def scores(seed: int, layers: int = 3, entries: int = 40) -> list[torch.Tensor]:
    return list(torch.rand(layers, entries, generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("removed", [0.1, 0.6, 0.75, 0.95])
@pytest.mark.parametrize("scope", ["per_frame", "global"])
def test_prefill_keeps_as_many_as_sparsevila(removed, scope):
    for tokens, kind in ((video(5, 12), "video"), (picture(3, 4, base=6), "image")):
        where = tokens.token_map
        ours, theirs = (cls(removed, 0.0, scope) for cls in (RandomTokens, SparseVILA))
        keep = ours.on_vision(tokens, kind).sources
        ranked = where.select(keep).num_visual
        assert ranked == ours.planned_keep(where, kind) == theirs.planned_keep(where, kind)
        assert torch.equal(keep, keep.unique())
        if scope == "per_frame" and kind == "video":
            assert len(where.frame[keep].bincount().unique()) == 1


def test_a_newline_stays_exactly_while_its_row_has_a_token():
    standing = set()
    for seed in range(20):
        where = picture(6, 3, base=4, seed=seed).token_map
        keep = RandomTokens(prefill=0.8).on_vision(picture(6, 3, base=4, seed=seed), "image").sources
        kept = where.select(keep)
        rows = set(kept.line[~kept.structural].tolist()) - {-1}
        assert set(kept.line[kept.structural].tolist()) == rows
        standing.add(len(rows))
    assert len(standing) > 1  # rows did fall


@pytest.mark.parametrize("removed", [0.25, 0.75, 0.9])
def test_a_turn_reads_as_many_as_sparsevila(removed):
    ours, theirs = RandomTokens(decode=removed).on_turn(scores(1)), SparseVILA(decode=removed).on_turn(scores(1))
    assert [len(layer) for layer in ours] == [len(layer) for layer in theirs]
    assert all(torch.equal(layer, layer.unique()) for layer in ours)
    uneven = [torch.arange(6.0), torch.arange(3.0)]
    assert [len(layer) for layer in RandomTokens(decode=0.5).on_turn(uneven)] == [3, 2]


def test_the_same_content_and_seed_give_the_same_set():
    method = RandomTokens(prefill=0.5, decode=0.5)
    assert torch.equal(method.on_vision(video(4, 16), "video").sources, method.on_vision(video(4, 16), "video").sources)
    for one, other in zip(method.on_turn(scores(2)), method.on_turn(scores(2)), strict=True):
        assert torch.equal(one, other)


def test_sets_differ_by_media_by_question_by_layer_and_by_seed():
    method, seeded = RandomTokens(prefill=0.5, decode=0.5), RandomTokens(prefill=0.5, decode=0.5, seed=1)
    first = method.on_vision(video(4, 16), "video").sources
    assert not torch.equal(first, method.on_vision(video(4, 16, seed=1), "video").sources)
    assert not torch.equal(first, seeded.on_vision(video(4, 16), "video").sources)
    turn = method.on_turn(scores(2))
    assert not torch.equal(turn[0], turn[1])
    assert not torch.equal(turn[0], method.on_turn(scores(3))[0])
    assert not torch.equal(turn[0], seeded.on_turn(scores(2))[0])


def test_every_token_is_as_likely():
    """Saliency and scores have no say: over many media each of 20 tokens is kept about as often."""
    kept = torch.zeros(20)
    read = torch.zeros(20)
    method = RandomTokens(prefill=0.75, decode=0.75)
    for seed in range(2000):
        kept[method.on_vision(video(1, 20, seed), "video").sources] += 1
        read[method.on_turn(scores(seed, layers=1, entries=20))[0]] += 1
    for counts in (kept, read):
        assert counts.sum() == 2000 * 5
        assert (counts - 500).abs().max() < 5 * (2000 * 0.25 * 0.75) ** 0.5


def test_zero_bypasses_everything():
    method = make_method(Sparsity(method="random"))
    assert method.on_vision(video(2, 4), "video") is None
    assert method.on_turn(scores(0)) is None
    assert not method.scores_turn


def test_a_session_repeats_its_answer(oracles, tmp_path):
    clip = Video(write_clip(tmp_path / "clip.mp4", frames=6).source, frames=6)
    policy, params = Sparsity(0.5, 0.75, method="random"), SamplingParams(max_new_tokens=6)
    with Engine.load(oracles["video"].folder, device="cpu", dtype="float32") as engine:
        session = engine.session(media=[clip], sparsity=policy)
        first = session.ask("What?", params=params, remember=False)
        one = session.selection()
        session.ask("And then?", params=params, remember=False)
        other = session.selection()
        again = session.ask("What?", params=params, remember=False)
        two = session.selection()
        fresh = engine.session(media=[clip], sparsity=policy)
        alone = fresh.ask("What?", params=params)
        three = fresh.selection()
    assert first.token_ids == again.token_ids == alone.token_ids
    assert torch.equal(one.store, three.store)
    same = zip(one.active, two.active, three.active, strict=True)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in same)
    assert any(not torch.equal(a, b) for a, b in zip(one.active, other.active, strict=True))
