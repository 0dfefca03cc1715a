"""The gate of a gated MLP in machine code.

    y[m, f] = silu(x[m, f]) * x[m, F + f]

silu is rounded before the product, as torch's two operations would. Sizes: M tokens, F entries of each half.
"""

from __future__ import annotations

import functools

import torch
from llvmlite import ir
from torch import Tensor

from .compiled import Compiled, threads_for
from .emit import ELEMENTS, Kernel, Value, as_float, load_floats, over_row, size_of, store_bits, to_bits


def silu_mul(x: Tensor, of: str) -> Tensor:
    """x (M, 2 F) of a dtype of `emit.ELEMENTS`, contiguous; `of` a level of `compiled.LEVELS`. Returns (M, F)."""
    M, F = x.shape[0], x.shape[1] // 2
    out = torch.empty(M, F, dtype=x.dtype)
    _kernel(x.dtype, of)(M, threads_for(x.numel()), x.data_ptr(), out.data_ptr(), F)
    return out


@functools.cache
def _kernel(dtype: torch.dtype, of: str) -> Compiled:
    return Compiled(lambda module, name: _write(Kernel(module, name), ELEMENTS[dtype], of), "silu_mul", of)


def _write(k: Kernel, element: ir.Type, of: str) -> None:
    """Arguments: x, out; F."""
    given, made, F = k.address(3), k.address(4), k.argument(5)
    size = size_of(element)
    with k.units() as row:
        gates, out = k.at(given, row * F * (2 * size)), k.at(made, row * F * size)
        ups = k.at(gates, F * size)

        def one(first: Value, left: Value | None, turn: int) -> None:
            gate = load_floats(k, gates, element, first, left)
            silu = as_float(to_bits(gate * k.sigmoid(gate), element, of), element)
            y = silu * load_floats(k, ups, element, first, left)
            store_bits(k, to_bits(y, element, of), out, first, left)

        over_row(k, F, one)
    k.done()
