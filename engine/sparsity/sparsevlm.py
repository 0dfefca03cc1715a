"""SparseVLM+: words of the question that speak of the picture rate its tokens, at three layers.

Source: Zhang et al., arXiv 2410.04417, and the authors' code, version 2: raters are the text tokens behind the media
whose similarity to the visual ones lies above the mean (softmax over the text of the products of what enters the
decoder, mean over visual tokens); after layers 2, 6 and 15 of 32 their attention, mean over heads and raters, ranks the
visual tokens. Survivors keep their positions, nothing is recycled. Version 1, which merges what it prunes into new
tokens and renumbers, is not here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from ..config import Sparsity
from .base import Rows, StagedPruning, met_on_average

# Of 32 layers those that have run before each stage, and the tokens of 576 that go on (the authors' setting "192").
_RUN, _DEPTH = (3, 7, 16), 32
_KEPT = (300, 200, 110)


@dataclass(frozen=True)
class SparseVLMPlus(StagedPruning):
    """`prefill` is the fraction of visual tokens that layers miss on average.

    The authors tabulate counts for three budgets. Here the shares of their largest are scaled by one factor, none above
    all tokens, until the average is met: their own counts are 0.648 (202.75 of 576 tokens a layer). Stages stand at the
    same parts of a decoder of another depth. `decode` and `scope` of a policy mean nothing here.
    """

    rows: ClassVar[Rows] = "raters"

    @staticmethod
    def from_policy(sparsity: Sparsity) -> SparseVLMPlus:
        return SparseVLMPlus(sparsity.prefill)

    def at_depth(self, num_layers: int) -> SparseVLMPlus:
        if self.prefill == 0:
            return self
        # Of few layers two stages may fall on one: the later takes its place.
        kept = {
            max(1, (num_layers * run + _DEPTH // 2) // _DEPTH): share for run, share in zip(_RUN, _KEPT, strict=True)
        }
        kept = {run: share for run, share in kept.items() if run < num_layers}
        lengths = [after - before for before, after in pairwise([0, *kept, num_layers])]

        def shares(x: float) -> Sequence[float]:
            return [min(1.0, x * share / _KEPT[-1]) for share in kept.values()]

        removed = met_on_average("sparsevlm+", self.prefill, lengths, shares)
        return replace(self, stages=tuple((run - 1, gone) for run, gone in zip(kept, removed, strict=True)))

    def raters(self, visual: Iterable[Tensor], text: Tensor) -> Tensor:
        text = text.float()
        total, count = torch.zeros(len(text), device=text.device), 0
        for part in visual:  # (M, hidden_size)
            total += (part.float() @ text.T).softmax(dim=1).sum(dim=0)
            count += len(part)
        similarity = total / count
        chosen = similarity > similarity.mean()
        return chosen if bool(chosen.any()) else torch.ones_like(chosen)  # all alike: all rate
