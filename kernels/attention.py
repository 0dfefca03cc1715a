"""Attention of a chunk of queries over one segment of keys, with the log-sum-exp of every row.

    s[h, m, n] = scale * q[h, m] . k[h // (H / H_kv), n]        out = softmax_n(s) v        lse = log sum_n exp(s)

Segments that live apart (visual store, text store, the chunk itself) are attended one by one and
joined exactly by their log-sum-exps (`merge_attention`): no mask over all keys is ever built.
Source: Dao, arXiv 2307.08691 (the log-sum-exp form); Juravsky et al., arXiv 2402.05099 (joining by it).
Sizes: H query heads, H_kv key heads, M queries, N keys, D head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """Attention with its log-sum-exp.

    q (H, M, D); k, v (H_kv, N, D), same dtype, H a multiple of H_kv. `causal` needs M == N: query m sees keys 0..m.
    `scale` defaults to 1/sqrt(D). Returns out (H, M, D) in q's dtype and lse (H, M) float32 (natural logarithm).
    Memory is O(M D), never O(M N). Raises ValueError if shapes disagree or N is 0.
    """
    H, M, D = q.shape
    H_kv, N, _ = k.shape
    if k.shape != v.shape or k.shape[-1] != D or H % H_kv:
        raise ValueError(f"expected k and v (H_kv dividing {H}, N, {D}), got {tuple(k.shape)} and {tuple(v.shape)}")
    if N == 0 or (causal and M != N):
        raise ValueError(f"expected N > 0 and, if causal, as many queries as keys; got M {M}, N {N}, causal {causal}")
    group = H // H_kv
    scale = D**-0.5 if scale is None else scale
    if causal:
        # The rows of a group need the same mask, so the heads stay apart and keys are shared by a stride of 0.
        k, v = (t[:, None].expand(H_kv, group, N, D).reshape(H, N, D) for t in (k, v))
        out, lse = _flash(q, k, v, causal=True, scale=scale)
        return out, lse
    out, lse = _flash(q.reshape(H_kv, group * M, D), k, v, causal=False, scale=scale)
    return out.reshape(H, M, D), lse.reshape(H, M)


def _flash(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """torch's own flash attention, which returns the log-sum-exp. All tensors (heads, rows, D)."""
    if q.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q[None], k[None], v[None], 0.0, causal, attn_mask=None, scale=scale
        )
        return out[0], lse[0]
    if q.dtype in (torch.float16, torch.bfloat16):
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
            q[None], k[None], v[None], 0.0, causal, False, scale=scale
        )
        return out[0], lse[0]
    out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        q[None], k[None], v[None], None, True, 0.0, causal, scale=scale
    )
    return out[0], lse[0, :, : q.shape[1]]  # the op pads its lse to a multiple of 32 rows


def merge_attention(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Joins attention over disjoint segments of keys into attention over all of them.

    parts: (out (H, M, D), lse (H, M) float32) each. Returns the same pair for the union. One part comes back untouched.
    """
    if len(parts) == 1:
        return parts[0]
    lses = torch.stack([lse for _, lse in parts])  # (parts, H, M)
    lse = torch.logsumexp(lses, dim=0)  # (H, M)
    weights = torch.exp(lses - lse)[..., None]  # (parts, H, M, 1)
    first = parts[0][0]
    out = torch.zeros(first.shape, dtype=torch.float32, device=first.device)
    for weight, (part, _) in zip(weights, parts, strict=True):
        out.addcmul_(part.float(), weight)
    return out.to(first.dtype), lse


def attention_ref(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """The definition in float64, with the whole matrix."""
    H, M, D = q.shape
    group = H // k.shape[0]
    k, v = (t.double().repeat_interleave(group, 0) for t in (k, v))
    s = q.double() @ k.transpose(1, 2) * (D**-0.5 if scale is None else scale)  # (H, M, N)
    if causal:
        s = s.masked_fill(~torch.ones(M, M, dtype=torch.bool, device=q.device).tril(), -torch.inf)
    return s.softmax(-1) @ v, s.logsumexp(-1)
