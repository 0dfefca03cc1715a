"""SparseVILA: query-agnostic pruning in prefill, query-aware retrieval in decode.

Source: arXiv 2510.17777, section 3. Readings that the paper leaves open are switches of `Sparsity`; the defaults
are those of docs/architecture.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ...kernels.top_k import top_k
from ...models.interface import MediaKind, TokenMap, VisualTokens
from ..config import Sparsity
from .base import Method, Survivors, keep_count


@dataclass(frozen=True)
class SparseVILA(Method):
    """`scope` is what prefill ranks together in a video: each frame on its own, or all frames at once.

    Images rank all their tiles together. Ranking is by top-k, ties to the lower index, so counts are static.
    """

    scope: Literal["per_frame", "global"] = "per_frame"

    @staticmethod
    def from_policy(sparsity: Sparsity) -> SparseVILA:
        return SparseVILA(sparsity.prefill, sparsity.decode, sparsity.scope)

    @property
    def scores_turn(self) -> bool:
        return self.decode > 0

    def _groups(self, token_map: TokenMap, kind: MediaKind) -> list[Tensor]:
        """Indices of the tokens that compete with each other; structural tokens do not compete."""
        ranked = torch.nonzero(~token_map.structural)[:, 0]
        if kind == "image" or self.scope == "global":
            return [ranked]
        frames = token_map.frame[ranked]
        return [ranked[frames == frame] for frame in frames.unique()]

    def planned_keep(self, token_map: TokenMap, kind: MediaKind) -> int:
        if self.prefill == 0:
            return token_map.num_visual
        return sum(keep_count(len(group), self.prefill) for group in self._groups(token_map, kind) if len(group))

    def on_vision(self, tokens: VisualTokens, kind: MediaKind) -> Survivors | None:
        if self.prefill == 0:
            return None
        merit = self._token_merit(tokens)
        keep = torch.zeros(len(tokens), dtype=torch.bool)
        for group in self._groups(tokens.token_map, kind):
            if len(group):
                keep[group[top_k(merit[group][None], keep_count(len(group), self.prefill))[0]]] = True
        return Survivors.of(tokens, torch.nonzero(keep | standing(tokens.token_map, keep))[:, 0])

    def _token_merit(self, tokens: VisualTokens) -> Tensor:
        """What prefill ranks by, (N,) float32 on the CPU."""
        assert tokens.saliency is not None, "the encoder gave no saliency"
        return tokens.saliency.cpu()

    def on_turn(self, scores: Sequence[Tensor]) -> list[Tensor] | None:
        if self.decode == 0:
            return None
        scores = self._turn_merit(scores)
        lengths = {len(layer) for layer in scores}
        if len(lengths) == 1:  # all layers in one call
            return list(top_k(torch.stack(list(scores)), keep_count(lengths.pop(), self.decode)))
        return [top_k(layer[None], keep_count(len(layer), self.decode))[0] for layer in scores]

    def _turn_merit(self, scores: Sequence[Tensor]) -> Sequence[Tensor]:
        """What a turn ranks by, (N,) float32 per layer: the scores themselves."""
        return scores


def standing(token_map: TokenMap, keep: Tensor) -> Tensor:
    """Structural tokens that stay, (N,) bool: a newline falls with the last token of its row."""
    survivors = token_map.line[keep].unique()
    has_survivor = torch.isin(token_map.line, survivors) | (token_map.line < 0)
    return token_map.structural & has_survivor
