"""Rotary position embedding in the "rotate half" pairing of Llama.

    pair d of D/2:  (x[d], x[d + D/2])  is turned by the angle  position * frequency[d]

Source: Su et al., arXiv 2104.09864. Sizes: H heads, M tokens, D head dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates every head of every token by its position.

    x (H, M, D); cos, sin (M, D/2) in x's dtype. Returns (H, M, D) in x's dtype.
    Raises ValueError if the shapes disagree.
    """
    half = x.shape[-1] // 2
    if cos.shape != (x.shape[1], half) or sin.shape != cos.shape:
        raise ValueError(f"expected cos and sin ({x.shape[1]}, {half}), got {tuple(cos.shape)} and {tuple(sin.shape)}")
    first, second = x[..., :half], x[..., half:]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def rope_ref(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The definition in float64, as a product of complex numbers."""
    half = x.shape[-1] // 2
    pairs = torch.complex(x[..., :half].double(), x[..., half:].double())
    turned = pairs * torch.complex(cos.double(), sin.double())
    return torch.cat((turned.real, turned.imag), dim=-1)
