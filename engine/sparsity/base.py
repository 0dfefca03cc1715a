"""The three hooks of a sparsity method, and the dense method that does nothing in them.

A method is a frozen dataclass of hyper-parameters. It returns what stays; runner and cache apply it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ...errors import InvalidRequest
from ...kernels.top_k import top_k
from ...models.interface import MediaKind, TokenMap, VisualTokens
from ..config import Positions, Sparsity
from ..head_scores import HeadScores
from ..head_sets import HeadSets

# Which rows of the prompt a method wants scored in a layer's prefill: the last one, all after the last visual token, or
# those of them that `raters` chose. "before" is the last one too, by the projections of the layer before it has run:
# what `on_layer` drops then does not enter this layer.
Rows = Literal["last", "question", "raters", "before"]


# How far the number of tokens of a smaller picture may be from what `shrinks_by` asks for, as a fraction of that.
SHRINK_TOLERANCE = 0.25


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

    def __str__(self) -> str:
        """Its class and hyper-parameters, for reports: the fractions, and what is not at its default."""
        shown = [f"{name}={getattr(self, name):g}" for name in ("prefill", "decode")]
        for one in fields(self):
            value = getattr(self, one.name)
            if one.repr and one.name not in ("prefill", "decode") and value != one.default:
                shown.append(f"{one.name}={value}")
        return f"{type(self).__name__}({', '.join(shown)})"

    @staticmethod
    def from_policy(sparsity: Sparsity) -> Method:
        """The method with what a request asks of it."""
        return Method()

    # The switches of a policy that mean something to the method; it refuses the others (`engine/switches.py`).
    switches: ClassVar[frozenset[str]] = frozenset()
    # A method that compares the encoder's keys gets them with the tokens.
    needs_keys = False
    # Whether tokens behind a pruned one move up, in the layers that it is missing from; else all keep their positions.
    renumbers = False

    @property
    def positions(self) -> Positions:
        """Where what survives `on_vision` stands, where positions have one axis (`Sparsity.positions`)."""
        return "contiguous"

    @property
    def needs_question(self) -> bool:
        """Whether it needs the question while the media are prefilled: it gets them as [media | question]."""
        return False

    def at_depth(self, num_layers: int) -> Method:
        """The method for a decoder of that many layers. Raises InvalidRequest where what was asked cannot be met."""
        return self

    @property
    def shrinks_by(self) -> float:
        """Fraction of its tokens that a medium is to lose by being scaled down; 0: it is encoded as it is."""
        return 0.0

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
        """Which rows' scores `on_layer` needs at this layer."""
        return None

    def raters(self, visual: Iterable[Tensor], text: Tensor) -> Tensor:
        """Which rows after the media rate, (T,) bool; asked once, with what enters the decoder.

        visual: (M, hidden_size) each, one behind the other all visual tokens; text (T, hidden_size).
        """
        return torch.ones(len(text), dtype=torch.bool, device=text.device)

    def on_layer(self, layer: int, scores: Tensor) -> Tensor | None:
        """Permanent pruning inside the language model.

        scores (N,) float32: mean attention that the wanted rows give each visual token of this prefill that is still
        there. Returns the ascending indices of those that go on to the next layer, or None for all.
        """
        return None

    # Whether `recycle` is asked where `on_layer` drops tokens. Such a method renumbers.
    recycles = False

    def recycle(self, hidden: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """New tokens in place of those that `on_layer` dropped; they stand behind the media, in front of the question.

        hidden (P, hidden_size) of the dropped tokens, P > 0; scores (P,) float32. Returns m tokens (m, hidden_size)
        and, no two alike, (m,) int64: the dropped token that each stands for in reports.
        """
        return hidden[:0], torch.empty(0, dtype=torch.int64)

    @property
    def needs_head_scores(self) -> bool:
        """Whether it needs to know how well each attention head sees (`engine/head_scores.py`)."""
        return False

    @property
    def head_scores_file(self) -> str | None:
        """Where those scores are; None: beside the checkpoint."""
        return None

    def with_head_scores(self, scores: HeadScores, num_kv_heads: int) -> Method:
        """The method with the scores of every layer's query heads."""
        return self

    @property
    def window(self) -> int:
        """How many of the last rows behind the media `on_heads` needs, at most; 0: it is not asked."""
        return 0

    def on_heads(self, layer: int, scores: Tensor) -> Sequence[Tensor]:
        """What each key head keeps of one prefill's visual tokens at a layer, for good; all go on to the next layer.

        scores (H_kv, N) float32: mean attention of those rows to each visual token of this prefill, over the query
        heads of a key head. Returns ascending indices (k_h,), at least one, for each head. Such a method needs the
        question.
        """
        return [torch.arange(scores.shape[1], device=scores.device)] * len(scores)

    @property
    def scores_per_head(self) -> bool:
        """Whether `on_turn` wants the scores of each key head by itself."""
        return False

    def on_turn(self, scores: Sequence[Tensor]) -> Sequence[HeadSets] | None:
        """What this turn may read, per layer: ascending indices, None for all.

        scores, per layer float32: (N,) -> (k,), shared by the key heads. With `scores_per_head` (H_kv, N), -1 where a
        head has no such entry -> also (H_kv, k), or H_kv times (k_h,), at least one.
        """
        return None

    def on_turn_with(self, scores: Sequence[Tensor], saliency: Callable[[], Tensor]) -> Sequence[HeadSets] | None:
        """`on_turn`, for a method that also wants how much the encoder looks at each entry: saliency() (N,) float32."""
        return self.on_turn(scores)

    # Tokens of an answer after which `on_turn` is asked again, with what those tokens look at; 0: once a turn.
    refresh = 0
    # Whether what a turn reads of a medium moves up to contiguous positions that end where the medium's last token is.
    rerotate = False


@dataclass(frozen=True)
class StagedPruning(Method):
    """Permanent pruning inside the language model, at a few layers by top-k; ties go to the lower index.

    With `prefill` 0 there are no stages, and nothing of it is computed. `decode` adds SparseVILA's retrieval from what
    a layer has left, so the published methods are `decode` 0. `scope` of a policy is refused.
    """

    # (layer, fraction removed there of the tokens that are still there), ascending; `at_depth` sets them.
    stages: tuple[tuple[int, float], ...] = ()
    rows: ClassVar[Rows] = "last"

    @property
    def needs_question(self) -> bool:
        return self.prefill > 0

    def layer_rows(self, layer: int) -> Rows | None:
        return self.rows if layer in dict(self.stages) else None

    def on_layer(self, layer: int, scores: Tensor) -> Tensor | None:
        return top_k(scores[None], keep_count(len(scores), dict(self.stages)[layer]))[0]

    @property
    def scores_turn(self) -> bool:
        return self.decode > 0

    def on_turn(self, scores: Sequence[Tensor]) -> list[Tensor] | None:
        if self.decode == 0:
            return None
        return [top_k(layer[None], keep_count(len(layer), self.decode))[0] for layer in scores]


def met_on_average(
    name: str, removed: float, lengths: Sequence[int], shares: Callable[[float], Sequence[float]]
) -> tuple[float, ...]:
    """Fractions removed at each stage such that layers miss the fraction `removed` of the visual tokens on average.

    lengths: layers before the first stage, between stages, and after the last; shares(x): share of all tokens that is
    there after each stage, none of it at x = 0, everything at x = 1, growing with x. Raises InvalidRequest where the
    layers before the first stage alone read more.
    """
    total = sum(lengths)
    if lengths[0] >= (1 - removed) * total:
        raise InvalidRequest(
            f"prefill sparsity of {name}: expected less than {1 - lengths[0] / total:.4g}, got {removed}: the first "
            f"{lengths[0]} of {total} layers see everything"
        )
    low, high = 0.0, 1.0
    for _ in range(60):
        x = (low + high) / 2
        mean = (lengths[0] + sum(n * s for n, s in zip(lengths[1:], shares(x), strict=True))) / total
        low, high = (low, x) if mean > 1 - removed else (x, high)
    # Rounded, so that a share meant to be a half is one: counts round half up.
    there = [1.0, *(round(max(share, 1e-9), 9) for share in shares(high))]
    return tuple(1 - after / before for before, after in itertools.pairwise(there))
