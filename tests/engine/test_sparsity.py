"""The hooks: saliency and pruning in prefill, retrieval in decode, and pruning inside the decoder."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from oracles import Oracle, write_clip

from sparsevila import Engine, InvalidRequest, SamplingParams, Sparsity
from sparsevila.engine.diagnostics import ACTIVE, KEPT, PRUNED, STRUCTURAL, Selection, agreement, overlap
from sparsevila.engine.runner import Runner, TextSpan, VisualSpan
from sparsevila.engine.sparsity.base import Method, Survivors, keep_count
from sparsevila.engine.sparsity.registry import METHODS, make_method
from sparsevila.engine.sparsity.sparsevila import SparseVILA
from sparsevila.models.checkpoint import Checkpoint
from sparsevila.models.interface import TokenMap, VisualTokens
from sparsevila.models.registry import load_model


def token_map(frames: int, per_frame: int) -> TokenMap:
    n = frames * per_frame
    return TokenMap(
        media=torch.zeros(n, dtype=torch.int32),
        frame=torch.arange(frames, dtype=torch.int32).repeat_interleave(per_frame),
        box=torch.zeros(n, 4),
        structural=torch.zeros(n, dtype=torch.bool),
        line=torch.full((n,), -1, dtype=torch.int32),
    )


def rows_map(rows: int, cols: int, base: int) -> TokenMap:
    """A base picture, then rows closed by a newline, as LLaVA-NeXT lays them out."""
    line = torch.cat([torch.full((base,), -1), torch.arange(rows).repeat_interleave(cols + 1)]).to(torch.int32)
    structural = torch.cat(
        [torch.zeros(base, dtype=torch.bool), (torch.arange(rows * (cols + 1)) % (cols + 1)) == cols]
    )
    n = len(line)
    zeros = torch.zeros(n, dtype=torch.int32)
    return TokenMap(zeros, zeros, torch.zeros(n, 4), structural, line)


def tokens(where: TokenMap, saliency: torch.Tensor) -> VisualTokens:
    return VisualTokens(torch.randn(len(where), 3), where, saliency.masked_fill(where.structural, 0))


@pytest.mark.parametrize(
    ("n", "removed", "kept"),
    [(4, 0.999, 1), (10, 0.6, 4), (10, 0.75, 3), (2, 0.75, 1), (1, 0.5, 1), (576, 0.6, 230), (144, 0.9, 14)],
)  # fmt: skip
def test_keep_count_rounds_half_up_and_never_empties(n, removed, kept):
    assert keep_count(n, removed) == kept


class TestPrefill:
    def test_video_keeps_the_same_count_in_each_frame(self):
        where, generator = token_map(5, 12), torch.Generator().manual_seed(0)
        saliency = torch.rand(60, generator=generator) + torch.arange(60) // 12  # later frames look far more salient
        keep = SparseVILA(prefill=0.75).on_vision(tokens(where, saliency), "video").sources
        assert where.frame[keep].bincount().tolist() == [3] * 5
        for frame in range(5):
            inside = keep[where.frame[keep] == frame]
            rest = saliency[where.frame == frame].sort(descending=True).values
            assert sorted(saliency[inside].tolist(), reverse=True) == rest[:3].tolist()
        everywhere = SparseVILA(prefill=0.75, scope="global").on_vision(tokens(where, saliency), "video").sources
        assert torch.equal(everywhere, saliency.topk(15).indices.sort().values)

    def test_image_ranks_all_tiles_together(self):
        where = rows_map(3, 4, base=6)
        saliency = torch.arange(len(where)).float()
        keep = SparseVILA(prefill=0.5).on_vision(tokens(where, saliency), "image").sources
        ranked = keep[~where.structural[keep]]
        assert len(ranked) == keep_count(18, 0.5)
        assert ranked.min() > 6  # the base picture is the least salient here

    def test_a_newline_falls_with_the_last_token_of_its_row(self):
        where = rows_map(3, 4, base=2)
        saliency = torch.zeros(len(where))
        saliency[[2, 3, 12]] = 1.0  # two tokens of row 0, one of row 2
        keep = SparseVILA(prefill=1 - 3 / 14).on_vision(tokens(where, saliency), "image").sources.tolist()
        assert keep == [2, 3, 6, 12, 16]

    def test_ties_go_to_the_lower_index(self):
        where = token_map(1, 10)
        keep = SparseVILA(prefill=0.7).on_vision(tokens(where, torch.ones(10)), "image").sources
        assert keep.tolist() == [0, 1, 2]

    @pytest.mark.parametrize("scope", ["per_frame", "global"])
    def test_the_plan_is_what_happens(self, scope):
        where = token_map(7, 9)
        method = SparseVILA(prefill=0.6, scope=scope)
        keep = method.on_vision(tokens(where, torch.rand(63)), "video").sources
        assert len(keep) == method.planned_keep(where, "video")
        assert SparseVILA().planned_keep(where, "video") == 63

    def test_zero_bypasses_everything(self):
        where = token_map(2, 4)
        assert SparseVILA().on_vision(VisualTokens(torch.zeros(8, 1), where, None), "video") is None
        assert not SparseVILA(prefill=0.5).scores_turn


class TestSaliency:
    """Against the attention weights that transformers returns: full softmax, summary row, mean over heads."""

    @pytest.mark.parametrize("name", ["vicuna", "mistral"])
    def test_equals_the_summary_row(self, oracles: dict[str, Oracle], name):
        oracle = oracles[name]
        model = load_model(Checkpoint.open(oracle.folder), dtype=torch.float32, device=torch.device("cpu"))
        tower = oracle.hf.model.vision_tower
        tower.set_attn_implementation("eager")
        pixels = torch.randn(3, 3, oracle.tiny.image, oracle.tiny.image)
        with torch.inference_mode():
            theirs = tower(pixels, output_attentions=True, output_hidden_states=True)
            features, got = model.vision_tower(pixels)
        used = len(model.vision_tower.encoder.layers)
        want = theirs.attentions[used - 1].double()[:, :, 0, 1:].mean(dim=1)
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-9)
        torch.testing.assert_close(features, theirs.hidden_states[-2][:, 1:], rtol=1e-4, atol=1e-5)
        assert got.sum(dim=1).min() < 1  # the summary token's own share stays in the denominator


class TestRetrieval:
    def test_each_layer_has_its_own_set(self):
        scores = [torch.tensor([0.1, 0.4, 0.2, 0.3]), torch.tensor([0.9, 0.0, 0.8, 0.1])]
        active = SparseVILA(decode=0.5).on_turn(scores)
        assert [a.tolist() for a in active] == [[1, 3], [0, 2]]

    def test_layers_of_different_lengths(self):
        active = SparseVILA(decode=0.5).on_turn([torch.arange(6.0), torch.arange(3.0)])
        assert [a.tolist() for a in active] == [[3, 4, 5], [1, 2]]


@dataclass(frozen=True)
class DropAfter(Method):
    """FastV's shape: after one layer, keep the visual tokens that the last prompt row looks at most."""

    layer: int = 0
    keep: int = 3
    rows: str = "last"
    needs_question = True

    def layer_rows(self, layer):
        return self.rows if layer == self.layer else None

    def on_layer(self, layer, scores):
        assert layer == self.layer
        return scores.topk(self.keep).indices.sort().values


class TestPruningInsideTheDecoder:
    @pytest.mark.parametrize("rows", ["last", "question"])
    @pytest.mark.parametrize("chunk_tokens", [5, 1000])
    @pytest.mark.parametrize("name", ["vicuna", "mistral"])
    def test_equals_a_plain_loop(self, oracles, name, chunk_tokens, rows):
        model = load_model(Checkpoint.open(oracles[name].folder), dtype=torch.float32, device=torch.device("cpu"))
        decoder, method = model.decoder, DropAfter(layer=0, keep=3, rows=rows)
        n, before, after = 17, (1, 30, 31), (40, 41, 42, 43)
        visual = VisualTokens(torch.randn(n, model.config.vision.hidden_size), token_map(1, n), None)
        runner = Runner(model, chunk_tokens=chunk_tokens)
        cache = runner.new_cache()
        cache.reserve(visual=50, text=50)
        done = runner.prefill(cache, [TextSpan(before), VisualSpan(visual), TextSpan(after)], method=method)
        got = [runner.logits(done.hidden), runner.decode(cache, 44), runner.decode(cache, 45)]

        # The plain loop: whole sequence, one mask, tokens cut out after the layer.
        total = 3 + n + 4 + 2
        hidden = torch.cat([decoder.embed(torch.tensor(before)), model.embed_visual(visual),
                            decoder.embed(torch.tensor([*after, 44, 45]))])  # fmt: skip
        position = torch.arange(total)
        for i in range(len(decoder.layers)):
            layer = decoder.layer(i)
            q, k, v = layer.project(hidden, *decoder.angles(position))
            k, v = (x.repeat_interleave(q.shape[0] // k.shape[0], 0) for x in (k, v))
            mask = torch.ones(len(position), len(position), dtype=torch.bool).tril()
            p = (q @ k.transpose(1, 2) * q.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf).softmax(-1)
            hidden = layer.finish(hidden, p @ v)
            if i == 0:
                wanted = [3 + n + 3] if rows == "last" else range(3 + n, 3 + n + 4)
                scores = p[:, list(wanted)][:, :, 3 : 3 + n].mean(dim=(0, 1))
                gone = torch.ones(n, dtype=torch.bool)
                gone[scores.topk(3).indices] = False
                stays = torch.ones(total, dtype=torch.bool)
                stays[3 : 3 + n] = ~gone
                hidden, position = hidden[stays], position[stays]
        want = decoder.logits(hidden)[-3:]
        for a, b in zip(got, want, strict=True):
            assert (a - b).abs().max() < 1e-5 * b.abs().max()
        assert cache.visual_lens() == [n] + [3] * (len(decoder.layers) - 1)
        assert done.layer_tokens == [n + 7] + [10] * (len(decoder.layers) - 1)


@dataclass(frozen=True)
class MergePairs(Method):
    """VisionZip's shape: two neighbours become their mean, before the projector."""

    @staticmethod
    def from_policy(sparsity):
        return MergePairs()

    def on_vision(self, tokens, kind):
        sources = torch.arange(0, len(tokens), 2)
        pairs = torch.stack([tokens.features[sources], tokens.features[(sources + 1).clamp(max=len(tokens) - 1)]])
        merged = replace(tokens.select(sources), features=pairs.mean(dim=0))
        return Survivors(merged, sources)


@dataclass(frozen=True)
class AskedDrop(DropAfter):
    """The same as DropAfter, by name."""

    @staticmethod
    def from_policy(sparsity):
        return AskedDrop(layer=0, keep=3)


class TestOtherMethodsInASession:
    """The hooks are enough: neither session nor runner knows these methods."""

    @pytest.fixture
    def engine(self, oracles, monkeypatch):
        monkeypatch.setitem(METHODS, "merge", MergePairs)
        monkeypatch.setitem(METHODS, "asked-drop", AskedDrop)
        with Engine.load(oracles["video"].folder, device="cpu", dtype="float32") as engine:
            yield engine

    def test_merged_tokens_enter_the_cache(self, engine, tmp_path):
        clip = replace(write_clip(tmp_path / "clip.mp4", frames=6), frames=6)
        session = engine.session(media=[clip], sparsity=Sparsity(method="merge"))
        session.ask("What?", params=SamplingParams(max_new_tokens=3))
        total = session.media[0].tokens_total
        assert session._cache.visual_lens() == [total // 2] * 2
        assert session.selection().store.tolist() == list(range(0, total, 2))
        merged = session._state.placed[0]
        pair = merged.tokens.features[:2].mean(dim=0)
        torch.testing.assert_close(merged.survivors.tokens.features[0], pair)

    def test_a_method_that_needs_the_question(self, engine, tmp_path):
        clip = replace(write_clip(tmp_path / "clip.mp4", frames=6), frames=6)
        session = engine.session(media=[clip], sparsity=Sparsity(method="asked-drop"))
        first = session.ask("What?", params=SamplingParams(max_new_tokens=3))
        total = session.media[0].tokens_total
        assert session._cache.visual_lens() == [total, 3]
        assert first.stats.layer_tokens < first.stats.prompt_tokens
        later = session.ask("And then?", params=SamplingParams(max_new_tokens=3), remember=False)
        assert session._cache.visual_lens() == [total, 3]  # what the first question dropped stays dropped
        again = session.ask("And then?", params=SamplingParams(max_new_tokens=3))
        assert later.token_ids == again.token_ids
        session.undo()
        session.undo()
        assert session._cache.next_position == 0  # without its question nothing of the media is in the cache
        assert session.ask("What?", params=SamplingParams(max_new_tokens=3)).token_ids == first.token_ids


class TestRegistry:
    def test_names(self):
        for name in METHODS:
            make_method(Sparsity(0.1, 0.1, method=name))
        with pytest.raises(InvalidRequest, match="dense, sparsevila"):
            make_method(Sparsity(method="magic"))

    def test_a_method_prints_itself_with_its_hyper_parameters(self):
        printed = {
            name: str(make_method(Sparsity(0.5, 0.25, name)).at_depth(8))
            for name in METHODS
            if name not in ("dense", "none")
        }
        assert printed["sparsevila"] == "SparseVILA(prefill=0.5, decode=0.25)"
        assert printed["fastv"] == "FastV(prefill=0.5, decode=0.25, stages=((1, 0.5),))"
        assert all("prefill=0.5, decode=0.25" in text for text in printed.values())
        assert len(set(printed.values())) == len(printed)
        assert str(make_method(Sparsity(0.5, 0.0, sinks=4, scope="global"))) == (
            "SparseVILA(prefill=0.5, decode=0, scope=global, sinks=4)"
        )


class TestDiagnostics:
    def selection(self, *active: list[int]) -> Selection:
        where = token_map(1, 6)
        scores = tuple(torch.tensor([0.4, 0.3, 0.2, 0.1]) for _ in active)
        store = torch.tensor([0, 2, 3, 5])
        return Selection(where, torch.zeros(6), store, scores, tuple(map(torch.tensor, active)))

    def test_states_and_shares(self):
        selection = self.selection([0, 1], [0, 2])
        assert selection.states().tolist() == [ACTIVE, PRUNED, ACTIVE, ACTIVE, PRUNED, KEPT]
        assert selection.layer_share().tolist() == [1.0, 0.0, 0.5, 0.5, 0.0, 0.0]
        assert selection.recovered_mass() == pytest.approx([0.7, 0.6])
        assert STRUCTURAL not in selection.states()

    def test_sinks_and_retrieval_tokens(self):
        turns = [self.selection([0, 1], [0, 1]), self.selection([0, 2], [0, 1])]
        result = overlap(turns)
        assert result.jaccard == pytest.approx([1 / 3, 1.0])
        assert [s.tolist() for s in result.sinks] == [[0], [0, 1]]
        assert [r.tolist() for r in result.retrieval] == [[1, 2], []]
        with pytest.raises(ValueError, match="two sparse turns"):
            overlap(turns[:1])

    def test_agreement(self):
        a = [torch.tensor([1.0, 2.0, 0.0])]
        assert agreement([1], a, a).kl == pytest.approx([0.0])
        other = agreement([1], a, [torch.tensor([3.0, 2.0, 0.0])])
        assert other.kl[0] > 0.1
        assert other.top1 == (False,)
