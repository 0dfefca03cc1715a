"""The NVILA family against a plain implementation over `transformers`' towers and Qwen2, on the same pixels.

`transformers` has no such model. What stands here in its place is written from the layout of NVlabs/VILA, one loop a
step, and shares no code with the package.
"""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles import write_clip
from PIL import Image as PILImage
from safetensors.torch import load_file, save_file
from tiny_nvila import EXTRA_SHAPES, SHAPES, SPECIAL_IDS, SPECIALS, Shape, TinyNvila, write
from tiny_qwen import tokenizer_json
from torch import Tensor
from torch.nn import functional as F

from sparsevila import CorruptCheckpoint, Engine, Image, ModelNotFound, SamplingParams, Sparsity, UnsupportedModel
from sparsevila.engine.runner import Runner, Span, TextSpan, VisualSpan
from sparsevila.engine.sparsity.base import Method
from sparsevila.engine.tokenizer import load_tokenizer
from sparsevila.models import nvila
from sparsevila.models.chatml import ChatMLPrompt
from sparsevila.models.checkpoint import Checkpoint
from sparsevila.models.interface import Frames, Progress, Special, VisualTokens
from sparsevila.models.nvila import Nvila, NvilaConfig, _in_whole_runs, _Tiles
from sparsevila.models.registry import build_model, load_model
from sparsevila.quant.awq import quantise_int4
from sparsevila.quant.compressed_format import write_int_quantized, write_pack_quantized
from sparsevila.quant.linear import LinearLayer
from sparsevila.quant.smoothquant import quantise_int8

CPU = torch.device("cpu")
ALL = {**SHAPES, **EXTRA_SHAPES}
SIZES = [(31, 77), (28, 28), (200, 90), (9, 8), (40, 300), (113, 112), (84, 84), (50, 149)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> dict[str, TinyNvila]:
    """Every tiny checkpoint, made once."""
    return {name: write(tmp_path_factory.mktemp(name) / "model", shape) for name, shape in ALL.items()}


@pytest.fixture(scope="module")
def models(tiny) -> dict[str, Any]:
    return {name: load(t.folder) for name, t in tiny.items()}


def load(folder: Path) -> Any:
    return load_model(Checkpoint.open(folder), dtype=torch.float32, device=CPU)


def frames(*shape: int, kind: str = "image", seed: int = 0) -> Frames:
    """Noise over a gradient: every resampling error shows."""
    T, H, W = shape if kind == "video" else (1, *shape)
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:H, 0:W]
    base = np.stack([y * 255 // max(H, 2), x * 255 // max(W, 2), (x + y) % 256], axis=-1)
    rgb = ((base + rng.integers(0, 60, (T, H, W, 3))) % 256).astype(np.uint8)
    return Frames(kind, rgb, np.arange(T, dtype=float), "<test>", float(T), key=f"{kind}{shape}{seed}")


# The plain implementation -------------------------------------------------------------------------------------------


class Plain:
    """One tiny model, from pixels to logits."""

    def __init__(self, tiny: TinyNvila) -> None:
        self.tiny, self.top = tiny, tiny.shape.top
        self.size = tiny.shape.vision["image_size"]
        self.side = self.size // tiny.shape.vision["patch_size"]
        kind = tiny.shape.projector
        self.block = 3 if "3x3" in kind else 2 if "downsample" in kind else 1
        self.newline = tiny.llm.get_input_embeddings().weight[newline_id()][None]

    # Tiles, as the upstream preprocessing crops them

    def crop_all(self, picture: PILImage.Image, cols: int, rows: int) -> list[PILImage.Image]:
        big = picture.resize((self.size * cols, self.size * rows))
        return [
            big.crop((c * self.size, r * self.size, (c + 1) * self.size, (r + 1) * self.size))
            for r in range(rows)
            for c in range(cols)
        ]

    def ratio(self, picture: PILImage.Image, low: int, high: int) -> tuple[int, int]:
        width, height = picture.size
        best, best_diff = (1, 1), float("inf")
        every = {(i, j) for n in range(low, high + 1) for i in range(1, n + 1) for j in range(1, n + 1)}
        for i, j in sorted((r for r in every if low <= r[0] * r[1] <= high), key=lambda r: r[0] * r[1]):
            diff = abs(width / height - i / j)
            if diff < best_diff:
                best, best_diff = (i, j), diff
            elif diff == best_diff and width * height > 0.5 * self.size * self.size * i * j:
                best = (i, j)
        return best

    def square(self, picture: PILImage.Image) -> PILImage.Image:
        if self.top["image_aspect_ratio"] == "pad":
            width, height = picture.size
            longest = max(width, height)
            canvas = PILImage.new("RGB", (longest, longest), (127, 127, 127))
            canvas.paste(picture, ((longest - width) // 2, (longest - height) // 2))
            picture = canvas
        return picture.resize((self.size, self.size))

    # Towers

    def patches(self, tile: PILImage.Image) -> tuple[Tensor, Tensor]:
        """(side, side, C) features and (side, side) saliency of one tile."""
        pixels = torch.from_numpy(np.asarray(tile).transpose(2, 0, 1).astype(np.float32))[None] / 255
        hf = self.tiny.tower
        hf.set_attn_implementation("eager")
        if self.tiny.shape.tower == "radio":
            out = hf(pixels, output_attentions=True)
            features, prefix = out.features[0], hf.config.num_cls_tokens + hf.config.num_registers
            merit = out.attentions[-1][0][:, : hf.config.num_cls_tokens, prefix:].mean(dim=(0, 1))
        else:
            out = hf((pixels - 0.5) / 0.5, output_hidden_states=True, output_attentions=True)
            features, merit = out.hidden_states[-2][0], out.attentions[-2][0].mean(dim=(0, 1))
        return features.view(self.side, self.side, -1), merit.view(self.side, self.side)

    # Projector

    def project(self, square: Tensor) -> Tensor:
        """(side, side, C) -> (n, n, hidden)."""
        n = math.ceil(self.side / self.block)
        rows = []
        for i in range(n):
            for j in range(n):
                parts = []
                for a in range(self.block):
                    for b in range(self.block):
                        y, x = i * self.block + a, j * self.block + b
                        inside = y < self.side and x < self.side
                        parts.append(square[y, x] if inside else torch.zeros(square.shape[2]))
                rows.append(self.mlp(torch.cat(parts)))
        return torch.stack(rows).view(n, n, -1)

    def mlp(self, x: Tensor) -> Tensor:
        w = self.tiny.projector
        kind = self.tiny.shape.projector
        gelu = F.gelu

        def linear(name: str, x: Tensor) -> Tensor:
            return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

        def norm(name: str, x: Tensor) -> Tensor:
            return F.layer_norm(x, x.shape, w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)

        if kind == "identity":
            return x
        if kind == "linear":
            return linear("layers", x)
        if kind == "mlp2x_gelu":
            return linear("layers.2", gelu(linear("layers.0", x)))
        if self.block == 2:
            return linear("layers.4", gelu(linear("layers.2", norm("layers.1", x))))
        x = norm("layers.4", gelu(linear("layers.2", norm("layers.1", x))))
        return linear("layers.7", gelu(linear("layers.5", x)))

    def merged_merit(self, merit: Tensor) -> Tensor:
        """(side, side) -> (n, n): mean over the patches that are there."""
        n = math.ceil(merit.shape[0] / self.block)
        means = [
            merit[i * self.block : (i + 1) * self.block, j * self.block : (j + 1) * self.block].mean()
            for i in range(n)
            for j in range(n)
        ]
        return torch.stack(means).view(n, n)

    # Media to embeddings and saliency; None stands for a newline

    def units(self, media: Frames) -> tuple[Tensor, list[float | None]]:
        pictures = [PILImage.fromarray(rgb) for rgb in media.rgb]
        mode = self.top["image_aspect_ratio"]
        if media.kind == "video":
            return self.clip([self.patches(self.square(p)) for p in pictures])
        if mode == "dynamic":
            cols, rows = self.ratio(pictures[0], self.top["min_tiles"], self.top["max_tiles"])
            tiles = self.crop_all(pictures[0], cols, rows)
            tiles += [pictures[0].resize((self.size, self.size))] if len(tiles) > 1 else []
            return self.joined([self.one(*self.patches(tile)) for tile in tiles], newlines=2)
        if mode == "dynamic_s2":
            return self.joined([self.all_scales(pictures[0])], newlines=1)
        return self.joined([self.one(*self.patches(self.square(pictures[0])))], newlines=1)

    def one(self, features: Tensor, merit: Tensor) -> tuple[Tensor, Tensor]:
        features = torch.cat([features] * self.tiny.shape.num_scales, dim=-1)
        return self.project(features).flatten(0, 1), self.merged_merit(merit).flatten()

    def all_scales(self, picture: PILImage.Image) -> tuple[Tensor, Tensor]:
        scales = [int(s) // self.size for s in self.top["s2_scales"].split(",")]
        cols, rows = self.ratio(picture, scales[-1] ** 2, self.top["max_tiles"])
        grids = [*((s, s) for s in scales[:-1]), (rows, cols)]
        maps, merits = [], []
        for r, c in grids:
            done = [self.patches(tile) for tile in self.crop_all(picture, c, r)]
            strips = [torch.cat([f for f, _ in done[k * c : (k + 1) * c]], dim=1) for k in range(r)]
            maps.append(torch.cat(strips, dim=0))
            strips = [torch.cat([m for _, m in done[k * c : (k + 1) * c]], dim=1) for k in range(r)]
            merits.append(torch.cat(strips, dim=0))
        height, width = rows * self.side, cols * self.side
        fine = torch.cat([F.adaptive_avg_pool2d(m.permute(2, 0, 1), (height, width)) for m in maps])
        merit = torch.stack([F.adaptive_avg_pool2d(m[None], (height, width))[0] for m in merits]).mean(dim=0)
        n = math.ceil(self.side / self.block)
        tokens = torch.zeros(rows * n, cols * n, self.newline.shape[1])
        ranks = torch.zeros(rows * n, cols * n)
        for r in range(rows):
            for c in range(cols):
                y, x = slice(r * self.side, (r + 1) * self.side), slice(c * self.side, (c + 1) * self.side)
                place = slice(r * n, (r + 1) * n), slice(c * n, (c + 1) * n)
                tokens[place] = self.project(fine[:, y, x].permute(1, 2, 0))
                ranks[place] = self.merged_merit(merit[y, x])
        return tokens.flatten(0, 1), ranks.flatten()

    def clip(self, done: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, list[float | None]]:
        encoder = json.loads(self.top["video_encoder"]) if "video_encoder" in self.top else {}
        t, h, w = encoder.get("pool_sizes", [[1, 1, 1]])[0]
        units = [self.one(*each) for each in done]
        n = math.isqrt(len(units[0][1]))
        pooled = []
        for start in range(0, len(units), t):
            run = units[start : start + t]
            x = torch.stack([x for x, _ in run]).mean(dim=0).view(n, n, -1)
            m = torch.stack([m for _, m in run]).mean(dim=0).view(n, n)
            cells = [(slice(i, i + h), slice(j, j + w)) for i in range(0, n, h) for j in range(0, n, w)]
            pooled.append(
                (torch.stack([x[c].mean(dim=(0, 1)) for c in cells]), torch.stack([m[c].mean() for c in cells]))
            )
        return self.joined(pooled, newlines=1)

    def joined(self, units: list[tuple[Tensor, Tensor]], newlines: int) -> tuple[Tensor, list[float | None]]:
        embeds: list[Tensor] = []
        merits: list[float | None] = []
        for x, merit in units:
            embeds += [x, *[self.newline] * newlines]
            merits += [*merit.tolist(), *[None] * newlines]
        return torch.cat(embeds), merits


def newline_id() -> int:
    return json.loads(tokenizer_json(SPECIALS))["model"]["vocab"]["\u010a"]


# Comparing ----------------------------------------------------------------------------------------------------------

TEXT_A, TEXT_B, TEXT_C = TextSpan((1, 40, 41, 42)), TextSpan((13, 50)), TextSpan((13, 60, 61, 62, 63, 64))


def relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


@torch.inference_mode()
def assert_equal_generation(tiny: TinyNvila, model: Any, media: list[Frames], steps: int = 64) -> None:
    """Logits of `steps` greedy steps within 1e-4 of the largest, tokens identical, from one prefill."""
    plain, spans = Plain(tiny), [TEXT_A]
    embed = tiny.llm.get_input_embeddings()
    flat: list[Tensor] = [embed(torch.tensor(TEXT_A.ids))]
    spans: list[Span] = [TEXT_A]
    for i, item in enumerate(media):
        if i:
            spans.append(TEXT_B)
            flat.append(embed(torch.tensor(TEXT_B.ids)))
        tokens = model.encode(model.preprocess(item))
        want, merits = plain.units(item)
        assert_equal_tokens(model, tokens, want, merits)
        spans.append(VisualSpan(tokens))
        flat.append(want)
    spans.append(TEXT_C)
    flat.append(embed(torch.tensor(TEXT_C.ids)))
    whole = torch.cat(flat)[None]
    theirs = tiny.llm.generate(
        inputs_embeds=whole, attention_mask=torch.ones(whole.shape[:2], dtype=torch.long), max_new_tokens=steps,
        do_sample=False, return_dict_in_generate=True, output_logits=True, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    runner = Runner(model, chunk_tokens=50)
    cache = runner.new_cache()
    cache.reserve(visual=whole.shape[1], text=whole.shape[1] + steps)
    logits = runner.logits(runner.prefill(cache, spans, method=Method()).hidden)
    tokens_found = []
    for want_logits in theirs.logits:
        error = relative(logits, want_logits[0])
        assert error < 1e-4, f"step {len(tokens_found)}: relative error {error:.1e}"
        tokens_found.append(int(logits.argmax()))
        logits = runner.decode(cache, tokens_found[-1])
    assert tokens_found == theirs.sequences[0].tolist()
    assert len(tokens_found) == steps


def assert_equal_tokens(model: Any, tokens: VisualTokens, want: Tensor, merits: list[float | None]) -> None:
    """Embeddings, places of newlines and saliency."""
    assert relative(model.embed_visual(tokens), want) < 1e-5
    assert tokens.token_map.structural.tolist() == [merit is None for merit in merits]
    assert tokens.saliency is not None
    assert relative(tokens.saliency, torch.tensor([merit or 0.0 for merit in merits])) < 1e-5


class TestAgainstThePlainForm:
    @pytest.mark.parametrize("name", ALL)
    def test_no_media(self, tiny, models, name):
        assert_equal_generation(tiny[name], models[name], [])

    @pytest.mark.parametrize("name", ["nvila", "radio", "linear"])
    @pytest.mark.parametrize("size", SIZES, ids=str)
    def test_one_image_of_a_dynamic_mode(self, tiny, models, name, size):
        assert_equal_generation(tiny[name], models[name], [frames(*size)], steps=64 if size == (31, 77) else 2)

    @pytest.mark.parametrize("name", ["longvila", "pad", "pooled", "identity"])
    @pytest.mark.parametrize("size", SIZES[:3], ids=str)
    def test_one_image_of_a_plain_mode(self, tiny, models, name, size):
        assert_equal_generation(tiny[name], models[name], [frames(*size)], steps=64 if size == (31, 77) else 2)

    @pytest.mark.parametrize("name", ALL)
    def test_a_video_of_seven_frames(self, tiny, models, name):
        assert_equal_generation(tiny[name], models[name], [frames(7, 24, 64, kind="video")])

    @pytest.mark.parametrize("name", ["nvila", "longvila", "radio"])
    def test_an_image_a_video_and_another_image(self, tiny, models, name):
        media = [frames(31, 77), frames(3, 48, 20, kind="video", seed=1), frames(90, 60, seed=2)]
        assert_equal_generation(tiny[name], models[name], media)

    def test_a_wrong_position_would_show(self, models):
        model, logits = models["longvila"], []
        for skip in (0, 3):
            runner = Runner(model)
            cache = runner.new_cache()
            cache.reserve(text=20)
            runner.prefill(cache, [TEXT_A], method=Method())
            cache.next_position += skip
            logits.append(runner.logits(runner.prefill(cache, [TEXT_C], method=Method()).hidden))
        assert relative(logits[0], logits[1]) > 0.01

    def test_linear_rope_comes_from_the_lengths(self, models):
        assert models["identity"].decoder.config.rope.factor == 3.0
        assert models["identity"].decoder.config.max_context == 2500
        assert models["longvila"].decoder.config.rope.type == "default"
        assert models["longvila"].decoder.config.max_context == 131072


# Tiles, counts, places ----------------------------------------------------------------------------------------------


def real_size(models: dict[str, Any], name: str, image_size: int, projector: str) -> Nvila:
    """A model of the real picture sizes with narrow layers, on meta: only its preprocessing is used."""
    config: NvilaConfig = models[name].config
    vision = replace(config.vision, image_size=image_size, patch_size=14)
    with torch.device("meta"):
        return Nvila(replace(config, vision=vision, projector=projector))


class TestCounts:
    @pytest.mark.parametrize(
        ("size", "projector", "count"),
        [(448, "mlp_downsample_2x2_fix", 256), (448, "mlp_downsample_3x3_fix", 121), (384, "mlp_downsample", 196),
         (448, "mlp_downsample_fix", 256), (384, "linear", 729)],
    )  # fmt: skip
    def test_tokens_of_a_frame(self, models, size, projector, count):
        model = real_size(models, "longvila", size, projector)
        assert model.tokens_per_frame() == count
        inputs = model.preprocess(frames(3, 30, 50, kind="video"))
        assert inputs.pixels.shape == (3, 3, size, size)
        assert inputs.pixels.dtype == torch.uint8
        assert len(inputs.token_map) == 3 * (count + 1)
        assert int(inputs.token_map.structural.sum()) == 3

    def test_a_clip_of_longvila(self, models):
        model = real_size(models, "longvila", 448, "mlp_downsample_fix")
        clip = Frames("video", np.zeros((256, 4, 6, 3), np.uint8), np.arange(256.0), "<test>", 128.0, "clip")
        token_map = model.preprocess(clip).token_map
        assert len(token_map) == 65_792
        assert token_map.num_visual == 65_536

    @pytest.mark.parametrize(
        ("size", "rows", "cols"),
        [((448, 448), 3, 3), ((540, 960), 3, 4), ((960, 540), 5, 2), ((480, 640), 3, 4), ((640, 480), 4, 3),
         ((100, 1000), 1, 10), ((1000, 100), 10, 1), ((10, 300), 1, 12), ((7, 7), 3, 3), ((900, 950), 3, 3)],
        ids=str,
    )  # fmt: skip
    def test_an_image_at_three_scales(self, models, size, rows, cols):
        model = real_size(models, "nvila", 448, "mlp_downsample")
        model.config = replace(model.config, scales=(1, 2, 3))
        inputs = model.preprocess(frames(*size))
        assert Plain.ratio(_Size(448), PILImage.new("RGB", size[::-1]), 9, 12) == (cols, rows)  # type: ignore[arg-type]
        assert inputs.layout == (rows, cols, 1)
        assert len(inputs.pixels) == 1 + 4 + rows * cols
        assert inputs.token_map.num_visual == rows * cols * 256
        assert 2304 <= inputs.token_map.num_visual <= 3072

    @pytest.mark.parametrize(
        ("size", "tiles"),
        [((448, 448), 1), ((100, 100), 1), ((900, 900), 4), ((1000, 1000), 9), ((448, 900), 2), ((900, 448), 2),
         ((480, 640), 12), ((540, 960), 2), ((100, 1200), 12), ((1200, 100), 12)],
        ids=str,
    )  # fmt: skip
    def test_separate_tiles(self, models, size, tiles):
        model = real_size(models, "linear", 448, "mlp_downsample_3x3_fix")
        model.config = replace(model.config, max_tiles=12)
        inputs = model.preprocess(frames(*size))
        found = len(inputs.pixels) - (len(inputs.pixels) > 1)
        cols_rows = Plain.ratio(_Size(448), PILImage.new("RGB", size[::-1]), 1, 12)  # type: ignore[arg-type]
        assert found == cols_rows[0] * cols_rows[1]
        assert found == tiles
        assert inputs.token_map.num_visual == 121 * len(inputs.pixels)
        assert int(inputs.token_map.structural.sum()) == 2 * len(inputs.pixels)


class _Size:
    """What `Plain.ratio` asks of a model."""

    def __init__(self, size: int) -> None:
        self.size = size


class TestTokenMap:
    @pytest.mark.parametrize("name", ALL)
    @pytest.mark.parametrize("kind", ["image", "video"])
    def test_boxes_cover_the_picture_once_per_view(self, models, name, kind):
        """Of a plain or merged picture once, of separate tiles and the whole behind them twice."""
        model = models[name]
        item = frames(40, 60) if kind == "image" else frames(5, 40, 60, kind="video")
        inputs = model.preprocess(item)
        visual = ~inputs.token_map.structural
        y0, x0, y1, x1 = inputs.token_map.box[visual].unbind(1)
        area = float(((y1 - y0) * (x1 - x0)).sum())
        covered = model.config.vision.grid * ALL[name].vision["patch_size"] / ALL[name].vision["image_size"]
        views = len(inputs.token_map.frame.unique()) if kind == "video" else 1
        if name in ("radio", "linear") and kind == "image" and len(inputs.pixels) > 1:
            views = 2
        assert area == pytest.approx(views * covered**2, rel=1e-4)
        assert bool((y1 >= y0).all() and (x1 >= x0).all())

    @pytest.mark.parametrize("name", ["nvila", "longvila", "linear", "pad"])
    def test_a_bright_square_lies_in_its_boxes(self, models, name):
        rgb = np.zeros((1, 300, 500, 3), dtype=np.uint8)
        rgb[0, 60:120, 350:420] = 255
        model = models[name]
        inputs = model.preprocess(Frames("image", rgb, np.zeros(1), "<test>", 0.0, "square"))
        rows, cols, _ = inputs.layout
        tiles = inputs.pixels[-rows * cols :] if rows else inputs.pixels
        patch = ALL[name].vision["patch_size"]
        grid = model.config.vision.grid
        cells = tiles[:, 0, : grid * patch, : grid * patch].float().unflatten(2, (grid, patch))
        bright = cells.unflatten(1, (grid, patch)).amax(dim=(2, 4)) > 200  # (tiles, grid, grid)
        bright = model.mm_projector.pool(bright.flatten(1)[..., None].float())[..., 0] > 0
        boxes = inputs.token_map.box[~inputs.token_map.structural]
        if rows:  # tokens run over the whole picture, tiles over its parts
            side = math.isqrt(bright.shape[1])
            bright = bright.view(rows, cols, side, side).transpose(1, 2)
        y0, x0, y1, x1 = boxes.unbind(1)
        meets = (y0 < 120 / 300) & (y1 > 60 / 300) & (x0 < 420 / 500) & (x1 > 350 / 500)
        bright = bright.flatten()
        assert bright.any()
        assert not (bright & ~meets).any()

    def test_a_very_long_picture_is_padded_in_bounded_memory(self, models, monkeypatch):
        """As the square of the whole, to a level or two: it is scaled twice."""
        rgb = np.kron(frames(40, 3).rgb, np.ones((1, 5, 4, 1), dtype=np.uint8))  # 200 x 12
        long = Frames("image", rgb, np.zeros(1), "<test>", 0.0, "long")
        want = models["pad"].preprocess(long)
        monkeypatch.setattr(nvila, "_PADDED_SIDE", 100)
        found = models["pad"].preprocess(long)
        assert found.pixels.shape == want.pixels.shape
        assert torch.equal(found.token_map.box, want.token_map.box)
        assert float((found.pixels.float() - want.pixels.float()).abs().mean()) < 2

    def test_frames_and_lines(self, models):
        """Seven frames in blocks of three: the middle frame of each, the last block is one frame."""
        token_map = models["pooled"].preprocess(frames(7, 30, 30, kind="video")).token_map
        assert token_map.frame.unique().tolist() == [1, 4, 6]
        assert token_map.line.unique().tolist() == [0, 1, 2]
        tiles = models["linear"].preprocess(frames(30, 62)).token_map
        assert tiles.line[tiles.structural].tolist() == [0, 0, 1, 1, 2, 2]


def test_frames_are_encoded_in_chunks(models):
    """The same, to rounding, as each frame by itself; and the caller hears of every chunk."""
    model, clip = models["longvila"], frames(11, 24, 30, kind="video")
    seen: list[Progress] = []
    with torch.inference_mode():
        whole = model.encode(model.preprocess(clip), seen.append)
        single = [model.encode(model.preprocess(replace(clip, rgb=clip.rgb[i : i + 1], timestamps=clip.timestamps[:1])))
                  for i in range(11)]  # fmt: skip
    assert relative(whole.features, torch.cat([tokens.features for tokens in single])) < 1e-5
    assert relative(whole.saliency, torch.cat([tokens.saliency for tokens in single])) < 1e-5
    assert [step.done for step in seen] == [0, 4, 8, 11]


@pytest.mark.parametrize("run", [1, 2, 3, 4, 5, 7, 8, 20])
def test_chunks_of_any_length_become_whole_runs(run):
    rows = torch.arange(11 * 2, dtype=torch.float32).view(11, 2)
    chunks = [(part, part[:, 0]) for part in rows.split([4, 4, 3])]
    found = list(_in_whole_runs(chunks, run))
    assert torch.equal(torch.cat([x for x, _ in found]), rows)
    assert torch.equal(torch.cat([scores for _, scores in found]), rows[:, 0])
    assert all(len(x) % run == 0 and len(x) > 0 for x, _ in found[:-1])


def test_grids_of_tiles_equal_the_plain_search():
    rng = np.random.default_rng(0)
    for low, high in ((1, 12), (9, 12), (1, 6)):
        for height, width in rng.integers(1, 2000, (40, 2)).tolist():
            tiles = _Tiles.closest(height, width, low=low, high=high, size=448)
            picture = PILImage.new("1", (width, height))
            assert Plain.ratio(_Size(448), picture, low, high) == (tiles.cols, tiles.rows)  # type: ignore[arg-type]


def test_structural_tokens_take_the_newline_of_the_text(models):
    model = models["nvila"]
    with torch.inference_mode():
        tokens = model.encode(model.preprocess(frames(2, 20, 20, kind="video")))
        assert not tokens.features[tokens.token_map.structural].any()
        embedded = model.embed_visual(tokens)[tokens.token_map.structural]
    assert torch.equal(embedded, model.decoder.embed_tokens.weight[newline_id()].expand(2, -1))


# Text ---------------------------------------------------------------------------------------------------------------


def test_the_prompt_is_the_template_of_vila():
    """Two turns; the media in front of the first question have no text around them."""
    prompt = ChatMLPrompt("You are a helpful assistant")
    turns = [("What is it?", "A cat."), ("And now?", "A dog.")]
    text = ""
    for i, (question, answer) in enumerate(turns):
        pieces = [*prompt.opening(first=i == 0, system=None), *prompt.question(question, after_media=i == 0), answer]
        text += "".join(p.name if isinstance(p, Special) else p for p in [*pieces, *prompt.closing()])
    want = "<|im_start|>system\nYou are a helpful assistant<|im_end|>\n"
    for question, answer in turns:
        want += f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"
    assert text == want
    assert prompt.between_media() == []
    assert prompt.opening(first=True, system="Be brief.")[1] == "system\nBe brief."


QWEN2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\n"
    "You are a helpful assistant.<|im_end|>\\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\\n' + "
    "message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}"
)
QWEN25 = (
    "{%- if messages[0]['role'] == 'system' %}\n    {{- '<|im_start|>system\\n' + messages[0]['content'] + "
    "'<|im_end|>\\n' }}\n{%- else %}\n    {{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are "
    "a helpful assistant.<|im_end|>\\n' }}\n{%- endif %}"
)


@pytest.mark.parametrize(
    ("template", "named", "system"),
    [(None, None, "You are a helpful assistant"), (QWEN2, None, "You are a helpful assistant."),
     (QWEN25, None, "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
     (QWEN25, "qwen2", "You are a helpful assistant"), ("{{ messages }}", None, "You are a helpful assistant")],
    ids=["none", "qwen2", "qwen2.5", "named", "other"],
)  # fmt: skip
def test_the_system_text_is_that_of_the_template(tiny, tmp_path, template, named, system):
    folder = copied(tiny["longvila"], tmp_path / "model")
    edit(folder / "config.json", chat_template=named)
    edit(folder / "llm" / "tokenizer_config.json", chat_template=template)
    assert build_model(Checkpoint.open(folder)).prompt.system == system


@pytest.mark.parametrize("name", ["nvila", "longvila"])
def test_both_tokenizer_forms_give_the_ids_of_tokenizers(tiny, name):
    """`tokenizer.json`, and `vocab.json` with `merges.txt`; media tokens by name, never from text."""
    from tokenizers import Tokenizer

    ours, theirs = load_tokenizer(Checkpoint.open(tiny[name].folder)), Tokenizer.from_str(tokenizer_json(SPECIALS))
    for text in ("What's in it?\n\n  A r\u00e9d  car 1234", "\n", "Caf\u0065\u0301 \U0001f600\r\n x", "  lead"):
        assert ours.encode(text, first=False) == theirs.encode(text, add_special_tokens=False).ids
    assert ours.eos_ids == tuple(sorted(SPECIAL_IDS[n] for n in ("<|im_end|>", "<|endoftext|>")))
    assert ours.special_id("<vila/video>") == SPECIAL_IDS["<vila/video>"]
    assert SPECIAL_IDS["<image>"] not in ours.encode("a <image> <vila/video>", first=False)
    assert ours.bos_id is None


def test_the_engine_answers_about_pictures_and_clips(tiny):
    with Engine.load(tiny["longvila"].folder, device="cpu", dtype="float32") as engine:
        session = engine.session(media=[Image(frames(30, 40).rgb[0]), Image(frames(50, 20, seed=1).rgb[0])])
        first = session.ask("What is it?", params=SamplingParams(max_new_tokens=5))
        assert first.stats.visual_tokens_total == 18
        assert first.stats.structural_tokens == 2
        assert session.ask("<image> and then?", params=SamplingParams(max_new_tokens=5)).stats.encode_s == 0


# Folders ------------------------------------------------------------------------------------------------------------


def copied(tiny: TinyNvila, target: Path) -> Path:
    shutil.copytree(tiny.folder, target)
    return target


def edit(path: Path, **changes: Any) -> None:
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))


class TestFolders:
    @pytest.fixture
    def folder(self, tiny, tmp_path) -> Path:
        return copied(tiny["longvila"], tmp_path / "model")

    def test_the_inner_folder_is_the_root(self, tiny, models, tmp_path):
        copied(tiny["longvila"], tmp_path / "run" / "model")
        (tmp_path / "run" / "trainer_state.json").write_text("not JSON")
        found, want = load(tmp_path / "run").state_dict(), models["longvila"].state_dict()
        assert all(torch.equal(found[name], want[name]) for name in want)

    def test_the_parts_of_a_checkpoint(self, folder):
        checkpoint = Checkpoint.open(folder)
        assert set(checkpoint.folders) == {"llm", "vision_tower", "mm_projector"}
        assert checkpoint.language.config["model_type"] == "qwen2"
        assert checkpoint.weight_bytes == sum(part.weight_bytes for part in checkpoint.folders.values())
        some = ["llm.model.norm.weight", "mm_projector.layers.2.bias"]
        assert set(checkpoint.read_tensors(some)) == set(some)
        assert checkpoint.part(some).language.folder == folder / "llm"

    @pytest.mark.parametrize("name", ["llm", "vision_tower", "mm_projector"])
    def test_a_missing_folder(self, folder, name):
        shutil.rmtree(folder / name)
        with pytest.raises(CorruptCheckpoint, match=rf"missing {name}/") as error:
            load(folder)
        assert "llm, vision_tower, mm_projector" in error.value.hint

    def test_all_folders_missing(self, folder):
        for name in ("llm", "vision_tower", "mm_projector"):
            shutil.rmtree(folder / name)
        with pytest.raises(CorruptCheckpoint, match="missing llm/; vision_tower/; mm_projector/"):
            load(folder)

    def test_no_config_at_the_top(self, folder):
        (folder / "config.json").unlink()
        with pytest.raises(CorruptCheckpoint, match=r"missing config\.json"):
            load(folder)

    @pytest.mark.parametrize("name", ["llm", "vision_tower", "mm_projector"])
    def test_pickles_alone(self, folder, name):
        (folder / name / "model.safetensors").rename(folder / name / "pytorch_model.bin")
        with pytest.raises(CorruptCheckpoint, match=rf"^{name}/.*pytorch_model\.bin is there, but pickled"):
            load(folder)

    @pytest.mark.parametrize("lost", ["config.json", "vocab.json"])
    def test_a_file_that_is_missing_in_a_folder(self, folder, lost):
        (folder / "llm" / lost).unlink()
        with pytest.raises(CorruptCheckpoint, match=r"^llm/: .*(config\.json|tokenizer)"):
            load(folder)

    def test_no_folder_at_all(self, tmp_path):
        (tmp_path / "empty").mkdir()
        with pytest.raises(ModelNotFound):
            load(tmp_path / "empty")

    @pytest.mark.parametrize(
        ("part", "tensor"),
        [("llm", "model.layers.0.mlp.up_proj.weight"), ("mm_projector", "layers.2.weight"),
         ("vision_tower", "embeddings.position_embedding.weight")],
    )  # fmt: skip
    @pytest.mark.parametrize("fault", ["shape", "lost", "unknown"])
    def test_a_tensor_that_does_not_fit_is_named_with_its_folder(self, folder, part, tensor, fault):
        path = folder / part / "model.safetensors"
        tensors = load_file(path)
        if fault == "shape":
            tensors[tensor] = tensors[tensor][:-1].clone()
        elif fault == "lost":
            del tensors[tensor]
        else:
            tensors[f"{tensor}.more"] = torch.zeros(1)
        save_file(tensors, path)
        wanted = {"shape": rf"tensor {part}\.{tensor}: expected shape", "lost": "1 tensors are missing",
                  "unknown": rf"tensor {part}\.{tensor}\.more: this model has no such tensor"}  # fmt: skip
        with pytest.raises(CorruptCheckpoint, match=wanted[fault]):
            load(folder)

    def test_a_link_that_leads_out(self, folder, tmp_path):
        (folder / "llm" / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
        (folder / "llm" / "model.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
        with pytest.raises(CorruptCheckpoint, match=r"^llm/: model\.safetensors: is a link that leads out"):
            load(folder)

    def test_a_folder_that_is_a_link_out(self, folder, tmp_path):
        (folder / "llm").rename(tmp_path / "elsewhere")
        (folder / "llm").symlink_to(tmp_path / "elsewhere")
        with pytest.raises(CorruptCheckpoint, match=r"^llm/: config\.json: is a link that leads out"):
            load(folder)

    def test_links_of_a_hub_cache(self, tiny, tmp_path):
        """A snapshot's files are links to blobs two levels up; those of a sub-folder lead three levels up."""
        snapshot = tmp_path / "models--a--b" / "snapshots" / ("0" * 40)
        copied(tiny["radio"], snapshot)
        blobs = tmp_path / "models--a--b" / "blobs"
        blobs.mkdir()
        for i, path in enumerate(p for p in sorted(snapshot.rglob("*")) if p.is_file()):
            path.rename(blobs / str(i))
            path.symlink_to(blobs / str(i))
        assert load(snapshot).config.aspect == "dynamic"

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"model_type": "vila"}, "repackaged VILA"),
            ({"model_type": "nvila"}, "repackaged VILA"),
            ({"s2": True, "dynamic_s2": False}, "s2 true without dynamic_s2"),
            ({"chat_template": "llama_3"}, "chat_template"),
            ({"mm_vision_select_feature": "patch"}, "mm_vision_select_feature"),
            ({"video_max_tiles": 4}, "video_max_tiles"),
            ({"video_encoder": {"_target_": "a.b.OtherEncoder"}}, "OtherEncoder"),
            ({"video_encoder": {"_target_": "a.BasicVideoEncoder", "end_tokens": "x"}}, "end_tokens"),
            ({"video_encoder": {"_target_": "a.TSPVideoEncoder", "pool_sizes": [[8, 2, 2]]}}, "divisors of 3"),
            ({"video_encoder": {"_target_": "a.TSPVideoEncoder", "pool_sizes": [[8, 1, 1], [1, 1, 1]]}}, "pool_sizes"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_what_is_not_computed_is_refused_by_name(self, folder, changes, message):
        edit(folder / "config.json", **changes)
        with pytest.raises(UnsupportedModel, match=message):
            load(folder)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"hidden_size": 47}, "hidden_size"),
            ({"mm_hidden_size": 108}, "mm_hidden_size"),
            ({"image_aspect_ratio": "dynamic_s2"}, "image_aspect_ratio"),
            ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio"),
            ({"dynamic_s2": True, "s2_scales": "38,50"}, "s2_scales"),
            ({"dynamic_s2": True, "s2_scales": "1e9"}, "s2_scales"),
            ({"vision_resolution": 448}, "vision_resolution"),
            ({"min_tiles": 13}, "min_tiles"),
            ({"max_tiles": 1000}, "max_tiles"),
            ({"video_encoder": "{"}, "video_encoder"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_what_contradicts_itself_is_refused(self, folder, changes, message):
        edit(folder / "config.json", **changes)
        with pytest.raises(CorruptCheckpoint, match=message):
            load(folder)

    @pytest.mark.parametrize(
        ("file", "changes", "message"),
        [
            ("mm_projector/config.json", {"mm_projector_type": "mlp_downsample_9x9"}, "mlp_downsample_2x2_fix"),
            ("mm_projector/config.json", {"mm_projector_type": "identity"}, "expected features of 64, got 36"),
            ("llm/config.json", {"model_type": "llama"}, "model_type"),
            ("vision_tower/preprocessor_config.json", {"resample": 2}, "resample"),
            ("llm/tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer"}, "Qwen2Tokenizer"),
        ],
    )
    def test_parts_that_are_not_computed(self, folder, file, changes, message):
        edit(folder / file, **changes)
        with pytest.raises(UnsupportedModel) as error:
            Engine.load(folder, device="cpu")
        assert message in f"{error.value} {error.value.hint}"

    def test_rope_that_is_scaled_twice(self, folder):
        edit(folder / "llm" / "config.json", max_position_embeddings=4096, rope_parameters=...,
             rope_theta=1e6, rope_scaling={"rope_type": "yarn", "factor": 2.0})  # fmt: skip
        with pytest.raises(UnsupportedModel, match="model_max_length 131072 above max_position_embeddings 4096"):
            build_model(Checkpoint.open(folder))

    def test_the_image_size_of_the_processor(self, folder):
        edit(folder / "vision_tower" / "preprocessor_config.json", size={"height": 384, "width": 384})
        with pytest.raises(CorruptCheckpoint, match=r"size\.height: expected 38"):
            load(folder)

    def test_a_tokenizer_without_bytes(self, folder):
        vocab = json.loads((folder / "llm" / "vocab.json").read_text())
        (folder / "llm" / "vocab.json").write_text(json.dumps({k: v for k, v in vocab.items() if k != "\u010a"}))
        with pytest.raises(UnsupportedModel, match=r"llm/vocab\.json: expected a byte-level vocabulary"):
            load(folder)
        (folder / "llm" / "tokenizer.model").write_bytes(b"")
        with pytest.raises(UnsupportedModel, match=r"llm/tokenizer\.model: expected a byte-level vocabulary"):
            load(folder)


@pytest.mark.parametrize(
    ("name", "frames_used", "video"), [("nvila", 8, (0.60, 0.75)), ("longvila", 5, (0.75, 0.90))], ids=str
)
def test_a_clip_takes_the_models_number_of_frames(tiny, tmp_path, name, frames_used, video):
    """8 of NVILA, evenly; of LongVILA two a second, up to 256, and its videos are pruned harder."""
    clip = write_clip(tmp_path / "clip.mp4", frames=20)
    with Engine.load(tiny[name].folder, device="cpu", dtype="float32") as engine:
        session = engine.session()
        assert session.attach(clip).frames == frames_used
        assert session.attach(replace(clip, frames=9)).frames == 9
        assert session.attach(replace(clip, end=0.1)).frames == 1
        session.drop(2)
        session.drop(3)
        assert (session.sparsity.prefill, session.sparsity.decode) == video
        assert engine.default_sparsity("video") == session.sparsity
        assert engine.default_sparsity("image").prefill == 0.60
        session.sparsity = Sparsity(0.0, 0.0)
        assert session.sparsity.prefill == 0.0
        session.sparsity = None
        assert session.sparsity.prefill == video[0]


# Quantised folders --------------------------------------------------------------------------------------------------

# so400m's heads of 72 channels and an MLP like 4304 that neither 8 nor 32 divides; groups of 32 fit the decoder.
WIDE = Shape(
    vision=dict(hidden_size=144, intermediate_size=269, num_hidden_layers=3, num_attention_heads=2, image_size=28,
                patch_size=7),
    text={**SHAPES["longvila"].text}, top={"image_aspect_ratio": "resize"},
)  # fmt: skip


def int4(matrix: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    weight = quantise_int4(matrix, 32, symmetric=True, scale_dtype=torch.float32)
    return write_pack_quantized(weight, symmetric=True), weight.dequantise()


def int8(matrix: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    weight = quantise_int8(matrix)
    return write_int_quantized(weight), weight.dequantise()


def quantise_folder(source: Path, packed: Path, dense: Path, bits: int) -> None:
    """Writes a sub-model's linear layers as codes to `packed`, and what they stand for to `dense`."""
    codes, values = {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        layer, _, suffix = name.rpartition(".")
        codes[name] = values[name] = tensor
        if suffix == "weight" and layer.endswith(("_proj", "fc1", "fc2")):
            stored, values[name] = (int4 if bits == 4 else int8)(tensor)
            del codes[name]
            codes.update({f"{layer}.{part}": t for part, t in stored.items()})
    save_file(codes, packed / "model.safetensors")
    save_file(values, dense / "model.safetensors")
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "channel"}
    group: dict[str, Any] = {"targets": ["Linear"], "weights": weights}
    if bits == 4:
        weights.update(strategy="group", group_size=32)
    else:
        group["input_activations"] = {**weights, "strategy": "token", "dynamic": True}
    form = "pack-quantized" if bits == 4 else "int-quantized"
    quantisation = {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group},
                    "ignore": ["lm_head"]}  # fmt: skip
    edit(packed / "config.json", quantization_config=quantisation)


def test_parts_that_were_quantised_by_themselves(tmp_path):
    """A W4A16 language model and a W8A8 tower, each with the config that its own tool wrote."""
    tiny = write(tmp_path / "source", WIDE)
    packed, dense = copied(tiny, tmp_path / "packed"), copied(tiny, tmp_path / "dense")
    for name, bits in (("llm", 4), ("vision_tower", 8)):
        quantise_folder(tiny.folder / name, packed / name, dense / name, bits)
    model, plain = load(packed), load(dense)
    kinds = {type(layer).__name__ for layer in model.decoder.layers.modules() if isinstance(layer, LinearLayer)}
    assert kinds == {"W4A16Linear"}
    assert {type(layer.mlp.fc2).__name__ for layer in model.tower.blocks} == {"W8A8Linear"}
    assert model.tower.layer(0).self_attn.out_proj.in_features // 2 == 72
    item = frames(3, 24, 64, kind="video")
    with torch.inference_mode():
        seen, want = (m.encode(m.preprocess(item)) for m in (model, plain))
        visual = ~want.token_map.structural
        cosine = float(F.cosine_similarity(seen.features.flatten(), want.features.flatten(), dim=0))
        assert 0.99 < cosine < 1 - 1e-6  # inputs are rounded to 8 bits
        assert float(torch.corrcoef(torch.stack([seen.saliency[visual], want.saliency[visual]]))[0, 1]) > 0.99
        logits = []
        for m in (model, plain):
            runner = Runner(m)
            cache = runner.new_cache()
            cache.reserve(visual=100, text=100)
            spans: list[Span] = [TEXT_A, VisualSpan(want), TEXT_C]
            logits.append(runner.logits(runner.prefill(cache, spans, method=Method()).hidden))
    assert relative(*logits) < 1e-4
    with Engine.load(packed, device="cpu", dtype="float32") as engine:
        assert engine.info.scheme == "W8A8 / W4A16 / float32"
        session = engine.session(media=[Image(frames(30, 40).rgb[0])])
        assert session.ask("What is it?", params=SamplingParams(max_new_tokens=5)).stats.output_tokens == 5
    edit(packed / "llm" / "config.json", quantization_config=...)
    with pytest.raises(CorruptCheckpoint, match="no quantization_config"):
        load(packed)


# Long videos --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def long_video() -> Any:
    """benchmarks/long_video.py, whose model and estimate are held to here at a size that a test can pay."""
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "long_video.py"
    spec = importlib.util.spec_from_file_location("long_video", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("policy", ["dense", "sparse"])
def test_256_frames_in_bounded_steps(long_video, tmp_path, policy, monkeypatch):
    """The tower never sees more than four frames, the decoder never more rows than a chunk; a second turn no frame."""
    long_video.write_model(tmp_path / "model", image_size=28, patch_size=7)
    clip = write_clip(tmp_path / "clip.mp4", frames=256)
    with Engine.load(tmp_path / "model", device="cpu", dtype="float32") as engine:
        seen: dict[str, list[int]] = {"frames": [], "rows": []}
        engine.model.vision_tower.register_forward_pre_hook(lambda _, args: seen["frames"].append(len(args[0])))
        layer = engine.model.decoder.layer(0)
        project = layer.project
        monkeypatch.setattr(layer, "project", lambda x, *rest: seen["rows"].append(len(x)) or project(x, *rest))
        session = engine.session(media=[replace(clip, frames=256)], sparsity=long_video.POLICIES[policy])
        first = session.ask("What happens?", params=SamplingParams(max_new_tokens=3)).stats
        assert first.visual_tokens_total == 1024
        assert first.structural_tokens == 256
        assert first.visual_tokens_kept == (1024 if policy == "dense" else 256)
        assert sum(seen["frames"]) == 256
        assert max(seen["frames"]) == 4
        assert max(seen["rows"]) <= engine.runner.chunk_tokens < 1024 + 256
        assert session.ask("And then?", params=SamplingParams(max_new_tokens=3)).stats.encode_s == 0
        assert sum(seen["frames"]) == 256


def test_the_estimate_of_longvila_7b(long_video):
    """By the engine's own bookkeeping; the parts are what the sizes of the model say."""
    dense, sparse = long_video.POLICIES["dense"], long_video.POLICIES["sparse"]
    found = long_video.estimate(256, "24GB", quantised=True, sparsity=sparse)
    assert (found["visual_tokens"], found["structural_tokens"], found["kept"]) == (65_536, 256, 16_384)
    assert found["fits"] == {"24GB": True}
    entry = 28 * 2 * 4 * 128 * 2  # bytes of a position: layers, keys and values, heads, head_dim, bfloat16
    least = (16_384 + 1_638 + 256) * entry
    assert least <= found["cache_bytes"] <= 1.15 * least
    assert found["feature_bytes"] == 65_792 * 3584 * 2
    assert 5.5e9 < found["weight_bytes"] < 7e9
    assert long_video.estimate(256, "8GB", quantised=True, sparsity=dense)["fits"] == {"8GB": False}
    whole = long_video.estimate(256, "24GB", quantised=False, sparsity=dense)
    assert 2 * 7.5e9 < whole["weight_bytes"] < 2 * 8.5e9
    assert whole["total_bytes"] < 24e9
    assert found["total_bytes"] < 0.5 * whole["total_bytes"]
