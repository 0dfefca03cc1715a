"""The invariants of a session: what later turns see, what is forgotten and what never is."""

from __future__ import annotations

import asyncio
import gc
import warnings
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES, TinyFolders
from oracles import TINY, VISUAL_SEED, write_clip

from sparsevila import (
    Closed,
    ContextTooLong,
    Engine,
    Image,
    InsufficientMemory,
    InvalidRequest,
    MediaError,
    SamplingParams,
    Session,
    SessionBusy,
    SparseVILAError,
    Sparsity,
    Video,
)
from sparsevila.engine.conversation import Placed, State
from sparsevila.engine.runner import Runner, TextSpan, VisualSpan
from sparsevila.engine.sparsity.base import Method
from sparsevila.models.interface import Progress

DENSE, SPARSE = Sparsity(0.0, 0.0), Sparsity(0.5, 0.75)
SHORT = SamplingParams(max_new_tokens=6)
QUESTIONS = ("What is it?", "Which colour is the car on the left?", "And then?")


def picture(seed: int = VISUAL_SEED, height: int = 70, width: int = 90) -> Image:
    rng = np.random.default_rng(seed)
    return Image(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Video:
    return write_clip(tmp_path_factory.mktemp("clip") / "clip.mp4", frames=12)


class Engines(dict[str, Engine]):
    """An engine of each family, loaded when it is first asked for."""

    def __init__(self, folders: TinyFolders) -> None:
        super().__init__()
        self.folders = folders

    def __missing__(self, name: str) -> Engine:
        self[name] = Engine.load(self.folders[name], device="cpu", dtype="float32")
        return self[name]


@pytest.fixture(scope="module")
def engines(tiny_folders: TinyFolders):
    loaded = Engines(tiny_folders)
    yield loaded
    for engine in loaded.values():
        engine.close()


def shown(name: str, engines: Engines, clip: Video) -> tuple[Engine, Any]:
    """An engine and an item for it."""
    return engines[name], picture() if FAMILIES[name].shown == "image" else replace(clip, frames=5)


@pytest.fixture(params=FAMILIES)
def media(request, engines, clip) -> tuple[Engine, Any]:
    return shown(request.param, engines, clip)


@pytest.fixture(params=TINY)
def llava(request, engines, clip) -> tuple[Engine, Any]:
    """For what takes long and depends on no model."""
    return shown(request.param, engines, clip)


@pytest.fixture(params=[DENSE, SPARSE], ids=["dense", "sparse"])
def sparsity(request) -> Sparsity:
    return request.param


def cache_contents(session: Session) -> list[torch.Tensor]:
    """Everything a later turn can see."""
    cache = session._cache
    return [t.clone() for stores in (cache.visual, cache.text) for store in stores for t in store.segment()]


def assert_same(a: Session, b: Session) -> None:
    """Bit for bit: cache, positions, history."""
    assert a._state.checkpoint == b._state.checkpoint
    assert a._cache.checkpoint() == b._cache.checkpoint() == a._state.checkpoint
    assert [(t.question, t.answer) for t in a.history] == [(t.question, t.answer) for t in b.history]
    assert [m.source for m in a.media] == [m.source for m in b.media]
    for x, y in zip(cache_contents(a), cache_contents(b), strict=True):
        assert torch.equal(x, y)


def count_encodes(engine: Engine, monkeypatch) -> list[int]:
    calls: list[int] = []
    encode = type(engine.model).encode

    def counted(self, *args, **kwargs):
        calls.append(1)
        return encode(self, *args, **kwargs)

    monkeypatch.setattr(type(engine.model), "encode", counted)
    engine._features.clear()
    return calls


# The plain replay: one masked pass over the whole sequence, no cache, no runner, float64 softmax.


class Replay:
    """What a session's turns must have computed, from its token ids and recorded active sets alone."""

    def __init__(self, session: Session) -> None:
        engine, state = session._engine, session._state
        self.engine, self.decoder = engine, engine.model.decoder
        self.layers = len(self.decoder.layers)
        embeds: list[torch.Tensor] = []
        self.positions: list[torch.Tensor] = []  # (n,) or (3, n) of each part
        self.next_position = 0
        self.visual: list[bool] = []  # per token of the sequence
        self.turn: list[int | None] = []  # the turn whose active set a row reads; None reads everything before it
        self.predicts: list[tuple[int, int, int]] = []  # (turn, row, token that came after it)
        self.questions: list[range] = []

        def text(ids: tuple[int, ...], turn: int | None) -> None:
            embeds.append(self._text(ids))
            self.turn.extend([turn] * len(ids))

        driver = session._driver(None, lambda _: None)
        placed = iter(state.placed)
        for t, record in enumerate(state.records):
            before = record.before
            for i, _ in enumerate(record.media):
                prompt = engine.model.prompt
                text(
                    driver._ids(prompt.between_media() if i else driver._opening(before), start=t == 0 and i == 0), None
                )
                entry = next(placed)
                tokens = entry.survivors.tokens
                embeds.append(engine.model.embed_visual(tokens))
                self._place_media(entry, session.sparsity.positions)
                self.visual.extend((~tokens.token_map.structural).tolist())
                self.turn.extend([None] * len(tokens))
            asked = replace(record.asked, records=state.records[:t])
            start = len(self.turn)
            text(driver._question_ids(asked, record.question), None)
            self.questions.append(range(start, len(self.turn)))
            for token in record.answer_ids:
                self.predicts.append((t, len(self.turn) - 1, token))
                text((token,), t)
            closing = driver._ids(engine.model.prompt.closing())
            if closing:
                text(closing, t)
        self.hidden = torch.cat(embeds)
        self.active = [s.active for s in session.selections]

    def _place_media(self, entry: Placed, asked: str) -> None:
        """Three axes as the model has it; on one axis survivors stand where they stood, or all moved up."""
        token_map, start = entry.survivors.tokens.token_map, self.next_position
        if token_map.grid is not None or asked == "contiguous":
            self._place(*self.engine.model.visual_positions(token_map, start))
        else:
            self._place(start + entry.survivors.sources, start + len(entry.tokens))

    def _place(self, positions: torch.Tensor, next_position: int) -> None:
        self.positions.append(positions)
        self.next_position = next_position

    def _text(self, ids: tuple[int, ...]) -> torch.Tensor:
        self._place(*self.engine.model.text_positions(len(ids), self.next_position))
        self.visual.extend([False] * len(ids))
        return self.decoder.embed(torch.tensor(ids, dtype=torch.long))

    def append(self, ids: tuple[int, ...]) -> None:
        """More text, which reads everything before it."""
        self.hidden = torch.cat([self.hidden, self._text(ids)])
        self.turn += [None] * len(ids)

    def run(self) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Logits (S, V) of every row and attention (H, S, S) float64 of every layer."""
        S = len(self.turn)
        visual = torch.tensor(self.visual)
        cos, sin = self.decoder.angles(torch.cat(self.positions, dim=-1))
        hidden, attention = self.hidden, []
        for i, layer in enumerate(self.decoder.layers):
            allowed = torch.ones(S, S, dtype=torch.bool).tril()
            store = torch.nonzero(visual)[:, 0]
            for row, turn in enumerate(self.turn):
                if turn is not None and self.active[turn] is not None:
                    seen = torch.zeros(S, dtype=torch.bool)
                    seen[store[self.active[turn][i]]] = True
                    allowed[row] &= seen | ~visual
            q, k, v = layer.project(hidden, cos, sin)
            k, v = (x.repeat_interleave(q.shape[0] // k.shape[0], 0).double() for x in (k, v))
            scores = (q.double() @ k.transpose(1, 2)) * q.shape[-1] ** -0.5
            p = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
            attention.append(p)
            hidden = layer.finish(hidden, (p @ v).float())
        return self.decoder.logits(hidden), attention


class TestReplay:
    def test_three_turns_equal_a_masked_pass_over_their_tokens(self, media, sparsity):
        """Dense turns = a prefill of the same ids from scratch; sparse turns = a replay with the recorded sets."""
        engine, item = media
        session = engine.session(media=[item], sparsity=sparsity)
        results = [session.ask(q, params=SamplingParams(max_new_tokens=8)) for q in QUESTIONS]
        replay = Replay(session)
        logits, attention = replay.run()
        assert [token for _, _, token in replay.predicts] == [i for r in results for i in r.token_ids]
        for turn, row, token in replay.predicts:
            assert int(logits[row].argmax()) == token, f"turn {turn}"
        assert replay.next_position == session._cache.next_position
        # Keys and values themselves, in the order of each store.
        visual = torch.tensor(replay.visual)
        assert session._cache.visual_lens() == [int(visual.sum())] * replay.layers
        for turn, selection in enumerate(session.selections):
            if sparsity.decode == 0:
                assert selection.active is None
                continue
            rows = list(replay.questions[turn])
            store = torch.nonzero(visual)[:, 0]
            for layer in range(replay.layers):
                want = attention[layer][:, rows][:, :, store].mean(dim=(0, 1))
                got = selection.scores[layer].double()
                assert (got - want).abs().max() < 1e-5 * want.max()
                k = max(1, int((1 - sparsity.decode) * len(store) + 0.5))
                assert len(selection.active[layer]) == k
                assert torch.equal(selection.active[layer], want.topk(k).indices.sort().values)

    def test_survivors_that_move_up(self, llava):
        engine, item = llava
        session = engine.session(media=[item], sparsity=replace(SPARSE, positions="contiguous"))
        for question in QUESTIONS:
            session.ask(question, params=SHORT)
        replay = Replay(session)
        logits, _ = replay.run()
        assert all(int(logits[row].argmax()) == token for _, row, token in replay.predicts)
        assert replay.next_position == session._cache.next_position == len(replay.turn)

    def test_final_cache_is_that_of_the_masked_pass(self, media, sparsity):
        engine, item = media
        session = engine.session(media=[item], sparsity=sparsity)
        for question in QUESTIONS:
            session.ask(question, params=SHORT)
        replay = Replay(session)
        want, _ = replay.run()
        asked = session._driver(None, lambda _: None)._question_ids(session._state, "Last?")
        session._engine.reserve(session._cache, visual=0, text=len(asked))
        got = engine.runner.logits(engine.runner.prefill(session._cache, [TextSpan(asked)], method=Method()).hidden)
        replay.append(asked)
        want = replay.run()[0][-1]
        assert (got - want).abs().max() < 1e-5 * want.abs().max()


class TestChunks:
    def test_chunked_prefill_equals_whole(self, media):
        engine, item = media
        whole = engine.session(media=[item], sparsity=SPARSE)
        whole.ask(QUESTIONS[0], params=SHORT)
        spans = [TextSpan((1, 5, 6))]
        spans += [VisualSpan(p.survivors.tokens) for p in whole._state.placed]
        spans.append(TextSpan((7, 8, 9, 10)))
        logits, total = [], sum(len(s) for s in spans)
        for chunk in (total, 7, 1):
            runner = Runner(engine.model, chunk_tokens=chunk)
            cache = runner.new_cache()
            cache.reserve(visual=total, text=total)
            logits.append(runner.logits(runner.prefill(cache, spans, method=Method()).hidden))
        for other in logits[1:]:
            assert (other - logits[0]).abs().max() < 1e-5 * logits[0].abs().max()

    def test_results_do_not_depend_on_capacity(self, media, sparsity):
        engine, item = media
        small, large = (engine.session(media=[item], sparsity=sparsity) for _ in range(2))
        large._cache.reserve(visual=3000, text=3000)
        for question in QUESTIONS:
            assert small.ask(question, params=SHORT).token_ids == large.ask(question, params=SHORT).token_ids
        assert_same(small, large)


class TestIndependence:
    def test_interleaved_sessions_equal_separate_ones(self, media, sparsity):
        engine, item = media
        separate = [engine.session(media=[item], sparsity=sparsity) for _ in range(2)]
        for session, question in zip(separate, QUESTIONS, strict=False):
            session.ask(question, params=SHORT)
        mixed = [engine.session(media=[item], sparsity=sparsity) for _ in range(2)]
        streams = [s.stream(q, params=SHORT) for s, q in zip(mixed, QUESTIONS, strict=False)]
        while streams:
            streams = [s for s in streams if next(s, None) is not None]
        for a, b in zip(separate, mixed, strict=True):
            assert_same(a, b)

    @pytest.mark.parametrize("temperature", [0.0, 1.3])
    def test_not_remembering_equals_never_having_asked(self, media, sparsity, temperature):
        engine, item = media
        params = SamplingParams(max_new_tokens=7, temperature=temperature, top_p=0.9, seed=3)
        forgetful, plain = (engine.session(media=[item], sparsity=sparsity) for _ in range(2))
        for remembered in (QUESTIONS[0], QUESTIONS[1]):
            for question in QUESTIONS:
                forgetful.ask(question, params=params, remember=False)
            a, b = (s.ask(remembered, params=params) for s in (forgetful, plain))
            assert a.token_ids == b.token_ids
            assert_same(forgetful, plain)

    def test_media_of_a_turn_that_is_not_remembered_stay(self, media):
        engine, item = media
        session = engine.session(sparsity=SPARSE)
        session.ask(QUESTIONS[0], media=[item], params=SHORT, remember=False)
        assert len(session.media) == 1
        assert session.history == ()
        fresh = engine.session(media=[item], sparsity=SPARSE)
        assert session.ask(QUESTIONS[1], params=SHORT).token_ids == fresh.ask(QUESTIONS[1], params=SHORT).token_ids
        assert_same(session, fresh)

    def test_prefix_does_not_depend_on_the_question(self, media):
        engine, item = media
        stores = []
        for question in QUESTIONS:
            session = engine.session(media=[item], sparsity=SPARSE)
            session.ask(question, params=SHORT, remember=False)
            stores.append(cache_contents(session))
        for other in stores[1:]:
            assert all(torch.equal(x, y) for x, y in zip(stores[0], other, strict=True))


class TestSparsity:
    def test_zero_is_bit_identical_to_no_sparsity(self, media):
        engine, item = media
        zero = engine.session(media=[item], sparsity=Sparsity(0.0, 0.0))
        none = engine.session(media=[item], sparsity=Sparsity(method="dense"))
        for question in QUESTIONS:
            assert zero.ask(question, params=SHORT).token_ids == none.ask(question, params=SHORT).token_ids
        assert_same(zero, none)

    def test_sparse_differs_from_dense(self, media):
        """The comparison above could fail: an active set of a quarter changes the distribution."""
        engine, item = media
        agreement = engine.session(media=[item], sparsity=SPARSE).agreement(QUESTIONS[0], max_new_tokens=6)
        assert max(agreement.kl) > 1e-6
        session = engine.session(media=[item], sparsity=Sparsity(0.0, 0.01))
        kept = session.agreement(QUESTIONS[0], max_new_tokens=6)
        assert max(kept.kl) < max(agreement.kl)

    def test_what_turn_one_ranked_last_turn_two_can_read(self, media):
        engine, item = media
        session = engine.session(media=[item], sparsity=Sparsity(0.0, 0.5))
        for i in range(12):
            session.ask(
                f"Question {i}: {QUESTIONS[i % 3]} {'x' * i}", params=SamplingParams(max_new_tokens=1), remember=False
            )
        found = session.overlap()
        assert all(0 < j < 1 for j in found.jaccard)
        assert any(len(tokens) for tokens in found.retrieval)
        first, *later = session.selections
        layers = range(len(first.active))
        last = [int(first.scores[layer].argmin()) for layer in layers]
        assert all(last[layer] not in first.active[layer] for layer in layers)
        reached = [any(last[layer] in turn.active[layer] for turn in later) for layer in layers]
        unread = [set(range(len(first.store))) - set(first.active[layer].tolist()) for layer in layers]
        again = [set().union(*(set(t.active[layer].tolist()) for t in later)) & unread[layer] for layer in layers]
        assert any(reached) or all(again), "later turns read nothing that turn one left unread"
        assert session._cache.visual_lens() == [len(first.store)] * len(layers)

    def test_counts_and_stats(self, media):
        engine, item = media
        session = engine.session(media=[item], sparsity=SPARSE)
        attachment = session.media[0]
        stats = session.ask(QUESTIONS[0], params=SHORT).stats
        assert stats.visual_tokens_total == attachment.tokens_total
        assert stats.visual_tokens_kept == attachment.tokens_kept
        assert stats.visual_tokens_kept == pytest.approx(stats.visual_tokens_total / 2, abs=session.media[0].frames)
        assert stats.visual_tokens_active == max(1, int(stats.visual_tokens_kept / 4 + 0.5))
        assert stats.ttft_s > 0
        assert stats.output_tokens == 6
        assert stats.peak_memory_bytes > 2**20

    def test_new_decode_sparsity_acts_at_the_next_turn(self, media, monkeypatch):
        engine, item = media
        calls = count_encodes(engine, monkeypatch)
        session = engine.session(media=[item], sparsity=SPARSE)
        session.ask(QUESTIONS[0], params=SHORT)
        session.sparsity = replace(SPARSE, decode=0.5)
        stats = session.ask(QUESTIONS[1], params=SHORT).stats
        assert stats.visual_tokens_active == max(1, int(stats.visual_tokens_kept / 2 + 0.5))
        assert stats.cached_tokens > stats.visual_tokens_kept
        assert len(calls) == 1

    def test_new_prefill_sparsity_prefills_again_without_the_encoder(self, media, monkeypatch):
        engine, item = media
        calls = count_encodes(engine, monkeypatch)
        session = engine.session(media=[item], sparsity=SPARSE)
        answer = session.ask(QUESTIONS[0], params=SHORT)
        session.sparsity = Sparsity(0.25, 0.0)
        stats = session.ask(QUESTIONS[1], params=SHORT).stats
        assert stats.visual_tokens_kept == pytest.approx(stats.visual_tokens_total * 0.75, abs=session.media[0].frames)
        assert len(calls) == 1
        assert session.history[0].answer == answer.text
        replay = Replay(session)
        replay.active = [None, None]
        logits, _ = replay.run()
        assert all(int(logits[row].argmax()) == token for turn, row, token in replay.predicts if turn == 1)

    def test_scores_that_are_no_numbers_give_a_dense_turn(self, media, monkeypatch):
        engine, item = media
        from sparsevila.engine import runner

        real = runner.retrieval
        monkeypatch.setattr(runner, "retrieval", lambda *a, **k: real(*a, **k) * float("nan"))
        session = engine.session(media=[item], sparsity=SPARSE)
        with pytest.warns(UserWarning, match="not finite"):
            result = session.ask(QUESTIONS[0], params=SHORT)
        assert result.stats.visual_tokens_active == result.stats.visual_tokens_kept

    def test_all_scores_equal_keep_the_first_tokens(self, media, monkeypatch):
        engine, item = media
        from sparsevila.engine import runner

        monkeypatch.setattr(runner, "retrieval", lambda q, k, lse, **_: torch.ones(k.shape[1]))
        session = engine.session(media=[item], sparsity=SPARSE)
        session.ask(QUESTIONS[0], params=SHORT)
        for active in session.selection().active:
            assert torch.equal(active, torch.arange(len(active)))

    def test_extreme_sparsity_leaves_one_token(self, media):
        engine, item = media
        session = engine.session(media=[item], sparsity=Sparsity(0.999, 0.999))
        stats = session.ask(QUESTIONS[0], params=SHORT).stats
        assert 1 <= stats.visual_tokens_kept <= session.media[0].frames
        assert stats.visual_tokens_active == 1


class TestMultiTurn:
    def test_second_question_runs_no_vision_and_prefills_its_own_tokens(self, media, sparsity, monkeypatch):
        engine, item = media
        calls = count_encodes(engine, monkeypatch)
        session = engine.session(media=[item], sparsity=sparsity)
        session.ask(QUESTIONS[0], params=SHORT)
        before = session._cache.next_position
        stats = session.ask(QUESTIONS[1], params=SHORT).stats
        question = engine.tokenizer.encode(" USER: " + QUESTIONS[1] + " ASSISTANT:", first=False)
        assert len(calls) == 1
        assert stats.encode_s == 0
        assert stats.cached_tokens == before
        # The question, then the answer's last token and the closing text.
        assert stats.prompt_tokens <= len(question) + 6
        # Equal content in another session is not encoded again either.
        engine.session(media=[item], sparsity=sparsity).ask(QUESTIONS[0], params=SHORT)
        assert len(calls) == 1

    def test_later_media_join_the_conversation(self, media, monkeypatch):
        engine, item = media
        session = engine.session(media=[item], sparsity=SPARSE)
        session.ask(QUESTIONS[0], params=SHORT)
        one = session._cache.visual_lens()[0]
        session.ask(QUESTIONS[1], media=[picture(5)], params=SHORT)
        assert session._cache.visual_lens()[0] > one
        assert [t.media for t in session.history] == [(1,), (2,)]
        replay = Replay(session)
        replay.active = [s.active for s in session.selections]
        assert len(session.selections) == 1  # the first turn's indices were of another store
        selection = session.selection()
        assert set(selection.token_map.media.tolist()) == {1, 2}
        assert len(selection.store) == session._cache.visual_lens()[0]

    def test_undo_takes_back_one_turn_and_its_own_media(self, media, sparsity):
        engine, item = media
        session, plain = (engine.session(media=[item], sparsity=sparsity) for _ in range(2))
        for s in (session, plain):
            s.ask(QUESTIONS[0], params=SHORT)
        session.ask(QUESTIONS[1], media=[picture(6)], params=SHORT)
        gone = session.undo()
        assert gone.question == QUESTIONS[1]
        assert_same(session, plain)
        assert session.ask(QUESTIONS[2], params=SHORT).token_ids == plain.ask(QUESTIONS[2], params=SHORT).token_ids
        assert_same(session, plain)

    def test_undo_of_the_first_turn_keeps_the_media_in_the_cache(self, media, monkeypatch):
        engine, item = media
        session, fresh = (engine.session(media=[item], sparsity=SPARSE) for _ in range(2))
        session.ask(QUESTIONS[0], params=SHORT)
        calls = count_encodes(engine, monkeypatch)
        session.undo()
        assert session._cache.visual_lens()[0] > 0
        session.ask(QUESTIONS[1], params=SHORT)
        assert not calls
        fresh.ask(QUESTIONS[1], params=SHORT)
        assert_same(session, fresh)
        session.undo()
        with pytest.raises(InvalidRequest, match="undo"):
            session.undo()
        with pytest.raises(InvalidRequest, match="two sparse turns"):
            fresh.overlap()

    def test_undo_keeps_what_was_attached_meanwhile(self, media):
        engine, item = media
        session = engine.session(media=[item], sparsity=SPARSE)
        session.ask(QUESTIONS[0], params=SHORT)
        session.attach(picture(7))
        session.undo()
        assert [m.number for m in session.media] == [1, 2]
        other = engine.session(media=[item, picture(7)], sparsity=SPARSE)
        assert session.ask(QUESTIONS[1], params=SHORT).token_ids == other.ask(QUESTIONS[1], params=SHORT).token_ids

    def test_clear_keeps_media_and_their_cache(self, media, monkeypatch):
        engine, item = media
        session, fresh = (engine.session(media=[item], sparsity=SPARSE) for _ in range(2))
        for question in QUESTIONS:
            session.ask(question, params=SHORT)
        calls = count_encodes(engine, monkeypatch)
        session.clear()
        assert session.history == ()
        assert len(session.media) == 1
        stats = session.ask(QUESTIONS[2], params=SHORT).stats
        assert stats.cached_tokens > 0
        assert not calls
        fresh.ask(QUESTIONS[2], params=SHORT)
        assert_same(session, fresh)

    def test_clear_with_media_in_later_turns(self, media):
        engine, item = media
        session = engine.session(media=[item], sparsity=SPARSE)
        session.ask(QUESTIONS[0], params=SHORT)
        session.ask(QUESTIONS[1], media=[picture(8)], params=SHORT)
        session.clear()
        other = engine.session(media=[item, picture(8)], sparsity=SPARSE)
        assert session.ask(QUESTIONS[2], params=SHORT).token_ids == other.ask(QUESTIONS[2], params=SHORT).token_ids

    def test_drop_rebuilds_without_the_item(self, media, monkeypatch):
        engine, item = media
        session = engine.session(media=[item, picture(9)], sparsity=SPARSE)
        session.ask(QUESTIONS[0], params=SHORT)
        session.drop(2)
        calls = count_encodes(engine, monkeypatch)
        session.ask(QUESTIONS[1], params=SHORT)
        assert not calls
        assert [m.number for m in session.media] == [1]
        replay = Replay(session)
        replay.active = [None, session.selections[-1].active]
        logits, _ = replay.run()
        assert all(int(logits[row].argmax()) == token for turn, row, token in replay.predicts if turn == 1)
        with pytest.raises(InvalidRequest, match="media 2"):
            session.drop(2)
        session.undo()
        session.undo()
        assert [m.number for m in session.media] == [1]

    def test_reset_forgets_everything(self, media):
        engine, item = media
        session = engine.session(media=[item], sparsity=SPARSE)
        session.ask(QUESTIONS[0], params=SHORT)
        session.reset()
        assert session.media == ()
        assert session.history == ()
        assert session._cache.next_position == 0
        fresh = engine.session(sparsity=SPARSE)
        assert session.ask("Hi", params=SHORT).token_ids == fresh.ask("Hi", params=SHORT).token_ids

    def test_new_system_text_acts_at_the_next_turn(self, media):
        engine, item = media
        session = engine.session(media=[item], sparsity=DENSE)
        session.ask(QUESTIONS[0], params=SHORT)
        session.system = "Answer in one word."
        session.undo()
        other = engine.session(media=[item], sparsity=DENSE, system="Answer in one word.")
        assert session.ask(QUESTIONS[1], params=SHORT).token_ids == other.ask(QUESTIONS[1], params=SHORT).token_ids
        assert_same(session, other)

    def test_undo_after_a_change_that_made_the_cache_stale(self, media):
        engine, item = media
        session = engine.session(media=[item], sparsity=SPARSE)
        session.ask(QUESTIONS[0], params=SHORT)
        session.ask(QUESTIONS[1], media=[picture(10)], params=SHORT)
        session.sparsity = DENSE
        session.undo()
        assert [m.number for m in session.media] == [1]
        session.ask(QUESTIONS[2], params=SHORT)
        replay = Replay(session)
        replay.active = [None, None]
        logits, _ = replay.run()
        assert all(int(logits[row].argmax()) == token for turn, row, token in replay.predicts if turn == 1)

    def test_a_conversation_without_media(self, engines):
        session = engines["vicuna"].session()
        for question in QUESTIONS:
            assert session.ask(question, params=SHORT).stats.visual_tokens_total == 0
        assert session.selection() is None
        replay = Replay(session)
        replay.active = [None] * len(QUESTIONS)
        logits, _ = replay.run()
        assert all(int(logits[row].argmax()) == token for _, row, token in replay.predicts)


class _Boom(SparseVILAError):
    pass


FAULTS: dict[str, tuple[Exception, type[Exception]]] = {  # what a step raises, what the caller gets
    "fail": (_Boom("planned"), _Boom),
    "crash": (KeyError("planned"), KeyError),
    "memory": (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), InsufficientMemory),
}


class TestInterruption:
    """A turn that ends early leaves the session exactly as it was."""

    def steps(self, session: Session, extra: Any) -> int:
        count = 0

        def progress(_: Progress) -> None:
            nonlocal count
            count += 1

        session._engine._features.clear()
        session.ask(QUESTIONS[1], media=[extra], params=SHORT, progress=progress)
        return count

    def test_cancel_or_failure_at_every_step_of_a_prefill(self, llava, sparsity):
        engine, item = llava
        plain, probe, session = (engine.session(media=[item], sparsity=sparsity) for _ in range(3))
        for s in (plain, probe, session):
            s.ask(QUESTIONS[0], params=SHORT)
        total = self.steps(probe, picture(11))
        assert total > 5
        for stop_at in range(total):
            for kind in ("cancel", "fail", "crash", "memory"):
                seen = 0
                engine._features.clear()  # so that every attempt has the encoder's steps too

                def progress(_: Progress, stop_at=stop_at, kind=kind) -> None:
                    nonlocal seen
                    if seen == stop_at:
                        if kind == "cancel":
                            session.cancel()
                        else:
                            raise FAULTS[kind][0]
                    seen += 1

                arguments: dict[str, Any] = {"media": [picture(11)], "params": SHORT, "progress": progress}
                if kind == "cancel":
                    result = session.ask(QUESTIONS[1], **arguments)
                    assert result.finish_reason in ("cancelled", "stop", "length")
                    if result.finish_reason != "cancelled":  # the last step of all is behind the answer
                        session.undo()
                else:
                    with pytest.raises(FAULTS[kind][1]):
                        session.ask(QUESTIONS[1], **arguments)
                assert_same(session, plain)
        assert session.ask(QUESTIONS[2], params=SHORT).token_ids == plain.ask(QUESTIONS[2], params=SHORT).token_ids
        assert_same(session, plain)

    def test_memory_that_runs_out_at_a_token(self, media, monkeypatch):
        engine, item = media
        plain, session = (engine.session(media=[item], sparsity=SPARSE) for _ in range(2))
        for s in (plain, session):
            s.ask(QUESTIONS[0], params=SHORT)
        step = engine.runner.step
        for stop_at in range(4):
            calls = 0

            def short(*args: Any, stop_at=stop_at) -> None:
                nonlocal calls
                calls += 1
                if calls > stop_at:
                    torch.empty(1 << 60, dtype=torch.uint8)
                step(*args)

            monkeypatch.setattr(engine.runner, "step", short)
            chunks = []
            with pytest.raises(InsufficientMemory, match=r"this turn.*needs 1073741824\.00 GiB") as caught:
                chunks.extend(session.stream(QUESTIONS[1], params=SamplingParams(max_new_tokens=6, temperature=2.0)))
            monkeypatch.undo()
            assert caught.value.need_bytes == 1 << 60
            assert caught.value.free_bytes > 0
            assert caught.value.__context__ is None  # which would hold what the failed step had allocated
            assert_same(session, plain)
        assert session.ask(QUESTIONS[2], params=SHORT).token_ids == plain.ask(QUESTIONS[2], params=SHORT).token_ids
        assert_same(session, plain)

    def test_closing_or_cancelling_at_every_token(self, media, sparsity):
        engine, item = media
        plain, session = (engine.session(media=[item], sparsity=sparsity) for _ in range(2))
        for s in (plain, session):
            s.ask(QUESTIONS[0], params=SHORT)
        for stop_at in range(5):
            stream = session.stream(QUESTIONS[1], media=[picture(12)], params=SHORT)
            for _ in range(stop_at + 1):
                next(stream)
            stream.close()
            assert_same(session, plain)
            chunks = []
            for chunk in session.stream(QUESTIONS[1], media=[picture(12)], params=SHORT):
                chunks.append(chunk)
                if len(chunks) == stop_at + 1:
                    session.cancel()
            assert [c.finish_reason for c in chunks if c.finish_reason] == ["cancelled"]
            assert chunks[-1].stats is not None
            assert len(chunks) == stop_at + 2
            assert_same(session, plain)
        assert session.ask(QUESTIONS[2], params=SHORT).token_ids == plain.ask(QUESTIONS[2], params=SHORT).token_ids

    def test_error_comes_as_a_last_chunk_and_is_raised(self, engines):
        def progress(_: Progress) -> None:
            raise _Boom("planned")

        stream = engines["vicuna"].session().stream("Hi", progress=progress)
        assert next(stream).finish_reason == "error"
        with pytest.raises(_Boom):
            next(stream)

    def test_time_limit(self, media):
        engine, item = media
        session = engine.session(media=[item], sparsity=SPARSE)
        result = session.ask(QUESTIONS[0], params=SamplingParams(max_new_tokens=3000), timeout_s=0.0)
        assert result.finish_reason == "cancelled"
        assert session.history == ()

    def test_failed_attach_changes_nothing(self, media, tmp_path):
        engine, item = media
        session, plain = (engine.session(media=[item], sparsity=SPARSE) for _ in range(2))
        for s in (session, plain):
            s.ask(QUESTIONS[0], params=SHORT)
        (tmp_path / "bad.png").write_bytes(b"no picture")
        for call in (
            lambda: session.attach(Image(tmp_path / "bad.png")),
            lambda: session.ask("x", media=[picture(13), Image(tmp_path / "bad.png")]),
            lambda: session.attach(Image(tmp_path / "missing.png")),
        ):
            with pytest.raises(MediaError):
                call()
            assert_same(session, plain)

    def test_busy_and_closed(self, media):
        engine, item = media
        session = engine.session(media=[item], sparsity=SPARSE)
        stream = session.stream("Hi", params=SHORT)
        next(stream)
        for call in (lambda: session.ask("x"), session.undo, session.clear, lambda: session.drop(1)):
            with pytest.raises(SessionBusy):
                call()
        session.close()
        assert [c.finish_reason for c in stream][-1] == "cancelled"
        session.close()
        with pytest.raises(Closed):
            session.ask("x")
        assert session._cache.bytes_with() == 0

    @pytest.mark.event_loop
    def test_astream(self, media):
        engine, item = media
        session, plain = (engine.session(media=[item], sparsity=SPARSE) for _ in range(2))

        async def collect() -> list[Any]:
            return [chunk async for chunk in session.astream(QUESTIONS[0], params=SHORT)]

        chunks = asyncio.run(collect())
        assert "".join(c.text for c in chunks) == plain.ask(QUESTIONS[0], params=SHORT).text
        assert_same(session, plain)


class TestAnswers:
    def test_pieces_concatenate_to_the_decoded_ids(self, media):
        engine, item = media
        session = engine.session(media=[item], sparsity=SPARSE)
        chunks = list(session.stream(QUESTIONS[0], params=SamplingParams(max_new_tokens=60, temperature=2.0)))
        ids = [c.token_id for c in chunks if c.token_id is not None]
        assert "".join(c.text for c in chunks) == engine.tokenizer.decode(ids) == session.history[0].answer
        assert [c.index for c in chunks[:-1]] == list(range(len(ids)))
        assert [c.finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 1)

    def test_stop_text_ends_the_answer_and_leaves_no_trace(self, media):
        engine, item = media
        session = engine.session(media=[item], sparsity=DENSE)
        free = session.ask(QUESTIONS[0], params=SamplingParams(max_new_tokens=12), remember=False)
        stop = free.text[3:6]
        result = session.ask(QUESTIONS[0], params=SamplingParams(max_new_tokens=12, stop=(stop,)))
        assert result.finish_reason == "stop"
        assert result.text == free.text[: free.text.index(stop)]
        record = session._state.records[0]
        assert (
            engine.tokenizer.decode(record.answer_ids) == result.text[: len(engine.tokenizer.decode(record.answer_ids))]
        )
        replay = Replay(session)
        assert replay.next_position == session._cache.next_position

    def test_eos_ends_the_answer(self, engines, monkeypatch):
        engine = engines["mistral"]
        session = engine.session()
        free = session.ask("Hi", params=SamplingParams(max_new_tokens=5), remember=False)
        monkeypatch.setattr(engine.tokenizer, "eos_ids", (free.token_ids[3],))
        result = session.ask("Hi", params=SamplingParams(max_new_tokens=50))
        assert result.finish_reason == "stop"
        first = free.token_ids.index(free.token_ids[3])
        assert result.token_ids == free.token_ids[:first]

    def test_same_seed_same_tokens_whatever_came_before(self, media):
        engine, item = media
        params = SamplingParams(max_new_tokens=10, temperature=1.5, top_k=50, seed=9)
        a, b = (engine.session(media=[item], sparsity=SPARSE) for _ in range(2))
        b.ask(QUESTIONS[1], params=params, remember=False)
        first = a.ask(QUESTIONS[0], params=params).token_ids
        assert first == b.ask(QUESTIONS[0], params=params).token_ids
        a.undo()
        assert a.ask(QUESTIONS[0], params=replace(params, seed=10)).token_ids != first


class TestLimits:
    def test_context_error_names_the_frames_that_fit(self, oracles, clip):
        with Engine.load(oracles["video"].folder, device="cpu", dtype="float32", max_context=60) as engine:
            per_frame = engine.model.tokens_per_frame()
            session = engine.session(media=[replace(clip, frames=12)], sparsity=DENSE)
            assert 12 * per_frame > 40
            with pytest.raises(ContextTooLong, match="positions") as caught:
                session.ask("What happens?")
            assert "--frames" in caught.value.hint
            fits = int(caught.value.hint.split("--frames ")[1].split()[0])
            assert session._cache.next_position == 0
            engine.session(media=[replace(clip, frames=fits)], sparsity=DENSE).ask("What happens?", params=SHORT)
            with pytest.raises(ContextTooLong):
                engine.session(media=[replace(clip, frames=fits + 1)], sparsity=DENSE).ask("What happens?")

    def test_answer_stops_at_the_end_of_the_context(self, oracles):
        with Engine.load(oracles["mistral"].folder, device="cpu", dtype="float32", max_context=40) as engine:
            session = engine.session()
            result = session.ask("Hi", params=SamplingParams(max_new_tokens=1000))
            assert result.finish_reason in ("length", "stop")
            assert session._cache.next_position <= 40
            with pytest.raises(ContextTooLong):
                session.ask("one more question " * 5)

    @pytest.mark.parametrize("text", ["", "  \n", "x" * (2 << 20), "\ud800", None])
    def test_prompts_that_are_refused(self, engines, text):
        session = engines["vicuna"].session()
        with pytest.raises(InvalidRequest):
            session.ask(text)
        assert session.history == ()

    @pytest.mark.parametrize("text", ["\0 a", "\u202eabc", "\x1b[31m red", "<image> </s> <s>", "‮مرحبا"])
    def test_prompts_that_are_text(self, engines, text):
        engine = engines["vicuna"]
        session = engine.session()
        session.ask(text, params=SHORT)
        ids = engine.tokenizer.encode(text, first=False)
        assert not {engine.tokenizer.special_id(n) for n in ("<image>", "<s>", "</s>")} & set(ids)

    @pytest.mark.parametrize("value", [-1, 1.0, float("nan"), "half", True])
    def test_sparsity_out_of_range(self, value):
        with pytest.raises(InvalidRequest):
            Sparsity(prefill=value)
        with pytest.raises(InvalidRequest):
            Sparsity(decode=value)

    def test_memory_limit_is_a_promise(self, oracles):
        from sparsevila import InsufficientMemory

        folder = oracles["vicuna"].folder
        with pytest.raises(InsufficientMemory):
            Engine.load(folder, device="cpu", dtype="float32", max_memory="100MB")
        with Engine.load(folder, device="cpu", dtype="float32") as engine:
            limit = (512 << 20) + engine.info.weight_bytes + 400_000
            assert engine.info.max_context == 4096
        with pytest.raises(InsufficientMemory) as caught:
            Engine.load(folder, device="cpu", dtype="float32", max_memory=limit, max_context=4000)
        assert "--ctx" in caught.value.hint
        with Engine.load(folder, device="cpu", dtype="float32", max_memory=limit) as engine:
            session = engine.session(sparsity=DENSE)
            assert 500 < engine.info.max_context < 4096  # shrunk to what fits, and said so
            assert any("context" in note for note in engine.info.notes)
            session.ask("Hi", params=SHORT)
            crowd = [engine.session(sparsity=DENSE) for _ in range(20)]
            ask_all = [partial(member.ask, "Hi", params=SamplingParams(max_new_tokens=300)) for member in crowd]
            with pytest.raises(InsufficientMemory):  # together they pass the limit, one by one they would not
                [ask() for ask in ask_all]
            crowd.clear()
            ask_all.clear()
            gc.collect()
            other = engine.session(media=[picture()], sparsity=DENSE)
            engine._max_memory_bytes -= 300_000
            with pytest.raises(InsufficientMemory):
                other.ask("Hi", params=SHORT)
            other.close()
            engine.forget_features()
            gc.collect()
            with pytest.raises(InsufficientMemory):
                session.ask("Hi", params=SamplingParams(max_new_tokens=900))
            assert len(session.history) == 1
            session.ask("Hi", params=SHORT)

    def test_two_hundred_turns_use_no_more_memory(self, llava):
        import resource

        engine, item = llava
        session = engine.session(media=[item], sparsity=SPARSE)
        params = SamplingParams(max_new_tokens=3)

        def turns(count: int) -> tuple[int, int]:
            for i in range(count):
                session.ask(f"{QUESTIONS[i % 3]} {i}", params=params, remember=False)
            gc.collect()
            return session._cache.bytes_with(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

        cache, peak = turns(100)
        later_cache, later_peak = turns(100)
        assert later_cache == cache
        assert later_peak - peak < 8 * 1024  # kilobytes
        assert session.history == ()
        assert isinstance(session._state, State)


def test_warnings_are_not_raised_in_a_normal_turn(engines):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engines["vicuna"].session(media=[picture()]).ask("Hi", params=SHORT)
