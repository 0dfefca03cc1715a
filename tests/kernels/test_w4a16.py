"""4-bit linear layers against float64, every layout, with tolerances from the dtype; and that each fault would show."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from sparsevila.kernels.w4a16 import W4A16Layout, _codes_by_rows, _is_few, pack_w4a16, w4a16, w4a16_ref

# Relative to the largest value. Float32 sums K products of either sign: their error grows like sqrt(K), 4e-6 covers
# K = 4096. In the others the weights are rounded too: one unit of 2^-8 or 2^-11 in each factor and in the result.
TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
DTYPES = list(TOLERANCE)
FEW, MANY = 3, 17
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
@pytest.mark.parametrize("M", [1, FEW, 12, MANY, 130])
@pytest.mark.parametrize(("N", "K", "g"), TILED + PLAIN)
def test_it_is_the_product_with_the_dequantised_matrix(N, K, g, M, dtype):
    parts = matrix(N, K, g)
    qweight, scale_zero, layout = packed(*parts, g)
    x, bias = inputs(M, K, dtype), torch.randn(N, generator=torch.Generator().manual_seed(1)).to(dtype)
    got = w4a16(x, qweight, scale_zero, layout, bias)
    assert got.dtype == dtype
    want = x.double() @ dense(*parts, g).t() + bias.double()
    # One output alone can be as small as its rounding: the scale is that of the summands.
    scale = max(float(want.abs().max()), float((x.double().abs() @ dense(*parts, g).abs().t()).max()) / K**0.5)
    assert torch.isfinite(got).all()
    assert float((got.double() - want).abs().max()) / scale < TOLERANCE[dtype]
    assert error(w4a16_ref(x, qweight, scale_zero, layout, bias), want) < 1e-12


@pytest.mark.parametrize(("N", "K", "g"), TILED + PLAIN)
def test_the_layout_is_tiled_where_torchs_op_takes_it(N, K, g):
    layout = packed(*matrix(N, K, g), g)[2]
    assert layout.tiled == ((N, K, g) in TILED)


@pytest.mark.parametrize(("N", "K", "g"), TILED + PLAIN)
def test_packed_codes_come_back(N, K, g):
    codes, scales, zeros = matrix(N, K, g)
    qweight, _, layout = packed(codes, scales, zeros, g)
    found = list(_codes_by_rows(qweight, N, layout))
    assert torch.equal(torch.cat([part for _, part in found], dim=1).t().long(), codes)
    assert found[0][0] == 0
    assert all(b - a == part.shape[1] for (a, part), (b, _) in pairwise(found))
    assert qweight.numel() == N * -(-K // 2)  # and nothing is kept twice


def test_large_matrices_are_dequantised_block_by_block():
    for N, K, g in [(1040, 4096, 128), (1030, 4096, 128)]:
        qweight, _, layout = packed(*matrix(N, K, g), g)
        sizes = [part.numel() for _, part in _codes_by_rows(qweight, N, layout)]
        assert len(sizes) > 1
        assert max(sizes) <= 1 << 21


def test_few_rows_and_many_agree_and_the_switch_lies_between():
    assert [_is_few(M) for M in (1, FEW, MANY)] == [True, True, False]
    parts = matrix(80, 96, 32)
    qweight, scale_zero, layout = packed(*parts, 32)
    x = inputs(130, 96)
    many = w4a16(x, qweight, scale_zero, layout)
    few = torch.cat([w4a16(row[None], qweight, scale_zero, layout) for row in x])
    assert error(few, many.double()) < TOLERANCE[torch.float32]


def test_leading_dimensions_and_no_rows():
    qweight, scale_zero, layout = packed(*matrix(80, 96, 32), 32)
    x = inputs(6, 96)
    want = w4a16(x, qweight, scale_zero, layout)
    assert torch.equal(w4a16(x.view(2, 3, 96), qweight, scale_zero, layout), want.view(2, 3, 80))
    assert w4a16(x[0], qweight, scale_zero, layout).shape == (80,)
    assert w4a16(x[:0], qweight, scale_zero, layout).shape == (0, 80)


@pytest.mark.parametrize("M", [FEW, MANY])
@pytest.mark.parametrize("shape", [(80, 96, 32), (13, 64, 32)], ids=["tiled", "plain"])
@pytest.mark.parametrize(
    "fault", ["zero point dropped", "nibbles swapped", "group off by one", "row order", "last group left out", "zeros"]
)
def test_a_fault_would_show(fault, shape, M):
    N, K, g = shape
    codes, scales, zeros = matrix(N, K, g)
    x = inputs(M, K)
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
    qweight, scale_zero, layout = packed(codes, scales, zeros, g)
    got = w4a16(x, qweight, scale_zero, layout)
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
        qweight, scale_zero, layout = packed(*matrix(80, 96, 32), 32)
        x = inputs(2, 96)
        for arguments, said in [
            ((x[:, 1:], qweight, scale_zero, layout), r"expected x \(\.\.\., 96\)"),
            ((x.int(), qweight, scale_zero, layout), "of floats"),
            ((x, qweight[1:], scale_zero, layout), "expected qweight"),
            ((x, qweight.int(), scale_zero, layout), "expected qweight"),
            ((x, qweight, scale_zero[1:], layout), "expected scale_zero"),
            ((x, qweight, scale_zero.half(), layout), "expected scale_zero"),
            ((x, qweight, scale_zero, replace(layout, in_features=64)), r"expected x \(\.\.\., 64\)"),
            ((x, qweight, scale_zero, W4A16Layout(96, 32)), "expected qweight"),
            ((x, qweight, scale_zero, layout, torch.zeros(79)), "expected bias"),
        ]:
            with pytest.raises(ValueError, match=said):
                w4a16(*arguments)
