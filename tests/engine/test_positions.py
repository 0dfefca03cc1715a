"""Where survivors of pruning stand: each where it stood, or moved up; and what the context has to say about it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from families import TinyFolders
from oracles import write_clip

from sparsevila import ContextTooLong, Engine, Image, InvalidRequest, SamplingParams, Session, Sparsity, Video

SHORT = SamplingParams(max_new_tokens=4)
HALF = Sparsity(0.5, 0.5)
QUESTION = "What is it?"


def picture(seed: int = 0) -> Image:
    return Image(np.random.default_rng(seed).integers(0, 256, (70, 90, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def engine(tiny_folders: TinyFolders) -> Iterator[Engine]:
    with Engine.load(tiny_folders["vicuna"], device="cpu", dtype="float32") as engine:
        yield engine


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Video:
    return replace(write_clip(tmp_path_factory.mktemp("clip") / "clip.mp4", frames=6), frames=4)


def taken(session: Session) -> int:
    """Positions of the session's prefix: what its media and the text before them take."""
    session.ask(QUESTION, params=SHORT, remember=False)
    return session._cache.next_position


def sizes(engine: Engine) -> tuple[int, int, int]:
    """Of one picture: positions before it, its tokens, and those that half of it leaves."""
    session = engine.session(media=[picture()], sparsity=replace(HALF, positions="contiguous"))
    end = taken(session)
    (placed,) = session._state.placed
    return placed.start, len(placed.tokens), end - placed.start


def test_three_ways(engine):
    before, total, kept = sizes(engine)
    assert kept < total
    assert taken(engine.session(media=[picture()], sparsity=replace(HALF, positions="original"))) == before + total
    assert taken(engine.session(media=[picture()], sparsity=HALF)) == before + total
    assert taken(engine.session(media=[picture()], sparsity=Sparsity(0.0, 0.5))) == before + total


def test_keys_are_rotated_by_the_places_they_kept(engine):
    """In the first layer keys depend on the token and its position alone."""
    dense, sparse = (engine.session(media=[picture()], sparsity=s) for s in (Sparsity(), HALF))
    taken(dense)
    taken(sparse)
    structural = dense._state.placed[0].tokens.token_map.structural
    among_visual = torch.cumsum(~structural, 0) - 1
    kept = among_visual[sparse._state.placed[0].in_store()]
    assert torch.equal(sparse._cache.visual_keys(0), dense._cache.visual_keys(0)[:, kept])
    moved = engine.session(media=[picture()], sparsity=replace(HALF, positions="contiguous"))
    taken(moved)
    assert not torch.allclose(moved._cache.visual_keys(0), sparse._cache.visual_keys(0), atol=1e-3)


def test_they_move_up_where_all_places_would_not_fit(engine, tiny_folders):
    before, total, kept = sizes(engine)
    room = 4 * (before + total) // 3  # a quarter of the context is left for text
    for context, end in ((room + 1, before + total), (room - 2, before + kept)):
        with Engine.load(tiny_folders["vicuna"], device="cpu", dtype="float32", max_context=context) as small:
            session = small.session(media=[picture()], sparsity=HALF)
            assert taken(session) == end
            moved = end == before + kept
            assert any("what survives pruning moves up" in note for note in session.media[0].notes) == moved
            assert len(session.media[0].notes) == len(set(session.media[0].notes))
            # The question has no say in it.
            session.ask(QUESTION * 2, params=SHORT)
            assert (session._state.placed[0].places is None) == moved


def test_media_of_one_prompt_move_together(engine, tiny_folders):
    before, total, kept = sizes(engine)
    with Engine.load(tiny_folders["vicuna"], device="cpu", dtype="float32", max_context=2 * total + before) as small:
        session = small.session(media=[picture(), picture(1)], sparsity=HALF)
        between = len(small.tokenizer.encode("\n", first=False))
        assert taken(session) == pytest.approx(before + 2 * kept + between, abs=2)
        assert all(item.notes for item in session.media)
        # An item that comes when the first has taken its places moves up alone, or does not fit.
        alone = small.session(media=[picture()], sparsity=HALF)
        alone.ask("Hi", params=SHORT)
        assert not alone.media[0].notes
        alone.attach(picture(1))
        with pytest.raises(ContextTooLong) as caught:
            alone.ask(QUESTION * 2, params=SHORT)
        assert "positions=contiguous" in caught.value.hint
        alone.sparsity = replace(HALF, positions="contiguous")
        alone.ask(QUESTION * 2, params=SHORT)


def test_what_was_asked_for_and_does_not_fit_is_refused_before_anything_is_encoded(engine, tiny_folders):
    _, total, _ = sizes(engine)
    with Engine.load(tiny_folders["vicuna"], device="cpu", dtype="float32", max_context=total) as small:
        session = small.session(media=[picture()], sparsity=replace(HALF, positions="original"))
        with pytest.raises(ContextTooLong, match=rf"{total} visual") as caught:
            session.ask(QUESTION, params=SHORT)
        assert "positions=contiguous" in caught.value.hint
        assert session._state.media[0].tokens is None
        session.sparsity = HALF
        assert session.ask(QUESTION, params=SHORT).finish_reason in ("stop", "length")


def test_the_default_number_of_frames_counts_what_a_frame_takes(tiny_folders, tmp_path):
    clip = write_clip(tmp_path / "clip.mp4", frames=40)
    with Engine.load(tiny_folders["video"], device="cpu", dtype="float32", max_context=600) as small:
        frames = {
            positions: small.session(media=[clip], sparsity=Sparsity(0.75, positions=positions)).media[0].frames
            for positions in ("auto", "original", "contiguous")
        }
    assert frames["original"] < frames["auto"] == frames["contiguous"]


def test_three_axes_have_their_own_switch(tiny_folders):
    with Engine.load(tiny_folders["qwen2"], device="cpu", dtype="float32") as engine:
        session = engine.session(media=[picture()], sparsity=replace(HALF, positions="original"))
        with pytest.raises(InvalidRequest, match="three axes") as caught:
            session.ask(QUESTION)
        assert "--positions" in caught.value.hint


@pytest.mark.parametrize(("method", "keeps"), [("random", True), ("visionzip", False), ("prumerge+", False)])
def test_methods_have_their_authors_way_unless_asked(engine, method, keeps):
    before, total, _ = sizes(engine)
    own = taken(engine.session(media=[picture()], sparsity=Sparsity(0.5, method=method)))
    assert (own == before + total) == keeps
    asked = Sparsity(0.5, method=method, positions="contiguous" if keeps else "original")
    assert (taken(engine.session(media=[picture()], sparsity=asked)) == before + total) != keeps


def test_another_choice_prefills_again(engine):
    session = engine.session(media=[picture()], sparsity=HALF)
    session.ask(QUESTION, params=SHORT)
    session.sparsity = replace(HALF, positions="contiguous")
    session.ask(QUESTION, params=SHORT)
    assert session._state.placed[0].places is None


def test_an_unknown_choice_is_refused():
    with pytest.raises(InvalidRequest, match="positions: expected 'auto' or 'original' or 'contiguous', got 'regrid'"):
        Sparsity(positions="regrid")  # type: ignore[arg-type]
