"""4-bit linear layers against float64, every layout, with tolerances from the dtype; and that each fault would show."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from sparsevila.kernels import w4a16 as module
from sparsevila.kernels.w4a16 import (
    W4A16Layout,
    group_scales,
    is_few,
    pack_w4a16,
    unpack_w4a16,
    w4a16,
    w4a16_ref,
)

# Relative to the largest value. Float32 sums K products of either sign: their error grows like sqrt(K), 4e-6 covers
# K = 4096. In the others the weights are rounded too: one unit of 2^-8 or 2^-11 in each factor and in the result.
TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
DTYPES = list(TOLERANCE)
FEW, MANY = 3, 47
# N, K, group size: blocks of 64 rows, with and without a rest; then sizes that torch's op does not take.
TILED = [(64, 64, 32), (128, 256, 64), (16, 128, 128), (48, 64, 32), (80, 96, 32), (208, 512, 256), (1040, 4096, 128)]
PLAIN = [(13, 64, 32), (64, 33, 11), (5, 7, 7), (24, 64, 16), (96, 1024, 512), (31, 50, 32), (1, 1, 1)]


def matrix(N: int, K: int, g: int, seed: int = 0, dtype: torch.dtype = torch.float16):
    """Codes (N, K), scales and zeros (N, G) of weights that look like a layer's."""
    rng = torch.Generator().manual_seed(seed + N + K)
    groups = -(-K // g)
    codes = torch.randint(0, 16, (N, K), generator=rng)
    zeros = torch.randint(0, 16, (N, groups), generator=rng)
    scales = ((torch.rand(N, groups, generator=rng) + 0.1) * 0.02).to(dtype)
    return codes, scales, zeros


def packed(codes, scales, zeros, g):
    K = codes.shape[1]
    even = torch.nn.functional.pad(codes, (0, K % 2)).to(torch.uint8)
    return pack_w4a16(even[:, ::2] | (even[:, 1::2] << 4), scales, zeros.to(torch.uint8), K, g)


def dense(codes, scales, zeros, g):
    """The matrix (N, K) in float64, by the definition."""
    group = torch.arange(codes.shape[1]) // g
    return (codes.double() - zeros.double()[:, group]) * scales.double()[:, group]


def inputs(M: int, K: int, dtype: torch.dtype = torch.float32):
    return torch.randn(M, K, generator=torch.Generator().manual_seed(M + K)).to(dtype)


def error(got, want) -> float:
    assert got.shape == want.shape
    assert torch.isfinite(got).all()
    return float((got.double() - want).abs().max() / want.abs().max())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M", [1, FEW, 40, 41, 130])
@pytest.mark.parametrize(("N", "K", "g"), TILED + PLAIN)
def test_it_is_the_product_with_the_dequantised_matrix(N, K, g, M, dtype):
    parts = matrix(N, K, g)
    qweight, scale_zero, remainder, layout = packed(*parts, g)
    x, bias = inputs(M, K, dtype), torch.randn(N, generator=torch.Generator().manual_seed(1)).to(dtype)
    got = w4a16(x, qweight, scale_zero, remainder, layout, bias)
    assert got.dtype == dtype
    want = x.double() @ dense(*parts, g).t() + bias.double()
    # One output alone can be as small as its rounding: the scale is that of the summands.
    scale = max(float(want.abs().max()), float((x.double().abs() @ dense(*parts, g).abs().t()).max()) / K**0.5)
    assert torch.isfinite(got).all()
    assert float((got.double() - want).abs().max()) / scale < TOLERANCE[dtype]
    assert error(w4a16_ref(x, qweight, scale_zero, remainder, layout, bias), want) < 1e-12


@pytest.mark.parametrize(("N", "K", "g"), TILED + PLAIN)
def test_the_layout_is_tiled_where_torchs_op_takes_it(N, K, g):
    layout = packed(*matrix(N, K, g), g)[-1]
    assert layout.tiled == ((N, K, g) in TILED)


@pytest.mark.parametrize(("N", "K", "g"), TILED + PLAIN)
def test_packed_codes_come_back(N, K, g):
    codes, scales, zeros = matrix(N, K, g)
    qweight, _, _, layout = packed(codes, scales, zeros, g)
    assert torch.equal(unpack_w4a16(qweight, N, layout).long(), codes)
    assert qweight.numel() == N * -(-K // 2)  # and nothing is kept twice


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scales_and_zero_points_come_back(dtype):
    _, scales, zeros = parts = matrix(80, 96, 32, dtype=dtype)
    scales[3, 1] = 0
    _, scale_zero, remainder, _ = packed(*parts, 32)
    scale, zero = group_scales(scale_zero, remainder)
    # 16 bits of a float32 scale are kept, all of a shorter one.
    off = 2.0**-16 if dtype == torch.float32 else 0.0
    assert torch.allclose(scale, scales.float().t(), rtol=off, atol=0)
    assert torch.allclose(zero, (-zeros.float() * scales.float()).t(), rtol=off, atol=0)
    # What few rows read: the scale rounded once, the zero point exact for that scale.
    rounded = scales.bfloat16().float().t()
    assert torch.equal(scale_zero[..., 0].float(), rounded)
    assert torch.equal(scale_zero[..., 1].float() + remainder[1].float(), (8 - zeros.float().t()) * rounded)


@pytest.mark.parametrize("limit", [1 << 8, 1 << 12, 1 << 14])
@pytest.mark.parametrize(("N", "K", "g"), [(208, 512, 256), (80, 96, 32), (1024, 256, 64), (29, 96, 32)])
def test_blocks_and_steps_of_any_size_give_the_same(monkeypatch, N, K, g, limit):
    tensors, x = packed(*matrix(N, K, g), g), inputs(50, K)
    whole = w4a16(x, *tensors)
    monkeypatch.setattr(module, "_BLOCK_ENTRIES", limit)
    monkeypatch.setattr(module, "_STEP_ENTRIES", limit // 4)
    assert error(w4a16(x, *tensors), whole.double()) < TOLERANCE[torch.float32]


def test_a_block_is_all_that_is_dequantised_at_a_time(monkeypatch):
    largest = []
    for name in ("empty", "addcmul"):
        plain = getattr(torch, name)

        def watch(*arguments, plain=plain, **named):
            made = plain(*arguments, **named)
            largest.append(made.numel())
            return made

        monkeypatch.setattr(torch, name, watch)
    monkeypatch.setattr(module, "_BLOCK_ENTRIES", 1 << 16)
    w4a16(inputs(3, 512), *packed(*matrix(1040, 512, 128), 128))
    assert 1 << 14 < max(largest) <= 1 << 16 < 1040 * 512


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_few_rows_and_many_agree_and_the_switch_lies_between(dtype, symmetric):
    assert [is_few(M) for M in (1, FEW, MANY)] == [True, True, False]
    codes, scales, zeros = matrix(80, 96, 32)
    tensors = packed(codes, scales, torch.full_like(zeros, 8) if symmetric else zeros, 32)
    assert tensors[-1].symmetric == symmetric
    x = inputs(130, 96, dtype)
    many = w4a16(x, *tensors)
    few = torch.cat([w4a16(row[None], *tensors) for row in x])
    assert error(few, many.double()) < TOLERANCE[dtype]


def test_a_weight_of_few_rows_is_off_by_one_rounding():
    """Read off one by one: with a row of the identity the result is a weight."""
    parts = matrix(64, 64, 32)
    got = torch.cat([w4a16(row[None], *packed(*parts, 32)) for row in torch.eye(64, dtype=torch.bfloat16)]).t()
    want = dense(*parts, 32)
    # One rounding of the scale and two of the result; that of z would be a 2^-8 of up to 8 steps, not of the weight.
    bound = 3 * 2.0**-8 * want.abs() + 2.0**-16 * 8 * 0.022
    assert (got.double() - want).abs().le(bound).all()
    assert (got.double() - want).abs().max() > 0


def test_leading_dimensions_and_no_rows():
    qweight, scale_zero, remainder, layout = packed(*matrix(80, 96, 32), 32)
    x = inputs(6, 96)
    want = w4a16(x, qweight, scale_zero, remainder, layout)
    assert torch.equal(w4a16(x.view(2, 3, 96), qweight, scale_zero, remainder, layout), want.view(2, 3, 80))
    assert w4a16(x[0], qweight, scale_zero, remainder, layout).shape == (80,)
    assert w4a16(x[:0], qweight, scale_zero, remainder, layout).shape == (0, 80)


@pytest.mark.parametrize("M", [FEW, MANY])
@pytest.mark.parametrize("shape", [(80, 96, 32), (13, 64, 32)], ids=["tiled", "plain"])
@pytest.mark.parametrize(
    "fault", ["zero point dropped", "nibbles swapped", "group off by one", "row order", "last group left out", "zeros"]
)
def test_a_fault_would_show(fault, shape, M):
    N, K, g = shape
    codes, scales, zeros = matrix(N, K, g)
    x = inputs(M, K, torch.bfloat16)
    want = x.double() @ dense(codes, scales, zeros, g).t()
    if fault == "zero point dropped":
        zeros = torch.full_like(zeros, 8)
    elif fault == "nibbles swapped":
        codes = codes.unflatten(1, (-1, 2)).flip(2).flatten(1)
    elif fault == "group off by one":
        scales, zeros = scales.roll(1, 1), zeros.roll(1, 1)
    elif fault == "row order":
        codes = codes[torch.arange(N) ^ 1 if N % 2 == 0 else torch.arange(N).roll(1)]
    elif fault == "last group left out":
        codes = torch.cat([codes[:, :-g], zeros[:, -1:].expand(N, g)], dim=1)
    qweight, scale_zero, remainder, layout = packed(codes, scales, zeros, g)
    got = w4a16(x, qweight, scale_zero, remainder, layout)
    if fault == "zeros":
        got = torch.zeros_like(got)
    assert error(got, want) > 0.05


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_the_permutation_of_other_instruction_sets(capability):
    """The same tests where torch packs blocks of another size."""
    names = ["test_packed_codes_come_back", "test_few_rows_and_many_agree_and_the_switch_lies_between"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(f"{__file__}::{name}" for name in names)],
        capture_output=True, text=True, timeout=240, env={**os.environ, "ATEN_CPU_CAPABILITY": capability},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]


class TestRefused:
    def test_wrong_arguments(self):
        qweight, scale_zero, remainder, layout = packed(*matrix(80, 96, 32), 32)
        x = inputs(2, 96)
        for arguments, said in [
            ((x[:, 1:], qweight, scale_zero, remainder, layout), r"expected x \(\.\.\., 96\)"),
            ((x.int(), qweight, scale_zero, remainder, layout), "of floats"),
            ((x, qweight[1:], scale_zero, remainder, layout), "expected qweight"),
            ((x, qweight.int(), scale_zero, remainder, layout), "expected qweight"),
            ((x, qweight, scale_zero[1:], remainder, layout), "expected scale_zero"),
            ((x, qweight, scale_zero.half(), remainder, layout), "expected scale_zero"),
            ((x, qweight, scale_zero, remainder, replace(layout, in_features=64)), r"expected x \(\.\.\., 64\)"),
            ((x, qweight, scale_zero, remainder, W4A16Layout(96, 32)), "expected qweight"),
            ((x, qweight, scale_zero, remainder[:, 1:], layout), "expected remainder"),
            ((x, qweight, scale_zero, remainder.float(), layout), "expected remainder"),
            ((x, qweight, scale_zero, remainder, layout, torch.zeros(79)), "expected bias"),
        ]:
            with pytest.raises(ValueError, match=said):
                w4a16(*arguments)
