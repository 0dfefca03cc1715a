"""Gathers the kept keys and values of many stores into contiguous active sets.

    targets[t][h, i] = sources[t][h, keep[t][i]]        or, where heads keep their own,        keep[t][h, i]

Sizes: T tensors (keys and values of every layer), H_kv key heads, k kept entries, D head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .backend import runs_triton


def compaction(sources: Sequence[Tensor], keep: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    """Writes sources[t][:, keep[t]] into targets[t][:, :k], in place, for all t in one call.

    sources (H_kv, N, D), keep (k,) or, each head's own, (H_kv, k) int64 contiguous with 0 <= keep < N, targets
    (H_kv, >= k, D) of the sources' dtype; N and k may differ from one to the next. No rotation is changed. Raises
    ValueError if shapes disagree.
    """
    if not len(sources) == len(keep) == len(targets):
        raise ValueError(f"expected as many of each, got {len(sources)}, {len(keep)} and {len(targets)}")
    for source, index, target in zip(sources, keep, targets, strict=True):
        H_kv, _, D = source.shape
        k = index.shape[-1]
        if index.shape not in ((k,), (H_kv, k)):
            raise ValueError(f"expected keep (k,) or ({H_kv}, k), got {tuple(index.shape)}")
        if target.shape[0] != H_kv or target.shape[2] != D or target.shape[1] < k:
            raise ValueError(f"expected target ({H_kv}, >= {k}, {D}), got {tuple(target.shape)}")
    if not sources:
        return
    if runs_triton(sources[0]):
        from .gpu.gather import gather

        return gather(sources, keep, targets)
    for source, index, target in zip(sources, keep, targets, strict=True):
        for head in range(source.shape[0]):  # a head's rows of a target are contiguous, all heads' rows are not
            own = index if index.ndim == 1 else index[head]
            torch.index_select(source[head], 0, own, out=target[head, : len(own)])


def compaction_ref(sources: Sequence[Tensor], keep: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    """The definition, entry by entry."""
    for source, index, target in zip(sources, keep, targets, strict=True):
        for head, own in enumerate(index.expand(len(source), -1).tolist()):
            for i, n in enumerate(own):
                target[head, i] = source[head, n]
