"""Rotates queries and keys by their positions and writes keys and values behind what a store holds.

    q[h, m] = rope(qkv[m, h])
    k_store[h, end - M + m] = rope(qkv[m, H + h])        v_store[h, end - M + m] = qkv[m, H + H_kv + h]

One pass in place of two rotations and two copies. Where to write is read from a tensor, so the host need not know it.
Source: `rope`. Sizes: H query heads, H_kv key heads, M tokens, D head dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backend import machine_code, runs_triton
from .rope import rope, rope_ref


def rope_append(qkv: Tensor, cos: Tensor, sin: Tensor, k_store: Tensor, v_store: Tensor, end: Tensor) -> Tensor:
    """Returns the rotated queries (H, M, D) and fills rows end - M .. end - 1 of both stores in place.

    qkv (M, H + 2 H_kv, D): queries, keys, values of each token; cos, sin (M, D/2) and stores (H_kv, capacity, D), all
    of its dtype; end (1,) int64 on its device, M <= end <= capacity. Raises ValueError if shapes disagree.
    """
    M, heads, D = qkv.shape
    H_kv = k_store.shape[0]
    H = heads - 2 * H_kv
    if H < 1 or k_store.shape[2] != D or v_store.shape != k_store.shape or end.shape != (1,):
        raise ValueError(
            f"expected stores (H_kv below {heads} / 2, capacity, {D}) and end (1,), "
            f"got {tuple(k_store.shape)}, {tuple(v_store.shape)}, {tuple(end.shape)}"
        )
    if runs_triton(qkv):
        from .gpu.rope_append import rope_append as by_kernel

        return by_kernel(qkv.contiguous(), cos, sin, k_store, v_store, end)
    if cos.shape == sin.shape == (M, D // 2) and (level := machine_code(qkv, cos, sin, k_store, v_store)):
        from .cpu import rope_append as machine

        if machine.takes(k_store, v_store):
            angles = (cos.contiguous(), sin.contiguous())
            return machine.rope_append(qkv.contiguous(), *angles, k_store, v_store, int(end), level)
    by_head = qkv.transpose(0, 1)  # (H + 2 H_kv, M, D)
    turned = rope(by_head[: H + H_kv], cos, sin)
    rows = end - 1 if M == 1 else end - M + torch.arange(M, device=end.device)
    k_store.index_copy_(1, rows, turned[H:])
    v_store.index_copy_(1, rows, by_head[H + H_kv :])
    return turned[:H]


def rope_append_ref(qkv: Tensor, cos: Tensor, sin: Tensor, k_store: Tensor, v_store: Tensor, end: Tensor) -> Tensor:
    """The definition, in float64 but for what the stores round."""
    M, heads, _ = qkv.shape
    H_kv = k_store.shape[0]
    H = heads - 2 * H_kv
    by_head = qkv.transpose(0, 1)
    turned = rope_ref(by_head[: H + H_kv], cos, sin)
    rows = slice(int(end) - M, int(end))
    k_store[:, rows] = turned[H:].to(k_store.dtype)
    v_store[:, rows] = by_head[H + H_kv :]
    return turned[:H]
