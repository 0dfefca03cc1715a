"""Linear layers with 8-bit weights and activations, in machine code: with tile registers (AMX), or AVX-512's VNNI.

    y[m, n] = (sum_k a[m, k] * w[n, k]) * act_scale[m] * scale[n] + bias[n]

with a and act_scale of x's rows as in `quantize_rows`. Source: SmoothQuant, arXiv 2211.10438. Sizes: M tokens, N
outputs, K inputs.

**Layout.** Outputs stand in tiles of 16, padded to two of them, inputs in steps of 64. A step of a tile is 1024 bytes:
16 times four neighbouring inputs of each of the 16 outputs, as the tile registers want their second operand.

Rows are quantised into tiles of 16 x 64, in two passes over each row, of which the second finds it in the L1 cache.
Sums of 32 rows and 32 outputs stay in four tile registers over 512 inputs, while those of the next 32 outputs wait in
the L1 cache beside the rows: these come from the L2 cache once for both. Of more than 4,096 inputs one section passes
after the other, so that a panel of weights in the L2 cache is wide enough for rows that come from memory. Without tile
registers sums of 8 rows stay in 16 vectors over all inputs. They are scaled and rounded from the L1 cache.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

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
    Variable,
    as_float,
    size_of,
    vector,
    write_outputs,
)

TILE, STEP = 16, 64  # outputs and rows of a tile, inputs of a product of tiles
PAIR = 2 * TILE
_TILE_BYTES = 1024  # of 16 x 64 codes, or of 16 x 16 sums
_VECTOR = 64  # bytes
_PREFETCHED = 4096  # bytes ahead: the processor's own prefetching stops at every page
_PANEL_BYTES = 1 << 20  # of weights, which stay in the L2 cache while all rows pass
_SECTION = 64  # steps at a time, of which eight pairs of tiles fit into a panel
_FEW_ROWS, _FEW_BYTES = 128, 1 << 18  # few rows pass soon, and the next weights may come
_LARGEST = 127.0
_TINY = 2.0**-100  # a scale near the smallest numbers
_DOT_ROWS = 8
_PLACE = 4 * _TILE_BYTES  # of sums: two tiles of rows, two of outputs
_TOGETHER, _CHUNK = 2, 8  # pairs of tiles, and steps, for which 16 KB of rows stay in the L1 cache

_F32x16 = vector(F32, 16)

_scratch = Scratch()


def pack(codes: Tensor) -> Tensor:
    """codes (N, K) int8 -> (tiles, steps, 1024) int8; what is padded is 0."""
    padded = F.pad(codes, (0, -codes.shape[1] % STEP, 0, -codes.shape[0] % PAIR))
    steps = padded.shape[1] // STEP
    return padded.view(-1, TILE, steps, TILE, 4).permute(0, 2, 3, 1, 4).reshape(-1, steps, _TILE_BYTES).contiguous()


def unpack(tiles: Tensor, num_rows: int, in_features: int) -> Tensor:
    """The codes (N, K) int8 of `pack`."""
    count, steps = tiles.shape[:2]
    rows = tiles.view(count, steps, TILE, TILE, 4).permute(0, 3, 1, 2, 4).reshape(count * TILE, steps * STEP)
    return rows[:num_rows, :in_features]


def packed_shape(num_rows: int, in_features: int) -> tuple[int, int, int]:
    """Of what `pack` returns."""
    return -(-num_rows // PAIR) * 2, -(-in_features // STEP), _TILE_BYTES


def int8_linear(x: Tensor, tiles: Tensor, scales: Tensor, bias: Tensor | None, of: str, act: str = "") -> Tensor:
    """x (..., K) float32, bfloat16 or float16; tiles of `pack`; scales (N,) float32; bias (N,) of these dtypes or None;
    `of` is "avx512" or "amx"; `act` a name of `activation`, of what the outputs go through before they are rounded.
    Returns (..., N) in x's dtype.
    """
    x, scales, K, N, (count, steps, _) = x.contiguous(), scales.contiguous(), x.shape[-1], scales.shape[0], tiles.shape
    M = x.numel() // K
    out = torch.empty((*x.shape[:-1], N), dtype=x.dtype)
    if M == 0:
        return out
    threads, row_tiles, pairs = torch.get_num_threads(), -(-M // TILE), count // 2
    # Of long inputs only a section at a time, so that panels of weights stay wide; sums wait until all have passed.
    section = -(-steps // -(-steps // _SECTION)) if row_tiles > 2 and of == "amx" else steps
    panel_bytes = 0 if row_tiles <= 2 else _FEW_BYTES if M <= _FEW_ROWS else _PANEL_BYTES
    most = max(1, panel_bytes // (PAIR * STEP * section))
    panel = max(1, min(most, pairs // threads))
    units = -(-pairs // panel)
    if bias is not None:
        bias = bias.contiguous() if bias.dtype in ELEMENTS else bias.float()
    code_bytes, scale_bytes = (row_tiles + row_tiles % 2) * steps * _TILE_BYTES, (row_tiles + 1) * _VECTOR
    each = (_TOGETHER if section == steps else -(-row_tiles // 2) * panel) * _PLACE
    at, memory = _scratch.take(code_bytes + scale_bytes + each * min(threads, units))
    scales_at = at + code_bytes
    _quantise_kernel(x.dtype, of)(row_tiles, threads, x.data_ptr(), at, scales_at, M, K, steps)
    _product_kernel(x.dtype, None if bias is None else bias.dtype, of, act)(
        units, threads, at, scales_at, tiles.data_ptr(), scales.data_ptr(), 0 if bias is None else bias.data_ptr(),
        out.data_ptr(), M, N, steps, pairs, panel, scales_at + scale_bytes, each, section,
    )  # fmt: skip
    del memory
    return out


@functools.cache
def _quantise_kernel(dtype: torch.dtype, of: str) -> Compiled:
    def write(module: ir.Module, name: str) -> None:
        _write_quantise(Kernel(module, name), ELEMENTS[dtype], of)

    return Compiled(write, "quantise", of)


@functools.cache
def _product_kernel(dtype: torch.dtype, bias: torch.dtype | None, of: str, act: str) -> Compiled:
    def write(module: ir.Module, name: str) -> None:
        _write_product(Kernel(module, name), ELEMENTS[dtype], None if bias is None else ELEMENTS[bias], of, act)

    return Compiled(write, "int8_product", of)


def _write_quantise(k: Kernel, element: ir.Type, of: str) -> None:
    """Rows to codes in tiles, and their scales. Arguments: x, tiles, scales; M, K, steps."""
    given, made, scales = (k.address(i) for i in (3, 4, 5))
    M, K, steps = (k.argument(i) for i in (6, 7, 8))
    size = size_of(element)
    integer, lanes = (I32, 16) if size == 4 else (I16, 32)
    # Without its sign a float is ordered as its bits are, and a NaN is above all.
    magnitude = k.fill(vector(integer, lanes), (1 << (8 * size - 1)) - 1)
    whole = K - K % lanes
    with k.units() as tile, k.loop(0, k.smaller(k.int(TILE), M - tile * TILE)) as r:
        row = tile * TILE + r
        source = k.at(given, row * K * size)
        most = k.variable(k.fill(vector(integer, lanes), 0))
        with k.loop(0, whole, lanes) as at:
            k.prefetch(source, at * size + _PREFETCHED)
            most.set(k.larger(most.get(), k.load(source, vector(integer, lanes), at * size) & magnitude))
        with k.when(whole < K):
            rest = k.load_first(k.at(source, whole * size), vector(integer, lanes), K - whole)
            most.set(k.larger(most.get(), rest & magnitude))
        values = most.get()
        while lanes_left := values.type.count // 2:
            values = k.larger(values.pick(range(lanes_left)), values.pick(range(lanes_left, 2 * lanes_left)))
        largest = as_float(values, element).lane(0)
        scale = largest / _LARGEST
        scale = scale.equals(0.0).choose(k.fill(F32, 1.0), scale)
        k.store(scale, scales, row * 4)
        flipped = k.fill(vector(I8, 16), 0 if of == "amx" else 128)  # 128 more, as `_multiply_dots` wants
        to = k.at(made, tile * steps * _TILE_BYTES + r * _VECTOR)
        with k.either(scale >= _TINY) as (ordinary, tiny):
            for branch, is_tiny in ((ordinary, False), (tiny, True)):
                with branch, k.loop(0, steps) as step:
                    for part in range(0, STEP, 16):
                        start, place = step * STEP + part, k.at(to, step * _TILE_BYTES + part)
                        with k.either(K >= start + 16) as (all_of_them, some):
                            with all_of_them:
                                x = as_float(k.load(source, vector(integer, 16), start * size), element)
                                k.store(_codes(k, x, scale, is_tiny) ^ flipped, place)
                            with some:
                                left = (start < K).choose(K - start, k.int(0))
                                bits = k.load_first(k.at(source, start * size), vector(integer, 16), left)
                                k.store(_codes(k, as_float(bits, element), scale, is_tiny) ^ flipped, place)
    k.done()


def _codes(k: Kernel, x: Value, scale: Value, is_tiny: bool) -> Value:
    """round(x / scale) as the division would be rounded: by the reciprocal, and once more for what it missed.

    Of a row that is no number the codes are any: the scale carries it.
    """
    if is_tiny:  # has no reciprocal: both sides are lifted, which is exact
        x, scale = x * 2.0**64, scale * 2.0**64
    divisor, reciprocal = scale.splat(16), (k.fill(F32, 1.0) / scale).splat(16)
    quotient = x * reciprocal
    quotient = k.fma(k.fma(quotient * -1.0, divisor, x), reciprocal, quotient)
    if is_tiny:  # a subnormal scale is coarse
        top, bottom = (k.fill(_F32x16, number) for number in (_LARGEST, -_LARGEST))
        quotient = (quotient < top).choose(quotient, top)
        quotient = (bottom < quotient).choose(quotient, bottom)
    # Beside 1.5 * 2^23 a float has no fraction: adding rounds to even, and the last bits are the integer.
    return (quotient + 1.5 * 2**23).bits(vector(I32, 16)).to(I8)


def _write_product(k: Kernel, element: ir.Type, bias_element: ir.Type | None, of: str, act: str) -> None:
    """Arguments: codes in tiles, their scales, weights, scales, bias, out; M, N, steps, pairs of tiles, of these in a
    panel; a thread's memory, its bytes; steps in a section."""
    xs, words, scales, bias = (k.address(i) for i in (3, 5, 6, 7))
    M, N, steps, pairs, panel = (k.argument(i) for i in range(9, 14))
    place = k.at(k.address(14), k.thread() * k.argument(15))
    section = k.argument(16)
    apart = (section < steps).to(I64)  # see `int8_linear`
    row_block = PAIR if of == "amx" else _DOT_ROWS
    if of == "amx":
        k.configure_tiles()
    with k.units() as unit, k.loop(0, (steps + section - 1) // section) as number:
        first = unit * panel
        last = k.smaller(first + panel, pairs)
        top_step = number * section
        end_step = k.smaller(top_step + section, steps)
        with k.loop(0, (M + (row_block - 1)) // row_block) as block, k.loop(first, last, _TOGETHER) as begin:
            top, end = block * row_block, k.smaller(begin + _TOGETHER, last)
            sums_of_begin = k.at(place, (block * panel + (begin - first)) * apart * _PLACE)
            if of == "amx":
                x = [k.at(xs, (block * 2 + a) * steps * _TILE_BYTES) for a in (0, 1)]
                with k.loop(top_step, end_step, _CHUNK) as start, k.loop(begin, end) as pair:
                    w = [k.at(words, (pair * 2 + b) * steps * _TILE_BYTES) for b in (0, 1)]
                    sums, stop = k.at(sums_of_begin, (pair - begin) * _PLACE), k.smaller(start + _CHUNK, end_step)
                    with k.either(M - top >= TILE + 1) as (two, one):
                        with two:
                            # The next rows come from memory. Four pairs ask for a quarter of their lines each.
                            behind = steps * (2 * _TILE_BYTES) + (pair - first) * (_TILE_BYTES // 4)
                            soon = [k.at(rows, behind) for rows in x]
                            with k.either(pair - first < 4) as (early, late):
                                with early:
                                    _multiply_tiles(k, x, w, start, stop, sums, soon)
                                with late:
                                    _multiply_tiles(k, x, w, start, stop, sums)
                        with one:
                            _multiply_tiles(k, x[:1], w, start, stop, sums)
            with k.when(end_step >= steps), k.loop(begin, end) as pair:
                sums = k.at(sums_of_begin, (pair - begin) * _PLACE)
                if of != "amx":
                    x_row = k.at(xs, top // TILE * steps * _TILE_BYTES + top % TILE * _VECTOR)
                    w = [k.at(words, (pair * 2 + b) * steps * _TILE_BYTES) for b in (0, 1)]
                    _multiply_dots(k, x_row, w, steps, sums)
                rows = k.smaller(k.int(row_block), M - top)
                with k.either(N >= (pair + 1) * PAIR) as branches:
                    for branch, whole in zip(branches, (True, False), strict=True):
                        with branch:
                            columns = [pair * PAIR + b * TILE for b in (0, 1)]
                            factors = [_columns(k, scales, F32, n, N, whole=whole) for n in columns]
                            more = [_columns(k, bias, bias_element, n, N, whole=whole) for n in columns]
                            _finish(k, sums, top, rows, pair, [*factors, *more], element, act, whole=whole)
    if of == "amx":
        k.call("llvm.x86.tilerelease", VOID)
    k.done()


def _columns(k: Kernel, of: Value, element: ir.Type | None, first: Value, N: Value, *, whole: bool) -> Value:
    """Sixteen numbers of N as float32, 0 behind the last; of None all are 0."""
    if element is None:
        return k.fill(_F32x16, 0)
    size = size_of(element)
    bits, at = vector(I32 if size == 4 else I16, TILE), k.at(of, first * size)
    if whole:
        return as_float(k.load(at, bits), element)
    return as_float(k.load_first(at, bits, (first < N).choose(N - first, k.int(0))), element)


def _finish(
    k: Kernel, place: Value, top: Value, rows: Value, pair: Value, added: list[Value], element: ir.Type,
    act: str, *, whole: bool,
) -> None:  # fmt: skip
    """Sums of some rows and of a pair of tiles to outputs; `added` are two vectors of scales and two of biases."""
    act_scales, out, N = k.address(4), k.address(8), k.argument(10)
    with k.loop(0, rows) as r:
        act_scale = k.load(act_scales, F32, (top + r) * 4).splat(16)
        at = (r // TILE) * (2 * _TILE_BYTES) + (r % TILE) * _VECTOR
        y = []
        for b in (0, 1):
            sums = k.load(place, vector(I32, 16), at + b * _TILE_BYTES).signed_to_float()
            y.append(_activated(k, k.fma(sums * added[b], act_scale, added[2 + b]), act))
        if not whole:
            for b in (0, 1):
                write_outputs(k, y[b], out, top + r, N, (pair * 2 + b) * TILE, element)
        elif element == BF16:
            rounded = k.call("llvm.x86.avx512bf16.cvtne2ps2bf16.512", vector(BF16, 32), y[1], y[0])
            k.store(rounded, out, ((top + r) * N + pair * PAIR) * 2)
        else:
            both = y[0].shuffle(y[1], range(PAIR)).to(element)
            k.store(both, out, ((top + r) * N + pair * PAIR) * size_of(element))


def _activated(k: Kernel, x: Value, act: str) -> Value:
    """`activation` of that name, "" for none."""
    if not act:
        return x
    if act == "gelu":
        return x * 0.5 * (k.erf(x * math.sqrt(0.5)) + 1)
    if act == "gelu_pytorch_tanh":  # (1 + tanh u) / 2 is the sigmoid of 2 u
        return x * k.sigmoid((x * x * 0.044715 + 1) * x * (2 * math.sqrt(2 / math.pi)))
    return x * k.sigmoid(x * {"quick_gelu": 1.702, "silu": 1.0}[act])


def _multiply_tiles(
    k: Kernel, x: list[Value], w: list[Value], start: Value, stop: Value, place: Value, soon: Sequence[Value] = ()
) -> None:
    """One or two tiles of rows x two of outputs, over some steps of the inputs; sums go on from those before. A quarter
    of the same steps is fetched from `soon`."""
    numbers = range(2 * len(x))
    with k.either(start.equals(0)) as (first, later):
        with first:
            for number in numbers:
                k.tile("zero", number)
        with later:
            for number in numbers:
                k.tile("loadd64", number, k.at(place, number * _TILE_BYTES), _VECTOR)
    with k.loop(start, stop) as step:
        at = step * _TILE_BYTES
        for line in range(0, _TILE_BYTES, _VECTOR) if len(x) == 1 else ():
            for one in w:
                k.prefetch(one, at + (line + _PREFETCHED))
        for one in soon:
            for line in range(0, _TILE_BYTES // 4, _VECTOR):
                k.prefetch(one, at + line, level=2)
        for a, rows in enumerate(x):
            k.tile("loadd64", 4 + a, k.at(rows, at), _VECTOR)
            for b, outputs in enumerate(w):
                if a == 0:
                    k.tile("loadd64", 6 + b, k.at(outputs, at), _VECTOR)
                k.tile_product("dpbssd", 2 * a + b, 4 + a, 6 + b)
    for number in numbers:
        k.tile("stored64", number, k.at(place, number * _TILE_BYTES), _VECTOR)


def _multiply_dots(k: Kernel, x: Value, w: list[Value], steps: Value, place: Value) -> None:
    """Eight rows x two tiles of outputs, over all inputs.

    The instruction takes codes of x that begin at 0: they are 128 too large, and 128 times the sum of the weights comes
    off.
    """
    kind = vector(I32, 16)

    def dot(total: Variable, codes: Value, weights: Value) -> None:
        total.set(k.call("llvm.x86.avx512.vpdpbusd.512", kind, total.get(), codes, weights))

    sums = [[k.variable(k.fill(kind, 0)) for _ in w] for _ in range(_DOT_ROWS)]
    of_weights = [k.variable(k.fill(kind, 0)) for _ in w]
    ones = k.fill(kind, 0x01010101)
    with k.loop(0, steps) as step:
        at = step * _TILE_BYTES
        for quad in range(STEP // 4):
            weights = [k.load(one, kind, at + quad * _VECTOR) for one in w]
            for total, one in zip(of_weights, weights, strict=True):
                dot(total, ones, one)
            for r, totals in enumerate(sums):
                codes = k.load(x, I32, at + (r * _VECTOR + quad * 4)).splat(16)
                for total, one in zip(totals, weights, strict=True):
                    dot(total, codes, one)
    for r, totals in enumerate(sums):
        for b, total in enumerate(totals):
            k.store(total.get() - (of_weights[b].get() << 7), place, r * _VECTOR + b * _TILE_BYTES)
