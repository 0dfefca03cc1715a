"""Quantised weights as values: the formula, odd sizes, and what they refuse."""

from __future__ import annotations

import pytest
import torch

from sparsevila.quant.scheme import Int4Weight, Int8Weight, pack_nibbles, unpack_nibbles


def random_int4(N: int, K: int, g: int, seed: int = 0) -> tuple[torch.Tensor, Int4Weight]:
    """Codes one by one, and the value."""
    rng = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (N, K), generator=rng)
    groups = -(-K // g)
    scales = torch.rand(N, groups, generator=rng) + 0.1
    zeros = torch.randint(0, 16, (N, groups), generator=rng, dtype=torch.uint8)
    return codes, Int4Weight(pack_nibbles(codes), scales, zeros, K, g)


@pytest.mark.parametrize(("N", "K", "g"), [(3, 8, 4), (5, 7, 3), (2, 64, 64), (4, 10, 128), (1, 1, 1)])
def test_int4_is_the_formula_element_by_element(N: int, K: int, g: int) -> None:
    codes, weight = random_int4(N, K, g)
    dense = weight.dequantise()
    assert dense.shape == (N, K)
    for n in range(N):
        for k in range(K):
            zero, scale = int(weight.zeros[n, k // g]), weight.scales[n, k // g]
            assert dense[n, k] == (int(codes[n, k]) - zero) * scale


@pytest.mark.parametrize(("N", "K", "g"), [(3, 8, 4), (5, 7, 3), (4, 10, 128), (3000, 1500, 100)])
def test_int4_widened_to_int8(N: int, K: int, g: int) -> None:
    weight = random_int4(N, K, g)[1]
    weight.scales[1] = 0  # a row of zeros
    wide, dense = weight.to_int8(), weight.dequantise()
    largest = dense.abs().amax(dim=1)
    assert wide.scales.dtype == torch.float32
    assert torch.equal(wide.scales, torch.where(largest == 0, 1.0, largest / 127))
    assert (wide.dequantise() - dense).abs().max(dim=1).values.le(wide.scales * 0.5001).all()
    assert wide.codes.abs().max() == 127
    assert not wide.codes[1].any()


def test_int8_is_the_formula() -> None:
    codes = torch.tensor([[-127, 0, 3], [127, 1, -1]], dtype=torch.int8)
    weight = Int8Weight(codes, torch.tensor([0.5, 2.0], dtype=torch.float16))
    assert weight.dequantise().tolist() == [[-63.5, 0.0, 1.5], [254.0, 2.0, -2.0]]
    assert (weight.out_features, weight.in_features) == (2, 3)


def test_the_even_code_is_in_the_low_nibble() -> None:
    assert pack_nibbles(torch.tensor([[1, 2, 3]])).tolist() == [[0x21, 0x03]]


@pytest.mark.parametrize("K", [1, 2, 7, 64])
def test_packing_can_be_undone(K: int) -> None:
    codes = torch.randint(0, 16, (3, K), generator=torch.Generator().manual_seed(K))
    assert torch.equal(unpack_nibbles(pack_nibbles(codes), K), codes.to(torch.uint8))


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("codes", torch.zeros(2, 3, dtype=torch.uint8), r"expected codes \(2, 4\) uint8, got \(2, 3\)"),
        ("codes", torch.zeros(2, 4), "got .* torch.float32"),
        ("scales", torch.ones(2, 3), r"expected scales \(2, 2\) of floats, got \(2, 3\)"),
        ("scales", torch.ones(2, 2, dtype=torch.int32), "torch.int32"),
        ("zeros", torch.zeros(2, 2), r"expected zeros \(2, 2\) uint8"),
        ("group_size", 0, "at least 1, got 0"),
    ],
)
def test_int4_says_what_it_expected(field: str, value: object, said: str) -> None:
    fields = {
        "codes": torch.zeros(2, 4, dtype=torch.uint8),
        "scales": torch.ones(2, 2),
        "zeros": torch.zeros(2, 2, dtype=torch.uint8),
        "in_features": 8,
        "group_size": 4,
    }
    Int4Weight(**fields)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=said):
        Int4Weight(**{**fields, field: value})  # type: ignore[arg-type]


def test_int8_says_what_it_expected() -> None:
    with pytest.raises(ValueError, match="int8, got"):
        Int8Weight(torch.zeros(2, 3), torch.ones(2))
    with pytest.raises(ValueError, match=r"expected scales \(2,\) of floats, got \(3,\)"):
        Int8Weight(torch.zeros(2, 3, dtype=torch.int8), torch.ones(3))
