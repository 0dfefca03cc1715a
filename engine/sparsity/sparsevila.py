"""SparseVILA: query-agnostic pruning in prefill, query-aware retrieval in decode.

Source: arXiv 2510.17777, section 3. Readings that the paper leaves open are switches of `Sparsity`; the defaults
are those of docs/architecture.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ...kernels.top_k import top_k
from ...models.interface import MediaKind, TokenMap, VisualTokens
from ..config import Positions, Sparsity
from .base import Method, Survivors, keep_count
from .budgets import by_mass
from .diversity import diverse

RETRIEVAL_SWITCHES = frozenset({"budgets", "score_layers", "sets", "sinks", "refresh", "rerotate"})


@dataclass(frozen=True)
class SparseVILA(Method):
    """`scope` is what prefill ranks together in a video: each frame on its own, or all frames at once.

    Images rank all their tiles together. Ranking is by top-k, ties to the lower index, so counts are static. The other
    switches are ours and go beyond the paper; docs/architecture.md says what each computes.
    """

    scope: Literal["per_frame", "global"] = "per_frame"
    _: KW_ONLY
    positions: Positions = "auto"
    budgets: Literal["equal", "mass"] = "equal"
    score_layers: Literal["own", "middle"] = "own"
    sets: Literal["shared", "per_kv_head"] = "shared"
    sinks: int = 0
    refresh: int = 0
    diversity: float = 0.0
    rerotate: bool = False
    switches: ClassVar[frozenset[str]] = RETRIEVAL_SWITCHES | {"scope", "positions", "diversity"}

    @classmethod
    def from_policy(cls, sparsity: Sparsity) -> SparseVILA:
        return cls(sparsity.prefill, sparsity.decode, **{name: getattr(sparsity, name) for name in cls.switches})

    @property
    def scores_turn(self) -> bool:
        return self.decode > 0

    @property
    def scores_per_head(self) -> bool:
        return self.sets == "per_kv_head"

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
        keep = torch.zeros(len(tokens), dtype=torch.bool)
        groups = [group for group in self._groups(tokens.token_map, kind) if len(group)]
        for stays in self._most_salient(tokens, groups) if self.diversity == 0 else self._diverse(tokens, groups):
            keep[stays] = True
        return Survivors.of(tokens, torch.nonzero(keep | standing(tokens.token_map, keep))[:, 0])

    def _most_salient(self, tokens: VisualTokens, groups: list[Tensor]) -> Iterator[Tensor]:
        merit = self._token_merit(tokens)
        for group in groups:
            yield group[top_k(merit[group][None], keep_count(len(group), self.prefill))[0]]

    def _diverse(self, tokens: VisualTokens, groups: list[Tensor]) -> Iterator[Tensor]:
        merit = self._token_merit(tokens)
        for size in {len(group) for group in groups}:
            members = torch.stack([group for group in groups if len(group) == size])
            count = keep_count(size, self.prefill)
            stays = diverse(merit[members], tokens.features[members], count, self.diversity)
            yield members.gather(1, stays)

    def _token_merit(self, tokens: VisualTokens) -> Tensor:
        """What prefill ranks by, (N,) float32 on the CPU."""
        assert tokens.saliency is not None, "the encoder gave no saliency"
        return tokens.saliency.cpu()

    def on_turn(self, scores: Sequence[Tensor]) -> list[Tensor] | None:
        return self._retrieved(scores, None)

    def on_turn_with(self, scores: Sequence[Tensor], saliency: Callable[[], Tensor]) -> list[Tensor] | None:
        if self.decode == 0 or self.sinks == 0:
            return self.on_turn(scores)
        pinned = min(self.sinks, *(keep_count(layer.shape[-1], self.decode) for layer in scores))
        return self._retrieved(scores, top_k(saliency()[None], pinned)[0])

    def _retrieved(self, scores: Sequence[Tensor], pinned: Tensor | None) -> list[Tensor] | None:
        """The best of each layer or, of scores (H_kv, N), of each of its key heads; those that are pinned first."""
        if self.decode == 0:
            return None
        scores = self._turn_merit(scores)
        if self.score_layers == "middle":
            scores = middle(scores)
        counts = [keep_count(layer.shape[-1], self.decode) for layer in scores]
        if self.budgets == "mass":
            counts = by_mass([layer.mean(dim=0) if layer.ndim == 2 else layer for layer in scores], counts, pinned)
        if pinned is not None:
            scores = [layer.index_fill(-1, pinned, torch.inf) for layer in scores]
        sizes = {(layer.shape, count) for layer, count in zip(scores, counts, strict=True)}
        if len(sizes) == 1:  # all layers in one call
            return list(_best(torch.stack(list(scores)), counts[0]))
        return [_best(layer, count) for layer, count in zip(scores, counts, strict=True)]

    def _turn_merit(self, scores: Sequence[Tensor]) -> Sequence[Tensor]:
        """What a turn ranks by, (N,) float32 per layer: the scores themselves."""
        return scores


def _best(scores: Tensor, count: int) -> Tensor:
    """(..., N) -> indices (..., count), ascending."""
    return top_k(scores.reshape(-1, scores.shape[-1]), count).reshape(*scores.shape[:-1], count)


def middle(scores: Sequence[Tensor]) -> list[Tensor]:
    """The mean of the middle third of layers, for every layer: rounded up to as many on both sides.

    Shallow and deep layers look at a few tokens whatever is asked.
    """
    num_layers = len(scores)
    third = num_layers // 3
    return [torch.stack(list(scores[third : num_layers - third])).mean(dim=0)] * num_layers


def standing(token_map: TokenMap, keep: Tensor) -> Tensor:
    """Structural tokens that stay, (N,) bool: a newline falls with the last token of its row."""
    survivors = token_map.line[keep].unique()
    has_survivor = torch.isin(token_map.line, survivors) | (token_map.line < 0)
    return token_map.structural & has_survivor
