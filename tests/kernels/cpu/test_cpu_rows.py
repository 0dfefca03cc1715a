"""Norm, gate and rotation in machine code, at each level, against torch's own operations and float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from guarded_memory import at_the_end, at_the_start
from torch import Tensor

from sparsevila.kernels import add_rms_norm as add_module
from sparsevila.kernels import rms_norm as norm_module
from sparsevila.kernels import rope_append as rope_module
from sparsevila.kernels import silu_mul as silu_module
from sparsevila.kernels.add_rms_norm import add_rms_norm, add_rms_norm_ref
from sparsevila.kernels.backend import machine_code
from sparsevila.kernels.cpu import compiled
from sparsevila.kernels.rms_norm import rms_norm
from sparsevila.kernels.rope_append import rope_append
from sparsevila.kernels.silu_mul import silu_mul, silu_mul_ref

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Of the largest: float32 throughout and one rounding, or of 16 bits two.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
SIZES = [1, 15, 16, 64, 100, 130, 4096]  # in steps of 64, of 16, and rests
HEADS = [(4, 2, 64), (3, 1, 72), (1, 1, 2), (2, 2, 36), (7, 1, 128)]  # H, H_kv, D

Op = Callable[[], tuple[Tensor, ...]]


@pytest.fixture
def threads() -> Iterator[None]:
    """Restores how many there are."""
    number = torch.get_num_threads()
    yield
    torch.set_num_threads(number)


def rand(*shape: int, dtype: torch.dtype) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))) * 3).to(dtype)


def by_torch(op: Op) -> tuple[Tensor, ...]:
    """What torch's operations give."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (add_module, norm_module, rope_module, silu_module):
            patch.setattr(module, "machine_code", lambda *_: "")
        return op()


def close(got: Tensor, want: Tensor) -> bool:
    assert got.shape == want.shape
    return float((got.double() - want.double()).abs().max()) <= TOLERANCE[got.dtype] * float(want.abs().max())


def rotation(M: int, H: int, H_kv: int, D: int, dtype: torch.dtype, first: int = 3) -> Op:
    """Into stores that are parts of larger ones, which are returned whole."""
    qkv, cos, sin = rand(M, H + 2 * H_kv, D, dtype=dtype), *rand(2, M, D // 2, dtype=dtype)

    def op() -> tuple[Tensor, ...]:
        whole = torch.full((2, H_kv + 1, M + 9, D + 5), 7.0, dtype=dtype)
        k, v = whole[0, 1:, :-1, 3:-2], whole[1, :-1, 1:, :-5]
        return rope_append(qkv, cos, sin, k, v, torch.tensor([first + M])), whole

    return op


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", SIZES)
@pytest.mark.parametrize("M", [0, 1, 5])
def test_norms(M: int, D: int, dtype: torch.dtype, of: str) -> None:
    x, added, weight = rand(M, D, dtype=dtype), rand(M, D, dtype=dtype).flip(0), rand(D, dtype=dtype)
    assert machine_code(x, added, weight) == of
    total, normed = add_rms_norm(x, added, weight, 1e-5)
    assert torch.equal(total, x + added)
    assert torch.equal(rms_norm(total, weight, 1e-5), normed)
    if M:
        assert close(normed, add_rms_norm_ref(x, added, weight, 1e-5)[1])
        assert close(normed, by_torch(lambda: add_rms_norm(x, added, weight, 1e-5))[1])
        shaped = rms_norm(total.view(M, 1, D).expand(M, 2, D), weight, 1e-5)
        assert torch.equal(shaped, normed[:, None].expand(M, 2, D))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("F", SIZES)
@pytest.mark.parametrize("M", [0, 1, 5])
def test_gates(M: int, F: int, dtype: torch.dtype, of: str) -> None:
    x = rand(M, 2 * F, dtype=dtype)
    got = silu_mul(x)
    assert got.shape == (M, F)
    assert got.dtype == dtype
    if M:
        assert close(got, silu_mul_ref(x))
        assert torch.equal(silu_mul(x.view(M, 1, 2 * F)), got[:, None])
        assert torch.equal(silu_mul(torch.cat((x, x), dim=1)[:, : 2 * F]), got)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("H", "H_kv", "D"), HEADS)
@pytest.mark.parametrize("M", [1, 5])
def test_rotations_are_torchs_to_the_bit(M: int, H: int, H_kv: int, D: int, dtype: torch.dtype, of: str) -> None:
    op = rotation(M, H, H_kv, D, dtype)
    assert all(map(torch.equal, op(), by_torch(op)))


def test_what_is_no_number_stays_in_its_row(of: str) -> None:
    for number in (torch.nan, torch.inf, -torch.inf):
        x = rand(3, 64, dtype=torch.bfloat16)
        x[1, 40] = number
        weight = torch.ones(64, dtype=torch.bfloat16)
        normed, gated = rms_norm(x, weight, 1e-5), silu_mul(x)
        assert not torch.isfinite(normed[1]).all()
        assert torch.isfinite(normed[[0, 2]]).all()
        assert torch.equal(torch.isfinite(gated), torch.isfinite(by_torch(lambda x=x: (silu_mul(x),))[0]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("placed", [at_the_end, at_the_start])
@pytest.mark.parametrize("D", [50, 64, 200])
def test_nothing_beyond_the_inputs_is_read(
    D: int, placed: Callable[[Tensor], Tensor], dtype: torch.dtype, of: str
) -> None:
    x, added, weight = (placed(rand(*shape, dtype=dtype)) for shape in ((3, D), (3, D), (D,)))
    add_rms_norm(x, added, weight, 1e-5)
    silu_mul(x)
    qkv, cos, sin = (placed(rand(*shape, dtype=dtype)) for shape in ((3, 4, D), (3, D // 2), (3, D // 2)))
    k, v = (placed(torch.zeros(1, 3, D, dtype=dtype)) for _ in range(2))
    rope_append(qkv, cos, sin, k, v, torch.tensor([3]))
    assert torch.equal(v[0], qkv[:, 3])


@pytest.mark.parametrize("D", [50, 200])
def test_nothing_around_the_outputs_is_written(monkeypatch: pytest.MonkeyPatch, D: int, of: str) -> None:
    made: list[Tensor] = []

    def surrounded(shape: torch.Size, dtype: torch.dtype) -> Tensor:
        whole = torch.full((shape.numel() + 130,), torch.nan, dtype=dtype)
        made.append(whole)
        return whole[65:-65].view(shape)

    monkeypatch.setattr(torch, "empty_like", lambda x: surrounded(x.shape, x.dtype))
    monkeypatch.setattr(torch, "empty", lambda *size, dtype: surrounded(torch.Size(size), dtype))
    x, weight = rand(3, D, dtype=torch.bfloat16), rand(D, dtype=torch.bfloat16)
    add_rms_norm(x, x, weight, 1e-5)
    silu_mul(x)
    rotation(3, 2, 1, D, torch.bfloat16)()
    assert len(made) == 4
    for whole in made:
        assert whole[:65].isnan().all()
        assert whole[-65:].isnan().all()
        assert not whole[65:-65].isnan().any()


def test_threads_change_no_bit(monkeypatch: pytest.MonkeyPatch, threads: None, of: str) -> None:
    monkeypatch.setattr(compiled, "_FEW_NUMBERS", 0)
    x, weight = rand(37, 200, dtype=torch.bfloat16), rand(200, dtype=torch.bfloat16)
    found = []
    for number in (1, 2, 5):
        torch.set_num_threads(number)
        found.append((*add_rms_norm(x, x, weight, 1e-5), silu_mul(x), *rotation(37, 3, 1, 64, torch.bfloat16)()))
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def test_where_gradients_are_wanted_torch_computes(of: str) -> None:
    x, weight = rand(3, 64, dtype=torch.float32), rand(64, dtype=torch.float32)
    for wants in (x, weight):
        wants.requires_grad_()
        total, normed = add_rms_norm(x, x.detach(), weight, 1e-5)
        (normed.sum() + total.sum() + rms_norm(x, weight, 1e-5).sum() + silu_mul(x).sum()).backward()
        assert wants.grad is not None
        assert wants.grad.abs().sum() > 0
        wants.requires_grad_(False)


def test_other_dtypes_and_devices_are_torchs(of: str) -> None:
    x, weight = rand(3, 64, dtype=torch.bfloat16), rand(64, dtype=torch.float32)
    assert machine_code(x, x) == of
    assert machine_code(x, weight) == machine_code(x.double()) == machine_code(x, x.to("meta")) == ""
    assert rms_norm(x, weight, 1e-5).dtype == torch.float32


@pytest.mark.parametrize("end", [-1, 2, 13, 1 << 40])
def test_rows_outside_the_stores_are_refused(end: int, of: str) -> None:
    qkv, cos, sin = rand(3, 4, 32, dtype=torch.float32), *rand(2, 3, 16, dtype=torch.float32)
    k, v = torch.zeros(2, 1, 12, 32)
    with pytest.raises(ValueError, match=r"expected end of 3\.\.12, got"):
        rope_append(qkv, cos, sin, k, v, torch.tensor([end]))
    with pytest.raises(ValueError, match="expected cos and sin"):
        rope_append(qkv, cos[1:], sin, k, v, torch.tensor([5]))
