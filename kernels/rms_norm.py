"""Root-mean-square normalisation.

    y[m, d] = x[m, d] / sqrt(mean_d(x[m, :]^2) + eps) * weight[d]

Source: Zhang and Sennrich, arXiv 1910.07467. Sizes: M tokens, D hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backend import machine_code, runs_triton


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalises the last dimension.

    x (..., D) float32, bfloat16 or float16; weight (D,) of any of these. Computed in float32, returned in x's dtype.
    Raises ValueError if D differs.
    """
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"expected weight ({x.shape[-1]},), got {tuple(weight.shape)}")
    if runs_triton(x):
        from .gpu.rms_norm import rms_norm as by_kernel

        return by_kernel(x.reshape(-1, x.shape[-1]).contiguous(), weight, eps)[1].reshape(x.shape)
    if level := machine_code(x, weight):
        from .cpu.rms_norm import rms_norm as by_row

        rows = x.reshape(-1, x.shape[-1]).contiguous()
        return by_row(rows, weight.contiguous(), eps, None, level)[1].reshape(x.shape)
    # The order of the two casts is that of Llama: round the normalised value, then scale.
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


def rms_norm_ref(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The definition in float64."""
    wide = x.double()
    return wide / torch.sqrt((wide * wide).mean(-1, keepdim=True) + eps) * weight.double()
