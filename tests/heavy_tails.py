"""Layers and inputs with outlier channels, on which quantisation with and without a search differ."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsevila.quant.linear import Linear


def linear(N: int | dict[str, int], K: int, *, bias: bool = False, seed: int = 0) -> Linear:
    rng = torch.Generator().manual_seed(seed)
    layer = Linear(K, N, bias=bias)
    layer.weight.copy_(torch.randn(layer.weight.shape, generator=rng) * 0.05)
    if layer.bias is not None:
        layer.bias.copy_(torch.randn(layer.bias.shape, generator=rng))
    return layer


def heavy_tailed(M: int, K: int, *, num_outliers: int = 4, factor: float = 50.0, seed: int = 0) -> Tensor:
    """Rows (M, K) with a few channels that are `factor` times larger."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(M, K, generator=rng)
    x[:, torch.randperm(K, generator=rng)[:num_outliers]] *= factor
    return x


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())
