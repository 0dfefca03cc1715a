"""The indices of the k largest of each row, ascending, ties to the lower index; the kernel of `top_k`.

One program a row. Floats are turned into unsigned integers of the same order, and the k-th largest is found two bits
at a time: the greatest number that k entries reach. Then one pass in order writes what is above it, and of those that
equal it the first ones. All rows are one launch, and nothing is sorted.
Sizes: L rows, N scores.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .blocks import power_of_two
from .variant import Variant

_WIDEST, _LEAST = 4096, 128  # scores of a step
_MOST = 1023 * _WIDEST  # a lane counts in ten bits


def top_k(scores: Tensor, k: int) -> Tensor:
    """scores (L, N) float32 contiguous, without NaN, 1 <= k <= N -> (L, k) int64."""
    L, N = scores.shape
    if N > _MOST:
        raise ValueError(f"expected at most {_MOST} scores a row, got {N}")
    keep = torch.empty(L, k, dtype=torch.int64, device=scores.device)
    width = min(_WIDEST, max(_LEAST, power_of_two(N)))
    if L:
        _top_k[(L,)](scores, keep, N, k, WIDTH=width, num_warps=_warps(width), num_stages=2)
    return keep


def _warps(width: int) -> int:
    return min(16, max(4, width // 256))


def variants() -> Iterator[Variant]:
    for width in (1024, _WIDEST):
        yield Variant(
            f"top_k {width} fp32", _top_k, {"scores": "*fp32", "keep": "*i64", "N": "i32", "k": "i32"},
            {"WIDTH": width}, _warps(width), 2, frozenset({"scores", "keep"}),
        )  # fmt: skip


@triton.jit
def _load_ordered(at, n, N):
    """Scores as unsigned integers of the same order; behind the last one 0."""
    x = tl.load(at + n, mask=n < N, other=0.0)
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)  # there are two zeros, and they are equal
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.uint32, bitcast=True) ^ 0x80000000
    return tl.where(n < N, ordered, 0)


@triton.jit
def _top_k(scores, keep, N, k, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = scores + row * N
    i = tl.arange(0, WIDTH)
    bound = tl.zeros((), tl.uint32)  # the bits of the k-th largest that are known
    for step in tl.static_range(16):
        unit = 1 << (30 - 2 * step)
        counts = tl.zeros((WIDTH,), tl.int32)  # of those that reach 1, 2, 3 units more, 10 bits for each
        for start in range(0, N, WIDTH):
            found = _load_ordered(at, start + i, N)
            for more in tl.static_range(1, 4):
                counts += (found >= bound + more * unit).to(tl.int32) << (10 * (more - 1))
        reached = bound
        for more in tl.static_range(1, 4):
            enough = tl.sum((counts >> (10 * (more - 1))) & 0x3FF, axis=0) >= k
            reached = tl.where(enough, bound + more * unit, reached)
        bound = reached
    above = tl.zeros((WIDTH,), tl.int32)
    for start in range(0, N, WIDTH):
        above += (_load_ordered(at, start + i, N) > bound).to(tl.int32)
    ties = k - tl.sum(above, axis=0)  # as many of those that equal the bound
    written = tl.zeros((), tl.int32)
    tied = tl.zeros((), tl.int32)
    for start in range(0, N, WIDTH):
        n = start + i
        found = _load_ordered(at, n, N)
        equal = ((found == bound) & (n < N)).to(tl.int32)
        rank = tied + tl.cumsum(equal, axis=0) - equal
        kept = ((found > bound) | ((equal != 0) & (rank < ties))).to(tl.int32)
        place = written + tl.cumsum(kept, axis=0) - kept
        tl.store(keep + row * k + place, n.to(tl.int64), mask=kept != 0)
        tied += tl.sum(equal, axis=0)
        written += tl.sum(kept, axis=0)
