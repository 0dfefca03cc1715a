"""FastV: after the first layers, keep what the last token of the prompt looks at.

Source: Chen et al., arXiv 2403.06764, section 4, and the authors' code: layers 0 to K - 1 see everything; in layer
K - 1 the last prompt token's attention, mean over heads, ranks the visual tokens; from layer K on the lowest are gone,
for good, and the rest keep their positions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ...errors import InvalidRequest
from ..config import Sparsity
from .base import StagedPruning


@dataclass(frozen=True)
class FastV(StagedPruning):
    """`prefill` is the fraction removed behind layer `dense_layers` (the paper's R), not an average over layers.

    What layers read on average a turn's `layer_tokens` tell.
    """

    dense_layers: int = 2  # the paper's K

    @staticmethod
    def from_policy(sparsity: Sparsity) -> FastV:
        return FastV(sparsity.prefill, sparsity.decode)

    def at_depth(self, num_layers: int) -> FastV:
        if self.prefill == 0:
            return self
        if num_layers <= self.dense_layers:
            raise InvalidRequest(f"fastv: expected more than {self.dense_layers} decoder layers, got {num_layers}")
        return replace(self, stages=((self.dense_layers - 1, self.prefill),))
