"""The indices of the k largest scores of each row, in ascending order of index.

Ties go to the lower index, so the choice depends on nothing but the scores.
Sizes: L rows (layers), N scores.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backend import runs_triton


def top_k(scores: Tensor, k: int) -> Tensor:
    """Indices of the k largest of each row.

    scores (L, N) float32 without NaN, 1 <= k <= N. Returns (L, k) int64, ascending in each row.
    Does not wait for the device. Raises ValueError if k is out of range.
    """
    if scores.ndim != 2 or not 1 <= k <= scores.shape[1]:
        raise ValueError(f"expected scores (L, N) and 1 <= k <= N, got {tuple(scores.shape)} and k {k}")
    if runs_triton(scores):
        from .gpu.top_k import top_k as by_kernel

        return by_kernel(scores.contiguous(), k)
    # A stable sort keeps equal scores in index order; torch.topk promises no order among them.
    order = torch.sort(scores, dim=1, descending=True, stable=True).indices
    return order[:, :k].sort(dim=1).values


def top_k_ref(scores: Tensor, k: int) -> Tensor:
    """The definition, by Python's sort on (-score, index)."""
    rows = [sorted(sorted(range(len(row)), key=lambda i: (-row[i], i))[:k]) for row in scores.tolist()]
    return torch.tensor(rows, dtype=torch.int64)
