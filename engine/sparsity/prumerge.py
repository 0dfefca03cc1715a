"""PruMerge and PruMerge+: outliers of the saliency stay, and take in what is like them.

Source: Shang et al., arXiv 2403.15388, and the form that the authors' code gives it. Of a group of tokens those stay
whose saliency is above Q3 + 1.5 (Q3 - Q1), Q1 and Q3 its quartiles. To each of them its 32 nearest tokens by key
(cosine) are added, weighted by their saliency; those may stay themselves. One more token is the weighted sum of all
that do not stay. PruMerge+ lets evenly spaced tokens stay beside the outliers.

Where this leaves the authors:
- A weight is a token's share of the saliency of its group. For one picture of CLIP that is theirs, but for the share
  that the summary token gives itself; over several tiles or merged patches theirs would not add up to one.
- A group is an image with all its tiles or a frame of a video (`scope`), as for every method here; theirs is a picture.
- Without an outlier the most salient token stays; theirs would leave the sum alone.
- The sum stands at the place of the last token that does not stay, theirs behind all others. Where all tokens stay
  there is none.
- Saliency and keys are those of the layer whose output is used, keys are means over heads; theirs are the last layer's,
  all heads side by side. Towers without a summary token rank by what a patch receives from all rows.
- Where features are cached behind the projector (NVILA with joined patches, OneVision, Qwen), its outputs are added.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels.top_k import top_k
from ...models.interface import MediaKind, TokenMap
from .base import keep_count
from .merging import Group, Merging, rest_of
from .sparsevila import SparseVILA

_GATHERED_AT_ONCE = 1 << 23  # floats: 32 MB


@dataclass(frozen=True)
class PruMerge(Merging):
    """How many tokens stay depends on the picture: `prefill` only switches it on.

    `decode` adds SparseVILA's retrieval behind it; the published method is `decode` 0.
    """

    neighbours: int = 32
    reach: float = 1.5  # times the range between the quartiles

    def planned_keep(self, token_map: TokenMap, kind: MediaKind) -> int:
        """The most there can be: what lies above the third quartile, and the sum."""
        if self.prefill == 0:
            return token_map.num_visual
        sizes = [len(group) for group in self._groups(token_map, kind) if len(group)]
        return sum(min(n, max(1, n - 1 - math.floor(0.75 * (n - 1))) + 1) for n in sizes)

    def outliers(self, saliency: Tensor) -> Tensor:
        """Saliency (n,) -> ascending indices of what stands out, or of the most salient one where nothing does."""
        exact = saliency.double()
        first, third = torch.quantile(exact, torch.tensor([0.25, 0.75], dtype=torch.float64))
        found = torch.nonzero(exact > third + self.reach * (third - first))[:, 0]
        return found if len(found) else top_k(saliency[None], 1)[0]

    def _staying(self, group: Group) -> Tensor:
        """The tokens that others are added to, (k,) int64 ascending; the sum is not among them."""
        return self.outliers(group.saliency)

    def _has_sum(self, n: int) -> bool:
        """Whether what does not stay of n tokens is summed in one more."""
        return True

    def _merge(self, group: Group) -> tuple[Tensor, Tensor]:
        centres = self._staying(group)
        rest = rest_of(len(group), centres)
        weights = group.saliency / group.saliency.sum().clamp(min=torch.finfo(torch.float32).tiny)
        weights = weights.to(group.features.device)
        features = self._gathered(group, centres, weights)
        if len(rest) == 0 or not self._has_sum(len(group)):
            return centres, features
        stays = torch.cat([centres, rest[-1:]])
        features = torch.cat([features, weights[rest][None] @ group.features[rest].float()])
        order = stays.argsort()
        return stays[order], features[order]

    def _gathered(self, group: Group, centres: Tensor, weights: Tensor) -> Tensor:
        """The centres with their neighbours added, (k, D) float32."""
        n, width = group.features.shape
        count = min(self.neighbours, n - 1)
        own = group.features[centres].float()
        if count == 0:
            return own
        added = []
        for some, cosines in group.similarities(centres, torch.arange(n)):
            cosines[torch.arange(len(some)), some] = -math.inf  # a token is not its own neighbour
            nearest = top_k(cosines, count)  # (m, count)
            for part in nearest.split(max(1, _GATHERED_AT_ONCE // (count * width))):
                added.append((weights[part][..., None] * group.features[part].float()).sum(dim=1))
        return own + torch.cat(added)


@dataclass(frozen=True)
class PruMergePlus(PruMerge):
    """As many tokens as the policy keeps, k = `keep_count`, the sum among them.

    The authors take a grid about three times as dense as the outliers; the count is what the policy says here. The
    k - 1 tokens besides the sum are the outliers, the most salient ones if there are more; then tokens evenly spaced
    among those that are no outliers, in the order of the sequence. A single token (k = 1) is the most salient one,
    without a sum; where k is all of them, all stay and there is nothing to sum.
    """

    def planned_keep(self, token_map: TokenMap, kind: MediaKind) -> int:
        return SparseVILA.planned_keep(self, token_map, kind)

    def _staying(self, group: Group) -> Tensor:
        n, kept = len(group), keep_count(len(group), self.prefill)
        room = n if kept == n else max(1, kept - 1)
        outliers = self.outliers(group.saliency)
        if len(outliers) >= room:
            return top_k(group.saliency[None], room)[0]
        others, missing = rest_of(n, outliers), room - len(outliers)
        grid = others[torch.arange(missing) * len(others) // missing]
        return torch.cat([outliers, grid]).sort().values

    def _has_sum(self, n: int) -> bool:
        return keep_count(n, self.prefill) > 1
