"""silu(gate) * up of a gated MLP; the kernel of `silu_mul`. Sizes: M tokens, F entries of each half."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .variant import Variant

_BLOCK = 1024
_WARPS = 4


def silu_mul(gate_up: Tensor) -> Tensor:
    """gate_up (M, 2 F) contiguous, the gate first -> (M, F) in its dtype."""
    M, F = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(M, F, dtype=gate_up.dtype, device=gate_up.device)
    if out.numel():
        _silu_mul[(triton.cdiv(F, _BLOCK), M)](gate_up, out, F, BLOCK=_BLOCK, num_warps=_WARPS, num_stages=1)
    return out


def variants() -> Iterator[Variant]:
    for dtype in ("fp16", "bf16"):
        pointers = {"gate_up": f"*{dtype}", "out": f"*{dtype}"}
        aligned = frozenset({*pointers, "F"})
        yield Variant(f"silu_mul {dtype}", _silu_mul, pointers | {"F": "i32"}, {"BLOCK": _BLOCK}, _WARPS, 1, aligned)


@triton.jit
def _silu_mul(gate_up, out, F, BLOCK: tl.constexpr):
    row = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at = gate_up + row * 2 * F + i
    gate = tl.load(at, mask=i < F, other=0.0)
    up = tl.load(at + F, mask=i < F, other=0.0)
    wide = gate.to(tl.float32)
    # silu is rounded before the product, as two separate operations would.
    silu = (wide / (1 + tl.exp(-wide))).to(gate.dtype)
    tl.store(out + row * F + i, (silu.to(tl.float32) * up.to(tl.float32)).to(gate.dtype), mask=i < F)
