"""How much the rows of a question look at each visual key, given the log-sum-exp of their whole attention.

    mass[n] = sum_h sum_m exp(scale * q[h, m] . k[h // (H / H_kv), n] - lse[h, m])        n in the visual store

The log-sum-exp runs over *all* keys the row attends to (system text, visual store, history, the question itself),
so a question token that hardly looks at the picture weighs little. Sums over chunks of a long question simply add
up; the mean over heads and question tokens is the sum divided by H times their number. `per_head` leaves the key heads
apart: then the sum runs over the query heads that share one.
Source: arXiv 2510.17777, section 3.2; queries and keys after RoPE, as in the authors' flash-colreduce.
Sizes: H query heads, H_kv key heads, M question rows, N visual keys, D head dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backend import runs_triton

_KEYS_PER_TILE = 4096  # bounds the keys' float32 copy
_SCORES_PER_TILE = 1 << 20  # 4 MiB, for the cache: as many keys for a usual question, fewer for a longer one


def retrieval(q: Tensor, k: Tensor, lse: Tensor, *, scale: float | None = None, per_head: bool = False) -> Tensor:
    """Attention mass that each visual key gets, summed over heads and rows.

    q (H, M, D) and k (H_kv, N, D) after RoPE, same dtype; lse (H, M) float32 over the whole causal key row.
    `scale` defaults to 1/sqrt(D). Returns (N,) float32 or, `per_head`, (H_kv, N): of the query heads of each key head.
    Memory is O(H M D), never O(M N). Raises ValueError if shapes disagree.
    """
    H, M, D = q.shape
    H_kv, N, _ = k.shape
    if H % H_kv or k.shape[2] != D or lse.shape != (H, M):
        raise ValueError(
            f"expected k (H_kv dividing {H}, N, {D}), lse ({H}, {M}); got {tuple(k.shape)}, {tuple(lse.shape)}"
        )
    scale = D**-0.5 if scale is None else scale
    if runs_triton(q):
        from .gpu.column_sums import column_sums

        sums = column_sums(q.reshape(H_kv, -1, D), k, lse.reshape(H_kv, -1), scale)
        return sums if per_head else sums.sum(dim=0)
    rows = q.reshape(H_kv, H // H_kv * M, D).float() * scale
    row_lse = lse.reshape(H_kv, -1, 1)
    mass = torch.empty((H_kv, N) if per_head else N, dtype=torch.float32, device=q.device)
    keys_per_tile = max(1, min(_KEYS_PER_TILE, _SCORES_PER_TILE // (H * M)))
    for n in range(0, N, keys_per_tile):
        tile = slice(n, n + keys_per_tile)
        s = rows @ k[:, tile].float().transpose(1, 2)  # (H_kv, group * M, tile)
        mass[..., tile] = s.sub_(row_lse).exp_().sum(dim=1 if per_head else (0, 1))
    return mass


def retrieval_ref(q: Tensor, k: Tensor, lse: Tensor, *, scale: float | None = None, per_head: bool = False) -> Tensor:
    """The definition in float64."""
    keys = k.double().repeat_interleave(q.shape[0] // k.shape[0], 0)
    s = q.double() @ keys.transpose(1, 2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    mass = torch.exp(s - lse.double()[..., None]).sum(dim=1)  # (H, N)
    return mass.unflatten(0, (k.shape[0], -1)).sum(dim=1) if per_head else mass.sum(dim=0)
