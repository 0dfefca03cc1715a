"""AWQ: rounding against a double loop, the formulas by hand, exact folding, and searches that never make it worse."""

from __future__ import annotations

import pytest
import torch
from heavy_tails import heavy_tailed, linear, relative
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from sparsevila.quant.awq import (
    HeadGroups,
    Rounding,
    channel_scales,
    clip,
    fold_scales,
    quantise_int4,
    round_up,
    rounded,
    search_clip,
    search_scales,
    weight_magnitude,
)
from sparsevila.quant.calibration import ChannelStats
from sparsevila.quant.linear import Linear
from sparsevila.quant.scheme import unpack_nibbles

G32 = Rounding(group_size=32)


class RMSNorm(nn.Module):
    """Scale only, as the decoder's."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(size) + 0.5, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * self.weight


def output_error(weight: Tensor, other: Tensor, rows: Tensor) -> float:
    return float((rows.double() @ (other.double() - weight.double()).t()).square().mean())


# Rounding -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("N", "K", "g"), [(3, 8, 4), (5, 7, 3), (2, 10, 128), (1, 1, 1), (4, 33, 32)])
def test_rounding_is_the_double_loop(N: int, K: int, g: int, symmetric: bool, dtype: torch.dtype) -> None:
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(N * K))
    got = quantise_int4(weight, g, symmetric, scale_dtype=dtype)
    codes = unpack_nibbles(got.codes, K)
    assert got.scales.dtype == dtype
    for n in range(N):
        for start in range(0, K, g):
            group = [float(w) for w in weight[n, start : start + g]]
            low, high = min(0.0, *group), max(0.0, *group)
            exact = max(abs(w) for w in group) / 7.5 if symmetric else (high - low) / 15
            scale = float(got.scales[n, start // g])
            assert exact * (1 - 1e-6) <= scale <= exact * (1 + 2 * torch.finfo(dtype).eps)
            zero = 8 if symmetric else min(15, max(0, round(-low / scale)))
            assert int(got.zeros[n, start // g]) == zero
            for k, w in enumerate(group, start=start):
                exact_code = w / scale + zero
                assert abs(int(codes[n, k]) - min(15.0, max(0.0, exact_code))) <= 0.5 + 1e-4


@settings(max_examples=150, deadline=None)
@given(
    N=st.integers(1, 5),
    K=st.integers(1, 40),
    g=st.integers(1, 48),
    symmetric=st.booleans(),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    size=st.sampled_from([1e-7, 1e-3, 1.0, 1e4]),
    shift=st.sampled_from([-3.0, 0.0, 3.0]),
    seed=st.integers(0, 1000),
)
def test_no_weight_is_off_by_more_than_half_a_step(
    N: int, K: int, g: int, symmetric: bool, dtype: torch.dtype, size: float, shift: float, seed: int
) -> None:
    weight = (torch.randn(N, K, generator=torch.Generator().manual_seed(seed)) + shift) * size
    got = quantise_int4(weight, g, symmetric, scale_dtype=dtype)
    step = got.scales.double()[:, torch.arange(K) // g]
    off = (got.dequantise().double() - weight.double()).abs()
    assert bool((off <= step * (0.5 + 1e-5)).all())
    assert torch.equal(got.dequantise(), rounded(weight, Rounding(g, symmetric, dtype)))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("value", [0.0, 0.75, -0.75])
def test_constant_groups(value: float, symmetric: bool) -> None:
    got = quantise_int4(torch.full((3, 10), value), 4, symmetric, scale_dtype=torch.float32)
    assert bool((got.scales > 0).all())
    # The symmetric grid has no code for the end of its range: half a step, 0.05.
    torch.testing.assert_close(got.dequantise(), torch.full((3, 10), value), rtol=0, atol=0.0501 if symmetric else 1e-6)
    if value == 0:
        assert torch.equal(got.dequantise(), torch.zeros(3, 10))


def test_a_hand_computed_group() -> None:
    # Range -0.5..1: step 0.1, zero point 5; 0.26 -> 2.6 -> 3 -> 0.3.
    got = quantise_int4(torch.tensor([[-0.5, 1.0, 0.26, 0.0]]), 4, scale_dtype=torch.float32)
    assert unpack_nibbles(got.codes, 4).tolist() == [[0, 15, 8, 5]]
    assert got.zeros.tolist() == [[5]]
    torch.testing.assert_close(got.dequantise(), torch.tensor([[-0.5, 1.0, 0.3, 0.0]]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_round_up_is_the_next_number(dtype: torch.dtype) -> None:
    x = torch.logspace(-9, 4, 5000)
    up = round_up(x, dtype)
    assert bool((up.float() >= x).all())
    below = (up.view(torch.int16) - 1).view(dtype).float()
    assert bool((below < x).all())
    assert torch.equal(round_up(up.float(), dtype), up)


def test_rounding_refuses() -> None:
    bad = torch.zeros(2, 4)
    bad[1, 1] = float("nan")
    with pytest.raises(ValueError, match=r"layers\.3\.o_proj: expected finite numbers, got 1 of 8"):
        quantise_int4(bad, 4, name="layers.3.o_proj")
    with pytest.raises(ValueError, match=r"big: weights up to 1e\+07 need scales above torch.float16"):
        quantise_int4(torch.full((1, 4), 1e7), 4, name="big")
    with pytest.raises(ValueError, match=r"matrix \(N, K\) of floats, got \(4,\)"):
        quantise_int4(torch.ones(4), 4)
    with pytest.raises(ValueError, match="group size of at least 1, got 0"):
        quantise_int4(torch.ones(2, 4), 0)


# The formula --------------------------------------------------------------------------------------------------------


def test_channel_scales_by_hand() -> None:
    # sqrt(4), sqrt(1), sqrt(0.25) = 2, 1, 0.5; the largest times the least is 1.
    s = channel_scales(torch.tensor([4.0, 1.0, 0.25]), None, 0.5)
    torch.testing.assert_close(s, torch.tensor([2.0, 1.0, 0.5]))
    # 16^0.25 / (1/16)^0.75 = 16, 1 / 1 = 1; over sqrt(16).
    s = channel_scales(torch.tensor([16.0, 1.0]), torch.tensor([1 / 16, 1.0]), 0.25)
    torch.testing.assert_close(s, torch.tensor([4.0, 0.25]), rtol=1e-3, atol=0)


def test_a_silent_channel_has_scale_one_and_no_say() -> None:
    s = channel_scales(torch.tensor([4.0, 0.0, 0.25]), None, 0.5)
    torch.testing.assert_close(s, torch.tensor([2.0, 1.0, 0.5]))
    assert channel_scales(torch.zeros(3), torch.ones(3), 0.5).tolist() == [1, 1, 1]


def test_weight_magnitude_by_hand() -> None:
    a = torch.tensor([[1.0, -2.0, 3.0], [4.0, 1.0, 0.0]])
    b = torch.tensor([[0.0, 8.0, -1.0]])
    # Groups of 2, the last one of 1: shares (0.5, 1, 1), (1, 0.25, 0), (0, 1, 1).
    torch.testing.assert_close(weight_magnitude([a, b], 2), torch.tensor([0.5, 0.75, 2 / 3]), rtol=1e-5, atol=1e-5)


# The search ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_scales_beat_plain_rounding_on_heavy_tails(seed: int) -> None:
    layer = linear({"q_proj": 64, "k_proj": 16, "v_proj": 16}, 128, seed=seed)
    seen, fresh = heavy_tailed(512, 128, seed=seed).chunk(2)
    s, record = search_scales([layer], ChannelStats.of("qkv", seen), G32)
    # Measured with six seeds: 0.16 to 0.25 of plain rounding, and the same on fresh rows.
    assert record.error_after < 0.5 * record.error_before
    assert record.alpha is not None
    assert record.alpha > 0
    # On rows that the search has not seen, by the value that is written to a file.
    plain = output_error(layer.weight, quantise_int4(layer.weight, 32).dequantise(), fresh)
    scaled = output_error(layer.weight, quantise_int4(layer.weight * s, 32).dequantise() / s, fresh)
    assert scaled < 0.5 * plain


def test_the_record_holds_the_errors_of_what_is_written() -> None:
    layers = [linear(24, 64, seed=1), linear(40, 64, seed=2)]
    stats = ChannelStats.of("mlp", heavy_tailed(100, 64))
    s, record = search_scales(layers, stats, G32)
    weight = torch.cat([layer.weight for layer in layers])
    plain = output_error(weight, quantise_int4(weight, 32).dequantise(), stats.rows)
    scaled = output_error(weight, quantise_int4(weight * s, 32).dequantise() / s, stats.rows)
    assert record.error_before == pytest.approx(plain, rel=1e-4)
    assert record.error_after == pytest.approx(scaled, rel=1e-4)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), factor=st.sampled_from([1.0, 5.0, 200.0]), symmetric=st.booleans())
def test_never_worse_than_plain_and_deterministic(seed: int, factor: float, symmetric: bool) -> None:
    layer = linear(7, 20, seed=seed)
    stats = ChannelStats.of("x", heavy_tailed(11, 20, factor=factor, seed=seed))
    rounding = Rounding(8, symmetric, torch.bfloat16)
    s, record = search_scales([layer], stats, rounding)
    assert record.error_after <= record.error_before
    again, same = search_scales([layer], stats, rounding)
    assert torch.equal(s, again)
    assert record == same
    assert (record.alpha is None) == (record.variant == "plain") == bool((s == 1).all())


def test_a_block_is_judged_at_its_end_and_gets_its_weights_back() -> None:
    gate_up = linear({"gate_proj": 48, "up_proj": 48}, 64, bias=True, seed=3).to(torch.bfloat16)
    down = linear(64, 48, seed=4)
    assert gate_up.bias is not None
    own, bias = gate_up.weight, gate_up.bias.float()
    before = own.clone()
    seen = []

    def block(x: Tensor) -> Tensor:
        seen.append((x.dtype, gate_up.weight.dtype))
        gate, up = gate_up(x).chunk(2, dim=-1)
        return down(F.silu(gate) * up)

    stats = ChannelStats.of("mlp", heavy_tailed(60, 64))
    s, record = search_scales([gate_up], stats, G32, block=block)
    assert set(seen) == {(torch.float32, torch.float32)}
    assert gate_up.weight is own
    assert torch.equal(own, before)

    def outcome(weight: Tensor) -> Tensor:
        gate, up = F.linear(stats.rows, weight, bias).chunk(2, dim=-1)
        return down(F.silu(gate) * up)

    weight = before.float()
    scaled = quantise_int4(weight * s, 32).dequantise() / s
    error = float((outcome(scaled) - outcome(weight)).square().mean())
    assert record.error_after == pytest.approx(error, rel=1e-3)
    assert record.error_after < 0.75 * record.error_before


def test_a_block_that_fails_gives_the_weights_back() -> None:
    layer = linear(4, 8, bias=True)
    own = (layer.weight, layer.bias)

    def block(x: Tensor) -> Tensor:
        raise RuntimeError("in the block")

    with pytest.raises(RuntimeError, match="in the block"):
        search_scales([layer], ChannelStats.of("x", torch.randn(3, 8)), G32, block=block)
    assert layer.weight is own[0]
    assert layer.bias is own[1]


def test_zero_and_constant_inputs() -> None:
    layer = linear(6, 16)
    s, record = search_scales([layer], ChannelStats.of("x", torch.zeros(5, 16)), G32)
    assert (record.variant, record.error_before, record.error_after) == ("plain", 0.0, 0.0)
    assert s.tolist() == [1.0] * 16
    s, record = search_scales([layer], ChannelStats.of("x", torch.ones(5, 16)), G32)
    assert bool(s.isfinite().all())
    layer.weight.zero_()
    s, record = search_scales([layer], ChannelStats.of("x", torch.randn(5, 16)), G32)
    assert record.error_after == 0.0
    assert bool((s > 0).all())


def test_bad_numbers_name_the_layer() -> None:
    with pytest.raises(ValueError, match=r"layers\.2\.qkv: inputs: expected finite"):
        ChannelStats.of("layers.2.qkv", torch.tensor([[1.0, float("nan")]]))
    layer = linear(6, 16)
    layer.weight[0, 0] = float("nan")
    stats = ChannelStats.of("layers.2.qkv", torch.ones(3, 16))
    with pytest.raises(ValueError, match=r"layers\.2\.qkv: expected finite"):
        search_scales([layer], stats, G32)
    with pytest.raises(ValueError, match=r"layers\.2\.qkv: expected finite"):
        search_clip(layer, stats, G32)
    with pytest.raises(ValueError, match=r"layers\.2\.qkv: expected layers of 16 inputs, got \[8\]"):
        search_scales([linear(6, 8)], stats, G32)


def test_progress_reaches_the_end() -> None:
    seen = []
    stats = ChannelStats.of("x", torch.randn(3, 8))
    search_scales([linear(4, 8)], stats, G32, progress=lambda done, all_: seen.append((done, all_)))
    assert seen == [(i, 41) for i in range(1, 42)]


# Folding ------------------------------------------------------------------------------------------------------------


def random_scales(K: int, seed: int = 5) -> Tensor:
    return (torch.randn(K, generator=torch.Generator().manual_seed(seed)) * 1.5).exp()


@pytest.mark.parametrize("with_bias", [True, False])
def test_folding_into_a_norm_changes_nothing(with_bias: bool) -> None:
    norm: nn.Module = RMSNorm(24)
    if with_bias:
        norm = nn.LayerNorm(24)
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    layers = [linear(10, 24, bias=True, seed=1), linear(14, 24, seed=2)]
    x = torch.randn(9, 24, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        before = [layer(norm(x)) for layer in layers]
        own = layers[0].weight.clone()
        fold_scales(norm, layers, random_scales(24))
        for layer, y in zip(layers, before, strict=True):
            assert relative(layer(norm(x)), y) < 1e-5
    assert relative(layers[0].weight, own) > 0.1


@pytest.mark.parametrize(("H", "H_kv"), [(4, 4), (6, 2), (4, 1)])
def test_folding_v_into_o_changes_nothing(H: int, H_kv: int) -> None:
    D, K, M = 6, 20, 11
    heads = HeadGroups(H, H_kv, D)
    qkv = linear({"q_proj": H * D, "k_proj": H_kv * D, "v_proj": H_kv * D}, K, bias=True, seed=1)
    o_proj = linear(K, H * D, seed=2)
    x = torch.randn(M, K, generator=torch.Generator().manual_seed(3))

    def attention() -> Tensor:
        q, k, v = qkv(x).split([H * D, H_kv * D, H_kv * D], dim=-1)
        q, k, v = (t.reshape(M, -1, D).transpose(0, 1) for t in (q, k, v))
        k, v = (t.repeat_interleave(H // H_kv, dim=0) for t in (k, v))
        return o_proj(F.scaled_dot_product_attention(q, k, v).transpose(0, 1).reshape(M, -1))

    before, own = attention(), qkv.weight.clone()
    fold_scales(qkv, [o_proj], heads.share(random_scales(H * D)), rows=qkv.parts["v_proj"], heads=heads)
    assert relative(attention(), before) < 1e-5
    start = qkv.parts["v_proj"].start
    assert torch.equal(qkv.weight[:start], own[:start])
    assert not torch.equal(qkv.weight[start:], own[start:])


def test_shared_scales_are_the_geometric_mean_of_the_group() -> None:
    heads = HeadGroups(num_heads=4, num_kv_heads=2, head_dim=2)
    shared = heads.share(torch.tensor([1.0, 2.0, 4.0, 8.0, 1.0, 1.0, 9.0, 1.0]))
    torch.testing.assert_close(shared, torch.tensor([2.0, 4.0, 2.0, 4.0, 3.0, 1.0, 3.0, 1.0]))
    torch.testing.assert_close(heads.narrow(shared), torch.tensor([2.0, 4.0, 3.0, 1.0]))


def test_a_search_with_heads_gives_scales_that_fold() -> None:
    heads = HeadGroups(6, 2, 8)
    stats = ChannelStats.of("o_proj", heavy_tailed(80, 48))
    s, record = search_scales([linear(30, 48)], stats, Rounding(16), heads=heads)
    assert record.error_after < record.error_before
    assert heads.narrow(s).shape == (16,)


def test_folding_up_into_down_changes_nothing() -> None:
    gate_up, down = linear({"gate_proj": 18, "up_proj": 18}, 12, seed=1), linear(12, 18, seed=2)
    x = torch.randn(7, 12, generator=torch.Generator().manual_seed(3))

    def mlp() -> Tensor:
        gate, up = gate_up(x).chunk(2, dim=-1)
        return down(F.silu(gate) * up)

    before = mlp()
    fold_scales(gate_up, [down], random_scales(18), rows=gate_up.parts["up_proj"])
    assert relative(mlp(), before) < 1e-5


def test_folding_refuses_and_changes_nothing() -> None:
    norm, layer = RMSNorm(8), linear(4, 8)
    own = (norm.weight.clone(), layer.weight.clone())
    uneven = torch.ones(8)
    uneven[0] = 2
    cases = [
        (norm, torch.ones(7), None, None, "a scale for each input"),
        (norm, torch.zeros(8), None, None, "positive scales, got 0.0"),
        (norm, torch.full((8,), float("nan")), None, None, "qkv: scales: expected finite"),
        (norm, torch.full((8,), 1e-40), None, None, "qkv: weights after folding: expected finite"),
        (norm, uneven, None, HeadGroups(4, 2, 2), "equal for all query heads"),
        (linear(6, 3), torch.ones(8), None, None, "expected 8 channels to divide, got 6"),
        (nn.LayerNorm(8, elementwise_affine=False), torch.ones(8), None, None, "got parameters \\[\\]"),
    ]
    for previous, scales, rows, heads, message in cases:
        with pytest.raises(ValueError, match=message):
            fold_scales(previous, [layer], scales, rows=rows, heads=heads, name="qkv")
    assert torch.equal(norm.weight, own[0])
    assert torch.equal(layer.weight, own[1])


# Clipping -----------------------------------------------------------------------------------------------------------


def clipped_copy(layer: Linear, limits: Tensor, g: int) -> Tensor:
    copy = Linear(layer.in_features, layer.out_features)
    copy.weight.copy_(layer.weight)
    clip(copy, limits, g)
    return copy.weight


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), K=st.integers(3, 70), R=st.integers(1, 40), symmetric=st.booleans())
def test_clipping_makes_no_row_worse_on_the_sample(seed: int, K: int, R: int, symmetric: bool) -> None:
    layer = linear(9, K, seed=seed)
    stats = ChannelStats.of("x", heavy_tailed(R, K, num_outliers=2, seed=seed))
    rounding = Rounding(16, symmetric)
    limits, record = search_clip(layer, stats, rounding)
    plain = quantise_int4(layer.weight, 16, symmetric).dequantise()
    cut = quantise_int4(clipped_copy(layer, limits, 16), 16, symmetric).dequantise()
    rows = stats.rows.double()
    before = (rows @ (plain - layer.weight).double().t()).square().sum(0)
    after = (rows @ (cut - layer.weight).double().t()).square().sum(0)
    assert bool((after <= before * (1 + 1e-4) + 1e-12).all())
    assert record.error_before == pytest.approx(float(before.sum()) / (9 * R), rel=1e-3, abs=1e-12)
    assert record.error_after == pytest.approx(float(after.sum()) / (9 * R), rel=1e-3, abs=1e-12)
    assert record.error_after <= record.error_before


def test_clipping_helps_where_a_lone_weight_widens_the_range() -> None:
    layer = linear(32, 64, seed=1)
    layer.weight[:, ::16] *= 6
    rows = torch.randn(200, 64, generator=torch.Generator().manual_seed(2))
    rows[:, ::16] *= 0.02  # the wide weights hardly count
    limits, record = search_clip(layer, ChannelStats.of("x", rows), Rounding(16))
    assert record.error_after < 0.6 * record.error_before
    assert record.clipped > 0.5
    widest = layer.weight.reshape(32, 4, 16).abs().amax(2)
    assert bool((limits >= widest * 0.4999).all())
    assert bool((limits <= widest).all())


def test_q_and_k_are_left_alone() -> None:
    layer = linear({"q_proj": 16, "k_proj": 8, "v_proj": 8}, 64, seed=1)
    layer.weight[:, ::16] *= 6
    rows = torch.randn(200, 64, generator=torch.Generator().manual_seed(2))
    rows[:, ::16] *= 0.02
    limits, _ = search_clip(layer, ChannelStats.of("x", rows), Rounding(16))
    own = layer.weight.clone()
    clip(layer, limits, 16)
    assert torch.equal(layer.weight[:24], own[:24])
    assert not torch.equal(layer.weight[24:], own[24:])
    with pytest.raises(ValueError, match=r"expected limits \(32, 4\), got \(32, 3\)"):
        clip(layer, limits[:, :3], 16)
