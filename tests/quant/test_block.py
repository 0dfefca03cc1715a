"""A block quantised by its own description: better than rounding, and what is handed out is what the block computes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsevila.quant.awq import Rounding, quantise_int4
from sparsevila.quant.block import QuantisedBlock, awq_block, install, linear_layers, smooth_block
from sparsevila.quant.calibration import ChannelStats, collect
from sparsevila.quant.linear import Linear, W4A16Linear, W8A8Linear
from sparsevila.quant.scale_group import ScaledBlock, ScaleGroup
from sparsevila.quant.scheme import Int4Weight, Int8Weight
from sparsevila.quant.smoothquant import quantise_int8

G32 = Rounding(group_size=32)
K, FF = 64, 96


class Block(ScaledBlock):
    """A norm, fused layers with a bias, a gated product, and a layer behind an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(K)
        self.mix = nn.ModuleDict({"qk": Linear(K, {"q_proj": 32, "gate": FF, "up": FF}, bias=True)})
        self.down = Linear(FF, K)
        self.last = Linear(K, 16, bias=True)

    @property
    def fused(self) -> Linear:
        layer = self.mix["qk"]
        assert isinstance(layer, Linear)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        q, gate, up = self.mix["qk"](self.norm(x)).split([32, FF, FF], dim=-1)
        return torch.cat([q, self.last(F.gelu(self.down(F.silu(gate) * up)))], dim=-1)

    def scale_groups(self) -> tuple[ScaleGroup, ...]:
        return (
            ScaleGroup({"mix.qk": self.fused}, self.norm),
            ScaleGroup({"down": self.down}, self.fused, rows=self.fused.parts["up"]),
            ScaleGroup({"last": self.last}, None, unscaled="a GELU"),
        )


def block_of(seed: int = 0) -> Block:
    """Random weights, and a norm that makes a few channels thirty times larger than the others."""
    rng = torch.Generator().manual_seed(seed)
    block = Block()
    for name, parameter in block.named_parameters():
        parameter.requires_grad_(False)
        parameter.copy_(torch.randn(parameter.shape, generator=rng) * 0.1)
        if name == "norm.weight":
            parameter.add_(1)
            parameter[torch.randperm(K, generator=rng)[:3]] *= 30
    block.fused.weight[block.fused.parts["up"]][:2] *= 20  # and a few outliers behind the product
    return block


def rows_of(M: int, seed: int) -> Tensor:
    return torch.randn(M, K, generator=torch.Generator().manual_seed(seed))


def stats_of(block: Block) -> dict[str, ChannelStats]:
    return collect(linear_layers(block), [lambda: block(rows_of(300, 50))], num_rows=200)


def error(block: Block, done: QuantisedBlock, exact: Block, rows: Tensor) -> float:
    """Of the installed block's outputs."""
    install(block, done.weights)
    return float((block(rows) - exact(rows)).square().mean())


QUANTISE: dict[str, Callable[[Block, dict[str, ChannelStats] | None], QuantisedBlock]] = {
    "awq": lambda block, stats: awq_block(block, stats, G32),
    "smooth": lambda block, stats: smooth_block(block, stats),
}


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("how", "enough"), [("awq", 0.6), ("smooth", 0.6)])
def test_searches_beat_plain_rounding_on_rows_they_have_not_seen(how: str, enough: float, seed: int) -> None:
    exact, plain, searched = block_of(seed), block_of(seed), block_of(seed)
    fresh = rows_of(200, 99)
    before = error(plain, QUANTISE[how](plain, None), exact, fresh)
    after = error(searched, QUANTISE[how](searched, stats_of(exact)), exact, fresh)
    assert 0 < after < enough * before


@pytest.mark.parametrize("how", QUANTISE)
def test_without_inputs_it_is_plain_rounding_and_nothing_else_changes(how: str) -> None:
    block, own = block_of(), dict(block_of().named_parameters())
    done = QUANTISE[how](block, None)
    fused = block.fused
    wanted = {f"mix.{part}": fused.weight[rows] for part, rows in fused.parts.items()}
    wanted |= {"down": block.down.weight, "last": block.last.weight}
    assert list(done.weights) == list(wanted)
    for name, weight in wanted.items():
        expected = quantise_int4(weight, 32) if how == "awq" else quantise_int8(weight)
        assert torch.equal(done.weights[name].dequantise(), expected.dequantise())
    assert list(done.dense) == ["norm.weight", "norm.bias", "mix.q_proj.bias", "mix.gate.bias", "mix.up.bias",
                                "last.bias"]  # fmt: skip
    assert torch.equal(torch.cat([done.dense[f"mix.{part}.bias"] for part in fused.parts]), own["mix.qk.bias"])
    assert all(torch.equal(p, own[name]) for name, p in block.named_parameters())
    assert done.record.scales == done.record.clips == done.record.unscaled == ()


@pytest.mark.parametrize("how", QUANTISE)
def test_what_is_handed_out_is_what_the_block_computes(how: str) -> None:
    exact, block = block_of(), block_of()
    done = QUANTISE[how](block, stats_of(exact))
    stored = copy.deepcopy(exact)
    for name, tensor in done.dense.items():
        owner, _, leaf = name.rpartition(".")
        if owner.startswith("mix."):
            stored.fused.bias[stored.fused.parts[owner.removeprefix("mix.")]] = tensor
        else:
            stored.get_submodule(owner).get_parameter(leaf).copy_(tensor)
    install(stored, done.weights)
    install(block, done.weights)
    rows = rows_of(40, 7)
    assert torch.equal(stored(rows), block(rows))
    # Folding has moved scales into the norm, the bias of "up", and nowhere else.
    changed = {name for name, tensor in done.dense.items() if not torch.equal(tensor, dense_of(exact)[name])}
    assert changed == {"norm.weight", "norm.bias", "mix.up.bias"}


def dense_of(block: Block) -> dict[str, Tensor]:
    return dict(awq_block(copy.deepcopy(block), None, G32).dense)


def test_the_record_tells_what_was_searched() -> None:
    exact = block_of()
    record = awq_block(block_of(), stats_of(exact), G32).record
    assert [r.name for r in record.scales] == ["mix.qk", "down"]
    assert [r.name for r in record.clips] == ["mix.qk", "down", "last"]
    assert record.unscaled == (("last", "a GELU"),)
    assert all(r.error_after < r.error_before for r in record.scales)
    smooth = smooth_block(block_of(), stats_of(exact)).record
    assert smooth.clips == ()
    assert [r.name for r in smooth.scales] == ["mix.qk", "down"]


def test_the_queries_are_not_clipped() -> None:
    block = block_of()
    done = awq_block(block, stats_of(block_of()), G32)
    assert done.record.clips[0].clipped > 0
    for part, is_clipped in (("q_proj", False), ("gate", True)):
        groups = block.fused.weight[block.fused.parts[part]].unflatten(1, (-1, 32)).abs()
        # Where a range was narrowed, several weights lie at the very limit.
        at_limit = (groups == groups.amax(2, keepdim=True)).sum(2)
        assert bool((at_limit > 1).any()) == is_clipped


@pytest.mark.parametrize(
    ("how", "kind", "value"), [("awq", W4A16Linear, Int4Weight), ("smooth", W8A8Linear, Int8Weight)]
)
def test_install_replaces_every_layer_and_keeps_biases(how: str, kind: type, value: type) -> None:
    block = block_of()
    bias = block.fused.bias
    done = QUANTISE[how](block, None)
    assert all(isinstance(weight, value) for weight in done.weights.values())
    install(block, done.weights)
    assert not linear_layers(block)
    assert {name for name, m in block.named_modules() if isinstance(m, kind)} == {"mix.qk", "down", "last"}
    assert block.mix["qk"].bias is bias
    assert block.mix["qk"].parts == block_of().fused.parts


@pytest.mark.parametrize("how", QUANTISE)
def test_a_weight_that_is_no_number_is_named(how: str) -> None:
    block = block_of()
    block.down.weight[3, 3] = float("nan")
    with pytest.raises(ValueError, match="down: expected finite numbers, got 1 of 6144"):
        QUANTISE[how](block, None)
    with pytest.raises(ValueError, match="down: expected finite numbers, got 1 of 6144"):
        QUANTISE[how](block, stats_of(block_of()))


@pytest.mark.parametrize("how", ["awq", "smooth"])
def test_a_check_that_raises_stops_the_work(how: str) -> None:
    calls = 0

    def check() -> None:
        nonlocal calls
        calls += 1
        if calls == 30:
            raise KeyboardInterrupt

    stats = stats_of(block_of())
    run = partial(awq_block, rounding=G32) if how == "awq" else smooth_block
    with pytest.raises(KeyboardInterrupt):
        run(block_of(), stats, check=check)
    assert calls == 30
