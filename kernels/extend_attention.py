"""Attention of a chunk of tokens over two stores and, causally, over itself, with the log-sum-exp of every row.

    s = scale * [q k_a^T | q k_b^T | tril(q k^T)]        out = softmax(s) [v_a | v_b | v]        lse = log sum exp(s)

Everything in the stores came before the chunk, so they need no mask. A question (few tokens over many keys) is one pass
of a Triton kernel on a GPU; a long chunk is torch's flash attention of each part, joined by their log-sum-exps.
Source: Dao, arXiv 2307.08691, and flash-decoding for the split over keys.
Sizes: H query heads, H_kv key heads, M tokens, A and B entries of the stores, D head dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .attention import attention, merge_attention
from .backend import runs_triton
from .decode_attention import Segment

MAX_KERNEL_TOKENS = 512  # beyond, flash attention has rows enough to fill a device: to be measured


def extend_attention(
    q: Tensor, k: Tensor, v: Tensor, a: Segment, b: Segment, *, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """q (H, M, D) and k, v (H_kv, M, D) of the chunk; a = (k, v) with (H_kv, A, D), b likewise; either may be empty.

    One dtype, H a multiple of H_kv. `scale` defaults to 1/sqrt(D). Returns out (H, M, D) in q's dtype and lse (H, M)
    float32 (natural logarithm). Raises ValueError if shapes disagree.
    """
    H, M, D = q.shape
    H_kv = k.shape[0]
    if H % H_kv or k.shape[1] != M or any(t.shape[0] != H_kv or t.shape[2] != D for t in (k, v, *a, *b)):
        raise ValueError(
            f"expected keys and values (H_kv dividing {H}, n, {D}), those of the chunk with n = {M}, "
            f"got {[tuple(t.shape) for t in (k, v, *a, *b)]}"
        )
    if runs_triton(q) and M <= MAX_KERNEL_TOKENS:
        from .gpu.extend_attention import extend_attention as by_kernel

        return by_kernel(q, k, v, a, b, D**-0.5 if scale is None else scale)
    parts = [attention(q, *store, causal=False, scale=scale) for store in (a, b) if store[0].shape[1]]
    return merge_attention([*parts, attention(q, k, v, causal=True, scale=scale)])


def extend_attention_ref(
    q: Tensor, k: Tensor, v: Tensor, a: Segment, b: Segment, *, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """The definition in float64, with the whole matrix."""
    H, M, D = q.shape
    group = H // k.shape[0]
    keys, values = (
        torch.cat(parts, dim=1).double().repeat_interleave(group, 0) for parts in zip(a, b, (k, v), strict=True)
    )
    s = q.double() @ keys.transpose(1, 2) * (D**-0.5 if scale is None else scale)  # (H, M, A + B + M)
    later = torch.ones(M, M, dtype=torch.bool, device=q.device).triu(1)
    s[..., -M:].masked_fill_(later, -torch.inf)
    return s.softmax(-1) @ values, s.logsumexp(-1)
