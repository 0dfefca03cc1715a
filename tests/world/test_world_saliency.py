"""Figures against known values, a tower whose attention was planted, and a student with random weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from world.labels import patch_labels
from world.saliency import (
    BEST,
    COLUMNS,
    RANDOM,
    SALIENCY,
    VARIANCE,
    View,
    attention_scores,
    auroc,
    average_ranks,
    ink_of_patches,
    interval,
    judge,
    measure,
    pixel_variance,
    recall,
    scorer_of,
    spearman,
    summarise,
    views_of,
)
from world.splits import KINDS, TEST, make
from world.student import SHAPES, build, export
from world.train import make_tokenizer

from sparsevila.kernels.saliency import saliency_ref
from sparsevila.models.clip import ClipConfig, ClipTower

ROOT = Path(__file__).resolve().parents[2]
PATCH = 8


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("student")
    model = build(SHAPES["small"], folder, make_tokenizer(per_kind=30))
    export(model, folder)
    return model.requires_grad_(False), folder


# Figures


def test_ranks_of_equal_values_are_their_mean() -> None:
    assert average_ranks(np.array([3.0, 1.0, 3.0, 7.0, 3.0, 1.0])).tolist() == [4, 1.5, 4, 6, 4, 1.5]


def test_spearman_of_known_values() -> None:
    # The IQ and television example of Wikipedia's article: -29/165.
    iq = np.array([106, 86, 100, 101, 99, 103, 97, 113, 112, 110])
    hours = np.array([7, 0, 27, 50, 28, 29, 20, 12, 6, 17])
    assert spearman(iq, hours) == pytest.approx(-29 / 165)
    # Ties, by hand: ranks 1.5 1.5 3.5 3.5 against 1 2 3 4 have covariance 4 and squares 4 and 5.
    assert spearman(np.array([0, 0, 1, 1]), np.array([1, 2, 3, 4])) == pytest.approx(4 / np.sqrt(4 * 5))
    assert np.isnan(spearman(np.zeros(4), np.arange(4)))


def test_auroc_counts_pairs() -> None:
    positive = np.array([True, False, True, False, False])
    score = np.array([3.0, 3.0, 1.0, 0.0, 2.0])
    pairs = [(a, b) for a in score[positive] for b in score[~positive]]
    assert auroc(positive, score) == pytest.approx(sum((a > b) + (a == b) / 2 for a, b in pairs) / len(pairs))
    assert np.isnan(auroc(np.ones(3, dtype=bool), np.arange(3)))


def test_recall_keeps_as_many_as_the_engine() -> None:
    positive = np.array([True, True, True, False, False, False, False, False, False, False])
    falling = -np.arange(10.0)
    assert recall(positive, falling, 0.60) == 1  # 4 of 10 stay
    assert recall(positive, falling, 0.80) == pytest.approx(2 / 3)
    assert recall(positive, -falling, 0.60) == 0
    assert np.isnan(recall(np.zeros(10, dtype=bool), falling, 0.60))


def test_interval_takes_samples_whole() -> None:
    """A thousand copies of two samples tell no more than the two."""
    values, samples = np.repeat([0.0, 1.0], 1000), np.repeat([3, 8], 1000)
    assert interval(values, samples) == (0.0, 1.0)
    low, high = interval(values, np.arange(2000))
    assert 0.45 < low < 0.5 < high < 0.55


def test_a_score_that_is_the_ink_is_perfect_and_its_reverse_the_opposite() -> None:
    ink = np.array([0.0, 0.9, 0.0, 0.3, 0.05, 0.5, 0.0, 0.2])
    view = View("x", 0, ink, {"mask": ink, "reverse": -ink, "constant": np.ones(8)})
    assert judge(view, "mask") == {"spearman": pytest.approx(1), "auroc": 1, "recall_60": 0.75, "recall_75": 0.5}
    assert judge(view, "reverse")["spearman"] == pytest.approx(-1)
    assert judge(view, "reverse")["auroc"] == 0
    assert judge(view, "constant")["spearman"] == 0
    assert judge(view, "constant")["auroc"] == 0.5


def test_views_without_truth_do_not_count() -> None:
    blank, inked = np.zeros(4), np.array([0.0, 0.5, 0.0, 0.0])
    views = [View("x", i, ink, {"mask": inked}) for i, ink in enumerate((blank, inked))]
    figures = summarise(views)["x"]
    assert figures["views"] == 2
    assert figures["scores"]["mask"]["spearman"] == {"mean": pytest.approx(1), "low": 1, "high": 1, "views": 1}
    with pytest.raises(ValueError, match="expected a view with ink"):
        summarise(views[:1])


# Truth


@pytest.mark.parametrize("kind", KINDS)
def test_ink_is_laid_out_as_the_model_cuts_its_tiles(student: tuple[Any, Path], kind: str) -> None:
    """Where a patch has much ink, the pixels the tower is given vary; where it has none, only by noise."""
    model, _ = student
    sample = make(kind, TEST[1], **({"frames": 5} if kind == "clip" else {"width": 192, "height": 128}))
    views = views_of(model, scorer_of(model), sample, 0)
    single = [view for view in views if len(view.ink) == (64 // PATCH) ** 2]
    assert len(single) == (5 if kind == "clip" else 1 + 6)
    for view in single:
        if view.covered.any():
            assert judge(view, VARIANCE)["auroc"] > 0.9
    if kind != "clip":
        whole = patch_labels(sample, PATCH)["row"] > 0
        tiles = np.stack([view.covered for view in single[1:]]).reshape(2, 3, 8, 8).swapaxes(1, 2).reshape(16, 24)
        assert (tiles >= whole[0]).all()  # labels want a sixteenth from one thing, not from all together
        assert (tiles != whole[0]).mean() < 0.05


def test_all_together_is_what_the_engine_ranks(student: tuple[Any, Path]) -> None:
    model, _ = student
    sample = make("scene", TEST[0])
    together = next(v for v in views_of(model, scorer_of(model), sample, 0) if v.name == "scene, all together")
    inputs = model.preprocess(_frames(sample))
    tokens = model.encode(inputs)
    ranked = ~tokens.token_map.structural
    assert sorted(together.scores[SALIENCY].tolist()) == sorted(tokens.saliency[ranked].double().tolist())


def test_pooled_tokens_are_what_the_engine_ranks(student: tuple[Any, Path]) -> None:
    model, _ = student
    sample = make("clip", TEST[0], frames=4)
    pooled = [v for v in views_of(model, scorer_of(model), sample, 0) if v.name == "clip, pooled tokens"]
    tokens = model.encode(model.preprocess(_frames(sample)))
    got = np.concatenate([view.scores[SALIENCY] for view in pooled])
    assert np.allclose(got, tokens.saliency.numpy(), rtol=1e-5)
    assert np.mean([v.ink.mean() for v in pooled]) == pytest.approx((sample.mask > 0).mean())


def test_pictures_that_do_not_fill_their_tiles_are_refused(student: tuple[Any, Path]) -> None:
    model, _ = student
    with pytest.raises(ValueError, match="expected 2 tiles of 64"):
        views_of(model, scorer_of(model), make("scene", TEST[0], width=64, height=64), 0)


# Towers


def planted_tower() -> ClipTower:
    """One layer whose summary row prefers bright patches and whose other rows prefer dark ones."""
    config = ClipConfig(
        hidden_size=4, intermediate_size=6, num_layers=2, num_heads=1, image_size=64, patch_size=PATCH,
        hidden_act="gelu", layer_norm_eps=1e-5,
    )  # fmt: skip
    tower = ClipTower(config, -2)
    tower.requires_grad_(False)
    for name, parameter in tower.named_parameters():
        parameter.fill_(1 if "norm" in name and name.endswith("weight") else 0)
    # Channels: brightness and its negative, then a sign that tells the summary token from patches, and its negative.
    tower.embeddings.patch_embedding.weight[0] = 1 / (3 * PATCH**2)
    tower.embeddings.patch_embedding.weight[1] = -1 / (3 * PATCH**2)
    tower.embeddings.position_embedding.weight[:, 2:] = torch.tensor([-2.0, 2.0])
    tower.embeddings.position_embedding.weight[0, 2:] = torch.tensor([2.0, -2.0])
    qkv = tower.encoder.layers[0].self_attn.qkv_proj.weight  # (3 * 4, 4)
    qkv[0, 2] = 1  # q: the sign
    qkv[4, 0] = 1  # k: the brightness
    return tower


def test_saliency_is_the_summary_row_and_the_column_mean_all_rows() -> None:
    ink = np.random.default_rng(0).random(64)
    bright = torch.from_numpy(ink).float().reshape(1, 1, 8, 8)
    pixels = torch.nn.functional.interpolate(bright, scale_factor=PATCH).expand(1, 3, 64, 64)
    scores = attention_scores(planted_tower(), pixels)
    assert spearman(ink, scores[SALIENCY][0].numpy()) == pytest.approx(1)
    assert spearman(ink, scores[COLUMNS][0].numpy()) == pytest.approx(-1)


def test_attention_is_that_of_the_last_layer_that_is_run(student: tuple[Any, Path]) -> None:
    tower = student[0].vision_tower
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    scores = attention_scores(tower, pixels)
    assert torch.equal(scores[SALIENCY], tower(pixels)[1])
    x = tower.pre_layrnorm(tower.embeddings(pixels))
    *before, last = tower.encoder.layers
    for layer in before:
        x, _ = layer(x, score=False)
    q, k, _ = last.self_attn.qkv_proj(last.layer_norm1(x)).chunk(3, dim=-1)
    q, k = (part.unflatten(2, (last.self_attn.num_heads, -1)).transpose(1, 2) for part in (q, k))
    assert torch.allclose(scores[SALIENCY], saliency_ref(q[:, :, :1], k)[:, 1:].float(), rtol=1e-4)
    assert torch.allclose(scores[COLUMNS], saliency_ref(q, k)[:, 1:].float(), rtol=1e-4)
    assert not last.self_attn.qkv_proj._forward_hooks


def test_pixel_variance_of_a_patch() -> None:
    pixels = torch.rand(1, 3, 16, 16, dtype=torch.float64)
    lower_left = pixels[0, :, 8:, :8].flatten(1)
    assert pixel_variance(pixels, PATCH)[0, 2] == pytest.approx(float(lower_left.var(1, correction=0).mean()))


@pytest.mark.parametrize(("sign", "expected"), [(1, 1.0), (-1, 0.0)])
def test_a_planted_score_on_real_samples(student: tuple[Any, Path], sign: int, expected: float) -> None:
    """A tower that sees the truth is perfect in every view; chance is chance; nothing passes the best possible."""
    model, _ = student
    samples = iter([make(kind, seed) for kind in KINDS for seed in TEST[:4]])

    def scorer(pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        ink = torch.from_numpy(ink_of_patches(next(samples), PATCH))
        return {SALIENCY: sign * ink, COLUMNS: ink * 0, VARIANCE: ink}

    table = measure(model, scorer, samples=4)
    assert len(table) == 8
    for row in table.values():
        planted, best, chance = (row["scores"][name] for name in (SALIENCY, BEST, RANDOM))
        assert planted["auroc"]["mean"] == pytest.approx(expected)
        assert planted["spearman"]["mean"] == pytest.approx(sign)
        assert best["auroc"]["mean"] == 1
        assert abs(chance["spearman"]["mean"]) < 0.2
        assert planted["recall_60"]["mean"] <= best["recall_60"]["mean"] + 1e-9


def test_the_command_reports_a_random_student(student: tuple[Any, Path], tmp_path: Path) -> None:
    out = tmp_path / "saliency.json"
    script = ROOT / "benchmarks" / "world" / "saliency.py"
    options = ["--model", str(student[1]), "--out", str(out), "--samples", "2", "--threads", "1"]
    done = subprocess.run([sys.executable, str(script), *options], capture_output=True, text=True, check=True)
    result = json.loads(out.read_text())
    assert result["environment"]["commit"]
    assert len(result["model_sha256"]) == 64
    figure = result["figures"]["clip, frames"]["scores"][SALIENCY]["spearman"]
    assert figure["low"] <= figure["mean"] <= figure["high"]
    assert f"{figure['mean']:.2f} [{figure['low']:.2f}, {figure['high']:.2f}]" in done.stdout
    assert done.stdout.count("| scene, base view |") == 5


def _frames(sample: Any) -> Any:
    from sparsevila.models.interface import Frames

    kind = "video" if sample.kind == "clip" else "image"
    return Frames(kind, sample.rgb, np.arange(len(sample.rgb), dtype=float), "<world>", 0.0, "key")
