"""Linear layers of every precision: one constructor, one way to be filled, one call."""

from __future__ import annotations

import pytest
import torch

from sparsevila.kernels.backend import cpu_level
from sparsevila.quant.linear import Linear, LinearLayer, W4A8Linear, W4A16Linear, W8A8Linear, num_parameters
from sparsevila.quant.scheme import Int4Weight, Int8Weight, pack_nibbles

CPU = torch.device("cpu")
K, PARTS = 96, {"q_proj": 32, "k_proj": 16, "v_proj": 24}


def value(kind: type[LinearLayer], rows: int, seed: int, columns: int = K):
    rng = torch.Generator().manual_seed(seed)
    if kind is Linear:
        return torch.randn(rows, columns, generator=rng)
    if kind is W8A8Linear:
        codes = torch.randint(-128, 128, (rows, columns), generator=rng, dtype=torch.int8)
        return Int8Weight(codes, torch.rand(rows, generator=rng).half() + 0.1)
    codes, groups = torch.randint(0, 16, (rows, columns), generator=rng), columns // 32
    zeros = torch.randint(0, 16, (rows, groups), generator=rng, dtype=torch.uint8)
    scales = torch.rand(rows, groups, generator=rng).half() + 0.1
    return Int4Weight(pack_nibbles(codes), scales, zeros, columns, 32)


def built(kind: type[LinearLayer], parts=PARTS, bias: bool = True) -> LinearLayer:
    with torch.device("meta"):
        if kind is W4A16Linear:
            return W4A16Linear(K, parts, group_size=32, bias=bias)
        return kind(K, parts, bias=bias)


def filled(kind: type[LinearLayer], order=tuple(PARTS), dtype: torch.dtype = torch.float32):
    layer, values = built(kind), {name: value(kind, PARTS[name], i) for i, name in enumerate(PARTS)}
    for name in order:
        layer.fill(name, values[name], dtype=dtype, device=CPU)
    layer.bias = torch.nn.Parameter(torch.arange(72).to(dtype), requires_grad=False)
    return layer, values


KINDS = [Linear, W4A16Linear, W8A8Linear, W4A8Linear]


@pytest.mark.parametrize("order", [("q_proj", "k_proj", "v_proj"), ("v_proj", "q_proj", "k_proj")])
@pytest.mark.parametrize("kind", KINDS)
def test_parts_stand_in_their_rows_whatever_their_order(kind, order):
    layer, values = filled(kind, order)
    dense = torch.cat([v if kind is Linear else v.dequantise() for v in values.values()])
    x = torch.randn(2, 9, K, generator=torch.Generator().manual_seed(9))
    want = x.double() @ dense.double().t() + torch.arange(72)
    got = layer(x)
    assert got.shape == (2, 9, 72)
    limit = 2e-2 if kind in (W8A8Linear, W4A8Linear) else 1e-5
    assert (got.double() - want).abs().max() / want.abs().max() < limit


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_says_what_it_waits_for(kind):
    assert built(kind).waits_for() == {"q_proj": (32, K), "k_proj": (16, K), "v_proj": (24, K)}
    assert built(kind, 40).waits_for() == {"": (40, K)}
    assert built(kind, 40, bias=False).bias is None


@pytest.mark.parametrize("kind", [W4A16Linear, W8A8Linear, W4A8Linear])
def test_nothing_is_kept_twice(kind):
    rows, columns = 64, 256  # which no layout has to pad
    layer = kind(columns, rows, group_size=32) if kind is W4A16Linear else kind(columns, rows)
    layer.fill("", value(kind, rows, 0, columns), dtype=torch.float32, device=CPU)
    stored = sum(p.numel() * p.element_size() for p in layer.parameters())
    # In 4 bits each group has a zero point of a byte and a scale, which machine code takes in float16 as it came.
    a_group = 3 if cpu_level() else 5
    a_row = columns // 2 + columns // 32 * a_group if kind is W4A16Linear else columns + 4
    assert stored == rows * a_row
    assert not layer._arrived
    assert all(not p.requires_grad for p in layer.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_the_dtype_of_the_result_is_that_of_the_input(kind):
    layer, _ = filled(kind, dtype=torch.bfloat16)
    for rows in (1, 40):
        assert layer(torch.ones(rows, K, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_widened_weights_are_the_rounded_ones():
    """What W4A8 adds to the 4-bit weights is one rounding to 8 bits, and that of the activations."""
    layer, values = filled(W4A8Linear)
    dense = torch.cat([v.to_int8().dequantise() for v in values.values()])
    x = torch.randint(-127, 128, (3, K), generator=torch.Generator().manual_seed(9)).float()
    x[:, 0] = 127  # whole numbers up to 127: the activations' codes are exact
    want = x.double() @ dense.double().t() + torch.arange(72)
    assert (layer(x).double() - want).abs().max() / want.abs().max() < 1e-6


@pytest.mark.parametrize("kind", [W4A16Linear, W8A8Linear])
def test_a_layer_that_waits_does_not_compute(kind):
    layer = built(kind)
    layer.fill("k_proj", value(kind, 16, 0), dtype=torch.float32, device=CPU)
    with pytest.raises(AssertionError):
        layer(torch.ones(1, K))
    with pytest.raises(AssertionError):
        layer.fill("k_proj", value(kind, 16, 0), dtype=torch.float32, device=CPU)


def test_a_dense_layer_can_be_trained():
    layer, _ = filled(Linear)
    for parameter in layer.parameters():
        parameter.requires_grad_(True)
    layer(torch.ones(3, K)).square().sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.abs().sum() > 0
    assert layer.bias.grad.abs().sum() > 0


def test_parameters_are_counted_as_weights():
    for kind in KINDS:
        model = torch.nn.Sequential(filled(kind)[0], torch.nn.LayerNorm(7))
        assert num_parameters(model) == 72 * K + 72 + 14
