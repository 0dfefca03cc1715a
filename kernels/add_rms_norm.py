"""Root-mean-square normalisation of a residual stream and what a branch adds to it.

    total[m] = x[m] + added[m]        y[m] = rms_norm(total[m])

One pass in place of two. Source: `rms_norm`. Sizes: M tokens, D hidden size.
"""

from __future__ import annotations

from torch import Tensor

from .backend import machine_code, runs_triton
from .rms_norm import rms_norm, rms_norm_ref


def add_rms_norm(x: Tensor, added: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x and added (M, D) of one dtype, weight (D,) -> total and its norm, both (M, D) in that dtype.

    The sum is rounded before it is normalised. Raises ValueError if shapes disagree.
    """
    if x.ndim != 2 or added.shape != x.shape or weight.shape != x.shape[-1:]:
        raise ValueError(
            f"expected x and added (M, D) and weight (D,), "
            f"got {tuple(x.shape)}, {tuple(added.shape)} and {tuple(weight.shape)}"
        )
    if runs_triton(x):
        from .gpu.rms_norm import rms_norm as by_kernel

        return by_kernel(x.contiguous(), weight, eps, added.contiguous())
    if level := machine_code(x, added, weight):
        from .cpu.rms_norm import rms_norm as by_row

        return by_row(x.contiguous(), weight.contiguous(), eps, added.contiguous(), level)
    total = x + added
    return total, rms_norm(total, weight, eps)


def add_rms_norm_ref(x: Tensor, added: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The definition in float64."""
    total = x.double() + added.double()
    return total, rms_norm_ref(total, weight, eps)
