"""Blocks describe themselves rightly: scales folded along their groups leave the function they compute as it was."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from sparsevila.kernels.attention import attention
from sparsevila.models.clip import ClipConfig, ClipTower
from sparsevila.models.decoder import Decoder, DecoderConfig, DecoderHead
from sparsevila.models.rotary import RopeConfig
from sparsevila.quant.awq import fold_scales
from sparsevila.quant.linear import Linear
from sparsevila.quant.scale_group import ScaledBlock, ScaleGroup

TOLERANCE = 2e-5  # of the largest output: float32 rounding of a few products, scales up to 8 and down to 1/8

MHA = DecoderConfig(
    hidden_size=48, intermediate_size=72, num_layers=2, num_heads=4, num_kv_heads=4, head_dim=12, vocab_size=50,
    rms_norm_eps=1e-5, rope=RopeConfig(theta=1e4), max_context=64, qkv_bias=False, tie_word_embeddings=False,
)  # fmt: skip
CONFIGS = {
    "mha": MHA,
    "mha, bias": replace(MHA, qkv_bias=True),
    "gqa": replace(MHA, num_heads=6, num_kv_heads=2),
    "gqa, bias, wide heads": replace(MHA, num_heads=6, num_kv_heads=3, head_dim=20, qkv_bias=True),
    "one key head": replace(MHA, num_kv_heads=1),
}
CLIP = ClipConfig(
    hidden_size=40, intermediate_size=56, num_layers=3, num_heads=5, image_size=28, patch_size=7,
    hidden_act="quick_gelu", layer_norm_eps=1e-5,
)  # fmt: skip


def randomised(module: nn.Module, seed: int) -> nn.Module:
    rng = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(False)
        drawn = torch.randn(parameter.shape, generator=rng)
        parameter.data = 1 + 0.1 * drawn if "norm" in name and name.endswith("weight") else 0.3 * drawn
    return module


def decoder_of(name: str) -> Decoder:
    decoder = randomised(Decoder(CONFIGS[name]), 1)
    assert isinstance(decoder, Decoder)
    return decoder


def logits_of(decoder: Decoder, ids: Tensor) -> Tensor:
    hidden = decoder.embed(ids)
    cos, sin = decoder.angles(torch.arange(len(ids)))
    for i in range(decoder.config.num_layers):
        layer = decoder.layer(i)
        q, k, v = layer.project(hidden, cos, sin)
        hidden = layer.finish(hidden, attention(q, k, v, causal=True)[0])
    return decoder.logits(hidden)


def fold_at_random(group: ScaleGroup, seed: int) -> None:
    """Scales between 1/8 and 8, alike where channels are copies of each other."""
    layers = list(group.layers.values())
    rng = torch.Generator().manual_seed(seed)
    scales = 8 ** (2 * torch.rand(layers[0].in_features, generator=rng) - 1)
    scales = scales if group.heads is None else group.heads.share(scales)
    assert group.previous is not None
    fold_scales(group.previous, layers, scales, rows=group.rows, heads=group.heads, name=group.name)


def assert_close(a: Tensor, b: Tensor) -> None:
    assert float((a - b).abs().max()) <= TOLERANCE * float(b.abs().max())


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("which", [0, 1, 2, 3, None])
def test_folding_leaves_the_decoder_as_it_was(name: str, which: int | None) -> None:
    decoder = decoder_of(name)
    ids = torch.randint(0, 50, (17,), generator=torch.Generator().manual_seed(2))
    before = logits_of(decoder, ids)
    weights = [p.clone() for p in decoder.parameters()]
    for i in range(decoder.config.num_layers):
        for j, group in enumerate(decoder.layer(i).scale_groups()):
            if which in (None, j):
                fold_at_random(group, 10 * i + j)
    assert any(not torch.equal(p, w) for p, w in zip(decoder.parameters(), weights, strict=True))
    assert_close(logits_of(decoder, ids), before)


@pytest.mark.parametrize("which", [0, 1, 2, None])
def test_folding_leaves_the_tower_as_it_was(which: int | None) -> None:
    tower = randomised(ClipTower(CLIP, -1), 3)
    assert isinstance(tower, ClipTower)
    pixels = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(4))
    before = tower(pixels)
    for i in range(CLIP.num_layers):
        for j, group in enumerate(tower.layer(i).scale_groups()):
            if group.previous is not None and which in (None, j):
                fold_at_random(group, 10 * i + j)
    for now, then in zip(tower(pixels), before, strict=True):
        assert_close(now, then)


def test_folding_leaves_the_head_as_it_was() -> None:
    head = randomised(DecoderHead(MHA), 5)
    assert isinstance(head, DecoderHead)
    hidden = torch.randn(7, 48, generator=torch.Generator().manual_seed(6))
    before = head(hidden)
    (group,) = head.scale_groups()
    fold_at_random(group, 7)
    assert_close(head(hidden), before)


def blocks() -> list[tuple[str, ScaledBlock]]:
    found: list[tuple[str, ScaledBlock]] = [(name, decoder_of(name).layer(0)) for name in CONFIGS]
    return [*found, ("clip", ClipTower(CLIP, -1).layer(0)), ("head", DecoderHead(MHA))]


@pytest.mark.parametrize(("name", "block"), blocks(), ids=lambda value: value if isinstance(value, str) else "")
def test_every_linear_layer_is_in_one_group_under_its_name(name: str, block: ScaledBlock) -> None:
    grouped = [(n, layer) for group in block.scale_groups() for n, layer in group.layers.items()]
    own = {n: module for n, module in block.named_modules() if isinstance(module, Linear)}
    assert sorted(n for n, _ in grouped) == sorted(own)
    assert all(own[n] is layer for n, layer in grouped)
    assert [group.name for group in block.scale_groups()] == list(own), "not in the order in which they run"


def test_what_stands_behind_an_activation_is_not_scaled() -> None:
    unscaled = {g.name: g.unscaled for g in ClipTower(CLIP, -1).layer(0).scale_groups() if g.previous is None}
    assert unscaled == {"mlp.fc2": "an activation stands before it"}


def test_a_group_refuses() -> None:
    with pytest.raises(ValueError, match=r"layers of one input, got \{'a': 4, 'b': 8\}"):
        ScaleGroup({"a": Linear(4, 2), "b": Linear(8, 2)}, nn.LayerNorm(4))
    with pytest.raises(ValueError, match="a: expected what makes the input, or the reason"):
        ScaleGroup({"a": Linear(4, 2)}, None)
    with pytest.raises(ValueError, match="expected layers of one input"):
        ScaleGroup({}, None, unscaled="nothing")
