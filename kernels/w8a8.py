"""Linear layer with 8-bit weights and 8-bit activations.

    y[m, n] = (sum_k a[m, k] * w[n, k]) * act_scale[m] * scale[n] + bias[n]

a and act_scale are `quantize_rows` of the input, normalised before on request; an activation may follow. The sum is
exact in int32, the rest float32. On a CPU with tile registers (AMX) or AVX-512's VNNI all of it is machine code
(`cpu/int8_linear.py`); on one with other int8 instructions the weights are kept once, in the order that oneDNN
multiplies in (`pack_w8a8`): torch's own int8 product would bring them into that order at every call.
Source: SmoothQuant, arXiv 2211.10438. Sizes: M tokens, N outputs, K inputs.
"""

from __future__ import annotations

import functools
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F

from .activation import ACTIVATIONS, activation, activation_ref
from .backend import cpu_level, runs_triton
from .quantize_rows import RowNorm, quantize_rows, quantize_rows_ref

MAX_IN_FEATURES = (2**31 - 1) // (127 * 128)  # beyond it a sum may leave int32

_MACHINE_LEVELS = ("avx512", "amx")  # of a CPU, where there is machine code for all of it

_PRODUCT_ROWS = 4096  # int32 sums of as many rows exist at a time
_PACKED_ENTRIES = 1 << 19  # scaled sums at a time, 2 MB: read again from the cache, and no new pages at every call
_PACKED_ROWS = 128  # but as many rows at least: below, reading the weights again for each part costs more
_STEP_ENTRIES = 1 << 18  # entries that are scaled and rounded at a time

_CUDA_MULTIPLE = 8  # of K and N in torch's int8 product on CUDA
_CUDA_MIN_ROWS = 17


def pack_w8a8(codes: Tensor) -> Tensor:
    """codes (N, K) int8 -> what `w8a8` reads fastest on their device, once, at load.

    On a CPU with machine code (tiles, steps, 1024) int8, on another with int8 instructions an opaque tensor of oneDNN,
    of logical shape (K, N) and the same number of bytes (but for padding), which is neither copied nor read by other
    operations; for Triton the codes in rows of whole 16 bytes; elsewhere the codes.
    """
    if runs_triton(codes):
        from .gpu.int8_linear import padded

        return padded(codes)[:, : codes.shape[1]]
    if codes.device.type == "cpu" and cpu_level() in _MACHINE_LEVELS:
        tiles: Tensor = _machine().pack(codes)
        return tiles
    if codes.device.type == "cpu" and torch.cpu._is_vnni_supported():
        packed: Tensor = torch.ops.onednn.qlinear_prepack(codes.contiguous(), None)
        return packed
    return codes.contiguous()


def w8a8(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    bias: Tensor | None = None,
    *,
    shape: tuple[int, int] | None = None,
    norm: RowNorm | None = None,
    act: str = "",
) -> Tensor:
    """x (..., K) float32, bfloat16 or float16 -> (..., N) in x's dtype.

    weight (N, K) int8 or packed by `pack_w8a8`, K at most `MAX_IN_FEATURES`; scales (N,) float32; bias (N,) of any
    float or None; `shape` (N, K), which packed weights may not tell by themselves. `norm` is what x goes through
    before, `act` (a name of `activation`) what the sums go through behind: where Triton runs both in the kernels, in
    machine code the activation. Raises ValueError where shapes or dtypes differ, and for another name.
    """
    _check(x, weight, scales, bias, shape)
    if act and act not in ACTIVATIONS:
        raise ValueError(f"expected act one of {', '.join(ACTIVATIONS)}, got {act!r}")
    if weight.ndim == 3:
        tiled: Tensor = _machine().int8_linear(x if norm is None else norm(x), weight, scales, bias, cpu_level(), act)
        return tiled
    rows = x.reshape(-1, x.shape[-1])  # (M, K)
    if runs_triton(x) and not weight.is_mkldnn:
        from .gpu.int8_linear import int8_linear, with_padding

        weight = with_padding(weight)
        out = int8_linear(*quantize_rows(rows, norm, width=weight.shape[1]), weight, scales, bias, x.dtype, act)
        return out.reshape(*x.shape[:-1], scales.shape[0])
    out = _plain(rows, weight, scales, bias, norm).reshape(*x.shape[:-1], scales.shape[0])
    return activation(out, act) if act else out


def _plain(rows: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, norm: RowNorm | None) -> Tensor:
    """x (M, K) -> (M, N), by torch's operations."""
    codes, act_scales = quantize_rows(rows, norm)
    out = torch.empty(rows.shape[0], scales.shape[0], dtype=rows.dtype, device=rows.device)
    wide_bias = None if bias is None else bias.float()
    step = max(_PACKED_ROWS, _PACKED_ENTRIES // scales.shape[0]) if weight.is_mkldnn else _PRODUCT_ROWS
    for start in range(0, rows.shape[0], step):
        part = slice(start, start + step)
        if weight.is_mkldnn:
            product = _packed_product(codes[part], weight, scales)
            _finish(product, act_scales[part], None, wide_bias, out[part])
        else:
            _finish(_int8_product(codes[part], weight), act_scales[part], scales, wide_bias, out[part])
    return out


def _finish(product: Tensor, act_scales: Tensor, scales: Tensor | None, bias: Tensor | None, out: Tensor) -> None:
    """product (M, N) int32, or float32 and scaled by output -> out (M, N), a few rows at a time in float32."""
    step = max(1, _STEP_ENTRIES // out.shape[1]) if out.device.type == "cpu" else max(1, out.shape[0])
    for start in range(0, out.shape[0], step):
        part = slice(start, start + step)
        wide = product[part].float().mul_(act_scales[part, None])
        if scales is not None:
            wide.mul_(scales)
        out[part] = wide if bias is None else wide.add_(bias)


def w8a8_ref(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    bias: Tensor | None = None,
    *,
    shape: tuple[int, int] | None = None,
    norm: RowNorm | None = None,
    act: str = "",
) -> Tensor:
    """The definition in float64, of weights that are not packed."""
    _check(x, weight, scales, bias, shape)
    codes, act_scales = quantize_rows_ref(x.reshape(-1, x.shape[-1]), norm)
    inputs = codes.double() * act_scales.double()[:, None]
    out = inputs @ (weight.double() * scales.double()[:, None]).t()
    if bias is not None:
        out = out + bias.double()
    out = out.reshape(*x.shape[:-1], weight.shape[0])
    return activation_ref(out, act) if act else out


def _check(
    x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, shape: tuple[int, int] | None = None
) -> None:
    if weight.ndim == 3:
        if x.device != weight.device:  # machine code would take any address
            raise ValueError(f"expected x on {weight.device}, where the weights are, got {x.device}")
        shape = shape or (scales.numel(), x.shape[-1] if x.ndim else 0)
        packed = _machine().packed_shape(*shape)
        if weight.shape != packed or weight.dtype != torch.int8:
            raise ValueError(f"expected weight {packed} int8 for {shape}, got {tuple(weight.shape)} {weight.dtype}")
    elif weight.ndim == 2 and weight.dtype == torch.int8:
        N, K = weight.shape
        shape = (K, N) if weight.is_mkldnn else (N, K)  # oneDNN says it the other way round
    else:
        raise ValueError(f"expected weight (N, K) int8, got {tuple(weight.shape)} {weight.dtype}")
    if shape[1] > MAX_IN_FEATURES:
        raise ValueError(f"expected weight (N, K) int8 with K at most {MAX_IN_FEATURES}, got {shape}")
    N, K = shape
    if x.ndim < 1 or x.shape[-1] != K:
        raise ValueError(f"expected x (..., {K}), got {tuple(x.shape)}")
    if scales.shape != (N,) or scales.dtype != torch.float32:
        raise ValueError(f"expected scales ({N},) float32, got {tuple(scales.shape)} {scales.dtype}")
    if bias is not None and bias.shape != (N,):
        raise ValueError(f"expected bias ({N},), got {tuple(bias.shape)}")


@functools.cache
def _machine() -> ModuleType:
    """The machine code, which needs llvmlite."""
    from .cpu import int8_linear

    return int8_linear


def _packed_product(a: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    """a (M, K) int8, weight from `pack_w8a8` -> (M, N) float32: the exact sums, scaled by output."""
    no_shift = torch.zeros(scales.shape[0], dtype=torch.int32)
    out: Tensor = torch.ops.onednn.qlinear_pointwise(
        a, 1.0, 0, weight, scales, no_shift, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return out


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
