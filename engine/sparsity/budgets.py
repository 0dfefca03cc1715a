"""How many entries of the visual store each layer may read in a turn, where layers do not all get the same.

Each layer's scores are brought to the sum 1; then the best pairs of (layer, entry) are taken, as many as equal budgets
would give in all. No other choice of that many pairs holds more of the question's attention to the visual store, summed
over layers, but for the floor: a layer keeps at least a quarter of an equal share, because what a layer reads shapes
the layers behind it, however widely its own attention is spread.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_FLOOR = 4  # a layer keeps at least this part of its equal share: a quarter of it


def by_mass(scores: Sequence[Tensor], counts: Sequence[int], pinned: Tensor | None = None) -> list[int]:
    """How many entries each layer reads when attention decides; their sum is that of `counts`.

    scores: per layer (N,) float32, not negative; counts: each layer's equal share, at least 1; pinned: entries that
    every layer reads, no more than the least of the shares. Ties go to the lower layer. Waits for the device once.
    """
    ranked, layers = [], []
    for i, (layer, count) in enumerate(zip(scores, counts, strict=True)):
        shares = layer.double() / layer.double().sum().clamp(min=torch.finfo(torch.float64).tiny)
        if pinned is not None:
            shares[pinned] = torch.inf
        best = shares.sort(descending=True).values
        best[: max(1, count // _FLOOR)] = torch.inf  # in before all others
        ranked.append(best)
        layers.append(torch.full((len(best),), i, device=best.device))
    taken = torch.cat(ranked).sort(descending=True, stable=True).indices[: sum(counts)]
    return torch.cat(layers)[taken].bincount(minlength=len(counts)).tolist()
