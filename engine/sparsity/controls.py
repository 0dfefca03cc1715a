"""Controls: what an answer is worth without the picture.

The control of a smaller picture is no method: towers of a fixed size scale it up again, and only the preprocessing of
a family knows how many tokens a picture becomes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...models.interface import MediaKind, TokenMap, VisualTokens
from ..config import Sparsity
from .base import Method, Survivors


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
