"""Root-mean-square normalisation, with the addition of a residual before it, in machine code.

    total[m] = x[m] + added[m]        y[m, d] = total[m, d] / sqrt(mean_d(total[m, :]^2) + eps) * weight[d]

A row is read, added and written once, and found in the L1 cache when it is scaled. Rounded where torch's separate
operations would: the total, and what is normalised before it is scaled. Sizes: M tokens, D hidden size.
"""

from __future__ import annotations

import functools

import torch
from llvmlite import ir
from torch import Tensor

from .compiled import Compiled, threads_for
from .emit import ELEMENTS, F32, Kernel, Value, as_float, load_floats, over_row, size_of, store_bits, to_bits, vector

_F32x16 = vector(F32, 16)


def rms_norm(x: Tensor, weight: Tensor, eps: float, added: Tensor | None, of: str) -> tuple[Tensor, Tensor]:
    """x (M, D) and `added` (M, D) or None, contiguous; weight (D,); of one dtype of `emit.ELEMENTS`; `of` a level of
    `compiled.LEVELS`. Returns (x + added, its norm), both (M, D); without `added` the first is x itself."""
    M, D = x.shape
    out = torch.empty_like(x)
    total = x if added is None else torch.empty_like(x)
    _kernel(x.dtype, eps, added is not None, of)(
        M, threads_for(x.numel()), x.data_ptr(), 0 if added is None else added.data_ptr(), weight.data_ptr(),
        total.data_ptr(), out.data_ptr(), D,
    )  # fmt: skip
    return total, out


@functools.cache
def _kernel(dtype: torch.dtype, eps: float, adds: bool, of: str) -> Compiled:
    def write(module: ir.Module, name: str) -> None:
        _write(Kernel(module, name), ELEMENTS[dtype], eps, adds, of)

    return Compiled(write, "rms_norm", of)


def _write(k: Kernel, element: ir.Type, eps: float, adds: bool, of: str) -> None:
    """Arguments: x, added, weight, total, out; D."""
    given, added, weight, total, out = (k.address(i) for i in range(3, 8))
    D = k.argument(8)
    size = size_of(element)
    with k.units() as row:
        x, more, to, made = (k.at(one, row * D * size) for one in (given, added, total, out))
        squares = [k.variable(k.fill(_F32x16, 0)) for _ in range(4)]

        def add(first: Value, left: Value | None, turn: int) -> None:
            values = load_floats(k, x, element, first, left)
            if adds:
                bits = to_bits(values + load_floats(k, more, element, first, left), element, of)
                store_bits(k, bits, to, first, left)
                values = as_float(bits, element)
            squares[turn].set(k.fma(values, values, squares[turn].get()))

        over_row(k, D, add)
        pairs = [squares[i].get() + squares[i + 2].get() for i in (0, 1)]
        found = k.reduced(pairs[0] + pairs[1], Value.__add__)
        mean = found / D.to(F32) + eps
        factor = (k.fill(F32, 1) / k.call("llvm.sqrt", F32, mean)).splat(16)

        def scale(first: Value, left: Value | None, turn: int) -> None:
            normed = as_float(to_bits(load_floats(k, to, element, first, left) * factor, element, of), element)
            scaled = normed * load_floats(k, weight, element, first, left)
            store_bits(k, to_bits(scaled, element, of), made, first, left)

        over_row(k, D, scale)
    k.done()
