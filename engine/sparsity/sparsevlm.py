"""SparseVLM and SparseVLM+: words of the question that speak of the picture rate its tokens, at three layers.

Source: Zhang et al., arXiv 2410.04417, and the authors' code, version 2: raters are the text tokens behind the media
whose similarity to the visual ones lies above the mean (softmax over the text of the products of what enters the
decoder, mean over visual tokens); after layers 2, 6 and 15 of 32 their attention, mean over heads and raters, ranks the
visual tokens. In version 2, "+", survivors keep their positions and nothing is recycled. Version 1 clusters the best
of what it prunes (density peaks, k nearest neighbours), puts the clusters' means behind the survivors and renumbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from ...kernels.top_k import top_k
from ..config import Sparsity
from .base import Rows, StagedPruning, met_on_average

# Of 32 layers those that have run before each stage, and the tokens of 576 that go on (the authors' setting "192").
_RUN, _DEPTH = (3, 7, 16), 32
_KEPT = (300, 200, 110)
_RECYCLED = 0.3  # of the pruned tokens, those with the highest scores
_PER_CLUSTER = 10


@dataclass(frozen=True)
class SparseVLMPlus(StagedPruning):
    """`prefill` is the fraction of visual tokens that layers miss on average.

    The authors tabulate counts for three budgets. Here the shares of their largest are scaled by one factor, none above
    all tokens, until the average is met: their own counts are 0.648 (202.75 of 576 tokens a layer). Stages stand at the
    same parts of a decoder of another depth.
    """

    rows: ClassVar[Rows] = "raters"

    @staticmethod
    def from_policy(sparsity: Sparsity) -> SparseVLMPlus:
        return SparseVLMPlus(sparsity.prefill, sparsity.decode)

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

        removed = met_on_average("sparsevlm", self.prefill, lengths, shares)
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


@dataclass(frozen=True)
class SparseVLM(SparseVLMPlus):
    """Version 1. New tokens come on top of what `prefill` leaves, about 3 % of what is dropped, and one, at each stage.

    At later stages they compete as the others do. They stand behind all media of the prompt, also where several media
    were ranked together, and on three axes take positions as text does. Equal densities and scores go to the lower
    index, where the authors add noise.
    """

    renumbers = True
    recycles = True

    @staticmethod
    def from_policy(sparsity: Sparsity) -> SparseVLM:
        return SparseVLM(sparsity.prefill, sparsity.decode)

    def recycle(self, hidden: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        best = top_k(scores[None], min(len(scores), int(len(scores) * _RECYCLED) + 1))[0]
        points = hidden[best]
        centres, cluster = density_peaks(points.float(), len(best) // _PER_CLUSTER + 1)
        sums = torch.zeros(len(centres), points.shape[1], device=points.device).index_add_(0, cluster, points.float())
        sizes = torch.bincount(cluster, minlength=len(centres))
        return (sums / sizes[:, None]).to(hidden.dtype), best[centres]


def density_peaks(points: Tensor, num_clusters: int) -> tuple[Tensor, Tensor]:
    """Clusters points (n, C) float32 around those that are dense and far from any denser one.

    Density: exp of the negative mean squared distance to the `num_clusters` nearest, itself included; distances are
    Euclidean, divided by the root of C. Returns the centres (num_clusters,) int64, ascending, and the cluster of each
    point (n,) int64: that of its nearest centre, ties to the lower. 1 <= num_clusters <= n. Memory is O(n^2).
    Source: Du et al., Knowledge-Based Systems 99 (2016), as SparseVLM's code uses it.
    """
    distance = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist") / points.shape[1] ** 0.5
    nearest = distance.topk(num_clusters, dim=1, largest=False).values
    density = (-nearest.square().mean(dim=1)).exp()
    is_denser = density[None] > density[:, None]  # (n, n): whether the column is denser than the row
    to_denser = torch.where(is_denser, distance, distance.max()).amin(dim=1)
    centres = top_k((to_denser * density)[None], num_clusters)[0]
    cluster = distance[:, centres].argmin(dim=1)
    cluster[centres] = torch.arange(num_clusters, device=points.device)  # of two centres in one place, each its own
    return centres, cluster
