"""Attention of one new token over two segments of keys, in machine code.

    p = softmax([scale * q k_a^T | scale * q k_b^T])        out = p_a v_a + p_b v_b

Each segment is cut into parts of keys, so that there is work for every thread where key heads are few. A part reads its
keys once for all query heads of a group, sixteen at a time, then its values once; it leaves a weighted sum, the largest
score and the sum of the weights, which a second kernel joins. Scores and weights are float32.
Source: flash-decoding (Dao et al., 2023). Sizes: H query heads, H_kv key heads, A and B keys of the segments, D head
dimension, P parts.
"""

from __future__ import annotations

import functools
import struct

import torch
from llvmlite import ir
from torch import Tensor

from .compiled import Compiled, Scratch
from .emit import BF16, ELEMENTS, F32, I16, I32, I64, Kernel, Value, lane_sums, size_of, vector

_LANES = 16
_LEAST_KEYS, _MOST_KEYS = 256, 4096  # of a part
_UNITS = 64  # parts that are worth having; not by threads, whose number shall not change a result
_NOTHING = -1e30  # the score of a key that is not there
_MOST_SUMS = 24  # vectors; beside them stand a value and a weight

_F32x16 = vector(F32, _LANES)

_scratch = Scratch()

Segment = tuple[Tensor, Tensor]


def takes(q: Tensor, a: Segment, b: Segment) -> bool:
    """Whether head dimension, dtypes, devices and strides are those of the kernels."""
    D = q.shape[1]
    parts = [part for part in (*a, *b) if part.shape[1]]
    same = all(part.dtype == q.dtype and part.device == q.device and part.stride(2) == 1 for part in parts)
    return D % 32 == 0 and D <= 256 and q.dtype in ELEMENTS and same


def decode_attention(q: Tensor, a: Segment, b: Segment, lengths: Tensor | None, scale: float, of: str) -> Tensor:
    """q (H, D), segments of keys and values (H_kv, A or B, D), lengths (2,) or (H_kv, 2) int64 or None: all as in the
    op of this name; `of` a level of `compiled.LEVELS`. Returns (H, D) in q's dtype. Raises ValueError for
    lengths beyond the segments."""
    (H, D), H_kv = q.shape, b[0].shape[0]
    if lengths is None:
        lengths = torch.tensor([a[0].shape[1], b[0].shape[1]])
    A, B = lengths.tolist() if lengths.ndim == 1 else lengths.amax(0).tolist()
    room = [min(keys.shape[1], values.shape[1]) for keys, values in (a, b)]
    if A > room[0] or B > room[1] or int(lengths.min()) < 0:
        raise ValueError(f"expected lengths within 0 and {room}, got {lengths.tolist()}")
    keys = min(_MOST_KEYS, max(_LEAST_KEYS, -(-(A + B) * H_kv // (_UNITS * _LANES)) * _LANES))
    parts_a, parts = -(-A // keys), -(-A // keys) + -(-B // keys)
    group, threads, q = H // H_kv, torch.get_num_threads(), q.contiguous()
    out = torch.empty_like(q)
    found = H * parts * (D + 2) * 4
    each = (keys + _LANES) * group * 4
    at, memory = _scratch.take(found + each * min(threads, H_kv * parts))
    numbers = (number for part in (*a, *b) for number in (part.data_ptr(), *_byte_strides(part)))
    _parts_kernel(D, group, q.dtype, of)(
        H_kv * parts, threads, q.data_ptr(), lengths.data_ptr(), 16 * (lengths.ndim - 1), *numbers,
        parts_a, parts, keys, at, at + found, each, struct.unpack("<i", struct.pack("<f", scale))[0],
    )  # fmt: skip
    _join_kernel(D, q.dtype, of)(H, 1, at, parts, out.data_ptr())
    del memory
    return out


def _byte_strides(part: Tensor) -> tuple[int, int]:
    return part.stride(0) * part.element_size(), part.stride(1) * part.element_size()


@functools.cache
def _parts_kernel(D: int, group: int, dtype: torch.dtype, of: str) -> Compiled:
    short = dtype == torch.bfloat16 and of != "any"

    def write(module: ir.Module, name: str) -> None:
        _write_parts(Kernel(module, name), D, group, ELEMENTS[dtype], short)

    return Compiled(write, "attend_parts", of)


@functools.cache
def _join_kernel(D: int, dtype: torch.dtype, of: str) -> Compiled:
    return Compiled(lambda module, name: _write_join(Kernel(module, name), D, ELEMENTS[dtype]), "attend_join", of)


def _widened(k: Kernel, pointer: Value, at: int, element: ir.Type) -> Value:
    """Sixteen numbers as float32."""
    if element == BF16:
        return (k.load(pointer, vector(I16, _LANES), at * 2).to(I32) << 16).bits(_F32x16)
    return k.load(pointer, vector(element, _LANES), at * size_of(element)).to(F32)


def _write_parts(k: Kernel, D: int, group: int, element: ir.Type, short: bool) -> None:
    """Arguments: q, lengths, bytes between those of key heads; of a's keys, a's values, b's keys, b's values the
    address and the bytes from head to head and from key to key; parts of a, parts, keys of a part; what is found, a
    thread's memory and its bytes, the bits of the scale."""
    q, lengths, between = k.address(3), k.address(4), k.argument(5)
    parts_a, parts, most, found = k.argument(18), k.argument(19), k.argument(20), k.address(21)
    scores = k.at(k.address(22), k.thread() * k.argument(23))
    scale = k.argument(24).to(I32).bits(F32).splat(_LANES)
    size, row = size_of(element), (most + _LANES) * 4
    with k.units() as unit:
        head, part = unit // parts, unit % parts
        is_a = part < parts_a
        number = is_a.choose(part, part - parts_a)
        used = k.load(lengths, I64, head * between + is_a.choose(k.int(0), k.int(8)))
        start = k.smaller(number * most, used)
        count = k.smaller(used - start, most)
        arguments = [is_a.choose(k.argument(6 + i), k.argument(12 + i)) for i in range(6)]
        keys, values = (
            k.at(k.as_address(arguments[i]), head * arguments[i + 1] + start * arguments[i + 2]) for i in (0, 3)
        )
        key_step, value_step = arguments[2], arguments[5]
        _score(
            k, k.at(q, head * group * (D * size)), group, keys, key_step, count, scale, scores, row, D, element, short
        )
        places = [k.at(scores, row * g) for g in range(group)]
        ends = [k.at(found, ((head * group + g) * parts + part) * ((D + 2) * 4)) for g in range(group)]
        for place, end in zip(places, ends, strict=True):
            _weigh(k, place, count, k.at(end, D * 4))
        _add_values(k, places, values, value_step, count, ends, D, element)
    k.done()


def _score(
    k: Kernel, q: Value, group: int, keys: Value, step: Value, count: Value, scale: Value, to: Value, row: Value,
    D: int, element: ir.Type, short: bool,
) -> None:  # fmt: skip
    """The scores of all query heads, sixteen keys at a time, which stay in the L1 cache for all heads.

    `row` bytes lie between those of two heads. Behind the last key stands a score of nothing.
    """
    lanes, kind = k.lanes(_LANES), vector(BF16, 32)
    width, size = 32 if short else _LANES, size_of(element)
    with k.loop(0, count, _LANES) as block:
        # Behind the last key the last one again, whose score is not used.
        rows = [k.at(keys, k.smaller(block + i, count - 1) * step) for i in range(_LANES)]
        there = lanes < (count - block).splat(_LANES)
        with k.loop(0, k.int(group)) as g:
            place = k.at(q, g * (D * size))
            query = [
                k.load(place, kind, 2 * at) if short else _widened(k, place, at, element) for at in range(0, D, width)
            ]
            sums = []
            for key in rows:
                total = k.fill(_F32x16, 0)
                for number, part in enumerate(query):
                    if short:
                        x = k.load(key, kind, 64 * number)
                        total = k.call("llvm.x86.avx512bf16.dpbf16ps.512", _F32x16, total, part, x)
                    else:
                        total = k.fma(part, _widened(k, key, number * _LANES, element), total)
                sums.append(total)
            k.store(there.choose(lane_sums(sums) * scale, k.fill(_F32x16, _NOTHING)), to, g * row + block * 4)


def _weigh(k: Kernel, scores: Value, count: Value, to: Value) -> None:
    """Scores to exp(score - largest), in place; the largest and the sum of the weights behind each other."""
    largest = k.variable(k.fill(_F32x16, _NOTHING))
    with k.loop(0, count, _LANES) as at:
        largest.set(k.larger(largest.get(), k.load(scores, _F32x16, at * 4)))
    top = k.reduced(largest.get(), k.larger)
    sums = k.variable(k.fill(_F32x16, 0))
    with k.loop(0, count, _LANES) as at:
        weights = k.exp(k.load(scores, _F32x16, at * 4) - top.splat(_LANES))
        sums.set(sums.get() + weights)
        k.store(weights, scores, at * 4)
    k.store(top, to)
    k.store(k.reduced(sums.get(), lambda a, b: a + b), to, 4)


def _add_values(
    k: Kernel, weights: list[Value], values: Value, step: Value, count: Value, to: list[Value], D: int, element: ir.Type
) -> None:
    """As many dimensions at a time as there are registers for the sums of all query heads: a value is read once."""
    each = max(1, _MOST_SUMS // len(weights)) * _LANES
    for first in range(0, D, each):
        dimensions = range(first, min(first + each, D), _LANES)
        sums = [[k.variable(k.fill(_F32x16, 0)) for _ in dimensions] for _ in weights]
        with k.loop(0, count) as key:
            value = k.at(values, key * step)
            wide = [_widened(k, value, at, element) for at in dimensions]
            for part, totals in zip(weights, sums, strict=True):
                weight = k.load(part, F32, key * 4).splat(_LANES)
                for total, x in zip(totals, wide, strict=True):
                    total.set(k.fma(weight, x, total.get()))
        for place, totals in zip(to, sums, strict=True):
            for at, total in zip(dimensions, totals, strict=True):
                k.store(total.get(), place, at * 4)


def _write_join(k: Kernel, D: int, element: ir.Type) -> None:
    """Arguments: what the parts found, parts, out."""
    found, parts, out = k.address(3), k.argument(4), k.address(5)
    bytes_of_part = (D + 2) * 4
    with k.units() as head:
        start = k.at(found, head * parts * bytes_of_part)
        top = k.variable(k.fill(F32, _NOTHING))
        with k.loop(0, parts) as part:
            top.set(k.larger(top.get(), k.load(start, F32, part * bytes_of_part + D * 4)))
        sums = [k.variable(k.fill(_F32x16, 0)) for _ in range(0, D, _LANES)]
        total = k.variable(k.fill(_F32x16, 0))
        with k.loop(0, parts) as part:
            place = k.at(start, part * bytes_of_part)
            weight = k.exp(k.load(place, F32, D * 4).splat(_LANES) - top.get().splat(_LANES))
            total.set(k.fma(weight, k.load(place, F32, D * 4 + 4).splat(_LANES), total.get()))
            for i, each in enumerate(sums):
                each.set(k.fma(weight, k.load(place, _F32x16, i * 64), each.get()))
        for i, each in enumerate(sums):
            y = each.get() / total.get()
            size = size_of(element)
            k.store(y.bf16_bits() if element == BF16 else y.to(element), out, head * (D * size) + i * _LANES * size)
    k.done()
