"""PyramidDrop: fewer visual tokens from quarter to quarter of the decoder, renumbered each time.

Source: Xing et al., arXiv 2410.17247, section 3, and the authors' code: before layers 8, 16 and 24 of 32, the last
instruction token's attention by that layer's own projections, softmax over the whole row and mean over heads, ranks the
visual tokens; the share lambda of them goes on. Later tokens move up, so every quarter counts its own positions, in
decoding and in later turns too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar

from ..config import Sparsity
from .base import Rows, StagedPruning, met_on_average


@dataclass(frozen=True)
class PDrop(StagedPruning):
    """`prefill` is the fraction of visual tokens that layers miss on average: below 0.75, the first quarter sees all.

    Lambda follows from it: 0.53125 is the paper's setting, 50, 25 and 12.5 % in the last three quarters. Counts round
    half up, where the authors cut off. On three axes tokens move up as the model places survivors.
    """

    rows: ClassVar[Rows] = "before"
    renumbers = True

    @staticmethod
    def from_policy(sparsity: Sparsity) -> PDrop:
        return PDrop(sparsity.prefill, sparsity.decode)

    def at_depth(self, num_layers: int) -> PDrop:
        if self.prefill == 0:
            return self
        starts = sorted({num_layers * quarter // 4 for quarter in (1, 2, 3)} - {0})
        lengths = [after - before for before, after in pairwise([0, *starts, num_layers])]

        def shares(x: float) -> Sequence[float]:
            return [x**stage for stage in range(1, len(starts) + 1)]

        removed = met_on_average("pdrop", self.prefill, lengths, shares)
        return replace(self, stages=tuple(zip(starts, removed, strict=True)))
