"""Every op against its float64 definition on awkward shapes, with tolerances from the dtype."""

import sys

import pytest
import torch

from sparsevila.kernels.add_rms_norm import add_rms_norm, add_rms_norm_ref
from sparsevila.kernels.attention import attention, attention_ref, merge_attention
from sparsevila.kernels.compaction import compaction, compaction_ref
from sparsevila.kernels.decode_attention import decode_attention, decode_attention_ref
from sparsevila.kernels.extend_attention import extend_attention, extend_attention_ref
from sparsevila.kernels.retrieval import retrieval, retrieval_ref
from sparsevila.kernels.rms_norm import rms_norm, rms_norm_ref
from sparsevila.kernels.rope import rope, rope_ref
from sparsevila.kernels.rope_append import rope_append, rope_append_ref
from sparsevila.kernels.saliency import saliency, saliency_ref
from sparsevila.kernels.silu_mul import silu_mul, silu_mul_ref
from sparsevila.kernels.top_k import top_k, top_k_ref

# Relative to the largest value of the reference; bfloat16 keeps 8 bits, float32 24.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.5e-2}
LSE_TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 5e-5}  # the op scales bfloat16 scores before it widens them
DTYPES = list(TOLERANCE)
SHAPES = [(4, 2, 1, 7, 64), (28, 4, 17, 130, 72), (3, 3, 33, 513, 80), (8, 1, 130, 4100, 32)]  # H, H_kv, M, N, D


def rand(*shape, dtype=torch.float32, scale=1.0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))) * scale).to(dtype)


def assert_close(got, want, dtype, tolerance=None):
    assert got.shape == want.shape
    assert torch.isfinite(got).all()
    error = (got.double() - want).abs().max() / want.abs().max()
    assert error < (tolerance or TOLERANCE[dtype]), f"relative error {error:.2e}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("H", "H_kv", "M", "N", "D"), SHAPES)
class TestAttention:
    def test_segment(self, H, H_kv, M, N, D, dtype):
        q, k, v = (rand(h, n, D, dtype=dtype) for h, n in ((H, M), (H_kv, N), (H_kv, N)))
        out, lse = attention(q, k, v, causal=False)
        want, want_lse = attention_ref(q, k, v, causal=False)
        assert_close(out, want, dtype)
        assert lse.dtype == torch.float32
        assert_close(lse, want_lse, dtype, LSE_TOLERANCE[dtype])

    def test_causal(self, H, H_kv, M, N, D, dtype):
        q, k, v = (rand(h, M, D, dtype=dtype) for h in (H, H_kv, H_kv))
        out, lse = attention(q, k, v, causal=True)
        want, want_lse = attention_ref(q, k, v, causal=True)
        assert_close(out, want, dtype)
        assert_close(lse, want_lse, dtype, LSE_TOLERANCE[dtype])

    def test_merge(self, H, H_kv, M, N, D, dtype):
        q, k, v = (rand(h, n, D, dtype=dtype) for h, n in ((H, M), (H_kv, N), (H_kv, N)))
        cut = N // 3 or 1
        parts = [attention(q, k[:, s], v[:, s], causal=False) for s in (slice(0, cut), slice(cut, N))]
        out, lse = merge_attention(parts)
        want, want_lse = attention_ref(q, k, v, causal=False)
        assert_close(out, want, dtype)
        assert_close(lse, want_lse, dtype, LSE_TOLERANCE[dtype])

    def test_decode(self, H, H_kv, M, N, D, dtype):
        q, k, v = rand(H, D, dtype=dtype), rand(H_kv, N, D, dtype=dtype), rand(H_kv, N, D, dtype=dtype, scale=0.5)
        for cut in {0, N // 4, N - 1}:  # segments are slices, as in a store
            a, b = (k[:, :cut], v[:, :cut]), (k[:, cut:], v[:, cut:])
            assert_close(decode_attention(q, a, b), decode_attention_ref(q, a, b), dtype)

    def test_extend(self, H, H_kv, M, N, D, dtype):
        N = min(N, 520)  # as the interpreter has to walk through all of them
        q = rand(H, M, D, dtype=dtype)
        k, v = (rand(H_kv, N, D, dtype=dtype), rand(H_kv, N, D, dtype=dtype, scale=0.5))
        own = rand(H_kv, M, D, dtype=dtype), rand(H_kv, M, D, dtype=dtype).flip(1)
        for cut in {0, N // 4}:
            stores = (k[:, :cut], v[:, :cut]), (k[:, cut:], v[:, cut:])
            out, lse = extend_attention(q, *own, *stores)
            want, want_lse = extend_attention_ref(q, *own, *stores)
            assert_close(out, want, dtype)
            assert_close(lse, want_lse, dtype, LSE_TOLERANCE[dtype])
        with pytest.raises(ValueError, match="expected keys"):
            extend_attention(q, k[:, : M - 1], v[:, : M - 1], *stores)

    def test_retrieval(self, H, H_kv, M, N, D, dtype):
        q, k = rand(H, M, D, dtype=dtype), rand(H_kv, N, D, dtype=dtype)
        lse = attention_ref(q, k, k, causal=False)[1].float() + 0.5  # keys beyond the visual ones take a share
        got = retrieval(q, k, lse)
        assert got.dtype == torch.float32
        assert_close(got, retrieval_ref(q, k, lse), torch.float32)
        assert got.sum() == pytest.approx(H * M * torch.tensor(-0.5).exp().item(), rel=1e-4)
        apart = retrieval(q, k, lse, per_head=True)
        assert_close(apart, retrieval_ref(q, k, lse, per_head=True), torch.float32)
        group = H // H_kv
        for head in range(H_kv):  # as if the others were not there
            own = slice(head * group, (head + 1) * group)
            assert_close(apart[head], retrieval_ref(q[own], k[head : head + 1], lse[own]), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("B", "H", "M", "N", "D"), [(2, 4, 1, 17, 64), (1, 3, 577, 577, 64), (3, 2, 300, 130, 72)])
def test_saliency(B, H, M, N, D, dtype):
    q, k = rand(B, H, M, D, dtype=dtype, scale=2), rand(B, H, N, D, dtype=dtype)
    want = saliency_ref(q, k)
    assert_close(saliency(q, k), want, torch.float32)
    scores = q.double() @ k.double().transpose(2, 3) * D**-0.5
    assert_close(saliency(q, k, lse=scores.logsumexp(-1).float()), want, torch.float32)


def test_saliency_takes_a_few_heads_at_a_time(monkeypatch):
    """On a CPU: no tile holds two heads, or one tile holds three of five."""
    q, k = rand(1, 5, 40, 16, scale=2), rand(1, 5, 30, 16)
    for entries in (1, 3 * 40 * 30):
        monkeypatch.setattr(sys.modules[saliency.__module__], "_TILE_ENTRIES", entries)
        assert_close(saliency(q, k), saliency_ref(q, k), torch.float32)


@pytest.mark.parametrize("D", [64, 72, 80, 128])
@pytest.mark.parametrize("H_kv", [4, 2, 1])
def test_saliency_and_retrieval_equal_flash_colreduce(D, H_kv):
    """The authors' definition: a mean over rows of the softmax; ours is a mean over heads as well."""
    from flash_colreduce import naive_colreduce

    q, k = rand(2, 4, 9, D, scale=2), rand(2, H_kv, 33, D)
    each = k.repeat_interleave(4 // H_kv, dim=1)  # theirs and the encoders have a key for each query head
    assert_ranks_alike(saliency(q, each), naive_colreduce(q, each, reduction="mean").mean(dim=1))
    # A question of 9 rows over [24 visual keys | itself]: causal and right-aligned, visual columns sliced afterwards.
    causal = naive_colreduce(q, each, reduction="sum", is_causal=True)[0].sum(dim=0)[:24]
    inside, lse_inside = attention(q[0], k[0, :, 24:], k[0, :, 24:], causal=True)
    before, lse_before = attention(q[0], k[0, :, :24], k[0, :, :24], causal=False)
    _, lse = merge_attention([(before, lse_before), (inside, lse_inside)])
    assert_ranks_alike(retrieval(q[0], k[0, :, :24], lse), causal)


def assert_ranks_alike(got, want):
    """Each entry within a relative error, and every two that are farther apart than that in the same order."""
    apart = want[..., :, None] > want[..., None, :] * (1 + 2e-5)
    assert apart.sum() > 0.98 * want.numel() * (want.shape[-1] - 1) / 2
    assert (got[..., :, None] > got[..., None, :])[apart].all()
    assert ((got - want).abs() <= 1e-5 * want).all()


@pytest.mark.parametrize("wrong", [torch.zeros_like, lambda x: x.flip(-1), lambda x: 1.001 * x])
def test_a_wrong_result_does_not_rank_alike(wrong):
    want = torch.linspace(1, 2, 33).roll(5)
    assert_ranks_alike(want.clone(), want)
    with pytest.raises(AssertionError):
        assert_ranks_alike(wrong(want), want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [1, 33, 128])
def test_rms_norm(D, dtype):
    x, weight = rand(7, D, dtype=dtype, scale=3), rand(D, dtype=dtype)
    assert_close(rms_norm(x, weight, 1e-5), rms_norm_ref(x, weight, 1e-5), dtype)
    with pytest.raises(ValueError, match="expected weight"):
        rms_norm(x, weight[None], 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [2, 72, 128])
def test_rope(D, dtype):
    x = rand(3, 17, D, dtype=dtype)
    angle = torch.arange(17)[:, None] * torch.linspace(0.1, 1, D // 2)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    assert_close(rope(x, cos, sin), rope_ref(x, cos, sin), dtype)


@pytest.mark.parametrize("k", [1, 3, 40])
def test_top_k_is_sorted_and_ties_go_low(k):
    scores = torch.randint(0, 5, (6, 40), generator=torch.Generator().manual_seed(0)).float()
    assert torch.equal(top_k(scores, k), top_k_ref(scores, k))
    assert torch.equal(top_k(torch.zeros(1, 9), 4), torch.arange(4)[None])
    with pytest.raises(ValueError, match="k 41"):
        top_k(scores, 41)


def test_compaction():
    sources = [rand(3, 19, 8), rand(3, 19, 8).flip(0), rand(3, 30, 8)]
    keep = [torch.tensor([0, 4, 5, 18]), torch.tensor([7]), torch.arange(0, 30, 5)]
    got, want = ([torch.full((3, n, 8), torch.nan) for n in (7, 1, 6)] for _ in range(2))
    compaction(sources, keep, got)
    compaction_ref(sources, keep, want)
    for x, y, index in zip(got, want, keep, strict=True):
        assert torch.equal(x[:, : len(index)], y[:, : len(index)])
        assert x[:, len(index) :].isnan().all()
    for bad in (got[:2], [*got[:2], torch.empty(3, 5, 8)]):
        with pytest.raises(ValueError, match="expected"):
            compaction(sources, keep, bad)


def test_compaction_of_sets_per_head():
    sources = [rand(3, 19, 8), rand(3, 19, 8).flip(0)]
    keep = [torch.tensor([[0, 4], [1, 4], [17, 18]]), torch.tensor([7])]
    got, want = ([torch.full((3, 4, 8), torch.nan) for _ in range(2)] for _ in range(2))
    compaction(sources, keep, got)
    compaction_ref(sources, keep, want)
    for x, y, index in zip(got, want, keep, strict=True):
        assert torch.equal(x[:, : index.shape[-1]], y[:, : index.shape[-1]])
        assert x[:, index.shape[-1] :].isnan().all()
    assert torch.equal(got[0][2, 0], sources[0][2, 17])
    with pytest.raises(ValueError, match="keep"):
        compaction(sources[:1], [keep[0][:2]], got[:1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_rms_norm(dtype):
    x, added, weight = (rand(*shape, dtype=dtype) for shape in ((5, 344), (5, 344), (344,)))
    added = added.flip(0)
    total, normed = add_rms_norm(x, added, weight, 1e-6)
    want_total, want = add_rms_norm_ref(x, added, weight, 1e-6)
    assert torch.equal(total, x + added)
    assert_close(total, want_total, dtype)
    assert_close(normed, want, dtype)
    assert_close(normed, rms_norm(total, weight, 1e-6).double(), dtype)
    with pytest.raises(ValueError, match="expected x and added"):
        add_rms_norm(x, added[1:], weight, 1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("H", "H_kv", "M", "D", "end"), [(4, 2, 1, 64, 9), (6, 1, 3, 72, 3), (2, 2, 2, 32, 12)])
def test_rope_append(H, H_kv, M, D, end, dtype):
    qkv = rand(M, H + 2 * H_kv, D, dtype=dtype)
    cos, sin = rand(2, M, D // 2, dtype=dtype)
    got, want = (torch.full((2, H_kv, 12, D), 7.0, dtype=dtype) for _ in range(2))
    at = torch.tensor([end])
    assert_close(rope_append(qkv, cos, sin, *got, at), rope_append_ref(qkv, cos, sin, *want, at), dtype)
    assert_close(got, want.double(), dtype)
    untouched = torch.ones(12, dtype=torch.bool)
    untouched[end - M : end] = False
    assert (got[:, :, untouched] == 7).all()
    with pytest.raises(ValueError, match="expected stores"):
        rope_append(qkv, cos, sin, *got, torch.tensor(end))


@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_attention_reads_what_is_in_use(dtype):
    q, k, v = rand(6, 64, dtype=dtype), rand(2, 30, 64, dtype=dtype), rand(2, 30, 64, dtype=dtype)
    k[:, 20:] = v[:, 20:] = torch.nan
    got = decode_attention(q, (k, v), (k, v), torch.tensor([20, 7]))
    assert_close(got, decode_attention_ref(q, (k, v), (k, v), torch.tensor([20, 7])), dtype)
    assert torch.equal(got, decode_attention(q, (k[:, :20], v[:, :20]), (k[:, :7], v[:, :7])))


@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_attention_over_heads_of_different_lengths(dtype):
    q, k, v = rand(6, 64, dtype=dtype), rand(2, 30, 64, dtype=dtype), rand(2, 30, 64, dtype=dtype)
    used = torch.tensor([[20, 7], [0, 30]])
    k[0, 20:] = v[0, 20:] = torch.nan
    got, want = (attend(q, (k, v), (k, v), used) for attend in (decode_attention, decode_attention_ref))
    assert_close(got, want, dtype)
    for head, (A, B) in enumerate(used.tolist()):
        rows, own = slice(3 * head, 3 * head + 3), slice(head, head + 1)
        assert_close(
            want[rows], decode_attention_ref(q[rows], (k[own, :A], v[own, :A]), (k[own, :B], v[own, :B])), torch.float32
        )
    with pytest.raises(ValueError, match=r"lengths \(2,\) or \(2, 2\)"):
        decode_attention(q, (k, v), (k, v), torch.ones(6, 2, dtype=torch.int64))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 3, 10), (7, 2 * 344)])
def test_silu_mul(shape, dtype):
    x = rand(*shape, dtype=dtype)
    assert_close(silu_mul(x), silu_mul_ref(x), dtype)
    with pytest.raises(ValueError, match="2 F"):
        silu_mul(x[..., 1:])


def test_every_op_has_a_reference_with_the_same_arguments():
    import importlib
    import inspect
    from pathlib import Path

    folder = Path(inspect.getfile(attention)).parent
    names = sorted({path.stem for path in folder.glob("*.py")} - {"backend"})
    assert len(names) >= 8
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    for name in names:
        module = importlib.import_module(f"sparsevila.kernels.{name}")
        op, reference = getattr(module, name), getattr(module, f"{name}_ref")
        assert list(inspect.signature(op).parameters) == list(inspect.signature(reference).parameters), name
        assert op.__doc__, name
        assert f"{name}_ref" in tests, f"{name} is compared with nothing here"
