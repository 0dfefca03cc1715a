"""4-bit linear layers against float64, at every level of the processor, with tolerances from the dtype; and that each
fault would show. A level is what the machine has, or less; what it has not is skipped."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from guarded_memory import at_the_end, at_the_start
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sparsevila.kernels import w4a16 as module
from sparsevila.kernels.cpu import compiled
from sparsevila.kernels.w4a16 import W4A16Layout, group_scales, pack_w4a16, unpack_w4a16, w4a16, w4a16_ref

# Relative to the largest value. Float32 sums K products of either sign: their error grows like sqrt(K), 4e-6 covers
# K = 4096. In the others the weights are rounded too: one unit of 2^-8 or 2^-11 in each factor and in the result.
TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
ROUNDING = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # of one number
DTYPES = list(TOLERANCE)
# Around what is few, around tiles of 16 rows and pairs of them, around what is multiplied as it is made.
ROWS = (1, 2, 3, 4, 5, 16, 17, 33, 49, 64, 65, 130)
ONE, FEW, MANY = 1, 2, 47
# N, K, group size. Outputs stand in pairs of tiles of 16, inputs in blocks of 128: with and without a rest.
VECTORS = [
    (64, 64, 32), (80, 96, 32), (13, 64, 64), (33, 33, 32), (208, 512, 256), (40, 3420, 128), (144, 4096, 128),
    (48, 640, 384), (50, 300, 300), (40, 200, 250), (5, 7, 7), (33, 20, 32), (16, 256, 64), (1, 1, 1), (31, 129, 128),
]  # fmt: skip
PLAIN = [(64, 33, 11), (24, 64, 16), (31, 200, 96)]  # groups that lie across blocks
FAULTS = ["zero point dropped", "nibbles swapped", "group off by one", "row order", "last group left out", "zeros"]

Parts = tuple[Tensor, Tensor, Tensor]
Packed = tuple[Tensor, Tensor, Tensor, W4A16Layout]


@pytest.fixture(params=["torch", *compiled.LEVELS])
def level(request: pytest.FixtureRequest, limit_cpu: Callable[[str], None]) -> str:
    """What may be used of the processor; "torch" packs rows."""
    wanted: str = request.param
    limit_cpu(wanted)
    if compiled.level() != wanted.replace("torch", ""):
        pytest.skip(f"this machine has the level {compiled.level() or 'torch'!r} at most")
    return wanted


@pytest.fixture
def threads() -> Iterator[None]:
    """Restores how many there are."""
    number = torch.get_num_threads()
    yield
    torch.set_num_threads(number)


def matrix(N: int, K: int, g: int, dtype: torch.dtype = torch.float16) -> Parts:
    """Codes (N, K), scales and zeros (N, G) of weights that look like a layer's."""
    rng = torch.Generator().manual_seed(N + K)
    groups = -(-K // g)
    codes = torch.randint(0, 16, (N, K), generator=rng)
    zeros = torch.randint(0, 16, (N, groups), generator=rng)
    scales = ((torch.rand(N, groups, generator=rng) + 0.1) * 0.02).to(dtype)
    return codes, scales, zeros


def packed(codes: Tensor, scales: Tensor, zeros: Tensor, g: int) -> Packed:
    K = codes.shape[1]
    even = torch.nn.functional.pad(codes, (0, K % 2)).to(torch.uint8)
    return pack_w4a16(even[:, ::2] | (even[:, 1::2] << 4), scales, zeros.to(torch.uint8), K, g)


def dense(codes: Tensor, scales: Tensor, zeros: Tensor, g: int) -> Tensor:
    """The matrix (N, K) in float64, by the definition."""
    group = torch.arange(codes.shape[1]) // g
    return (codes.double() - zeros.double()[:, group]) * scales.double()[:, group]


def inputs(M: int, K: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(M, K, generator=torch.Generator().manual_seed(M + K)).to(dtype)


def error(got: Tensor, want: Tensor, size: float | None = None) -> float:
    assert got.shape == want.shape
    assert torch.isfinite(got).all()
    return float((got.double() - want).abs().max() / (size or want.abs().max()))


def machine_code() -> Any:
    """The module, which needs llvmlite."""
    from sparsevila.kernels.cpu import int4_linear

    return int4_linear


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "K", "g"), VECTORS + PLAIN)
def test_it_is_the_product_with_the_dequantised_matrix(N: int, K: int, g: int, dtype: torch.dtype, level: str) -> None:
    parts = matrix(N, K, g)
    tensors, weight = packed(*parts, g), dense(*parts, g).t()
    bias = torch.randn(N, generator=torch.Generator().manual_seed(1)).to(dtype)
    x = inputs(max(ROWS), K, dtype)
    want = x.double() @ weight + bias.double()
    # One output alone can be as small as its rounding: the scale is that of the summands.
    summands = (x.double().abs() @ weight.abs()).amax(1) / K**0.5
    for M in ROWS:
        size = max(float(want[:M].abs().max()), float(summands[:M].max()))
        got = w4a16(x[:M], *tensors, bias)
        assert got.dtype == dtype
        assert error(got, want[:M], size) < TOLERANCE[dtype], M
    if K < 4096:  # which takes seconds
        assert error(w4a16_ref(x[:5], *tensors, bias), want[:5]) < 1e-12


@pytest.mark.parametrize(("N", "K", "g"), VECTORS + PLAIN)
def test_what_was_packed_comes_back(N: int, K: int, g: int, level: str) -> None:
    codes, scales, zeros = matrix(N, K, g, torch.float32)
    qweight, kept_scales, kept_zeros, layout = packed(codes, scales, zeros, g)
    by_vectors = level != "torch" and (N, K, g) in VECTORS
    assert layout.form == ("vectors" if by_vectors else "rows")
    assert torch.equal(unpack_w4a16(qweight, layout).long(), codes)
    scale, zero = group_scales(kept_scales, kept_zeros, layout)
    groups = scales.shape[1]
    assert torch.equal(scale[:, :groups], scales)
    assert torch.equal(zero[:, :groups].long(), zeros)
    assert not scale[:, groups:].any()  # the padding, whose inputs are 0
    # And nothing is kept twice: of vectors, pairs of tiles and whole blocks.
    assert qweight.nbytes == (-(-N // 32) * 32 * -(-K // 128) * 64 if by_vectors else N * -(-K // 2))


def test_the_packed_words_are_as_they_are_described(limit_cpu: Callable[[str], None]) -> None:
    limit_cpu("any")
    if not compiled.level():
        pytest.skip("llvmlite is missing")
    codes = torch.arange(128)[None] // 32 + 4 * (torch.arange(2)[:, None])  # step j holds j; the second row 4 + j
    qweight, _, _, layout = packed(codes, torch.ones(2, 1), torch.zeros(2, 1), 128)
    words = qweight.view(torch.int16)
    assert words.shape == (2, 1, 16, 32)
    assert (words[0, 0, 0] == 0x3210).all()
    assert (words[0, 0, 1] == 0x7654).all()
    assert not words[0, 0, 2:].any()
    assert not words[1].any()
    one = torch.zeros(1, 128, dtype=torch.long)
    one[0, 32 * 2 + 5] = 9
    words = packed(one, torch.ones(1, 1), torch.zeros(1, 1), 128)[0].view(torch.int16)
    assert words.flatten().nonzero().tolist() == [[5]]
    assert words.flatten()[5] == 0x0900
    assert layout == W4A16Layout(2, 128, 128, "vectors", level="any")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("g", [32, 64, 128, 130, 11])
def test_each_weight_is_off_by_one_rounding(g: int, dtype: torch.dtype, level: str) -> None:
    """Read off one by one: with a row of the identity the result is a weight."""
    parts = matrix(37, 130, g)
    tensors, want = packed(*parts, g), dense(*parts, g).t()
    x = torch.eye(130, dtype=dtype)
    for M in (1, 2, 3, 4, 16, 33, 64, 130):
        got = torch.cat([w4a16(part, *tensors) for part in x.split(M)]).double()
        assert (got - want).abs().le(ROUNDING[dtype] * want.abs()).all(), M
    if dtype != torch.float32:
        assert (got - want).abs().max() > 0


@pytest.mark.parametrize("M", [FEW, MANY, 130])
@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_scales_of_other_dtypes(scale_dtype: torch.dtype, M: int, level: str) -> None:
    codes, scales, zeros = matrix(40, 256, 64)
    # Numbers that no shorter type holds: below float16's normal ones, or with more bits than it has.
    scales = (scales.float() * (1e-6 if scale_dtype == torch.bfloat16 else 1.003)).to(scale_dtype)
    x = inputs(M, 256)
    want = x.double() @ dense(codes, scales, zeros, 64).t()
    tensors = packed(codes, scales, zeros, 64)
    assert error(w4a16(x, *tensors), want) < TOLERANCE[torch.float32]
    assert error(w4a16(x.bfloat16(), *tensors), x.bfloat16().double() @ dense(codes, scales, zeros, 64).t()) < 8e-3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M", [1, 4, MANY, 130])
def test_biases(M: int, dtype: torch.dtype, level: str) -> None:
    parts = matrix(37, 96, 32)
    tensors, x = packed(*parts, 32), inputs(M, 96, dtype)
    want = x.double() @ dense(*parts, 32).t()
    assert error(w4a16(x, *tensors), want) < TOLERANCE[dtype]
    for bias_dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        bias = torch.linspace(-3, 3, 37).to(bias_dtype)
        got = w4a16(x, *tensors, bias)
        assert got.dtype == dtype
        assert error(got, want + bias.double()) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "K", "g"), [(208, 640, 128), (100, 600, 32), (70, 600, 256), (29, 96, 11)])
def test_parts_of_any_size_give_the_same(
    monkeypatch: pytest.MonkeyPatch, N: int, K: int, g: int, dtype: torch.dtype, level: str
) -> None:
    parts, x = matrix(N, K, g), inputs(130, K, dtype)
    whole = w4a16(x, *packed(*parts, g))
    monkeypatch.setattr(module, "_BLOCK_ENTRIES", 1 << 12)  # a few rows are packed and unpacked at a time
    tensors = packed(*parts, g)
    sizes = [{}, {"_MOST_ROWS": 64}]  # several parts, whole ones and a rest
    if level != "torch":
        # Several panels of one or two pairs of tiles, several chunks of one or two blocks; no rows are few enough
        # for another kernel; three tiles at a time for torch's product.
        small = {"_MOST_FUSED_ROWS": 0, "_PANEL_ENTRIES": 3 * 16 * 640}
        sizes += [{**small, "_PANEL_PAIRS": 2, "_PANEL_BLOCKS": 1}, {**small, "_PANEL_PAIRS": 1, "_MOST_ROWS": 64}]
        sizes += [{**small, "_PANEL_PAIRS": 100, "_PANEL_BLOCKS": 100}, {**small, "_PANEL_PAIRS": 3, "_MOST_ROWS": 96}]
    for changed in sizes:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in changed.items() if level != "torch" else ():
                assert hasattr(machine_code(), name)
                patch.setattr(machine_code(), name, value)
            for M in (5, 17, 49, 130):
                got = w4a16(x[:M], *tensors)
                assert error(got, whole[:M].double()) < TOLERANCE[dtype], (changed, M)
                if level == "amx" and dtype == torch.bfloat16 and g % 32 == 0:
                    assert torch.equal(got, whole[:M]), (changed, M)  # every sum is made in the same order


class _Largest(TorchDispatchMode):
    """The most bytes that one new tensor has."""

    found = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor) and made._base is None:
            self.found = max(self.found, made.nbytes)
        return made


@pytest.mark.parametrize("g", [128, 16])
@pytest.mark.parametrize("M", [3, 130])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_whole_matrix_is_never_dequantised(
    monkeypatch: pytest.MonkeyPatch, g: int, M: int, dtype: torch.dtype, level: str
) -> None:
    tensors, x = packed(*matrix(1040, 512, g), g), inputs(M, 512, dtype)
    monkeypatch.setattr(module, "_BLOCK_ENTRIES", 1 << 16)
    if level != "torch":
        monkeypatch.setattr(machine_code(), "_PANEL_ENTRIES", 1 << 16)
        monkeypatch.setattr(machine_code(), "_PANEL_PAIRS", 2)
        monkeypatch.setattr(machine_code(), "_scratch", compiled.Scratch())
    with _Largest() as largest:
        w4a16(x, *tensors)
    # In float32, 1 << 16 weights; the output has as many numbers as rows times 1040. The matrix has 1040 * 512.
    assert 0 < largest.found <= max(4 << 16, M * 1040 * 4) < 1040 * 512 * 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("g", [32, 128])
def test_few_rows_and_many_agree(g: int, dtype: torch.dtype, level: str) -> None:
    tensors = packed(*matrix(80, 300, g), g)
    x = inputs(130, 300, dtype)
    many = w4a16(x, *tensors)
    for M in (1, 2, 3, 4, 5, 47):
        few = torch.cat([w4a16(part, *tensors) for part in x.split(M)])
        assert error(few, many.double()) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "K", "g"), [(208, 640, 128), (33, 300, 32), (31, 200, 96)])
def test_threads_change_no_bit(N: int, K: int, g: int, dtype: torch.dtype, threads: None, level: str) -> None:
    tensors, x = packed(*matrix(N, K, g), g), inputs(130, K, dtype)
    sizes = (1, 2, 4, 16, 49, 65, 130)
    # Without tile registers the product of many rows is torch's, which may add in another order.
    exact = len(sizes) if level == "amx" and dtype == torch.bfloat16 else 3
    if level == "torch" or g == 96:
        exact = 0
    found = []
    for number in (1, 2, 5):
        torch.set_num_threads(number)
        found.append([w4a16(x[:M], *tensors) for M in sizes])
    for other in found[1:]:
        assert all(map(torch.equal, found[0][:exact], other[:exact]))
        assert all(error(a, b.double()) < TOLERANCE[dtype] for a, b in zip(found[0], other, strict=True))


def test_leading_dimensions_and_no_rows(level: str) -> None:
    tensors = packed(*matrix(80, 96, 32), 32)
    x = inputs(6, 96)
    want = w4a16(x, *tensors)
    assert torch.equal(w4a16(x.view(2, 3, 96), *tensors), want.view(2, 3, 80))
    assert w4a16(x[0], *tensors).shape == (80,)
    assert w4a16(x[:0], *tensors).shape == (0, 80)
    assert w4a16(x[:0], *tensors, torch.zeros(80)).shape == (0, 80)
    assert w4a16(x.view(2, 3, 96)[:, :0], *tensors).shape == (2, 0, 80)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M", [1, 4, 47, 65])
def test_inputs_that_are_not_contiguous(M: int, dtype: torch.dtype, level: str) -> None:
    tensors, x = packed(*matrix(40, 96, 32), 32), inputs(M, 96, dtype)
    want = w4a16(x, *tensors)
    for other in (x.t().contiguous().t(), torch.stack((x, -x), dim=2)[..., 0], torch.cat((x, x), dim=1)[:, :96]):
        assert M == 1 or not other.is_contiguous()
        assert torch.equal(w4a16(other, *tensors), want)
    assert torch.equal(w4a16(x[:1].expand(5, 96), *tensors), w4a16(x[:1].repeat(5, 1), *tensors))


class _Surrounded:
    """Tensors with poison before and behind them: NaN, and the largest integer."""

    MARGIN = 65  # odd, so that nothing stands on a border of its own size

    def __init__(self) -> None:
        self.made: list[Tensor] = []
        self._empty = torch.empty

    def empty(self, *size: Any, **named: Any) -> Tensor:
        shape = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
        count = torch.Size(shape).numel()
        whole = self._empty(count + 2 * self.MARGIN, **named)
        whole.fill_(torch.nan if whole.is_floating_point() else torch.iinfo(whole.dtype).max)
        self.made.append(whole)
        return whole[self.MARGIN : self.MARGIN + count].view(shape)

    def copy(self, tensor: Tensor) -> Tensor:
        return self.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)

    def check(self) -> None:
        """The poison is as it was."""
        for whole in self.made:
            for end in (whole[: self.MARGIN], whole[-self.MARGIN :]):
                assert end.isnan().all() if whole.is_floating_point() else (end == torch.iinfo(whole.dtype).max).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "K", "g"), [(33, 33, 32), (40, 300, 300), (100, 200, 64), (400, 640, 128), (29, 96, 11)])
def test_memory_around_is_neither_used_nor_written(
    N: int, K: int, g: int, dtype: torch.dtype, threads: None, level: str
) -> None:
    torch.set_num_threads(2)  # of which each has scratch memory
    *tensors, layout = packed(*matrix(N, K, g), g)
    bias = torch.linspace(-1, 1, N)
    for M in (1, 2, 3, 4, 5, 17, 49, 65, 130):
        x = inputs(M, K, dtype)
        want = w4a16(x, *tensors, layout, bias)
        around = _Surrounded()
        given = [around.copy(part) for part in (x, *tensors)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "empty", around.empty)
            if level != "torch":
                patch.setattr(machine_code(), "_scratch", compiled.Scratch())
            made = len(around.made)
            got = w4a16(given[0], *given[1:], layout, around.copy(bias))
        assert len(around.made) > made + 1  # the output among them
        around.check()
        # An output that is not written would be NaN.
        assert error(got, want.double()) < TOLERANCE[torch.float32]
        assert all(map(torch.equal, given, (x, *tensors)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("N", "K", "g"), [(33, 40, 32), (50, 300, 64), (208, 640, 128), (200, 512, 512), (29, 96, 11)])
def test_nothing_beyond_the_inputs_is_read(
    monkeypatch: pytest.MonkeyPatch, N: int, K: int, g: int, dtype: torch.dtype, level: str
) -> None:
    if level != "torch":  # panels and chunks that are not full
        monkeypatch.setattr(machine_code(), "_PANEL_PAIRS", 2)
        monkeypatch.setattr(machine_code(), "_PANEL_ENTRIES", 3 * 16 * 640)
    *tensors, layout = packed(*matrix(N, K, g), g)
    x, bias = inputs(130, K, dtype), torch.linspace(-1, 1, N)
    for placed in (at_the_end, at_the_start):
        given, added = [placed(part) for part in tensors], placed(bias)
        for M in (1, 2, 3, 4, 5, 17, 33, 49, 65, 130):
            want = w4a16(x[:M], *tensors, layout, bias)
            assert torch.equal(w4a16(placed(x[:M]), *given, layout, added), want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M", [2, 4, 17, 49, 65, 130])
def test_a_row_that_is_no_number_stays_alone(M: int, dtype: torch.dtype, level: str) -> None:
    tensors, x = packed(*matrix(40, 200, 64), 64), inputs(M, 200, dtype)
    want = w4a16(x, *tensors)
    row = M // 2
    others = torch.arange(M) != row
    for number in (torch.nan, torch.inf, -torch.inf):
        x[row, 130] = number
        got = w4a16(x, *tensors)
        assert torch.equal(got[others], want[others])
        assert not torch.isfinite(got[row]).any()


@pytest.mark.parametrize("M", [1, 4, 17])
@pytest.mark.parametrize("exponent", [-90, 0, 110])
def test_the_largest_sums_have_room(exponent: int, M: int, level: str) -> None:
    codes = torch.full((40, 384), 15)
    codes[20:] = 0
    zeros = torch.zeros(40, 3)
    zeros[20:] = 15
    tensors = packed(codes, torch.full((40, 3), 0.5), zeros, 128)
    # The largest number below a power of 2: as many as fill what adds them.
    x = torch.full((M, 384), (2 - 2.0**-7) * 2.0**exponent, dtype=torch.bfloat16)
    x[M // 2] *= -1
    want = x.double() @ dense(codes, torch.full((40, 3), 0.5), zeros, 128).t()
    assert torch.equal(w4a16(x, *tensors), want.bfloat16())


@pytest.mark.parametrize("M", [1, 4, 17])
def test_small_inputs_are_not_lost_beside_a_large_one(M: int, level: str) -> None:
    codes, scales, zeros = matrix(48, 512, 128)
    codes[:, 200] = zeros[:, 1]  # where x is large no weight is, so that the others remain
    x = inputs(M, 512, torch.bfloat16)
    want = x.double() @ dense(codes, scales, zeros, 128).t()
    x[:, 200] = 1000
    assert error(w4a16(x, *packed(codes, scales, zeros, 128)), want) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M", [1, 4, 17, 49, 65])
def test_a_scale_that_is_no_number_shows(M: int, dtype: torch.dtype, level: str) -> None:
    codes, scales, zeros = matrix(40, 200, 64)
    want = w4a16(inputs(M, 200, dtype), *packed(codes, scales, zeros, 64))
    scales[19, 2] = torch.nan
    got = w4a16(inputs(M, 200, dtype), *packed(codes, scales, zeros, 64))
    others = torch.arange(40) != 19
    assert torch.equal(got[:, others], want[:, others])
    assert got[:, 19].isnan().all()


@pytest.mark.parametrize("M", [ONE, FEW, MANY, 130])
@pytest.mark.parametrize("shape", [(80, 96, 32), (48, 512, 128), (64, 33, 11)], ids=str)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_would_show(fault: str, shape: tuple[int, int, int], M: int, level: str) -> None:
    N, K, g = shape
    codes, scales, zeros = matrix(N, K, g)
    x = inputs(M, K, torch.bfloat16)
    want = x.double() @ dense(codes, scales, zeros, g).t()
    if fault == "zero point dropped":
        zeros = torch.full_like(zeros, 8)
    elif fault == "nibbles swapped":
        even = K // 2 * 2
        codes = torch.cat([codes[:, :even].unflatten(1, (-1, 2)).flip(2).flatten(1), codes[:, even:]], dim=1)
    elif fault == "group off by one":
        scales, zeros = scales.roll(1, 1), zeros.roll(1, 1)
    elif fault == "row order":
        codes = codes[torch.arange(N) ^ 1]
    elif fault == "last group left out":
        codes = torch.cat([codes[:, :-g], zeros[:, -1:].expand(N, g)], dim=1)
    got = w4a16(x, *packed(codes, scales, zeros, g))
    if fault == "zeros":
        got = torch.zeros_like(got)
    assert error(got, want) > 0.05


WITHOUT_LLVMLITE = """
import logging, sys
sys.modules["llvmlite"] = None
logging.basicConfig(format="%(levelname)s %(message)s")
import torch
from sparsevila.kernels.w4a16 import pack_w4a16, w4a16, w4a16_ref
codes = torch.randint(0, 256, (40, 64), dtype=torch.uint8)
for _ in range(2):
    tensors = pack_w4a16(codes, torch.rand(40, 1), torch.full((40, 1), 7, dtype=torch.uint8), 128, 128)
x = torch.randn(3, 128)
assert torch.allclose(w4a16(x, *tensors).double(), w4a16_ref(x, *tensors), rtol=1e-4, atol=1e-4)
assert sys.modules["llvmlite"] is None
print(tensors[-1].form)
"""


def test_without_llvmlite_it_says_so_once_and_works() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_LLVMLITE], capture_output=True, text=True, timeout=120,
        env={name: value for name, value in os.environ.items() if name not in ("SPARSEVILA_CPU", "TRITON_INTERPRET")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "rows\n"
    assert done.stderr.count("WARNING llvmlite is not installed") == 1


class TestRefused:
    def test_inputs_elsewhere(self, level: str) -> None:
        with pytest.raises(ValueError, match="expected x on cpu"):
            w4a16(torch.empty(2, 96, device="meta"), *packed(*matrix(80, 96, 32), 32))

    def test_a_zero_point_that_would_choose_what_is_no_table(self, level: str) -> None:
        codes, scales, zeros = matrix(32, 64, 32)
        zeros[3, 1] = 16
        if level == "torch":
            pytest.skip("torch's operations subtract it")
        with pytest.raises(ValueError, match=r"zero points of 0\.\.15, got 16"):
            packed(codes, scales, zeros, 32)

    def test_wrong_arguments(self, level: str) -> None:
        qweight, scales, zeros, layout = packed(*matrix(80, 96, 32), 32)
        x = inputs(2, 96)
        for arguments, said in [
            ((x[:, 1:], qweight, scales, zeros, layout), r"expected x \(\.\.\., 96\)"),
            ((x.int(), qweight, scales, zeros, layout), "of floats"),
            ((torch.tensor(1.0), qweight, scales, zeros, layout), r"expected x \(\.\.\., 96\)"),
            ((x, qweight[1:], scales, zeros, layout), "expected qweight"),
            ((x, qweight.int(), scales, zeros, layout), "expected qweight"),
            ((x, qweight, scales[1:], zeros, layout), "expected scales"),
            ((x, qweight, scales.double(), zeros, layout), "expected scales"),
            ((x, qweight, scales, zeros, replace(layout, in_features=64)), r"expected x \(\.\.\., 64\)"),
            ((x, qweight, scales, zeros, replace(layout, out_features=120)), "expected qweight"),
            ((x, qweight, scales, zeros, replace(layout, group_size=64)), "expected scales"),
            ((x, qweight, scales, zeros[:, :1], layout), "expected zeros"),
            ((x, qweight, scales, zeros.float(), layout), "expected zeros"),
            ((x, qweight, scales, zeros, layout, torch.zeros(79)), "expected bias"),
        ]:
            with pytest.raises(ValueError, match=said):
                w4a16(*arguments)

    def test_a_level_of_another_name(self, limit_cpu: Callable[[str], None]) -> None:
        limit_cpu("avx2")
        with pytest.raises(ValueError, match="expected SPARSEVILA_CPU torch, any, avx512, amx or nothing, got 'avx2'"):
            packed(*matrix(80, 96, 32), 32)
