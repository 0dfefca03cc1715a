"""What SparseVILA's policy may do beyond the paper: each switch against loops, and one plain pass over whole turns."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from families import TinyFolders
from oracles import write_clip
from torch import Tensor

from sparsevila import Engine, Image, InvalidRequest, SamplingParams, Session, Sparsity, Video
from sparsevila.engine import rerotation, turn
from sparsevila.engine.cache import KVCache
from sparsevila.engine.rerotation import StorePositions
from sparsevila.engine.sampler import Sampler
from sparsevila.engine.sparsity import diversity, sparsevila
from sparsevila.engine.sparsity.base import keep_count
from sparsevila.engine.sparsity.budgets import by_mass
from sparsevila.engine.sparsity.diversity import diverse
from sparsevila.engine.sparsity.registry import METHODS, make_method
from sparsevila.engine.sparsity.sparsevila import SparseVILA, middle
from sparsevila.engine.switches import SWITCHES, parse_switches, switched_on, write_switches
from sparsevila.kernels.rope import rope
from sparsevila.kernels.top_k import top_k
from sparsevila.models.decoder import DecoderConfig
from sparsevila.models.interface import TokenMap, VisualTokens
from sparsevila.models.rotary import RopeConfig

QUESTIONS = ("What is it?", "Which colour is the car on the left?")
PARAMS = SamplingParams(max_new_tokens=11)
# Every switch, in two policies: sets of each head leave no room for scores of other layers.
MANY = {
    "layers": Sparsity(0.4, 0.7, score_layers="middle", sinks=2, refresh=4, diversity=0.5, rerotate=True),
    "heads": Sparsity(0.4, 0.7, budgets="mass", sets="per_kv_head", sinks=1, refresh=3, diversity=0.2, rerotate=True),
}
MODELS = ("vicuna", "qwen2.5")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def best(scores: Sequence[float], count: int) -> list[int]:
    return sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count])


# The rules in loops: lists of numbers in, lists of indices out.


def mass_counts(scores: list[list[float]], counts: list[int], pinned: list[int]) -> list[int]:
    """Takes the best pair of (layer, entry) again and again, behind what each layer has for certain."""
    taken: list[set[int]] = []
    for layer, count in zip(scores, counts, strict=True):
        rest = sorted((i for i in range(len(layer)) if i not in pinned), key=layer.__getitem__, reverse=True)
        floor = max(0, max(1, count // 4) - len(pinned))
        taken.append({*pinned, *rest[:floor]})
    while sum(map(len, taken)) < sum(counts):
        pairs = [
            (-score / sum(layer), which, entry)
            for which, layer in enumerate(scores)
            for entry, score in enumerate(layer)
            if entry not in taken[which]
        ]
        _, which, entry = min(pairs)
        taken[which].add(entry)
    return [len(entries) for entries in taken]


def retrieved(scores: list[list[float]], policy: Sparsity, saliency: list[float]) -> list[list[int]]:
    """What each layer reads."""
    if policy.score_layers == "middle":
        third = len(scores) // 3
        rows = scores[third : len(scores) - third]
        scores = [[sum(column) / len(rows) for column in zip(*rows, strict=True)]] * len(scores)
    counts = [keep_count(len(layer), policy.decode) for layer in scores]
    pinned = best(saliency, min(policy.sinks, *counts))
    if policy.budgets == "mass":
        counts = mass_counts(scores, counts, pinned)
    first = [[math.inf if i in pinned else score for i, score in enumerate(layer)] for layer in scores]
    return [best(layer, count) for layer, count in zip(first, counts, strict=True)]


def spread_out(saliency: list[float], features: list[list[float]], k: int, weight: float) -> list[int]:
    """Maximal marginal relevance."""
    norms = [math.sqrt(sum(x * x for x in row)) for row in features]

    def cosine(i: int, j: int) -> float:
        return sum(a * b for a, b in zip(features[i], features[j], strict=True)) / (norms[i] * norms[j])

    n = len(saliency)
    by_rank = sorted(range(n), key=lambda i: (-saliency[i], i))
    relevance = {i: 1 - rank / max(1, n - 1) for rank, i in enumerate(by_rank)}
    chosen = [by_rank[0]]
    while len(chosen) < k:
        rest = [i for i in range(n) if i not in chosen]
        worth = {i: (1 - weight) * relevance[i] - weight * max(cosine(i, j) for j in chosen) for i in rest}
        chosen.append(min(rest, key=lambda i: (-worth[i], i)))
    return sorted(chosen)


class TestBudgets:
    @pytest.mark.parametrize("seed", range(6))
    @pytest.mark.parametrize("pins", [0, 3])
    def test_counts_are_those_of_the_loop(self, seed, pins):
        scores = [row**power for power, row in zip((1, 3, 9, 1, 2), drawn(5, 23, seed=seed), strict=True)]
        pinned = torch.randperm(23, generator=torch.Generator().manual_seed(seed))[:pins] if pins else None
        counts = [8] * 5
        got = by_mass(scores, counts, pinned)
        assert got == mass_counts([row.tolist() for row in scores], counts, [] if pinned is None else pinned.tolist())
        assert sum(got) == 40
        assert min(got) >= 2
        assert len(set(got)) > 1

    def test_the_recovered_mass_is_never_less_than_with_equal_budgets(self):
        for seed in range(20):
            scores = list(drawn(4, 30, seed=seed) ** torch.tensor([[1.0], [2], [6], [12]]))

            def mass(policy: Sparsity, scores: list[Tensor] = scores) -> float:
                active = make_method(policy).on_turn(scores)
                return sum(float(s[a].sum() / s.sum()) for s, a in zip(scores, active, strict=True))

            assert mass(Sparsity(0, 0.7, budgets="mass")) > mass(Sparsity(0, 0.7))

    def test_ties_go_to_the_lower_layer_and_the_lower_index(self):
        flat = [torch.ones(12)] * 3
        assert by_mass(flat, [4, 4, 4]) == [10, 1, 1]
        active = SparseVILA(decode=2 / 3, budgets="mass").on_turn(flat)
        assert [a.tolist() for a in active] == [list(range(10)), [0], [0]]

    def test_a_layer_that_looks_at_nothing_keeps_its_floor(self):
        assert by_mass([torch.zeros(16), drawn(16)], [8, 8]) == [2, 14]


class TestLayersAndSinks:
    @pytest.mark.parametrize(("layers", "rows"), [(1, (0, 1)), (2, (0, 2)), (3, (1, 2)), (8, (2, 6)), (28, (9, 19))])
    def test_the_middle_third(self, layers, rows):
        scores = list(drawn(layers, 9, seed=layers))
        assert all(torch.equal(row, torch.stack(scores[slice(*rows)]).mean(dim=0)) for row in middle(scores))
        assert len(middle(scores)) == layers

    @pytest.mark.parametrize("budgets", ["equal", "mass"])
    @pytest.mark.parametrize("score_layers", ["own", "middle"])
    @pytest.mark.parametrize("sinks", [0, 2, 5, 40])
    def test_sets_are_those_of_the_loop(self, budgets, score_layers, sinks):
        policy = Sparsity(0, 0.8, budgets=budgets, score_layers=score_layers, sinks=sinks)
        for seed in range(5):
            scores, saliency = drawn(6, 31, seed=seed) ** 2, drawn(31, seed=seed + 50)
            got = make_method(policy).on_turn_with(list(scores), lambda saliency=saliency: saliency)
            assert [a.tolist() for a in got] == retrieved(scores.tolist(), policy, saliency.tolist())
            assert sum(map(len, got)) == 6 * keep_count(31, 0.8)
            for layer in got:
                assert set(best(saliency.tolist(), min(sinks, 6))) <= set(layer.tolist())


class TestDiversity:
    @pytest.mark.parametrize("weight", [0.0, 0.3, 0.7, 1.0])
    @pytest.mark.parametrize(("products", "likely"), [(1 << 20, 256), (2 * 26**2, 256), (0, 256), (0, 4)])
    def test_equals_the_loop(self, weight, products, likely, monkeypatch):
        """Three groups of 26 at once; two and one; one after the other, all rows or a few of them at a time."""
        monkeypatch.setattr(diversity, "_PRODUCTS_AT_ONCE", products)
        monkeypatch.setattr(diversity, "_LIKELY", likely)
        saliency, features = drawn(3, 26, seed=1), drawn(3, 26, 5, seed=2) - 0.5
        got = diverse(saliency, features, 9, weight)
        for group, row in enumerate(got.tolist()):
            assert row == spread_out(saliency[group].tolist(), features[group].tolist(), 9, weight)
        if weight == 0:
            assert torch.equal(got, top_k(saliency, 9))

    def test_twins_of_a_kept_token_come_last(self):
        """Six directions, four times each: six tokens that stay are one of each, the most salient."""
        features = torch.eye(6).repeat(4, 1)[None]
        saliency = torch.arange(24, 0, -1.0)[None]
        assert diverse(saliency, features, 6, 0.6).tolist() == [[0, 1, 2, 3, 4, 5]]
        saliency = torch.cat([torch.arange(9, 3, -1.0), torch.arange(30, 12, -1.0)])[None]
        assert diverse(saliency, features, 6, 0.6).tolist() == [[6, 7, 8, 9, 10, 11]]
        assert diverse(saliency.flip(1), features, 24, 0.6).tolist() == [list(range(24))]

    def test_groups_are_frames_of_a_clip_or_a_picture_with_its_tiles(self):
        n = 36
        where = TokenMap(
            torch.zeros(n, dtype=torch.int32), (torch.arange(n) // 12).to(torch.int32), torch.zeros(n, 4),
            torch.arange(n) % 6 == 5, (torch.arange(n) // 6).to(torch.int32),
        )  # fmt: skip
        tokens = VisualTokens(drawn(n, 4, seed=3) - 0.5, where, drawn(n, seed=4).masked_fill(where.structural, 0))
        method = SparseVILA(prefill=0.6, diversity=0.5)
        frames = [[i for i in range(n) if i % 6 != 5 and i // 12 == frame] for frame in range(3)]
        for kind, groups in (("video", frames), ("image", [[i for frame in frames for i in frame]])):
            keep = method.on_vision(tokens, kind).sources
            kept = [i for i in keep.tolist() if i % 6 != 5]
            want: list[int] = []
            for group in groups:
                saliency, features = tokens.saliency[group].tolist(), tokens.features[group].tolist()
                want += [group[i] for i in spread_out(saliency, features, keep_count(len(group), 0.6), 0.5)]
            assert kept == sorted(want)
            assert len(kept) == method.planned_keep(where, kind)
            assert kept != [i for i in SparseVILA(prefill=0.6).on_vision(tokens, kind).sources.tolist() if i % 6 != 5]


class TestRerotation:
    CONFIG: ClassVar[dict[str, Any]] = dict(
        hidden_size=24, intermediate_size=8, num_layers=2, num_heads=3, num_kv_heads=3, head_dim=8, vocab_size=4,
        rms_norm_eps=1e-5, max_context=64, qkv_bias=False, tie_word_embeddings=False,
    )  # fmt: skip

    @pytest.mark.parametrize("scaling", [RopeConfig(), RopeConfig(type="linear", factor=2.5)])
    @pytest.mark.parametrize("heads", [False, True])
    def test_keys_are_those_of_the_new_positions(self, scaling, heads):
        """Two media, at 3 to 9 and 20 to 24, with a structural token at 5; four entries are read."""
        config = DecoderConfig(rope=scaling, **self.CONFIG)
        frequencies = scaling.frequencies(8)

        def at(positions: list[int]) -> tuple[Tensor, Tensor]:
            angle = torch.tensor(positions, dtype=torch.float32)[:, None] * frequencies
            return angle.cos(), angle.sin()

        old = [3, 4, 6, 7, 8, 9, 20, 21, 22, 23, 24]
        raw, values = drawn(3, 11, 8, seed=5) - 0.5, drawn(3, 11, 8, seed=6)
        cache = KVCache(num_layers=2, num_kv_heads=3, head_dim=8, dtype=torch.float32, device=torch.device("cpu"))
        cache.reserve(visual=11)
        for layer in range(2):
            cache.append(layer, rope(raw, *at(old)), values, torch.ones(11, dtype=torch.bool), 11)
        # By hand: the entries of one medium end at 9 or 24.
        moved = {(0, 2, 6, 9): [8, 9, 23, 24], (1, 5, 8, 10): [8, 9, 23, 24], (6, 7, 8, 10): [21, 22, 23, 24],
                 (0, 1, 2, 5): [6, 7, 8, 9]}  # fmt: skip
        shared, single = torch.tensor([0, 2, 6, 9]), torch.tensor([10])
        each = torch.tensor([[1, 5, 8, 10], [6, 7, 8, 10], [0, 1, 2, 5]])
        keep = [each if heads else shared, single]
        before = cache.visual_keys(0).clone()
        cache.activate(keep)
        where = StorePositions.of([torch.tensor(old[:6]), torch.tensor([], dtype=torch.int64), torch.tensor(old[6:])])
        rerotation.rerotate(cache, keep, where, config)
        keys, got_values = cache.active[0].segment()
        for head in range(3):
            own = tuple(each[head].tolist() if heads else shared.tolist())
            want = rope(raw[head : head + 1, list(own)], *at(moved[own]))
            torch.testing.assert_close(keys[head : head + 1], want, rtol=1e-5, atol=1e-6)
            assert torch.equal(got_values[head], values[head, list(own)])
        assert torch.equal(cache.active[1].segment()[0], cache.visual_keys(1)[:, [10]])  # it was the last already
        assert torch.equal(cache.visual_keys(0), before)

    @pytest.mark.parametrize(
        ("scaling", "name"),
        [(RopeConfig(type="yarn"), "yarn"), (RopeConfig(type="llama3"), "llama3"),
         (RopeConfig(type="dynamic"), "dynamic"), (RopeConfig(sections=(1, 1, 2)), "mrope")],
    )  # fmt: skip
    def test_other_positions_are_refused_by_name(self, scaling, name):
        with pytest.raises(InvalidRequest, match=name):
            rerotation.check_rerotation(DecoderConfig(rope=scaling, **self.CONFIG))


OTHERS: dict[str, Any] = {
    "scope": "global", "budgets": "mass", "score_layers": "middle", "sets": "per_kv_head", "sinks": 1, "refresh": 1,
    "diversity": 0.5, "rerotate": True,
}  # fmt: skip


class TestNames:
    def test_every_switch_is_known_here(self):
        assert set(OTHERS) <= set(SWITCHES)
        assert switched_on(Sparsity(0.1, 0.2)) == {}
        assert make_method(Sparsity(0.1, 0.2)) == SparseVILA(0.1, 0.2)
        for name, value in OTHERS.items():
            assert getattr(make_method(Sparsity(0.1, 0.2, **{name: value})), name) == value

    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("name", OTHERS)
    def test_a_method_refuses_what_means_nothing_to_it(self, method, name):
        policy = Sparsity(0.5, 0.5, method, **{name: OTHERS[name]})
        if name in METHODS[method].switches:
            assert getattr(make_method(policy), name) == OTHERS[name]
            return
        with pytest.raises(InvalidRequest, match=f"{name}$"):
            make_method(policy)

    def test_which_methods_take_which(self):
        takers = {name: {m for m, found in METHODS.items() if name in found.switches} for name in OTHERS}
        zipped = {"visionzip", "prumerge", "prumerge+"}
        assert takers["diversity"] == {"sparsevila"}
        assert takers["refresh"] == takers["rerotate"] == {"sparsevila", "random", "resize"} | zipped
        assert takers["budgets"] == takers["sinks"] == takers["score_layers"] == {"sparsevila", "resize"} | zipped
        assert takers["scope"] == {"sparsevila", "random"} | zipped

    @pytest.mark.parametrize(
        ("name", "value"),
        [("budgets", "more"), ("score_layers", "all"), ("sinks", -1), ("sinks", 1.0), ("sinks", True), ("refresh", -3),
         ("diversity", 1.1), ("diversity", math.nan), ("rerotate", 1), ("diversity", -0.1)],
    )  # fmt: skip
    def test_values_out_of_range(self, name, value):
        with pytest.raises(InvalidRequest, match=name):
            Sparsity(0.5, 0.5, **{name: value})

    def test_text_and_back(self):
        text = "global,budgets=mass,sinks=3,refresh=16,diversity=0.25,rerotate=on"
        policy = Sparsity(**parse_switches(text))
        assert policy == Sparsity(scope="global", budgets="mass", sinks=3, refresh=16, diversity=0.25, rerotate=True)
        assert write_switches(policy) == text
        assert write_switches(Sparsity(**parse_switches("diversity=.250,scope=global"))) == "global,diversity=0.25"
        assert write_switches(Sparsity(**parse_switches("rerotate=off,sinks=0"))) == ""

    @pytest.mark.parametrize(
        ("text", "what"),
        [("", "budgets"), ("sinks", "NAME=VALUE"), ("sink=1", "sinks"), ("sinks=x", "whole number"),
         ("diversity=x", "number"), ("rerotate=yes", "on or off"), ("sinks=1,sinks=2", "once"), ("prefill=0.1", "NAME"),
         ("global,scope=global", "once"), ("sinks=1,", "NAME=VALUE")],
    )  # fmt: skip
    def test_text_that_is_refused(self, text, what):
        with pytest.raises(InvalidRequest, match=what):
            parse_switches(text)


# Whole turns


@pytest.fixture(scope="module")
def engines(tiny_folders: TinyFolders) -> Iterator[dict[str, Engine]]:
    found = {name: Engine.load(tiny_folders[name], device="cpu", dtype="float32") for name in MODELS}
    for engine in found.values():
        engine.tokenizer.eos_ids = ()  # answers of random weights are to be as long as they may
    yield found
    for engine in found.values():
        engine.close()


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Video:
    return replace(write_clip(tmp_path_factory.mktemp("clip") / "clip.mp4", frames=6, height=96, width=128), frames=4)


def picture(seed: int = 4) -> Image:
    return Image(np.random.default_rng(seed).integers(0, 256, (70, 90, 3), dtype=np.uint8))


@pytest.fixture(params=MODELS)
def shown(request: pytest.FixtureRequest, engines: dict[str, Engine], clip: Video) -> tuple[Engine, Image | Video]:
    return engines[request.param], clip if request.param == "qwen2.5" else picture()


@pytest.fixture(params=MANY)
def many(request: pytest.FixtureRequest, shown: tuple[Engine, Image | Video]) -> Sparsity:
    return fitting(shown[0], MANY[request.param])


def fitting(engine: Engine, policy: Sparsity) -> Sparsity:
    """The policy without what positions of three axes exclude."""
    return replace(policy, rerotate=False) if engine.model.decoder.config.rope.sections else policy


class Plain:
    """Turns decoded by whole passes over all tokens: no cache, no chunks; sets by the loops above."""

    def __init__(self, session: Session, policy: Sparsity) -> None:
        self.engine, self.policy, self.decoder = session._engine, policy, session._engine.model.decoder
        self.parts: list[Tensor] = []
        self.positions: list[Tensor] = []
        self.visual: list[bool] = []
        self.medium: list[int] = []
        self.reads: list[int | None] = []  # per row, which of `sets` it reads; None: everything
        self.sets: list[list[list[int]]] = []  # entries of the visual store, per layer
        self.next_position = 0
        self.saliency: list[float] = []

    def place(self, entry: Any) -> None:
        tokens = entry.survivors.tokens
        if self.decoder.config.rope.sections or self.policy.positions == "contiguous":
            positions, self.next_position = self.engine.model.visual_positions(tokens.token_map, self.next_position)
        else:  # they stand where they stood
            positions = self.next_position + entry.survivors.sources
            self.next_position += len(entry.tokens)
        visual = (~tokens.token_map.structural).tolist()
        self._add(self.engine.model.embed_visual(tokens), positions, visual, None, max(self.medium) + 1)
        self.saliency += [s for s, v in zip(tokens.saliency.tolist(), visual, strict=True) if v]

    def text(self, ids: Sequence[int], reads: int | None = None) -> None:
        positions, self.next_position = self.engine.model.text_positions(len(ids), self.next_position)
        hidden = self.decoder.embed(torch.tensor(ids, dtype=torch.long))
        self._add(hidden, positions, [False] * len(ids), reads, -1)

    def _add(self, hidden: Tensor, positions: Tensor, visual: list[bool], reads: int | None, medium: int) -> None:
        self.parts.append(hidden)
        self.positions.append(positions)
        self.visual += visual
        self.medium += [medium] * len(visual)
        self.reads += [reads] * len(visual)

    def _moved(self, positions: Tensor, store: list[int], read: list[int]) -> Tensor:
        """Positions of keys for a row that reads `read`, rows of the sequence."""
        if not self.policy.rerotate:
            return positions
        positions = positions.clone()
        for medium in {self.medium[row] for row in read}:
            own = [row for row in read if self.medium[row] == medium]
            end = max(int(positions[row]) for row in store if self.medium[row] == medium)
            for i, row in enumerate(own):
                positions[row] = end - len(own) + 1 + i
        return positions

    @torch.inference_mode()
    def run(self) -> tuple[Tensor, list[Tensor]]:
        """Logits (S, V) of all rows, and attention (H, S, S) of each layer."""
        hidden, positions = torch.cat(self.parts), torch.cat(self.positions, dim=-1)
        size, found = len(hidden), []
        store = [row for row, visual in enumerate(self.visual) if visual]
        causal = torch.ones(size, size, dtype=torch.bool).tril()
        for index, layer in enumerate(self.decoder.layers):
            q, k, v = layer.enter(hidden)[1].transpose(0, 1).split(layer.heads)
            q = rope(q, *self.decoder.angles(positions))
            groups = q.shape[0] // k.shape[0]
            attention = torch.zeros(q.shape[0], size, size, dtype=torch.float64)
            for reads in set(self.reads):
                rows = [row for row, own in enumerate(self.reads) if own == reads]
                allowed, where = causal[rows].clone(), positions
                if reads is not None:
                    read = [store[entry] for entry in self.sets[reads][index]]
                    where = self._moved(positions, store, read)
                    allowed[:, [row for row in store if row not in read]] = False
                keys = rope(k, *self.decoder.angles(where)).repeat_interleave(groups, 0).double()
                scores = q[:, rows].double() @ keys.transpose(1, 2) / math.sqrt(q.shape[-1])
                attention[:, rows] = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
            found.append(attention)
            values = v.repeat_interleave(groups, 0).double()
            hidden = layer.finish(hidden, (attention @ values).float())
        return self.decoder.logits(hidden), found

    def rank(self, attention: list[Tensor], rows: list[int]) -> None:
        store = [row for row, visual in enumerate(self.visual) if visual]
        scores = [layer[:, rows][:, :, store].mean(dim=(0, 1)).tolist() for layer in attention]
        self.sets.append(retrieved(scores, self.policy, self.saliency))

    def answer(self, question: Sequence[int], limit: int) -> list[int]:
        """Greedy; at every refresh everything is built again from its tokens."""
        self.text(question)
        logits, attention = self.run()
        self.rank(attention, list(range(len(self.reads) - len(question), len(self.reads))))
        ids = [int(logits[-1].argmax())]
        start = len(self.reads)
        while len(ids) < limit:
            self.text(ids[-1:], len(self.sets) - 1)
            every = self.policy.refresh
            if every and len(ids) % every == 0:
                self.reads[start:] = [None] * len(ids)
                logits, attention = self.run()
                self.rank(attention, list(range(len(self.reads) - every, len(self.reads))))
            else:
                logits, _ = self.run()
            ids.append(int(logits[-1].argmax()))
        return ids


def watched(monkeypatch: pytest.MonkeyPatch) -> list[list[list[int]]]:
    """Every set that is activated from now on."""
    found: list[list[list[int]]] = []
    activate = KVCache.activate

    def watch(self: KVCache, keep: Any) -> None:
        found.append([sets.tolist() for sets in keep])
        activate(self, keep)

    monkeypatch.setattr(KVCache, "activate", watch)
    return found


ALONE = {
    "none": {}, "budgets": {"budgets": "mass"}, "score_layers": {"score_layers": "middle"}, "sinks": {"sinks": 3},
    "refresh": {"refresh": 4}, "rerotate": {"rerotate": True},
    "rerotate, moved up": {"rerotate": True, "positions": "contiguous"},
    "many": {"budgets": "mass", "sinks": 2, "refresh": 3, "rerotate": True, "diversity": 0.5},
}  # fmt: skip


@pytest.mark.parametrize("switches", ALONE)
def test_two_turns_are_those_of_plain_passes(shown, switches, monkeypatch):
    engine, item = shown
    policy = fitting(engine, Sparsity(0.3, 0.7, **ALONE[switches]))
    sets = watched(monkeypatch)
    session = engine.session(media=[item], sparsity=policy)
    later = replace(item, frames=2) if isinstance(item, Video) else picture(5)
    results = [session.ask(q, media=media, params=PARAMS) for q, media in zip(QUESTIONS, ([], [later]), strict=True)]
    placed = iter(session._state.placed)
    driver, plain, prompt = session._driver(None, lambda _: None), Plain(session, policy), engine.model.prompt
    for turn_index, (record, result) in enumerate(zip(session._state.records, results, strict=True)):
        assert len(record.media) == 1
        plain.text(driver._ids(driver._opening(record.before), start=turn_index == 0))
        plain.place(next(placed))
        asked = replace(record.asked, records=session._state.records[:turn_index])
        ids = plain.answer(driver._question_ids(asked, record.question), PARAMS.max_new_tokens)
        assert list(result.token_ids) == ids
        plain.text(ids[-1:], len(plain.sets) - 1)  # what closes the turn sees what the answer saw
        closing = driver._ids(prompt.closing())
        plain.text(closing, len(plain.sets) - 1)
    assert sets == plain.sets
    count = 1 + (PARAMS.max_new_tokens - 1) // policy.refresh if policy.refresh else 1
    assert len(sets) == 2 * count
    if policy.refresh:
        assert any(one != other for one, other in itertools.pairwise(sets[:count]))


def test_a_switch_changes_what_it_is_about(engines):
    """Beside the default, so that the comparison with loops above is not one of policies that all do the same."""
    found = {}
    for name, switches in ALONE.items():
        session = engines["vicuna"].session(media=[picture()], sparsity=Sparsity(0.3, 0.7, **switches))
        result = session.ask(QUESTIONS[0], params=PARAMS)
        keys = tuple(session._cache.active[0].k.flatten().tolist())
        found[name] = ([a.tolist() for a in session.selection().active], result.token_ids, keys)
    for name in ("budgets", "score_layers", "sinks", "many"):
        assert found[name][0] != found["none"][0], name
    assert found["refresh"][0] == found["none"][0]  # the first set of an answer is the question's
    assert found["refresh"][2] != found["none"][2]
    assert found["rerotate"][2] != found["none"][2]


def contents(session: Session) -> list[Tensor]:
    cache = session._cache
    return [t.clone() for stores in (cache.visual, cache.text) for store in stores for t in store.segment()]


def assert_same(a: Session, b: Session) -> None:
    """Bit for bit: cache, positions, history."""
    assert a._cache.checkpoint() == b._cache.checkpoint() == a._state.checkpoint == b._state.checkpoint
    assert [(t.question, t.answer) for t in a.history] == [(t.question, t.answer) for t in b.history]
    assert all(torch.equal(x, y) for x, y in zip(contents(a), contents(b), strict=True))


class TestSession:
    def test_what_is_off_is_not_computed(self, shown, monkeypatch):
        engine, item = shown
        policy = Sparsity(0.3, 0.7)
        before = engine.session(media=[item], sparsity=policy)
        before.ask(QUESTIONS[0], params=PARAMS)

        def never(*_: Any, **__: Any) -> None:
            raise AssertionError("a switch that is off was computed")

        for name in ("by_mass", "diverse", "middle"):
            monkeypatch.setattr(sparsevila, name, never)
        for name in ("rerotate", "check_rerotation"):
            monkeypatch.setattr(turn, name, never)
        for name in ("_saliency", "_positions", "_refreshed"):
            monkeypatch.setattr(turn.TurnDriver, name, never)
        after = engine.session(media=[item], sparsity=policy)
        after.ask(QUESTIONS[0], params=PARAMS)
        assert_same(before, after)

    @pytest.mark.parametrize("temperature", [0.0, 0.8])
    def test_a_refresh_that_never_comes_changes_no_bit(self, shown, temperature):
        engine, item = shown
        params = replace(PARAMS, temperature=temperature, seed=7)
        sessions = [engine.session(media=[item], sparsity=Sparsity(0.3, 0.7, refresh=n)) for n in (0, 11, 500)]
        results = [session.ask(QUESTIONS[0], params=params) for session in sessions]
        assert {result.stats.refresh_s for result in results} == {0.0}
        for other in sessions[1:]:
            assert_same(sessions[0], other)

    def test_a_refresh_at_every_token_is_dense_decoding(self, shown):
        """Every token then comes from a pass over the whole visual store."""
        engine, item = shown
        dense, fresh, once = (
            engine.session(media=[item], sparsity=Sparsity(0.3, decode, refresh=n))
            for decode, n in ((0.0, 0), (0.9, 1), (0.9, 0))
        )
        answers = [[s.ask(q, params=PARAMS, remember=False).token_ids for q in QUESTIONS] for s in (dense, fresh, once)]
        assert answers[0] == answers[1]
        assert answers[0] != answers[2]

    def test_pieces_of_an_answer_draw_the_numbers_of_one(self):
        params = SamplingParams(temperature=1.0, seed=3)
        whole, parts = Sampler(params), Sampler(params)
        assert torch.equal(whole.draw(40), torch.cat([parts.draw(n) for n in (3, 17, 16, 4)]))

    @pytest.mark.parametrize("temperature", [0.0, 0.8])
    def test_not_remembering_equals_never_having_asked(self, shown, many, temperature):
        engine, item = shown
        params = replace(PARAMS, temperature=temperature)
        one, other = (engine.session(media=[item], sparsity=many) for _ in range(2))
        for session in (one, other):
            session.ask(QUESTIONS[1], params=params)
        one.ask("And what else is there?", params=params, remember=False)
        got = [session.ask(QUESTIONS[0], params=params, remember=False).token_ids for session in (one, other)]
        assert got[0] == got[1]
        assert_same(one, other)

    @pytest.mark.parametrize("method", ["random", "visionzip", "prumerge+"])
    def test_other_methods_keep_the_promise_with_all_they_take(self, shown, method, monkeypatch):
        engine, item = shown
        wanted = {"budgets": "mass", "sinks": 2, "refresh": 4, "rerotate": True}
        taken = {name: value for name, value in wanted.items() if name in METHODS[method].switches}
        policy = fitting(engine, Sparsity(0.4, 0.7, method, **taken))
        sets = watched(monkeypatch)
        one, other = (engine.session(media=[item], sparsity=policy) for _ in range(2))
        one.ask(QUESTIONS[1], params=PARAMS, remember=False)
        assert len(sets) == 3
        for session in (one, other):
            session.ask(QUESTIONS[0], params=PARAMS)
        assert_same(one, other)

    def test_interleaved_sessions_equal_separate_ones(self, shown, many):
        engine, item = shown
        mixed = [engine.session(media=[item], sparsity=policy) for policy in (many, Sparsity(0.3, 0.7))]
        for question in QUESTIONS:
            for pieces in zip(*(session.stream(question, params=PARAMS) for session in mixed), strict=False):
                assert pieces
        for session, policy in zip(mixed, (many, Sparsity(0.3, 0.7)), strict=True):
            alone = engine.session(media=[item], sparsity=policy)
            for question in QUESTIONS:
                list(zip(alone.stream(question, params=PARAMS), range(100), strict=False))
            assert_same(session, alone)

    def test_running_ahead_changes_nothing(self, shown, many, monkeypatch):
        engine, item = shown
        sessions = []
        for ahead in (False, True):
            monkeypatch.setattr(engine.runner, "runs_ahead", ahead)
            sessions.append(engine.session(media=[item], sparsity=many))
            for question in QUESTIONS:
                sessions[-1].ask(question, params=PARAMS)
        assert_same(*sessions)

    def test_ending_a_turn_anywhere_leaves_the_session_as_it_was(self, shown, many):
        engine, item = shown
        session, untouched = (engine.session(media=[item], sparsity=many) for _ in range(2))
        for one in (session, untouched):
            one.ask(QUESTIONS[0], params=PARAMS)
        for tokens in range(1, 8):
            chunks = session.stream(QUESTIONS[1], params=PARAMS)
            for _ in range(tokens):
                next(chunks)
            if tokens % 2:
                chunks.close()
            else:
                session.cancel()
                assert list(chunks)[-1].finish_reason == "cancelled"
            assert_same(session, untouched)

    def test_cancelling_in_the_middle_of_a_refresh(self, shown, many, monkeypatch):
        engine, item = shown
        session, untouched = (engine.session(media=[item], sparsity=many) for _ in range(2))
        for one in (session, untouched):
            one.ask(QUESTIONS[0], params=PARAMS)
        forget = KVCache.forget_text

        def press(self: KVCache, count: int) -> None:
            session.cancel()
            forget(self, count)

        with monkeypatch.context() as patch:
            patch.setattr(KVCache, "forget_text", press)
            chunks = list(session.stream(QUESTIONS[1], params=PARAMS))
        assert chunks[-1].finish_reason == "cancelled"
        assert len(chunks) == 1 + many.refresh
        assert_same(session, untouched)

    def test_undo_and_clear_go_back_bit_for_bit(self, shown, many):
        engine, item = shown
        session, one, none = (engine.session(media=[item], sparsity=many) for _ in range(3))
        for question in QUESTIONS:
            session.ask(question, params=PARAMS)
        one.ask(QUESTIONS[0], params=PARAMS)
        session.undo()
        assert_same(session, one)
        session.clear()
        again, fresh = (s.ask(QUESTIONS[1], params=PARAMS).token_ids for s in (session, none))
        assert again == fresh
        assert_same(session, none)

    def test_a_conversation_that_is_built_again_goes_on(self, shown, many):
        """Later media move after a drop: where entries stand is known anew."""
        engine, item = shown
        dropped, never = (engine.session(media=media, sparsity=many) for media in ([picture(), item], [item]))
        answers = []
        for session in (dropped, never):
            if session is dropped:
                session.ask(QUESTIONS[0], params=PARAMS)
                session.clear()
                session.drop(1)
            answers.append(session.ask(QUESTIONS[1], params=PARAMS).token_ids)
        assert answers[0] == answers[1]
        assert_same(dropped, never)

    def test_a_stop_text_leaves_no_trace_of_what_came_behind(self, shown, many):
        engine, item = shown
        whole = engine.session(media=[item], sparsity=many).ask(QUESTIONS[0], params=PARAMS)
        for at in range(2, 10):
            stop = engine.tokenizer.decode(whole.token_ids[: at + 1]).removeprefix(
                engine.tokenizer.decode(whole.token_ids[:at])
            )
            if not stop or stop in engine.tokenizer.decode(whole.token_ids[:at]):
                continue
            session = engine.session(media=[item], sparsity=many)
            result = session.ask(QUESTIONS[0], params=replace(PARAMS, stop=(stop,)))
            assert whole.text.startswith(result.text)
            lengths = session._cache.checkpoint()
            session.ask(QUESTIONS[1], params=PARAMS)
            session.undo()
            assert session._cache.checkpoint() == lengths

    def test_a_rated_answer_goes_the_way_of_a_decoded_one(self, shown, many):
        """The session's own greedy answer, fed to it, is what it finds likeliest at every token."""
        engine, item = shown
        session = engine.session(media=[item], sparsity=many)
        session.ask(QUESTIONS[1], params=PARAMS)
        answer = session.ask(QUESTIONS[0], params=PARAMS, remember=False)
        driver = session._driver(turn.Meter(), lambda _: None)
        asked, prefilled, _ = driver.ask(session._state, QUESTIONS[0])
        driver.retrieve(asked, prefilled.scores)
        rows = list(driver._fed(asked, answer.token_ids[:-1]))
        assert [int(row.argmax()) for row in rows] == list(answer.token_ids[1:])
        session._settle(session._state)
        compared = session.agreement(QUESTIONS[0], max_new_tokens=9)
        assert len(compared.kl) == len(compared.token_ids) - 1
        assert max(compared.kl) > 0
        again = session.ask(QUESTIONS[0], params=PARAMS, remember=False)
        assert again.token_ids == answer.token_ids

    def test_the_time_of_a_refresh_is_told(self, shown):
        engine, item = shown
        stats = engine.session(media=[item], sparsity=Sparsity(0.3, 0.7, refresh=2)).ask("What?", params=PARAMS).stats
        plain = engine.session(media=[item], sparsity=Sparsity(0.3, 0.7)).ask("What?", params=PARAMS).stats
        assert 0 < stats.refresh_s < stats.decode_s
        assert plain.refresh_s == 0
        assert stats.prompt_tokens == plain.prompt_tokens
        assert stats.layer_tokens == plain.layer_tokens + 2 * 5  # what five refreshes prefill again

    def test_retrieval_switches_act_without_a_new_prefill(self, shown, monkeypatch):
        engine, item = shown
        session = engine.session(media=[item], sparsity=Sparsity(0.3, 0.7))
        session.ask(QUESTIONS[0], params=PARAMS)
        session.sparsity = Sparsity(0.3, 0.7, budgets="mass", sinks=1, refresh=2, sets="per_kv_head")
        assert not session._state.stale
        assert session.ask(QUESTIONS[0], params=PARAMS).stats.refresh_s > 0
        session.sparsity = Sparsity(0.3, 0.7, diversity=0.5)
        assert session._state.stale

    def test_a_model_of_other_positions_refuses_to_rerotate(self, engines, clip):
        session = engines["qwen2.5"].session(media=[clip], sparsity=Sparsity(0.3, 0.7, rerotate=True))
        with pytest.raises(InvalidRequest, match="mrope"):
            session.ask("What?", params=PARAMS)
        session.sparsity = Sparsity(0.3, 0.0, rerotate=True)  # nothing is read by choice
        assert session.ask("What?", params=PARAMS).token_ids

    def test_without_retrieval_its_switches_do_nothing(self, shown):
        engine, item = shown
        on, off = (
            engine.session(media=[item], sparsity=Sparsity(0.3, 0.0, **switches))
            for switches in ({"budgets": "mass", "sinks": 2, "refresh": 2}, {})
        )
        for session in (on, off):
            session.ask(QUESTIONS[0], params=PARAMS)
        assert_same(on, off)
