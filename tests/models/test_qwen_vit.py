"""The Qwen towers: windows, features and saliency against `transformers`, folding, 8-bit layers of the real widths."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny_qwen import build
from tiny_qwen import config as tiny_config
from torch import Tensor

from sparsevila.models import qwen_vit
from sparsevila.models.checkpoint import Checkpoint, ConfigReader
from sparsevila.models.qwen_vit import FrameLayout, QwenVit, QwenVitConfig, QwenVitLayer, windows_of
from sparsevila.models.registry import load_model
from sparsevila.quant.awq import fold_scales
from sparsevila.quant.block import install, smooth_block
from sparsevila.quant.linear import Linear, W8A8Linear

GENERATIONS = ("qwen2", "qwen2.5")
TOLERANCE = 1e-5  # of the largest entry

# grid_thw -> cu_seqlens in patches and the order of the tokens, with windows of 112 pixels; None: as long as it lasts.
WINDOWS: dict[tuple[int, int, int], tuple[list[int], list[int]]] = {
    (1, 8, 8): ([0, 64], [*range(16)]),
    (1, 10, 12): (
        [0, 64, 96, 112, 120],
        [0, 1, 2, 3, 6, 7, 8, 9, 12, 13, 14, 15, 18, 19, 20, 21, 4, 5, 10, 11, 16, 17, 22, 23, 24, 25, 26, 27, 28, 29],
    ),
    (2, 4, 6): ([0, 24, 48], [*range(12)]),
    (1, 16, 16): ([0, 64, 128, 192, 256], [0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27, 4, 5]),
}


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[QwenVit, Any]]:
    """Ours and that of `transformers`, of one checkpoint."""
    found = {}
    for generation in GENERATIONS:
        oracle = build(tmp_path_factory.mktemp(generation), generation=generation)
        model: Any = load_model(Checkpoint.open(oracle.folder), dtype=torch.float32, device=torch.device("cpu"))
        found[generation] = model.visual, oracle.hf.model.visual
    return found


def tower_of(generation: str, **changes: Any) -> QwenVit:
    """A random one."""
    vision = tiny_config(generation)["vision_config"] | changes  # type: ignore[arg-type]
    tower = QwenVit(QwenVitConfig.from_hf(ConfigReader(vision), gated=generation == "qwen2.5"))
    return randomised(tower)


def randomised(module: Any, seed: int = 0) -> Any:
    rng = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        drawn = torch.randn(parameter.shape, generator=rng)
        is_scale = ("norm" in name or "ln_q" in name) and name.endswith("weight")
        parameter.requires_grad_(False)
        parameter.data = 1 + 0.1 * drawn if is_scale else drawn / parameter[0].numel() ** 0.5
    return module.eval()


def patches(frames: int, rows: int, cols: int, seed: int = 0) -> Tensor:
    return torch.randn(frames, rows * cols, 1176, generator=torch.Generator().manual_seed(seed))


def assert_close(a: Tensor, b: Tensor) -> None:
    assert a.shape == b.shape
    assert float((a - b).abs().max()) <= TOLERANCE * float(b.abs().max())


class TestWindows:
    @pytest.mark.parametrize("grid", WINDOWS, ids=str)
    def test_known_orders(self, grid):
        times, rows, cols = grid
        lengths, order = WINDOWS[grid]
        windows = windows_of(rows // 2, cols // 2, 4)
        per_frame = rows * cols // 4
        found = torch.cat([window + t * per_frame for t in range(times) for window in windows]).tolist()
        assert found[: len(order)] == order
        sizes = [4 * len(window) for window in windows] * times
        assert torch.tensor([0, *sizes]).cumsum(0).tolist() == lengths

    @pytest.mark.parametrize("window", [56, 112, 140])
    def test_orders_of_transformers(self, window):
        from transformers.vision_utils import get_vision_window_index

        for rows, cols in [(2, 2), (4, 30), (14, 6), (22, 26), (40, 10), (18, 18)]:
            index, cumulated = get_vision_window_index(torch.tensor([[1, rows, cols]]), 2, window, 14)
            windows = windows_of(rows // 2, cols // 2, window // 28)
            assert torch.equal(torch.cat(windows), index)
            assert [0, *torch.tensor([4 * len(w) for w in windows]).cumsum(0)] == cumulated.tolist()

    def test_windows_of_one_size_stand_together(self):
        layout = tower_of("qwen2.5", window_size=112).layout(10, 12)
        assert layout.windows == ((1, 64), (1, 32), (1, 16), (1, 8))
        assert tower_of("qwen2.5", window_size=112).layout(18, 18).windows == ((4, 64), (4, 16), (1, 4))
        x = torch.arange(30)[None, :, None].expand(1, 30, 4).reshape(1, 120, 1)
        assert torch.equal(layout.read(layout.place(x)[:, ::4]), torch.arange(30)[None, :, None])


class TestAgainstTransformers:
    @pytest.mark.parametrize("generation", GENERATIONS)
    @pytest.mark.parametrize("grid", [(1, 2, 2), (1, 4, 6), (3, 10, 12), (2, 6, 22), (1, 18, 18)], ids=str)
    def test_features(self, towers, generation, grid):
        ours, theirs = towers[generation]
        pixels = patches(*grid)
        with torch.inference_mode():
            features, _ = ours(pixels, ours.layout(*grid[1:]))
            want = theirs(pixels.flatten(0, 1), grid_thw=torch.tensor([grid])).pooler_output
        assert_close(features.flatten(0, 1), want)

    @pytest.mark.parametrize("generation", GENERATIONS)
    def test_saliency_is_the_column_mean_of_the_last_full_layer(self, towers, generation):
        """From what `transformers` feeds that layer: its queries and keys, a softmax over each whole frame."""
        ours, theirs = towers[generation]
        grid = (2, 10, 12)
        layer = theirs.blocks[3 if generation == "qwen2.5" else 2]
        seen: dict[str, Any] = {}
        hook = layer.attn.register_forward_pre_hook(
            lambda _, args, kwargs: seen.update(kwargs, x=kwargs.get("hidden_states", args[0] if args else None)),
            with_kwargs=True,
        )
        pixels = patches(*grid)
        with torch.inference_mode():
            theirs(pixels.flatten(0, 1), grid_thw=torch.tensor([grid]))
            hook.remove()
            q, k = rotated(layer.attn, seen["x"], *seen["position_embeddings"])
            received = (
                scores_of(q, k, 120).mean((1, 2)).unflatten(1, (-1, 4)).mean(-1)
            )  # (frames, tokens), in the order of the windows
            if generation == "qwen2.5":
                order = torch.cat(windows_of(5, 6, 2))
                received = received[:, order.argsort()]
            _, saliency = ours(pixels, ours.layout(*grid[1:]))
        assert_close(saliency, received)
        assert saliency.sum(1).tolist() == pytest.approx([0.25, 0.25])
        assert saliency.std() > 0.01 * saliency.mean()  # the comparison could fail

    def test_the_mlp_takes_some_rows_at_a_time(self, towers, monkeypatch):
        ours, _ = towers["qwen2.5"]
        layout = ours.layout(10, 12)
        want = ours(patches(2, 10, 12), layout)
        monkeypatch.setattr(qwen_vit, "_ROWS_PER_MLP", 50)
        for a, b in zip(ours(patches(2, 10, 12), layout), want, strict=True):
            assert_close(a, b)

    @pytest.mark.parametrize("generation", GENERATIONS)
    def test_frames_do_not_see_each_other(self, towers, generation):
        ours, _ = towers[generation]
        layout = ours.layout(6, 8)
        pixels = patches(3, 6, 8)
        whole = ours(pixels, layout)
        for i in range(3):
            for part, of_all in zip(ours(pixels[i : i + 1], layout), whole, strict=True):
                assert_close(part[0], of_all[i])


def rotated(attn: Any, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision

    q, k, _ = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1)).unbind(1)
    return apply_rotary_pos_emb_vision(q, k, cos, sin)


def scores_of(q: Tensor, k: Tensor, per_frame: int) -> Tensor:
    """Softmax of every frame's queries over its keys: (rows, heads, D) -> (frames, heads, S, S)."""
    q, k = (x.unflatten(0, (-1, per_frame)).transpose(1, 2).double() for x in (q, k))
    return (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).softmax(-1).float()


class TestScaleGroups:
    @pytest.mark.parametrize("generation", GENERATIONS)
    @pytest.mark.parametrize("which", [0, 1, 2, 3, None])
    def test_folding_leaves_the_tower_as_it_was(self, generation, which):
        tower = tower_of(generation)
        layout = tower.layout(6, 8)
        before = tower(patches(2, 6, 8), layout)
        folded = 0
        for i in range(tower.config.num_layers):
            for j, group in enumerate(tower.layer(i).scale_groups()):
                if group.previous is None or which not in (None, j):
                    continue
                rng = torch.Generator().manual_seed(10 * i + j)
                layers = list(group.layers.values())
                scales = 8 ** (2 * torch.rand(layers[0].in_features, generator=rng) - 1)
                scales = scales if group.heads is None else group.heads.share(scales)
                fold_scales(group.previous, layers, scales, rows=group.rows, heads=group.heads, name=group.name)
                folded += 1
        assert folded or (generation, which) == ("qwen2", 3)
        for now, then in zip(tower(patches(2, 6, 8), layout), before, strict=True):
            assert_close(now, then)

    @pytest.mark.parametrize("generation", GENERATIONS)
    def test_every_linear_layer_is_in_one_group_under_its_name(self, generation):
        layer = tower_of(generation).layer(0)
        grouped = {name: member for group in layer.scale_groups() for name, member in group.layers.items()}
        own = {name: module for name, module in layer.named_modules() if isinstance(module, Linear)}
        assert list(grouped) == list(own)
        assert all(grouped[name] is own[name] for name in own)

    def test_only_the_activation_of_the_first_generation_is_in_the_way(self):
        unscaled = [
            [group.name for group in tower_of(generation).layer(0).scale_groups() if group.previous is None]
            for generation in GENERATIONS
        ]
        assert unscaled == [["mlp.fc2"], []]


def test_int8_layers_of_the_real_widths() -> None:
    """Width 1280, heads of 80 channels, 3420 in the MLP: no multiple of 16."""
    vision = {"depth": 1, "hidden_size": 1280, "intermediate_size": 3420, "fullatt_block_indexes": [0]}
    config = QwenVitConfig.from_hf(ConfigReader(vision), gated=True)
    layer = randomised(QwenVitLayer(config, 0))
    layout = FrameLayout.of(config, 4, 6, torch.device("cpu"))
    x = torch.randn(1, 24, 1280, generator=torch.Generator().manual_seed(1))
    want, _ = layer(x, layout, score=False)
    block = copy.deepcopy(layer)
    install(block, smooth_block(block, None).weights)
    kinds = [type(module) for module in block.modules() if isinstance(module, (Linear, W8A8Linear))]
    assert kinds == [W8A8Linear] * 4
    got, scores = block(x, layout, score=True)
    error = float((got - want).norm() / (want - x).norm())
    assert 1e-4 < error < 0.03
    assert scores.sum() == pytest.approx(1)
