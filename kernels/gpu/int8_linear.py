"""Product of int8 codes with scales, bias and activation behind it; the kernel of `w8a8`.

    out[m, n] = f((sum_k a[m, k] * w[n, k]) * act_scale[m] * scale[n] + bias[n])        f: none, or one of `activation`

The sum is exact in int32 and never written: with K about 1000, writing and reading it costs as much as the product.
Sizes: M tokens, N outputs, K inputs.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .variant import Variant

ACTIVATIONS = {"": 0, "gelu": 1, "quick_gelu": 2, "silu": 3, "gelu_pytorch_tanh": 4}
ALIGNMENT = 16  # bytes at whose multiples rows begin; others could only be read byte by byte
_GROUP = 8  # blocks of rows that walk through the weights together, so that these stay in the L2 cache


def int8_linear(
    a: Tensor, act_scales: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, dtype: torch.dtype,
    activation: str = "",
) -> Tensor:  # fmt: skip
    """a (M, K), weight (N, K) int8 contiguous; act_scales (M,), scales (N,) float32; bias (N,) or None -> (M, N).

    K is a multiple of `ALIGNMENT`: weights are `padded` once, at load, and rows come so from `quantize_rows`.
    """
    (M, K), N = a.shape, weight.shape[0]
    if K % ALIGNMENT or weight.shape[1] != K:
        raise ValueError(f"expected K a multiple of {ALIGNMENT}, got {K} and {weight.shape[1]}")
    out = torch.empty(M, N, dtype=dtype, device=a.device)
    if M:
        rows, columns, depth, warps, stages = block_sizes(M)
        _int8_linear[(triton.cdiv(M, rows) * triton.cdiv(N, columns),)](
            a, act_scales, weight, scales, scales if bias is None else bias, out, M, N, K,
            **_constants(rows, columns, depth, bias is not None, activation), num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return out


def padded(codes: Tensor) -> Tensor:
    """(rows, K) -> (rows, K rounded up to a multiple of `ALIGNMENT`), the new columns 0."""
    more = -codes.shape[1] % ALIGNMENT
    return torch.nn.functional.pad(codes, (0, more)) if more else codes.contiguous()


def with_padding(codes: Tensor) -> Tensor:
    """The whole of `padded(codes)[:, :K]`, or, of a matrix that is no such view, a padded copy."""
    K = codes.shape[1]
    width = -(-K // ALIGNMENT) * ALIGNMENT
    if codes.stride() == (width, 1):
        return codes.as_strided((codes.shape[0], width), (width, 1))
    return padded(codes)


def block_sizes(M: int) -> tuple[int, int, int, int, int]:
    """(rows, columns, depth, warps, stages) of a program."""
    if M <= 16:
        return 16, 64, 128, 4, 4
    if M <= 64:
        return 64, 64, 128, 4, 3
    return 128, 128, 64, 8, 3


def variants() -> Iterator[Variant]:
    sizes = dict.fromkeys(("M", "N", "K"), "i32")
    for dtype in ("fp16", "bf16"):
        pointers = {
            "a": "*i8", "act_scales": "*fp32", "weight": "*i8", "scales": "*fp32", "bias": f"*{dtype}",
            "out": f"*{dtype}",
        }  # fmt: skip
        for M in (16, 64, 577):
            rows, columns, depth, warps, stages = block_sizes(M)
            for activation in ACTIVATIONS if M == 577 else ("",):
                yield Variant(
                    f"int8_linear rows={rows} {activation or 'plain'} {dtype}", _int8_linear, pointers | sizes,
                    _constants(rows, columns, depth, True, activation), warps, stages, frozenset(pointers) | {"K"},
                )  # fmt: skip


def _constants(rows: int, columns: int, depth: int, has_bias: bool, activation: str) -> dict[str, int | bool]:
    return {
        "ROWS": rows, "COLUMNS": columns, "DEPTH": depth, "GROUP": _GROUP, "HAS_BIAS": has_bias,
        "ACTIVATION": ACTIVATIONS[activation],
    }  # fmt: skip


@triton.jit
def _int8_linear(
    a, act_scales, weight, scales, bias, out, M, N, K,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr, HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    num_m, num_n = tl.cdiv(M, ROWS), tl.cdiv(N, COLUMNS)
    group = program // (GROUP * num_n)
    in_group = tl.minimum(num_m - group * GROUP, GROUP)
    block_m = group * GROUP + (program % (GROUP * num_n)) % in_group
    block_n = (program % (GROUP * num_n)) // in_group
    m = block_m * ROWS + tl.arange(0, ROWS)
    n = block_n * COLUMNS + tl.arange(0, COLUMNS)
    i = tl.arange(0, DEPTH)
    a_at = a + m[:, None].to(tl.int64) * K + i[None, :]
    w_at = weight + n[None, :].to(tl.int64) * K + i[:, None]
    total = tl.zeros((ROWS, COLUMNS), tl.int32)
    for start in range(0, K, DEPTH):
        inside = i < K - start
        left = tl.load(a_at + start, mask=(m < M)[:, None] & inside[None, :], other=0)
        right = tl.load(w_at + start, mask=(n < N)[None, :] & inside[:, None], other=0)
        total = tl.dot(left, right, acc=total, out_dtype=tl.int32)
    wide = total.to(tl.float32) * tl.load(act_scales + m, mask=m < M, other=0.0)[:, None]
    wide = wide * tl.load(scales + n, mask=n < N, other=0.0)[None, :]
    if HAS_BIAS:
        wide += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if ACTIVATION == 1:
        wide = 0.5 * wide * (1 + tl.erf(wide * 0.7071067811865476))
    elif ACTIVATION == 2:
        wide = wide / (1 + tl.exp(-1.702 * wide))
    elif ACTIVATION == 3:
        wide = wide / (1 + tl.exp(-wide))
    elif ACTIVATION == 4:  # 1 + tanh(u) = 2 sigmoid(2 u)
        wide = wide / (1 + tl.exp(-1.5957691216057308 * (wide + 0.044715 * wide * wide * wide)))
    at = out + m[:, None].to(tl.int64) * N + n[None, :]
    tl.store(at, wide.to(out.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])
