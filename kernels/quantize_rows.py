"""Symmetric int8 codes of activations, one scale per row, made while running.

    scale[m] = max_k |x[m, k]| / 127          codes[m, k] = round(x[m, k] / scale[m]), ties to even

Source: SmoothQuant, arXiv 2211.10438, section 3 (per-token dynamic quantisation). Sizes: M tokens, K inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backend import runs_triton

_LARGEST = 127  # -128 stays unused: the range is symmetric
_SMALLEST, _BIGGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max  # of scales with all their bits
_STEP_ENTRIES = 1 << 17  # that many are float32 at a time, so that the passes over them meet in the L2 cache
# Integers as wide as a float, and what leaves its sign out: without it, floats are ordered as their bits are.
_MAGNITUDE = {2: (torch.int16, 0x7FFF), 4: (torch.int32, 0x7FFFFFFF)}


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (M, K) float32, bfloat16 or float16 -> codes (M, K) int8 within -127..127, scales (M,) float32.

    A row of zeros (or of values too small for a float32 scale) gets codes 0 and scale 1. A row that holds a NaN or an
    infinity gets a scale that is one too, so that it shows in every product.
    """
    _check(x)
    if runs_triton(x):
        from .gpu.quantize_rows import quantize_rows as by_kernel

        return by_kernel(x.contiguous())
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
    return codes, scales


def quantize_rows_ref(x: Tensor) -> tuple[Tensor, Tensor]:
    """The definition: scales rounded to float32, quotients in float64."""
    _check(x)
    wide = x.double()
    scales = _safe((wide.abs().amax(dim=1) / _LARGEST).float())
    return (wide / scales.double()[:, None]).round().clamp(-_LARGEST, _LARGEST).to(torch.int8), scales


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
