"""LLaVA-NeXT and LLaVA-NeXT-Video: a CLIP tower, a projector for each token, a Llama or Mistral decoder.

From top to bottom: config, tensor names, preprocessing, the model, prompts.
Sources: llava-vl.github.io/blog/2024-01-30-llava-next and 2024-04-30-llava-next-video; layout of transformers'
LlavaNextForConditionalGeneration and LlavaNextVideoForConditionalGeneration.
"""

from __future__ import annotations

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
from .checkpoint import Checkpoint, ConfigReader
from .clip import ClipConfig, ClipTower
from .decoder import Decoder, DecoderConfig
from .interface import (
    DEFAULT_FRAMES,
    Frames,
    Progress,
    ProgressFn,
    PromptFormat,
    PromptPiece,
    Special,
    TokenMap,
    VisualInputs,
    VisualTokens,
    no_progress,
)
from .positions import ContiguousPositions
from .vision_tower import VisionTower

_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
_CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
_CLIP_STD = [0.26862954, 0.26130258, 0.27577711]
_TILES_PER_CHUNK = 8  # bounds the encoder's activations: 8 x 577 tokens x 4096 x 2 bytes = 38 MB a layer


@dataclass(frozen=True)
class LlavaNextConfig:
    """What the checkpoint's config.json and preprocessor_config.json say."""

    vision: ClipConfig
    text: DecoderConfig
    text_model_type: str
    feature_layer: int  # index into the tower's hidden states, negative from the end
    projector_act: str
    pinpoints: Pinpoints
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    rescale_factor: float
    pool_stride: int  # of a video frame's patches
    media_tokens: dict[str, int]  # name of a media token -> its id, to check the tokenizer against

    @staticmethod
    def from_hf(checkpoint: Checkpoint) -> LlavaNextConfig:
        """Reads both files, each key once. Raises CorruptCheckpoint or UnsupportedModel with file, key and value."""
        top = ConfigReader(checkpoint.config, file="config.json")
        text = top.sub("text_config")
        vision = ClipConfig.from_hf(top.sub("vision_config"))
        top.get_str("vision_feature_select_strategy", default="default", choices=("default",))
        is_video = top.get_str("model_type", choices=("llava_next", "llava_next_video")) == "llava_next_video"
        if is_video:
            top.get_str("spatial_pool_mode", default="average", choices=("average",))
        pre = ConfigReader(checkpoint.read_json("preprocessor_config.json") or {}, file="preprocessor_config.json")
        pinpoints = read_pinpoints(top.get_list("image_grid_pinpoints", default=_PINPOINTS))
        if pre.has("image_grid_pinpoints") and read_pinpoints(pre.get_list("image_grid_pinpoints")) != pinpoints:
            raise CorruptCheckpoint("image_grid_pinpoints of config.json and preprocessor_config.json differ")
        if any(side % vision.image_size for point in pinpoints for side in point):
            raise UnsupportedModel(f"image_grid_pinpoints: expected multiples of {vision.image_size}, got {pinpoints}")
        tied = top.get_bool("tie_word_embeddings", default=False)
        return LlavaNextConfig(
            vision=vision,
            text=DecoderConfig.from_hf(text, tied=tied),
            text_model_type=text.get_str("model_type", default="llama"),
            feature_layer=top.get_int("vision_feature_layer", default=-2, low=-256, high=256),
            projector_act=top.get_str("projector_hidden_act", default="gelu", choices=tuple(ACTIVATIONS)),
            pinpoints=pinpoints,
            image_mean=pre.get_triple("image_mean", _CLIP_MEAN),
            image_std=pre.get_triple("image_std", _CLIP_STD),
            rescale_factor=pre.get_float("rescale_factor", default=1 / 255, low=0.0),
            pool_stride=top.get_int("spatial_pool_stride", default=2, low=1, high=vision.grid) if is_video else 2,
            media_tokens=_media_tokens(top, is_video),
        )


def _media_tokens(top: ConfigReader, is_video: bool) -> dict[str, int]:
    """LLaVA-NeXT-Video gives `<video>` the id that `<image>` has in LLaVA-NeXT."""

    def media_id(kind: str, default: int) -> int:
        return top.get_int((f"{kind}_token_index", f"{kind}_token_id"), default=default, low=0, high=1 << 24)

    if not is_video:
        return {"<image>": media_id("image", 32000)}
    return {"<image>": media_id("image", 32001), "<video>": media_id("video", 32000)}


def rename(name: str) -> str | None:
    """Checkpoint name -> ours, for all three naming schemes; None for what is known and not needed.

    hub files:         language_model.model.layers.0...   language_model.lm_head   vision_tower.vision_model...
    re-saved, 4.52+:   model.language_model.layers.0...   lm_head                  model.vision_tower.vision_model...
    transformers 5:    as hub files, `vision_model.` dropped
    """
    parts = name.split(".")
    if parts[0] == "model":
        parts = parts[1:]
    if parts[0] == "lm_head":
        parts = ["language_model", *parts]
    if parts[:2] == ["language_model", "model"]:
        parts = ["language_model", *parts[2:]]
    if parts[:2] == ["vision_tower", "vision_model"]:
        parts = ["vision_tower", *parts[2:]]
    if parts[-2:] in (["rotary_emb", "inv_freq"], ["embeddings", "position_ids"]):
        return None
    return ".".join(parts)


class LlavaNext(ContiguousPositions, nn.Module):
    """The model as the engine sees it. Stateless: caches and positions are arguments."""

    def __init__(self, config: LlavaNextConfig) -> None:
        super().__init__()
        self.config = config
        hidden = config.text.hidden_size
        self.vision_tower = ClipTower(config.vision, config.feature_layer)
        self.multi_modal_projector = nn.ModuleDict(
            {
                "linear_1": Linear(config.vision.hidden_size, hidden, bias=True),
                "linear_2": Linear(hidden, hidden, bias=True),
            }
        )
        self.image_newline = nn.Parameter(torch.empty(hidden), requires_grad=False)
        self.language_model = Decoder(config.text)
        self.prompt: PromptFormat = MistralPrompt() if config.text_model_type == "mistral" else VicunaPrompt()

    @staticmethod
    def from_checkpoint(checkpoint: Checkpoint) -> LlavaNext:
        """The empty model of a checkpoint; build it under `torch.device("meta")`."""
        return LlavaNext(LlavaNextConfig.from_hf(checkpoint))

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
        """`rename` of this file, and the tower's layers behind the features dropped."""
        renamed = rename(name)
        if renamed is None:
            return None
        parts = renamed.split(".")
        if parts[0] == "vision_tower":
            used = len(self.vision_tower.encoder.layers)
            behind = parts[1:3] == ["encoder", "layers"] and parts[3].isdigit() and used <= int(parts[3])
            if parts[1] == "post_layernorm" or (behind and int(parts[3]) < self.config.vision.num_layers):
                return None
        return renamed

    # Preprocessing

    def preprocess(self, frames: Frames) -> VisualInputs:
        """Pixels to tiles (image: any resolution) or frames (video: base resolution), and the map of their tokens."""
        return self._preprocess_image(frames.rgb[0]) if frames.kind == "image" else self._preprocess_video(frames)

    def normalise(self, tiles: list[np.ndarray]) -> Tensor:
        """(S, S, 3) uint8 tiles -> (tiles, 3, S, S) float32, by a table: each of 256 values is computed once."""
        values = (np.arange(256, dtype=np.float64) * self.config.rescale_factor).astype(np.float32)
        mean, std = (np.array(x, dtype=np.float32)[:, None] for x in (self.config.image_mean, self.config.image_std))
        table = (values - mean) / std  # (3, 256)
        pixels = np.stack(tiles).transpose(0, 3, 1, 2)
        return torch.from_numpy(np.stack([table[c][pixels[:, c]] for c in range(3)], axis=1))

    def _preprocess_image(self, rgb: np.ndarray) -> VisualInputs:
        vision = self.config.vision
        tile = Tile(vision.image_size, vision.patch_size)
        plan = Anyres.plan(rgb.shape[0], rgb.shape[1], self.config.pinpoints, tile)
        layout = (plan.tile_cols, plan.top, plan.left, plan.rows, plan.cols)
        return VisualInputs("image", self.normalise(plan.tiles(rgb)), layout, plan.token_map(plan.rows, plan.cols))

    def _preprocess_video(self, frames: Frames) -> VisualInputs:
        """Shortest side to the tower's size, centre crop: what CLIP's processor does to each frame."""
        size = self.config.vision.image_size
        T, height, width, _ = frames.rgb.shape
        short, long = min(height, width), max(height, width)
        scaled = int(size * long / short)
        new_h, new_w = (size, scaled) if height <= width else (scaled, size)
        top, left = (new_h - size) // 2, (new_w - size) // 2
        tiles = []
        for rgb in frames.rgb:
            resized = np.asarray(Image.fromarray(rgb).resize((new_w, new_h), Image.Resampling.BICUBIC))
            tiles.append(resized[top : top + size, left : left + size])
        side = self.config.vision.grid // self.config.pool_stride
        # A pooled cell covers stride x stride patches; an odd last row or column of patches is not used.
        cell = self.config.pool_stride * self.config.vision.patch_size
        boxes = grid_boxes(side, side) * (side * cell)  # in pixels of the crop
        offset, extent = torch.tensor([top, left, top, left]), torch.tensor([new_h, new_w, new_h, new_w])
        per_frame = side * side
        return VisualInputs(
            "video",
            self.normalise(tiles),
            (T,),
            TokenMap(
                media=torch.zeros(T * per_frame, dtype=torch.int32),
                frame=torch.arange(T, dtype=torch.int32).repeat_interleave(per_frame),
                box=((boxes + offset) / extent).repeat(T, 1),
                structural=torch.zeros(T * per_frame, dtype=torch.bool),
                line=torch.full((T * per_frame,), -1, dtype=torch.int32),
            ),
        )

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
        return (self.config.vision.grid // self.config.pool_stride) ** 2

    # Vision

    def encode(
        self, inputs: VisualInputs, progress: ProgressFn = no_progress, *, with_keys: bool = False
    ) -> VisualTokens:
        """The vision tower, in chunks of tiles. Features stay in front of the projector, which is per token."""
        weight = self.image_newline
        total = inputs.pixels.shape[0]
        features, marks = [], []  # saliency and, if asked for, keys
        for start in range(0, total, _TILES_PER_CHUNK):
            progress(Progress("encode", start, total, "frames"))
            pixels = inputs.pixels[start : start + _TILES_PER_CHUNK].to(weight.device, weight.dtype)
            x, scores = self.vision_tower(pixels, with_keys=with_keys)  # (tiles, patches, D), (tiles, patches, ...)
            found = scores.view(*scores.shape[:2], -1)
            if inputs.kind == "video":
                x, found = self.pool(x), self.pool(found)
            features.append(x)
            marks.append(found)
        progress(Progress("encode", total, total, "frames"))
        x, found = torch.cat(features), torch.cat(marks)
        if inputs.kind == "video":
            return VisualTokens.of_marks(x.flatten(0, 1), inputs.token_map, found.flatten(0, 1))
        return self._assemble(x, found, inputs)

    def pool(self, x: Tensor) -> Tensor:
        """Mean of stride x stride neighbours: (frames, patches, C) -> (frames, fewer, C)."""
        grid = self.config.vision.grid
        x = x.transpose(1, 2).unflatten(2, (grid, grid))
        return F.avg_pool2d(x, self.config.pool_stride).flatten(2).transpose(1, 2)

    def _assemble(self, x: Tensor, marks: Tensor, inputs: VisualInputs) -> VisualTokens:
        """Tiles to one sequence in reading order, padding cut away, zero rows where newlines stand."""
        index = self.token_sources(inputs.layout).to(x.device)
        newline = index < 0
        features = x.flatten(0, 1)[index.clamp(min=0)].masked_fill(newline[:, None], 0)
        found = marks.flatten(0, 1)[index.clamp(min=0)].masked_fill(newline[:, None], 0)
        return VisualTokens.of_marks(features, inputs.token_map, found)

    def token_sources(self, layout: tuple[int, ...]) -> Tensor:
        """Which patch each token of a picture is, (N,) int64 into the flattened tiles; -1 for a newline."""
        return patch_sources(layout, self.config.vision.grid)

    def embed_visual(self, tokens: VisualTokens) -> Tensor:
        """Projector: features (N, D) -> (N, hidden_size); structural tokens become the newline."""
        projector = self.multi_modal_projector
        act = ACTIVATIONS[self.config.projector_act]
        embedded = projector["linear_2"](act(projector["linear_1"](tokens.features)))
        structural = tokens.token_map.structural.to(embedded.device)
        return torch.where(structural[:, None], self.image_newline, embedded)


@dataclass(frozen=True)
class VicunaPrompt:
    """`USER: <image>\\nQ ASSISTANT: A USER: ...`, as the checkpoint's chat template writes it.

    The space after an answer belongs to the next opening: "▁USER" is one token, a space of its own another.
    """

    def opening(self, *, first: bool, system: str | None) -> list[PromptPiece]:
        if not first:
            return [" USER: "]
        return [Special("<s>"), f"{system} USER: " if system else "USER: "]

    def between_media(self) -> list[PromptPiece]:
        return ["\n"]

    def question(self, text: str, *, after_media: bool) -> list[PromptPiece]:
        return [("\n" if after_media else "") + f"{text} ASSISTANT:"]

    def closing(self) -> list[PromptPiece]:
        return []


@dataclass(frozen=True)
class MistralPrompt:
    """`[INST] <image>\\nQ [/INST] A</s> [INST] ...`.

    The hub's template closes an answer with a misspelt `<\\s>`; the real end-of-sentence token stands here, which is
    what the model was trained on.
    """

    def opening(self, *, first: bool, system: str | None) -> list[PromptPiece]:
        if not first:
            return [" [INST] "]
        return [Special("<s>"), f"<<SYS>>\n{system}\n<</SYS>>\n\n[INST] " if system else "[INST] "]

    def between_media(self) -> list[PromptPiece]:
        return ["\n"]

    def question(self, text: str, *, after_media: bool) -> list[PromptPiece]:
        return [("\n" if after_media else "") + f"{text} [/INST]"]

    def closing(self) -> list[PromptPiece]:
        return [Special("</s>")]
