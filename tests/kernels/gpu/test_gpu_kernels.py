"""Every Triton kernel against its float64 definition on awkward shapes; the tolerances would catch mistakes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sparsevila.kernels.attention import attention_ref
from sparsevila.kernels.decode_attention import decode_attention_ref
from sparsevila.kernels.extend_attention import extend_attention, extend_attention_ref
from sparsevila.kernels.gpu.blocks import head_parts, power_of_two
from sparsevila.kernels.gpu.column_sums import column_sums
from sparsevila.kernels.gpu.decode_attention import CHUNK, decode_attention
from sparsevila.kernels.gpu.extend_attention import num_shares
from sparsevila.kernels.gpu.gather import gather
from sparsevila.kernels.gpu.int4_linear import dequantised, few_tokens, pack_scales, pack_words, unpack_words
from sparsevila.kernels.gpu.int8_linear import int8_linear, padded, with_padding
from sparsevila.kernels.gpu.quantize_rows import quantize_rows
from sparsevila.kernels.gpu.rms_norm import rms_norm
from sparsevila.kernels.gpu.rope_append import rope_append
from sparsevila.kernels.gpu.silu_mul import silu_mul
from sparsevila.kernels.quantize_rows import quantize_rows as plain_quantize_rows
from sparsevila.kernels.quantize_rows import quantize_rows_ref
from sparsevila.kernels.retrieval import retrieval, retrieval_ref
from sparsevila.kernels.rms_norm import rms_norm_ref
from sparsevila.kernels.rope import rope
from sparsevila.kernels.saliency import saliency, saliency_ref
from sparsevila.kernels.top_k import top_k, top_k_ref
from sparsevila.kernels.w8a8 import pack_w8a8

# Relative to the largest value: one rounding of the result, or two.
STEP = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7, torch.float32: 2.0**-20}
FLOAT32_SUM = 1e-5  # exp of a float32 sum of products: the sum's rounding, times its size


def rand(*shape: int, dtype: torch.dtype, device: str, scale: float = 1.0, seed: int = 0) -> Tensor:
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))) * scale
    return made.to(dtype).to(device)


def error(got: Tensor, want: Tensor) -> float:
    assert got.shape == want.shape
    assert torch.isfinite(got).all()
    return float((got.double() - want).abs().max() / want.abs().max())


def test_block_sizes() -> None:
    assert [power_of_two(n) for n in (1, 2, 3, 64, 65)] == [1, 2, 4, 64, 128]
    parts = {16: (16, 0), 40: (32, 16), 64: (64, 0), 72: (64, 16), 80: (64, 16), 96: (64, 32), 128: (128, 0)}
    assert {D: head_parts(D) for D in parts} == parts


# Saliency and retrieval ---------------------------------------------------------------------------------------------

HEADS = [(4, 2, 3, 70, 64), (3, 3, 17, 129, 72), (6, 1, 5, 64, 80), (2, 2, 70, 33, 128)]  # H, H_kv, M, N, D


@pytest.mark.parametrize(("H", "H_kv", "M", "N", "D"), HEADS)
def test_retrieval(H: int, H_kv: int, M: int, N: int, D: int, dtype: torch.dtype, device: str) -> None:
    q, store = rand(H, M, D, dtype=dtype, device=device), rand(H_kv, N + 9, D, dtype=dtype, device=device, seed=1)
    k = store[:, :N]  # as in a store with room to grow
    lse = attention_ref(q, k, k, causal=False)[1].float() + 0.5
    got, want = retrieval(q, k, lse), retrieval_ref(q, k, lse)
    assert got.dtype == torch.float32
    assert error(got, want) < FLOAT32_SUM
    assert error(torch.zeros_like(got), want) > 0.5
    keep = max(1, N // 4)
    assert set(got.topk(keep).indices.tolist()) == set(want.topk(keep).indices.tolist())
    assert error(retrieval(q, k, lse, per_head=True), retrieval_ref(q, k, lse, per_head=True)) < FLOAT32_SUM
    # A row that is left out, a head that reads another's keys, or a log-sum-exp of the wrong row would be seen.
    assert error(retrieval_ref(q[:, :-1], k, lse[:, :-1]), want) > 1e3 * FLOAT32_SUM
    assert error(retrieval_ref(q, k, lse.roll(1, dims=1)), want) > 1e3 * FLOAT32_SUM
    if H_kv > 1:
        assert error(retrieval_ref(q, k.roll(1, dims=0), lse), want) > 1e3 * FLOAT32_SUM


@pytest.mark.parametrize(("B", "H", "M", "N", "D"), [(2, 3, 1, 65, 64), (1, 2, 50, 50, 72), (2, 1, 130, 70, 80)])
@pytest.mark.parametrize("knows_lse", [True, False])
def test_saliency(B: int, H: int, M: int, N: int, D: int, dtype: torch.dtype, device: str, knows_lse: bool) -> None:
    q, k = (rand(B, H, n, D, dtype=dtype, device=device, scale=2, seed=i) for i, n in enumerate((M, N)))
    lse = (q.double() @ k.double().transpose(2, 3) * D**-0.5).logsumexp(-1).float() if knows_lse else None
    got, want = saliency(q, k, lse=lse), saliency_ref(q, k)
    assert error(got, want) < (FLOAT32_SUM if knows_lse or dtype == torch.float32 else 1e-3)
    assert got.sum(dim=1).tolist() == pytest.approx([1.0] * B, rel=1e-3)


def test_no_keys(dtype: torch.dtype, device: str) -> None:
    q, k = rand(2, 3, 64, dtype=dtype, device=device), torch.empty(2, 0, 64, dtype=dtype, device=device)
    assert column_sums(q, k, torch.zeros(2, 3, device=device), 1.0).shape == (2, 0)


# Decode attention ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("H", "H_kv", "A", "used_a", "B", "used_b", "D"),
    [
        (4, 2, 70, 70, CHUNK + 44, CHUNK + 1, 64),
        (6, 6, 0, 0, 100, 1, 72),
        (28, 4, 2 * CHUNK + 8, 2 * CHUNK, 40, 7, 80),
        (2, 1, CHUNK, 0, CHUNK + 44, CHUNK + 44, 128),
        (1, 1, 30, 29, 0, 0, 64),
    ],
)
def test_decode_attention(
    H: int, H_kv: int, A: int, used_a: int, B: int, used_b: int, D: int, dtype: torch.dtype, device: str
) -> None:
    q = rand(H, D, dtype=dtype, device=device)
    stores = [
        tuple(rand(H_kv, n, D, dtype=dtype, device=device, seed=s) for s in (i, i + 9)) for i, n in enumerate((A, B))
    ]
    for store, used in zip(stores, (used_a, used_b), strict=True):
        for tensor in store:
            tensor[:, used:] = float("nan")  # what lies behind the end must not be read
    lengths = torch.tensor([used_a, used_b], device=device)
    got = decode_attention(q, stores[0], stores[1], lengths, D**-0.5)
    a, b = ((k[:, :n], v[:, :n]) for (k, v), n in zip(stores, (used_a, used_b), strict=True))
    want = decode_attention_ref(q, a, b)
    assert error(got, want) < 2 * STEP[dtype]
    if used_a + used_b > CHUNK:  # without the last key it would be seen
        one_less = (a, (b[0][:, :-1], b[1][:, :-1])) if used_b else ((a[0][:, :-1], a[1][:, :-1]), b)
        assert error(decode_attention_ref(q, *one_less), want) > 4 * STEP[torch.float16]


def test_decode_attention_over_heads_of_different_lengths(dtype: torch.dtype, device: str) -> None:
    H, H_kv, D, room = 6, 3, 80, 2 * CHUNK + 9
    lengths = torch.tensor([[CHUNK + 7, 5], [0, 2 * CHUNK], [2 * CHUNK + 9, 1]], device=device)
    q = rand(H, D, dtype=dtype, device=device)
    a, b = (tuple(rand(H_kv, room, D, dtype=dtype, device=device, seed=s) for s in (i, i + 9)) for i in range(2))
    for i, store in enumerate((a, b)):
        for tensor in store:
            for head in range(H_kv):
                tensor[head, lengths[head, i] :] = float("nan")
    got = decode_attention(q, a, b, lengths, D**-0.5)
    for head, (A, B) in enumerate(lengths.tolist()):
        rows, own = slice(2 * head, 2 * head + 2), slice(head, head + 1)
        want = decode_attention_ref(q[rows], (a[0][own, :A], a[1][own, :A]), (b[0][own, :B], b[1][own, :B]))
        assert error(got[rows], want) < 2 * STEP[dtype]
    whole = [tuple(t.nan_to_num(1.0) for t in store) for store in (a, b)]
    same = torch.tensor([[300, 40]] * H_kv, device=device)  # one pair of lengths for all heads is the same, bit for bit
    found = [decode_attention(q, *whole, used, D**-0.5) for used in (same[0], same)]
    assert torch.equal(*found)


def test_the_result_does_not_depend_on_the_capacity(dtype: torch.dtype, device: str) -> None:
    q, k, v = (rand(*shape, dtype=dtype, device=device) for shape in ((4, 64), (2, 700, 64), (2, 700, 64)))
    lengths = torch.tensor([300, 290], device=device)
    found = [
        decode_attention(q, (k[:, :room], v[:, :room]), (k[:, :room], v[:, :room]), lengths, 0.125)
        for room in (300, 700)
    ]
    assert torch.equal(found[0], found[1])


# A question over the stores ------------------------------------------------------------------------------------------

QUESTIONS = [  # H, H_kv, M, A, B, D
    (4, 2, 9, 700, 37, 64),
    (3, 3, 1, 0, 0, 72),
    (14, 2, 25, 65, 640, 80),
    (2, 1, 70, 0, 5, 128),
    (6, 2, 50, 64, 0, 64),
]


@pytest.mark.parametrize(("H", "H_kv", "M", "A", "B", "D"), QUESTIONS)
def test_extend_attention(H: int, H_kv: int, M: int, A: int, B: int, D: int, dtype: torch.dtype, device: str) -> None:
    q = rand(M, H, D, dtype=dtype, device=device, scale=2).transpose(0, 1)  # as a projection leaves it
    own = [rand(M, H_kv, D, dtype=dtype, device=device, seed=s).transpose(0, 1) for s in (1, 2)]
    stores = []
    for i, n in enumerate((A, B)):
        store = [rand(H_kv, n + 9, D, dtype=dtype, device=device, seed=s) for s in (i, i + 9)]
        for tensor in store:
            tensor[:, n:] = float("nan")  # what lies behind the end must not be read
        stores.append((store[0][:, :n], store[1][:, :n]))
    got, lse = extend_attention(q, *own, *stores)
    want, want_lse = extend_attention_ref(q, *own, *stores)
    assert got.dtype == dtype
    assert error(got, want) < 2 * STEP[dtype]
    assert error(lse, want_lse) < 4 * STEP[torch.float32]
    if M > 1:  # a row that sees the one after it, or a head that reads another's keys
        assert error(extend_attention_ref(q, *(t.roll(1, dims=1) for t in own), *stores)[0], want) > 8 * STEP[dtype]
    if H_kv > 1 and M > 1:
        assert error(extend_attention_ref(q, *(t.roll(1, dims=0) for t in own), *stores)[0], want) > 8 * STEP[dtype]


def test_shares_of_the_keys() -> None:
    sizes = ((4, 1000), (300, 1000), (20, 9), (1, 0), (1, 9999))
    assert [num_shares(programs, blocks) for programs, blocks in sizes] == [64, 1, 2, 1, 64]


# Top-k --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("L", "N", "k"), [(3, 1, 1), (2, 130, 129), (4, 700, 70), (1, 9000, 900), (2, 5000, 4999)])
@pytest.mark.parametrize("values", ["distinct", "ties", "equal", "signs"])
def test_top_k(L: int, N: int, k: int, values: str, device: str) -> None:
    scores = rand(L, N, dtype=torch.float32, device=device, scale=1e-4)
    if values == "ties":
        scores = (scores * 3e4).round() * 1e-30
    elif values == "equal":
        scores = torch.full_like(scores, 0.25)
    elif values == "signs":
        scores = scores.sign() * 0.0  # zeros of both signs are one number
        scores[:, ::7], scores[:, 3::11] = -torch.inf, 3e38
    got = top_k(scores, k)
    assert got.dtype == torch.int64
    assert torch.equal(got.cpu(), top_k_ref(scores.cpu(), k))


# Gather -------------------------------------------------------------------------------------------------------------


def test_gather_of_many_stores(dtype: torch.dtype, device: str) -> None:
    H_kv, N, D = 3, 100, 72
    rng = torch.Generator().manual_seed(0)
    sources = [rand(H_kv, N, D, dtype=dtype, device=device, seed=i) for i in range(4)]
    keep = [torch.randperm(N, generator=rng)[:k].sort().values.to(device) for k in (40, 1, 33)]
    keep.append(torch.stack([torch.randperm(N, generator=rng)[:50] for _ in range(H_kv)]).to(device))
    targets = [torch.full((H_kv, 60, D), 7.0, dtype=dtype, device=device) for _ in sources]
    gather(sources, keep, targets)
    for source, index, target in zip(sources, keep, targets, strict=True):
        for head in range(H_kv):
            own = index if index.ndim == 1 else index[head]
            assert torch.equal(target[head, : len(own)], source[head, own])
            assert (target[head, len(own) :] == 7).all()


# Small fusions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("D", [64, 1000, 3584])
@pytest.mark.parametrize("adds", [False, True])
def test_rms_norm(D: int, adds: bool, dtype: torch.dtype, device: str) -> None:
    x, added, weight = (rand(3, D, dtype=dtype, device=device, seed=s) for s in range(3))
    total, got = rms_norm(x, weight[0], 1e-5, added if adds else None)
    assert torch.equal(total, x + added if adds else x)
    want = rms_norm_ref(total, weight[0], 1e-5)
    assert error(got, want) < 2 * STEP[dtype]


def test_silu_mul(dtype: torch.dtype, device: str) -> None:
    gate_up = rand(3, 2 * 1500, dtype=dtype, device=device)
    gate, up = gate_up.double().chunk(2, dim=1)
    assert error(silu_mul(gate_up), F.silu(gate) * up) < 2 * STEP[dtype]


@pytest.mark.parametrize("D", [32, 72, 128])
def test_rope_append_does_what_four_operations_do(D: int, dtype: torch.dtype, device: str) -> None:
    H, H_kv, M, start = 4, 2, 3, 7
    qkv = rand(M, H + 2 * H_kv, D, dtype=dtype, device=device)
    cos, sin = rand(2, M, D // 2, dtype=dtype, device=device)
    stores = torch.full((2, H_kv, 20, D), 9.0, dtype=dtype, device=device)
    got = rope_append(qkv, cos, sin, stores[0], stores[1], torch.tensor([start + M], device=device))
    heads = qkv.transpose(0, 1)
    assert torch.equal(got, rope(heads[:H], cos, sin))
    rows = slice(start, start + M)
    assert torch.equal(stores[0][:, rows], rope(heads[H : H + H_kv], cos, sin))
    assert torch.equal(stores[1][:, rows], heads[H + H_kv :])
    assert (stores[:, :, :start] == 9).all()
    assert (stores[:, :, start + M :] == 9).all()


# 8 bits -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("K", [1, 72, 1000])
def test_quantize_rows(K: int, dtype: torch.dtype, device: str) -> None:
    x = rand(6, K, dtype=dtype, device=device)
    x[1] = 0
    x[2, K // 2] = float("nan")
    x[3, 0] = float("inf")
    codes, scales = quantize_rows(x)
    want_codes, want_scales = quantize_rows_ref(x)
    usable = torch.tensor([0, 1, 4, 5], device=device)
    assert torch.equal(scales[usable], want_scales[usable])
    assert scales[2].isnan()
    assert scales[3].isinf()
    # A quotient that is a tie in float32 alone goes to the even code.
    assert (codes[usable].int() - want_codes[usable].int()).abs().max() <= 1
    assert torch.equal(codes[usable], plain_quantize_rows(x)[0][usable])


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_quantised_norm(norm: str, dtype: torch.dtype, device: str) -> None:
    K = 1000
    x, weight, bias = rand(5, K, dtype=dtype, device=device), *rand(2, K, dtype=dtype, device=device, seed=3)
    codes, scales = quantize_rows(x, norm, weight, bias if norm == "layer" else None, 1e-5)
    exact = F.layer_norm(x, (K,), weight, bias, 1e-5) if norm == "layer" else rms_norm_ref(x, weight, 1e-5).to(dtype)
    want_codes, want_scales = plain_quantize_rows(exact)
    # The norm is rounded to 16 bits: where that falls the other way, a code moves by one.
    assert error(scales, want_scales.double()) < 2 * STEP[dtype]
    assert (codes.int() - want_codes.int()).abs().max() <= 1
    assert (codes != want_codes).float().mean() < (0.2 if dtype == torch.bfloat16 else 0.05)


@pytest.mark.parametrize(("M", "N", "K"), [(3, 70, 100), (50, 130, 172), (150, 66, 300), (129, 129, 1)])
@pytest.mark.parametrize("activation", ["", "gelu", "quick_gelu", "silu", "gelu_pytorch_tanh"])
def test_int8_linear(M: int, N: int, K: int, activation: str, dtype: torch.dtype, device: str) -> None:
    rng = torch.Generator().manual_seed(M)
    a, w = (torch.randint(-127, 128, (n, K), generator=rng, dtype=torch.int8).to(device) for n in (M, N))
    act_scales, scales = ((torch.rand(n, generator=rng) * 0.02).to(device) for n in (M, N))
    bias = rand(N, dtype=dtype, device=device)
    apply = {"": lambda v: v, "gelu": F.gelu, "quick_gelu": lambda v: v * torch.sigmoid(1.702 * v), "silu": F.silu}
    apply["gelu_pytorch_tanh"] = lambda v: F.gelu(v, approximate="tanh")
    plain = (a.double() @ w.double().t()) * act_scales[:, None].double() * scales.double()
    for own in (bias, None):
        got = int8_linear(padded(a), act_scales, padded(w), scales, own, dtype, activation)
        want = apply[activation](plain + (0 if own is None else own.double()))
        assert error(got, want) < STEP[dtype]


@pytest.mark.parametrize("K", [1, 48, 3420])
def test_rows_are_padded_once(K: int, device: str) -> None:
    codes = torch.randint(-127, 128, (5, K), dtype=torch.int8, device=device)
    packed, ones = pack_w8a8(codes), torch.ones(5, device=device)
    assert torch.equal(packed, codes)
    whole = with_padding(packed)
    assert whole.data_ptr() == packed.data_ptr()
    assert whole.shape[1] % 16 == 0
    assert not whole[:, K:].any()
    assert torch.equal(with_padding(codes), whole)
    with pytest.raises(ValueError, match="multiple of 16"):
        int8_linear(codes[:, :1], ones, codes[:, :1], ones, None, torch.float16)


def test_the_sums_are_exact(device: str) -> None:
    a = torch.full((20, 2000), 127, dtype=torch.int8, device=device)
    w = torch.full((40, 2000), -127, dtype=torch.int8, device=device)
    w[:, ::2] = 126
    ones = [torch.ones(n, device=device) for n in (20, 40)]
    got = int8_linear(a, ones[0], w, ones[1], None, torch.float32)
    assert (got == 127 * (126 - 127) * 1000).all()


# 4 bits -------------------------------------------------------------------------------------------------------------


class TestInt4:
    SIZES = (
        (1, 70, 300, 128),
        (3, 130, 1024, 64),
        (16, 64, 700, 32),
        (33, 65, 640, 128),
        (2, 17, 40, 32),
    )  # T, N, K, g

    @staticmethod
    def matrix(N: int, K: int, g: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
        rng = torch.Generator().manual_seed(N)
        groups = -(-K // g)
        codes = torch.randint(0, 16, (N, K), generator=rng)
        scales = ((torch.rand(N, groups, generator=rng) + 0.5) * 0.02).half()
        zeros = torch.randint(0, 16, (N, groups), generator=rng, dtype=torch.uint8)
        return codes.to(device), scales.to(device), zeros.to(device)

    @staticmethod
    def dense(codes: Tensor, scales: Tensor, zeros: Tensor, g: int) -> Tensor:
        group = torch.arange(codes.shape[1], device=codes.device) // g
        return (codes - zeros[:, group]).double() * scales[:, group].double()

    @pytest.mark.parametrize(("T", "N", "K", "g"), SIZES)
    def test_product(self, T: int, N: int, K: int, g: int, device: str) -> None:
        dtype = torch.float16
        codes, scales, zeros = self.matrix(N, K, g, device)
        x, bias = rand(T, K, dtype=dtype, device=device), rand(N, dtype=dtype, device=device)
        packed = pack_scales(scales, zeros, K, g)
        for own in (bias, None):
            got = few_tokens(x, pack_words(codes), *packed, g, own)
            want = x.double() @ self.dense(codes, scales, zeros, g).t() + (0 if own is None else own.double())
            assert error(got, want) < STEP[dtype]

    @pytest.mark.parametrize(("T", "N", "K", "g"), SIZES)
    def test_dequantised(self, T: int, N: int, K: int, g: int, device: str) -> None:
        codes, scales, zeros = self.matrix(N, K, g, device)
        got = dequantised(pack_words(codes), *pack_scales(scales, zeros, K, g), g, K, torch.float16)
        assert torch.equal(got, self.dense(codes, scales, zeros, g).half())

    def test_mistakes_would_be_seen(self, device: str) -> None:
        """Each a mutation of what the kernel has to compute: its error is far above the tolerance."""
        codes, scales, zeros = self.matrix(64, 512, 64, device)
        x = rand(4, 512, dtype=torch.float16, device=device).double()
        want = x @ self.dense(codes, scales, zeros, 64).t()
        swapped = codes.view(64, -1, 4, 16, 2).flip(2).flatten(1)
        halves = codes.view(64, -1, 2).flip(2).flatten(1)
        mistakes = {
            "no zero point": self.dense(codes, scales, zeros * 0, 64),
            "zero point off by one": self.dense(codes, scales, zeros + 1, 64),
            "nibbles reversed": self.dense(swapped, scales, zeros, 64),
            "halves exchanged": self.dense(halves, scales, zeros, 64),
            "group off by one": self.dense(codes, scales.roll(1, dims=1), zeros, 64),
            "last block left out": self.dense(codes, scales, zeros, 64) * (torch.arange(512, device=device) < 384),
        }
        for name, weight in mistakes.items():
            assert error(x @ weight.t(), want) > 20 * STEP[torch.float16], name

    @pytest.mark.parametrize("K", [16, 128, 300])
    def test_words(self, K: int, device: str) -> None:
        codes = self.matrix(5, K, 32, device)[0]
        words = pack_words(codes)
        assert torch.equal(unpack_words(words, K).long(), codes)
        if K == 300:
            block, word, i = 1, 5, 3
            k = 128 * block + 32 * i + 2 * word
            for half in (0, 1):
                assert torch.equal((words[:, 16 * block + word] >> (4 * i + 16 * half)) & 15, codes[:, k + half].int())
