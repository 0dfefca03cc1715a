"""8-bit linear layers and the codes of their inputs against float64, and that each fault would show."""

from __future__ import annotations

import os

import pytest
import torch
from guarded_memory import at_the_end

from sparsevila.kernels import w8a8 as module
from sparsevila.kernels.activation import ACTIVATIONS, activation, activation_ref
from sparsevila.kernels.backend import cpu_level
from sparsevila.kernels.cpu import int8_linear
from sparsevila.kernels.quantize_rows import RowNorm, quantize_rows, quantize_rows_ref
from sparsevila.kernels.w8a8 import MAX_IN_FEATURES, pack_w8a8, w8a8, w8a8_ref

# The int32 sum is exact; what is left are three float32 roundings and the one to x's dtype.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
DTYPES = list(TOLERANCE)
SHAPES = [(1, 64, 64), (7, 5, 13), (17, 96, 65), (130, 33, 1), (3, 1, 7), (1, 1, 1), (2, 8, 18944)]  # M, N, K


def inputs(M: int, K: int, dtype: torch.dtype = torch.float32):
    rng = torch.Generator().manual_seed(M + K)
    x = torch.randn(M, K, generator=rng) * torch.logspace(-2, 1, M)[:, None]  # rows of very different size
    x[:, K // 2] *= 20  # an outlier, as activations have
    return x.to(dtype)


def weights(N: int, K: int):
    rng = torch.Generator().manual_seed(N * K)
    codes = torch.randint(-128, 128, (N, K), generator=rng, dtype=torch.int8)
    return codes, (torch.rand(N, generator=rng) + 0.1) * 0.01


def error(got, want) -> float:
    """The largest of each row's errors relative to that row."""
    assert got.shape == want.shape
    assert torch.isfinite(got).all()
    return float(((got.double() - want).abs().amax(-1) / want.abs().amax(-1)).max())


def by_onednn(codes: torch.Tensor) -> torch.Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "cpu_level", lambda: "")
        return pack_w8a8(codes)


def by_level(level: str):
    """Packs for machine code; the level is that of the whole test, since the product asks for it too."""

    def pack(codes: torch.Tensor) -> torch.Tensor:
        assert cpu_level() == level
        return pack_w8a8(codes)

    pack.__name__ = level
    return pack


@pytest.fixture(autouse=True)
def level(request, limit_cpu):
    """Of a test with such a `pack`: the environment is set for both calls."""
    pack = request.node.callspec.params.get("pack") if hasattr(request.node, "callspec") else None
    if getattr(pack, "__name__", "") in MACHINE:
        limit_cpu(pack.__name__)
        if cpu_level() != pack.__name__:
            pytest.skip(f"the processor has no {pack.__name__}")
        if os.environ.get("TRITON_INTERPRET") == "1":
            pytest.skip("the Triton kernels run in its place")


MACHINE = ("avx512", "amx")
BY_LEVEL = [by_level(name) for name in MACHINE]
PACKS = pytest.mark.parametrize("pack", [torch.clone, by_onednn, *BY_LEVEL])


class TestQuantizeRows:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize(("M", "N", "K"), SHAPES)
    def test_against_the_definition(self, M, N, K, dtype):
        x = inputs(M, K, dtype)
        codes, scales = quantize_rows(x)
        want, want_scales = quantize_rows_ref(x)
        assert (codes.dtype, scales.dtype) == (torch.int8, torch.float32)
        assert torch.allclose(scales, want_scales, rtol=1e-7, atol=0)
        differ = codes != want
        # A quotient may be rounded to a tie on its way; nothing else may differ.
        quotient = x.double()[differ] / scales.double()[:, None].expand(M, K)[differ]
        assert bool(((quotient - quotient.floor() - 0.5).abs() < 1e-4).all())
        assert codes.long().abs().amax(1).eq(127).all()
        assert (codes.double() * scales.double()[:, None] - x.double()).abs().le(scales.double()[:, None] * 0.501).all()

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_row_after_row_and_nothing_is_changed(self, dtype):
        x = inputs(600, 342, dtype)  # more than one step
        kept = x.clone()
        codes, scales = quantize_rows(x)
        assert torch.equal(x, kept)
        rows = [quantize_rows(row[None]) for row in x]
        assert torch.equal(codes, torch.cat([row[0] for row in rows]))
        assert torch.equal(scales, torch.cat([row[1] for row in rows]))
        assert torch.equal(scales, x.float().abs().amax(1) / 127)

    def test_ties_go_to_even(self):
        x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5]])
        assert quantize_rows(x)[0].tolist() == [[127, 0, 2, 2, 0, -2, -2]]

    def test_rows_of_zeros_and_next_to_zero(self):
        x = torch.tensor([[0.0, 0.0], [1e-45, 0.0], [1e-42, -1e-42], [3.0, -1.5]])
        codes, scales = quantize_rows(x)
        assert codes[:2].eq(0).all()
        assert scales[:2].eq(1).all()
        assert torch.isfinite(scales).all()
        assert scales.gt(0).all()
        assert codes[3].tolist() == [127, -64]

    def test_what_is_no_number_shows_in_its_row_alone(self):
        x = torch.ones(3, 4)
        x[0, 1], x[1, 2] = float("nan"), float("inf")
        out = w8a8(x, torch.ones(2, 4, dtype=torch.int8), torch.ones(2))
        assert not torch.isfinite(out[:2]).any()
        assert torch.isfinite(out[2]).all()

    def test_refused(self):
        for x in (torch.ones(4), torch.ones(2, 0), torch.ones(2, 2, dtype=torch.int32)):
            with pytest.raises(ValueError, match="expected x"):
                quantize_rows(x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("M", "N", "K"), SHAPES)
@PACKS
def test_against_the_definition(M, N, K, dtype, pack):
    x, (codes, scales) = inputs(M, K, dtype), weights(N, K)
    bias = torch.randn(N, generator=torch.Generator().manual_seed(0)).to(dtype)
    got = w8a8(x, pack(codes), scales, bias)
    assert got.dtype == dtype
    want = w8a8_ref(x, codes, scales, bias)
    # Where product and bias cancel, what counts is the size of the two.
    size = want.abs().amax(-1, keepdim=True) + bias.double().abs().max()
    assert torch.isfinite(got).all()
    assert float(((got.double() - want).abs() / size).max()) < TOLERANCE[dtype]


NORMS = ["layer", "rms"]


def row_norm(kind: str, K: int, dtype: torch.dtype = torch.float32) -> RowNorm:
    rng = torch.Generator().manual_seed(K)
    weight, bias = ((torch.randn(K, generator=rng) * 0.3 + 1).to(dtype) for _ in range(2))
    return RowNorm(weight, bias if kind == "layer" else None, 1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", NORMS)
def test_rows_behind_a_norm(kind, dtype):
    x, norm = inputs(7, 65, dtype), row_norm(kind, 65, dtype)
    codes, scales = quantize_rows(x, norm, width=80)
    want, want_scales = quantize_rows_ref(x, norm, width=80)
    assert codes.shape == want.shape == (7, 80)
    assert not codes[:, 65:].any()
    # The norm is rounded to x's dtype: where that falls the other way, a scale moves by that much and a code by one.
    assert torch.allclose(scales, want_scales, rtol={torch.float32: 1e-5}.get(dtype, 2**-7), atol=0)
    assert (codes.int() - want.int()).abs().max() <= 1
    assert (codes != want).float().mean() < 0.2
    assert error(codes * scales[:, None], torch.nn.functional.pad(norm(x), (0, 15)).double()) < 0.02


@pytest.mark.parametrize("act", ["", *ACTIVATIONS])
@pytest.mark.parametrize("kind", ["", *NORMS])
@PACKS
def test_norm_and_activation_are_those_that_stand_apart(pack, kind, act):
    x, (codes, scales) = inputs(17, 100), weights(24, 100)
    scales = scales * 0.1
    bias, norm = torch.randn(24, generator=torch.Generator().manual_seed(0)), row_norm(kind, 100) if kind else None
    got = w8a8(x, pack(codes), scales, bias, norm=norm, act=act)
    plain = w8a8(x if norm is None else norm(x), pack(codes), scales, bias)
    size = plain.abs().amax()
    assert float((got - (activation(plain, act) if act else plain)).abs().max() / size) < (2e-2 if kind else 1e-6)
    want = w8a8_ref(x, codes, scales, bias, norm=norm, act=act)
    assert float((got - want).abs().max() / size) < (2e-2 if kind else 1e-6)  # a code that a norm's rounding moves


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_activations(act, dtype):
    x = (torch.linspace(-6, 6, 97)).to(dtype)
    want = activation_ref(x, act)
    assert float((activation(x, act).double() - want).abs().max()) < 8 * TOLERANCE[dtype]
    for other in set(ACTIVATIONS) - {act}:
        assert float((activation_ref(x, other) - want).abs().max()) > 2e-4
    with pytest.raises(ValueError, match="expected one of"):
        activation(x, "relu6")


def test_against_the_product_of_floats():
    """The definition itself: int8 activations leave an error of about 1 / 254 of a row's largest input."""
    x, (codes, scales) = inputs(5, 512), weights(64, 512)
    exact = x.double() @ (codes.double() * scales.double()[:, None]).t()
    assert 1e-4 < error(w8a8(x, codes, scales), exact) < 0.1


@PACKS
def test_the_longest_sum_stays_in_int32(pack):
    x = torch.full((1, MAX_IN_FEATURES), -1.0)
    codes = torch.full((2, MAX_IN_FEATURES), -128, dtype=torch.int8)
    got = w8a8(x, pack(codes), torch.ones(2))
    assert error(got, torch.full((1, 2), 128.0 * MAX_IN_FEATURES, dtype=torch.float64)) < 1e-6


@PACKS
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("M", "N", "K"), [(600, 342, 128), (130, 4304, 16), (65, 72, 3420)])
def test_rows_in_several_steps(monkeypatch, M, N, K, biased, pack):
    x, (codes, scales) = inputs(M, K), weights(N, K)
    bias = torch.randn(N, generator=torch.Generator().manual_seed(0)) if biased else None
    kept = x.clone()
    for name, value in (("_PRODUCT_ROWS", 64), ("_PACKED_ROWS", 48), ("_PACKED_ENTRIES", 1), ("_STEP_ENTRIES", 5000)):
        monkeypatch.setattr(module, name, value)
    assert error(w8a8(x, pack(codes), scales, bias), w8a8_ref(x, codes, scales, bias)) < 1e-5
    assert torch.equal(x, kept)


@PACKS
def test_leading_dimensions_and_no_rows(pack):
    x, (codes, scales) = inputs(6, 64), weights(5, 64)
    packed = pack(codes)
    want = w8a8(x, packed, scales)
    assert torch.equal(w8a8(x.view(2, 3, 64), packed, scales), want.view(2, 3, 5))
    assert torch.equal(w8a8(x[0], packed, scales), want[0])
    assert torch.equal(w8a8(x.t().contiguous().t(), packed, scales), want)
    assert w8a8(x[:0], packed, scales).shape == (0, 5)


@pytest.mark.parametrize("pack", [by_onednn, *BY_LEVEL])
def test_packed_weights_of_another_shape_are_refused(pack):
    x, (codes, scales) = inputs(2, 64), weights(5, 64)
    with pytest.raises(ValueError, match=r"expected x \(\.\.\., 64\)"):
        w8a8(x[:, 1:], pack(codes), scales, shape=(5, 64))
    with pytest.raises(ValueError, match="expected scales"):
        w8a8(x, pack(codes), scales[1:], shape=(5, 64))
    if pack in BY_LEVEL:
        with pytest.raises(ValueError, match="expected weight"):
            w8a8(inputs(2, 65), pack(codes), scales)


@pytest.mark.parametrize("pack", BY_LEVEL)
class TestMachineCode:
    """Edges of tiles, panels and threads."""

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("M", [1, 15, 16, 17, 31, 32, 33, 47, 64, 130])
    @pytest.mark.parametrize(("N", "K"), [(13, 33), (16, 64), (33, 127), (64, 128), (100, 200), (100, 1100)])
    def test_every_edge(self, M, N, K, dtype, pack, monkeypatch):
        x, (codes, scales) = inputs(M, K, dtype), weights(N, K)
        packed = pack(codes)
        monkeypatch.setattr(int8_linear, "_PANEL_BYTES", 1 << 13)  # several panels
        empty = torch.empty
        # What is not written shows.
        monkeypatch.setattr(torch, "empty", lambda *shape, **named: empty(*shape, **named).fill_(77))
        got = w8a8(x, packed, scales)
        # The codes of torch's operations, which have a test of their own: a tie would be worth more than the tolerance.
        rows, row_scales = quantize_rows(x)
        want = (rows.double() @ codes.double().t()) * row_scales.double()[:, None] * scales.double()
        assert float(((got.double() - want).abs() / want.abs().amax(-1, keepdim=True)).max()) < TOLERANCE[dtype]

    @pytest.mark.parametrize("panel", [1, 3, 100])
    @pytest.mark.parametrize("M", [32, 33, 64, 130])
    def test_sections_of_long_inputs_change_no_bit(self, M, panel, pack, monkeypatch):
        x, (codes, scales) = inputs(M, 1100, torch.bfloat16), weights(200, 1100)
        packed = pack(codes)
        want = w8a8(x, packed, scales)
        monkeypatch.setattr(int8_linear, "_SECTION", 5)
        monkeypatch.setattr(int8_linear, "_PANEL_BYTES", panel * 32 * 64 * 5)
        assert torch.equal(w8a8(x, packed, scales), want)

    def test_neighbours_are_neither_read_nor_written(self, pack):
        """Rows between numbers that would show in every product, and a result between kept ones."""
        codes, scales = weights(20, 70)
        x = torch.full((5, 70), float("nan"))
        x[2:4] = inputs(2, 70)
        want = w8a8_ref(x[2:4], codes, scales)
        assert error(w8a8(x[2:4], pack(codes), scales), want) < TOLERANCE[torch.float32]

    @pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
    @pytest.mark.parametrize("N", [1, 20, 32, 75])
    def test_biases_of_any_float(self, N, dtype, pack):
        x, (codes, scales) = inputs(5, 70), weights(N, 70)
        bias = torch.linspace(-3, 3, N).to(dtype)
        want = w8a8(x, pack(codes), scales) + bias.float()
        # Neither it nor the scales have room behind their last number.
        got = w8a8(x, pack(codes), at_the_end(scales), at_the_end(bias))
        assert error(got, want.double()) < 1e-6

    def test_inputs_elsewhere_are_refused(self, pack):
        codes, scales = weights(20, 70)
        with pytest.raises(ValueError, match="expected x on cpu"):
            w8a8(torch.empty(2, 70, device="meta"), pack(codes), scales)

    def test_codes_come_back(self, pack):
        codes, _ = weights(45, 130)
        assert torch.equal(int8_linear.unpack(pack(codes), 45, 130), codes)

    def test_rows_that_are_no_numbers_stay_alone(self, pack):
        x, (codes, scales) = inputs(20, 96, torch.bfloat16), weights(24, 96)
        clean = w8a8(x, pack(codes), scales)
        x[3, 5], x[18, 90] = float("nan"), float("inf")
        got = w8a8(x, pack(codes), scales)
        others = [row for row in range(20) if row not in (3, 18)]
        assert torch.equal(got[others], clean[others])
        assert got[3].isnan().all()
        assert not got[18].isfinite().any()

    @pytest.mark.parametrize("size", [0.0, 1e-45, 1e-38, 1e-30, 1e30, 3e33])
    def test_rows_of_any_size(self, size, pack):
        x, (codes, scales) = inputs(3, 64).clamp(-1, 1), weights(16, 64)
        scales = torch.ones_like(scales)
        x[1] = 0
        x[2] *= size
        got, want = w8a8(x, pack(codes), scales), w8a8_ref(x, codes, scales)
        assert not got[1].any()
        if size > 1e-38:  # below, a scale has too few bits for an error relative to the row
            assert error(got[2:], want[2:]) < 1e-3  # a tie may be rounded the other way
        else:
            assert float((got[2].double() - want[2]).abs().max()) <= 64 * 128 * 1e-44

    def test_threads_change_nothing(self, pack):
        x, (codes, scales) = inputs(100, 200, torch.bfloat16), weights(300, 200)
        packed, before, found = pack(codes), torch.get_num_threads(), []
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                found.append(w8a8(x, packed, scales))
        finally:
            torch.set_num_threads(before)
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("pack", [torch.clone, *BY_LEVEL])
@pytest.mark.parametrize("fault", ["scales of other rows", "one token's scale for all", "last input", "sign", "zeros"])
def test_a_fault_would_show(fault, pack):
    x, (codes, scales) = inputs(17, 65), weights(96, 65)
    want = w8a8_ref(x, codes, scales)
    if fault == "scales of other rows":
        got = w8a8(x, pack(codes), scales.roll(1))
    elif fault == "one token's scale for all":
        act_codes, act_scales = quantize_rows(x)
        got = act_codes.float() @ (codes.float() * scales[:, None]).t() * act_scales[0]
    elif fault == "last input":
        got = w8a8(torch.cat([x[:, :-1], torch.zeros(17, 1)], 1), pack(codes), scales)
    elif fault == "sign":
        got = w8a8(x, pack(codes.bitwise_xor(-128)), scales)
    else:
        got = torch.zeros(17, 96)
    assert error(got, want) > 0.01


def test_refused():
    x, (codes, scales) = inputs(2, 64), weights(5, 64)
    for arguments, said in [
        ((x[:, 1:], codes, scales), r"expected x \(\.\.\., 64\)"),
        ((x, codes.int(), scales), "expected weight"),
        ((x, codes, scales.half()), "expected scales"),
        ((x, codes, scales[1:]), "expected scales"),
        ((x, codes, scales, torch.zeros(4)), "expected bias"),
        ((x, torch.zeros(1, MAX_IN_FEATURES + 1, dtype=torch.int8), scales), f"at most {MAX_IN_FEATURES}"),
    ]:
        with pytest.raises(ValueError, match=said):
            w8a8(*arguments)
