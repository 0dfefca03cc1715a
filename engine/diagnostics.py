"""What a turn pruned, kept and read, and how much that matters. Cheap, and always available.

Where the key heads of a layer read sets of their own, a share counts (layer, key head) pairs and an overlap (key head,
token) pairs; a layer has read a token if one of its heads has.
Sink: a token that is active in every turn at a layer. Retrieval token: active in some turns, not in all.
Source: arXiv 2510.17777, section 5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..models.interface import TokenMap
from .head_sets import HeadSets, by_head, is_shared

PRUNED, KEPT, ACTIVE, STRUCTURAL = range(4)


@dataclass(frozen=True)
class Selection:
    """One turn's view of all media. N encoder tokens, S entries of the visual store, L layers."""

    token_map: TokenMap  # N tokens, structural ones included, media after media
    saliency: Tensor  # (N,) float32, attention received in the encoder
    store: Tensor  # (S,) int64: the encoder token of each entry of the visual store, as it enters the first layer
    # L times (S,) float32, the question's mean attention, 0 for what an earlier layer has pruned; None in a dense turn
    scores: tuple[Tensor, ...] | None
    # L times (k,) int64 into the store, ascending but for merged tokens: what the layer read, retrieved for this turn
    # or all that pruning inside the decoder has left it for good; or of each key head (`head_sets.py`). None: every
    # layer read everything.
    active: tuple[HeadSets, ...] | None
    # L shares of the question's attention to the visual store that heads hold which read sets of their own; None: as
    # `scores` and `active` tell
    mass: tuple[float, ...] | None = None

    def layer_share(self) -> Tensor:
        """Share of layers that read each encoder token, (N,) float32; of key heads where they read their own."""
        share = torch.zeros(len(self.token_map))
        if self.active is None:
            share[self.store] = 1.0
        else:
            for sets in self.active:
                heads = by_head(sets)
                for indices in heads:
                    share[self.store[indices]] += 1 / (len(self.active) * len(heads))
        return share

    def states(self) -> Tensor:
        """PRUNED, KEPT, ACTIVE (read by at least one layer) or STRUCTURAL for each encoder token, (N,) int64."""
        states = torch.full((len(self.token_map),), PRUNED)
        states[self.store] = KEPT
        states[self.layer_share() > 0] = ACTIVE
        states[self.token_map.structural] = STRUCTURAL
        return states

    def recovered_mass(self) -> list[float]:
        """Share of the question's attention to the visual store that the active set holds, per layer."""
        if self.scores is None or self.active is None:
            return []
        if self.mass is not None:
            return list(self.mass)
        return [held_mass(scores, sets) for scores, sets in zip(self.scores, self.active, strict=True)]


def held_mass(scores: Tensor, sets: HeadSets) -> float:
    """Share of scores (S,), or (H_kv, S) of each key head, that the entries `sets` of a layer hold.

    Scores that are of no head in particular are taken for each head's.
    """
    heads = by_head(sets)
    if scores.ndim == 1 or is_shared(sets):
        of_all = scores if scores.ndim == 1 else scores.mean(dim=0)
        return float(sum(of_all[own].sum() for own in heads) / (len(heads) * of_all.sum()))
    return float(sum(row[own].sum() for row, own in zip(scores, heads, strict=True)) / scores.sum())


@dataclass(frozen=True)
class Overlap:
    """How active sets differ between turns, per layer."""

    jaccard: list[float]  # mean over pairs of neighbouring turns; 1: the same set each time
    sinks: list[Tensor]  # entries of the visual store active in all turns
    retrieval: list[Tensor]  # active in some turns, not in all


def overlap(selections: Sequence[Selection]) -> Overlap:
    """Compares the sparse turns among `selections`, which must be of one visual store. Two at least."""
    turns = [s for s in selections if s.active is not None]
    if len(turns) < 2:
        raise ValueError(f"expected at least two sparse turns, got {len(turns)}")
    jaccard, sinks, retrieval = [], [], []
    for layer in range(len(turns[0].active or ())):
        heads = torch.stack(torch.broadcast_tensors(*(_mask(turn, layer) for turn in turns)))  # (turns, heads, S)
        both = (heads[1:] & heads[:-1]).sum(dim=(1, 2))
        either = (heads[1:] | heads[:-1]).sum(dim=(1, 2))
        jaccard.append(float((both / either).mean()))
        masks = heads.any(dim=1)
        always = masks.all(dim=0)
        sinks.append(torch.nonzero(always)[:, 0])
        retrieval.append(torch.nonzero(masks.any(dim=0) & ~always)[:, 0])
    return Overlap(jaccard, sinks, retrieval)


def _mask(selection: Selection, layer: int) -> Tensor:
    """(heads, S) bool: one row where heads share the set."""
    assert selection.active is not None
    heads = by_head(selection.active[layer])
    mask = torch.zeros(len(heads), len(selection.store), dtype=torch.bool)
    for row, own in zip(mask, heads, strict=True):
        row[own] = True
    return mask


@dataclass(frozen=True)
class Agreement:
    """Sparse decoding against dense decoding of the same answer, step by step from the second token on."""

    token_ids: tuple[int, ...]  # the dense greedy answer, which both are fed
    kl: tuple[float, ...]  # KL(dense || sparse) of the next-token distributions, nats
    top1: tuple[bool, ...]  # whether the likeliest token is the same


def agreement(token_ids: Sequence[int], dense: Sequence[Tensor], sparse: Sequence[Tensor]) -> Agreement:
    """dense, sparse: logits (V,) float32 per step."""
    kl, top1 = [], []
    for d, s in zip(dense, sparse, strict=True):
        d, s = d.double().log_softmax(-1), s.double().log_softmax(-1)
        kl.append(float((d.exp() * (d - s)).sum()))
        top1.append(bool(d.argmax() == s.argmax()))
    return Agreement(tuple(token_ids), tuple(kl), tuple(top1))


@dataclass(frozen=True)
class AnswerRating:
    """What a model thinks of a given answer, token by token; the end of the answer is not among them."""

    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...]  # nats
    top1: tuple[bool, ...]  # whether the token is the likeliest one

    @property
    def log_likelihood(self) -> float:
        """Of the whole answer, nats."""
        return sum(self.log_probs)


def rating(token_ids: Sequence[int], logits: Sequence[Tensor]) -> AnswerRating:
    """logits: (V,) float32 that each token was to be chosen from."""
    pairs = list(zip(token_ids, logits, strict=True))
    log_probs = tuple(float(row.double().log_softmax(-1)[token]) for token, row in pairs)
    return AnswerRating(tuple(token_ids), log_probs, tuple(int(row.argmax()) == token for token, row in pairs))
