"""Positions of one dimension."""

from __future__ import annotations

import torch
from torch import Tensor

from .interface import TokenMap


class ContiguousPositions:
    """One position a token, text or visual, contiguous: as if the pruned tokens had never been."""

    def text_positions(self, num_tokens: int, start: int) -> tuple[Tensor, int]:
        """Positions (num_tokens,) int64 from `start`, and the next free one."""
        return torch.arange(start, start + num_tokens), start + num_tokens

    def visual_positions(self, token_map: TokenMap, start: int) -> tuple[Tensor, int]:
        """Positions of the surviving visual tokens, and the next free one."""
        return self.text_positions(len(token_map), start)
