"""Gathers the kept keys or values of a store into a contiguous active set.

    dst[h, i] = src[h, keep[i]]

Sizes: H_kv key heads, k kept entries, D head dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backend import runs_triton


def compaction(src: Tensor, keep: Tensor, dst: Tensor) -> None:
    """Writes src[:, keep] into dst[:, :k], in place.

    src (H_kv, N, D), keep (k,) int64 with 0 <= keep < N, dst (H_kv, >= k, D) of src's dtype. No rotation is changed.
    Raises ValueError if shapes disagree.
    """
    k = keep.shape[0]
    if dst.shape[0] != src.shape[0] or dst.shape[2] != src.shape[2] or dst.shape[1] < k:
        raise ValueError(f"expected dst ({src.shape[0]}, >= {k}, {src.shape[2]}), got {tuple(dst.shape)}")
    if runs_triton(src):
        from .gpu.gather import gather

        return gather([src], [keep], [dst])
    for head in range(src.shape[0]):  # a head's rows of dst are contiguous, all heads' rows are not
        torch.index_select(src[head], 0, keep, out=dst[head, :k])


def compaction_ref(src: Tensor, keep: Tensor, dst: Tensor) -> None:
    """The definition, entry by entry."""
    for i, n in enumerate(keep.tolist()):
        dst[:, i] = src[:, n]
