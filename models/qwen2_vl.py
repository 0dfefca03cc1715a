"""Qwen2-VL and Qwen2.5-VL: pictures of any size, video in pairs of frames, positions of three axes.

From top to bottom: config, tensor names, preprocessing, the model, positions.
Sources: arXiv 2409.12191 (Qwen2-VL) and arXiv 2502.13923 (Qwen2.5-VL); layout of transformers'
Qwen2VLForConditionalGeneration and Qwen2_5_VLForConditionalGeneration.

The markers `<|vision_start|>` and `<|vision_end|>` come and go with their picture, so they are structural tokens of
it and not text of the prompt.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import CorruptCheckpoint, ImageTooNarrow, InvalidRequest
from .chatml import ChatMLPrompt
from .checkpoint import Checkpoint, ConfigReader
from .decoder import Decoder, DecoderConfig
from .interface import (
    DEFAULT_FRAMES,
    Frames,
    Progress,
    ProgressFn,
    PromptFormat,
    TokenGrid,
    TokenMap,
    VisualInputs,
    VisualTokens,
    no_progress,
)
from .qwen_vit import QwenVit, QwenVitConfig
from .vision_tower import TowerBatch, VisionTower

_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_MAX_ASPECT = 200  # of a picture's sides, as in the reference
_FRAMES_PER_SECOND = 2.0
_VIDEO_TOKENS = 0.9 * 128000  # of one clip, pairs of frames at a token each factor x factor pixels; the reference's
_SMALLEST_CAP = 1.05  # of a frame's minimal area: what a long clip leaves each frame
_PATCHES_PER_CHUNK = 4096  # bounds the encoder's activations: 4096 x 3840 x 2 bytes = 31 MB for queries, keys, values
_MARKERS = ("<|vision_start|>", "<|vision_end|>")

# How the positions of visual tokens that survived pruning are made.
PositionPolicy = Literal["regrid", "original", "contiguous"]
POSITION_POLICIES: tuple[PositionPolicy, ...] = ("regrid", "original", "contiguous")


@dataclass(frozen=True)
class PixelLimits:
    """Area of a resized picture, in pixels."""

    least: int
    most: int

    @staticmethod
    def from_hf(pre: ConfigReader, default: PixelLimits) -> PixelLimits:
        """`min_pixels` and `max_pixels`, or those of `size`, there also `shortest_` and `longest_edge`."""
        size = pre.sub("size", required=False)

        def area(name: str, edge: str, default: int) -> int:
            for reader, key in ((pre, name), (size, edge), (size, name)):
                value = reader.get_int(key, default=None, none_ok=True)
                if value is not None:
                    return value
            return default

        least = area("min_pixels", "shortest_edge", default.least)
        most = area("max_pixels", "longest_edge", default.most)
        if least > most:
            pre.fail(("min_pixels", "size"), f"at most the largest area, {most}")
        return PixelLimits(least, most)


_IMAGE_LIMITS = PixelLimits(56 * 56, 28 * 28 * 1280)
_VIDEO_LIMITS = PixelLimits(128 * 28 * 28, 768 * 28 * 28)  # of each frame


@dataclass(frozen=True)
class Qwen2VLConfig:
    """What the checkpoint's config.json and its preprocessor files say."""

    vision: QwenVitConfig
    text: DecoderConfig
    tokens_per_second: float | None  # None: frames are one position apart whatever their times (Qwen2-VL)
    image_limits: PixelLimits
    video_limits: PixelLimits
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    rescale_factor: float
    media_tokens: dict[str, int]  # name of a media token -> its id, to check the tokenizer against

    @staticmethod
    def from_hf(checkpoint: Checkpoint) -> Qwen2VLConfig:
        """Reads the files, each key once. Raises CorruptCheckpoint or UnsupportedModel with file, key and value."""
        top = ConfigReader(checkpoint.config, file="config.json")
        model_type = top.get_str("model_type", choices=("qwen2_vl", "qwen2_5_vl"))
        second = model_type == "qwen2_5_vl"
        stored_vision = top.sub("vision_config", required=False)
        vision = QwenVitConfig.from_hf(stored_vision, gated=second)
        tokens_per_second = stored_vision.get_float("tokens_per_second", default=4, low=0.0, high=1e6)
        text = _text_config(top, model_type)
        if vision.out_hidden_size != text.hidden_size:
            raise CorruptCheckpoint(
                f"config.json: the vision tower gives {vision.out_hidden_size} channels, the text model takes "
                f"{text.hidden_size}"
            )
        image, video = _preprocessors(checkpoint)
        for reader in (image, video):
            _check_patches(reader, vision)
        return Qwen2VLConfig(
            vision=vision,
            text=text,
            tokens_per_second=tokens_per_second if second else None,
            image_limits=PixelLimits.from_hf(image, _IMAGE_LIMITS),
            video_limits=PixelLimits.from_hf(video, _VIDEO_LIMITS),
            image_mean=image.get_triple("image_mean", _CLIP_MEAN),
            image_std=image.get_triple("image_std", _CLIP_STD),
            rescale_factor=image.get_float("rescale_factor", default=1 / 255, low=0.0),
            media_tokens={
                "<|vision_start|>": _token_id(top, "vision_start", 151652, text.vocab_size),
                "<|vision_end|>": _token_id(top, "vision_end", 151653, text.vocab_size),
                "<|image_pad|>": _token_id(top, "image", 151655, 1 << 24),  # never looked up in the embedding
                "<|video_pad|>": _token_id(top, "video", 151656, 1 << 24),
            },
        )

    @property
    def factor(self) -> int:
        """Pixels of a token's side."""
        return self.vision.patch_size * self.vision.merge_size

    @property
    def marker_ids(self) -> tuple[int, int]:
        """Ids of the tokens before and behind a picture."""
        return self.media_tokens[_MARKERS[0]], self.media_tokens[_MARKERS[1]]


def _text_config(top: ConfigReader, model_type: str) -> DecoderConfig:
    """The text part: nested, or flat at the top as the hub has it. A head is tied if either level says so."""
    text = top.sub("text_config") if top.has("text_config") else top
    tied = [level.get_bool("tie_word_embeddings", default=False) for level in (top, text)]
    return replace(DecoderConfig.from_hf(text, model_type=model_type), tie_word_embeddings=any(tied))


def _token_id(top: ConfigReader, kind: str, default: int, num_ids: int) -> int:
    return top.get_int(f"{kind}_token_id", default=default, low=0, high=num_ids - 1)


def _preprocessors(checkpoint: Checkpoint) -> tuple[ConfigReader, ConfigReader]:
    """What is stored about pictures and about video frames.

    Each has a file; transformers 5 writes both into processor_config.json. The hub's preprocessor_config.json is about
    pictures: its limits are not those of the frames of a video.
    """
    both = checkpoint.read_json("processor_config.json") or {}

    def stored(file: str, key: str) -> ConfigReader:
        values = checkpoint.read_json(file)
        if values is not None:
            return ConfigReader(values, file=file)
        return ConfigReader(both, file="processor_config.json").sub(key, required=False)

    return stored("preprocessor_config.json", "image_processor"), stored(
        "video_preprocessor_config.json", "video_processor"
    )


def _check_patches(pre: ConfigReader, vision: QwenVitConfig) -> None:
    """The preprocessor may repeat the tower's sizes, and must not contradict them."""
    for key, expected in (
        ("patch_size", vision.patch_size),
        ("temporal_patch_size", vision.temporal_patch_size),
        ("merge_size", vision.merge_size),
    ):
        if pre.get_int(key, default=expected) != expected:
            pre.fail(key, f"{expected}, as config.json has it")


def rename(name: str) -> str | None:
    """Checkpoint name -> ours, for both naming schemes; None for what is known and not needed.

    hub files:        model.layers.0...                  lm_head   visual.blocks.0...
    re-saved, 4.52+:  model.language_model.layers.0...   lm_head   model.visual.blocks.0...
    """
    parts = name.split(".")
    if parts[-2:] == ["rotary_emb", "inv_freq"] or parts[-2:] == ["rotary_pos_emb", "inv_freq"]:
        return None
    if parts[0] == "lm_head":
        return ".".join(["language_model", *parts])
    if parts[0] == "model":
        inner = parts[1:]
        parts = inner if inner[:1] in (["language_model"], ["visual"]) else ["language_model", *inner]
    return ".".join(parts)


def smart_resize(height: int, width: int, factor: int, limits: PixelLimits) -> tuple[int, int]:
    """(height, width) of the resized picture: multiples of `factor`, the area within the limits.

    Sides are rounded to even, as Python does: 42 and 70 pixels both give 2 times 28. Raises ImageTooNarrow above 200:1.
    """
    if max(height, width) > _MAX_ASPECT * min(height, width):
        raise ImageTooNarrow(f"expected sides of at most {_MAX_ASPECT} to 1, got {width} x {height}", hint="crop it")
    new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
    if new_height * new_width > limits.most:
        shrink = math.sqrt(height * width / limits.most)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif new_height * new_width < limits.least:
        grow = math.sqrt(limits.least / (height * width))
        new_height, new_width = (math.ceil(side * grow / factor) * factor for side in (height, width))
    return new_height, new_width


def video_limits(limits: PixelLimits, num_frames: int, factor: int) -> PixelLimits:
    """The limits of a frame of a clip: a long one shares the reference's budget of tokens among its frames."""
    share = int(_VIDEO_TOKENS * factor * factor) * 2 // num_frames
    return PixelLimits(limits.least, max(min(limits.most, share), int(limits.least * _SMALLEST_CAP)))


class Qwen2VL(nn.Module):
    """The model as the engine sees it. Stateless: caches and positions are arguments.

    `positions` is the policy for tokens that survived pruning:
    regrid      of each axis, the i-th coordinate that is left takes the value of the i-th that there was: where a whole
                frame, row or column went, the rest moves up; seconds keep their scale
    original    everything stays where it was, the text behind it too
    contiguous  one position after the other, as for text
    """

    def __init__(self, config: Qwen2VLConfig, *, positions: PositionPolicy = "regrid") -> None:
        super().__init__()
        if positions not in POSITION_POLICIES:
            raise InvalidRequest(f"positions: expected one of {', '.join(POSITION_POLICIES)}, got {positions!r:.40}")
        self.config = config
        self.positions = positions
        self.visual = QwenVit(config.vision)
        self.language_model = Decoder(config.text)
        self.prompt: PromptFormat = ChatMLPrompt("You are a helpful assistant.")

    @staticmethod
    def from_checkpoint(checkpoint: Checkpoint, *, positions: PositionPolicy = "regrid") -> Qwen2VL:
        """The empty model of a checkpoint; build it under `torch.device("meta")`."""
        return Qwen2VL(Qwen2VLConfig.from_hf(checkpoint), positions=positions)

    @property
    def decoder(self) -> Decoder:
        return self.language_model

    @property
    def tower(self) -> VisionTower:
        return _Layers(self)

    @property
    def media_tokens(self) -> dict[str, int]:
        return self.config.media_tokens

    def rename(self, name: str) -> str | None:
        """`rename` of this file."""
        return rename(name)

    # Preprocessing

    def preprocess(self, frames: Frames) -> VisualInputs:
        """Every frame resized, uint8; `encode` cuts them into patches. The layout is (temporal patches, rows, columns).

        Raises ImageTooNarrow.
        """
        num_frames, height, width, _ = frames.rgb.shape
        limits = self.config.image_limits
        if frames.kind == "video":
            limits = video_limits(self.config.video_limits, num_frames, self.config.factor)
        size = smart_resize(height, width, self.config.factor, limits)
        pixels = np.stack([_resized(rgb, size) for rgb in frames.rgb])
        temporal, patch = self.config.vision.temporal_patch_size, self.config.vision.patch_size
        layout = (math.ceil(num_frames / temporal), size[0] // patch, size[1] // patch)
        token_map = self._token_map(layout, num_frames, _seconds_per_patch(frames, temporal))
        return VisualInputs(frames.kind, torch.from_numpy(pixels), layout, token_map)

    def patches(self, pixels: Tensor) -> Tensor:
        """Frames to normalised patches, tokens in reading order.

        pixels (frames, 3, H, W) uint8; a last frame without a partner is repeated. Returns (F, S, channels * frames *
        height * width) float32 on the same device, F temporal patches.
        """
        vision = self.config.vision
        missing = -len(pixels) % vision.temporal_patch_size
        pixels = torch.cat([pixels, pixels[-1:].expand(missing, -1, -1, -1)])
        block = (vision.merge_size, vision.patch_size)
        cut = pixels.unflatten(3, (-1, *block)).unflatten(2, (-1, *block))
        cut = cut.unflatten(0, (-1, vision.temporal_patch_size))  # (F, frames, 3, rows, 2, 14, cols, 2, 14)
        cut = cut.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).flatten(1, 4)  # (F, S, 3, frames, 14, 14)
        table = self._table().to(pixels.device)
        channels = [table[channel][cut[:, :, channel].int()] for channel in range(3)]
        return torch.stack(channels, dim=2).flatten(2)

    def _table(self) -> Tensor:
        """What each of the 256 values of a channel becomes, (3, 256) float32: computed once, as transformers does."""
        values = (np.arange(256, dtype=np.float64) * self.config.rescale_factor).astype(np.float32)
        mean, std = (np.array(x, dtype=np.float32)[:, None] for x in (self.config.image_mean, self.config.image_std))
        return torch.from_numpy((values - mean) / std)

    def _token_map(self, layout: tuple[int, int, int], num_frames: int, seconds: float) -> TokenMap:
        """The marker, the tokens frame by frame, the marker: in the grid at the times -1 and that behind the last."""
        merge = self.config.vision.merge_size
        shape = torch.tensor([layout[0], layout[1] // merge, layout[2] // merge])
        times, rows, cols = shape.tolist()
        grid = torch.cartesian_prod(torch.arange(times), torch.arange(rows), torch.arange(cols)).view(-1, 3)
        y, x = grid[:, 1] / rows, grid[:, 2] / cols
        boxes = torch.stack([y, x, (grid[:, 1] + 1) / rows, (grid[:, 2] + 1) / cols], dim=1)
        index = torch.cat([torch.tensor([[-1, 0, 0]]), grid, torch.tensor([[times, 0, 0]])])
        total = len(index)
        structural = torch.zeros(total, dtype=torch.bool)
        structural[[0, -1]] = True
        frame = (index[:, 0] * self.config.vision.temporal_patch_size).clamp(0, num_frames - 1)
        return TokenMap(
            media=torch.zeros(total, dtype=torch.int32),
            frame=frame.to(torch.int32),
            box=torch.cat([torch.zeros(1, 4), boxes, torch.zeros(1, 4)]),
            structural=structural,
            line=torch.full((total,), -1, dtype=torch.int32),
            grid=TokenGrid(
                index=index.to(torch.int32),
                shape=shape.to(torch.int32).expand(total, 3),
                seconds=torch.full((total,), seconds, dtype=torch.float32),
            ),
        )

    @property
    def default_frames(self) -> int:
        """Frames of a video whose caller names no number."""
        return DEFAULT_FRAMES

    @property
    def default_fps(self) -> float | None:
        """Of such a video: the rate of the reference. Qwen2-VL counts frames, so it tells it how fast things go."""
        return _FRAMES_PER_SECOND

    def tokens_per_frame(self) -> int:
        """Visual tokens of one video frame, at most: a smaller picture gives fewer."""
        per_patch = self.config.video_limits.most / self.config.factor**2
        return max(1, math.ceil(per_patch / self.config.vision.temporal_patch_size))

    # Vision

    def encode(
        self, inputs: VisualInputs, progress: ProgressFn = no_progress, *, with_keys: bool = False
    ) -> VisualTokens:
        """The vision tower, in chunks of frames; no mask over patches is ever made. Features are merged tokens."""
        layout = self.visual.layout(*inputs.layout[1:])
        weight = self.visual.weight
        marker = weight.new_zeros(1, self.config.text.hidden_size)
        features, marks = [marker], []  # saliency and, if asked for, keys
        for pixels in self._chunks(inputs, progress):
            patches = self.patches(pixels.to(weight.device)).to(weight.dtype)
            x, scores = self.visual(patches, layout, with_keys=with_keys)  # (F, tokens, D), (F, tokens, ...)
            features.append(x.flatten(0, 1))
            marks.append(scores.reshape(x.shape[0] * x.shape[1], -1))
        found = F.pad(torch.cat(marks), (0, 0, 1, 1))  # the markers have none
        return VisualTokens.of_marks(torch.cat([*features, marker]), inputs.token_map, found)

    def _chunks(self, inputs: VisualInputs, progress: ProgressFn) -> Iterator[Tensor]:
        """Some frames after the other, whole temporal patches of them."""
        _, rows, cols = inputs.layout
        step = max(1, _PATCHES_PER_CHUNK // (rows * cols)) * self.config.vision.temporal_patch_size
        total = len(inputs.pixels)
        for start in range(0, total, step):
            progress(Progress("encode", start, total, "frames"))
            yield inputs.pixels[start : start + step]
        progress(Progress("encode", total, total, "frames"))

    def embed_visual(self, tokens: VisualTokens) -> Tensor:
        """(N, hidden_size): the features, which the tower has projected; structural tokens become the markers."""
        token_map, features = tokens.token_map, tokens.features
        assert token_map.grid is not None
        behind = (token_map.grid.index[:, 0] >= 0).long().to(features.device)
        markers = self.decoder.embed(torch.tensor(self.config.marker_ids, device=features.device))
        structural = token_map.structural.to(features.device)
        return torch.where(structural[:, None], markers[behind], features)

    # Positions: time, row and column of the grid; text and markers have one value in all three

    def text_positions(self, num_tokens: int, start: int) -> tuple[Tensor, int]:
        """Positions (3, num_tokens) int64 from `start`, and the next free one."""
        return torch.arange(start, start + num_tokens).expand(3, -1), start + num_tokens

    def visual_positions(self, token_map: TokenMap, start: int) -> tuple[Tensor, int]:
        """Positions (3, N) int64 of all that survived of one item, and the next free one: the largest plus one."""
        assert token_map.grid is not None
        index = token_map.grid.index.long()
        before, behind = ((token_map.structural & side) for side in (index[:, 0] < 0, index[:, 0] >= 0))
        first, _ = self.text_positions(int(before.sum()), start)
        inside = ~token_map.structural
        positions = torch.empty(3, len(token_map), dtype=torch.int64)
        positions[:, before] = first
        start += first.shape[1]
        if inside.any():
            places, extent = self._places(token_map.grid.select(inside.nonzero()[:, 0]))
            positions[:, inside] = places + start
            start += extent
        last, start = self.text_positions(int(behind.sum()), start)
        positions[:, behind] = last
        return positions, start

    def _places(self, grid: TokenGrid) -> tuple[Tensor, int]:
        """(3, k) int64 from 0 for the survivors of one item, by the policy, and how many positions they take."""
        num_times, num_rows, num_cols = grid.shape[0].tolist()
        times = self.frame_times(num_times, float(grid.seconds[0]))
        time, row, col = grid.index.long().unbind(1)
        if self.positions == "contiguous":
            return torch.arange(len(row)).expand(3, -1), len(row)
        places = torch.stack([times[time], row, col])
        if self.positions == "original":
            return places, int(max(times[-1], num_rows - 1, num_cols - 1)) + 1
        originals = (times.unique(), torch.arange(num_rows), torch.arange(num_cols))
        ranks = [axis.unique(return_inverse=True)[1] for axis in places]
        places = torch.stack([values[rank] for values, rank in zip(originals, ranks, strict=True)])
        return places, int(places.max()) + 1

    def frame_times(self, num_times: int, seconds: float) -> Tensor:
        """Position of each temporal patch within its item, (num_times,) int64; `seconds` from one to the next.

        In float32 and from left to right, as the model was trained: in float64 some frames would move by one.
        """
        steps = torch.arange(num_times)
        if self.config.tokens_per_second is None or num_times == 1:
            return steps
        return (steps * seconds * self.config.tokens_per_second).long()


@dataclass(frozen=True, eq=False)
class _Layers:
    """The vision tower, layer by layer."""

    model: Qwen2VL

    @property
    def blocks(self) -> nn.ModuleList:
        return self.model.visual.blocks

    def batches(self, media: Sequence[VisualInputs], limit: int) -> list[TowerBatch]:
        """At most `limit` temporal patches of all media together, the same number of each; one batch an item."""
        media = media[:limit]
        num_frames = limit // len(media) * self.model.config.vision.temporal_patch_size
        return [self._batch(item.pixels[:num_frames], item.layout) for item in media]

    def _batch(self, pixels: Tensor, layout: tuple[int, ...]) -> TowerBatch:
        tower = self.model.visual
        held = tower.layout(*layout[1:])

        def run(layer: nn.Module, _: int, x: Tensor) -> Tensor:
            out: Tensor = layer(x, held, score=False)[0]
            return out

        patches = self.model.patches(pixels.to(tower.weight.device)).to(tower.weight.dtype)
        return TowerBatch(tower.embed(patches, held), run)


def _resized(rgb: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(H, W, 3) uint8 -> (3, height, width) uint8."""
    picture = Image.fromarray(rgb).resize((size[1], size[0]), Image.Resampling.BICUBIC)
    return np.asarray(picture).transpose(2, 0, 1)


def _seconds_per_patch(frames: Frames, temporal_patch_size: int) -> float:
    """From one temporal patch to the next, by the mean time between the frames; 0 for a single one."""
    gaps = len(frames.timestamps) - 1
    if frames.kind == "image" or gaps < 1:
        return 0.0
    return temporal_patch_size * float(frames.timestamps[-1] - frames.timestamps[0]) / gaps
