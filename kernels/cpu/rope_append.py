"""Rotates queries and keys by their positions and writes keys and values behind what a store holds, in machine code.

    q[h, m] = rope(qkv[m, h])
    k_store[h, first + m] = rope(qkv[m, H + h])        v_store[h, first + m] = qkv[m, H + H_kv + h]

Products are rounded before they are added, as torch's separate operations would. Sizes: H query heads, H_kv key heads,
M tokens, D head dimension.
"""

from __future__ import annotations

import functools

import torch
from llvmlite import ir
from torch import Tensor

from .compiled import Compiled, threads_for
from .emit import ELEMENTS, Kernel, Value, as_float, load_floats, size_of, store_bits, to_bits


def takes(k_store: Tensor, v_store: Tensor) -> bool:
    """Whether the stores' strides are those of the kernel, and heads have two halves."""
    return k_store.shape[2] % 2 == 0 and k_store.stride(2) == v_store.stride(2) == 1


def rope_append(qkv: Tensor, cos: Tensor, sin: Tensor, k_store: Tensor, v_store: Tensor, end: int, of: str) -> Tensor:
    """As the op of this name: qkv (M, H + 2 H_kv, D), cos and sin (M, D/2), contiguous, stores (H_kv, capacity, D), of
    one dtype of `emit.ELEMENTS`; `of` a level of `compiled.LEVELS`. Raises ValueError for rows outside the stores."""
    (M, heads, D), (H_kv, capacity, _) = qkv.shape, k_store.shape
    if not M <= end <= capacity:
        raise ValueError(f"expected end of {M}..{capacity}, got {end}")
    H = heads - 2 * H_kv
    out = torch.empty(H, M, D, dtype=qkv.dtype)
    strides = (part.stride(i) * part.element_size() for part in (k_store, v_store) for i in (0, 1))
    _kernel(D, qkv.dtype, of)(
        M, threads_for(qkv.numel()), *(part.data_ptr() for part in (qkv, cos, sin, out, k_store, v_store)),
        M, H, H_kv, end - M, *strides,
    )  # fmt: skip
    return out


@functools.cache
def _kernel(D: int, dtype: torch.dtype, of: str) -> Compiled:
    return Compiled(lambda module, name: _write(Kernel(module, name), D, ELEMENTS[dtype], of), "rope_append", of)


def _write(k: Kernel, D: int, element: ir.Type, of: str) -> None:
    """Arguments: qkv, cos, sin, out, stores of keys and of values; M, H, H_kv, first row; bytes from one head and from
    one row to the next in either store."""
    qkv, cos, sin, out, k_store, v_store = (k.address(i) for i in range(3, 9))
    M, H, H_kv, first, *strides = (k.argument(i) for i in range(9, 17))
    size, half = size_of(element), D // 2
    vectors = [(start, None if start + 16 <= half else k.int(half - start)) for start in range(0, half, 16)]

    def rounded(values: Value) -> Value:
        return as_float(to_bits(values, element, of), element)

    with k.units() as m:
        turns = [[load_floats(k, k.at(one, m * (half * size)), element, *v) for v in vectors] for one in (cos, sin)]
        source = k.at(qkv, m * (H + H_kv * 2) * (D * size))

        def rotate(head: Value, to: Value) -> None:
            lows = k.at(source, head * (D * size))
            highs = k.at(lows, half * size)
            for (start, left), c, s in zip(vectors, *turns, strict=True):
                low, high = (load_floats(k, part, element, start, left) for part in (lows, highs))
                new = rounded(low * c) - rounded(high * s), rounded(high * c) + rounded(low * s)
                for values, place in zip(new, (to, k.at(to, half * size)), strict=True):
                    store_bits(k, to_bits(values, element, of), place, start, left)

        with k.loop(0, H) as head:
            rotate(head, k.at(out, (head * M + m) * (D * size)))
        with k.loop(0, H_kv) as head:
            rotate(H + head, k.at(k_store, head * strides[0] + (first + m) * strides[1]))
            values = k.at(source, (H + H_kv + head) * (D * size))
            to = k.at(v_store, head * strides[2] + (first + m) * strides[3])
            for start in range(0, D, 16):
                left = None if start + 16 <= D else k.int(D - start)
                copied = load_floats(k, values, element, start, left)
                store_bits(k, to_bits(copied, element, of), to, start, left)
    k.done()
