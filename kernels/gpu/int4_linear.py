"""Product with 4-bit weights in groups; the kernels of `w4a16`.

    out[t, n] = sum_g s[g, n] * ( sum_{k in g} (OFF + q[n, k]) * x[t, k]  -  (OFF + z[g, n]) * X[g, t] )

Few tokens: weights are the left operand of the products. A word holds eight codes, of which the i-th of the lower half
and the i-th of the upper half belong to neighbouring inputs: one shift, one `and` and one `or` on the whole word make
both of them numbers, side by side in one register as the tensor cores want them. Or-ed into the mantissa of a magic
number a code is the number OFF + q, exactly (OFF 1024 in float16, 128 in bfloat16). Nothing is converted, no weight
passes through shared memory, the scale is applied to the sum of a group, and the offset is taken back through X[g, t],
the sum of the group's inputs. Programs split the inputs; a second kernel adds their parts in order: no atomics.
`and` and `or` are one instruction, lop3, that the compiler does not form by itself where both constants stand in the
code. It is asked for in assembly where `lop3_agrees` found it to compute the same on the device at hand.
Many tokens: the matrix is dequantised into scratch memory and cuBLAS multiplies, which beats a fused kernel.

Word layout: w int32 (N, P / 8), P the inputs padded to whole blocks of 128; of block b, word t = 0..15, i = 0..3
    w[n, 16 b + t]  bits 4 i .. 4 i + 3  =  q[n, 128 b + 32 i + 2 t],  bits 4 i + 16 .. 4 i + 19  =  q[n, the next k]
Sizes: T tokens, N outputs, K inputs, g group size (32, 64 or 128), G groups.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .blocks import MIN_DOT, power_of_two
from .variant import Variant

BLOCK = 128  # inputs of 16 words
GROUP_SIZES = (32, 64, 128)
FEW_TOKENS = 64  # beyond, dequantising once costs less: to be measured
_OUTPUTS = 64  # of a program that dequantises
_WARPS, _STAGES = 4, 4
_PROGRAMS = 256  # that are wanted at least: three for each of 84 multiprocessors
_MAGIC = {torch.float16: (0x64006400, 1024), torch.bfloat16: (0x43004300, 128)}  # or-ed with q: the offset plus q
_LOP3 = "lop3.b32 $0, $1, 0x000F000F, {:#010x}, 0xEA;"  # (a & b) | c
_CHECKED_TOKENS = 16


def pack_words(codes: Tensor) -> Tensor:
    """codes (N, K) of 0..15 -> (N, P / 8) int32; the padding holds 8, and meets inputs that are 0."""
    N, K = codes.shape
    padded = torch.nn.functional.pad(codes, (0, -K % BLOCK), value=8)
    pairs = padded.view(N, -1, 4, 16, 2).to(torch.int64)  # block, i, word, half
    words = (pairs << _shifts(codes.device)).sum(dim=(2, 4))  # below 2^32
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32).flatten(1)


def unpack_words(words: Tensor, in_features: int) -> Tensor:
    """The codes (N, K) uint8 of `pack_words`."""
    pairs = (words.view(words.shape[0], -1, 1, 16, 1) >> _shifts(words.device)) & 15
    return pairs.flatten(1)[:, :in_features].to(torch.uint8)


def _shifts(device: torch.device) -> Tensor:
    """Where the codes of a word lie, (4, 1, 2): by i and half."""
    return (torch.arange(0, 16, 4, device=device)[:, None] + torch.arange(0, 32, 16, device=device))[:, None]


def pack_scales(scales: Tensor, zeros: Tensor, in_features: int, group_size: int) -> tuple[Tensor, Tensor]:
    """scales (N, G) of floats, zeros (N, G) uint8 -> each by groups, (all groups, N), those of the padding with 0."""
    more = -(-in_features // BLOCK) * BLOCK // group_size - scales.shape[1]
    pad = torch.nn.functional.pad
    return pad(scales, (0, more)).t().contiguous(), pad(zeros, (0, more)).t().contiguous()


def int4_linear(
    x: Tensor, words: Tensor, scales: Tensor, zeros: Tensor, group_size: int, bias: Tensor | None, *, lop3: bool = False
) -> Tensor:
    """x (T, K) contiguous; words (N, P / 8) int32; scales (G, N) of floats and
    zeros (G, N) uint8 as `pack_scales` makes them; bias (N,) or None -> (T, N) in x's dtype, accumulated in float32.
    `lop3`: `lop3_agrees` was true of this matrix."""
    if x.shape[0] > FEW_TOKENS or x.dtype not in _MAGIC:
        weight = dequantised(words, scales, zeros, group_size, x.shape[1], x.dtype)
        return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))
    return few_tokens(x, words, scales, zeros, group_size, bias, lop3=lop3)


def lop3_agrees(words: Tensor, scales: Tensor, zeros: Tensor, group_size: int, in_features: int) -> bool:
    """Whether the form with assembly gives on this device, bit for bit, what the portable one does, for this matrix.

    Waits for the device; asked once, when a layer is loaded.
    """
    for dtype in _MAGIC:
        x = torch.randn(
            _CHECKED_TOKENS, in_features, generator=torch.Generator(words.device).manual_seed(0), device=words.device
        ).to(dtype)
        found = [few_tokens(x, words, scales, zeros, group_size, None, lop3=lop3) for lop3 in (False, True)]
        if not torch.equal(*found):
            return False
    return True


def few_tokens(
    x: Tensor, words: Tensor, scales: Tensor, zeros: Tensor, group_size: int, bias: Tensor | None, *, lop3: bool = False
) -> Tensor:
    """As `int4_linear`, for at most `FEW_TOKENS` of float16 or bfloat16."""
    (T, K), (N, G) = x.shape, (words.shape[0], scales.shape[0])
    if T == 0:
        return torch.empty(0, N, dtype=x.dtype, device=x.device)
    tokens = token_block(T)
    blocks = words.shape[1] // 16
    rows = torch.empty(tokens, blocks * BLOCK, dtype=x.dtype, device=x.device)
    sums = torch.empty(G, tokens, dtype=torch.float32, device=x.device)
    _pad_and_sum[(G,)](x, rows, sums, T, K, blocks, GROUP=group_size, TOKENS=tokens, num_warps=_WARPS, num_stages=1)
    outputs = output_block(tokens)
    splits = num_splits(N, blocks, outputs)
    out = torch.empty(T, N, dtype=x.dtype, device=x.device)
    part = torch.empty(splits, T, N, dtype=torch.float32, device=x.device)
    _pairs[(triton.cdiv(N, outputs), splits)](
        rows, words, scales, zeros, sums, part, T, N, blocks, triton.cdiv(blocks, splits),
        **_constants(x.dtype, group_size, tokens, lop3), num_warps=_WARPS, num_stages=_STAGES,
    )  # fmt: skip
    _add_parts[(triton.cdiv(N, _ADDED), T)](
        part, out if bias is None else bias, out, T, N, splits, HAS_BIAS=bias is not None, WIDTH=_ADDED,
        num_warps=_WARPS, num_stages=1,
    )  # fmt: skip
    return out


def token_block(num_tokens: int) -> int:
    return max(MIN_DOT, power_of_two(num_tokens))


def output_block(tokens: int) -> int:
    """Outputs of a program: many make the most of each input that is loaded, but their sums need registers."""
    return 128 if tokens == 16 else 64


def num_splits(N: int, blocks: int, outputs: int) -> int:
    """Parts of the inputs: enough for `_PROGRAMS`, at least four blocks each. Depends on the sizes alone."""
    return max(1, min(triton.cdiv(_PROGRAMS, triton.cdiv(N, outputs)), blocks // 4))


def dequantised(
    words: Tensor, scales: Tensor, zeros: Tensor, group_size: int, in_features: int, dtype: torch.dtype
) -> Tensor:
    """The matrix (N, K) in any float dtype, each weight (q - z) * s computed in float32 and rounded once."""
    N, blocks = words.shape[0], words.shape[1] // 16
    out = torch.empty(N, in_features, dtype=dtype, device=words.device)
    _dequantise[(triton.cdiv(N, _OUTPUTS), blocks)](
        words, scales, zeros, out, N, in_features, blocks, GROUP=group_size, OUTPUTS=_OUTPUTS,
        num_warps=_WARPS, num_stages=1,
    )  # fmt: skip
    return out


_ADDED = 256  # outputs of a program that adds parts


def variants() -> Iterator[Variant]:
    sizes = dict.fromkeys(("T", "N", "blocks", "blocks_each"), "i32")
    for name, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
        matrix = {"words": "*i32", "scales": "*fp16", "zeros": "*u8"}
        for group_size in GROUP_SIZES:
            for tokens in (16, 32, 64):
                types = {"rows": f"*{name}"} | matrix | {"sums": "*fp32", "part": "*fp32"} | sizes
                # Few tokens are where instructions count; the two forms differ by nothing else.
                for lop3 in (False, True) if tokens == 16 else (True,):
                    yield Variant(
                        f"int4_linear{' lop3' if lop3 else ''} g={group_size} tokens={tokens} {name}", _pairs, types,
                        _constants(dtype, group_size, tokens, lop3), _WARPS, _STAGES,
                        frozenset({"rows", *matrix, "sums", "part", "N"}), entries=output_block(tokens) * BLOCK,
                    )  # fmt: skip
            yield Variant(
                f"int4_linear pad and sum g={group_size} {name}", _pad_and_sum,
                {"x": f"*{name}", "rows": f"*{name}", "sums": "*fp32", "T": "i32", "K": "i32", "blocks": "i32"},
                {"GROUP": group_size, "TOKENS": 64}, _WARPS, 1, frozenset({"x", "rows", "sums", "K"}),
            )  # fmt: skip
            yield Variant(
                f"int4_linear dequantise g={group_size} {name}", _dequantise,
                matrix | {"out": f"*{name}", "N": "i32", "K": "i32", "blocks": "i32"},
                {"GROUP": group_size, "OUTPUTS": _OUTPUTS}, _WARPS, 1,
                frozenset({*matrix, "out", "N", "K"}),
            )  # fmt: skip
        yield Variant(
            f"int4_linear add parts {name}", _add_parts,
            {"part": "*fp32", "bias": f"*{name}", "out": f"*{name}", "T": "i32", "N": "i32", "splits": "i32"},
            {"HAS_BIAS": True, "WIDTH": _ADDED}, _WARPS, 1, frozenset({"part", "bias", "out", "N"}),
        )  # fmt: skip


def _constants(dtype: torch.dtype, group_size: int, tokens: int, lop3: bool) -> dict[str, int | str]:
    magic, offset = _MAGIC[dtype]
    return {
        "GROUP": group_size, "TOKENS": tokens, "OUTPUTS": output_block(tokens), "MAGIC": magic, "OFFSET": offset,
        "LOP3": _LOP3.format(magic) if lop3 else "",
    }  # fmt: skip


@triton.jit
def _pad_and_sum(x, rows, sums, T, K, blocks, GROUP: tl.constexpr, TOKENS: tl.constexpr):
    """Inputs with zeros behind the last token and the last input, so that `_pairs` needs no mask; sums of groups."""
    group = tl.program_id(0)
    t = tl.arange(0, TOKENS)
    k = group * GROUP + tl.arange(0, GROUP)
    inputs = tl.load(x + t[:, None] * K + k[None, :], mask=(t < T)[:, None] & (k < K)[None, :], other=0.0)
    tl.store(rows + t[:, None] * (blocks * 128) + k[None, :], inputs)
    tl.store(sums + group * TOKENS + t, tl.sum(inputs.to(tl.float32), axis=1))


@triton.jit
def _pairs(
    rows, words, scales, zeros, sums, part, T, N, blocks, blocks_each,
    GROUP: tl.constexpr, TOKENS: tl.constexpr, OUTPUTS: tl.constexpr, MAGIC: tl.constexpr, OFFSET: tl.constexpr,
    LOP3: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(1)
    n = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    own = tl.minimum(n, N - 1)  # behind the last output: read again, never stored
    t = tl.arange(0, TOKENS)
    i = tl.arange(0, 16)
    k = tl.arange(0, 32)
    first = split * blocks_each
    word_at = words + own[:, None].to(tl.int64) * (blocks * 16) + i[None, :] + first * 16
    row_at = rows + t[:, None] * (blocks * 128) + k[None, :] + first * 128
    total = tl.zeros((OUTPUTS, TOKENS), tl.float32)
    for block in range(first, tl.minimum(first + blocks_each, blocks)):
        tile = tl.load(word_at)
        for part_of_block in tl.static_range(128 // GROUP):
            found = tl.zeros((OUTPUTS, TOKENS), tl.float32)
            for step in tl.static_range(GROUP // 32):
                place = part_of_block * (GROUP // 32) + step
                shifted = tile >> (4 * place)
                if LOP3 == "":
                    both = (shifted & 0x000F000F) | MAGIC
                else:
                    both = tl.inline_asm_elementwise(LOP3, "=r,r", [shifted], tl.int32, is_pure=True, pack=1)
                low = both.to(tl.int16).to(rows.dtype.element_ty, bitcast=True)
                high = (both >> 16).to(tl.int16).to(rows.dtype.element_ty, bitcast=True)
                codes = tl.join(low, high).reshape(OUTPUTS, 32)  # already side by side: moves nothing
                found = tl.dot(codes, tl.trans(tl.load(row_at + place * 32)), acc=found)
            group = block * (128 // GROUP) + part_of_block
            scale = tl.load(scales + group * N + own).to(tl.float32)
            shift = tl.load(zeros + group * N + own).to(tl.float32) + OFFSET
            sum_x = tl.load(sums + group * TOKENS + t)
            total += scale[:, None] * (found - shift[:, None] * sum_x[None, :])
        word_at += 16
        row_at += 128
    at = part + (split * T + t[None, :]).to(tl.int64) * N + n[:, None]
    tl.store(at, total, mask=(n < N)[:, None] & (t < T)[None, :])


@triton.jit
def _add_parts(part, bias, out, T, N, splits, HAS_BIAS: tl.constexpr, WIDTH: tl.constexpr):
    token = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros((WIDTH,), tl.float32)
    for split in range(splits):
        total += tl.load(part + (split * T + token) * N + n, mask=n < N, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(out + token * N + n, total.to(out.dtype.element_ty), mask=n < N)


@triton.jit
def _dequantise(
    words, scales, zeros, out, N, K, blocks, GROUP: tl.constexpr, OUTPUTS: tl.constexpr
):  # fmt: skip
    n = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    block = tl.program_id(1)
    i = tl.arange(0, 16)
    tile = tl.load(
        words + n[:, None].to(tl.int64) * (blocks * 16) + block * 16 + i[None, :], mask=(n < N)[:, None], other=0
    )
    column = tl.arange(0, 32)
    for place in tl.static_range(4):
        k = block * 128 + place * 32
        group = k // GROUP
        real = (n < N) & (k < K)
        scale = tl.load(scales + group * N + n, mask=real, other=0.0).to(tl.float32)
        zero = tl.load(zeros + group * N + n, mask=real, other=0).to(tl.float32)
        low = (tile >> (4 * place)) & 0xF
        high = (tile >> (4 * place + 16)) & 0xF
        codes = tl.join(low, high).reshape(OUTPUTS, 32).to(tl.float32)
        weight = (codes - zero[:, None]) * scale[:, None]
        at = out + n[:, None].to(tl.int64) * K + k + column[None, :]
        tl.store(at, weight.to(out.dtype.element_ty), mask=(n < N)[:, None] & (column < K - k)[None, :])
