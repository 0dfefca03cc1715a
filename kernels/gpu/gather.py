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
_ALIGNMENT = 8  # entries: 16 bytes of 16-bit numbers


def gather(sources: Sequence[Tensor], keep: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    """Copies the kept rows of each source to the front of its target.

    sources (H_kv, N, D) and targets (H_kv, >= k, D) of one dtype, with rows one behind the other, beginning at
    multiples of 16 bytes, their heads at multiples of 8 entries; keep[t] (k,) or, for each head by itself, (H_kv, k)
    int64 contiguous. N, capacities and k may differ between tensors.
    """
    H_kv, _, D = sources[0].shape
    for tensor in (*sources, *targets):
        if tensor.stride()[1:] != (D, 1) or tensor.stride(0) % _ALIGNMENT:
            raise ValueError(f"expected strides (a multiple of {_ALIGNMENT}, {D}, 1), got {tensor.stride()}")
    counts = [index.shape[-1] for index in keep]
    if max(counts) == 0:
        return
    table = torch.tensor(
        [
            [
                source.data_ptr(), index.data_ptr(), target.data_ptr(), count, count if index.ndim == 2 else 0,
                source.stride(0), target.stride(0),
            ]
            for source, index, target, count in zip(sources, keep, targets, counts, strict=True)
        ],
        dtype=torch.int64,
    ).to(sources[0].device, non_blocking=True)  # fmt: skip
    _gather[(triton.cdiv(max(counts), _ROWS), H_kv, len(sources))](
        table, sources[0], **_constants(D), num_warps=_WARPS, num_stages=_STAGES,
    )  # fmt: skip


def variants() -> Iterator[Variant]:
    for dtype in ("fp16", "bf16", "fp32"):
        for D in (64, 80, 128):
            types = {"table": "*i64", "like": f"*{dtype}"}
            yield Variant(
                f"gather d={D} {dtype}", _gather, types, _constants(D), _WARPS, _STAGES, frozenset(types)
            )  # fmt: skip


def _constants(D: int) -> dict[str, int]:
    return {"D": D, "WIDTH": power_of_two(D), "ROWS": _ROWS, "ALIGNMENT": _ALIGNMENT}


@triton.jit
def _gather(table, like, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, ALIGNMENT: tl.constexpr):
    entry = table + tl.program_id(2) * 7
    # The compiler cannot know that what stands in a table is aligned; without this it moves number by number.
    source = tl.multiple_of(tl.load(entry).to(like.dtype), 16)
    keep = tl.load(entry + 1).to(tl.pointer_type(tl.int64))
    target = tl.multiple_of(tl.load(entry + 2).to(like.dtype), 16)
    count = tl.load(entry + 3)
    source_head = tl.multiple_of(tl.load(entry + 5), ALIGNMENT)
    target_head = tl.multiple_of(tl.load(entry + 6), ALIGNMENT)
    head = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    rows = tl.load(keep + head * tl.load(entry + 4) + i, mask=i < count, other=0)
    d = tl.arange(0, WIDTH)
    mask = (i < count)[:, None] & (d < D)[None, :]
    values = tl.load(source + head * source_head + rows[:, None] * D + d[None, :], mask=mask)
    at = target + head * target_head + i[:, None].to(tl.int64) * D + d[None, :]
    tl.store(at, values, mask=mask)
