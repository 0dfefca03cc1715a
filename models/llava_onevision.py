"""LLaVA-OneVision: a SigLIP tower, a projector for each token, a Qwen2 decoder, pictures of any resolution.

From top to bottom: config, tensor names, the model. What it shares with LLaVA-NeXT is imported from there.
Features are those behind the projector: frames of a video, and pictures of very many tiles, are scaled down there.
Sources: Li et al., arXiv 2408.03326; layout of transformers' LlavaOnevisionForConditionalGeneration.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import CorruptCheckpoint, UnsupportedModel
from ..quant.linear import Linear
from .anyres import Anyres, Pinpoints, Tile, grid_boxes, patch_sources, read_pinpoints
from .blocks import ACTIVATIONS
from .chatml import ChatMLPrompt
from .checkpoint import Checkpoint, ConfigReader
from .clip import ClipConfig
from .decoder import Decoder, DecoderConfig
from .interface import (
    DEFAULT_FRAMES,
    Frames,
    Progress,
    ProgressFn,
    PromptFormat,
    TokenMap,
    VisualInputs,
    VisualTokens,
    no_progress,
)
from .llava_next import rename
from .positions import ContiguousPositions
from .siglip import PixelScale, SiglipTower, rename_siglip, siglip_config
from .vision_tower import VisionTower

_SIDES = (384, 768, 1152, 1536, 1920, 2304)
_PINPOINTS = [[height, width] for height in _SIDES for width in _SIDES]
_CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]  # what the class of the processor takes where a file says nothing
_CLIP_STD = [0.26862954, 0.26130258, 0.27577711]
# Keys that the class of the config takes where a file leaves them out; they are not those of SigLIP's own class.
_VISION = {
    "hidden_size": 1152, "intermediate_size": 4304, "patch_size": 14, "image_size": 384, "num_hidden_layers": 26,
    "num_attention_heads": 16,
}  # fmt: skip
_TILES_PER_CHUNK = 4  # bounds the encoder: all 729 rows rate all columns
_SHRINK_FROM = 1.1  # a picture whose grid is by so much larger than the largest one, per side, is scaled down to it


@dataclass(frozen=True)
class OnevisionConfig:
    """What the checkpoint's config.json and preprocessor_config.json say."""

    vision: ClipConfig
    text: DecoderConfig
    feature_layer: int  # index into the tower's hidden states, negative from the end
    projector_act: str
    projector_bias: bool
    pinpoints: Pinpoints
    max_tiles: int  # of "anyres_max_N": how many tiles' patches a picture has at most, about
    scale: PixelScale
    media_tokens: dict[str, int]

    @staticmethod
    def from_hf(checkpoint: Checkpoint) -> OnevisionConfig:
        """Reads both files, each key once. Raises CorruptCheckpoint or UnsupportedModel with file, key and value."""
        top = ConfigReader(checkpoint.config, file="config.json")
        given = checkpoint.config.get("vision_config")
        vision = siglip_config(
            ConfigReader(_VISION | (given if isinstance(given, dict) else {}), prefix="vision_config.")
        )
        top.get_str("model_type", default="llava_onevision", choices=("llava_onevision",))
        top.get_str("vision_feature_select_strategy", default="full", choices=("full",))
        pre = ConfigReader(checkpoint.read_json("preprocessor_config.json") or {}, file="preprocessor_config.json")
        pinpoints = read_pinpoints(top.get_list("image_grid_pinpoints", default=_PINPOINTS))
        if pre.has("image_grid_pinpoints") and read_pinpoints(pre.get_list("image_grid_pinpoints")) != pinpoints:
            raise CorruptCheckpoint("image_grid_pinpoints of config.json and preprocessor_config.json differ")
        if any(side % vision.image_size for point in pinpoints for side in point):
            raise UnsupportedModel(f"image_grid_pinpoints: expected multiples of {vision.image_size}, got {pinpoints}")
        return OnevisionConfig(
            vision=vision,
            text=DecoderConfig.from_hf(top.sub("text_config"), tied=top.get_bool("tie_word_embeddings", default=False)),
            feature_layer=top.get_int("vision_feature_layer", default=-1, low=-256, high=256),
            projector_act=top.get_str("projector_hidden_act", default="gelu", choices=tuple(ACTIVATIONS)),
            projector_bias=top.get_bool("multimodal_projector_bias", default=True),
            pinpoints=pinpoints,
            max_tiles=_max_tiles(top),
            scale=PixelScale(
                pre.get_triple("image_mean", _CLIP_MEAN),
                pre.get_triple("image_std", _CLIP_STD),
                pre.get_float("rescale_factor", default=1 / 255, low=0.0),
            ),
            media_tokens={
                f"<{kind}>": top.get_int(
                    (f"{kind}_token_index", f"{kind}_token_id"), default=default, low=0, high=1 << 24
                )
                for kind, default in (("image", 151646), ("video", 151647))
            },
        )


def _max_tiles(top: ConfigReader) -> int:
    ratio = top.get_str("vision_aspect_ratio", default="anyres_max_9")
    found = re.fullmatch(r"anyres_max_([1-9]\d?)", ratio)
    if found is None:
        raise UnsupportedModel(f"vision_aspect_ratio: expected anyres_max_N, got {ratio!r:.60}")
    return int(found[1])


class LlavaOnevision(ContiguousPositions, nn.Module):
    """The model as the engine sees it. Stateless: caches and positions are arguments."""

    def __init__(self, config: OnevisionConfig) -> None:
        super().__init__()
        self.config = config
        hidden, bias = config.text.hidden_size, config.projector_bias
        self.vision_tower = SiglipTower(config.vision, config.feature_layer, config.scale)
        self.multi_modal_projector = nn.ModuleDict(
            {
                "linear_1": Linear(config.vision.hidden_size, hidden, bias=bias),
                "linear_2": Linear(hidden, hidden, bias=bias),
            }
        )
        self.image_newline = nn.Parameter(torch.empty(hidden), requires_grad=False)
        self.language_model = Decoder(config.text)
        self.prompt: PromptFormat = ChatMLPrompt(behind_media="\n")

    @staticmethod
    def from_checkpoint(checkpoint: Checkpoint) -> LlavaOnevision:
        """The empty model of a checkpoint; build it under `torch.device("meta")`."""
        return LlavaOnevision(OnevisionConfig.from_hf(checkpoint))

    @property
    def decoder(self) -> Decoder:
        return self.language_model

    @property
    def tower(self) -> VisionTower:
        return self.vision_tower

    @property
    def media_tokens(self) -> dict[str, int]:
        return self.config.media_tokens

    def rename(self, name: str) -> str | None:
        """Checkpoint name -> ours, for the naming schemes of LLaVA-NeXT; None for what is known and not needed."""
        renamed = rename(name)
        if renamed is None or not renamed.startswith("vision_tower."):
            return renamed
        inner = renamed.removeprefix("vision_tower.")
        found = rename_siglip(inner, self.config.vision, len(self.vision_tower.encoder.layers))
        return None if found is None else f"vision_tower.{found}"

    # Preprocessing

    def preprocess(self, frames: Frames) -> VisualInputs:
        """Pixels to tiles (image: any resolution) or frames (video: squeezed into a square), and their token map."""
        return self._preprocess_image(frames.rgb[0]) if frames.kind == "image" else self._preprocess_video(frames)

    def _preprocess_image(self, rgb: np.ndarray) -> VisualInputs:
        vision = self.config.vision
        plan = Anyres.plan(
            rgb.shape[0], rgb.shape[1], self.config.pinpoints, Tile(vision.image_size, vision.patch_size)
        )
        rows, cols = self._shrunk(plan.rows, plan.cols)
        layout = (plan.tile_cols, plan.top, plan.left, plan.rows, plan.cols, rows, cols)
        return VisualInputs("image", _stacked(plan.tiles(rgb)), layout, plan.token_map(rows, cols))

    def _shrunk(self, rows: int, cols: int) -> tuple[int, int]:
        """The grid that is left of an unpadded one."""
        ratio = math.sqrt(rows * cols / (self.config.max_tiles * self.config.vision.grid**2))
        return (int(rows // ratio), int(cols // ratio)) if ratio > _SHRINK_FROM else (rows, cols)

    def _preprocess_video(self, frames: Frames) -> VisualInputs:
        size, T = self.config.vision.image_size, len(frames.rgb)
        square = [Image.fromarray(rgb).resize((size, size), Image.Resampling.BICUBIC) for rgb in frames.rgb]
        side = self._pooled_side
        per_frame = side * side
        total = T * per_frame + 1  # one newline closes the clip
        structural = torch.arange(total) == total - 1
        token_map = TokenMap(
            media=torch.zeros(total, dtype=torch.int32),
            frame=(torch.arange(total) // per_frame).clamp(max=T - 1).to(torch.int32),
            box=torch.cat([grid_boxes(side, side).repeat(T, 1), torch.ones(1, 4)]),
            structural=structural,
            line=torch.full((total,), -1, dtype=torch.int32),
        )
        return VisualInputs("video", _stacked([np.asarray(picture) for picture in square]), (T,), token_map)

    @property
    def _pooled_side(self) -> int:
        return math.ceil(self.config.vision.grid / 2)

    @property
    def default_frames(self) -> int:
        """Frames of a video whose caller names no number."""
        return DEFAULT_FRAMES

    @property
    def default_fps(self) -> float | None:
        """Of such a video; None: no bound."""
        return None

    def tokens_per_frame(self) -> int:
        """Visual tokens of one video frame."""
        return self._pooled_side**2

    # Vision

    def encode(
        self, inputs: VisualInputs, progress: ProgressFn = no_progress, *, with_keys: bool = False
    ) -> VisualTokens:
        """The vision tower and the projector, in chunks of tiles."""
        total = inputs.pixels.shape[0]
        features, marks = [], []  # saliency and, if asked for, keys
        for start in range(0, total, _TILES_PER_CHUNK):
            progress(Progress("encode", start, total, "frames"))
            x, scores = self.vision_tower(inputs.pixels[start : start + _TILES_PER_CHUNK], with_keys=with_keys)
            x, found = self._project(x), scores.view(*scores.shape[:2], -1)  # (tiles, patches, D), (tiles, patches, C)
            if inputs.kind == "video":
                x, found = (_resized(part, self.config.vision.grid, self._pooled_side) for part in (x, found))
            features.append(x)
            marks.append(found)
        progress(Progress("encode", total, total, "frames"))
        x, found = torch.cat(features).flatten(0, 1), torch.cat(marks).flatten(0, 1)
        if inputs.kind == "image":
            x, found = (self._in_lines(part, inputs.layout) for part in (x, found))
        else:
            x, found = (F.pad(part, (0, 0, 0, 1)) for part in (x, found))
        return VisualTokens.of_marks(x, inputs.token_map, found)

    def _project(self, features: Tensor) -> Tensor:
        projector = self.multi_modal_projector
        projected: Tensor = projector["linear_2"](
            ACTIVATIONS[self.config.projector_act](projector["linear_1"](features))
        )
        return projected

    def _in_lines(self, x: Tensor, layout: tuple[int, ...]) -> Tensor:
        """x (tiles * patches, C) -> (N, C) in reading order, padding cut away, scaled down, zeros for newlines."""
        *unpadded, rows, cols = layout
        source = patch_sources(unpadded, self.config.vision.grid).to(x.device)
        base = self.config.vision.grid**2
        whole, lines = source[:base], source[base:].view(unpadded[-2], unpadded[-1] + 1)[:, :-1]
        grid = x[lines]  # (rows before, cols before, C)
        if grid.shape[:2] != (rows, cols):
            grid = F.interpolate(grid.permute(2, 0, 1)[None], (rows, cols), mode="bilinear")[0].permute(1, 2, 0)
        return torch.cat([x[whole], F.pad(grid, (0, 0, 0, 1)).flatten(0, 1)])

    def embed_visual(self, tokens: VisualTokens) -> Tensor:
        """Features (N, hidden_size) are projected already; structural tokens become the newline."""
        structural = tokens.token_map.structural.to(tokens.features.device)
        return torch.where(structural[:, None], self.image_newline, tokens.features)


def _stacked(tiles: list[np.ndarray]) -> Tensor:
    """(S, S, 3) uint8 tiles -> (tiles, 3, S, S) uint8."""
    return torch.from_numpy(np.stack(tiles).transpose(0, 3, 1, 2).copy())


def _resized(x: Tensor, grid: int, side: int) -> Tensor:
    """x (frames, grid * grid, C) -> (frames, side * side, C), bilinear."""
    square = x.transpose(1, 2).unflatten(2, (grid, grid))
    return F.interpolate(square, (side, side), mode="bilinear").flatten(2).transpose(1, 2)
