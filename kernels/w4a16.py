"""Linear layer with 4-bit weights in groups, activations as they come.

    y[m, n] = sum_k x[m, k] * w[n, k] + bias[n]
    w[n, k] = (code[n, k] - 8) * s[k // g, n] + z[k // g, n]        with z = (8 - zero) * s

The second line is AWQ's (code - zero) * s (arXiv 2306.00978) in the form that torch's op for few rows computes. That
op is only fast where activations and scales are bfloat16, so a scale is kept as a sum of two: s = s0 + s1, exact for
scales of 16 bits, within 2^-16 for float32 ones. Few rows see w = (code - zero) * s0 exactly: each weight off by one
rounding to bfloat16. Many rows see (code - zero) * s, rounded once to the dtype of the activations. They cost 64 bits
per group, a half bit per weight at g = 128.

One packed copy of the codes serves few rows and many. `pack_w4a16` makes it in one of three forms, `W4A16Layout`:

- plain: (N, ceil(K / 2)) bytes, the even k in the low nibble. Any size, any device.
- tiled: the layout of torch's op. Blocks of 64, 32 or 16 rows, as the instruction set has it; in a block one k after
  the other, of each k all rows, two to a byte. Which two is a fixed permutation, read off the op's own packer, so that
  many rows can be dequantised from the same bytes.
- words: what the Triton kernels read (`gpu/int4_linear.py`), with scales as they are in the file and zero points.

Sizes: M tokens, N outputs, K inputs, G groups of g inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .backend import runs_triton

_WORD_GROUPS = (32, 64, 128)  # what the Triton kernels take
_TILED_GROUPS = (32, 64, 128, 256)  # what torch's op takes
_TILED_ROWS = 16  # its N is a multiple of that
_PROBE_ROWS = 64  # no instruction set has larger blocks

# Measured on a Xeon with AMX and 2 MB of L2 cache a core (`docs/kernels.md`).
_FEW_ROWS = 40  # torch's op takes time in proportion to the rows from 4 on; dequantising once overtakes it here
_BLOCK_ENTRIES = 1 << 21  # weights dequantised at a time, 4 MB of bfloat16: smaller blocks cost calls, not memory
_STEP_ENTRIES = 1 << 17  # of these, as many are float32 at a time, 512 KB, so that the four passes meet in the L2 cache
_MOST_SHARES = 8  # both are for one thread and grow with their number, up to here: a call on little work is all waiting


@dataclass(frozen=True)
class W4A16Layout:
    """How packed codes are to be read."""

    in_features: int
    group_size: int
    # Tiled: for each row of a whole block, and of the rest behind the last one, which nibble of a k it is: those below
    # half of the rows are low nibbles of the bytes in order, the others high ones. Empty for a plain layout.
    block: tuple[int, ...] = ()
    rest: tuple[int, ...] = ()
    symmetric: bool = False  # all zeros are 8: z is 0
    words: bool = False
    lop3: bool = False  # words that the kernel's form with assembly was seen to multiply rightly

    @property
    def tiled(self) -> bool:
        return bool(self.block)


def pack_w4a16(
    codes: Tensor, scales: Tensor, zeros: Tensor, in_features: int, group_size: int
) -> tuple[Tensor, Tensor, Tensor, W4A16Layout]:
    """Turns a matrix into what `w4a16` reads, once, at load.

    codes (N, ceil(K / 2)) uint8, the even k in the low nibble; scales (N, G) of floats, zeros (N, G) of 0..15; the last
    group may be shorter. Returns qweight uint8, (N, ceil(K / 2)) if plain and flat if tiled; scale_zero (G, N, 2)
    bfloat16, the s0 and z0 of torch's op; remainder (2, G, N) bfloat16, s - s0 and (8 - zero) * s0 - z0; and the
    layout. Holds 5 bytes per weight while it works. Where Triton runs, groups of 32, 64 and 128 become words:
    (N, ceil(K / 128) * 16) int32, scales (groups, N) and zeros (groups, N) uint8, with the groups of the padding.
    """
    N, K = codes.shape[0], in_features
    if runs_triton(codes) and group_size in _WORD_GROUPS:
        return _pack_words(codes, scales, zeros, K, group_size)
    wide, from_eight = scales.float().t(), 8 - zeros.float().t()  # (G, N)
    scale = wide.bfloat16()
    zero = from_eight * scale.float()  # exact: 4 bits times 8
    scale_zero = torch.stack((scale, zero.bfloat16()), dim=2)
    remainder = torch.stack((wide - scale.float(), zero - zero.bfloat16().float())).bfloat16()
    symmetric = not bool(from_eight.any())
    fits = N % _TILED_ROWS == 0 and K % 2 == 0 and K % group_size == 0 and group_size in _TILED_GROUPS
    if codes.device.type != "cpu" or not fits:
        return codes.contiguous(), scale_zero, remainder, W4A16Layout(K, group_size, symmetric=symmetric)
    tiles = torch.ops.aten._convert_weight_to_int4pack_for_cpu(unpack_nibbles(codes, K).int(), 1)
    size = _block_rows()
    block = _nibble_of_row(size)
    rest = _nibble_of_row(N % size) if N % size else ()
    return tiles.flatten(), scale_zero, remainder, W4A16Layout(K, group_size, block, rest, symmetric)


def w4a16(
    x: Tensor,
    qweight: Tensor,
    scale_zero: Tensor,
    remainder: Tensor,
    layout: W4A16Layout,
    bias: Tensor | None = None,
) -> Tensor:
    """x (..., K) float32, bfloat16 or float16 -> (..., N) in x's dtype, accumulated in float32.

    qweight, scale_zero (G, N, 2), remainder (2, G, N) and layout are those of `pack_w4a16`; bias (N,) of any float or
    None. Few rows of bfloat16 go through torch's op, many (and other dtypes) through dequantised blocks. Raises
    ValueError where shapes or dtypes differ.
    """
    if layout.words:
        return _by_words(x, qweight, scale_zero, remainder, layout, bias)
    _check(x, qweight, scale_zero, remainder, layout, bias)
    rows = x.reshape(-1, layout.in_features)  # (M, K)
    few = layout.tiled and x.dtype == torch.bfloat16 and is_few(rows.shape[0])
    out = (_few_rows if few else _many_rows)(rows, qweight, scale_zero, remainder, layout, bias)
    return out.reshape(*x.shape[:-1], scale_zero.shape[1])


def w4a16_ref(
    x: Tensor,
    qweight: Tensor,
    scale_zero: Tensor,
    remainder: Tensor,
    layout: W4A16Layout,
    bias: Tensor | None = None,
) -> Tensor:
    """The definition in float64, whole matrix at once."""
    K, g = layout.in_features, layout.group_size
    group = torch.arange(K, device=x.device) // g
    if layout.words:
        wide = scale_zero.double()
        scale, zero = (part[group].t() for part in (wide, -remainder.double() * wide))
    else:
        _check(x, qweight, scale_zero, remainder, layout, bias)
        scale, zero = (part.double()[group].t() for part in group_scales(scale_zero, remainder))  # each (N, K)
    codes = unpack_w4a16(qweight, scale_zero.shape[1], layout)
    out = x.double() @ (codes.double() * scale + zero).t()
    return out if bias is None else out + bias.double()


def is_few(num_rows: int) -> bool:
    """Whether torch's op serves that many rows of bfloat16."""
    return num_rows <= _FEW_ROWS


def unpack_nibbles(packed: Tensor, in_features: int) -> Tensor:
    """(N, ceil(K / 2)) uint8, the even k in the low nibble -> codes (N, K) uint8."""
    return torch.stack((packed & 15, packed >> 4), dim=2).flatten(1)[:, :in_features]


def unpack_w4a16(qweight: Tensor, num_rows: int, layout: W4A16Layout) -> Tensor:
    """The codes (N, K) uint8 of a packed matrix, all at once."""
    K = layout.in_features
    if layout.words:
        from .gpu.int4_linear import unpack_words

        return unpack_words(qweight, K)
    if not layout.tiled:
        return unpack_nibbles(qweight, K)
    parts = []
    for _, tiles, nibble_of_row in tile_runs(qweight, num_rows, layout):
        nibbles = torch.cat((tiles & 15, tiles >> 4), dim=2)  # (B, K, size)
        parts.append(nibbles[:, :, list(nibble_of_row)].transpose(1, 2).flatten(0, 1))
    return torch.cat(parts)


def group_scales(scale_zero: Tensor, remainder: Tensor) -> tuple[Tensor, Tensor]:
    """scale_zero (G, R, 2), remainder (2, G, R) of any rows -> (G, R) float32 scale, zero: w = code * scale + zero."""
    rounded = scale_zero[..., 0].float()
    scale = rounded + remainder[0].float()
    # The quotient is 8 - zero, a small integer; of a scale of 0 it says nothing and is not needed.
    from_eight = (scale_zero[..., 1].float() + remainder[1].float()).div_(rounded.masked_fill(rounded == 0, 1))
    return scale, from_eight.sub_(8).mul_(scale)


def _check(
    x: Tensor, qweight: Tensor, scale_zero: Tensor, remainder: Tensor, layout: W4A16Layout, bias: Tensor | None
) -> None:
    K, groups = layout.in_features, -(-layout.in_features // layout.group_size)
    if x.ndim < 1 or x.shape[-1] != K or not x.is_floating_point():
        raise ValueError(f"expected x (..., {K}) of floats, got {tuple(x.shape)} {x.dtype}")
    good = scale_zero.ndim == 3 and scale_zero.shape[0] == groups and scale_zero.shape[2] == 2
    if not good or scale_zero.dtype != torch.bfloat16:
        raise ValueError(
            f"expected scale_zero ({groups}, N, 2) bfloat16, got {tuple(scale_zero.shape)} {scale_zero.dtype}"
        )
    N = scale_zero.shape[1]
    if remainder.shape != (2, groups, N) or remainder.dtype != torch.bfloat16:
        raise ValueError(
            f"expected remainder (2, {groups}, {N}) bfloat16, got {tuple(remainder.shape)} {remainder.dtype}"
        )
    packed = (N * (K // 2),) if layout.tiled else (N, -(-K // 2))
    if qweight.shape != packed or qweight.dtype != torch.uint8:
        raise ValueError(f"expected qweight {packed} uint8, got {tuple(qweight.shape)} {qweight.dtype}")
    if bias is not None and bias.shape != (N,):
        raise ValueError(f"expected bias ({N},), got {tuple(bias.shape)}")


def _pack_words(
    codes: Tensor, scales: Tensor, zeros: Tensor, in_features: int, group_size: int
) -> tuple[Tensor, Tensor, Tensor, W4A16Layout]:
    from .gpu.int4_linear import lop3_agrees, pack_scales, pack_words

    size = max(1, _BLOCK_ENTRIES // in_features)  # rows that are unpacked at a time
    words = torch.cat([pack_words(unpack_nibbles(part, in_features)) for part in codes.split(size)])
    symmetric = bool((zeros == 8).all())
    scales, zeros = pack_scales(_narrowed(scales), zeros, in_features, group_size)
    lop3 = words.is_cuda and lop3_agrees(words, scales, zeros, group_size, in_features)
    return words, scales, zeros, W4A16Layout(in_features, group_size, symmetric=symmetric, words=True, lop3=lop3)


def _narrowed(scales: Tensor) -> Tensor:
    """The same numbers in 16 bits, if they came from there."""
    for dtype in (torch.float16, torch.bfloat16):
        narrow = scales.to(dtype)
        if torch.equal(narrow.float(), scales.float()):
            return narrow
    return scales


def _by_words(
    x: Tensor, words: Tensor, scales: Tensor, zeros: Tensor, layout: W4A16Layout, bias: Tensor | None
) -> Tensor:
    from .gpu.int4_linear import int4_linear

    K, N = layout.in_features, words.shape[0]
    if x.ndim < 1 or x.shape[-1] != K or not x.is_floating_point():
        raise ValueError(f"expected x (..., {K}) of floats, got {tuple(x.shape)} {x.dtype}")
    if bias is not None and bias.shape != (N,):
        raise ValueError(f"expected bias ({N},), got {tuple(bias.shape)}")
    out = int4_linear(x.reshape(-1, K).contiguous(), words, scales, zeros, layout.group_size, bias, lop3=layout.lop3)
    return out.reshape(*x.shape[:-1], N)


# Few rows and many --------------------------------------------------------------------------------------------------


def _few_rows(
    x: Tensor, qweight: Tensor, scale_zero: Tensor, remainder: Tensor, layout: W4A16Layout, bias: Tensor | None
) -> Tensor:
    """x (M, K) bfloat16 -> (M, N) bfloat16. What the op's rounded z lack is added as a small product over groups."""
    tiles = qweight.view(scale_zero.shape[1], layout.in_features // 2)
    out: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x, tiles, layout.group_size, scale_zero)
    if layout.symmetric and bias is None:
        return out
    out = out.float()
    if not layout.symmetric:
        out.add_(x.unflatten(1, (-1, layout.group_size)).sum(dim=2) @ remainder[1])
    return (out if bias is None else out.add_(bias)).bfloat16()


def _many_rows(
    x: Tensor, qweight: Tensor, scale_zero: Tensor, remainder: Tensor, layout: W4A16Layout, bias: Tensor | None
) -> Tensor:
    """x (M, K) -> (M, N) in x's dtype; the weights of a few outputs at a time exist in that dtype."""
    out = torch.empty(x.shape[0], scale_zero.shape[1], dtype=x.dtype, device=x.device)
    x = x.contiguous()
    if not layout.tiled:
        _plain_rows(x, qweight, scale_zero, remainder, layout, out)
    else:
        _tiled_rows(x, qweight, scale_zero, remainder, layout, out)
    return out if bias is None else out.add_(bias)


def _plain_rows(
    x: Tensor, qweight: Tensor, scale_zero: Tensor, remainder: Tensor, layout: W4A16Layout, out: Tensor
) -> None:
    K, g = layout.in_features, layout.group_size
    step = max(1, _BLOCK_ENTRIES // K)
    for start in range(0, qweight.shape[0], step):
        rows = slice(start, start + step)
        scale, zero = (part.t()[:, :, None] for part in group_scales(scale_zero[:, rows], remainder[:, :, rows]))
        codes = unpack_nibbles(qweight[rows], K)
        wide = F.pad(codes.float(), (0, -K % g)).view(codes.shape[0], -1, g)  # (R, G, g)
        weight = wide.mul_(scale).add_(zero).flatten(1)[:, :K].to(x.dtype)
        out[:, rows] = x @ weight.t()


def tile_runs(qweight: Tensor, num_rows: int, layout: W4A16Layout) -> Iterator[tuple[slice, Tensor, tuple[int, ...]]]:
    """(rows, tiles (B, K, size / 2), their `nibble_of_row`): the whole blocks, then what is left."""
    K = layout.in_features
    whole = num_rows // len(layout.block) * len(layout.block)
    for rows, nibble_of_row in ((slice(0, whole), layout.block), (slice(whole, num_rows), layout.rest)):
        if rows.stop > rows.start:
            tiles = qweight[rows.start * K // 2 : rows.stop * K // 2]
            yield rows, tiles.view(-1, K, len(nibble_of_row) // 2), nibble_of_row


def by_nibble(values: Tensor, nibble_of_row: tuple[int, ...]) -> Tensor:
    """values (G, B * size) by rows -> (2, G, B * size / 2): those of the low nibbles, those of the high ones."""
    blocks = values.unflatten(1, (-1, len(nibble_of_row)))  # (G, B, size)
    if not _in_order(nibble_of_row):
        blocks = blocks[:, :, torch.tensor(nibble_of_row).argsort()]
    return blocks.unflatten(2, (2, -1)).permute(2, 0, 1, 3).flatten(2)


def by_row(values: Tensor, nibble_of_row: tuple[int, ...]) -> Tensor:
    """values (M, B, 2, size / 2), low nibbles first -> (M, B * size) by rows."""
    blocks = values.flatten(2)
    return (blocks if _in_order(nibble_of_row) else blocks[:, :, list(nibble_of_row)]).flatten(1)


def _in_order(nibble_of_row: tuple[int, ...]) -> bool:
    return nibble_of_row == tuple(range(len(nibble_of_row)))


def _tiled_rows(
    x: Tensor, qweight: Tensor, scale_zero: Tensor, remainder: Tensor, layout: W4A16Layout, out: Tensor
) -> None:
    K, groups = layout.in_features, group_scales(scale_zero, remainder)
    for rows, tiles, nibble_of_row in tile_runs(qweight, out.shape[1], layout):
        scale, zero = (by_nibble(part[:, rows], nibble_of_row) for part in groups)
        scale[1] *= 1 / 16  # a high nibble is used where it stands, as 16 * code
        num_blocks, _, half = tiles.shape
        found = torch.empty(x.shape[0], num_blocks, 2, half, dtype=x.dtype)
        step = max(1, _shares() * _BLOCK_ENTRIES // (K * half * 2))
        block = _WeightBlock(min(step, num_blocks), K, half, layout.group_size, x.dtype)
        product = torch.empty(x.shape[0], block.weight.shape[1], dtype=x.dtype)
        for start in range(0, num_blocks, step):
            stop = min(start + step, num_blocks)
            if stop - start != block.num_tiles:  # the last one
                block = _WeightBlock(stop - start, K, half, layout.group_size, x.dtype)
                product = torch.empty(x.shape[0], block.weight.shape[1], dtype=x.dtype)
            columns = slice(start * half, stop * half)
            block.fill(tiles[start:stop], scale[:, :, None, columns], zero[:, :, None, columns])
            torch.mm(x, block.weight, out=product)
            found[:, start:stop].copy_(product.view(x.shape[0], 2, stop - start, half).transpose(1, 2))
        out[:, rows] = by_row(found, nibble_of_row)


def _shares() -> int:
    return min(torch.get_num_threads(), _MOST_SHARES)


class _WeightBlock:
    """The weights of a few tiles, dequantised. Memory and views serve one block after the other.

    Four passes over each weight, in steps that stay in the cache: take the nibble, widen it, scale and shift it, round
    it. In torch without a compiler these are four calls, of which the last is the slowest.
    """

    def __init__(self, num_tiles: int, in_features: int, half: int, group_size: int, dtype: torch.dtype) -> None:
        K, C = in_features, num_tiles * half  # bytes of one k
        self.num_tiles = num_tiles
        self.weight = torch.empty(K, 2 * C, dtype=dtype)  # low nibbles first
        self._packed = torch.empty(K, C, dtype=torch.uint8)
        size = min(K, max(1, _shares() * _STEP_ENTRIES // (C * group_size)) * group_size)
        self._groups = size // group_size
        codes, wide = torch.empty(size, C, dtype=torch.uint8), torch.empty(size, C)
        self._steps = [
            (packed, codes[: len(packed)], wide[: len(packed)], wide[: len(packed)].view(-1, group_size, C), halves)
            for packed, *halves in zip(
                self._packed.split(size), self.weight[:, :C].split(size), self.weight[:, C:].split(size), strict=True
            )
        ]

    def fill(self, tiles: Tensor, scale: Tensor, zero: Tensor) -> None:
        """tiles (B, K, size / 2) uint8, scale and zero (2, G, 1, B * size / 2) float32."""
        torch.cat(tiles.unbind(0), dim=1, out=self._packed)  # of each k the bytes of all tiles
        for half, mask in enumerate((0x0F, 0xF0)):
            parts = zip(self._steps, scale[half].split(self._groups), zero[half].split(self._groups), strict=True)
            for (packed, codes, wide, by_group, halves), step_scale, step_zero in parts:
                wide.copy_(torch.bitwise_and(packed, mask, out=codes))
                torch.addcmul(step_zero, by_group, step_scale, out=by_group)
                halves[half].copy_(wide)


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
