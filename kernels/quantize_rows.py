"""Symmetric int8 codes of activations, one scale per row, made while running.

    scale[m] = max_k |x[m, k]| / 127          codes[m, k] = round(x[m, k] / scale[m]), ties to even

Source: SmoothQuant, arXiv 2211.10438, section 3 (per-token dynamic quantisation). Sizes: M tokens, K inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LARGEST = 127  # -128 stays unused: the range is symmetric


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (M, K) float32, bfloat16 or float16 -> codes (M, K) int8 within -127..127, scales (M,) float32.

    A row of zeros (or of values too small for a float32 scale) gets codes 0 and scale 1. A row that holds a NaN or an
    infinity gets a scale that is one too, so that it shows in every product.
    """
    _check(x)
    wide = x.float()
    scales = _safe(wide.abs().amax(dim=1) / _LARGEST)
    codes = (wide / scales[:, None]).round_().clamp_(-_LARGEST, _LARGEST)
    # Casting what is no number to an integer is undefined; the scale carries it.
    return codes.nan_to_num_(0.0).to(torch.int8), scales


def quantize_rows_ref(x: Tensor) -> tuple[Tensor, Tensor]:
    """The definition: scales rounded to float32, quotients in float64."""
    _check(x)
    wide = x.double()
    scales = _safe((wide.abs().amax(dim=1) / _LARGEST).float())
    return (wide / scales.double()[:, None]).round().clamp(-_LARGEST, _LARGEST).to(torch.int8), scales


def _check(x: Tensor) -> None:
    if x.ndim != 2 or x.shape[1] < 1 or not x.is_floating_point():
        raise ValueError(f"expected x (M, K) of floats with K at least 1, got {tuple(x.shape)} {x.dtype}")


def _safe(scales: Tensor) -> Tensor:
    return torch.where(scales == 0, torch.ones_like(scales), scales)
