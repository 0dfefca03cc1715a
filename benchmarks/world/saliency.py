"""How well the tower's saliency ranks what carries something: patches with ink on them before empty background.

    python benchmarks/world/saliency.py --model FOLDER --out JSON [--samples 300] > docs/demo-model/saliency.md

Saliency is what the engine prunes by: the summary token's row of attention in the last layer that is run, mean over
heads. Beside it stand the column mean (all rows of the same layer, what encoders without a summary token use), the
variance of a patch's pixels, chance, and the best that any ranking could reach. Truth is the share of a patch that the
ink of things covers. Samples are held-out ones; intervals are 95 % bootstrap intervals over samples.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from environment import describe
from world.labels import COVER_SHARE, coverage
from world.sample import TILE, Sample
from world.splits import KINDS, TEST, make

from sparsevila.engine.engine import Engine
from sparsevila.engine.sparsity.base import keep_count
from sparsevila.kernels.saliency import saliency
from sparsevila.kernels.top_k import top_k
from sparsevila.models.clip import ClipTower
from sparsevila.models.interface import Frames, MediaKind
from sparsevila.models.llava_next import LlavaNext

SALIENCY, COLUMNS, VARIANCE, RANDOM, BEST = "saliency", "column mean", "pixel variance", "random", "best possible"
SCORES = (SALIENCY, COLUMNS, VARIANCE, RANDOM, BEST)
SPARSITIES = (0.60, 0.75)  # the defaults' prefill sparsities, fractions removed
FIGURES = {
    "spearman": "Spearman correlation with the share of ink",
    "auroc": "AUROC, patches with ink against background",
    "recall_60": "Recall at sparsity 60 %: share of the patches with ink that stay when 40 % of all stay",
    "recall_75": "Recall at sparsity 75 %: share of the patches with ink that stay when 25 % of all stay",
}
DRAWS = 2000  # of the bootstrap

Scorer = Callable[[Tensor], dict[str, Tensor]]  # pixels (tiles, 3, S, S) -> by name, (tiles, patches)


@dataclass(frozen=True)
class View:
    """Patches that are ranked against each other."""

    name: str
    sample: int
    ink: np.ndarray  # (n,) float64, share of each patch that is covered
    scores: dict[str, np.ndarray]  # each (n,) float64

    @property
    def covered(self) -> np.ndarray:
        """(n,) bool: at least the share of ink from which on a patch has labels in training."""
        return self.ink * COVER_SHARE >= 1


# What is ranked


def attention_scores(tower: ClipTower, pixels: Tensor) -> dict[str, Tensor]:
    """pixels (tiles, 3, S, S) -> saliency and column mean of every patch, (tiles, patches) float32, by one pass."""
    attention: Any = tower.encoder.layers[-1].self_attn
    caught: list[Tensor] = []
    hook = attention.qkv_proj.register_forward_hook(lambda module, inputs, output: caught.append(output))
    try:
        _, summary = tower(pixels)
    finally:
        hook.remove()
    (qkv,) = caught  # (tiles, 1 + patches, 3 * hidden)
    q, k, _ = qkv.unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (tiles, heads, S, head_dim)
    return {SALIENCY: summary, COLUMNS: saliency(q, k)[:, 1:]}


def pixel_variance(pixels: Tensor, patch: int) -> Tensor:
    """pixels (tiles, 3, S, S) -> variance over the pixels of each patch, mean over the channels, (tiles, patches)."""
    cells = F.unfold(pixels, patch, stride=patch).unflatten(1, (3, -1))  # (tiles, 3, pixels of a patch, patches)
    return cells.var(dim=2, correction=0).mean(dim=1)


def scorer_of(model: LlavaNext) -> Scorer:
    """All scores that need a model or pixels."""
    patch = model.config.vision.patch_size

    def scores(pixels: Tensor) -> dict[str, Tensor]:
        return {**attention_scores(model.vision_tower, pixels), VARIANCE: pixel_variance(pixels, patch)}

    return scores


# What is true


def ink_of_patches(sample: Sample, patch: int) -> np.ndarray:
    """Share of ink of each patch of each tile as the model cuts them, (tiles, patches) float64.

    Of a clip its frames; of a picture the base view, which shows all of it in one tile, and then the tiles.
    """
    grid = TILE // patch
    ink = ink_share(sample, (patch, patch))  # (frames, rows, columns)
    frames, rows, columns = ink.shape
    tiles = ink.reshape(frames, rows // grid, grid, columns // grid, grid).swapaxes(2, 3).reshape(-1, grid * grid)
    if sample.kind == "clip":
        return tiles
    _, height, width = sample.mask.shape
    base = ink_share(sample, (height // grid, width // grid)).reshape(1, -1)
    return np.concatenate([base, tiles])


def ink_share(sample: Sample, cell: tuple[int, int]) -> np.ndarray:
    """Share of each cell of `cell` pixels (height, width) that is ink, (frames, rows, columns) float64."""
    counts = coverage(sample, cell)
    return 1 - counts[..., 0] / counts.sum(-1)


# Views


def views_of(model: LlavaNext, scorer: Scorer, sample: Sample, number: int) -> list[View]:
    """Each tile or frame by itself, and what the engine ranks together: all tiles of a picture, a frame's pooled
    tokens. Raises ValueError if the model does not cut the sample into whole tiles."""
    kind: MediaKind = "video" if sample.kind == "clip" else "image"
    times = np.arange(len(sample.rgb), dtype=float)
    inputs = model.preprocess(Frames(kind, sample.rgb, times, "<world>", 0.0, f"{kind} {sample.seed}"))
    ink = ink_of_patches(sample, model.config.vision.patch_size)
    if inputs.pixels.shape[0] != len(ink) or model.config.vision.image_size != TILE:
        got = f"{inputs.pixels.shape[0]} of {model.config.vision.image_size}"
        raise ValueError(f"{sample.kind} {sample.seed}: expected {len(ink)} tiles of {TILE} pixels, got {got}")
    with torch.inference_mode():
        scores = {name: score.double().numpy() for name, score in scorer(inputs.pixels).items()}
    dice = np.random.default_rng((sample.seed, number))
    tiles = [slice(i, i + 1) for i in range(len(ink))]
    if kind == "image":
        parts = [("base view", tiles[0]), *(("tiles", tile) for tile in tiles[1:]), ("all together", slice(None))]
    else:
        parts = [("frames", tile) for tile in tiles]
    views = [
        _view(f"{sample.kind}, {name}", number, ink[rows], {n: s[rows] for n, s in scores.items()}, dice)
        for name, rows in parts
    ]
    if kind == "video":
        ink, scores = _pooled(model, ink), {name: _pooled(model, score) for name, score in scores.items()}
        views += [
            _view("clip, pooled tokens", number, ink[tile], {n: s[tile] for n, s in scores.items()}, dice)
            for tile in tiles
        ]
    return views


def _view(name: str, sample: int, ink: np.ndarray, scores: dict[str, np.ndarray], dice: np.random.Generator) -> View:
    """The view of these patches, with the scores that depend on nothing but their number and their truth."""
    ink, scores = ink.ravel(), {name: score.ravel() for name, score in scores.items()}
    chance = dice.random(len(ink))
    # Truth has many ties, which no real score has: equal patches come in random order.
    best = np.empty(len(ink))
    best[np.lexsort((dice.random(len(ink)), ink))] = np.arange(len(ink))
    return View(name, sample, ink, {**scores, RANDOM: chance, BEST: best})


def _pooled(model: LlavaNext, values: np.ndarray) -> np.ndarray:
    """(frames, patches) -> (frames, tokens), as the engine pools saliency."""
    return model.pool(torch.from_numpy(values)[..., None])[..., 0].numpy()


# Figures


def average_ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation of two (n,) arrays; NaN if one of them is constant."""
    x, y = (ranks - ranks.mean() for ranks in (average_ranks(a), average_ranks(b)))
    norm = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / norm if norm > 0 else float("nan")


def auroc(positive: np.ndarray, score: np.ndarray) -> float:
    """How often a positive has the higher score than a negative, ties half; NaN if there are no such pairs."""
    n = int(positive.sum())
    pairs = n * (len(positive) - n)
    wins = average_ranks(score)[positive].sum() - n * (n + 1) / 2
    return float(wins) / pairs if pairs else float("nan")


def recall(positive: np.ndarray, score: np.ndarray, sparsity: float) -> float:
    """Share of the positives that stay when a fraction `sparsity` is removed as the engine does it; NaN if none are."""
    kept = top_k(torch.from_numpy(score)[None], keep_count(len(score), sparsity))[0].numpy()
    return float(positive[kept].sum() / positive.sum()) if positive.any() else float("nan")


def judge(view: View, score: str) -> dict[str, float]:
    """All figures of one score on one view; NaN where truth leaves a figure undefined."""
    given, covered = view.scores[score], view.covered
    correlation = spearman(view.ink, given)
    if np.ptp(given) == 0 and np.ptp(view.ink) > 0:
        correlation = 0.0  # a constant score ranks nothing
    recalls = {f"recall_{100 * s:.0f}": recall(covered, given, s) for s in SPARSITIES}
    return {"spearman": correlation, "auroc": auroc(covered, given), **recalls}


def interval(values: np.ndarray, samples: np.ndarray, draws: int = DRAWS) -> tuple[float, float]:
    """95 % bootstrap interval of the mean of `values` (n,). Views of one sample, `samples` (n,) int, go together."""
    _, owner = np.unique(samples, return_inverse=True)
    sums, counts = np.bincount(owner, weights=values), np.bincount(owner)
    drawn = np.random.default_rng(0).integers(len(sums), size=(draws, len(sums)))
    low, high = np.quantile(sums[drawn].sum(1) / counts[drawn].sum(1), (0.025, 0.975))
    return float(low), float(high)


def summarise(views: Sequence[View]) -> dict[str, Any]:
    """By view name: how much is covered, and each figure of each score as mean, low, high and number of views."""
    table: dict[str, Any] = {}
    for name in dict.fromkeys(view.name for view in views):
        chosen = [view for view in views if view.name == name]
        owners = np.array([view.sample for view in chosen])
        table[name] = {
            "views": len(chosen),
            "patches": len(chosen[0].ink),
            "covered": float(np.mean([view.covered.mean() for view in chosen])),
            "scores": {score: _means([judge(view, score) for view in chosen], owners) for score in chosen[0].scores},
        }
    return table


def _means(judged: list[dict[str, float]], owners: np.ndarray) -> dict[str, dict[str, float]]:
    found = {}
    for figure in judged[0]:
        values = np.array([each[figure] for each in judged])
        defined = ~np.isnan(values)
        if not defined.any():
            raise ValueError(f"{figure}: expected a view with ink and background, got {len(values)} without")
        low, high = interval(values[defined], owners[defined])
        found[figure] = {"mean": float(values[defined].mean()), "low": low, "high": high, "views": int(defined.sum())}
    return found


# Report


def markdown(table: dict[str, Any]) -> str:
    """One table per figure: views down, scores across. Correlations with their intervals."""
    lines = ["| what is ranked | patches | with ink |", "|---|---|---|"]
    lines += [f"| {name} | {row['patches']} | {row['covered']:.0%} |" for name, row in table.items()]
    for figure, title in FIGURES.items():
        lines += ["", f"**{title}**", "", f"| | {' | '.join(SCORES)} |", "|---" * (1 + len(SCORES)) + "|"]
        for name, row in table.items():
            cells = [_cell(row["scores"][score][figure], with_interval=figure == "spearman") for score in SCORES]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(value: dict[str, float], *, with_interval: bool) -> str:
    mean = f"{value['mean']:.2f}"
    return f"{mean} [{value['low']:.2f}, {value['high']:.2f}]" if with_interval else mean


def measure(model: LlavaNext, scorer: Scorer, samples: int) -> dict[str, Any]:
    """The summary over the first `samples` test samples of each kind."""
    return summarise(
        [
            view
            for kind in KINDS
            for number, seed in enumerate(TEST[:samples])
            for view in views_of(model, scorer, make(kind, seed), number)
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="How well saliency ranks patches that carry something.")
    parser.add_argument("--model", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--out", type=Path, required=True, metavar="JSON")
    parser.add_argument("--samples", type=int, default=300, help="of each kind")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    if args.samples < 1:
        parser.error(f"--samples: expected at least 1, got {args.samples}")
    if args.threads:
        torch.set_num_threads(args.threads)
    checksum = hashlib.sha256((args.model / "model.safetensors").read_bytes()).hexdigest()
    with Engine.load(args.model, device="cpu", dtype="float32") as engine:
        model = engine.model
        if not isinstance(model, LlavaNext):
            raise SystemExit(f"{args.model}: expected a LLaVA-NeXT model, got {engine.info.architecture}")
        table = measure(model, scorer_of(model), args.samples)
    environment = describe()
    result = {"environment": environment, "model_sha256": checksum, "samples": args.samples, "figures": table}
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(
        f"`{environment['command']}`: {args.samples} test samples of each kind, model {checksum[:12]}. "
        f"In brackets 95 % bootstrap intervals over samples.\n\n{markdown(table)}"
    )


if __name__ == "__main__":
    main()
