"""The three hooks of a sparsity method, and the dense method that does nothing in them.

A method is a frozen dataclass of hyper-parameters. It returns what stays; runner and cache apply it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ...models.interface import MediaKind, TokenMap, VisualTokens
from ..config import Sparsity

# Which rows of the prompt a method wants scored in a layer's prefill: the last one, or all after the last visual token.
Rows = Literal["last", "question"]


def keep_count(n: int, removed: float) -> int:
    """How many of n tokens stay: round-half-up of (1 - removed) n, at least one, at most n."""
    return min(n, max(1, math.floor((1 - removed) * n + 0.5)))


@dataclass(frozen=True, eq=False)
class Survivors:
    """What enters the language model of one media item."""

    tokens: VisualTokens  # M tokens, pruned or merged
    sources: Tensor  # (M,) int64, ascending: the encoder's token that each is or, if merged, stands for

    @staticmethod
    def of(tokens: VisualTokens, keep: Tensor) -> Survivors:
        """The encoder's tokens `keep`, unchanged."""
        return Survivors(tokens.select(keep), keep)


@dataclass(frozen=True)
class Method:
    """The dense method, and the base of the others. `prefill` and `decode` are fractions removed."""

    prefill: float = 0.0
    decode: float = 0.0

    @staticmethod
    def from_policy(sparsity: Sparsity) -> Method:
        """The method with what a request asks of it."""
        return Method()

    # A method that compares the encoder's keys gets them with the tokens.
    needs_keys = False
    # A method that needs the question while the media are prefilled gets them as [media | question].
    needs_question = False

    @property
    def scores_turn(self) -> bool:
        """Whether `on_turn` wants the question's scores of the visual store."""
        return False

    def planned_keep(self, token_map: TokenMap, kind: MediaKind) -> int:
        """How many non-structural tokens `on_vision` will keep, at most: known before the encoder has run."""
        return token_map.num_visual

    def on_vision(self, tokens: VisualTokens, kind: MediaKind) -> Survivors | None:
        """What of the encoder's tokens enters the language model, or None for all of them."""
        return None

    def layer_rows(self, layer: int) -> Rows | None:
        """Which rows' scores `on_layer` needs after this layer."""
        return None

    def on_layer(self, layer: int, scores: Tensor) -> Tensor | None:
        """Permanent pruning inside the language model.

        scores (N,) float32: mean attention that the wanted rows give each visual token of this prefill that is still
        there. Returns the ascending indices of those that go on to the next layer, or None for all.
        """
        return None

    def on_turn(self, scores: Sequence[Tensor]) -> list[Tensor] | None:
        """What this turn may read: scores (N,) float32 per layer -> ascending indices, None for all."""
        return None
