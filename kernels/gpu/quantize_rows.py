"""Symmetric int8 codes of rows; the kernel of `quantize_rows`, alone or behind a LayerNorm or an RMSNorm.

A program holds one row whole, so a normalised row is never written in floats. Sizes: M tokens, K inputs.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .blocks import power_of_two, row_warps
from .variant import Variant

_NORMS = {"": 0, "layer": 1, "rms": 2}


def quantize_rows(
    x: Tensor, norm: str = "", weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 0.0, *,
    width: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x (M, K) contiguous -> codes (M, width or K) int8, scales (M,) float32, as `kernels.quantize_rows` defines them.

    `norm` "layer" (with weight and bias (K,)) or "rms" (weight alone) normalises each row first, rounded to x's dtype
    as the op by itself would.
    """
    M, K = x.shape
    width = max(width, K)
    codes = torch.empty(M, width, dtype=torch.int8, device=x.device)
    scales = torch.empty(M, dtype=torch.float32, device=x.device)
    if M:
        _quantize_rows[(M,)](
            x, x if weight is None else weight, x if bias is None else bias, codes, scales, eps,
            **_constants(K, norm, width), num_warps=row_warps(K), num_stages=1,
        )  # fmt: skip
    return codes, scales


def variants() -> Iterator[Variant]:
    for dtype in ("fp16", "bf16"):
        for K, norm in ((1024, "layer"), (1152, "layer"), (4304, ""), (3420, ""), (3584, "rms"), (18944, "")):
            pointers = dict.fromkeys(("x", "weight", "bias"), f"*{dtype}") | {"codes": "*i8", "scales": "*fp32"}
            yield Variant(
                f"quantize_rows {K} {norm or 'plain'} {dtype}", _quantize_rows, pointers | {"eps": "fp32"},
                _constants(K, norm, -(-K // 16) * 16), row_warps(K), 1, frozenset(pointers),
            )  # fmt: skip


def _constants(K: int, norm: str, width: int) -> dict[str, int]:
    return {"K": K, "OUT": width, "WIDTH": power_of_two(width), "NORM": _NORMS[norm]}


@triton.jit
def _quantize_rows(
    x, weight, bias, codes, scales, eps,
    K: tl.constexpr, OUT: tl.constexpr, WIDTH: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, WIDTH)
    mask = i < K
    stored = tl.load(x + row * K + i, mask=mask, other=0.0)
    wide = stored.to(tl.float32)
    if NORM:
        if NORM == 1:
            wide = tl.where(mask, wide - tl.sum(wide, axis=0) / K, 0.0)
        wide = wide * tl.rsqrt(tl.sum(wide * wide, axis=0) / K + eps)
        scale = tl.load(weight + i, mask=mask, other=0.0)
        if NORM == 1:
            shift = tl.load(bias + i, mask=mask, other=0.0)
            wide = wide * scale.to(tl.float32) + shift.to(tl.float32)
        else:
            wide = wide.to(stored.dtype).to(tl.float32) * scale.to(tl.float32)
        wide = wide.to(stored.dtype).to(tl.float32)
    # Floats without their sign are ordered as their bits are; a NaN is the largest, so it shows in the scale.
    largest = tl.max(wide.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=0).to(tl.float32, bitcast=True)
    step = tl.div_rn(largest, 127.0)
    step = tl.where(step == 0, 1.0, step)
    quotient = tl.div_rn(wide, tl.zeros_like(wide) + step)
    quotient = tl.minimum(tl.maximum(quotient, -127.0), 127.0)
    # Adding 1.5 * 2^23 leaves no bits for a fraction: rounded to the nearest, ties to even.
    rounded = (quotient + 12582912.0) - 12582912.0
    rounded = tl.where(rounded == rounded, rounded, 0.0)
    tl.store(codes + row * OUT + i, rounded.to(tl.int8), mask=i < OUT)  # behind the last input 0
    tl.store(scales + row, step)
