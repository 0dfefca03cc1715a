"""From questions to answers: protocols, pictures and clips as files, with a model of random weights."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
from accuracy.answering import Conversation, EngineAnswerer, Extras, Setting, Task, frame_quality
from accuracy.questions import draw
from world.splits import make
from world.video import write_h264

from sparsevila import Engine, Sparsity, Video
from sparsevila.engine.media import load_media
from sparsevila.engine.sparsity.base import Method
from sparsevila.engine.sparsity.registry import METHODS


@pytest.fixture(scope="module")
def engine(student):
    with Engine.load(student, device="cpu", dtype="float32") as engine:
        yield engine


@pytest.fixture
def answerer(engine, tmp_path, monkeypatch):
    for name in ("MAX_NEW_TOKENS", "MAX_NEW_TOKENS_LONG"):
        monkeypatch.setattr(f"accuracy.answering.{name}", 6)  # random weights do not stop by themselves
    return EngineAnswerer(engine, tmp_path)


@pytest.fixture(scope="module")
def items():
    """A sample of each kind."""
    found = {item.layout.kind: item for item in draw(200)}
    assert set(found) == {"scene", "page", "clip"}
    return found


def texts(conversation: Conversation) -> list[str]:
    return [reply.text for reply in conversation.replies]


def task(setting: str = "dense", protocol: str = "single", picture: str = "own") -> Task:
    return Task(Setting.parse(setting), protocol, picture)


class TestSetting:
    def test_forms(self):
        assert Setting.parse("dense").sparsity == Sparsity(0, 0, "dense")
        assert Setting.parse("sparsevila:0.60/.75") == Setting("sparsevila:0.6/0.75", Sparsity(0.6, 0.75))
        assert Setting.parse("random:0/0.9:global").sparsity == Sparsity(0, 0.9, "random", "global")

    def test_switches_have_one_name_whatever_way_they_are_written(self):
        policy = Sparsity(0.6, 0.75, scope="global", budgets="mass", diversity=0.5, rerotate=True)
        for text in ("global,budgets=mass,diversity=0.5,rerotate=on", "rerotate=on,diversity=.50,sinks=0,budgets=mass,"
                     "scope=global"):  # fmt: skip
            setting = Setting.parse(f"sparsevila:0.6/0.75:{text}")
            assert setting == Setting("sparsevila:0.6/0.75:global,budgets=mass,diversity=0.5,rerotate=on", policy)
            assert Setting.parse(setting.name) == setting
        assert Setting.parse("sparsevila:0.6/0.75:sinks=0,scope=per_frame").name == "sparsevila:0.6/0.75"

    @pytest.mark.parametrize(
        ("text", "what"),
        [("sparsevila", "METHOD:PREFILL/DECODE"), ("sparsevila:0.5", "METHOD:PREFILL/DECODE"),
         ("dense:0.1/0.1:global:x", "METHOD:PREFILL/DECODE"), ("magic:0.1/0.1", "dense, sparsevila, random"),
         ("random:1/0", "0 <= x < 1"), ("random:0.1/0.1:frame", "NAME=VALUE"), ("random:0.1/0.1:", "NAME=VALUE"),
         ("random:0.1/0.1:scope=frame", "per_frame"), ("random:0.1/0.1:sinks=2", "method random"),
         ("sparsevila:0.1/0.1:sinks=x", "whole number"), ("fastv:0.1/0.1:global", "method fastv")],
    )  # fmt: skip
    def test_what_is_wrong_is_said(self, text, what):
        with pytest.raises(ValueError, match=what):
            Setting.parse(text)


class TestProtocols:
    @pytest.mark.parametrize(
        ("kind", "setting"), [("scene", "dense"), ("page", "sparsevila:0.6/0.75"), ("clip", "random:0.6/0.75")]
    )
    def test_single_is_what_fresh_sessions_answer(self, answerer, items, setting, kind):
        single = answerer.converse(items[kind], task(setting), Extras(fresh=True))
        assert [reply.same_when_fresh for reply in single.replies] == [True] * len(items[kind].questions)
        assert single.replies[0].cached_tokens == 0
        for later in single.replies[1:]:
            assert later.encode_s == 0
            assert later.cached_tokens >= later.visual_kept

    def test_eviction_asks_the_dialogue_with_the_same_answers(self, answerer, items):
        single, eviction = (answerer.converse(items["clip"], task("sparsevila:0.5/0.75", p), Extras())
                            for p in ("single", "eviction"))  # fmt: skip
        assert texts(eviction) == texts(single)[: len(items["clip"].dialogue)]

    def test_history_remembers(self, answerer, items):
        single, history = (answerer.converse(items["scene"], task(protocol=p), Extras()) for p in ("single", "history"))
        assert len(history.replies) == len(items["scene"].dialogue)
        assert texts(history)[0] == texts(single)[0]
        assert texts(history)[1:] != texts(single)[1 : len(history.replies)]
        cached = [reply.cached_tokens for reply in history.replies]
        assert cached == sorted(set(cached))

    def test_a_method_that_needs_the_question_is_asked_alone(self, answerer, items, monkeypatch):
        monkeypatch.setitem(METHODS, "asked-drop", AskedDrop)
        single, eviction = (answerer.converse(items["page"], task("asked-drop:0/0", p), Extras())
                            for p in ("single", "eviction"))  # fmt: skip
        assert all(reply.cached_tokens == 0 for reply in single.replies)
        assert texts(eviction)[0] == texts(single)[0]
        assert texts(eviction)[1:] != texts(single)[1 : len(eviction.replies)]

    def test_diagnostics(self, answerer, items):
        dense = answerer.converse(items["page"], task(), Extras(agreement=True))
        assert dense.jaccard is None
        assert not any(reply.kl for reply in dense.replies)
        sparse = answerer.converse(items["page"], task("sparsevila:0.5/0.75", "history"), Extras(agreement=True))
        assert len(sparse.jaccard) == len(sparse.sinks) == 6  # layers
        assert not any(reply.kl for reply in sparse.replies)  # a history is not compared
        single = answerer.converse(items["page"], task("sparsevila:0.5/0.75"), Extras(agreement=True))
        assert all(len(reply.kl) == len(reply.top1) for reply in single.replies)
        assert any(reply.kl for reply in single.replies)
        assert Conversation.from_json(single.to_json()) == single


@dataclass(frozen=True)
class AskedDrop(Method):
    """Keeps after the first layer what the first question looks at most."""

    needs_question = True

    @staticmethod
    def from_policy(sparsity):
        return AskedDrop()

    def layer_rows(self, layer):
        return "question" if layer == 0 else None

    def on_layer(self, layer, scores):
        return scores.topk(max(1, len(scores) // 20)).indices.sort().values


class TestPictures:
    @pytest.mark.parametrize("kind", ["scene", "page", "clip"])
    def test_a_wrong_picture_is_another_one_of_the_same_layout(self, answerer, items, kind):
        def shown(picture: str) -> np.ndarray:
            (media,) = answerer.show(items[kind], picture).media
            return load_media(media, default_frames=1).rgb

        own, wrong = shown("own"), shown("wrong")
        assert own.shape == wrong.shape
        assert not np.array_equal(own, wrong)
        if kind != "clip":
            assert np.array_equal(own, make(kind, items[kind].seed, **items[kind].layout.options).rgb)

    @pytest.mark.parametrize("kind", ["scene", "clip"])
    def test_answers_depend_on_it(self, answerer, items, kind):
        own, wrong, none = (answerer.converse(items[kind], task(picture=p), Extras()) for p in ("own", "wrong", "none"))
        assert texts(own) != texts(wrong)
        assert texts(wrong) != texts(none)
        assert own.replies[0].visual_total == wrong.replies[0].visual_total > 0
        assert none.replies[0].visual_total == 0

    def test_a_picture_is_encoded_once_for_all_settings(self, answerer, items):
        answerer.forget()
        encoded = [
            reply.encode_s > 0
            for setting in ("dense", "sparsevila:0.5/0.5", "random:0.5/0.5")
            for reply in answerer.converse(items["scene"], task(setting), Extras()).replies
        ]
        assert encoded == [True] + [False] * (len(encoded) - 1)
        answerer.forget()
        assert answerer.converse(items["scene"], task(), Extras()).replies[0].encode_s > 0

    def test_files_go_with_their_sample(self, answerer, items, tmp_path):
        answerer.show(items["clip"], "own")
        answerer.show(items["clip"], "wrong")
        assert len(list(tmp_path.iterdir())) == 2
        answerer.forget()
        assert not list(tmp_path.iterdir())


class TestClipFiles:
    @pytest.mark.parametrize("frames", [8, 16, 32])
    def test_the_engine_gets_every_frame_in_order(self, answerer, frames):
        item = next(item for item in draw(200) if item.layout.options == {"frames": frames})
        shown = answerer.show(item, "own")
        drawn = make("clip", item.seed, frames=frames).rgb.astype(float)
        decoded = load_media(shown.media[0], default_frames=1).rgb.astype(float)
        error = np.square(decoded[:, None] - drawn[None]).mean(axis=(2, 3, 4))  # (decoded, drawn)
        assert (error.diagonal() <= error.min(axis=1) + 1e-9).all()
        assert len(shown.psnr) == frames
        assert min(shown.psnr) > 28

    def test_a_lost_or_misplaced_frame_is_refused(self, tmp_path):
        rgb = make("clip", draw(200)[0].seed, frames=8).rgb
        noise = np.random.default_rng(0).integers(0, 256, rgb.shape, dtype=np.uint8)
        noise = noise[:, ::8, ::8].repeat(8, axis=1).repeat(8, axis=2)
        write_h264(noise, tmp_path / "clip.mp4", crf=0)
        video = Video(tmp_path / "clip.mp4", frames=8)
        assert len(frame_quality(video, noise)) == 8
        with pytest.raises(RuntimeError, match="frame 2 came back as its neighbour"):
            frame_quality(video, noise[[0, 1, 3, 2, 4, 5, 6, 7]])
        with pytest.raises(RuntimeError, match="expected 8 frames, the engine decoded 7"):
            frame_quality(replace(video, frames=7), noise)
