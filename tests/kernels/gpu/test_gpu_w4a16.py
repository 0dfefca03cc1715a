"""The op `w4a16` where Triton runs: the subjects of its own tests on the packed words of the kernels, in float16."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparsevila.kernels.gpu.int4_linear import FEW_TOKENS, lop3_agrees
from sparsevila.kernels.w4a16 import W4A16Layout, group_scales, pack_w4a16, unpack_w4a16, w4a16, w4a16_ref

# Relative to the largest value: few rows round the result alone, many each weight too.
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 4e-6}
SIZES = [(70, 300, 128), (130, 256, 64), (33, 96, 32), (16, 640, 128), (1, 40, 32)]  # N, K, group size
OTHER_GROUPS = [(24, 64, 16), (48, 512, 256)]  # what the kernels do not take
FEW, MANY = 3, FEW_TOKENS + 7

Packed = tuple[Tensor, Tensor, Tensor, W4A16Layout]


def matrix(N: int, K: int, g: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(N + K)
    groups = -(-K // g)
    codes = torch.randint(0, 16, (N, K), generator=rng)
    zeros = torch.randint(0, 16, (N, groups), generator=rng)
    scales = ((torch.rand(N, groups, generator=rng) + 0.1) * 0.02).half()
    return codes.to(device), scales.to(device), zeros.to(device)


def packed(codes: Tensor, scales: Tensor, zeros: Tensor, g: int) -> Packed:
    K = codes.shape[1]
    even = torch.nn.functional.pad(codes, (0, K % 2)).to(torch.uint8)
    # Layers hand over float32; what came from 16 bits is kept in 16.
    return pack_w4a16(even[:, ::2] | (even[:, 1::2] << 4), scales.float(), zeros.to(torch.uint8), K, g)


def dense(codes: Tensor, scales: Tensor, zeros: Tensor, g: int) -> Tensor:
    group = torch.arange(codes.shape[1], device=codes.device) // g
    return (codes.double() - zeros.double()[:, group]) * scales.double()[:, group]


def inputs(M: int, K: int, device: str, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(M, K, generator=torch.Generator().manual_seed(M + K)).to(dtype).to(device)


def error(got: Tensor, want: Tensor, size: float | None = None) -> float:
    assert got.shape == want.shape
    assert torch.isfinite(got).all()
    return float((got.double() - want).abs().max() / (size or want.abs().max()))


@pytest.mark.parametrize("M", [1, FEW, 16, FEW_TOKENS, FEW_TOKENS + 1, 130])
@pytest.mark.parametrize(("N", "K", "g"), SIZES + OTHER_GROUPS)
def test_it_is_the_product_with_the_dequantised_matrix(N: int, K: int, g: int, M: int, device: str) -> None:
    parts = matrix(N, K, g, device)
    tensors = packed(*parts, g)
    assert (tensors[-1].form == "words") == ((N, K, g) in SIZES)
    x = inputs(M, K, device)
    bias = torch.randn(N, generator=torch.Generator().manual_seed(1)).half().to(device)
    got = w4a16(x, *tensors, bias)
    assert got.dtype == torch.float16
    want = x.double() @ dense(*parts, g).t() + bias.double()
    # One output alone can be as small as its rounding: the scale is that of the summands.
    size = max(float(want.abs().max()), float((x.double().abs() @ dense(*parts, g).abs().t()).max()) / K**0.5)
    assert error(got, want, size) < TOLERANCE[torch.float16]
    assert error(w4a16_ref(x, *tensors, bias), want) < 1e-12


@pytest.mark.parametrize(("N", "K", "g"), SIZES)
def test_packed_codes_scales_and_zero_points_come_back(N: int, K: int, g: int, device: str) -> None:
    codes, scales, zeros = matrix(N, K, g, device)
    words, kept_scales, kept_zeros, layout = packed(codes, scales, zeros, g)
    assert torch.equal(unpack_w4a16(words, layout).long(), codes)
    assert words.numel() * 8 == N * -(-K // 128) * 128
    groups = scales.shape[1]
    assert kept_scales.dtype == torch.float16
    assert all(map(torch.equal, group_scales(kept_scales, kept_zeros, layout), (kept_scales.t(), kept_zeros.t())))
    assert torch.equal(kept_scales[:groups].t(), scales)
    assert torch.equal(kept_zeros[:groups].t().long(), zeros)
    assert not kept_scales[groups:].any()


@pytest.mark.parametrize("g", [32, 64, 128])
def test_few_rows_and_many_agree_and_the_switch_lies_between(g: int, device: str) -> None:
    tensors = packed(*matrix(80, 256, g, device), g)
    x = inputs(MANY, 256, device)
    few = torch.cat([w4a16(part, *tensors) for part in x.split(FEW_TOKENS)])
    assert error(few, w4a16(x, *tensors).double()) < TOLERANCE[torch.float16]
    # Each row by itself gives what it gives beside others, but for the size of the block of tokens.
    assert error(w4a16(x[:1], *tensors), few[:1].double()) < TOLERANCE[torch.float16]


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float32])
def test_scales_of_other_dtypes(scale_dtype: torch.dtype, device: str) -> None:
    codes, scales, zeros = matrix(70, 256, 128, device)
    # Numbers that no shorter type holds: below float16's normal ones, or with more bits than it has.
    scales = (scales.float() * (1e-4 if scale_dtype == torch.bfloat16 else 1.003)).to(scale_dtype)
    tensors = packed(codes, scales, zeros, 128)
    assert tensors[1].dtype == scale_dtype
    # Many rows round weights to the inputs' float16, which has no room for those of the first case.
    for M in (FEW,) if scale_dtype == torch.bfloat16 else (FEW, MANY):
        x = inputs(M, 256, device) * 100
        want = x.double() @ dense(codes, scales, zeros, 128).t()
        assert error(w4a16(x, *tensors), want) < TOLERANCE[torch.float16]


def test_leading_dimensions_and_no_rows(device: str) -> None:
    tensors = packed(*matrix(80, 96, 32, device), 32)
    x = inputs(6, 96, device)
    want = w4a16(x, *tensors)
    assert torch.equal(w4a16(x.view(2, 3, 96), *tensors), want.view(2, 3, 80))
    assert w4a16(x[0], *tensors).shape == (80,)
    assert w4a16(x[:0], *tensors).shape == (0, 80)


@pytest.mark.parametrize("M", [FEW, MANY])
@pytest.mark.parametrize("g", [32, 64, 128])
@pytest.mark.parametrize(
    "fault", ["zero point dropped", "halves swapped", "group off by one", "row order", "last group"]
)
def test_a_fault_would_show(fault: str, g: int, M: int, device: str) -> None:
    codes, scales, zeros = matrix(80, 512, g, device)
    x = inputs(M, 512, device)
    want = x.double() @ dense(codes, scales, zeros, g).t()
    if fault == "zero point dropped":
        zeros = torch.full_like(zeros, 8)
    elif fault == "halves swapped":
        codes = codes.unflatten(1, (-1, 2)).flip(2).flatten(1)
    elif fault == "group off by one":
        scales, zeros = scales.roll(1, 1), zeros.roll(1, 1)
    elif fault == "row order":
        codes = codes[torch.arange(80, device=device) ^ 1]
    else:
        codes = torch.cat([codes[:, :-g], zeros[:, -1:].expand(80, g)], dim=1)
    assert error(w4a16(x, *packed(codes, scales, zeros, g)), want) > 0.05


def test_refused(device: str) -> None:
    tensors, x = packed(*matrix(80, 96, 32, device), 32), inputs(2, 96, device)
    for arguments, said in [
        ((x[:, 1:], *tensors), r"expected x \(\.\.\., 96\)"),
        ((x.int(), *tensors), "of floats"),
        ((x, *tensors, torch.zeros(79, device=device)), "expected bias"),
    ]:
        with pytest.raises(ValueError, match=said):
            w4a16(*arguments)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="assembly runs on a GPU alone")
@pytest.mark.parametrize("g", [32, 64, 128])
def test_the_form_with_assembly_agrees(g: int) -> None:
    words, scales, zeros, layout = packed(*matrix(300, 1024, g, "cuda"), g)
    assert lop3_agrees(words, scales, zeros, g, 1024)
    assert layout.lop3
    # The check itself can fail: other words are another product.
    assert not torch.equal(w4a16(torch.eye(16, 1024).half().cuda(), words, scales, zeros, layout),
                           w4a16(torch.eye(16, 1024).half().cuda(), words ^ 1, scales, zeros, layout))  # fmt: skip
