"""Attention of one token in machine code, on every level the processor has, against float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sparsevila.kernels.cpu import compiled
from sparsevila.kernels.cpu import decode_attention as machine
from sparsevila.kernels.decode_attention import decode_attention, decode_attention_ref

# Relative to the largest value: float32 throughout, then one rounding to the dtype.
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}
# H, H_kv, D, entries of both segments: one part and several, no whole sixteen, an empty segment, groups of 1 to 8.
SHAPES = [(4, 4, 128, 300, 21), (7, 1, 64, 5, 1), (8, 2, 96, 0, 33), (6, 3, 32, 700, 0), (8, 1, 128, 1400, 290)]


@pytest.fixture(params=compiled.LEVELS)
def level(request: pytest.FixtureRequest, limit_cpu: Callable[[str], None]) -> str:
    limit_cpu(request.param)
    if compiled.level() != request.param:
        pytest.skip(f"the processor has no {request.param}")
    return str(request.param)


def stores(H: int, H_kv: int, D: int, A: int, B: int, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """A query and the parts of stores that are in use; around them and between heads stands what would show."""
    rng = torch.Generator().manual_seed(H + D + A)
    parts = []
    for length in (A, A, B, B):
        store = torch.full((H_kv + 1, length + 7, D), float("nan"), dtype=dtype)
        part = store[1:, 3 : 3 + length]
        part.copy_(torch.randn(part.shape, generator=rng) * 2)
        parts.append(part)
    return torch.randn(H, D, generator=rng).mul(2).to(dtype), parts


def error(got: Tensor, want: Tensor) -> float:
    assert got.shape == want.shape
    assert torch.isfinite(got).all()
    return float((got.double() - want).abs().max() / want.abs().max())


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_the_definition(shape: tuple[int, ...], dtype: torch.dtype, level: str) -> None:
    q, (ka, va, kb, vb) = stores(*shape, dtype)
    assert machine.takes(q, (ka, va), (kb, vb))
    got = decode_attention(q, (ka, va), (kb, vb))
    assert got.dtype == dtype
    assert error(got, decode_attention_ref(q, (ka, va), (kb, vb))) < TOLERANCE[dtype]
    # A scale of the caller's, so large that one key has all the weight.
    scale = 3.0
    assert error(
        decode_attention(q, (ka, va), (kb, vb), scale=scale), decode_attention_ref(q, (ka, va), (kb, vb), scale=scale)
    ) < 4 * TOLERANCE[dtype]  # fmt: skip


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_lengths_of_all_heads_and_of_each(dtype: torch.dtype, level: str) -> None:
    H, H_kv, D = 6, 3, 64
    q, (ka, va, kb, vb) = stores(H, H_kv, D, 600, 40, dtype)
    for lengths in ([17, 3], [[600, 40], [0, 1], [259, 0]], [[1, 0], [33, 40], [16, 16]]):
        used = torch.tensor(lengths)
        got = decode_attention(q, (ka, va), (kb, vb), used)
        rows = used.expand(H_kv, 2).tolist()
        for head, (A, B) in enumerate(rows):
            own, queries = slice(head, head + 1), slice(head * 2, head * 2 + 2)
            want = decode_attention_ref(q[queries], (ka[own, :A], va[own, :A]), (kb[own, :B], vb[own, :B]))
            assert error(got[queries], want) < TOLERANCE[dtype]


def test_parts_and_threads_change_nothing_that_matters(monkeypatch: pytest.MonkeyPatch, level: str) -> None:
    q, (ka, va, kb, vb) = stores(8, 2, 128, 1000, 77, torch.float32)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(decode_attention(q, (ka, va), (kb, vb)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    monkeypatch.setattr(machine, "_LEAST_KEYS", 16)
    monkeypatch.setattr(machine, "_MOST_KEYS", 48)
    assert error(decode_attention(q, (ka, va), (kb, vb)), found[0].double()) < TOLERANCE[torch.float32]


def test_weights_far_below_the_largest_vanish(level: str) -> None:
    """Scores from -3000 to 0: a weight below what a float holds is 0, not a small number times a million keys."""
    k = torch.linspace(-3000, 0, 512).view(1, 512, 1).expand(1, 512, 32).contiguous() / 32
    v = torch.ones(1, 512, 32)
    v[:, -1] = 2.0
    q, nothing = torch.ones(1, 32), torch.empty(1, 0, 32)
    want = decode_attention_ref(q, (k, v), (nothing, nothing), scale=1.0)
    assert error(decode_attention(q, (k, v), (nothing, nothing), scale=1.0), want) < 1e-6


def test_what_it_does_not_take_goes_through_torch(level: str) -> None:
    for D, dtype in ((72, torch.float32), (80, torch.bfloat16)):
        q, (ka, va, kb, vb) = stores(4, 2, D, 30, 9, dtype)
        assert not machine.takes(q, (ka, va), (kb, vb))
        assert error(decode_attention(q, (ka, va), (kb, vb)), decode_attention_ref(q, (ka, va), (kb, vb))) < 2e-2
    q, (ka, va, kb, vb) = stores(4, 2, 64, 30, 9, torch.float32)
    across = ka.transpose(1, 2).contiguous().transpose(1, 2)
    assert not machine.takes(q, (across, va), (kb, vb))
    assert error(decode_attention(q, (across, va), (kb, vb)), decode_attention_ref(q, (ka, va), (kb, vb))) < 1e-5


@pytest.mark.parametrize("fault", ["scale", "one key less", "other head", "segments swapped", "last sixteen"])
def test_a_fault_would_show(fault: str, level: str) -> None:
    q, (ka, va, kb, vb) = stores(8, 2, 64, 130, 21, torch.bfloat16)
    q = q / 8  # so that every key counts
    vb[:, -1] = 40
    want = decode_attention_ref(q, (ka, va), (kb, vb))
    a, b, scale = (ka, va), (kb, vb), 64**-0.5
    if fault == "scale":
        scale *= 1.1
    elif fault == "one key less":
        b = (kb[:, :-1], vb[:, :-1])
    elif fault == "other head":
        a = (ka.flip(0), va.flip(0))
    elif fault == "segments swapped":
        a, b = (ka, vb.repeat(1, 7, 1)[:, :130]), b
    else:
        a = (ka[:, :112], va[:, :112])
    assert error(decode_attention(q, a, b, scale=scale), want) > 10 * TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("lengths", [[31, 9], [30, 10], [-1, 9], [[30, 9], [31, 0]]])
def test_lengths_beyond_the_stores_are_refused(lengths: list[int], level: str) -> None:
    q, (ka, va, kb, vb) = stores(4, 2, 64, 30, 9, torch.float32)
    with pytest.raises(ValueError, match="expected lengths within"):
        decode_attention(q, (ka, va), (kb, vb), torch.tensor(lengths))
