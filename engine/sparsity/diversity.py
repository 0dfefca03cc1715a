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

_PRODUCTS_AT_ONCE = 1 << 24  # floats: 64 MB, or 4,096 tokens of one group
_LIKELY = 256  # rows of products that are made together, where not all of them are


def diverse(saliency: Tensor, features: Tensor, k: int, weight: float) -> Tensor:
    """Which tokens of each group stay: (G, k) int64 on the CPU, ascending.

    saliency (G, n) float32; features (G, n, D) of any float dtype, on the device that does the work; 1 <= k <= n;
    weight 0 to 1. Work is that of the products of all pairs in a group, or, of groups too large to hold them, of a
    few times k with all; memory is bounded. Waits for the device once a group, in large ones now and then.
    """
    groups_at_once = max(1, _PRODUCTS_AT_ONCE // saliency.shape[1] ** 2)
    parts = zip(saliency.split(groups_at_once), features.split(groups_at_once), strict=True)
    return torch.cat([_greedy(*part, k, weight) for part in parts])


def _greedy(saliency: Tensor, features: Tensor, k: int, weight: float) -> Tensor:
    products = _Products(F.normalize(features.float(), dim=-1))
    relevance = _relevance(saliency).to(features.device)
    worth, nearest = relevance, torch.full_like(relevance, -torch.inf)
    taken = torch.zeros_like(relevance, dtype=torch.bool)
    rows = torch.arange(len(relevance), device=features.device)
    for _ in range(k):
        chosen = worth.argmax(dim=1)
        taken[rows, chosen] = True
        nearest = torch.maximum(nearest, products.of(chosen, worth))
        worth = ((1 - weight) * relevance - weight * nearest).masked_fill(taken, -torch.inf)
    return torch.nonzero(taken.cpu())[:, 1].reshape(len(saliency), k)


class _Products:
    """Products of tokens with all of their group: all at once or, of one large group, those likely to be asked for."""

    def __init__(self, features: Tensor) -> None:
        groups, n, _ = features.shape
        self._features = features
        self._all = features @ features.transpose(1, 2) if groups * n * n <= _PRODUCTS_AT_ONCE else None
        self._some: dict[int, Tensor] = {}

    def of(self, chosen: Tensor, worth: Tensor) -> Tensor:
        """chosen (G,) int64 -> (G, n); the more a token is worth (G, n), the likelier it is asked for soon."""
        if self._all is not None:
            return self._all[torch.arange(len(chosen), device=chosen.device), chosen]
        features, token = self._features[0], int(chosen)
        if token not in self._some:
            likely = torch.cat([chosen, worth[0].topk(min(_LIKELY, len(features))).indices])
            self._some = dict(zip(likely.tolist(), features[likely] @ features.T, strict=True))
        return self._some[token][None]


def _relevance(saliency: Tensor) -> Tensor:
    """(G, n) -> (G, n) float32: 1 for the largest of a row, 0 for the smallest; ties by index."""
    order = saliency.sort(dim=1, descending=True, stable=True).indices
    steps = torch.linspace(1, 0, saliency.shape[1], device=saliency.device).expand(saliency.shape)
    return torch.empty_like(saliency).scatter_(1, order, steps)
