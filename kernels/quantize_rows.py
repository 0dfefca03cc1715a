"""Symmetric int8 codes of activations, one scale per row, made while running.

    scale[m] = max_k |x[m, k]| / 127          codes[m, k] = round(x[m, k] / scale[m]), ties to even

of x as it is, or normalised before (and rounded to x's dtype, as the norm by itself would).
Source: SmoothQuant, arXiv 2211.10438, section 3 (per-token dynamic quantisation). Sizes: M tokens, K inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .backend import runs_triton
from .rms_norm import rms_norm, rms_norm_ref

_LARGEST = 127  # -128 stays unused: the range is symmetric
_SMALLEST, _BIGGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max  # of scales with all their bits
_STEP_ENTRIES = 1 << 17  # that many are float32 at a time, so that the passes over them meet in the L2 cache
# Integers as wide as a float, and what leaves its sign out: without it, floats are ordered as their bits are.
_MAGNITUDE = {2: (torch.int16, 0x7FFF), 4: (torch.int32, 0x7FFFFFFF)}


@dataclass(frozen=True, eq=False)
class RowNorm:
    """A normalisation of rows: LayerNorm, or RMSNorm where there is no bias."""

    weight: Tensor  # (K,)
    bias: Tensor | None  # (K,)
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        if self.bias is None:
            return rms_norm(x, self.weight, self.eps)
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


def quantize_rows(x: Tensor, norm: RowNorm | None = None, *, width: int = 0) -> tuple[Tensor, Tensor]:
    """x (M, K) float32, bfloat16 or float16 -> codes (M, K) int8 within -127..127, scales (M,) float32.

    With a larger `width` the codes are (M, width), 0 behind column K. A row of zeros (or of values too small for a
    float32 scale) gets codes 0 and scale 1. A row that holds a NaN or an infinity gets a scale that is one too, so that
    it shows in every product.
    """
    _check(x)
    width = max(width, x.shape[1])
    if runs_triton(x):
        from .gpu.quantize_rows import quantize_rows as by_kernel

        kind = "" if norm is None else "rms" if norm.bias is None else "layer"
        weight, bias, eps = (None, None, 0.0) if norm is None else (norm.weight, norm.bias, norm.eps)
        return by_kernel(x.contiguous(), kind, weight, bias, eps, width=width)
    if norm is not None:
        x = norm(x)
    scales = _safe(_largest(x) / _LARGEST)
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    step = max(1, _STEP_ENTRIES // x.shape[1]) if x.device.type == "cpu" else max(1, x.shape[0])
    # Elsewhere the question would make the host wait for the device.
    harmless = x.device.type == "cpu" and bool(((scales >= _SMALLEST) & (scales <= _BIGGEST)).all())
    wide = torch.empty(min(step, x.shape[0]), x.shape[1], device=x.device)
    for row in range(0, x.shape[0], step):
        part = x[row : row + step]
        quotient = wide[: part.shape[0]].copy_(part).div_(scales[row : row + step, None]).round_()
        if not harmless:
            # A subnormal scale is coarse. Casting what is no number to an integer is undefined; the scale carries it.
            quotient.clamp_(-_LARGEST, _LARGEST).nan_to_num_(0.0)
        codes[row : row + step].copy_(quotient)
    return codes if width == x.shape[1] else F.pad(codes, (0, width - x.shape[1])), scales


def quantize_rows_ref(x: Tensor, norm: RowNorm | None = None, *, width: int = 0) -> tuple[Tensor, Tensor]:
    """The definition: scales rounded to float32, the rest in float64 (what is normalised rounded to x's dtype)."""
    _check(x)
    wide = x.double()
    if norm is not None and norm.bias is None:
        wide = rms_norm_ref(x, norm.weight, norm.eps).to(x.dtype).double()
    elif norm is not None:
        wide = F.layer_norm(wide, norm.weight.shape, norm.weight.double(), norm.bias.double(), norm.eps)  # type: ignore[union-attr]
        wide = wide.to(x.dtype).double()
    scales = _safe((wide.abs().amax(dim=1) / _LARGEST).float())
    codes = (wide / scales.double()[:, None]).round().clamp(-_LARGEST, _LARGEST).to(torch.int8)
    return F.pad(codes, (0, max(0, width - x.shape[1]))), scales


def _check(x: Tensor) -> None:
    if x.ndim != 2 or x.shape[1] < 1 or not x.is_floating_point():
        raise ValueError(f"expected x (M, K) of floats with K at least 1, got {tuple(x.shape)} {x.dtype}")


def _largest(x: Tensor) -> Tensor:
    """(M,) float32: the largest magnitude of each row, a NaN where there is one."""
    if x.element_size() not in _MAGNITUDE:
        return x.abs().amax(dim=1).float()
    integer, mask = _MAGNITUDE[x.element_size()]
    return (x.view(integer) & mask).amax(dim=1).view(x.dtype).float()


def _safe(scales: Tensor) -> Tensor:
    return torch.where(scales == 0, torch.ones_like(scales), scales)
