"""Prefill that weighs how salient a token is against how much it is like one that stays already.

Greedy, by maximal marginal relevance: the most salient token comes first, then again and again the one with the most

    (1 - weight) * relevance[i] - weight * max_{j stays} cos(features[i], features[j])

Relevance is a token's rank by saliency, from 1 for the most salient down to 0: attention is heavy-tailed, and beside a
few tokens that get most of it all others would look alike. Weight 0 is top-k; weight 1 spreads the set out as far as it
goes. Ties go to the lower index.
Source: Carbonell and Goldstein, SIGIR 1998; for visual tokens the aim is that of DivPrune (arXiv 2503.02175) and
CDPruner (arXiv 2506.10967).
Sizes: G groups, n tokens in each, D features, k that stay.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_PRODUCTS_AT_ONCE = 1 << 26  # floats: 256 MB, or 8,192 tokens of one group


def diverse(saliency: Tensor, features: Tensor, k: int, weight: float) -> Tensor:
    """Which tokens of each group stay: (G, k) int64 on the CPU, ascending.

    saliency (G, n) float32; features (G, n, D) of any float dtype, on the device that does the work; 1 <= k <= n;
    weight 0 to 1. Takes n k products of features a group, in one matrix product where that fits.
    """
    features = F.normalize(features.float(), dim=-1)
    groups, n, _ = features.shape
    value = (1 - weight) * _relevance(saliency).to(features.device)
    nearest = torch.full_like(value, -torch.inf)
    taken = torch.zeros_like(value, dtype=torch.bool)
    rows = torch.arange(groups, device=features.device)
    products = features @ features.transpose(1, 2) if groups * n * n <= _PRODUCTS_AT_ONCE else None
    chosen = saliency.argmax(dim=1).to(features.device)
    for step in range(k):
        if step:
            chosen = (value - weight * nearest).masked_fill(taken, -torch.inf).argmax(dim=1)
        taken[rows, chosen] = True
        own = features[rows, chosen][..., None]  # (G, D, 1)
        alike = (features @ own)[..., 0] if products is None else products[rows, chosen]
        nearest = torch.maximum(nearest, alike)
    return torch.nonzero(taken.cpu())[:, 1].reshape(groups, k)


def _relevance(saliency: Tensor) -> Tensor:
    """(G, n) -> (G, n) float32: 1 for the largest of a row, 0 for the smallest; ties by index."""
    order = saliency.sort(dim=1, descending=True, stable=True).indices
    steps = torch.linspace(1, 0, saliency.shape[1], device=saliency.device).expand(saliency.shape)
    return torch.empty_like(saliency).scatter_(1, order, steps)
