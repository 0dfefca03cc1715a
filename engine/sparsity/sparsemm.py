"""SparseMM: a few heads do the seeing, so each key head keeps as much of a picture as it was found to look there.

Source: arXiv 2506.05344, sections 3 and 4. Offline, heads are scored by how often what they look at most is where the
answer stands in the picture (`benchmarks/head_scores.py`). Every head gets a uniform floor of entries and a share of
the rest by its score; the number of all is fixed. Which entries a head keeps, SnapKV's scoring says (arXiv 2404.14469,
section 4): the attention of the prompt's last 32 queries, mean over rows, smoothed over 5 neighbours. What is not kept
is evicted, for later questions too; kept keys keep their positions.

Where it leaves its authors:
- Only visual entries compete. Text always stays, of whatever age, so their local window of 32 entries stays with it.
  Budgets count visual entries alone, and neighbours in the smoothing are those in the row of visual tokens.
- The rows of the window are those behind the media: of a question with fewer than 32 tokens all of its own, where
  theirs reach into the picture, whose rows cannot see what comes after them.
- Query heads that share a key head have one score, their mean, and one set.
- A floor of a tenth, and heads whose share is more than there is pass the rest on: taken from the description, not from
  their code.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ...kernels.top_k import top_k
from ..config import Sparsity
from ..head_scores import HeadScores
from ..head_sets import HeadSets
from .base import Method, keep_count

_WINDOW = 32  # queries that rate
_POOL = 5  # neighbours that a score is averaged over; beyond the ends they count as 0
_FLOOR = 0.1  # of an equal share, that every head gets


@dataclass(frozen=True)
class SparseMM(Method):
    """`prefill` is the fraction of one prompt's visual entries that is evicted, on average over all key heads.

    Of N visual tokens a head keeps B = (1 - prefill) N on average, the paper's budget. All tokens go through all
    layers, so it saves reads in decode and in later questions, not in the first prefill. `decode` adds SparseVILA's
    retrieval of each key head by itself, from what it has left: the published method is `decode` 0.
    """

    head_scores: str | None = None  # a file; None: the one beside the checkpoint
    # Of each key head, layers times H_kv; `with_head_scores` sets them.
    merits: tuple[tuple[float, ...], ...] = field(default=(), repr=False)
    switches: ClassVar[frozenset[str]] = frozenset({"head_scores"})

    @staticmethod
    def from_policy(sparsity: Sparsity) -> SparseMM:
        return SparseMM(sparsity.prefill, sparsity.decode, sparsity.head_scores)

    @property
    def needs_question(self) -> bool:
        return self.prefill > 0

    @property
    def needs_head_scores(self) -> bool:
        return self.prefill > 0

    @property
    def head_scores_file(self) -> str | None:
        return self.head_scores

    def with_head_scores(self, scores: HeadScores, num_kv_heads: int) -> SparseMM:
        merits = [row.unflatten(0, (num_kv_heads, -1)).mean(dim=1) for row in torch.tensor(scores, dtype=torch.float64)]
        return replace(self, merits=tuple(tuple(row.tolist()) for row in merits))

    @property
    def window(self) -> int:
        return _WINDOW if self.prefill > 0 else 0

    def on_heads(self, layer: int, scores: Tensor) -> Sequence[Tensor]:
        num_heads, n = scores.shape
        counts = budgets([merit for row in self.merits for merit in row], n, 1 - self.prefill)
        smooth = F.avg_pool1d(scores[None], _POOL, stride=1, padding=_POOL // 2)[0]
        own = counts[layer * num_heads : (layer + 1) * num_heads]
        return [top_k(row[None], count)[0] for row, count in zip(smooth, own, strict=True)]

    @property
    def scores_turn(self) -> bool:
        return self.decode > 0

    @property
    def scores_per_head(self) -> bool:
        return True

    def on_turn(self, scores: Sequence[Tensor]) -> Sequence[HeadSets] | None:
        if self.decode == 0:
            return None
        lengths = torch.stack([(layer >= 0).sum(dim=1) for layer in scores]).tolist()  # one wait for all layers
        return [_best(layer, own, self.decode) for layer, own in zip(scores, lengths, strict=True)]


def _best(scores: Tensor, lengths: list[int], removed: float) -> HeadSets:
    """scores (H_kv, N) of a layer, lengths how many each head has."""
    if min(lengths) == max(lengths):
        return top_k(scores[:, : lengths[0]], keep_count(lengths[0], removed))
    return tuple(top_k(row[None, :n], keep_count(n, removed))[0] for row, n in zip(scores, lengths, strict=True))


def budgets(merits: Sequence[float], n: int, share: float) -> list[int]:
    """How many of n entries each head keeps: at least one, at most n, together `share` of all, rounded half up.

    A tenth of an equal share each, the rest by merit (all alike where none has any). What a head cannot take goes to
    the others by theirs. Fractions are rounded so that the sum holds: the largest up first, ties to the lower head.
    """
    heads = range(len(merits))
    total = max(len(merits), math.floor(share * n * len(merits) + 0.5))
    floor = _FLOOR * total / len(merits)
    full: set[int] = set()
    while True:
        free = [head for head in heads if head not in full]
        rest = total - n * len(full) - floor * len(free)
        weight = sum(merits[head] for head in free)
        wanted = {h: floor + rest * (merits[h] / weight if weight > 0 else 1 / len(free)) for h in free}
        over = {head for head, count in wanted.items() if count > n}
        if not over:
            break
        full |= over
    counts = [n if head in full else max(1, math.floor(wanted[head])) for head in heads]
    by_fraction = sorted(free, key=lambda head: (math.floor(wanted[head]) - wanted[head], head))
    while (missing := total - sum(counts)) > 0:
        open_heads = [head for head in by_fraction if counts[head] < n]
        for head in open_heads[:missing]:
            counts[head] += 1
    excess = [(-count, head) for head, count in enumerate(counts)]
    heapq.heapify(excess)
    for _ in range(sum(counts) - total):  # where many had to get their one: the largest give, ties from the lower head
        count, head = heapq.heappop(excess)
        counts[head] -= 1
        heapq.heappush(excess, (count + 1, head))
    return counts
