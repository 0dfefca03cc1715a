"""Linear layer with 8-bit weights and 8-bit activations.

    y[m, n] = (sum_k a[m, k] * w[n, k]) * act_scale[m] * scale[n] + bias[n]

a and act_scale are `quantize_rows` of the input. The sum is exact in int32, the rest float32.
Source: SmoothQuant, arXiv 2211.10438. Sizes: M tokens, N outputs, K inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .quantize_rows import quantize_rows, quantize_rows_ref

MAX_IN_FEATURES = (2**31 - 1) // (127 * 128)  # beyond it a sum may leave int32

_CUDA_MULTIPLE = 8  # of K and N in torch's int8 product on CUDA
_CUDA_MIN_ROWS = 17


def w8a8(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., K) float32, bfloat16 or float16 -> (..., N) in x's dtype.

    weight (N, K) int8, K at most `MAX_IN_FEATURES`; scales (N,) float32; bias (N,) of any float or None. Raises
    ValueError where shapes or dtypes differ.
    """
    _check(x, weight, scales, bias)
    rows = x.reshape(-1, x.shape[-1])  # (M, K)
    codes, act_scales = quantize_rows(rows)
    out = _int8_product(codes, weight).float()  # (M, N)
    out.mul_(act_scales[:, None]).mul_(scales)
    if bias is not None:
        out.add_(bias)
    return out.to(x.dtype).reshape(*x.shape[:-1], weight.shape[0])


def w8a8_ref(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """The definition in float64."""
    _check(x, weight, scales, bias)
    codes, act_scales = quantize_rows_ref(x.reshape(-1, x.shape[-1]))
    inputs = codes.double() * act_scales.double()[:, None]
    out = inputs @ (weight.double() * scales.double()[:, None]).t()
    if bias is not None:
        out = out + bias.double()
    return out.reshape(*x.shape[:-1], weight.shape[0])


def _check(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None) -> None:
    if weight.ndim != 2 or weight.dtype != torch.int8 or weight.shape[1] > MAX_IN_FEATURES:
        raise ValueError(
            f"expected weight (N, K) int8 with K at most {MAX_IN_FEATURES}, got {tuple(weight.shape)} {weight.dtype}"
        )
    N, K = weight.shape
    if x.ndim < 1 or x.shape[-1] != K:
        raise ValueError(f"expected x (..., {K}), got {tuple(x.shape)}")
    if scales.shape != (N,) or scales.dtype != torch.float32:
        raise ValueError(f"expected scales ({N},) float32, got {tuple(scales.shape)} {scales.dtype}")
    if bias is not None and bias.shape != (N,):
        raise ValueError(f"expected bias ({N},), got {tuple(bias.shape)}")


def _int8_product(a: Tensor, weight: Tensor) -> Tensor:
    """a (M, K), weight (N, K), both int8 -> (M, N) int32. On CUDA odd sizes are padded with zeros at each call."""
    if a.device.type != "cuda":
        if a.shape[1] == 1:  # torch 2.13 misreads a transposed matrix of one row on a CPU
            a, weight = F.pad(a, (0, 1)), F.pad(weight, (0, 1))
        return torch._int_mm(a, weight.t())
    (M, K), N = a.shape, weight.shape[0]
    more_k, more_n = -K % _CUDA_MULTIPLE, -N % _CUDA_MULTIPLE
    a = F.pad(a, (0, more_k, 0, max(0, _CUDA_MIN_ROWS - M)))
    if more_k or more_n:
        weight = F.pad(weight, (0, more_k, 0, more_n))
    return torch._int_mm(a, weight.t())[:M, :N]
