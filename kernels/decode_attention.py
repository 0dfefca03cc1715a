"""Attention of one new token over two segments of keys in one pass.

    p = softmax([scale * q k_a^T | scale * q k_b^T])        out = p_a v_a + p_b v_b

Segment a is the active set (or, in a dense turn, the visual store), segment b the text store. Attention
does not care about the order of keys, each of which carries its own rotation.
On a CPU it is machine code (`cpu/decode_attention.py`), or else a grouped matrix product over (key heads, query heads
of a group). `benchmarks/kernels/decode_attention.py` has both beside torch's
`scaled_dot_product_attention(enable_gqa=True)`.
Source: flash-decoding (Dao et al., 2023) for the split; arXiv 2305.13245 for the groups.
Sizes: H query heads, H_kv key heads, A and B keys of the segments, D head dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backend import cpu_level, runs_triton

Segment = tuple[Tensor, Tensor]  # k, v, each (H_kv, keys, D)


def decode_attention(
    q: Tensor, a: Segment, b: Segment, lengths: Tensor | None = None, *, scale: float | None = None
) -> Tensor:
    """Attention of one token.

    q (H, D); a = (k, v) with (H_kv, A, D), b likewise with B keys; either may be empty, not both. Same dtype.
    lengths (2,) or, where key heads hold different numbers, (H_kv, 2) int64 contiguous on q's device: how many entries
    of each are in use, None: all; a kernel reads them there, so that a captured graph serves every step. `scale`
    defaults to 1/sqrt(D). Returns (H, D) in q's dtype. Raises ValueError if shapes disagree.
    """
    H, D = q.shape
    H_kv = b[0].shape[0]
    if H % H_kv or any(t.shape[0] != H_kv or t.shape[2] != D for t in (*a, *b)):
        raise ValueError(
            f"expected keys and values (H_kv dividing {H}, n, {D}), got {[tuple(t.shape) for t in (*a, *b)]}"
        )
    if lengths is not None and lengths.shape not in ((2,), (H_kv, 2)):
        raise ValueError(f"expected lengths (2,) or ({H_kv}, 2), got {tuple(lengths.shape)}")
    scale = D**-0.5 if scale is None else scale
    if runs_triton(q):
        from .gpu.decode_attention import decode_attention as by_kernel

        if lengths is None:
            lengths = torch.tensor([a[0].shape[1], b[0].shape[1]]).to(q.device, non_blocking=True)
        return by_kernel(q, a, b, lengths, scale)
    if q.device.type == "cpu" and (level := cpu_level()):
        from .cpu import decode_attention as machine

        if machine.takes(q, a, b):
            return machine.decode_attention(q, a, b, lengths, scale, level)
    if lengths is not None and lengths.ndim == 2:
        return torch.cat([decode_attention(*one, scale=scale) for one in _by_key_head(q, a, b, lengths)])
    a, b = _in_use(a, b, lengths)
    grouped = (q * scale).reshape(H_kv, H // H_kv, D)
    A = a[0].shape[1]
    scores = torch.cat([_by_head(grouped, k.transpose(1, 2)) for k, _ in (a, b)], dim=-1)  # (H_kv, group, A + B)
    p = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return (_by_head(p[..., :A], a[1]) + _by_head(p[..., A:], b[1])).reshape(H, D)


def _by_key_head(q: Tensor, a: Segment, b: Segment, lengths: Tensor) -> list[tuple[Tensor, Segment, Segment, Tensor]]:
    """The same of each key head by itself, one behind the other."""
    heads = [slice(h, h + 1) for h in range(len(lengths))]
    own = zip(q.chunk(len(lengths)), heads, lengths, strict=True)
    return [(rows, (a[0][h], a[1][h]), (b[0][h], b[1][h]), used) for rows, h, used in own]


def _in_use(a: Segment, b: Segment, lengths: Tensor | None) -> tuple[Segment, Segment]:
    """The parts of two stores that hold something. On a CPU the lengths lie in the host's own memory."""
    if lengths is None:
        return a, b
    A, B = lengths.tolist()
    return (a[0][:, :A], a[1][:, :A]), (b[0][:, :B], b[1][:, :B])


def _by_head(x: Tensor, y: Tensor) -> Tensor:
    """x (H_kv, m, n) @ y (H_kv, n, l) -> (H_kv, m, l).

    A store with room to grow has gaps between its heads. On a CPU a batched 16-bit product copies such an operand
    first, which costs several times the product itself; head by head nothing is copied.
    """
    if x.device.type != "cpu" or x.dtype == torch.float32:
        return x @ y
    out = x.new_empty(x.shape[0], x.shape[1], y.shape[2])
    for head in range(x.shape[0]):
        torch.mm(x[head], y[head], out=out[head])
    return out


def decode_attention_ref(
    q: Tensor, a: Segment, b: Segment, lengths: Tensor | None = None, *, scale: float | None = None
) -> Tensor:
    """The definition in float64, over the joined segments."""
    if lengths is not None and lengths.ndim == 2:
        return torch.cat([decode_attention_ref(*one, scale=scale) for one in _by_key_head(q, a, b, lengths)])
    a, b = _in_use(a, b, lengths)
    H, D = q.shape
    k, v = (torch.cat([x, y], dim=1).double().repeat_interleave(H // x.shape[0], 0) for x, y in zip(a, b, strict=True))
    s = (k @ q.double()[..., None])[..., 0] * (D**-0.5 if scale is None else scale)  # (H, A + B)
    return (s.softmax(-1)[:, None] @ v)[:, 0]
