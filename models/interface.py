"""The values that travel between files, and what a vision-language model must offer.

Every value is frozen. Where a visual token came from travels with it (`TokenMap`) and is
never guessed again from a length.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .decoder import Decoder
    from .vision_tower import VisionTower

MediaKind = Literal["image", "video"]

DEFAULT_FRAMES = 32  # of a video whose caller names no number, where the model's config names none either


@dataclass(frozen=True)
class Progress:
    """One step of a long stage. `total` is None where it is not known beforehand."""

    stage: str  # "load", "decode", "encode", "prefill"
    done: int
    total: int | None
    unit: str  # "bytes", "frames", "tokens"


# Called between units of work; it may raise, and what it raises stops the work. That is how a turn is cancelled.
ProgressFn = Callable[[Progress], None]


def no_progress(_: Progress) -> None:
    """The progress callback of callers that want none."""


@dataclass(frozen=True)
class Frames:
    """Decoded media: an image is one frame at time 0."""

    kind: MediaKind
    rgb: np.ndarray  # (T, H, W, 3) uint8, rotation applied
    timestamps: np.ndarray  # (T,) float64 seconds from the start of the file, increasing
    source: str  # what the user typed, or "<bytes>", "<array>"; for display only, never a cache key
    duration_s: float  # of the whole file; 0 for an image
    key: str  # sha256 hex over kind, shape, timestamps and pixels: the identity of this media in caches
    notes: tuple[str, ...] = ()  # plain sentences for the user, e.g. "3 frames used: the clip has no more"

    def __post_init__(self) -> None:
        if self.rgb.ndim != 4 or self.rgb.shape[-1] != 3 or self.rgb.dtype != np.uint8:
            raise ValueError(f"expected rgb (T, H, W, 3) uint8, got {self.rgb.shape} {self.rgb.dtype}")
        if self.timestamps.shape != (self.rgb.shape[0],):
            raise ValueError(f"expected {self.rgb.shape[0]} timestamps, got shape {self.timestamps.shape}")


@dataclass(frozen=True)
class TokenGrid:
    """Where each of N visual tokens stands in its item's grid, for models whose positions have three axes."""

    index: Tensor  # (N, 3) int32: temporal patch, row, column
    shape: Tensor  # (N, 3) int32: how many of each the item has, pruned or not
    seconds: Tensor  # (N,) float32, from one temporal patch to the next; 0 for an image

    def select(self, keep: Tensor) -> TokenGrid:
        """The places of the tokens `keep` (k,) int64, in that order."""
        return TokenGrid(self.index[keep], self.shape[keep], self.seconds[keep])

    @staticmethod
    def concat(grids: Sequence[TokenGrid | None]) -> TokenGrid | None:
        """One grid after the other; None unless all are there."""
        found = [grid for grid in grids if grid is not None]
        if len(found) < len(grids):
            return None
        return TokenGrid(
            index=torch.cat([grid.index for grid in found]),
            shape=torch.cat([grid.shape for grid in found]),
            seconds=torch.cat([grid.seconds for grid in found]),
        )


@dataclass(frozen=True)
class TokenMap:
    """Where each of N visual tokens comes from, in source-picture fractions."""

    media: Tensor  # (N,) int32, number of the media item in the session, from 0
    frame: Tensor  # (N,) int32, index into Frames.rgb
    box: Tensor  # (N, 4) float32: y0, x0, y1, x1 as fractions of the source picture
    structural: Tensor  # (N,) bool: an image_newline, a frame separator, a marker; always attended, never ranked
    line: Tensor  # (N,) int32: the row whose newline closes it, -1 where no newline does
    grid: TokenGrid | None = None  # of N tokens; None where positions have one axis

    def __len__(self) -> int:
        return self.frame.shape[0]

    @property
    def num_visual(self) -> int:
        """Tokens that can be pruned and ranked: all but the structural ones."""
        return int((~self.structural).sum())

    def select(self, keep: Tensor) -> TokenMap:
        """The map of the tokens `keep` (k,) int64, in that order."""
        grid = None if self.grid is None else self.grid.select(keep)
        return TokenMap(
            self.media[keep], self.frame[keep], self.box[keep], self.structural[keep], self.line[keep], grid
        )

    def with_media(self, media: int) -> TokenMap:
        """The same map under the media number `media`."""
        return dataclasses.replace(self, media=torch.full_like(self.media, media))

    @staticmethod
    def concat(maps: Sequence[TokenMap]) -> TokenMap:
        """One map after the other; an empty sequence gives an empty map."""
        if not maps:
            none = torch.empty(0, dtype=torch.int32)
            return TokenMap(none, none, torch.empty(0, 4), torch.empty(0, dtype=torch.bool), none)
        return TokenMap(
            media=torch.cat([m.media for m in maps]),
            frame=torch.cat([m.frame for m in maps]),
            box=torch.cat([m.box for m in maps]),
            structural=torch.cat([m.structural for m in maps]),
            line=torch.cat([m.line for m in maps]),
            grid=TokenGrid.concat([m.grid for m in maps]),
        )


@dataclass(frozen=True)
class VisualInputs:
    """What a model's preprocessing made of one media item."""

    kind: MediaKind
    pixels: Tensor  # on the CPU: (tiles, 3, H, W) float32, normalised; or (frames, 3, H, W) uint8 for `encode` to cut
    layout: tuple[int, ...]  # the model's own note for `encode`, e.g. the tile grid and the unpadding
    token_map: TokenMap  # of the tokens that `encode` will return, media number 0


@dataclass(frozen=True)
class VisualTokens:
    """Encoded media. Features are the vision tower's where the projector is per token."""

    features: Tensor  # (N, D); rows of structural tokens are zero and are filled by the model's `embed_visual`
    token_map: TokenMap  # N tokens
    saliency: Tensor | None  # (N,) float32, attention received in the encoder; 0 for structural tokens
    # (N, Dk) float32, mean over heads of the keys of the layer whose saliency it is; 0 for structural tokens. None
    # unless asked for: methods that merge like with like compare them.
    keys: Tensor | None = None

    @staticmethod
    def of_marks(features: Tensor, token_map: TokenMap, marks: Tensor) -> VisualTokens:
        """marks (N, 1 + Dk) float32: saliency, then the key where one was asked for."""
        return VisualTokens(features, token_map, marks[:, 0], marks[:, 1:] if marks.shape[1] > 1 else None)

    def __post_init__(self) -> None:
        if self.features.shape[0] != len(self.token_map):
            raise ValueError(f"expected one feature per token, got {self.features.shape[0]} for {len(self.token_map)}")

    def __len__(self) -> int:
        return self.features.shape[0]

    def select(self, keep: Tensor) -> VisualTokens:
        """The tokens `keep` (k,) int64; positions in the source travel along."""
        saliency = None if self.saliency is None else self.saliency[keep]
        keys = None if self.keys is None else self.keys[keep]
        return VisualTokens(self.features[keep], self.token_map.select(keep), saliency, keys)


@dataclass(frozen=True)
class Special:
    """A special token by name, e.g. `Special("</s>")`. What a user types is never one."""

    name: str


# A prompt before tokenising: text as it stands, or a special token.
PromptPiece = str | Special


class PromptFormat(Protocol):
    """How one family writes a conversation. Pure functions of text: no tokenizer, no cache."""

    def opening(self, *, first: bool, system: str | None) -> list[PromptPiece]:
        """What stands before a user's media or text; `first` for the first turn of a conversation."""
        ...

    def between_media(self) -> list[PromptPiece]:
        """What stands between two media of one turn."""
        ...

    def question(self, text: str, *, after_media: bool) -> list[PromptPiece]:
        """The user's text up to the point where the answer begins."""
        ...

    def closing(self) -> list[PromptPiece]:
        """What stands after an answer, before the next turn's opening."""
        ...


class VisionLanguageModel(Protocol):
    """What the engine needs of a model. Stateless: caches, positions and generators are arguments."""

    prompt: PromptFormat

    @property
    def decoder(self) -> Decoder:
        """The language model; the runner loops over its layers."""
        ...

    @property
    def tower(self) -> VisionTower:
        """The vision tower, layer by layer."""
        ...

    @property
    def media_tokens(self) -> dict[str, int]:
        """Names of media tokens and their ids in the config, to check the tokenizer against."""
        ...

    @property
    def default_frames(self) -> int:
        """Frames of a video whose caller names no number; fewer where they do not fit."""
        ...

    @property
    def default_fps(self) -> float | None:
        """No more frames a second than this of such a video; None where the model does not say."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """Every weight."""
        ...

    def modules(self) -> Iterator[nn.Module]:
        """The model itself and every part of it, as `nn.Module` has it."""
        ...

    def preprocess(self, frames: Frames) -> VisualInputs:
        """Pixels to patches, and the map of the tokens they will become."""
        ...

    def encode(
        self, inputs: VisualInputs, progress: ProgressFn = no_progress, *, with_keys: bool = False
    ) -> VisualTokens:
        """The vision tower, in bounded memory; the keys of its tokens where they are asked for."""
        ...

    def embed_visual(self, tokens: VisualTokens) -> Tensor:
        """(N, hidden_size): what enters the language model."""
        ...

    def text_positions(self, num_tokens: int, start: int) -> tuple[Tensor, int]:
        """Positions (num_tokens,) int64, or (3, num_tokens) by time, row and column; and the next free one."""
        ...

    def visual_positions(self, token_map: TokenMap, start: int) -> tuple[Tensor, int]:
        """Positions (N,) or (3, N) int64 of all that survived of one item, and the next free one."""
        ...

    def tokens_per_frame(self) -> int:
        """Visual tokens of one video frame, at most, for choosing how many frames fit."""
        ...
