"""Linear layers with 4-bit weights in groups, in machine code.

    y[m, n] = sum_k x[m, k] * (code[n, k] - zero[n, k // g]) * scale[n, k // g] + bias[n]

Source: AWQ, arXiv 2306.00978. Sizes: M tokens, N outputs, K inputs, G groups of g inputs.

**Layout.** Outputs stand in tiles of 16, inputs in blocks of 128; the outputs are padded to two tiles, the inputs to a
block. A block of an output is one vector of 64 bytes: 32 words of 16 bits, of which word l holds the inputs 32 j + l in
its bits 4 j to 4 j + 3, j = 0..3. A shift of the vector by 4 j brings the codes of 32 neighbouring inputs down, and a
look-up among 16 numbers of bfloat16 (which minds no higher bits) makes weights of them: two instructions for 32.

**Few rows**, of bfloat16 on a processor with AVX-512, are sums of integers where groups are whole blocks. The inputs of
a block become multiples of a unit, the 2^-20th part of the power of 2 above the largest, in three digits of 8 bits,
which VNNI multiplies with the codes as they are: four products in each lane of an instruction. The sum of a block is
exact; zero point, unit and scale come to it after that. So no weight is rounded, and of an input half a unit at most is
lost: nothing, where it is more than a 4000th of the largest beside it.

Few rows otherwise look up code - zero, which bfloat16 has exactly, multiply it with the inputs and scale the sum of
each group; or do all of it in float32.

**Many rows** look up (code - zero) * scale, rounded once. With tile registers (AMX) up to 64 rows are multiplied as
soon as a block is made; for more, a panel of weights is made in a buffer that stays in the L2 cache and is multiplied
with all rows before the next. Without them, and in float32, panels go through torch's product.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from llvmlite import ir
from torch import Tensor
from torch.nn import functional as F

from .compiled import Compiled, Scratch
from .emit import (
    BF16,
    ELEMENTS,
    F32,
    I8,
    I16,
    I32,
    I64,
    VOID,
    Kernel,
    Value,
    as_float,
    lane_sums,
    size_of,
    transposed,
    vector,
    write_outputs,
)

TILE, BLOCK = 16, 128  # outputs of a tile, inputs of a block
_STEP = 32  # inputs of a look-up, and of one product of tiles
PAIR = 2 * TILE  # outputs are padded to it
_GROUPS = (32, 64)  # smaller than a block; others are whole blocks, or all inputs
_VECTOR = 64  # bytes
_AMX_TILE = 1024  # bytes of 16 x 32 bfloat16, or of 16 x 16 sums
_BLOCK_TILES = BLOCK // _STEP * _AMX_TILE  # bytes of a block of a tile, as bfloat16

_MOST = 15  # of a code, or a zero point

_DIGITS = 3  # of 8 bits
_DIGIT_BITS = 20  # that they hold: 128 products with codes up to 15 fill an int32
_RECORD_BYTES = (2 * _DIGITS + 1) * _VECTOR  # of a block of a row: its digits, and behind them its unit and its sum
_UNIT, _SUM = 2 * _DIGITS * _VECTOR, 2 * _DIGITS * _VECTOR + 4

_STREAMS = 8  # tiles in a unit of few rows; fewer where threads are many

_PREFETCHED = 2048  # bytes ahead: the processor's own prefetching stops at every page
_PANEL_ENTRIES = 1 << 21  # weights that torch's product takes at a time
_MOST_FUSED_ROWS = 64
_PANEL_PAIRS, _PANEL_BLOCKS = 16, 2  # 256 KB of weights, and inputs of 32 rows that stay in the L1 cache beside them
_MOST_ROWS = 1024  # at a time: beyond, sums and inputs come from memory, and making weights again costs less

_I16x16, _I16x32, _I32x16 = vector(I16, 16), vector(I16, 32), vector(I32, 16)
_F32x16, _BF16x32 = vector(F32, 16), vector(BF16, 32)

_scratch = Scratch()


def takes(in_features: int, group_size: int) -> bool:
    """Whether the layout has room for groups of that size."""
    return group_size in _GROUPS or group_size % BLOCK == 0 or group_size >= in_features


def pack(codes: Tensor, scales: Tensor, zeros: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """codes (N, K) uint8 of 0..15, scales (N, G) of floats, zeros (N, G) uint8 -> words (tiles, blocks, 16, 64) uint8,
    scales (tiles, groups, 16) as they came, zeros (tiles, groups, 16) uint8; the groups of the padding are zeros.
    Raises ValueError for a zero point above 15."""
    if zeros.numel() and int(zeros.max()) > _MOST:  # they choose a table, and none lies behind the last
        raise ValueError(f"expected zero points of 0..{_MOST}, got {int(zeros.max())}")
    N, K = codes.shape
    blocks, more = -(-K // BLOCK), (0, -K % BLOCK, 0, -N % PAIR)
    steps = F.pad(codes, more).view(-1, TILE, blocks, BLOCK // _STEP, _STEP).permute(0, 2, 1, 4, 3)
    words = (steps[..., ::2] | (steps[..., 1::2] << 4)).reshape(-1, blocks, TILE, _VECTOR).contiguous()
    groups = -(-blocks * BLOCK // group_size) if group_size < K else 1
    scales, zeros = (
        F.pad(part, (0, groups - part.shape[1], 0, -N % PAIR)).view(-1, TILE, groups).transpose(1, 2).contiguous()
        for part in (scales, zeros)
    )
    return words, scales, zeros


def packed_shapes(num_rows: int, in_features: int, group_size: int) -> tuple[tuple[int, ...], ...]:
    """Of what `pack` returns."""
    tiles, blocks = -(-num_rows // PAIR) * 2, -(-in_features // BLOCK)
    groups = -(-blocks * BLOCK // group_size) if group_size < in_features else 1
    return (tiles, blocks, TILE, _VECTOR), (tiles, groups, TILE), (tiles, groups, TILE)


def unpack(words: Tensor, num_rows: int, in_features: int) -> Tensor:
    """The codes (N, K) uint8 of `pack`."""
    tiles, blocks = words.shape[:2]
    halves = words.view(tiles, blocks, TILE, _STEP, 2)
    steps = torch.stack((halves & 15, halves >> 4), dim=-1).flatten(4)  # (tiles, blocks, 16, 32, 4)
    return steps.permute(0, 2, 1, 4, 3).reshape(tiles * TILE, blocks * BLOCK)[:num_rows, :in_features]


def by_row(part: Tensor, num_rows: int) -> Tensor:
    """scales or zeros of `pack` (tiles, groups, 16) -> (N, groups)."""
    return part.transpose(1, 2).flatten(0, 1)[:num_rows]


def int4_linear(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor,
    num_rows: int,
    group_size: int,
    bias: Tensor | None,
    of: str,
) -> Tensor:
    """x (..., K) float32, bfloat16 or float16; words, scales and zeros of `pack`; bias (N,) of any float or None; `of`
    a level of `compiled.LEVELS`. Returns (..., N = num_rows) in x's dtype, accumulated in float32.
    """
    x, K = x.contiguous(), x.shape[-1]
    rows = x.numel() // K
    out = torch.empty((*x.shape[:-1], num_rows), dtype=x.dtype)
    if rows == 0:
        return out
    padded = words.shape[0] * TILE
    wide = None if bias is None else F.pad(bias.float(), (0, padded - num_rows))
    # One group for all inputs holds those of the padding too.
    weight = (words, scales, zeros, group_size if group_size < K else words.shape[1] * BLOCK)
    arithmetic = of if x.dtype == torch.bfloat16 else "any"
    few = rows <= (1 if arithmetic == "amx" else 4)  # they cost more with each; tiles cost the same from 1 to 16
    if few and arithmetic != "any" and weight[3] % BLOCK == 0:
        _by_dots(x, rows, weight, wide, out, of)
        return out
    wide = torch.zeros(padded) if wide is None else wide
    x, flat = x.view(rows, K), out.view(rows, num_rows)
    if arithmetic == "amx" and not few:
        size = _even_parts(rows, _MOST_ROWS)
        for part, found in zip(x.split(size), flat.split(size), strict=True):
            _by_tiles(part, weight, wide, found)
    else:
        x = F.pad(x if arithmetic != "any" else x.float(), (0, -K % BLOCK))
        (_few if few else _by_torch)(x, weight, wide, flat, of)
    return out


_Weight = tuple[Tensor, Tensor, Tensor, int]
_Groups = tuple[int, torch.dtype]  # in a block, at least 1, and what their scales are: a kernel for each


def _group_numbers(weight: _Weight) -> tuple[int, int]:
    """Blocks of a group (1 if it is smaller) and groups, which say where the scale of a block stands."""
    return max(1, weight[3] // BLOCK), weight[1].shape[1]


def _few(x: Tensor, weight: _Weight, bias: Tensor, out: Tensor, of: str) -> None:
    words, scales, zeros, _ = weight
    rows = x.shape[0]
    kernel = _few_kernel(rows, x.dtype == torch.bfloat16, _groups_of(weight), out.dtype, of)
    kernel(
        words.shape[0] * _passes(rows), torch.get_num_threads(),
        *(part.data_ptr() for part in (x, words, scales, zeros, bias, out)),
        out.shape[1], words.shape[1], *_group_numbers(weight),
    )  # fmt: skip


def _by_dots(x: Tensor, rows: int, weight: _Weight, bias: Tensor | None, out: Tensor, of: str) -> None:
    words, scales, zeros, group_size = weight
    tiles, blocks = words.shape[:2]
    threads = torch.get_num_threads()
    streams = max(1, min(_STREAMS, tiles // (4 * threads)))
    sums = streams * rows * _VECTOR
    each = sums + rows * blocks * _RECORD_BYTES
    memory = torch.empty(each * threads, dtype=torch.uint8)
    _dot_kernel(rows, bias is not None, scales.dtype, of)(
        -(-tiles // streams), threads, x.data_ptr(), words.data_ptr(), scales.data_ptr(), zeros.data_ptr(),
        0 if bias is None else bias.data_ptr(), out.data_ptr(), out.shape[-1], blocks, group_size // BLOCK,
        scales.shape[1], x.shape[-1], memory.data_ptr(), each, sums, tiles, streams,
    )  # fmt: skip


def _by_tiles(x: Tensor, weight: _Weight, bias: Tensor, out: Tensor) -> None:
    words, scales, zeros, _ = weight
    (M, K), (tiles, blocks), threads = x.shape, words.shape[:2], torch.get_num_threads()
    row_tiles = -(-M // TILE)
    x_bytes = (row_tiles + row_tiles % 2) * blocks * _BLOCK_TILES
    if M <= _MOST_FUSED_ROWS:
        out_tiles = 2 if row_tiles <= 2 else 1
        units = tiles // out_tiles
        numbers: tuple[int, ...] = ()
        each = out_tiles * _BLOCK_TILES + out_tiles * row_tiles * _AMX_TILE
        kernel = _fused_kernel(out_tiles, row_tiles, _groups_of(weight), out.dtype)
    else:
        pairs = tiles // 2
        panel, chunk = max(1, min(_PANEL_PAIRS, pairs // threads)), min(_PANEL_BLOCKS, blocks)
        units = -(-pairs // panel)
        panel_bytes = panel * 2 * chunk * _BLOCK_TILES
        # Of one chunk, sums are done at once, and all rows use the same place.
        each = panel_bytes + (-(-M // PAIR) if chunk < blocks else 1) * panel * 4 * _AMX_TILE
        numbers = (pairs, panel, chunk, panel_bytes)
        kernel = _panel_kernel(_groups_of(weight), out.dtype)
    at, memory = _scratch.take(x_bytes + each * min(threads, units))
    _tile_rows_kernel()(row_tiles, threads, x.data_ptr(), at, M, blocks * BLOCK // _STEP, K)
    kernel(
        units, threads, at, *(part.data_ptr() for part in (words, scales, zeros, bias, out)),
        out.shape[1], blocks, *_group_numbers(weight), M, at + x_bytes, each, *numbers,
    )  # fmt: skip
    del memory


def _by_torch(x: Tensor, weight: _Weight, bias: Tensor, out: Tensor, of: str) -> None:
    """Weights in x's dtype, as many as are worth a call, and their product."""
    words, scales, zeros, _ = weight
    tiles, blocks = words.shape[:2]
    K = blocks * BLOCK
    size = max(1, min(tiles, _PANEL_ENTRIES // (TILE * K)))
    panel = torch.empty(size * TILE, K, dtype=x.dtype)
    kernel = _weights_kernel(x.dtype == torch.bfloat16, _groups_of(weight), of)
    for first in range(0, tiles, size):
        count, columns = min(size, tiles - first), slice(first * TILE, (first + size) * TILE)
        parts = (panel, words[first], scales[first], zeros[first])
        kernel(count, torch.get_num_threads(), *(part.data_ptr() for part in parts), blocks, *_group_numbers(weight))
        found = x @ panel[: min(count * TILE, out.shape[1] - columns.start)].t()
        out[:, columns] = found + bias[columns][: found.shape[1]]


def _even_parts(rows: int, most: int) -> int:
    """The size of the fewest equal parts, in whole pairs of tiles."""
    parts = -(-rows // most)
    return -(-rows // (parts * PAIR)) * PAIR


def _groups_of(weight: _Weight) -> _Groups:
    return max(1, BLOCK // weight[3]), weight[1].dtype


def _passes(rows: int) -> int:
    """How often a tile is taken, each time for a part of its outputs: sixteen sums fit into the registers."""
    return {1: 1, 2: 2}.get(rows, 4)


# Kernels ------------------------------------------------------------------------------------------------------------


@functools.cache
def _few_kernel(rows: int, short: bool, groups: _Groups, dtype: torch.dtype, of: str) -> Compiled:
    def write(module: ir.Module, name: str) -> None:
        _write_few(Kernel(module, name), rows, short, groups, ELEMENTS[dtype])

    return Compiled(write, "int4_few", of)


@functools.cache
def _dot_kernel(rows: int, biased: bool, scale_dtype: torch.dtype, of: str) -> Compiled:
    def write(module: ir.Module, name: str) -> None:
        _write_dots(Kernel(module, name), rows, biased, scale_dtype)

    return Compiled(write, "int4_dots", of)


@functools.cache
def _fused_kernel(out_tiles: int, row_tiles: int, groups: _Groups, dtype: torch.dtype) -> Compiled:
    def write(module: ir.Module, name: str) -> None:
        _write_fused(Kernel(module, name), out_tiles, row_tiles, groups, ELEMENTS[dtype])

    return Compiled(write, "int4_fused", "amx")


@functools.cache
def _panel_kernel(groups: _Groups, dtype: torch.dtype) -> Compiled:
    def write(module: ir.Module, name: str) -> None:
        _write_panels(Kernel(module, name), groups, ELEMENTS[dtype])

    return Compiled(write, "int4_panels", "amx")


@functools.cache
def _tile_rows_kernel() -> Compiled:
    return Compiled(lambda module, name: _write_tile_rows(Kernel(module, name)), "tile_rows", "amx")


@functools.cache
def _weights_kernel(short: bool, groups: _Groups, of: str) -> Compiled:
    def write(module: ir.Module, name: str) -> None:
        _write_weights(Kernel(module, name), short, groups)

    return Compiled(write, "int4_weights", of)


class _Codes:
    """Where a kernel finds the weights: addresses, how many blocks there are and how groups lie in them."""

    def __init__(self, k: Kernel, addresses: int, numbers: int, groups: _Groups) -> None:
        self.k = k
        self.words, self.scales, self.zeros = (k.address(addresses + i) for i in range(3))
        self.blocks, self.group_blocks, self.groups = (k.argument(numbers + i) for i in range(3))
        self.per_block, self.scale_type = groups[0], ELEMENTS[groups[1]]
        self.steps = BLOCK // _STEP // self.per_block  # of a group in a block

    def vectors(self, tile: Value, block: Value, first: Value | int = 0) -> Value:
        """The address of a block's vectors, from that output of the tile on."""
        return self.k.at(self.words, ((tile * self.blocks + block) * TILE + first) * _VECTOR)

    def group(self, tile: Value, block: Value, first: Value | int = 0) -> Value:
        """The index of the first scale and zero point of a block."""
        within = block // self.group_blocks if self.per_block == 1 else block * self.per_block
        return (tile * self.groups + within) * TILE + first

    def scale(self, at: Value, lanes: int = 0) -> Value:
        """One as float32, or so many, from that index on."""
        size = size_of(self.scale_type)
        bits = I32 if size == 4 else I16
        return as_float(self.k.load(self.scales, vector(bits, lanes) if lanes else bits, at * size), self.scale_type)

    def zero(self, at: Value) -> Value:
        return self.k.load(self.zeros, I8, at).to(I32)

    def table(self, at: Value) -> Value:
        """The sixteen weights that a group has, twice."""
        k = self.k
        codes = k.load(k.table("codes", list(range(16)), F32), _F32x16)
        zero, scale = self.zero(at).signed_to_float().splat(16), self.scale(at).splat(16)
        return ((codes - zero) * scale).to(BF16).bits(_I16x16).pick([lane % 16 for lane in range(32)])

    def ask_for(self, source: Value, outputs: int) -> None:
        """Prefetches what comes later than the vectors of so many outputs."""
        for o in range(outputs):
            self.k.prefetch(source, o * _VECTOR + _PREFETCHED)

    def parts(self, source: Value, group: Value, outputs: int) -> Iterator[tuple[int, Value, Value, range]]:
        """(output, its vector, where its scale is, its steps) for every group of a block."""
        self.ask_for(source, outputs)
        for o in range(outputs):
            vector = self.k.load(source, _I16x32, o * _VECTOR)
            for part in range(self.per_block):
                yield o, vector, group + (part * TILE + o), range(part * self.steps, (part + 1) * self.steps)


def _look_up(k: Kernel, words: Value, step: int, table: Value) -> Value:
    """Of 32 neighbouring inputs the entries of a table of 16 that stands there twice."""
    index = words >> 4 * step if step else words
    return k.call("llvm.x86.avx512.permvar.hi.512", _I16x32, table, index)


def _widened(k: Kernel, words: Value, step: int, scale: Value, shift: Value) -> list[Value]:
    """Of 32 neighbouring inputs the weights, in two vectors of float32; shift is -zero * scale."""
    codes = ((words >> 4 * step) if step else words) & 15
    halves = (codes.pick(range(start, start + 16)).to(I32).signed_to_float() for start in (0, 16))
    return [k.fma(half, scale.splat(16), shift.splat(16)) for half in halves]


def _write_few(k: Kernel, rows: int, short: bool, groups: _Groups, element: ir.Type) -> None:
    """Arguments: x, words, scales, zeros, bias, out; N, blocks, blocks of a group, groups."""
    xs, codes = k.address(3), _Codes(k, 4, 10, groups)
    bias, out, N = k.address(7), k.address(8), k.argument(9)
    outputs, size = TILE // _passes(rows), 2 if short else 4
    numbers = torch.arange(16).repeat(2) - torch.arange(16)[:, None]  # of each zero point, code - zero, twice
    exact = k.table("code_less_zero", numbers.bfloat16().view(torch.int16).flatten().tolist(), I16) if short else None
    with k.units() as unit:
        tile, part = unit // _passes(rows), unit % _passes(rows)
        first = part * outputs
        found = [[k.variable(k.fill(_F32x16, 0)) for _ in range(rows)] for _ in range(outputs)]
        with k.loop(0, codes.blocks) as block:
            inputs = [k.at(xs, (codes.blocks * r + block) * (BLOCK * size)) for r in range(rows)]
            source, group = codes.vectors(tile, block, first), codes.group(tile, block, first)
            for o, words, at, steps in codes.parts(source, group, outputs):
                scale, zero = codes.scale(at), codes.zero(at)
                if exact is not None:
                    table = k.load(exact, _I16x32, zero.to(I64) * _VECTOR)
                    sums = [k.fill(_F32x16, 0)] * rows
                    for step in steps:
                        weights = _look_up(k, words, step, table).bits(_BF16x32)
                        for r in range(rows):
                            x = k.load(inputs[r], _BF16x32, step * _STEP * size)
                            sums[r] = k.call("llvm.x86.avx512bf16.dpbf16ps.512", _F32x16, sums[r], weights, x)
                    for r in range(rows):
                        found[o][r].set(k.fma(sums[r], scale.splat(16), found[o][r].get()))
                    continue
                shift = zero.signed_to_float() * scale * -1
                for step in steps:
                    for half, weights in enumerate(_widened(k, words, step, scale, shift)):
                        for r in range(rows):
                            x = k.load(inputs[r], _F32x16, (step * _STEP + 16 * half) * size)
                            found[o][r].set(k.fma(weights, x, found[o][r].get()))
        for r in range(rows):
            sums_of_row = lane_sums([found[o][r].get() for o in range(outputs)])
            n = tile * TILE + first
            y = sums_of_row + k.load(bias, sums_of_row.type, n * 4)
            write_outputs(k, y, out, k.int(r), N, n, element)
    k.done()


def _write_dots(k: Kernel, rows: int, biased: bool, scale_dtype: torch.dtype) -> None:
    """Arguments: x, words, scales, zeros, bias, out; N, blocks, blocks of a group, groups, K; a thread's memory, its
    bytes, those of its sums; tiles, of these in a unit.

    The tiles of a unit take turns, a block each: they are streams through the memory, and while one crosses into a new
    page, where the processor's prefetching starts anew, the others flow.
    """
    given, codes = k.address(3), _Codes(k, 4, 10, (1, scale_dtype))
    bias, out, N, K = k.address(7), k.address(8), k.argument(9), k.argument(13)
    found = k.at(k.address(14), k.thread() * k.argument(15))
    records, tiles, streams = k.at(found, k.argument(16)), k.argument(17), k.argument(18)
    with k.loop(0, codes.blocks) as block:
        for r in range(rows):
            _write_record(k, k.at(given, K * (2 * r)), block, K, k.at(records, (block * rows + r) * _RECORD_BYTES))
    with k.units() as unit:
        first = unit * streams
        here = k.smaller(streams, tiles - first)
        with k.loop(0, here * rows) as i:
            k.store(k.fill(_F32x16, 0), found, i * _VECTOR)
        with k.loop(0, codes.blocks) as block, k.loop(0, here) as t:
            source, at = codes.vectors(first + t, block), codes.group(first + t, block)
            codes.ask_for(source, TILE)
            zeros = k.load(codes.zeros, vector(I8, TILE), at).to(I32)
            scales = codes.scale(at, TILE)
            for r in range(rows):
                record = k.at(records, (block * rows + r) * _RECORD_BYTES)
                sums = lane_sums(_dots(k, source, record)) - zeros * k.load(record, I32, _SUM).splat(TILE)
                wide = sums.signed_to_float() * k.load(record, F32, _UNIT).splat(TILE)
                place = k.at(found, (t * rows + r) * _VECTOR)
                k.store(k.fma(wide, scales, k.load(place, _F32x16)), place)
        with k.loop(0, here) as t:
            n = (first + t) * TILE
            for r in range(rows):
                y = k.load(found, _F32x16, (t * rows + r) * _VECTOR)
                write_outputs(k, y + k.load(bias, _F32x16, n * 4) if biased else y, out, k.int(r), N, n, BF16)
    k.done()


def _dots(k: Kernel, words: Value, digits: Value) -> Iterator[Value]:
    """For each output of a tile its codes times a record's digits, summed into 16 lanes."""
    for o in range(TILE):
        both = k.load(words, _I16x32, o * _VECTOR)
        codes = [(half & 0x0F0F).bits(_I32x16) for half in (both, both >> 4)]
        total = k.fill(_I32x16, 0)
        for digit in reversed(range(_DIGITS)):  # the high ones first
            if digit < _DIGITS - 1:
                total = total << 8
            for half, one in enumerate(codes):
                x = k.load(digits, _I32x16, (2 * digit + half) * _VECTOR)
                total = k.call("llvm.x86.avx512.vpdpbusd.512", _I32x16, total, one, x)
        yield total


def _write_record(k: Kernel, row: Value, block: Value, K: Value, to: Value) -> None:
    """A block of a row, as `_dots` wants it: per digit two vectors, whose bytes 2 l belong to the inputs l and 32 + l,
    their bytes 2 l + 1 to 64 + l and 96 + l, as in the words' low and high halves. Then the unit of the lowest digit,
    float32, and the sum of the block in it, int32.
    """
    bits = []
    for start in range(0, BLOCK, TILE):
        first = block * BLOCK + start
        left = (first < K).choose(K - first, k.int(0))
        bits.append(k.load_first(k.at(row, first * 2), _I16x16, left).to(I32))
    # Without its sign a float is ordered as its bits are, and a NaN is above all.
    largest = k.reduced(functools.reduce(k.larger, [part & 0x7FFF for part in bits]), k.larger)
    exponent = k.larger(largest >> 7, k.fill(I32, _DIGIT_BITS))
    unit = ((exponent - (_DIGIT_BITS - 1)) << 23).bits(F32)
    # What is no number, or has no end, shows in every output.
    k.store((exponent < 255).choose(unit, k.fill(I32, 0x7FC00000).bits(F32)), to, _UNIT)
    # Beside 1.5 * 2^23 a float has no fraction: adding rounds to even, and the last bits are the integer.
    per_unit = ((k.fill(I32, 254 + _DIGIT_BITS - 1) - exponent) << 23).bits(F32).splat(TILE)
    border = k.fill(_F32x16, 1.5 * 2**23)
    wide = [k.fma((part << 16).bits(_F32x16), per_unit, border).bits(_I32x16) for part in bits]
    integers = [part - border.bits(_I32x16) for part in wide]
    k.store(k.reduced(functools.reduce(Value.__add__, integers), Value.__add__), to, _SUM)
    for digit in range(_DIGITS):
        # With this added, the bytes of a number are its digits from -128 to 127, each 128 too large.
        raw = [(part + 0x808080) >> 8 * digit for part in integers]
        for half in (0, 1):
            low, high = (raw[2 * step : 2 * step + 2] for step in (half, half + 2))  # steps of 32 inputs
            pairs = [(((a & 255) | ((b & 255) << 8)) ^ 0x8080).to(I16) for a, b in zip(low, high, strict=True)]
            k.store(pairs[0].shuffle(pairs[1], range(_STEP)), to, (2 * digit + half) * _VECTOR)


def _write_fused(k: Kernel, out_tiles: int, row_tiles: int, groups: _Groups, element: ir.Type) -> None:
    """Few tiles of rows: sums stay in the tile registers over all inputs, blocks of weights in the L1 cache.

    Arguments: x in tiles, words, scales, zeros, bias, out; N, blocks, blocks of a group, groups, M; a thread's memory.
    """
    xs, codes = k.address(3), _Codes(k, 4, 10, groups)
    bias, out, N, M = k.address(7), k.address(8), k.argument(9), k.argument(13)
    buffer = k.at(k.address(14), k.thread() * k.argument(15))
    k.configure_tiles()
    with k.units() as unit:
        for number in range(out_tiles * row_tiles):
            k.tile("zero", number)
        with k.loop(0, codes.blocks) as block:
            for a in range(out_tiles):
                tile = unit * out_tiles + a
                _make_tiles(codes, tile, block, k.at(buffer, a * _BLOCK_TILES))
            for step in range(BLOCK // _STEP):
                rows = [
                    k.at(xs, (codes.blocks * b + block) * _BLOCK_TILES + step * _AMX_TILE) for b in range(row_tiles)
                ]
                _multiply_step(k, [k.at(buffer, a * _BLOCK_TILES + step * _AMX_TILE) for a in range(out_tiles)], rows)
        place = k.at(buffer, out_tiles * _BLOCK_TILES)
        for number in range(out_tiles * row_tiles):
            k.tile("stored64", number, k.at(place, number * _AMX_TILE), _VECTOR)
        _finish_tiles(k, place, out_tiles, row_tiles, bias, unit * (out_tiles * TILE), out, k.int(0), M, N, element)
    k.call("llvm.x86.tilerelease", VOID)
    k.done()


def _write_panels(k: Kernel, groups: _Groups, element: ir.Type) -> None:
    """Arguments as of the fused kernel, then pairs of tiles, pairs in a panel, blocks in a panel, its bytes."""
    xs, codes = k.address(3), _Codes(k, 4, 10, groups)
    bias, out, N, M = k.address(7), k.address(8), k.argument(9), k.argument(13)
    pairs, panel, chunk = (k.argument(i) for i in (16, 17, 18))
    buffer = k.at(k.address(14), k.thread() * k.argument(15))
    sums = k.at(buffer, k.argument(19))
    blocks = codes.blocks
    rows_apart = (chunk < blocks).to(I64) * panel  # see `_by_tiles`
    k.configure_tiles()
    with k.units() as unit:
        first_pair = unit * panel
        here = k.smaller(panel, pairs - first_pair)
        with k.loop(0, (blocks + chunk - 1) // chunk) as number:
            start = number * chunk
            count = k.smaller(chunk, blocks - start)
            with k.loop(0, here * 2) as t, k.loop(0, count) as b:
                _make_tiles(codes, first_pair * 2 + t, start + b, k.at(buffer, (t * chunk + b) * _BLOCK_TILES))
            with k.loop(0, (M + (PAIR - 1)) // PAIR) as rows, k.loop(0, here) as pair:
                place = k.at(sums, (rows * rows_apart + pair) * (4 * _AMX_TILE))
                x = [k.at(xs, ((rows * 2 + b) * blocks + start) * _BLOCK_TILES) for b in (0, 1)]
                w = [k.at(buffer, (pair * 2 + a) * chunk * _BLOCK_TILES) for a in (0, 1)]
                with k.either(M - rows * PAIR >= TILE + 1) as (two, one):
                    for branch, row_tiles in ((two, 2), (one, 1)):
                        with branch:
                            _multiply_chunk(k, w, x[:row_tiles], start, count, place)
                            with k.when(start + count >= blocks):
                                n = (first_pair + pair) * PAIR
                                _finish_tiles(k, place, 2, row_tiles, bias, n, out, rows * PAIR, M, N, element)
    k.call("llvm.x86.tilerelease", VOID)
    k.done()


def _make_tiles(codes: _Codes, tile: Value, block: Value, to: Value) -> None:
    """A block as four tiles of 16 outputs x 32 inputs."""
    k, source = codes.k, codes.vectors(tile, block)
    for o, words, at, steps in codes.parts(source, codes.group(tile, block), TILE):
        table = codes.table(at)
        for step in steps:
            k.store(_look_up(k, words, step, table), to, step * _AMX_TILE + o * _VECTOR)


def _multiply_chunk(k: Kernel, w: list[Value], x: list[Value], start: Value, count: Value, place: Value) -> None:
    """Two tiles of outputs x one or two of rows, over the inputs of a chunk; sums go on from the one before."""
    numbers = range(2 * len(x))
    with k.either(start.equals(0)) as (first, later):
        with first:
            for number in numbers:
                k.tile("zero", number)
        with later:
            for number in numbers:
                k.tile("loadd64", number, k.at(place, number * _AMX_TILE), _VECTOR)
    with k.loop(0, count * (BLOCK // _STEP)) as step:
        at = step * _AMX_TILE
        _multiply_step(k, [k.at(one, at) for one in w], [k.at(one, at) for one in x])
    for number in numbers:
        k.tile("stored64", number, k.at(place, number * _AMX_TILE), _VECTOR)


def _multiply_step(k: Kernel, w: list[Value], x: list[Value]) -> None:
    """32 inputs of tiles of outputs and of rows: sums in registers 0 to 3, in the order of outputs, then rows."""
    for b in range(len(x)):
        k.tile("loadd64", 6 + b % 2, x[b], _VECTOR)
        for a in range(len(w)):
            if b == 0:
                k.tile("loadd64", 4 + a, w[a], _VECTOR)
            k.tile_product("dpbf16ps", a * len(x) + b, 4 + a, 6 + b % 2)


def _finish_tiles(
    k: Kernel, place: Value, out_tiles: int, row_tiles: int, bias: Value, first: Value, out: Value, row: Value,
    M: Value, N: Value, element: ir.Type,
) -> None:  # fmt: skip
    """Tiles of sums, 16 outputs x 16 rows, to rows of outputs."""
    size = size_of(element)
    with k.loop(0, k.int(row_tiles)) as b, k.loop(0, k.int(out_tiles)) as a:
        top, n = row + b * TILE, first + a * TILE
        tile = k.at(place, (a * row_tiles + b) * _AMX_TILE)
        added = k.load(bias, _F32x16, n * 4)
        rows = [sums + added for sums in transposed([k.load(tile, _F32x16, i * _VECTOR) for i in range(TILE)])]
        with k.either((M >= top + TILE) & (N >= n + TILE)) as (whole, part):
            with whole:
                for r, y in enumerate(rows):
                    k.store(y.to(element), out, ((top + r) * N + n) * size)
            with part:
                for r, y in enumerate(rows):
                    with k.when(top + r < M):
                        write_outputs(k, y, out, top + r, N, n, element)


def _write_tile_rows(k: Kernel) -> None:
    """bfloat16 rows as tiles of 16 pairs of inputs x 16 rows; what lies beyond rows and inputs is 0.

    Arguments: x, tiles; M, steps of 32 inputs, K.
    """
    given, made, M, steps, K = k.address(3), k.address(4), k.argument(5), k.argument(6), k.argument(7)
    with k.units() as tile, k.loop(0, steps) as step:
        rows, start = [], step * _STEP
        for r in range(TILE):
            row = tile * TILE + r
            rows.append(k.variable(k.fill(_I32x16, 0)))
            with k.when(row < M):
                source = k.at(given, (row * K + start) * 2)
                with k.either(K >= start + _STEP) as (all_of_them, some):
                    with all_of_them:
                        rows[r].set(k.load(source, _I32x16))
                    with some, k.when(start < K):
                        rows[r].set(k.load_first(source, _I16x32, K - start).bits(_I32x16))
        for pair, values in enumerate(transposed([row.get() for row in rows])):
            k.store(values, made, (tile * steps + step) * _AMX_TILE + pair * _VECTOR)
    k.done()


def _write_weights(k: Kernel, short: bool, groups: _Groups) -> None:
    """A tile's weights as rows, in bfloat16 or float32. Arguments: rows, words, scales, zeros; as for the others."""
    made, codes = k.address(3), _Codes(k, 4, 7, groups)
    size = 2 if short else 4
    with k.units() as tile, k.loop(0, codes.blocks) as block:
        for o, words, at, steps in codes.parts(codes.vectors(tile, block), codes.group(tile, block), TILE):
            row = k.at(made, ((tile * TILE + o) * codes.blocks + block) * (BLOCK * size))
            if short:
                table = codes.table(at)
                for step in steps:
                    k.store(_look_up(k, words, step, table), row, step * _STEP * size)
                continue
            scale = codes.scale(at)
            shift = codes.zero(at).signed_to_float() * scale * -1
            for step in steps:
                for half, weights in enumerate(_widened(k, words, step, scale, shift)):
                    k.store(weights, row, (step * _STEP + 16 * half) * size)
    k.done()
