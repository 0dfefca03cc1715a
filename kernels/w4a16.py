"""Linear layer with 4-bit weights in groups, activations as they come.

    y[m, n] = sum_k x[m, k] * w[n, k] + bias[n]
    w[n, k] = (code[n, k] - 8) * s[k // g, n] + z[k // g, n]        with z = (8 - zero) * s

The second line is AWQ's (code - zero) * s (arXiv 2306.00978) in the form that torch's op for few rows computes. Both
scales are float32: products of a 4-bit integer and a 16-bit scale are exact there, so a weight has the value that its
file means, whatever the dtype of the activations. They cost 64 bits per group, a half bit per weight at g = 128.

One packed copy of the codes serves few rows and many. `pack_w4a16` makes it in one of two forms, `W4A16Layout`:

- plain: (N, ceil(K / 2)) bytes, the even k in the low nibble. Any size, any device.
- tiled: the layout of torch's op. Blocks of 64, 32 or 16 rows, as the instruction set has it; in a block one k after
  the other, of each k all rows, two to a byte. Which two is a fixed permutation, read off the op's own packer, so that
  many rows can be dequantised from the same bytes.

Sizes: M tokens, N outputs, K inputs, G groups of g inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

_TILED_GROUPS = (32, 64, 128, 256)  # what torch's op takes
_TILED_ROWS = 16  # its N is a multiple of that
_PROBE_ROWS = 64  # no instruction set has larger blocks
_BLOCK_ENTRIES = 1 << 21  # weights dequantised at a time: 8 MiB of float32


@dataclass(frozen=True)
class W4A16Layout:
    """How packed codes are to be read."""

    in_features: int
    group_size: int
    # Tiled: for each row of a whole block, and of the rest behind the last one, which nibble of a k it is: those below
    # half of the rows are low nibbles of the bytes in order, the others high ones. Empty for a plain layout.
    block: tuple[int, ...] = ()
    rest: tuple[int, ...] = ()

    @property
    def tiled(self) -> bool:
        return bool(self.block)


def pack_w4a16(
    codes: Tensor, scales: Tensor, zeros: Tensor, in_features: int, group_size: int
) -> tuple[Tensor, Tensor, W4A16Layout]:
    """Turns a matrix into what `w4a16` reads, once, at load.

    codes (N, ceil(K / 2)) uint8, the even k in the low nibble; scales (N, G) of floats, zeros (N, G) of 0..15; the last
    group may be shorter. Returns qweight uint8, (N, ceil(K / 2)) if plain and flat if tiled, scale_zero (G, N, 2)
    float32, and the layout. Holds 5 bytes per weight while it works.
    """
    N, K = codes.shape[0], in_features
    wide = scales.float()
    scale_zero = torch.stack((wide, (8 - zeros.float()) * wide), dim=2).transpose(0, 1).contiguous()
    fits = N % _TILED_ROWS == 0 and K % 2 == 0 and K % group_size == 0 and group_size in _TILED_GROUPS
    if codes.device.type != "cpu" or not fits:
        return codes.contiguous(), scale_zero, W4A16Layout(K, group_size)
    tiles = torch.ops.aten._convert_weight_to_int4pack_for_cpu(_unpack_plain(codes, K).int(), 1)
    size = _block_rows()
    block = _nibble_of_row(size)
    rest = _nibble_of_row(N % size) if N % size else ()
    return tiles.flatten(), scale_zero, W4A16Layout(K, group_size, block, rest)


def w4a16(x: Tensor, qweight: Tensor, scale_zero: Tensor, layout: W4A16Layout, bias: Tensor | None = None) -> Tensor:
    """x (..., K) float32, bfloat16 or float16 -> (..., N) in x's dtype, accumulated in float32.

    qweight, scale_zero (G, N, 2) and layout are those of `pack_w4a16`; bias (N,) of any float or None. Few rows are
    computed in float32 throughout; for many the weights are rounded to x's dtype. Raises ValueError where shapes or
    dtypes differ.
    """
    _check(x, qweight, scale_zero, layout, bias)
    rows = x.reshape(-1, layout.in_features)  # (M, K)
    if layout.tiled and _is_few(rows.shape[0]):
        out = _few_rows(rows, qweight, scale_zero, layout)
    else:
        out = _many_rows(rows, qweight, scale_zero, layout)
    if bias is not None:
        out = out + bias
    return out.to(x.dtype).reshape(*x.shape[:-1], scale_zero.shape[1])


def w4a16_ref(
    x: Tensor, qweight: Tensor, scale_zero: Tensor, layout: W4A16Layout, bias: Tensor | None = None
) -> Tensor:
    """The definition in float64, whole matrix at once."""
    _check(x, qweight, scale_zero, layout, bias)
    K, g = layout.in_features, layout.group_size
    codes = torch.cat([part for _, part in _codes_by_rows(qweight, scale_zero.shape[1], layout)], dim=1)  # (K, N)
    group = torch.arange(K, device=x.device) // g
    scale, zero = scale_zero.double()[group].unbind(dim=2)  # each (K, N)
    out = x.double() @ ((codes.double() - 8) * scale + zero)
    return out if bias is None else out + bias.double()


def _check(x: Tensor, qweight: Tensor, scale_zero: Tensor, layout: W4A16Layout, bias: Tensor | None) -> None:
    K, groups = layout.in_features, -(-layout.in_features // layout.group_size)
    if x.ndim < 1 or x.shape[-1] != K or not x.is_floating_point():
        raise ValueError(f"expected x (..., {K}) of floats, got {tuple(x.shape)} {x.dtype}")
    good = scale_zero.ndim == 3 and scale_zero.shape[0] == groups and scale_zero.shape[2] == 2
    if not good or scale_zero.dtype != torch.float32:
        raise ValueError(
            f"expected scale_zero ({groups}, N, 2) float32, got {tuple(scale_zero.shape)} {scale_zero.dtype}"
        )
    N = scale_zero.shape[1]
    packed = (N * (K // 2),) if layout.tiled else (N, -(-K // 2))
    if qweight.shape != packed or qweight.dtype != torch.uint8:
        raise ValueError(f"expected qweight {packed} uint8, got {tuple(qweight.shape)} {qweight.dtype}")
    if bias is not None and bias.shape != (N,):
        raise ValueError(f"expected bias ({N},), got {tuple(bias.shape)}")


# Few rows and many --------------------------------------------------------------------------------------------------


def _is_few(num_rows: int) -> bool:
    """Whether torch's op is used. It stays at one rate from 4 rows on, a bfloat16 product with its weights dequantised
    first overtakes it between 8 and 16 rows; measured for bfloat16 scales on one AVX-512 machine, not for float32.
    """
    return num_rows <= 12


def _few_rows(x: Tensor, qweight: Tensor, scale_zero: Tensor, layout: W4A16Layout) -> Tensor:
    """x (M, K) -> (M, N) float32. The op wants activations and scales of one dtype."""
    tiles = qweight.view(scale_zero.shape[1], layout.in_features // 2)
    out: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x.float(), tiles, layout.group_size, scale_zero)
    return out


def _many_rows(x: Tensor, qweight: Tensor, scale_zero: Tensor, layout: W4A16Layout) -> Tensor:
    """x (M, K) -> (M, N) in x's dtype; the weights of a few rows at a time exist in that dtype."""
    out = torch.empty(x.shape[0], scale_zero.shape[1], dtype=x.dtype, device=x.device)
    for start, codes in _codes_by_rows(qweight, scale_zero.shape[1], layout):
        rows = slice(start, start + codes.shape[1])
        weight = _dequantise(codes, scale_zero[:, rows], layout.group_size).to(x.dtype)  # (K, R)
        out[:, rows] = x @ weight
    return out


def _dequantise(codes: Tensor, scale_zero: Tensor, group_size: int) -> Tensor:
    """codes (K, R) uint8, scale_zero (G, R, 2) -> (K, R) float32."""
    K, R = codes.shape
    missing = -K % group_size  # of a shorter last group
    wide = F.pad(codes.float(), (0, 0, 0, missing)).view(-1, group_size, R)
    scale, zero = scale_zero.unbind(dim=2)  # each (G, R)
    return wide.sub_(8).mul_(scale[:, None]).add_(zero[:, None]).view(-1, R)[:K]


def _codes_by_rows(qweight: Tensor, num_rows: int, layout: W4A16Layout) -> Iterator[tuple[int, Tensor]]:
    """(first row, codes (K, R) uint8) for all rows in order, bounded in size."""
    K = layout.in_features
    if not layout.tiled:
        step = max(1, _BLOCK_ENTRIES // K)
        for start in range(0, num_rows, step):
            yield start, _unpack_plain(qweight[start : start + step], K).t()
        return
    size = len(layout.block)
    whole = num_rows // size * size
    step = max(1, _BLOCK_ENTRIES // (K * size)) * size
    for start in range(0, whole, step):
        stop = min(start + step, whole)
        yield start, _unpack_tiles(qweight[start * K // 2 : stop * K // 2], K, layout.block)
    if layout.rest:
        yield whole, _unpack_tiles(qweight[whole * K // 2 :], K, layout.rest)


def _unpack_plain(codes: Tensor, in_features: int) -> Tensor:
    """(N, ceil(K / 2)) uint8 -> (N, K) uint8."""
    return torch.stack((codes & 15, codes >> 4), dim=2).flatten(1)[:, :in_features]


def _unpack_tiles(tiles: Tensor, in_features: int, nibble_of_row: tuple[int, ...]) -> Tensor:
    """Whole blocks, flat uint8 -> (K, R) uint8, rows in order."""
    size = len(nibble_of_row)
    block = tiles.view(-1, in_features, size // 2)  # (blocks, K, size / 2)
    nibbles = torch.cat((block & 15, block >> 4), dim=2)  # (blocks, K, size)
    order = torch.tensor(nibble_of_row, device=tiles.device)
    return nibbles[:, :, order].transpose(0, 1).reshape(in_features, -1)


# The op's own layout ------------------------------------------------------------------------------------------------


def _probe(codes: Tensor) -> Tensor:
    """The nibbles of a packed matrix (N, 2) in the order of its bytes: (2, N), low nibbles first."""
    tiles = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int().contiguous(), 1).flatten()
    return torch.stack((tiles & 15, tiles >> 4))


def _block_rows() -> int:
    """Rows of a block on this machine: in a matrix of two columns, half a block's bytes lie before the second."""
    column = torch.tensor([[0, 1]]).expand(_PROBE_ROWS, 2)
    return 2 * int(_probe(column)[0].argmax())


def _nibble_of_row(num_rows: int) -> tuple[int, ...]:
    """Where each row of one block lies among the nibbles of a k, low ones of all bytes first."""
    row = torch.arange(num_rows)[:, None].expand(num_rows, 2)
    half = num_rows // 2  # bytes of one k
    found = (_probe(row % 16).int() + 16 * _probe(row // 16).int())[:, :half].flatten()  # nibble -> row
    return tuple(found.argsort().tolist())
