"""Linear layer with 4-bit weights in groups, activations as they come.

    y[m, n] = sum_k x[m, k] * w[n, k] + bias[n]
    w[n, k] = (code[n, k] - zero[n, k // g]) * scale[n, k // g]

The second line is AWQ's (arXiv 2306.00978). One packed copy of the codes serves few rows and many. `pack_w4a16` makes
it in one of three forms, `W4A16Layout.form`:

- "vectors": what the machine code for this processor reads (`cpu/int4_linear.py`), on a CPU where there is any.
- "words": what the Triton kernels read (`gpu/int4_linear.py`).
- "rows": (N, ceil(K / 2)) bytes, the even k in the low nibble. Any size, any device: some rows of weights at a time are
  dequantised in the dtype of the activations, each rounded once, and multiplied by torch.

Sizes: M tokens, N outputs, K inputs, G groups of g inputs.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F

from .backend import cpu_level, runs_triton

_WORD_GROUPS = (32, 64, 128)  # what the Triton kernels take
_BLOCK_ENTRIES = 1 << 21  # weights that are unpacked at a time, 4 MB of bfloat16
_SCALE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class W4A16Layout:
    """How a packed matrix is to be read."""

    out_features: int
    in_features: int
    group_size: int
    form: str = "rows"
    lop3: bool = False  # words that the kernel's form with assembly was seen to multiply rightly
    level: str = ""  # vectors: what of the processor is used, as `cpu_level` said when they were made

    @functools.cached_property
    def packed_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of qweight, scales and zeros, but for words."""
        if self.form == "vectors":
            return _machine().packed_shapes(self.out_features, self.in_features, self.group_size)
        groups = (self.out_features, -(-self.in_features // self.group_size))
        return (self.out_features, -(-self.in_features // 2)), groups, groups


def pack_w4a16(
    codes: Tensor, scales: Tensor, zeros: Tensor, in_features: int, group_size: int
) -> tuple[Tensor, Tensor, Tensor, W4A16Layout]:
    """Turns a matrix into what `w4a16` reads, once, at load.

    codes (N, ceil(K / 2)) uint8, the even k in the low nibble; scales (N, G) of floats, zeros (N, G) of 0..15; the last
    group may be shorter. Returns packed codes, scales, zeros and the layout; of the form "rows" the codes as they came,
    scales (N, G) float32 and zeros (N, G) uint8. On a CPU, groups of 32, 64, whole 128s or all inputs become vectors;
    where Triton runs, groups of 32, 64 and 128 become words: (N, ceil(K / 128) * 16) int32, scales (groups, N), zeros
    (groups, N) uint8, with the groups of the padding. Some thousand rows are unpacked at a time.
    """
    N, K = codes.shape[0], in_features
    if runs_triton(codes) and group_size in _WORD_GROUPS:
        return _pack_words(codes, scales, zeros, K, group_size)
    level = cpu_level() if codes.device.type == "cpu" else ""
    if level and _machine().takes(K, group_size):
        # Whole pairs of tiles, so that only the last part is padded.
        size = max(1, _BLOCK_ENTRIES // (K * _machine().PAIR)) * _machine().PAIR
        rows = zip(codes.split(size), _narrowed(scales).split(size), zeros.split(size), strict=True)
        parts = [_machine().pack(unpack_nibbles(c, K), s, z, group_size) for c, s, z in rows]
        packed, scales, zeros = (torch.cat(part) for part in zip(*parts, strict=True))
        return packed, scales, zeros, W4A16Layout(N, K, group_size, "vectors", level=level)
    return codes.contiguous(), scales.float(), zeros.contiguous(), W4A16Layout(N, K, group_size)


def w4a16(
    x: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor, layout: W4A16Layout, bias: Tensor | None = None
) -> Tensor:
    """x (..., K) float32, bfloat16 or float16 -> (..., N) in x's dtype, accumulated in float32.

    qweight, scales, zeros and layout are those of `pack_w4a16`; bias (N,) of any float or None. Raises ValueError where
    shapes or dtypes differ.
    """
    _check(x, qweight, scales, zeros, layout, bias)
    N, K, g = layout.out_features, layout.in_features, layout.group_size
    if layout.form == "vectors":  # first: a layer of one row takes some tenths of a millisecond
        out: Tensor = _machine().int4_linear(x, qweight, scales, zeros, N, g, bias, layout.level)
        return out
    rows = x.reshape(-1, K).contiguous()  # (M, K)
    if layout.form == "words":
        from .gpu.int4_linear import int4_linear as by_words

        out = by_words(rows, qweight, scales, zeros, g, bias, lop3=layout.lop3)
    else:
        out = _by_rows(rows, qweight, scales, zeros, layout, bias)
    return out.reshape(*x.shape[:-1], N)


def w4a16_ref(
    x: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor, layout: W4A16Layout, bias: Tensor | None = None
) -> Tensor:
    """The definition in float64, whole matrix at once."""
    _check(x, qweight, scales, zeros, layout, bias)
    group = torch.arange(layout.in_features, device=x.device) // layout.group_size
    scale, zero = (part.double()[:, group] for part in group_scales(scales, zeros, layout))  # each (N, K)
    out = x.double() @ ((unpack_w4a16(qweight, layout).double() - zero) * scale).t()
    return out if bias is None else out + bias.double()


def unpack_nibbles(packed: Tensor, in_features: int) -> Tensor:
    """(N, ceil(K / 2)) uint8, the even k in the low nibble -> codes (N, K) uint8."""
    return torch.stack((packed & 15, packed >> 4), dim=2).flatten(1)[:, :in_features]


def unpack_w4a16(qweight: Tensor, layout: W4A16Layout) -> Tensor:
    """The codes (N, K) uint8 of a packed matrix, all at once."""
    N, K = layout.out_features, layout.in_features
    if layout.form == "words":
        from .gpu.int4_linear import unpack_words

        return unpack_words(qweight, K)
    if layout.form == "vectors":
        codes: Tensor = _machine().unpack(qweight, N, K)
        return codes
    return unpack_nibbles(qweight, K)


def group_scales(scales: Tensor, zeros: Tensor, layout: W4A16Layout) -> tuple[Tensor, Tensor]:
    """Scales and zero points (N, groups) of a packed matrix; there may be groups of padding behind the G."""
    if layout.form == "words":
        return scales.t(), zeros.t()
    if layout.form == "vectors":
        by_row = _machine().by_row
        return by_row(scales, layout.out_features), by_row(zeros, layout.out_features)
    return scales, zeros


def _check(x: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor, layout: W4A16Layout, bias: Tensor | None) -> None:
    N, K = layout.out_features, layout.in_features
    if x.ndim < 1 or x.shape[-1] != K or not x.is_floating_point():
        raise ValueError(f"expected x (..., {K}) of floats, got {tuple(x.shape)} {x.dtype}")
    if bias is not None and bias.shape != (N,):
        raise ValueError(f"expected bias ({N},), got {tuple(bias.shape)}")
    if layout.form == "words":
        return
    if x.device != qweight.device:  # machine code would take any address
        raise ValueError(f"expected x on {qweight.device}, where the weights are, got {x.device}")
    packed = (qweight, scales, zeros)
    dtypes = qweight.dtype is zeros.dtype is torch.uint8 and scales.dtype in _SCALE_DTYPES
    if dtypes and (qweight.shape, scales.shape, zeros.shape) == layout.packed_shapes:
        return
    for name, part, shape in zip(("qweight", "scales", "zeros"), packed, layout.packed_shapes, strict=True):
        if part.shape != shape or part.dtype not in (_SCALE_DTYPES if part is scales else (torch.uint8,)):
            kind = "of floats" if part is scales else "uint8"
            raise ValueError(f"expected {name} {shape} {kind}, got {tuple(part.shape)} {part.dtype}")


@functools.cache
def _machine() -> ModuleType:
    """The machine code, which needs llvmlite."""
    from .cpu import int4_linear

    return int4_linear


def _pack_words(
    codes: Tensor, scales: Tensor, zeros: Tensor, in_features: int, group_size: int
) -> tuple[Tensor, Tensor, Tensor, W4A16Layout]:
    from .gpu.int4_linear import lop3_agrees, pack_scales, pack_words

    N = codes.shape[0]
    size = max(1, _BLOCK_ENTRIES // in_features)  # rows that are unpacked at a time
    words = torch.cat([pack_words(unpack_nibbles(part, in_features)) for part in codes.split(size)])
    scales, zeros = pack_scales(_narrowed(scales), zeros, in_features, group_size)
    lop3 = words.is_cuda and lop3_agrees(words, scales, zeros, group_size, in_features)
    return words, scales, zeros, W4A16Layout(N, in_features, group_size, "words", lop3)


def _narrowed(scales: Tensor) -> Tensor:
    """The same numbers in 16 bits, if they came from there."""
    for dtype in (torch.float16, torch.bfloat16):
        narrow = scales.to(dtype)
        if torch.equal(narrow.float(), scales.float()):
            return narrow
    return scales


def _by_rows(
    x: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor, layout: W4A16Layout, bias: Tensor | None
) -> Tensor:
    """x (M, K) -> (M, N) in x's dtype; the weights of a few outputs at a time exist in that dtype."""
    K, g = layout.in_features, layout.group_size
    out = torch.empty(x.shape[0], layout.out_features, dtype=x.dtype, device=x.device)
    step = max(1, _BLOCK_ENTRIES // K)
    for start in range(0, layout.out_features, step):
        rows = slice(start, start + step)
        codes = unpack_nibbles(qweight[rows], K)
        wide = F.pad(codes.float(), (0, -K % g)).view(codes.shape[0], -1, g)  # (R, G, g)
        weight = wide.sub_(zeros[rows, :, None]).mul_(scales[rows, :, None]).flatten(1)[:, :K].to(x.dtype)
        out[:, rows] = x @ weight.t()
    return out if bias is None else out.add_(bias)
