"""Controls: what an answer is worth without the picture, and with a smaller one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from ...models.interface import MediaKind, TokenMap, VisualTokens
from ..config import Positions, Sparsity
from .base import SHRINK_TOLERANCE, Method, Survivors, keep_count
from .sparsevila import RETRIEVAL_SWITCHES, SparseVILA


@dataclass(frozen=True)
class NoTokens(Method):
    """Nothing of a picture or a clip enters, structural tokens included, whatever the policy's fractions are.

    The media are encoded all the same. What is right here can be told from the text alone.
    """

    @staticmethod
    def from_policy(sparsity: Sparsity) -> NoTokens:
        return NoTokens()

    def planned_keep(self, token_map: TokenMap, kind: MediaKind) -> int:
        return 0

    def on_vision(self, tokens: VisualTokens, kind: MediaKind) -> Survivors | None:
        return Survivors.of(tokens, torch.empty(0, dtype=torch.int64))


@dataclass(frozen=True)
class Resize(SparseVILA):
    """The picture, or every frame, scaled down to about as many tokens as the policy keeps, then encoded whole.

    It acts before the encoder, so it is the engine that scales (`engine/shrink.py`). Which sizes there are is the
    family's own matter: any for Qwen's, some for pictures cut into tiles; where every picture or frame becomes the same
    number of tokens, a turn raises InvalidRequest. `decode` adds SparseVILA's retrieval.
    """

    positions: Positions = field(default="contiguous", kw_only=True)  # what is left is whole
    switches: ClassVar[frozenset[str]] = RETRIEVAL_SWITCHES

    @property
    def shrinks_by(self) -> float:
        return self.prefill

    def planned_keep(self, token_map: TokenMap, kind: MediaKind) -> int:
        wanted = keep_count(token_map.num_visual, self.prefill)
        return min(token_map.num_visual, int(wanted * (1 + SHRINK_TOLERANCE)))

    def on_vision(self, tokens: VisualTokens, kind: MediaKind) -> Survivors | None:
        return None
