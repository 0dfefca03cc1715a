"""Rotates queries and keys by their positions and writes keys and values into a store; the kernel of `rope_append`.

One launch in place of two rotations and two copies. Sizes: H query heads, H_kv key heads, M tokens, D head dimension.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .blocks import power_of_two
from .variant import Variant

_WARPS = 1


def rope_append(qkv: Tensor, cos: Tensor, sin: Tensor, k_store: Tensor, v_store: Tensor, end: Tensor) -> Tensor:
    """qkv (M, H + 2 H_kv, D) contiguous: queries, keys, values of each token; cos, sin (M, D / 2) contiguous, of its
    dtype; stores (H_kv, capacity, D) of the same dtype, contiguous in D, with the same strides; end (1,) int64 on the
    device: entries in use once these M are in. Returns the rotated queries (H, M, D).
    """
    M, heads, D = qkv.shape
    H_kv = k_store.shape[0]
    H = heads - 2 * H_kv
    q = torch.empty(H, M, D, dtype=qkv.dtype, device=qkv.device)
    if M:
        _rope_append[(M, heads)](
            qkv, cos, sin, q, k_store, v_store, end, M, H, H_kv, k_store.stride(0), k_store.stride(1),
            **_constants(D), num_warps=_WARPS, num_stages=1,
        )  # fmt: skip
    return q


def variants() -> Iterator[Variant]:
    for dtype in ("fp16", "bf16"):
        pointers = dict.fromkeys(("qkv", "cos", "sin", "q", "k_store", "v_store"), f"*{dtype}") | {"end": "*i64"}
        sizes = dict.fromkeys(("M", "H", "H_kv", "store_head", "store_row"), "i32")
        aligned = frozenset(pointers) - {"end"} | {"store_head", "store_row"}
        for D in (64, 80, 128):
            name = f"rope_append d={D} {dtype}"
            yield Variant(name, _rope_append, pointers | sizes, _constants(D), _WARPS, 1, aligned)


def _constants(D: int) -> dict[str, int]:
    return {"HALF": D // 2, "WIDTH": power_of_two(D // 2)}


@triton.jit
def _rope_append(
    qkv, cos, sin, q, k_store, v_store, end, M, H, H_kv, store_head, store_row,
    HALF: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    d = tl.arange(0, WIDTH)
    mask = d < HALF
    at = qkv + (token * (H + 2 * H_kv) + head) * 2 * HALF + d
    first = tl.load(at, mask=mask, other=0.0)
    second = tl.load(at + HALF, mask=mask, other=0.0)
    if head < H + H_kv:
        turn = tl.load(cos + token * HALF + d, mask=mask, other=0.0)
        lift = tl.load(sin + token * HALF + d, mask=mask, other=0.0)
        a, b = first.to(tl.float32), second.to(tl.float32)
        # Each product is rounded before the sum, as separate operations on tensors would.
        turned = (a * turn).to(first.dtype) - (b * lift).to(first.dtype)
        second = ((b * turn).to(first.dtype) + (a * lift).to(first.dtype)).to(first.dtype)
        first = turned.to(first.dtype)
    if head < H:
        to = q + (head.to(tl.int64) * M + token) * 2 * HALF + d
    else:
        row = tl.load(end) - M + token
        store = tl.where(head < H + H_kv, k_store, v_store)
        own = tl.where(head < H + H_kv, head - H, head - H - H_kv).to(tl.int64)
        to = store + own * store_head + row * store_row + d
    tl.store(to, first, mask=mask)
    tl.store(to + HALF, second, mask=mask)
