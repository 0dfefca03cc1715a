"""The gate of a gated MLP.

    y[m, f] = silu(x[m, f]) * x[m, F + f]        silu(a) = a / (1 + exp(-a))

Source: Shazeer, arXiv 2002.05202 (SwiGLU). Sizes: M tokens, F entries of each half.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .backend import machine_code, runs_triton


def silu_mul(x: Tensor) -> Tensor:
    """x (..., 2 F) float32, bfloat16 or float16, the gate before what it multiplies -> (..., F) in its dtype.

    Raises ValueError for an odd size.
    """
    if x.shape[-1] % 2:
        raise ValueError(f"expected (..., 2 F), got {tuple(x.shape)}")
    if runs_triton(x):
        from .gpu.silu_mul import silu_mul as by_kernel

        return by_kernel(x.reshape(-1, x.shape[-1]).contiguous()).reshape(*x.shape[:-1], -1)
    if level := machine_code(x):
        from .cpu.silu_mul import silu_mul as by_row

        return by_row(x.reshape(-1, x.shape[-1]).contiguous(), level).reshape(*x.shape[:-1], x.shape[-1] // 2)
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def silu_mul_ref(x: Tensor) -> Tensor:
    """The definition in float64."""
    gate, up = x.double().chunk(2, dim=-1)
    return gate / (1 + torch.exp(-gate)) * up
