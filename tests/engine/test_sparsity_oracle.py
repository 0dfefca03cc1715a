"""What a caller makes: methods of its own in place of a policy, controls that know the truth, answers to be rated."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from families import TinyFolders
from oracles import Oracle, write_clip

from sparsevila import ContextTooLong, Engine, Image, InvalidRequest, SamplingParams, Sparsity, Video
from sparsevila.engine.prompt import encode_pieces
from sparsevila.engine.sparsity.base import Method, Survivors
from sparsevila.engine.sparsity.oracle import ChosenTokens, OracleTokens, Region, touched
from sparsevila.engine.sparsity.sparsevila import SparseVILA
from sparsevila.models.interface import MediaKind, TokenMap, VisualTokens

QUESTION = "What is this?"
SHORT = SamplingParams(max_new_tokens=6)


@pytest.fixture(scope="module")
def engine(tiny_folders: TinyFolders) -> Iterator[Engine]:
    with Engine.load(tiny_folders["vicuna"], device="cpu", dtype="float32") as engine:
        yield engine


@pytest.fixture(scope="module")
def clip_engine(tiny_folders: TinyFolders) -> Iterator[Engine]:
    with Engine.load(tiny_folders["video"], device="cpu", dtype="float32") as engine:
        yield engine


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Video:
    return replace(write_clip(tmp_path_factory.mktemp("clip") / "clip.mp4", frames=4), frames=4)


def picture(seed: int = 0) -> Image:
    return Image(np.random.default_rng(seed).integers(0, 256, (90, 120, 3), dtype=np.uint8))


@dataclass(frozen=True)
class EveryOther(Method):
    """A method that the engine has never heard of."""

    def planned_keep(self, token_map: TokenMap, kind: MediaKind) -> int:
        return -(-token_map.num_visual // 2)

    def on_vision(self, tokens: VisualTokens, kind: MediaKind) -> Survivors | None:
        ranked = torch.nonzero(~tokens.token_map.structural)[:, 0]
        stays = tokens.token_map.structural.clone()
        stays[ranked[::2]] = True
        return Survivors.of(tokens, torch.nonzero(stays)[:, 0])


class TestMethodsOfOnesOwn:
    def test_a_method_acts_as_its_policy_does(self, engine):
        answers = [
            engine.session(media=[picture()], sparsity=asked).ask(QUESTION, params=SHORT)
            for asked in (Sparsity(0.5, 0.5), SparseVILA(0.5, 0.5))
        ]
        assert answers[0].token_ids == answers[1].token_ids
        assert replace(answers[0].stats, prefill_s=0).visual_tokens_kept == answers[1].stats.visual_tokens_kept
        assert answers[1].stats.decode_sparsity == 0.5

    def test_a_method_without_a_name(self, engine):
        session = engine.session(media=[picture()], sparsity=EveryOther())
        assert session.sparsity == EveryOther()
        total = session.media[0].tokens_total
        assert session.ask(QUESTION, params=SHORT).stats.visual_tokens_kept == -(-total // 2)

    def test_the_method_in_force_knows_its_decoder(self, engine):
        session = engine.session(media=[picture()], sparsity=Sparsity(0.3, method="pdrop"))
        assert str(session.method).startswith("PDrop(prefill=0.3, decode=0, stages=((1, ")
        session.sparsity = EveryOther()
        assert str(session.method) == "EveryOther(prefill=0, decode=0)"
        session.sparsity = Sparsity(0.3, method="fastv")
        with pytest.raises(InvalidRequest, match="more than 2 decoder layers"):
            _ = session.method

    def test_one_takes_the_place_of_the_other_between_turns(self, engine):
        session = engine.session(media=[picture()], sparsity=Sparsity())
        session.ask(QUESTION, params=SHORT, remember=False)
        session.sparsity = EveryOther()
        now = session.ask(QUESTION, params=SHORT, remember=False)
        fresh = engine.session(media=[picture()], sparsity=EveryOther()).ask(QUESTION, params=SHORT)
        assert now.token_ids == fresh.token_ids
        assert now.stats.encode_s == 0


class TestTheOracle:
    def test_boxes_and_frames_that_touch(self):
        box = torch.tensor([[0, 0, 0.5, 0.5], [0, 0.5, 0.5, 1], [0.5, 0, 1, 0.5], [0.5, 0.5, 1, 1]]).repeat(2, 1)
        frame = torch.arange(2, dtype=torch.int32).repeat_interleave(4)
        zeros = torch.zeros(8, dtype=torch.int32)
        where = TokenMap(zeros, frame, box, zeros.bool(), zeros - 1)
        regions = [Region(1, 2, (0.1, 0.2, 0.3, 0.51)), Region(0, 2, (0.5, 0.0, 0.6, 0.1))]
        assert touched(where, regions).nonzero()[:, 0].tolist() == [2, 4, 5, 6]

    def test_what_is_needed_stays_and_saliency_fills_the_rest(self, engine):
        region = Region(0, 1, (0.0, 0.0, 0.3, 0.3))
        session = engine.session(media=[picture()], sparsity=OracleTokens(0.75, 0.0, regions=(region,)))
        plain = engine.session(media=[picture()], sparsity=Sparsity(0.75))
        for one in (session, plain):
            one.ask(QUESTION, params=SHORT)
        found, usual = session.selection(), plain.selection()
        needed = region.touches(found.token_map) & ~found.token_map.structural
        kept = torch.zeros_like(needed)
        kept[found.store] = True
        assert 0 < needed.sum() < len(found.store) == len(usual.store)
        assert kept[needed].all()
        others = found.saliency.masked_fill(needed | found.token_map.structural, -1)
        best = others.sort(descending=True, stable=True).indices[: len(found.store) - int(needed.sum())]
        assert set(best.tolist()) == set(torch.nonzero(kept & ~needed)[:, 0].tolist())
        assert set(usual.store.tolist()) != set(found.store.tolist())

    def test_no_region_is_saliency(self, clip_engine, clip):
        sets = []
        for asked in (OracleTokens(0.5, 0.0), Sparsity(0.5)):
            session = clip_engine.session(media=[clip], sparsity=asked)
            session.ask(QUESTION, params=SHORT)
            sets.append(session.selection().store.tolist())
        assert sets[0] == sets[1]

    def test_over_all_frames_a_needed_one_keeps_all_it_has(self, clip_engine, clip):
        whole = Region(2, 3, (0.0, 0.0, 1.0, 1.0))
        session = clip_engine.session(media=[clip], sparsity=OracleTokens(0.75, 0.0, scope="global", regions=(whole,)))
        session.ask(QUESTION, params=SHORT)
        found = session.selection()
        assert found.token_map.frame[found.store].unique().tolist() == [2]


class TestChosenTokens:
    def test_exactly_these_enter(self, engine):
        session = engine.session(media=[picture()], sparsity=ChosenTokens(keep=(1, 4, 9)))
        stats = session.ask(QUESTION, params=SHORT).stats
        assert stats.visual_tokens_kept == 3
        assert session.selection().store.tolist() == [1, 4, 9]

    def test_none_of_them_is_none_at_all(self, clip_engine, clip):
        answers = [
            clip_engine.session(media=[clip], sparsity=asked).ask(QUESTION, params=SHORT).token_ids
            for asked in (ChosenTokens(), Sparsity(method="none"))
        ]
        assert answers[0] == answers[1]

    def test_what_no_token_is_is_refused(self, engine):
        session = engine.session(media=[picture()], sparsity=ChosenTokens(keep=(0, 10_000)))
        with pytest.raises(InvalidRequest, match=r"expected indices from 0 to \d+, got \(0, 10000\)"):
            session.ask(QUESTION, params=SHORT)
        map_ = engine.session(media=[picture()], sparsity=ChosenTokens(keep=(0,)))
        map_.ask(QUESTION, params=SHORT)
        newline = int(torch.nonzero(map_.selection().token_map.structural)[0])
        with pytest.raises(InvalidRequest, match="structural"):
            engine.session(media=[picture()], sparsity=ChosenTokens(keep=(newline,))).ask(QUESTION, params=SHORT)


class TestRating:
    def test_without_media_it_is_transformers_log_softmax(self, engine, oracles: dict[str, Oracle]):
        answer = " a red square"
        rated = engine.session().rate(QUESTION, answer)
        pieces = [*engine.model.prompt.opening(first=True, system=None)]
        pieces += engine.model.prompt.question(QUESTION, after_media=False)
        prompt = encode_pieces(engine.tokenizer, pieces, start=True)
        assert list(rated.token_ids) == engine.tokenizer.encode(answer, first=False)
        with torch.inference_mode():
            logits = oracles["vicuna"].hf(input_ids=torch.tensor([prompt + rated.token_ids])).logits[0].double()
        want = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, torch.tensor(rated.token_ids)[:, None])[:, 0]
        assert torch.allclose(torch.tensor(rated.log_probs, dtype=torch.float64), want, atol=1e-4)
        assert rated.log_likelihood == pytest.approx(float(want.sum()), abs=1e-3)

    @pytest.mark.parametrize(
        "asked", [Sparsity(method="dense"), Sparsity(0.5, 0.75), Sparsity(0.5, method="visionzip")]
    )
    def test_the_greedy_answer_is_the_likeliest_token_by_token(self, engine, asked, monkeypatch):
        session = engine.session(media=[picture()], sparsity=asked)
        greedy = session.ask(QUESTION, params=SHORT, remember=False).token_ids
        encode = engine.tokenizer.encode
        monkeypatch.setattr(
            engine.tokenizer, "encode",
            lambda text, *, first: list(greedy) if text == " GREEDY" else encode(text, first=first),
        )  # fmt: skip
        assert session.rate(QUESTION, " GREEDY").top1 == (True,) * len(greedy)

    def test_it_leaves_no_trace(self, engine):
        session, plain = (engine.session(media=[picture()], sparsity=Sparsity(0.5, 0.5)) for _ in range(2))
        session.rate(QUESTION, " something else")
        assert session.history == ()
        assert session.ask(QUESTION, params=SHORT).token_ids == plain.ask(QUESTION, params=SHORT).token_ids

    def test_what_cannot_be_rated(self, engine):
        session = engine.session()
        with pytest.raises(InvalidRequest, match="answer"):
            session.rate(QUESTION, "  ")
        with pytest.raises(ContextTooLong, match="the answer needs"):
            session.rate(QUESTION, " word" * 5000)
