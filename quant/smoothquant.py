"""SmoothQuant: 8-bit weights and activations of one product, outliers moved from the latter to the former.

    y = (x / s) (s * w)^T      s_k = max|x_k|^alpha / max|w_k|^(1 - alpha)           arXiv 2211.10438, equations 3 and 4

Weights have a scale for each output row, fixed; activations one for each token, found while running. The scales s are
folded into what makes x (`awq.fold_scales`): a LayerNorm's weight and bias, an RMSNorm's weight, the rows of a v_proj
for the layer behind attention. The layer behind a GELU (fc2) stays unsmoothed: nothing before it is linear.
Sizes: N outputs, K inputs, R sampled rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .awq import HeadGroups, round_up
from .calibration import ChannelStats, Progress, SearchRecord, check_finite
from .linear import Linear
from .scheme import Int8Weight

STEPS = 20  # of alpha over 0..1
FLOOR = 1e-5
ROWS_AT_A_TIME = 2048  # output rows of a weight that a search holds in float32


def quantise_int8(weight: Tensor, *, scale_dtype: torch.dtype = torch.float32, name: str = "weight") -> Int8Weight:
    """Rounds weight (N, K) to -127..127 with scale = max|w| / 127 for each row, rounded up to `scale_dtype`.

    A row of zeros has scale 1. Raises ValueError with `name` for a weight that is not finite or not a matrix, and for a
    scale that `scale_dtype` cannot hold.
    """
    if weight.ndim != 2 or not weight.numel() or not weight.is_floating_point():
        raise ValueError(f"{name}: expected a matrix (N, K) of floats, got {tuple(weight.shape)} {weight.dtype}")
    if scale_dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"{name}: expected scales in float16, bfloat16 or float32, got {scale_dtype}")
    check_finite(weight, name)
    codes, scales = _round_rows(weight.detach().float(), scale_dtype)
    if not bool(scales.isfinite().all()):
        raise ValueError(f"{name}: weights up to {float(weight.abs().max()):.3g} need scales above {scale_dtype}")
    return Int8Weight(codes.to(torch.int8), scales)


def _round_rows(rows: Tensor, scale_dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """rows (M, K) float32 -> codes (M, K) float32 of -127..127 and scales (M,)."""
    scale = rows.abs().amax(dim=1) / 127
    scales = round_up(torch.where(scale == 0, 1.0, scale), scale_dtype)
    return (rows / scales.float()[:, None]).round().clamp(-127, 127), scales


def _rounded_rows(rows: Tensor) -> Tensor:
    """rows (M, K) float32 -> what their int8 codes stand for."""
    codes, scales = _round_rows(rows)
    return codes * scales[:, None]


def smoothing_scales(max_abs: Tensor, weight_max: Tensor, alpha: float) -> Tensor:
    """s = max|x|^alpha / max|w|^(1 - alpha), everything floored at 1e-5 as in the authors' code; (K,) float32.

    A channel that was zero in every input gets 1: nothing is known about it, and the floor would blow it up.
    """
    s = max_abs.clamp(min=FLOOR).pow(alpha) / weight_max.clamp(min=FLOOR).pow(1 - alpha)
    return torch.where(max_abs > 0, s.clamp(min=FLOOR), 1.0)


def search_smoothing(
    layers: Sequence[Linear],
    stats: ChannelStats,
    *,
    heads: HeadGroups | None = None,
    progress: Progress | None = None,
) -> tuple[Tensor, SearchRecord]:
    """The scales (K,) float32 of the input that `layers` share with the least output error in 8 bits on `stats.rows`.

    The error is that of int8 by int8 products (activations per token, weights per row) against float32 ones. alpha is
    0, 0.05, ..., 1; no smoothing at all is tried first and wins ties, so the result is never worse on the sample.
    `heads` for a layer behind attention. Does not change the layers: see `awq.fold_scales`. Deterministic.
    """
    K = stats.rows.shape[1]
    if not layers or any(layer.weight.shape[1] != K for layer in layers):
        found = [layer.weight.shape[1] for layer in layers]
        raise ValueError(f"{stats.name}: expected layers of {K} inputs, got {found}")
    for layer in layers:
        check_finite(layer.weight, stats.name)
    weight_max = torch.stack([layer.weight.detach().abs().amax(dim=0).float().cpu() for layer in layers]).amax(dim=0)
    best = torch.ones(K)
    plain = smoothed_error(layers, stats, best)
    record = SearchRecord(stats.name, "plain", None, plain, plain)
    for step in range(STEPS + 1):
        s = smoothing_scales(stats.max_abs, weight_max, step / STEPS)
        s = heads.share(s) if heads is not None else s
        error = smoothed_error(layers, stats, s)
        if error < record.error_after:
            best, record = s, SearchRecord(stats.name, "smoothed", step / STEPS, plain, error)
        if progress is not None:
            progress(step + 1, STEPS + 1)
    return best, record


def smoothed_error(layers: Sequence[Linear], stats: ChannelStats, scales: Tensor) -> float:
    """Mean squared error of the layers' outputs on `stats.rows` in 8 bits, smoothed by `scales` (K,)."""
    device = layers[0].weight.device
    rows, s = stats.rows.to(device), scales.to(device)
    codes_x = _rounded_rows(rows / s)  # (R, K)
    total, outputs = 0.0, 0
    for layer in layers:
        for part in torch.split(layer.weight.detach(), ROWS_AT_A_TIME):
            weight = part.float()
            off = codes_x @ _rounded_rows(weight * s).t() - rows @ weight.t()
            total += float(off.square().sum(dtype=torch.float64))
        outputs += layer.out_features
    return total / (outputs * len(rows))
