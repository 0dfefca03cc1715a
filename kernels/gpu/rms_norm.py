"""Root-mean-square normalisation, with the addition of a residual before it; the kernel of `rms_norm`.

A program holds one token's row whole. Sizes: M tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .blocks import power_of_two, row_warps
from .variant import Variant


def rms_norm(x: Tensor, weight: Tensor, eps: float, added: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x (M, D) and `added` (M, D) or None, contiguous; weight (D,) -> (x + added in x's dtype, its norm in x's dtype).

    Without `added` the first is x itself.
    """
    M, D = x.shape
    out = torch.empty_like(x)
    total = x if added is None else torch.empty_like(x)
    if M:
        _rms_norm[(M,)](
            x, x if added is None else added, weight, total, out, eps,
            **_constants(D, added is not None), num_warps=row_warps(D), num_stages=1,
        )  # fmt: skip
    return total, out


def variants() -> Iterator[Variant]:
    for dtype in ("fp16", "bf16"):
        for D in (3584, 4096):
            for adds in (False, True):
                pointers = dict.fromkeys(("x", "added", "weight", "total", "out"), f"*{dtype}")
                yield Variant(
                    f"rms_norm {D}{' residual' if adds else ''} {dtype}", _rms_norm, pointers | {"eps": "fp32"},
                    _constants(D, adds), row_warps(D), 1, frozenset(pointers),
                )  # fmt: skip


def _constants(D: int, adds: bool) -> dict[str, int | bool]:
    return {"D": D, "WIDTH": power_of_two(D), "ADDS": adds}


@triton.jit
def _rms_norm(
    x, added, weight, total, out, eps, D: tl.constexpr, WIDTH: tl.constexpr, ADDS: tl.constexpr
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * D
    d = tl.arange(0, WIDTH)
    mask = d < D
    row = tl.load(x + at + d, mask=mask, other=0.0)
    if ADDS:
        # The sum is rounded before it is used, as two separate operations would.
        row = (row.to(tl.float32) + tl.load(added + at + d, mask=mask, other=0.0).to(tl.float32)).to(row.dtype)
        tl.store(total + at + d, row, mask=mask)
    wide = row.to(tl.float32)
    normed = wide * tl.rsqrt(tl.sum(wide * wide, axis=0) / D + eps)
    scale = tl.load(weight + d, mask=mask, other=0.0)
    # The order of the two casts is that of Llama: round the normalised value, then scale.
    tl.store(out + at + d, (normed.to(row.dtype) * scale).to(row.dtype), mask=mask)
