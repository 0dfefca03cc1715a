"""Attention that each key receives: the column mean of an attention matrix that is never built.

    saliency[b, n] = mean_h mean_m softmax_n(scale * q[b, h, m] . k[b, h, n])

Full softmax first; a caller that wants patches alone slices the columns afterwards. An encoder with a summary
token passes its row (CLIP) or rows (RADIO) as q, one without passes all rows (SigLIP, Qwen ViT).
Given the log-sum-exp of each row it is one pass over tiles: p = exp(s - lse), summed over rows.
Source: arXiv 2510.17777, section 3.1. Sizes: B pictures, H heads, M query rows, N keys, D head dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .attention import attention
from .backend import runs_triton

_ROWS_PER_TILE = 256
_TILE_ENTRIES = 1 << 18  # scores at a time, 1 MB: the passes over them meet in the L2 cache. One head's rows at least


def saliency(q: Tensor, k: Tensor, *, lse: Tensor | None = None, scale: float | None = None) -> Tensor:
    """Mean attention each key receives.

    q (B, H, M, D), k (B, H, N, D), same dtype; lse (B, H, M) float32 if an attention pass already knows it.
    `scale` defaults to 1/sqrt(D). Returns (B, N) float32; each row sums to 1. Raises ValueError if shapes disagree.
    """
    B, H, M, D = q.shape
    if k.shape[:2] != (B, H) or k.shape[3] != D or M == 0:
        raise ValueError(f"expected q (B, H, M > 0, D) and k (B, H, N, D), got {tuple(q.shape)} and {tuple(k.shape)}")
    scale = D**-0.5 if scale is None else scale
    if runs_triton(q):
        return _by_kernel(q, k, lse, scale)
    rows, keys = q.flatten(0, 1), k.float().flatten(0, 1).transpose(1, 2)  # (B * H, M, D), (B * H, D, N)
    known = None if lse is None else lse.reshape(B * H, M)
    received = torch.zeros(B * H, k.shape[2], dtype=torch.float32, device=q.device)
    step = max(1, _TILE_ENTRIES // (min(M, _ROWS_PER_TILE) * k.shape[2]))
    for first in range(0, B * H, step):
        heads = slice(first, first + step)
        for m in range(0, M, _ROWS_PER_TILE):
            some = slice(m, m + _ROWS_PER_TILE)
            s = rows[heads, some].float().mul(scale) @ keys[heads]  # (heads, rows, N)
            row_lse = torch.logsumexp(s, dim=-1) if known is None else known[heads, some]
            received[heads] += s.sub_(row_lse[..., None]).exp_().sum(dim=1)
    return received.view(B, H, -1).sum(dim=1) / (H * M)


def _by_kernel(q: Tensor, k: Tensor, lse: Tensor | None, scale: float) -> Tensor:
    from .gpu.column_sums import column_sums

    B, H, M, _ = q.shape
    rows, keys = q.flatten(0, 1), k.flatten(0, 1)
    if lse is None:
        lse = attention(rows, keys, keys, causal=False, scale=scale)[1]
    return column_sums(rows, keys, lse.reshape(B * H, M), scale).view(B, H, -1).sum(dim=1) / (H * M)


def saliency_ref(q: Tensor, k: Tensor, *, lse: Tensor | None = None, scale: float | None = None) -> Tensor:
    """The definition in float64, with the whole matrix; `lse` is not needed."""
    s = q.double() @ k.double().transpose(2, 3) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return s.softmax(-1).mean(dim=(1, 2))
