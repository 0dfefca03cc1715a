"""Column sums of an attention matrix whose row sums are known: the kernel of `saliency` and of `retrieval`.

    out[g, n] = sum_r exp(scale * q[g, r] . k[g, n] - lse[g, r])

A program holds one block of keys and goes over all rows that attend to it: each key is read once, and nothing is added
by atomics. With the log-sum-exp at hand there is no maximum to track and no second pass, which is what the authors'
flash-colreduce pays for (it recomputes the row sums).
Sizes: G groups (pictures times heads, or key heads), R rows of a group, N keys, D head dimension.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .blocks import LOG2_E, MIN_DOT, head_parts, power_of_two
from .variant import Variant

_WARPS, _STAGES = 4, 3


def column_sums(q: Tensor, k: Tensor, lse: Tensor, scale: float) -> Tensor:
    """q (G, R, D), k (G, N, D) of one dtype, any strides but contiguous in D; lse (G, R) float32 -> (G, N) float32."""
    G, R, D = q.shape
    N = k.shape[1]
    out = torch.empty(G, N, dtype=torch.float32, device=q.device)
    if N == 0:
        return out
    q, k, lse = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, lse.contiguous()))
    rows, keys = block_sizes(R)
    _column_sums[(triton.cdiv(N, keys), G)](
        q, k, lse, out, R, N, scale * LOG2_E, q.stride(0), q.stride(1), k.stride(0), k.stride(1),
        **_constants(D, rows, keys), num_warps=_WARPS, num_stages=_STAGES,
    )  # fmt: skip
    return out


def block_sizes(num_rows: int) -> tuple[int, int]:
    """(rows, keys). Few rows need many programs to fill the device, many rows need products of a good shape."""
    rows = min(64, max(MIN_DOT, power_of_two(num_rows)))
    return rows, 64 if rows < 64 else 128


def variants() -> Iterator[Variant]:
    types = dict.fromkeys(("R", "N"), "i32") | {"scale_log2": "fp32"}
    types |= dict.fromkeys(("q_group", "q_row", "k_group", "k_row"), "i32")
    for dtype in ("fp16", "bf16"):
        pointers = {"q": f"*{dtype}", "k": f"*{dtype}", "lse": "*fp32", "out": "*fp32"}
        for D in (64, 72, 80, 128):
            for num_rows in (16, 32, 64):
                rows, keys = block_sizes(num_rows)
                strides = {"q_group", "q_row", "k_group", "k_row"} if D % 16 == 0 else set()
                yield Variant(
                    f"column_sums d={D} rows={num_rows} {dtype}", _column_sums, pointers | types,
                    _constants(D, rows, keys), _WARPS, _STAGES, frozenset(pointers) | strides, entries=rows * keys,
                )  # fmt: skip


def _constants(D: int, rows: int, keys: int) -> dict[str, int]:
    first, second = head_parts(D)
    return {"D": D, "FIRST": first, "SECOND": second, "ROWS": rows, "KEYS": keys}


@triton.jit
def _column_sums(
    q, k, lse, out, R, N, scale_log2, q_group, q_row, k_group, k_row,
    D: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    group = tl.program_id(1).to(tl.int64)
    d = tl.arange(0, FIRST)
    key_at = k + group * k_group + n[:, None].to(tl.int64) * k_row
    keys = tl.load(key_at + d[None, :], mask=(n < N)[:, None] & (d < D)[None, :], other=0.0)
    if SECOND:
        e = FIRST + tl.arange(0, SECOND)
        more_keys = tl.load(key_at + e[None, :], mask=(n < N)[:, None] & (e < D)[None, :], other=0.0)
    total = tl.zeros((KEYS,), tl.float32)
    for start in range(0, R, ROWS):
        r = start + tl.arange(0, ROWS)
        row_at = q + group * q_group + r[:, None].to(tl.int64) * q_row
        rows = tl.load(row_at + d[None, :], mask=(r < R)[:, None] & (d < D)[None, :], other=0.0)
        s = tl.dot(rows, tl.trans(keys), input_precision="ieee")
        if SECOND:
            more_rows = tl.load(row_at + e[None, :], mask=(r < R)[:, None] & (e < D)[None, :], other=0.0)
            s = tl.dot(more_rows, tl.trans(more_keys), acc=s, input_precision="ieee")
        # Rows behind the last have an infinite sum: they add exp2(-inf) = 0.
        sums = tl.load(lse + group * R + r, mask=r < R, other=float("inf")) * 1.4426950408889634
        total += tl.sum(tl.exp2(s * scale_log2 - sums[:, None]), axis=0)
    tl.store(out + group * N + n, total, mask=n < N)
