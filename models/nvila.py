"""NVILA and LongVILA: a SigLIP (or RADIO) tower, a projector that joins patches, a Qwen2 decoder.

A checkpoint is a folder of sub-models: `llm/`, `vision_tower/`, `mm_projector/`.
From top to bottom: config, tensor names, preprocessing, the model.
The time tokens of NVILA-8B-Video are words of its tokenizer, which it writes as text: `<t12>`, of 100 parts of a clip.
Sources: Liu et al., arXiv 2412.04468 (NVILA); Chen et al., arXiv 2408.10188 (LongVILA); NVlabs/VILA for the layout, the
tiles and the order of tokens.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ..errors import CorruptCheckpoint, UnsupportedModel
from .chatml import ChatMLPrompt
from .checkpoint import MAX_TOKENIZER_BYTES, Checkpoint, ConfigReader, parse_json, shown
from .clip import ClipConfig
from .decoder import Decoder, DecoderConfig
from .downsample import Projector, merge_tiles, pool_blocks, resize_area, split_tiles
from .interface import (
    Frames,
    Progress,
    ProgressFn,
    PromptFormat,
    TokenMap,
    VisualInputs,
    VisualTokens,
    no_progress,
)
from .positions import ContiguousPositions
from .radio import RadioConfig, RadioTower, rename_radio
from .siglip import PixelScale, SiglipTower, rename_siglip, siglip_config

_TILES_PER_CHUNK = 4  # bounds the encoder: 4 x 1024 patches x 4304 x 4 bytes = 71 MB in the MLP, 67 MB of scores
_MODES = ("resize", "pad", "dynamic", "dynamic_s2")
_MAX_TILES = 64
_PADDED_SIDE = 8192  # pixels: a square of 201 MB
_NEWLINE_PIECE = "\u010a"  # how a byte-level vocabulary writes the byte of "\n"
_BICUBIC = 3  # Pillow's number in preprocessor configs
_HALF = (0.5, 0.5, 0.5)
_SYSTEM = "You are a helpful assistant"  # of Qwen2's first template and of VILA's own, which have no full stop
_SYSTEM_IN_TEMPLATE = re.compile(r"<\|im_start\|>system(?:\\n|\n)([^'\"{}<]{1,1000})<\|im_end\|>")


@dataclass(frozen=True)
class NvilaConfig:
    """What the config files of the whole and of the folders say."""

    vision: ClipConfig | RadioConfig
    feature_layer: int  # index into SigLIP's hidden states, negative from the end
    scale: PixelScale
    text: DecoderConfig
    projector: str
    aspect: str  # how an image becomes tiles: one of _MODES
    scales: tuple[int, ...]  # dynamic_s2: sides of the scales in tiles, e.g. (1, 2, 3); otherwise (1,)
    output_scale: int  # dynamic_s2: the scale whose grid the features have
    min_tiles: int
    max_tiles: int
    num_frames: int  # of a video whose caller names no number
    fps: float | None  # no more of them a second
    pool: tuple[int, int, int]  # blocks of frames, rows and columns of a video's tokens that become one
    newline_id: int
    system: str  # the system text where the user gives none

    @staticmethod
    def from_hf(checkpoint: Checkpoint) -> NvilaConfig:
        """Reads the files, each key once. Raises CorruptCheckpoint or UnsupportedModel with file, key and value."""
        if not checkpoint.folders:
            raise CorruptCheckpoint("config.json: a LlavaLlamaModel has the folders of its sub-models, found none")
        top = ConfigReader(checkpoint.config, file="config.json")
        top.get_str("model_type", default="llava_llama", choices=("llava_llama",))
        template = top.get_str("chat_template", default=None, none_ok=True)
        if template not in (None, "qwen2"):
            raise UnsupportedModel(f"config.json: chat_template: expected null or 'qwen2', got {template!r:.60}")
        vision, scale = _tower_config(checkpoint)
        aspect = top.get_str("image_aspect_ratio", default="resize", choices=_MODES)
        scales, output_scale = _scales(top, aspect, vision.image_size)
        text = _language_config(top, checkpoint)
        _check_sizes(top, vision, len(scales), text)
        _pooling(top, "image_encoder")
        projector = ConfigReader(checkpoint.folders["mm_projector"].config, file="mm_projector/config.json")
        max_tiles = top.get_int("max_tiles", default=12, low=1, high=_MAX_TILES)
        return NvilaConfig(
            vision=vision,
            feature_layer=_feature_layer(top, vision),
            scale=scale,
            text=text,
            projector=projector.get_str("mm_projector_type"),
            aspect=aspect,
            scales=scales,
            output_scale=output_scale,
            min_tiles=top.get_int("min_tiles", default=1, low=1, high=max_tiles),
            max_tiles=max_tiles,
            num_frames=top.get_int("num_video_frames", default=8, low=1, high=1 << 16),
            fps=top.get_float("fps", default=0.0, low=0.0, none_ok=True) or None,  # 0: evenly over the clip
            pool=_pooling(top, "video_encoder"),
            newline_id=_newline_id(checkpoint.language, text.vocab_size),
            system=_SYSTEM if template == "qwen2" else _system_text(checkpoint.language),
        )


def _tower_config(checkpoint: Checkpoint) -> tuple[ClipConfig | RadioConfig, PixelScale]:
    """The tower's sizes and how its pixels are scaled."""
    folder = checkpoint.folders["vision_tower"]
    reader = ConfigReader(folder.config, file="vision_tower/config.json")
    pre = ConfigReader(folder.read_json("preprocessor_config.json") or {}, file="vision_tower/preprocessor_config.json")
    factor = pre.get_float("rescale_factor", default=1 / 255, low=0.0)
    if reader.get_str("model_type", default="siglip_vision_model") == "radio":
        # The checkpoint itself holds mean and standard deviation, for pixels of 0..1.
        return RadioConfig.from_hf(reader, folder.tensors), PixelScale((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), factor)
    vision = siglip_config(reader)
    if pre.get_int("resample", default=_BICUBIC, low=0) != _BICUBIC:
        raise UnsupportedModel(f"{pre.file}: resample: expected {_BICUBIC} (bicubic), got {pre.values['resample']!r}")
    size = pre.sub("size", required=False)
    for key in ("height", "width"):
        if size.get_int(key, default=vision.image_size) != vision.image_size:
            size.fail(key, f"{vision.image_size} as in {reader.file}")
    return vision, PixelScale(pre.get_triple("image_mean", _HALF), pre.get_triple("image_std", _HALF), factor)


def _scales(top: ConfigReader, aspect: str, image_size: int) -> tuple[tuple[int, ...], int]:
    """The scales in tiles and the one whose grid the features have."""
    if not top.get_bool("dynamic_s2", default=False, none_ok=True):
        if top.get_bool("s2", default=False, none_ok=True):
            raise UnsupportedModel("config.json: s2 true without dynamic_s2 (VILA 1.5) is not computed here")
        if aspect == "dynamic_s2":
            top.fail("image_aspect_ratio", "another mode where dynamic_s2 is not true")
        return (1,), 0
    text = top.get_str("s2_scales")
    sides = sorted(int(part) for part in text.split(",")) if _is_number_list(text) else []
    if not sides or sides[0] != image_size or any(side % image_size for side in sides) or sides[-1] > 8 * image_size:
        top.fail("s2_scales", f"multiples of the tower's {image_size}, itself the first, with commas between")
    if top.get_int("s2_max_split_size", default=image_size, none_ok=True) not in (None, image_size):
        top.fail("s2_max_split_size", f"{image_size}, the side of a tile")
    last = len(sides) - 1
    output = top.get_int("s2_resize_output_to_scale_idx", default=0, low=-1, high=last)
    return tuple(side // image_size for side in sides), output % len(sides)


def _is_number_list(text: str) -> bool:
    return len(text) < 100 and all(part.strip().isdecimal() for part in text.split(","))


def _language_config(top: ConfigReader, checkpoint: Checkpoint) -> DecoderConfig:
    """The decoder's, with linear RoPE where the model was made longer than its language model."""
    reader = ConfigReader(checkpoint.language.config, file="llm/config.json")
    kind = reader.get_str("model_type")
    if kind != "qwen2":
        raise UnsupportedModel(f"llm/config.json: model_type: expected 'qwen2', got {kind!r:.60}")
    text = DecoderConfig.from_hf(reader)
    given = top.get_int("model_max_length", default=None, none_ok=True)
    length = reader.get_int("model_max_length", default=given, none_ok=True)
    if length is None:
        return text
    positions = reader.get_int("max_position_embeddings", default=32768)
    if length <= positions:
        return replace(text, max_context=min(length, text.max_context))
    if text.rope.type not in ("default", "linear"):
        raise UnsupportedModel(
            f"llm/config.json: model_max_length {length} above max_position_embeddings {positions} asks for linear "
            f"RoPE, rope_scaling for {text.rope.type}"
        )
    rope = replace(
        text.rope, type="linear", factor=float(math.ceil(length / positions)), original_max_positions=positions
    )
    return replace(text, rope=rope, max_context=length)


def _check_sizes(top: ConfigReader, vision: ClipConfig | RadioConfig, num_scales: int, text: DecoderConfig) -> None:
    """Widths that stand in several files agree, and nothing else is asked for than what is computed."""
    wide = vision.hidden_size * num_scales
    if top.get_int("mm_hidden_size", default=wide) != wide:
        top.fail("mm_hidden_size", f"{wide}: {num_scales} x the tower's {vision.hidden_size}")
    if top.get_int("hidden_size", default=text.hidden_size, none_ok=True) not in (None, text.hidden_size):
        top.fail("hidden_size", f"{text.hidden_size} as in llm/config.json")
    if top.get_int("video_max_tiles", default=1, none_ok=True) not in (None, 1):
        raise UnsupportedModel("config.json: video_max_tiles: expected 1; a video frame is one tile here")
    # The table of positions is stored at the size that the tower ends up with; -1 says so too.
    resolution = top.get_int("vision_resolution", default=-1, low=-1, none_ok=True)
    if resolution not in (None, -1, vision.image_size):
        top.fail("vision_resolution", f"-1 or {vision.image_size} as in vision_tower/config.json")


def _feature_layer(top: ConfigReader, vision: ClipConfig | RadioConfig) -> int:
    layer = top.get_int("mm_vision_select_layer", default=-2, low=-256, high=256)
    feature = top.get_str("mm_vision_select_feature", default="cls_patch", choices=("cls_patch", "patch"))
    if feature == "patch" and isinstance(vision, ClipConfig):
        # It means "without the first token", which SigLIP does not have: a corner of the picture would be lost.
        raise UnsupportedModel("config.json: mm_vision_select_feature: expected 'cls_patch' of SigLIP, got 'patch'")
    return layer


def _pooling(top: ConfigReader, key: str) -> tuple[int, int, int]:
    """The blocks that an encoder averages: (1, 1, 1) of the basic one. Each picture ends with the newline."""
    value: Any = top.values.get(key)
    if isinstance(value, str):
        value = parse_json(value.encode(), f"config.json: {key}")
    encoder = ConfigReader(value or {}, file="config.json", prefix=f"{key}.")
    kind = encoder.get_str("_target_", default="BasicEncoder").rpartition(".")[2]
    basic = kind.startswith("Basic")
    if not basic and kind != "TSPVideoEncoder":
        raise UnsupportedModel(f"config.json: {key}: expected a Basic or TSP encoder, got {kind!r:.60}")
    for name, wanted in (("start_tokens", None), ("end_tokens", "\n"), ("sep_tokens", None)):
        if (found := encoder.get_str(name, default=wanted, none_ok=True)) != wanted:
            raise UnsupportedModel(f"config.json: {key}.{name}: expected {wanted!r}, got {found!r:.60}")
    sizes = [[1, 1, 1]] if basic else encoder.get_list("pool_sizes", max_len=16)
    good = len(sizes) == 1 and isinstance(sizes[0], list) and len(sizes[0]) == 3
    if not good or not all(type(size) is int and 1 <= size <= 1024 for size in sizes[0]):
        raise UnsupportedModel(f"config.json: {key}.pool_sizes: expected one [frames, rows, cols], got {sizes!r:.60}")
    return sizes[0][0], sizes[0][1], sizes[0][2]


def _newline_id(language: Checkpoint, vocab_size: int) -> int:
    """The id of "\\n", whose embedding ends every picture; one byte is one piece of a byte-level vocabulary."""
    if language.has("tokenizer.model"):  # which would be taken before the others
        raise UnsupportedModel("llm/tokenizer.model: expected a byte-level vocabulary, got a SentencePiece model")
    file = "tokenizer.json" if language.has("tokenizer.json") else "vocab.json"
    values: Any = language.read_json(file, max_bytes=MAX_TOKENIZER_BYTES) or {}
    if file == "tokenizer.json":
        model = values.get("model")
        values = model.get("vocab") if isinstance(model, dict) else None
    found = values.get(_NEWLINE_PIECE) if isinstance(values, dict) else None
    if type(found) is not int or not 0 <= found < vocab_size:
        raise UnsupportedModel(f"llm/{file}: expected a byte-level vocabulary with the newline, got {shown(found)}")
    return found


def _system_text(language: Checkpoint) -> str:
    """What the tokenizer's own template says for a conversation without a system text.

    The models that name no template were trained with that of their language model, and those differ in this text
    alone: Qwen2 has a full stop, Qwen2.5 introduces itself.
    """
    template = (language.read_json("tokenizer_config.json") or {}).get("chat_template")
    found = _SYSTEM_IN_TEMPLATE.search(template) if isinstance(template, str) else None
    return found[1] if found else _SYSTEM


@dataclass(frozen=True)
class _Tiles:
    """How an image is laid out: rows x cols tiles."""

    rows: int
    cols: int

    @staticmethod
    def closest(height: int, width: int, *, low: int, high: int, size: int) -> _Tiles:
        """The grid of `low` to `high` tiles whose aspect is nearest to the picture's.

        Of grids that are equally near the larger one, if the picture has more than half of its pixels.
        Source: InternVL's dynamic preprocessing, as NVlabs/VILA has it.
        """
        found = [(cols, rows) for cols in range(1, high + 1) for rows in range(1, high // cols + 1)]
        grids = sorted((grid for grid in found if grid[0] * grid[1] >= low), key=lambda grid: grid[0] * grid[1])
        best, least = (1, 1), math.inf
        for cols, rows in grids:
            off = abs(width / height - cols / rows)
            if off < least or (off == least and width * height > 0.5 * size * size * cols * rows):
                best, least = (cols, rows), off
        return _Tiles(best[1], best[0])

    def cut(self, picture: Image.Image, size: int) -> list[np.ndarray]:
        """The picture scaled to the grid, aspect ratio not kept, tile by tile: (size, size, 3) uint8 each."""
        scaled = np.asarray(picture.resize((self.cols * size, self.rows * size), Image.Resampling.BICUBIC))
        places = [(y * size, x * size) for y in range(self.rows) for x in range(self.cols)]
        return [scaled[y : y + size, x : x + size] for y, x in places]


_Encoded = tuple[Tensor, Tensor]  # features and marks of some tiles: saliency and, if asked for, keys


class Nvila(ContiguousPositions, nn.Module):
    """The model as the engine sees it. Stateless: caches and positions are arguments."""

    def __init__(self, config: NvilaConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_tower: SiglipTower | RadioTower = (
            RadioTower(config.vision, config.scale)
            if isinstance(config.vision, RadioConfig)
            else SiglipTower(config.vision, config.feature_layer, config.scale)
        )
        width = config.vision.hidden_size * len(config.scales)
        self.mm_projector = Projector(config.projector, width, config.text.hidden_size)
        self.language_model = Decoder(config.text)
        self.prompt: PromptFormat = ChatMLPrompt(config.system)
        if any(self.mm_projector.tokens_of_side(config.vision.grid) % block for block in config.pool[1:]):
            side = self.mm_projector.tokens_of_side(config.vision.grid)
            raise UnsupportedModel(f"config.json: video_encoder.pool_sizes: expected divisors of {side} tokens a side")

    @staticmethod
    def from_checkpoint(checkpoint: Checkpoint) -> Nvila:
        """The empty model of a checkpoint; build it under `torch.device("meta")`."""
        return Nvila(NvilaConfig.from_hf(checkpoint))

    @property
    def decoder(self) -> Decoder:
        return self.language_model

    @property
    def tower(self) -> SiglipTower | RadioTower:
        return self.vision_tower

    @property
    def media_tokens(self) -> dict[str, int]:
        """None: these configs state no ids, and no id of a media token is used."""
        return {}

    @property
    def default_frames(self) -> int:
        """Frames of a video whose caller names no number."""
        return self.config.num_frames

    @property
    def default_fps(self) -> float | None:
        """No more frames a second than this of such a video; None: no bound."""
        return self.config.fps

    def rename(self, name: str) -> str | None:
        """Checkpoint name, `<folder>.<name in the folder>` -> ours; None for what is known and not needed."""
        folder, _, inner = name.partition(".")
        if folder == "llm":
            parts = inner.split(".")
            if parts[-2:] == ["rotary_emb", "inv_freq"]:
                return None
            return ".".join(["language_model", *(parts[1:] if parts[0] == "model" else parts)])
        if folder == "vision_tower":
            if isinstance(self.config.vision, RadioConfig):
                renamed = rename_radio(inner)
            else:
                renamed = rename_siglip(inner, self.config.vision, len(self.vision_tower.blocks))
            return None if renamed is None else f"vision_tower.{renamed}"
        return name

    # Preprocessing

    def preprocess(self, frames: Frames) -> VisualInputs:
        """Pixels to tiles (image) or frames (video), uint8, and the map of their tokens.

        In the dynamic modes every image is cut into tiles. Upstream does so for the only image of a conversation and
        shows each of several in one tile; here an image is what it is, whatever else a session holds or once held.
        """
        if frames.kind == "video" or self.config.aspect in ("resize", "pad"):
            return self._one_tile_each(frames)
        height, width = frames.rgb.shape[1:3]
        size = self.config.vision.image_size
        if self.config.aspect == "dynamic":
            tiles = _Tiles.closest(height, width, low=self.config.min_tiles, high=self.config.max_tiles, size=size)
            return self._separate_tiles(frames.rgb[0], tiles)
        # As many tiles as the largest scale has, at least.
        low = self.config.scales[-1] ** 2
        tiles = _Tiles.closest(height, width, low=low, high=max(low, self.config.max_tiles), size=size)
        return self._tiles_of_scales(frames.rgb[0], tiles)

    def _one_tile_each(self, frames: Frames) -> VisualInputs:
        """Every frame scaled to one tile, padded to a square before in the mode `pad`."""
        size, (T, height, width) = self.config.vision.image_size, frames.rgb.shape[:3]
        square = self._padded if self.config.aspect == "pad" else Image.fromarray
        whole = _Tiles(1, 1)
        tiles = (whole.cut(square(rgb), size)[0] for rgb in frames.rgb)
        pool = self.config.pool if frames.kind == "video" else (1, 1, 1)
        boxes = self._boxes(whole, pool).flatten(0, 1)
        if self.config.aspect == "pad":
            boxes = _without_padding(boxes, height, width)
        starts = torch.arange(0, T, pool[0])
        shown_frames = (starts + (starts + pool[0]).clamp(max=T)) // 2  # the middle of those that are averaged
        token_map = _map(boxes.expand(len(starts), -1, -1), shown_frames, newlines=1)
        return VisualInputs(frames.kind, _stacked(tiles, T, size), (0, 0, 1), token_map)

    def _padded(self, rgb: np.ndarray) -> Image.Image:
        """A square picture, the given one in its middle, the rest in the mean colour.

        One whose square would take more memory than any picture is first scaled down.
        """
        height, width, _ = rgb.shape
        side = max(height, width)
        if side > _PADDED_SIDE:
            height, width = (max(1, round(length * _PADDED_SIDE / side)) for length in (height, width))
            rgb = np.asarray(Image.fromarray(rgb).resize((width, height), Image.Resampling.BICUBIC))
            side = _PADDED_SIDE
        colour = [int(mean * 255) for mean in self.config.scale.mean]
        canvas = np.full((side, side, 3), colour, dtype=np.uint8)
        top, left = (side - height) // 2, (side - width) // 2
        canvas[top : top + height, left : left + width] = rgb
        return Image.fromarray(canvas)

    def _separate_tiles(self, rgb: np.ndarray, grid: _Tiles) -> VisualInputs:
        """`dynamic`: each tile a picture of its own, and behind several of them the whole one."""
        picture, size = Image.fromarray(rgb), self.config.vision.image_size
        tiles = grid.cut(picture, size)
        boxes = split_tiles(self._boxes(grid), grid.rows, grid.cols)
        if len(tiles) > 1:
            tiles += _Tiles(1, 1).cut(picture, size)
            boxes = torch.cat([boxes, self._boxes(_Tiles(1, 1)).flatten(0, 1)[None]])
        # The prompt of such an image is a media token and a newline for each tile, and a tile ends with a newline.
        token_map = _map(boxes, torch.zeros(len(tiles)), newlines=2)
        return VisualInputs("image", _stacked(tiles, len(tiles), size), (0, 0, 2), token_map)

    def _tiles_of_scales(self, rgb: np.ndarray, grid: _Tiles) -> VisualInputs:
        """`dynamic_s2`: the picture at every scale, the last one on the grid that fits it."""
        picture, size = Image.fromarray(rgb), self.config.vision.image_size
        grids = self._grids(grid.rows, grid.cols)
        tiles = [tile for each in grids for tile in each.cut(picture, size)]
        boxes = self._boxes(grids[self.config.output_scale]).flatten(0, 1)[None]
        token_map = _map(boxes, torch.zeros(1), newlines=1)
        return VisualInputs("image", _stacked(tiles, len(tiles), size), (grid.rows, grid.cols, 1), token_map)

    def _grids(self, rows: int, cols: int) -> list[_Tiles]:
        """The tiles of every scale."""
        return [*(_Tiles(side, side) for side in self.config.scales[:-1]), _Tiles(rows, cols)]

    def _boxes(self, grid: _Tiles, pool: tuple[int, int, int] = (1, 1, 1)) -> Tensor:
        """(rows, cols, 4): the boxes of all tokens of a picture on a grid of tiles."""
        y, x = self._edges(grid.rows, pool[1]), self._edges(grid.cols, pool[2])
        y, x = y[:, None].expand(-1, len(x), -1), x[None].expand(len(y), -1, -1)
        return torch.stack([y[..., 0], x[..., 0], y[..., 1], x[..., 1]], dim=-1)

    def _edges(self, tiles: int, pool: int) -> Tensor:
        """(tokens, 2): where each token of a side begins and ends, as fractions of the side."""
        side, patch = self.config.vision.image_size, _patch_size(self.config.vision)
        cell = self.mm_projector.stride * pool * patch  # pixels
        count = self.mm_projector.tokens_of_side(self.config.vision.grid) // pool
        # The last token of an odd side joins padding; pixels that no patch covers are nobody's.
        edges = (torch.arange(count + 1) * cell).clamp(max=self.config.vision.grid * patch) / side
        place = torch.arange(tiles).repeat_interleave(count)
        return (torch.stack([edges[:-1].repeat(tiles), edges[1:].repeat(tiles)], dim=1) + place[:, None]) / tiles

    def tokens_per_frame(self) -> int:
        """Visual tokens of one video frame, at most."""
        side = self.mm_projector.tokens_of_side(self.config.vision.grid)
        frames, rows, cols = self.config.pool
        return -(-(side // rows) * (side // cols) // frames)

    # Vision

    def encode(
        self, inputs: VisualInputs, progress: ProgressFn = no_progress, *, with_keys: bool = False
    ) -> VisualTokens:
        """The tower, in chunks of tiles, and the projector where it joins patches.

        Features are the projector's output then; where it is per token, they stay in front of it.
        """
        rows, _, newlines = inputs.layout
        chunks = self._run_tower(inputs, progress, with_keys=with_keys)
        steps = self._scales_at_once(inputs, chunks) if rows else self._tile_by_tile(inputs, chunks)
        features = marks = torch.empty(0)
        end = 0
        for x, found in steps:
            units, count, width = x.shape
            if not end:
                total = len(inputs.token_map) // (count + newlines)
                features = x.new_zeros(total, count + newlines, width)
                marks = found.new_zeros(total, count + newlines, found.shape[2])
            features[end : end + units, :count] = x
            marks[end : end + units, :count] = found
            end += units
        progress(Progress("encode", len(inputs.pixels), len(inputs.pixels), "frames"))
        return VisualTokens.of_marks(features.flatten(0, 1), inputs.token_map, marks.flatten(0, 1))

    def _tile_by_tile(self, inputs: VisualInputs, chunks: Iterator[_Encoded]) -> Iterator[_Encoded]:
        """Yields features (units, tokens, D) and marks (units, tokens, C); a unit is a tile or a pooled run of them."""
        pool = self.config.pool if inputs.kind == "video" else (1, 1, 1)
        projected = (
            # Made for several scales, the projector gets the one there is as often.
            (self._projected(torch.cat([x] * len(self.config.scales), dim=-1)), self.mm_projector.pool(scores))
            for x, scores in chunks
        )
        if pool == (1, 1, 1):
            yield from projected
            return
        for x, scores in _in_whole_runs(projected, pool[0]):
            yield self._pooled(x, pool), self._pooled(scores, pool)

    def _run_tower(self, inputs: VisualInputs, progress: ProgressFn, *, with_keys: bool) -> Iterator[_Encoded]:
        """Yields the tower's features (tiles, patches, D) and marks (tiles, patches, C), chunk by chunk."""
        total = len(inputs.pixels)
        for start in range(0, total, _TILES_PER_CHUNK):
            progress(Progress("encode", start, total, "frames"))
            x, scores = self.vision_tower(inputs.pixels[start : start + _TILES_PER_CHUNK], with_keys=with_keys)
            yield x, scores.view(*scores.shape[:2], -1)

    def _projected(self, x: Tensor) -> Tensor:
        """What is kept of (tiles, patches, C): joined tokens, or the patches as they are."""
        return self.mm_projector(x) if self.mm_projector.stride > 1 else x

    def _pooled(self, x: Tensor, pool: tuple[int, int, int]) -> Tensor:
        """Means over blocks of a video's tokens: (frames, tokens, C) -> (fewer, fewer, C)."""
        side = math.isqrt(x.shape[1])
        return pool_blocks(x.unflatten(1, (side, side)), pool).flatten(1, 2)

    def _scales_at_once(self, inputs: VisualInputs, run: Iterator[_Encoded]) -> Iterator[_Encoded]:
        """`dynamic_s2`: each token is made of the features of all scales at its place. Yields one unit.

        Its saliency is the mean over the scales, because its feature is all of them: the finest scale alone shares out
        its attention within each tile, and only the coarsest compares the whole picture.
        """
        grids = self._grids(*inputs.layout[:2])
        chunks = list(run)
        counts = [grid.rows * grid.cols for grid in grids]
        x = torch.cat([x for x, _ in chunks]).split(counts)
        scores = torch.cat([scores for _, scores in chunks]).split(counts)
        out = grids[self.config.output_scale]
        side = self.config.vision.grid
        size = (out.rows * side, out.cols * side)
        maps = [resize_area(merge_tiles(part, g.rows, g.cols), *size) for part, g in zip(x, grids, strict=True)]
        rated = [resize_area(merge_tiles(part, g.rows, g.cols), *size) for part, g in zip(scores, grids, strict=True)]
        tiles = split_tiles(torch.cat(maps, dim=-1), out.rows, out.cols)
        merit = self.mm_projector.pool(split_tiles(torch.stack(rated).mean(dim=0), out.rows, out.cols))
        tokens = torch.cat([self._projected(some) for some in tiles.split(_TILES_PER_CHUNK)])
        yield (
            merge_tiles(tokens, out.rows, out.cols).flatten(0, 1)[None],
            merge_tiles(merit, out.rows, out.cols).flatten(0, 1)[None],
        )

    def embed_visual(self, tokens: VisualTokens) -> Tensor:
        """(N, hidden_size): structural tokens become the newline of the text."""
        x = tokens.features
        if self.mm_projector.stride == 1:
            x = self.mm_projector(x)
        newline = self.language_model.embed(torch.tensor([self.config.newline_id], device=x.device))
        return torch.where(tokens.token_map.structural.to(x.device)[:, None], newline, x)


def _patch_size(vision: ClipConfig | RadioConfig) -> int:
    return vision.layers.patch_size if isinstance(vision, RadioConfig) else vision.patch_size


def _stacked(tiles: Iterable[np.ndarray], count: int, size: int) -> Tensor:
    """`count` tiles (size, size, 3) uint8, made one by one -> (count, 3, size, size) uint8."""
    pixels = np.empty((count, 3, size, size), dtype=np.uint8)
    for target, tile in zip(pixels, tiles, strict=True):
        target[:] = tile.transpose(2, 0, 1)
    return torch.from_numpy(pixels)


def _in_whole_runs(chunks: Iterable[_Encoded], length: int) -> Iterator[_Encoded]:
    """The same rows in other chunks: each holds whole runs of `length` rows, the last one may end within one."""
    waiting: list[_Encoded] = []
    for chunk in chunks:
        waiting.append(chunk)
        count = sum(len(x) for x, _ in waiting)
        if count < length:
            continue
        x, scores = (torch.cat(parts) for parts in zip(*waiting, strict=True))
        whole = count // length * length
        yield x[:whole], scores[:whole]
        waiting = [(x[whole:], scores[whole:])] if whole < count else []
    if waiting:
        x, scores = (torch.cat(parts) for parts in zip(*waiting, strict=True))
        yield x, scores


def _without_padding(boxes: Tensor, height: int, width: int) -> Tensor:
    """Boxes of the square that a picture was padded to -> of the picture; empty where only padding is seen."""
    side = max(height, width)
    offset = torch.tensor([(side - height) // 2, (side - width) // 2] * 2)
    return ((boxes * side - offset) / torch.tensor([height, width] * 2)).clamp(0, 1)


def _map(boxes: Tensor, frames: Tensor, *, newlines: int) -> TokenMap:
    """The map of U units of n tokens, each closed by `newlines` structural ones.

    boxes (U, n, 4), frames (U,). A newline has an empty box at the end of its unit.
    """
    units, count, _ = boxes.shape
    corner = boxes[:, -1:, 2:].repeat(1, newlines, 2)
    length = count + newlines
    return TokenMap(
        media=torch.zeros(units * length, dtype=torch.int32),
        frame=frames.to(torch.int32).repeat_interleave(length),
        box=torch.cat([boxes, corner], dim=1).flatten(0, 1),
        structural=(torch.arange(length) >= count).repeat(units),
        line=torch.arange(units, dtype=torch.int32).repeat_interleave(length),
    )
