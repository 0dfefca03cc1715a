"""Attention of a few tokens over two stores and causally over themselves; the kernel of `extend_attention`.

    s = scale * [q k_a^T | q k_b^T | tril(q k^T)]        out = softmax(s) [v_a | v_b | v]        lse = log sum exp(s)

A program has a tile of rows, the query heads of a group beside each other, and a share of the blocks of keys: those of
the first store, of the second, of the chunk, one after the other in one loop. A question has few rows and many keys, so
the keys are shared out until the device is full, and a second kernel joins the shares in order. How they are shared
depends on the lengths alone, never on capacities.
Sizes: H query heads, H_kv key heads, M tokens, A and B entries of the stores, D head dimension, S shares.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .blocks import LOG2_E, MIN_DOT, head_parts, power_of_two
from .variant import Variant

Store = tuple[Tensor, Tensor]  # k, v, each (H_kv, entries, D)

_KEYS = 64  # of a block
_STAGES = 2
_ALIGNMENT = 8  # entries at whose multiples rows begin wherever D is one: 16 bytes are read at once
_PROGRAMS = 256  # that are wanted at least: three for each of 84 multiprocessors
_LEAST_BLOCKS = 4  # of a share: below, joining costs as much as attending
_MOST_SHARES = 64  # a program joins them at once


def extend_attention(q: Tensor, k: Tensor, v: Tensor, a: Store, b: Store, scale: float) -> tuple[Tensor, Tensor]:
    """q (H, M, D), k, v (H_kv, M, D), stores (H_kv, A or B, D) of one dtype; the rows of a store one behind the other,
    keys and values of one with the same strides -> out (H, M, D) in q's dtype, lse (H, M) float32 (natural logarithm).
    """
    H, M, D = q.shape
    H_kv = k.shape[0]
    q = q if q.stride(2) == 1 else q.contiguous()
    k, v = k.contiguous(), v.contiguous()  # all rows of keys are then as far apart as they are long
    for keys, values in (a, b):
        if keys.stride() != values.stride() or keys.stride()[1:] != (D, 1):
            raise ValueError(f"expected the strides (any, {D}, 1) twice, got {keys.stride()} and {values.stride()}")
    heads = [store.stride(0) for store in (k, a[0], b[0])]
    alignment = 1 if any(stride % _ALIGNMENT for stride in (D, *heads)) else _ALIGNMENT
    rows = row_block(H // H_kv * M)
    tiles = triton.cdiv(H // H_kv * M, rows)
    blocks = triton.cdiv(a[0].shape[1], _KEYS) + triton.cdiv(b[0].shape[1], _KEYS)
    S = num_shares(tiles * H_kv, blocks)
    out = torch.empty(H, M, D, dtype=q.dtype, device=q.device)
    lse = torch.empty(H, M, dtype=torch.float32, device=q.device)
    part = out if S == 1 else torch.empty(S, H, M, D, dtype=torch.float32, device=q.device)
    part_lse = lse if S == 1 else torch.empty(S, H, M, dtype=torch.float32, device=q.device)
    _extend[(tiles, H_kv, S)](
        q, k, v, *a, *b, part, part_lse, M, a[0].shape[1], b[0].shape[1], triton.cdiv(blocks, S), scale * LOG2_E,
        q.stride(0), q.stride(1), *heads, **_constants(D, H // H_kv, rows, alignment), num_warps=_warps(rows),
        num_stages=_STAGES,
    )  # fmt: skip
    if S > 1:
        _join_shares[(H * M,)](
            part, part_lse, out, lse, H * M, S, D=D, WIDTH=power_of_two(D), SHARES=power_of_two(S), num_warps=4
        )
    return out, lse


def row_block(num_rows: int) -> int:
    return min(128, max(MIN_DOT, power_of_two(num_rows)))


def num_shares(programs: int, blocks: int) -> int:
    """Shares of the stores' blocks: enough for `_PROGRAMS`, of `_LEAST_BLOCKS` each."""
    return max(1, min(triton.cdiv(_PROGRAMS, programs), blocks // _LEAST_BLOCKS, _MOST_SHARES))


def _warps(rows: int) -> int:
    return 8 if rows == 128 else 4


def variants() -> Iterator[Variant]:
    strides = ("q_head", "q_row", "k_head", "a_head", "b_head")
    for name in ("fp16", "bf16"):
        tensors = dict.fromkeys(("q", "k", "v", "k_a", "v_a", "k_b", "v_b"), f"*{name}")
        types = tensors | {"part": "*fp32", "lse": "*fp32"} | dict.fromkeys(("M", "A", "B", "each"), "i32")
        types |= {"scale_log2": "fp32"} | dict.fromkeys(strides, "i32")
        for D in (64, 72, 80, 128):
            for rows in (16, 64, 128):
                # Capacities are multiples of 256, so heads are aligned in every store.
                aligned = frozenset({*tensors, "part", "lse", "a_head", "b_head"})
                aligned |= frozenset(strides) if D % 16 == 0 else frozenset()
                yield Variant(
                    f"extend_attention d={D} rows={rows} {name}", _extend, types,
                    _constants(D, 4, rows, _ALIGNMENT), _warps(rows), _STAGES, aligned, entries=rows * _KEYS,
                )  # fmt: skip
        yield Variant(
            f"extend_attention join {name}", _join_shares,
            {"part": "*fp32", "part_lse": "*fp32", "out": f"*{name}", "lse": "*fp32", "rows": "i32", "S": "i32"},
            {"D": 128, "WIDTH": 128, "SHARES": 16}, 4, 1, frozenset({"part", "part_lse", "out", "lse"}),
        )  # fmt: skip


def _constants(D: int, group: int, rows: int, alignment: int) -> dict[str, int]:
    first, second = head_parts(D)
    return {
        "D": D, "FIRST": first, "SECOND": second, "GROUP": group, "ROWS": rows, "KEYS": _KEYS, "ALIGNMENT": alignment,
    }  # fmt: skip


@triton.jit
def _extend(
    q, k, v, k_a, v_a, k_b, v_b, part, lse, M, A, B, each, scale_log2,
    q_head, q_row, k_head, a_head, b_head,
    D: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, ALIGNMENT: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    share = tl.program_id(2)
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m = r // GROUP
    own_head = head * GROUP + r % GROUP
    row_ok = (m < M)[:, None]
    d = tl.arange(0, FIRST)
    row_at = q + own_head[:, None] * q_head + m[:, None].to(tl.int64) * q_row
    rows = tl.load(row_at + d[None, :], mask=row_ok & (d < D)[None, :], other=0.0)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    out = tl.zeros((ROWS, FIRST), tl.float32)
    if SECOND:
        e = FIRST + tl.arange(0, SECOND)
        more_rows = tl.load(row_at + e[None, :], mask=row_ok & (e < D)[None, :], other=0.0)
        more_out = tl.zeros((ROWS, SECOND), tl.float32)
    blocks_a = tl.cdiv(A, KEYS)
    blocks = blocks_a + tl.cdiv(B, KEYS)
    begin = share * each
    end = begin + each
    # The last share has the chunk's own keys too, up to the tile's last row.
    last = tl.minimum((tl.program_id(0) * ROWS + ROWS - 1) // GROUP, M - 1)
    end = tl.where(end < blocks, end, blocks + tl.cdiv(last + 1, KEYS))
    end = tl.where(begin < blocks or share == 0, end, begin)  # rounding up can leave shares with nothing
    for block in range(begin, end):
        in_a = block < blocks_a
        in_stores = block < blocks
        first_key = (block - tl.where(in_a, 0, tl.where(in_stores, blocks_a, blocks))) * KEYS
        length = tl.where(in_a, A, tl.where(in_stores, B, M))
        offset = tl.multiple_of(head * tl.where(in_a, a_head, tl.where(in_stores, b_head, k_head)), ALIGNMENT)
        k_at = tl.where(in_a, k_a, tl.where(in_stores, k_b, k)) + offset
        v_at = tl.where(in_a, v_a, tl.where(in_stores, v_b, v)) + offset
        n = first_key + tl.arange(0, KEYS)
        ok = n < length
        at = n[:, None].to(tl.int64) * D
        keys = tl.load(k_at + at + d[None, :], mask=ok[:, None] & (d < D)[None, :], other=0.0)
        s = tl.dot(rows, tl.trans(keys), input_precision="ieee")
        if SECOND:
            more_keys = tl.load(k_at + at + e[None, :], mask=ok[:, None] & (e < D)[None, :], other=0.0)
            s = tl.dot(more_rows, tl.trans(more_keys), acc=s, input_precision="ieee")
        # Of the stores a row sees what is in use, of the chunk what came before it and itself.
        bound = tl.where(in_stores, length - 1, m)
        s = tl.where(n[None, :] <= bound[:, None], s * scale_log2, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, axis=1))
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)  # nothing seen so far: exp2(-inf - 0) = 0
        p = tl.exp2(s - safe[:, None])
        fade = tl.exp2(top - safe)
        total = total * fade + tl.sum(p, axis=1)
        values = tl.load(v_at + at + d[None, :], mask=ok[:, None] & (d < D)[None, :], other=0.0)
        out = tl.dot(p.to(values.dtype), values, acc=out * fade[:, None], input_precision="ieee")
        if SECOND:
            more_values = tl.load(v_at + at + e[None, :], mask=ok[:, None] & (e < D)[None, :], other=0.0)
            more_out = tl.dot(p.to(values.dtype), more_values, acc=more_out * fade[:, None], input_precision="ieee")
        top = new_top
    found = total > 0
    inverse = tl.where(found, 1.0 / tl.where(found, total, 1.0), 0.0)
    index = (share.to(tl.int64) * tl.num_programs(1) * GROUP + own_head) * M + m
    log_sum = (top + tl.log2(tl.where(found, total, 1.0))) * 0.6931471805599453
    tl.store(lse + index, tl.where(found, log_sum, float("-inf")), mask=m < M)
    at_out = part + index[:, None] * D
    tl.store(at_out + d[None, :], (out * inverse[:, None]).to(part.dtype.element_ty), mask=row_ok & (d < D)[None, :])
    if SECOND:
        wide = (more_out * inverse[:, None]).to(part.dtype.element_ty)
        tl.store(at_out + e[None, :], wide, mask=row_ok & (e < D)[None, :])


@triton.jit
def _join_shares(
    part, part_lse, out, lse, rows, S, D: tl.constexpr, WIDTH: tl.constexpr, SHARES: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    s = tl.arange(0, SHARES)
    d = tl.arange(0, WIDTH)
    log_sums = tl.load(part_lse + s * rows + row, mask=s < S, other=float("-inf"))
    top = tl.max(log_sums, axis=0)
    weights = tl.exp2((log_sums - top) * 1.4426950408889634)
    total = tl.sum(weights, axis=0)
    mask = (s < S)[:, None] & (d < D)[None, :]
    values = tl.load(part + (s[:, None] * rows + row) * D + d[None, :], mask=mask, other=0.0)
    joined = tl.sum(values * (weights / total)[:, None], axis=0)
    tl.store(out + row * D + d, joined.to(out.dtype.element_ty), mask=d < D)
    tl.store(lse + row, top + tl.log2(total) * 0.6931471805599453)
