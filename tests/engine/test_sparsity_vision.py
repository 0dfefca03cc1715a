"""Methods that act on the encoder's tokens: what they make of them, by plain loops, and what every method must hold."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from families import FAMILIES, TinyFolders
from oracles import Oracle, write_clip
from torch import Tensor

from sparsevila import ContextTooLong, Engine, Image, InvalidRequest, MediaError, SamplingParams, Sparsity, Video
from sparsevila.engine.session import Session
from sparsevila.engine.sparsity.base import Method, Survivors, keep_count
from sparsevila.engine.sparsity.controls import NoTokens
from sparsevila.engine.sparsity.prumerge import PruMerge, PruMergePlus
from sparsevila.engine.sparsity.registry import METHODS, make_method
from sparsevila.engine.sparsity.visionzip import VisionZip
from sparsevila.models import clip, qwen_vit
from sparsevila.models.interface import MediaKind, TokenMap, VisualTokens

MERGING = ("visionzip", "prumerge", "prumerge+")
SHORT = SamplingParams(max_new_tokens=4)


def video_map(frames: int, per_frame: int) -> TokenMap:
    n = frames * per_frame
    flat = torch.zeros(n, dtype=torch.int32)
    frame = torch.arange(frames, dtype=torch.int32).repeat_interleave(per_frame)
    return TokenMap(flat, frame, torch.zeros(n, 4), flat.bool(), flat - 1)


def picture_map(rows: int, cols: int, base: int) -> TokenMap:
    """A base picture, then rows closed by a newline."""
    line = torch.cat([torch.full((base,), -1), torch.arange(rows).repeat_interleave(cols + 1)]).to(torch.int32)
    column = torch.arange(rows * (cols + 1)) % (cols + 1)
    structural = torch.cat([torch.zeros(base, dtype=torch.bool), column == cols])
    zeros = torch.zeros(len(line), dtype=torch.int32)
    return TokenMap(zeros, zeros, torch.zeros(len(line), 4), structural, line)


def drawn(where: TokenMap, seed: int = 0) -> VisualTokens:
    """Saliency with a heavy tail, as encoders have it, so that some tokens are outliers; keys of unequal length."""
    generator = torch.Generator().manual_seed(seed)
    n = len(where)
    saliency = torch.randn(n, generator=generator).mul(1.5).exp()
    keys = torch.randn(n, 6, generator=generator) * torch.rand(n, 1, generator=generator).mul(4).exp()
    features = torch.randn(n, 5, generator=generator)
    gone = where.structural
    return VisualTokens(
        features.masked_fill(gone[:, None], 0), where, saliency.masked_fill(gone, 0), keys.masked_fill(gone[:, None], 0)
    )


CASES: dict[str, tuple[TokenMap, MediaKind]] = {
    "clip": (video_map(4, 60), "video"),
    "picture": (picture_map(9, 7, base=40), "image"),
    "small": (video_map(3, 2), "video"),
    "single": (video_map(2, 1), "video"),
}


# Plain forms, token by token -----------------------------------------------------------------------------------------


def groups_of(where: TokenMap, kind: MediaKind) -> list[list[int]]:
    frames: dict[int, list[int]] = {}
    for i in range(len(where)):
        if not where.structural[i]:
            frames.setdefault(int(where.frame[i]) if kind == "video" else 0, []).append(i)
    return [frames[frame] for frame in sorted(frames)]


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a.double() @ b.double() / (a.double().norm() * b.double().norm()))


def most(values: dict[int, float], count: int) -> list[int]:
    """The keys of the largest values, ties to the lower key, ascending."""
    return sorted(sorted(values, key=lambda i: (-values[i], i))[:count])


def plain_visionzip(tokens: VisualTokens, group: list[int], removed: float, merge: str) -> dict[int, Tensor]:
    """Token that stays -> its feature."""
    kept = keep_count(len(group), removed)
    contextual = math.floor(kept * 10 / 64 + 0.5)
    out = {
        i: tokens.features[i].double() for i in most({i: float(tokens.saliency[i]) for i in group}, kept - contextual)
    }
    others = [i for i in group if i not in out]
    if contextual == 0:
        return out
    step = len(others) // contextual
    targets = [others[step * number] for number in range(contextual)]
    joined: dict[int, list[int]] = {target: [] for target in targets}
    for i in others:
        if i not in joined:
            likeness = {target: cosine(tokens.keys[i], tokens.keys[target]) for target in targets}
            joined[most(likeness, 1)[0]].append(i)
    for target, members in joined.items():
        own, come = tokens.features[target].double(), [tokens.features[i].double() for i in members]
        if merge == "mean":
            out[target] = sum(come, own) / (1 + len(come))
        else:
            out[target] = own + sum(come, torch.zeros_like(own)) / max(1, len(come))
    return out


def plain_outliers(tokens: VisualTokens, group: list[int]) -> list[int]:
    values = {i: float(tokens.saliency[i]) for i in group}
    first, third = np.percentile(list(values.values()), [25, 75])
    return [i for i in group if values[i] > third + 1.5 * (third - first)] or most(values, 1)


def plain_prumerge(tokens: VisualTokens, group: list[int], removed: float, plus: bool) -> dict[int, Tensor]:
    values = {i: float(tokens.saliency[i]) for i in group}
    total = sum(values.values())
    stays, with_sum = plain_outliers(tokens, group), True
    if plus:
        kept = keep_count(len(group), removed)
        room = kept if kept == len(group) else max(1, kept - 1)
        with_sum = kept > 1
        if len(stays) > room:
            stays = most(values, room)
        others, missing = [i for i in group if i not in stays], room - len(stays)
        stays = sorted(stays + [others[number * len(others) // missing] for number in range(missing)])
    out = {}
    for i in stays:
        likeness = {j: cosine(tokens.keys[i], tokens.keys[j]) for j in group if j != i}
        out[i] = tokens.features[i].double()
        for j in most(likeness, 32):
            out[i] = out[i] + values[j] / total * tokens.features[j].double()
    rest = [i for i in group if i not in stays]
    if rest and with_sum:
        out[rest[-1]] = sum(values[i] / total * tokens.features[i].double() for i in rest)
    return out


def assert_equals_plain(tokens: VisualTokens, survivors: Survivors, plain: dict[int, Tensor]) -> None:
    visual = ~survivors.tokens.token_map.structural
    assert survivors.sources[visual].tolist() == sorted(plain)
    want = torch.stack([plain[i] for i in sorted(plain)])
    got = survivors.tokens.features[visual].double()
    assert (got - want).abs().max() < 1e-6 * max(1.0, float(want.abs().max()))
    assert torch.equal(survivors.tokens.features[~visual], torch.zeros(int((~visual).sum()), 5))
    assert torch.equal(survivors.tokens.saliency, tokens.saliency[survivors.sources])


@pytest.mark.parametrize("removed", [0.1, 0.5, 0.75, 0.9, 0.98])
@pytest.mark.parametrize("case", CASES)
class TestAgainstPlainLoops:
    @pytest.mark.parametrize("merge", ["mean", "added"])
    def test_visionzip(self, case, removed, merge):
        where, kind = CASES[case]
        tokens, plain = drawn(where), {}
        for group in groups_of(where, kind):
            plain |= plain_visionzip(tokens, group, removed, merge)
        assert_equals_plain(tokens, VisionZip(removed, merge=merge).on_vision(tokens, kind), plain)

    @pytest.mark.parametrize("method", [PruMerge, PruMergePlus])
    def test_prumerge(self, case, removed, method):
        where, kind = CASES[case]
        tokens, plain = drawn(where, seed=1), {}
        for group in groups_of(where, kind):
            plain |= plain_prumerge(tokens, group, removed, plus=method is PruMergePlus)
        assert_equals_plain(tokens, method(removed).on_vision(tokens, kind), plain)


def test_parts_of_a_large_picture_are_put_together(monkeypatch):
    """Similarities and neighbours are computed a few rows at a time: rounding apart, their number says nothing."""
    tokens = drawn(video_map(1, 80), seed=2)
    methods = [VisionZip(0.5), PruMerge(0.5), PruMergePlus(0.5)]
    whole = [method.on_vision(tokens, "video") for method in methods]
    monkeypatch.setattr("sparsevila.engine.sparsity.merging._SIMILARITIES_AT_ONCE", 100)
    monkeypatch.setattr("sparsevila.engine.sparsity.prumerge._GATHERED_AT_ONCE", 1)
    for method, want in zip(methods, whole, strict=True):
        got = method.on_vision(tokens, "video")
        assert torch.equal(got.sources, want.sources)
        torch.testing.assert_close(got.tokens.features, want.tokens.features, rtol=1e-5, atol=1e-6)


# By hand -------------------------------------------------------------------------------------------------------------


def test_published_budgets_of_visionzip():
    counts = [(kept, VisionZip().num_contextual(kept)) for kept in (64, 128, 192, 1, 3, 4)]
    assert counts == [(64, 10), (128, 20), (192, 30), (1, 0), (3, 0), (4, 1)]


def test_visionzip_by_hand():
    """Eight tokens, four stay: three dominant, one target. All that is left joins it."""
    where = video_map(1, 8)
    features = torch.arange(8.0)[:, None].expand(8, 2).contiguous()
    saliency = torch.tensor([0.1, 0.9, 0.2, 0.8, 0.1, 0.7, 0.1, 0.1])
    tokens = VisualTokens(features, where, saliency, torch.ones(8, 3))
    zipped = VisionZip(0.5).on_vision(tokens, "video")
    assert zipped.sources.tolist() == [0, 1, 3, 5]
    assert zipped.tokens.features[:, 0].tolist() == pytest.approx([(0 + 2 + 4 + 6 + 7) / 5, 1, 3, 5])
    added = VisionZip(0.5, merge="added").on_vision(tokens, "video")
    assert added.tokens.features[0, 0] == 0 + (2 + 4 + 6 + 7) / 4


def test_long_keys_attract_nobody():
    """Targets are 0 and 2. What counts is the angle: token 1 points where 0 does, 2 is only longer."""
    keys = torch.tensor([[1.0, 0.0], [1.0, 0.2], [50.0, 50.0], [0.1, 0.1], [0.0, 1.0], [0.0, 1.0]])
    saliency = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0, 1.0])
    tokens = VisualTokens(torch.eye(6), video_map(1, 6), saliency, keys)
    zipped = VisionZip(1 / 3, dominant=2, contextual=2).on_vision(tokens, "video")
    assert zipped.sources.tolist() == [0, 2, 4, 5]
    assert zipped.tokens.features[:2].tolist() == [[0.5, 0.5, 0, 0, 0, 0], [0, 0, 0.5, 0.5, 0, 0]]


def test_prumerge_by_hand():
    """One outlier of nine; its two nearest are added by their share, all others make the last token."""
    saliency = torch.tensor([1.0, 1, 1, 1, 12, 1, 1, 1, 1])
    keys = torch.eye(9)
    keys[[2, 6]] = keys[4].clone()
    tokens = VisualTokens(torch.eye(9) * 20, video_map(1, 9), saliency, keys)
    merged = PruMerge(0.5, neighbours=2).on_vision(tokens, "video")
    assert merged.sources.tolist() == [4, 8]
    assert merged.tokens.features.tolist() == [[0, 0, 1, 0, 20, 0, 1, 0, 0], [1, 1, 1, 1, 0, 1, 1, 1, 1]]


def test_prumerge_keeps_as_many_as_stand_out():
    flat, peaked = torch.ones(40), torch.ones(40)
    peaked[[3, 10, 11, 30]] = 9.0
    for saliency, sources in ((flat, [0, 39]), (peaked, [3, 10, 11, 30, 39])):
        tokens = replace(drawn(video_map(1, 40)), saliency=saliency)
        assert PruMerge(0.5).on_vision(tokens, "video").sources.tolist() == sources
    grid = PruMergePlus(0.75).on_vision(replace(drawn(video_map(1, 40)), saliency=peaked), "video")
    assert grid.sources.tolist() == [0, 3, 8, 10, 11, 17, 24, 30, 32, 39]


# What every method must hold -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("case", CASES)
class TestEveryMethod:
    def test_survivors_are_tokens_in_their_order(self, name, case):
        where, kind = CASES[case]
        for removed in (0.3, 0.6, 0.9):
            for seed in range(4):
                tokens, method = drawn(where, seed), make_method(Sparsity(removed, method=name))
                survivors = method.on_vision(tokens, kind)
                if survivors is None:
                    # It is dense, acts before the encoder, or inside the decoder.
                    assert method.shrinks_by or type(method).on_vision is Method.on_vision
                    continue
                sources, kept = survivors.sources, survivors.tokens.token_map
                assert torch.equal(sources, sources.unique())
                assert len(survivors.tokens) == len(sources) == len(kept)
                assert bool(((sources >= 0) & (sources < len(where))).all())
                for field in ("frame", "box", "structural", "line"):
                    assert torch.equal(getattr(kept, field), getattr(where, field)[sources])
                assert survivors.tokens.features.isfinite().all()
                planned = method.planned_keep(where, kind)
                assert kept.num_visual == planned or (name == "prumerge" and kept.num_visual < planned)
                rows = set(kept.line[~kept.structural].tolist()) - {-1}
                assert set(kept.line[kept.structural].tolist()) == rows

    def test_the_same_tokens_give_the_same_and_stay_as_they_are(self, name, case):
        where, kind = CASES[case]
        tokens, untouched = drawn(where), drawn(where)
        method = make_method(Sparsity(0.6, method=name))
        one, two = method.on_vision(tokens, kind), method.on_vision(tokens, kind)
        assert torch.equal(tokens.features, untouched.features)  # they are cached, unpruned
        if one is not None:
            assert torch.equal(one.sources, two.sources)
            assert torch.equal(one.tokens.features, two.tokens.features)

    def test_a_fraction_of_zero_bypasses_everything(self, name, case):
        where, kind = CASES[case]
        method = make_method(Sparsity(method=name))
        if isinstance(method, NoTokens):
            assert len(method.on_vision(drawn(where), kind).sources) == method.planned_keep(where, kind) == 0
            return
        assert method.on_vision(VisualTokens(torch.zeros(len(where), 1), where, None), kind) is None
        assert method.planned_keep(where, kind) == where.num_visual
        assert method.on_turn([torch.zeros(3)]) is None
        assert not method.scores_turn


# Keys ----------------------------------------------------------------------------------------------------------------


def picture(seed: int = 0, size: tuple[int, int] = (48, 70)) -> Image:
    noise = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    return Image(noise)


class Engines(dict[str, Engine]):
    """An engine of each family, loaded when it is asked for."""

    def __init__(self, folders: TinyFolders) -> None:
        super().__init__()
        self._folders = folders

    def __missing__(self, name: str) -> Engine:
        self[name] = Engine.load(self._folders[name], device="cpu", dtype="float32")
        return self[name]


@pytest.fixture(scope="module")
def engines(tiny_folders: TinyFolders) -> Iterator[Engines]:
    engines = Engines(tiny_folders)
    yield engines
    for engine in engines.values():
        engine.close()


@pytest.fixture(scope="module")
def clip_file(tmp_path_factory: pytest.TempPathFactory) -> Video:
    return replace(write_clip(tmp_path_factory.mktemp("clip") / "clip.mp4", frames=6), frames=4)


@pytest.fixture
def shown(clip_file):
    """What the shared tests show a family."""

    def of(name: str) -> Image | Video:
        return clip_file if FAMILIES[name].shown == "video" else picture()

    return of


def inputs_of(engine: Engine, item: Image | Video):
    session = engine.session(media=[item])
    (media,) = session._state.media
    session.close()
    return media.inputs


@pytest.mark.parametrize("name", FAMILIES)
def test_keys_come_when_asked_for_and_change_nothing_else(name, engines, shown):
    model, inputs = engines[name].model, inputs_of(engines[name], shown(name))
    with torch.inference_mode():
        plain, keyed = model.encode(inputs), model.encode(inputs, with_keys=True)
    assert plain.keys is None
    assert torch.equal(plain.features, keyed.features)
    assert torch.equal(plain.saliency, keyed.saliency)
    structural = inputs.token_map.structural
    assert keyed.keys.shape[0] == len(plain)
    assert keyed.keys.shape[1] > 1
    assert keyed.keys.dtype == torch.float32
    assert not keyed.keys[structural].any()
    inside = keyed.keys[~structural]
    assert len(inside.unique(dim=0)) > len(inside) // 2  # of different patches
    part = keyed.select(torch.tensor([1, 3]))
    assert torch.equal(part.keys, keyed.keys[[1, 3]])


@pytest.mark.parametrize("kind", ["image", "video"])
@pytest.mark.parametrize("name", FAMILIES)
def test_keys_go_the_way_of_saliency(name, kind, engines, clip_file, monkeypatch):
    """Whatever a family does to patches, cut, pool, scale, merge: a key that says what saliency says still does so."""
    for module in (clip, qwen_vit):
        monkeypatch.setattr(
            module, "with_mean_keys", lambda saliency, _: torch.stack([saliency, saliency, -saliency], 2)
        )
    engine = engines[name]
    tokens = engine.model.encode(inputs_of(engine, picture() if kind == "image" else clip_file), with_keys=True)
    assert tokens.saliency.unique().numel() > len(tokens) // 2
    for column, sign in ((0, 1), (1, -1)):
        torch.testing.assert_close(tokens.keys[:, column], sign * tokens.saliency, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["vicuna", "mistral"])
def test_keys_are_those_of_the_layer_that_saliency_is_read_from(oracles: dict[str, Oracle], engines, name):
    oracle, found = oracles[name], {}
    tower, ours = oracle.hf.model.vision_tower, engines[name].model.vision_tower
    layers = getattr(tower, "vision_model", tower).encoder.layers
    hook = layers[len(ours.blocks) - 1].self_attn.k_proj.register_forward_hook(
        lambda module, args, out: found.update(keys=out)
    )
    pixels = torch.randn(2, 3, oracle.tiny.image, oracle.tiny.image)
    with torch.inference_mode():
        tower(pixels)
        _, marks = ours(pixels, with_keys=True)
    hook.remove()
    want = found["keys"].unflatten(-1, (5, -1)).mean(dim=2)[:, 1:]  # five heads; the summary token first
    torch.testing.assert_close(marks[..., 1:], want, rtol=1e-4, atol=1e-5)


def patch_keys(module, monkeypatch) -> list[Tensor]:
    """The head-mean keys (B, S, Dk) of every chunk that a tower sees from now on."""
    seen: list[Tensor] = []
    real = module.with_mean_keys

    def spied(saliency: Tensor, k: Tensor) -> Tensor:
        seen.append(k.mean(dim=1))
        return real(saliency, k)

    monkeypatch.setattr(module, "with_mean_keys", spied)
    return seen


def test_keys_of_pooled_frames_are_means(engines, clip_file, monkeypatch):
    engine = engines["video"]
    inputs, seen = inputs_of(engine, clip_file), patch_keys(clip, monkeypatch)
    tokens = engine.model.encode(inputs, with_keys=True)
    patches = torch.cat(seen)[:, 1:]  # without the summary token
    grid, side = 4, 2
    for frame in range(len(patches)):
        for row in range(side):
            for col in range(side):
                inside = [(2 * row + y) * grid + 2 * col + x for y in range(2) for x in range(2)]
                got = tokens.keys[frame * side * side + row * side + col]
                torch.testing.assert_close(got, patches[frame, inside].mean(dim=0), rtol=1e-5, atol=1e-6)


def test_keys_of_merged_patches_are_means(engines, monkeypatch):
    engine = engines["qwen2"]
    inputs, seen = inputs_of(engine, picture()), patch_keys(qwen_vit, monkeypatch)
    tokens = engine.model.encode(inputs, with_keys=True)
    merged = seen[0][0].unflatten(0, (-1, 4)).mean(dim=1)  # the four patches of a token are neighbours
    torch.testing.assert_close(tokens.keys[1:-1], merged, rtol=1e-5, atol=1e-6)


# In sessions ---------------------------------------------------------------------------------------------------------


def contents(session: Session) -> list[Tensor]:
    cache = session._cache
    heads = range(cache.visual[0].k.shape[0])
    return [t for stores in (cache.visual, cache.text) for store in stores for h in heads for t in store.segment_of(h)]


@pytest.mark.parametrize("method", [*MERGING, "none"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_takes_a_turn(name, method, engines, shown):
    engine = engines[name]
    session = engine.session(media=[shown(name)], sparsity=Sparsity(0.6, 0.5, method=method))
    answer = session.ask("What?", params=SHORT)
    (placed,) = session._state.placed
    entered = placed.survivors.tokens.token_map
    stats = answer.stats
    assert stats.visual_tokens_kept == entered.num_visual == session.media[0].tokens_kept
    assert session._cache.visual_lens() == [entered.num_visual] * session._cache.num_layers
    positions, following = engine.model.visual_positions(entered, 7)
    assert following - 7 <= len(entered) or name.startswith("qwen")
    if not name.startswith("qwen"):  # one axis: as if the others had never been
        assert positions.tolist() == list(range(7, following))
        lengths = session._cache.checkpoint()
        assert lengths.next_position == lengths.visual_len[0] + lengths.text_len[0]
    if method == "none":
        assert len(entered) == stats.visual_tokens_active == stats.structural_tokens == 0
        assert session.selection().store.tolist() == []
    else:
        assert 0 < entered.num_visual < placed.tokens.token_map.num_visual
        assert 0 < stats.visual_tokens_active <= keep_count(entered.num_visual, 0.5)
    session.close()


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"dense", "none"}))
@pytest.mark.parametrize("name", ["vicuna", "longvila", "qwen2.5"])
def test_a_fraction_of_zero_is_dense_to_the_bit(name, method, engines, shown):
    sessions = [
        engines[name].session(media=[shown(name)], sparsity=Sparsity(method=chosen)) for chosen in (method, "dense")
    ]
    ours, dense = ([s.ask(text, params=SHORT).token_ids for text in ("What?", "And?")] for s in sessions)
    assert ours == dense
    assert all(torch.equal(a, b) for a, b in zip(*map(contents, sessions), strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_sessions_and_turns_do_not_disturb_each_other(method, engines, shown, monkeypatch):
    engine, policy = engines["mistral"], Sparsity(0.3, 0.5, method=method)
    config = engine.model.decoder.config
    monkeypatch.setitem(engine._head_scores, None, ((1.0,) * config.num_heads,) * config.num_layers)
    media, texts = (picture(1), picture(2)), ("What is it?", "And then?", "Why?")
    alone = []
    for item in media:
        session = engine.session(media=[item], sparsity=policy)
        alone.append([session.ask(text, params=SHORT).token_ids for text in texts])
    sessions = [engine.session(media=[item], sparsity=policy) for item in media]
    mixed: list[list[tuple[int, ...]]] = [[], []]
    for text in texts:
        for session, answers in zip(sessions, mixed, strict=True):
            answers.append(session.ask(text, params=SHORT).token_ids)
            session.ask("Unrelated?", params=SHORT, remember=False)
    assert mixed == alone
    before = [t.clone() for t in contents(sessions[0])]
    sessions[0].ask("Once more?", params=SHORT)
    sessions[0].undo()
    assert all(torch.equal(a, b) for a, b in zip(before, contents(sessions[0]), strict=True))


class TestNone:
    @pytest.mark.parametrize("name", ["vicuna", "nvila", "qwen2.5"])
    def test_the_picture_says_nothing(self, name, engines, clip_file):
        engine, policy, seen = engines[name], Sparsity(method="none"), []
        for media in ([picture(1)], [picture(2, (90, 41))], [clip_file]):
            session = engine.session(media=media, sparsity=policy)
            ids = [session.ask(text, params=SHORT).token_ids for text in ("What?", "And then?")]
            seen.append((ids, contents(session)))
        for ids, cached in seen[1:]:
            assert ids == seen[0][0]
            assert all(torch.equal(a, b) for a, b in zip(cached, seen[0][1], strict=True))
        dense = engine.session(media=[picture(1)], sparsity=Sparsity())
        dense.ask("What?", params=SHORT)
        assert dense._cache.next_position > len(seen[0][1])

    def test_a_second_picture_with_nothing_between(self, engines):
        """Nothing at all is to be prefilled for it: no token of its own, no text between the two."""
        session = engines["qwen2"].session(media=[picture(1)], sparsity=Sparsity(method="none"))
        with pytest.raises(MediaError):  # the first is placed, and the turn then fails
            session.ask("What?", media=[Image(b"no picture")], params=SHORT)
        length = session._cache.next_position
        session.attach(picture(2))
        first = session.ask("What?", params=SHORT, remember=False)
        assert session._cache.next_position == length
        session.sparsity = Sparsity(0.5)
        session.ask("What?", params=SHORT, remember=False)
        assert session._cache.next_position > length
        session.sparsity = Sparsity(method="none")
        assert session.ask("What?", params=SHORT).token_ids == first.token_ids

    def test_too_long_a_question_is_refused(self, tiny_folders, clip_file):
        with Engine.load(tiny_folders["video"], device="cpu", max_context=64) as engine:
            session = engine.session(media=[clip_file], sparsity=Sparsity(method="none"))
            with pytest.raises(ContextTooLong) as caught:
                session.ask("word " * 100)
            assert "shorter question" in caught.value.hint


class TestResize:
    @pytest.mark.parametrize("removed", [0.3, 0.6, 0.9])
    def test_a_picture_of_any_size_becomes_as_small_as_asked(self, engines, removed):
        engine = engines["qwen2.5"]
        session = engine.session(media=[picture(3, (300, 200))], sparsity=Sparsity(removed, method="resize"))
        total, bound = session.media[0].tokens_total, session.media[0].tokens_kept
        kept = session.ask("What?", params=SHORT).stats.visual_tokens_kept
        assert abs(kept - (1 - removed) * total) <= 0.25 * (1 - removed) * total
        assert kept == session.media[0].tokens_kept <= bound
        (placed,) = session._state.placed
        assert placed.tokens.token_map.media.unique().tolist() == [session.media[0].number]
        box = placed.tokens.token_map.box[~placed.tokens.token_map.structural]
        assert box.min() == 0
        assert box.max() == 1  # it is the whole picture
        assert session._cache.visual_lens()[0] == kept == len(session.selection().store)

    def test_it_is_what_the_smaller_picture_would_be(self, engines):
        """A grey picture keeps its colour: scaled by the caller it gives the same features."""
        grey = [np.full((*size, 3), 90, dtype=np.uint8) for size in ((224, 224), (112, 112))]
        answers, stores = [], []
        for rgb, policy in zip(grey, (Sparsity(0.75, method="resize"), Sparsity()), strict=True):
            session = engines["qwen2"].session(media=[Image(rgb)], sparsity=policy)
            answers.append(session.ask("What?", params=SHORT).token_ids)
            stores.append([t.clone() for t in contents(session)])
        assert answers[0] == answers[1]
        assert all(torch.equal(a, b) for a, b in zip(*stores, strict=True))

    def test_a_model_of_one_size_refuses(self, engines, clip_file):
        session = engines["video"].session(media=[clip_file], sparsity=Sparsity(0.5, method="resize"))
        with pytest.raises(InvalidRequest, match="resize: expected about"):
            session.ask("What?")
        session.sparsity = Sparsity(method="resize")
        assert session.ask("What?", params=SHORT).stats.visual_tokens_kept == session.media[0].tokens_total

    def test_it_comes_and_goes_between_turns(self, engines):
        engine, media = engines["qwen2"], picture(5, (200, 200))
        session = engine.session(media=[media], sparsity=Sparsity(0.75, method="resize"))
        small = session.ask("What?", params=SHORT, remember=False)
        session.sparsity = Sparsity()
        whole = session.ask("What?", params=SHORT, remember=False)
        assert whole.stats.visual_tokens_kept == session.media[0].tokens_total > 3 * small.stats.visual_tokens_kept
        session.sparsity = Sparsity(0.75, method="resize")
        assert session.ask("What?", params=SHORT).token_ids == small.token_ids
        turns = [session.ask(text, params=SHORT).token_ids for text in ("And?", "Why?")]
        session.undo()
        session.system = session.system  # nothing changes
        assert session.ask("Why?", params=SHORT).token_ids == turns[1]
        assert small.stats.visual_tokens_total == whole.stats.visual_tokens_total


class TestFeaturesWithAndWithoutKeys:
    @pytest.fixture
    def encodes(self, engines, monkeypatch) -> list[bool]:
        """Whether each encoding from now on was asked for keys."""
        calls: list[bool] = []
        encode = type(engines["video"].model).encode

        def counted(self, *args, with_keys: bool = False):
            calls.append(with_keys)
            return encode(self, *args, with_keys=with_keys)

        monkeypatch.setattr(type(engines["video"].model), "encode", counted)
        engines["video"].forget_features()
        return calls

    def test_are_encoded_again_for_a_method_that_compares_keys(self, engines, encodes, clip_file):
        engine = engines["video"]
        session = engine.session(media=[clip_file], sparsity=Sparsity(0.5))
        before = session.ask("What?", params=SHORT, remember=False).token_ids
        session.sparsity = Sparsity(0.5, method="visionzip")
        merged = session.ask("What?", params=SHORT, remember=False).token_ids
        assert encodes == [False, True]
        session.sparsity = Sparsity(0.5)
        assert session.ask("What?", params=SHORT, remember=False).token_ids == before
        session.sparsity = Sparsity(0.5, method="prumerge+")
        session.ask("What?", params=SHORT, remember=False)
        other = engine.session(media=[clip_file], sparsity=Sparsity(0.5, method="visionzip"))
        assert other.ask("What?", params=SHORT).token_ids == merged
        assert encodes == [False, True]  # features with keys serve every method

    def test_another_file_in_its_place_is_refused(self, engines, encodes, clip_file, tmp_path: Path):
        path = tmp_path / "clip.mp4"
        path.write_bytes(Path(clip_file.source).read_bytes())
        session = engines["video"].session(media=[replace(clip_file, source=path)], sparsity=Sparsity(0.5))
        before = session.ask("What?", params=SHORT, remember=False).token_ids
        write_clip(path, frames=5)
        session.sparsity = Sparsity(0.5, method="visionzip")
        with pytest.raises(MediaError, match="no longer what was attached"):
            session.ask("What?", params=SHORT)
        session.sparsity = Sparsity(0.5)
        assert session.ask("What?", params=SHORT).token_ids == before
        assert encodes == [False]
