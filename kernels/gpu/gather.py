"""Gathers rows of many tensors in one launch; the kernel of `compaction`.

    targets[t][h, i] = sources[t][h, keep[t][h, i]]

Addresses are read from a table in device memory, so keys and values of all layers are one call.
Sizes: T tensors, H_kv heads, k kept rows, D entries of a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .blocks import power_of_two
from .variant import Variant

_ROWS = 32  # of a program
_WARPS, _STAGES = 4, 1


def gather(sources: Sequence[Tensor], keep: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    """Copies the kept rows of each source to the front of its target.

    sources (H_kv, N, D) and targets (H_kv, >= k, D) of one dtype, contiguous in D, all sources with one set of strides
    and all targets with one, beginning at multiples of 16 bytes; keep[t] (k,) or, for each head by itself, (H_kv, k)
    int64 contiguous. k may differ between tensors.
    """
    H_kv, _, D = sources[0].shape
    for tensors in (sources, targets):
        strides = {tensor.stride() for tensor in tensors}
        if len(strides) != 1 or tensors[0].stride(2) != 1:
            raise ValueError(f"expected tensors with one set of strides, contiguous in their rows, got {strides}")
    counts = [index.shape[-1] for index in keep]
    if max(counts) == 0:
        return
    table = torch.tensor(
        [
            [source.data_ptr(), index.data_ptr(), target.data_ptr(), count, count if index.ndim == 2 else 0]
            for source, index, target, count in zip(sources, keep, targets, counts, strict=True)
        ],
        dtype=torch.int64,
    ).to(sources[0].device, non_blocking=True)
    _gather[(triton.cdiv(max(counts), _ROWS), H_kv, len(sources))](
        table, sources[0], sources[0].stride(0), sources[0].stride(1), targets[0].stride(0), targets[0].stride(1),
        D=D, WIDTH=power_of_two(D), ROWS=_ROWS, num_warps=_WARPS, num_stages=_STAGES,
    )  # fmt: skip


def variants() -> Iterator[Variant]:
    for dtype in ("fp16", "bf16", "fp32"):
        for D in (64, 80, 128):
            yield Variant(
                f"gather d={D} {dtype}", _gather,
                {"table": "*i64", "like": f"*{dtype}"}
                | dict.fromkeys(("source_head", "source_row", "target_head", "target_row"), "i32"),
                {"D": D, "WIDTH": power_of_two(D), "ROWS": _ROWS}, _WARPS, _STAGES,
                frozenset({"table", "like", "source_head", "source_row", "target_head", "target_row"}),
            )  # fmt: skip


@triton.jit
def _gather(
    table, like, source_head, source_row, target_head, target_row,
    D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    entry = table + tl.program_id(2) * 5
    # The compiler cannot know that the addresses of a table are aligned; without this it moves number by number.
    source = tl.multiple_of(tl.load(entry).to(like.dtype), 16)
    keep = tl.load(entry + 1).to(tl.pointer_type(tl.int64))
    target = tl.multiple_of(tl.load(entry + 2).to(like.dtype), 16)
    count = tl.load(entry + 3)
    head = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    rows = tl.load(keep + head * tl.load(entry + 4) + i, mask=i < count, other=0)
    d = tl.arange(0, WIDTH)
    mask = (i < count)[:, None] & (d < D)[None, :]
    values = tl.load(source + head * source_head + rows[:, None] * source_row + d[None, :], mask=mask)
    at = target + head * target_head + i[:, None].to(tl.int64) * target_row + d[None, :]
    tl.store(at, values, mask=mask)
