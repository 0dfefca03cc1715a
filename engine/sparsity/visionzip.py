"""VisionZip: the most salient tokens as they are, the others merged into a few.

Source: Yang et al., arXiv 2412.04467, and the form that the authors' code gives it. Of the k tokens that stay of a
group, D are dominant: the most salient ones. C are contextual: evenly spaced targets among the others, in the order of
the sequence. Each of the rest joins the target whose head-mean key is most like its own (cosine).

Where this leaves the authors:
- k comes from the policy (`keep_count`), D and C share it as 54 and 10 do, 108 and 20, 162 and 30. C is rounded half up
  and may be 0; then the rest is dropped.
- A group is an image with all its tiles or a frame of a video (`scope`), as for every method here; theirs is a tile.
- The summary token does not stay: no model here takes it.
- A contextual token stands at its target's place, theirs behind all dominant ones.
- Saliency and keys are those of the layer whose output is used; their layer -2 is that of LLaVA. Towers without a
  summary token rank by what a patch receives from all rows.
- Where features are cached behind the projector (NVILA with joined patches, OneVision, Qwen), its outputs are averaged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ...kernels.top_k import top_k
from .base import keep_count
from .merging import Group, Merging, rest_of


@dataclass(frozen=True)
class VisionZip(Merging):
    """`decode` adds SparseVILA's retrieval behind it; the published method is `decode` 0.

    `merge` "mean" is the paper's: a target is averaged with all that join it. "added" is the authors' code: the target
    plus the mean of those that join it.
    """

    dominant: int = 54
    contextual: int = 10  # to so many dominant ones
    merge: Literal["mean", "added"] = "mean"

    def num_contextual(self, kept: int) -> int:
        """How many of the tokens that stay are contextual."""
        return math.floor(kept * self.contextual / (self.dominant + self.contextual) + 0.5)

    def _merge(self, group: Group) -> tuple[Tensor, Tensor]:
        kept = keep_count(len(group), self.prefill)
        num_targets = self.num_contextual(kept)
        dominant = top_k(group.saliency[None], kept - num_targets)[0]
        others = rest_of(len(group), dominant)
        if num_targets == 0:
            return dominant, group.features[dominant].float()
        places = torch.arange(num_targets) * (len(others) // num_targets)
        targets, joining = others[places], others[rest_of(len(others), places)]
        stays = torch.cat([dominant, targets])
        features = torch.cat([group.features[dominant].float(), self._contextual(group, targets, joining)])
        order = stays.argsort()
        return stays[order], features[order]

    def _contextual(self, group: Group, targets: Tensor, joining: Tensor) -> Tensor:
        """What the targets become, (C, D) float32."""
        own = group.features[targets].float()
        total, counts = torch.zeros_like(own), own.new_zeros(len(targets), 1)
        for some, cosines in group.similarities(joining, targets):
            # By a product and not by scattered additions, whose order a GPU leaves open.
            joins = F.one_hot(top_k(cosines, 1)[:, 0], len(targets)).T.to(own.dtype)  # (C, some)
            total += joins @ group.features[some].float()
            counts += joins.sum(dim=1, keepdim=True)
        if self.merge == "added":
            return own + total / counts.clamp(min=1)
        return (own + total) / (1 + counts)
