"""Attention of one token over two stores, split over the keys; the kernel of `decode_attention`.

    p = softmax([scale * q k_a^T | scale * q k_b^T])        out = p_a v_a + p_b v_b

First each program attends to one chunk of one store and leaves its output and log-sum-exp, then one program a head
joins them. The query heads that share a key head stand in one tile, so keys and values are read once. Lengths are read
from device memory: a captured graph serves every step. A chunk begins at a multiple of its size and chunks are joined
in order, sixteen at a time, store by store, so the result depends on the lengths alone and not on the capacities.
Source: flash-decoding (Dao et al., 2023). Sizes: H query heads, H_kv key heads, A and B entries of the stores
(capacities), D head dimension, S chunks.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .blocks import LOG2_E, MIN_DOT, head_parts, power_of_two
from .variant import Variant

Store = tuple[Tensor, Tensor]  # k, v, each (H_kv, capacity, D)

CHUNK = 256  # keys of a program
_KEYS = 64  # of a step
_JOINED = 16  # chunks that are joined at a time
_WARPS, _STAGES = 4, 3


def decode_attention(q: Tensor, a: Store, b: Store, lengths: Tensor, scale: float) -> Tensor:
    """q (H, D); stores of q's dtype, contiguous in D, keys and values of one store with the same strides; lengths (2,)
    or (H_kv, 2) int64 contiguous on the device, how much of each is in use (by each key head), together at least 1
    -> (H, D) in q's dtype."""
    H, D = q.shape
    H_kv = b[0].shape[0]
    for k, v in (a, b):
        if k.stride() != v.stride() or k.stride(2) != 1:
            raise ValueError(f"expected keys and values with the same strides, got {k.stride()} and {v.stride()}")
    chunks = [triton.cdiv(store[0].shape[1], CHUNK) for store in (a, b)]
    S = max(1, sum(chunks))
    part = torch.empty(S, H, D, dtype=torch.float32, device=q.device)
    lse = torch.empty(S, H, dtype=torch.float32, device=q.device)
    q = q.contiguous()
    own_lengths = 2 if lengths.ndim == 2 else 0  # from one key head's to the next's
    _attend[(S, H_kv)](
        q, *a, *b, lengths, part, lse, chunks[0], H, own_lengths, scale * LOG2_E, a[0].stride(0), a[0].stride(1),
        b[0].stride(0), b[0].stride(1), **_constants(D, H // H_kv), num_warps=_WARPS, num_stages=_STAGES,
    )  # fmt: skip
    out = torch.empty_like(q)
    _join[(H,)](
        part, lse, lengths, out, chunks[0], H, H // H_kv, own_lengths,
        D=D, WIDTH=power_of_two(D), CHUNK=CHUNK, JOINED=_JOINED,
    )  # fmt: skip
    return out


def variants() -> Iterator[Variant]:
    for dtype in ("fp16", "bf16"):
        stores = dict.fromkeys(("q", "k_a", "v_a", "k_b", "v_b"), f"*{dtype}")
        own = {"lengths": "*i64", "part": "*fp32", "lse": "*fp32"}
        sizes = {"chunks_a": "i32", "H": "i32", "own_lengths": "i32", "scale_log2": "fp32"}
        strides = dict.fromkeys(("a_head", "a_row", "b_head", "b_row"), "i32")
        for D in (64, 80, 128):
            for group in (1, 4, 7):
                yield Variant(
                    f"decode_attention d={D} group={group} {dtype}", _attend, stores | own | sizes | strides,
                    _constants(D, group), _WARPS, _STAGES, frozenset(stores) | set(own) - {"lengths"} | set(strides),
                )  # fmt: skip
            yield Variant(
                f"decode_attention join d={D} {dtype}", _join,
                {"part": "*fp32", "lse": "*fp32", "lengths": "*i64", "out": f"*{dtype}"}
                | dict.fromkeys(("chunks_a", "H", "group", "own_lengths"), "i32"),
                {"D": D, "WIDTH": power_of_two(D), "CHUNK": CHUNK, "JOINED": _JOINED}, _WARPS, _STAGES,
                frozenset({"part", "lse", "out"}),
            )  # fmt: skip


def _constants(D: int, group: int) -> dict[str, int]:
    first, second = head_parts(D)
    rows = max(MIN_DOT, power_of_two(group))
    return {"D": D, "FIRST": first, "SECOND": second, "GROUP": group, "ROWS": rows, "KEYS": _KEYS, "CHUNK": CHUNK}


@triton.jit
def _attend(
    q, k_a, v_a, k_b, v_b, lengths, part, lse, chunks_a, H, own_lengths, scale_log2, a_head, a_row, b_head, b_row,
    D: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    in_a = chunk < chunks_a
    length = tl.load(lengths + head * own_lengths + tl.where(in_a, 0, 1)).to(tl.int32)
    first_key = tl.where(in_a, chunk, chunk - chunks_a) * CHUNK
    row_stride = tl.where(in_a, a_row, b_row).to(tl.int64)
    offset = head * tl.where(in_a, a_head, b_head)
    k = tl.where(in_a, k_a, k_b) + offset
    v = tl.where(in_a, v_a, v_b) + offset
    r = tl.arange(0, ROWS)
    d = tl.arange(0, FIRST)
    row_at = q + (head * GROUP + r[:, None]) * D
    row_ok = (r < GROUP)[:, None]
    rows = tl.load(row_at + d[None, :], mask=row_ok & (d < D)[None, :], other=0.0)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    out = tl.zeros((ROWS, FIRST), tl.float32)
    if SECOND:
        e = FIRST + tl.arange(0, SECOND)
        more_rows = tl.load(row_at + e[None, :], mask=row_ok & (e < D)[None, :], other=0.0)
        more_out = tl.zeros((ROWS, SECOND), tl.float32)
    for start in range(0, CHUNK, KEYS):
        n = first_key + start + tl.arange(0, KEYS)
        ok = n < length
        at = n[:, None] * row_stride
        keys = tl.load(k + at + d[None, :], mask=ok[:, None] & (d < D)[None, :], other=0.0)
        s = tl.dot(rows, tl.trans(keys), input_precision="ieee")
        if SECOND:
            more_keys = tl.load(k + at + e[None, :], mask=ok[:, None] & (e < D)[None, :], other=0.0)
            s = tl.dot(more_rows, tl.trans(more_keys), acc=s, input_precision="ieee")
        s = tl.where(ok[None, :], s * scale_log2, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, axis=1))
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)  # nothing seen so far: exp2(-inf - 0) = 0
        p = tl.exp2(s - safe[:, None])
        fade = tl.exp2(top - safe)
        total = total * fade + tl.sum(p, axis=1)
        values = tl.load(v + at + d[None, :], mask=ok[:, None] & (d < D)[None, :], other=0.0)
        out = tl.dot(p.to(values.dtype), values, acc=out * fade[:, None], input_precision="ieee")
        if SECOND:
            more_values = tl.load(v + at + e[None, :], mask=ok[:, None] & (e < D)[None, :], other=0.0)
            more_out = tl.dot(p.to(values.dtype), more_values, acc=more_out * fade[:, None], input_precision="ieee")
        top = new_top
    found = total > 0
    share = tl.where(found, 1.0 / tl.where(found, total, 1.0), 0.0)
    index = chunk.to(tl.int64) * H + head * GROUP + r
    tl.store(lse + index, tl.where(found, top + tl.log2(tl.where(found, total, 1.0)), float("-inf")), mask=r < GROUP)
    at = part + index[:, None] * D
    tl.store(at + d[None, :], out * share[:, None], mask=row_ok & (d < D)[None, :])
    if SECOND:
        tl.store(at + e[None, :], more_out * share[:, None], mask=row_ok & (e < D)[None, :])


@triton.jit
def _join(
    part, lse, lengths, out, chunks_a, H, group, own_lengths,
    D: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, JOINED: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    d = tl.arange(0, WIDTH)
    top = float("-inf")
    total = 0.0
    sums = tl.zeros((WIDTH,), tl.float32)
    for segment in tl.static_range(2):
        num = tl.cdiv(tl.load(lengths + head // group * own_lengths + segment).to(tl.int32), CHUNK)
        for start in range(0, num, JOINED):
            s = start + tl.arange(0, JOINED)
            index = (s + segment * chunks_a).to(tl.int64) * H + head
            log_sums = tl.load(lse + index, mask=s < num, other=float("-inf"))
            new_top = tl.maximum(top, tl.max(log_sums, axis=0))
            weights = tl.exp2(log_sums - new_top)
            fade = tl.exp2(top - new_top)
            mask = (s < num)[:, None] & (d < D)[None, :]
            values = tl.load(part + index[:, None] * D + d[None, :], mask=mask, other=0.0)
            sums = sums * fade + tl.sum(values * weights[:, None], axis=0)
            total = total * fade + tl.sum(weights, axis=0)
            top = new_top
    tl.store(out + head * D + d, sums / total, mask=d < D)
