"""Sets of entries that key heads share or keep each for itself, in one form for cache, turns and reports.

A set of a layer is (k,) int64: all key heads share it; (H_kv, k): as many for each head, its own; or H_kv times (k_h,):
each head its own, and as many as it may. Heads are counted as the layer's key heads are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

HeadSets = Tensor | tuple[Tensor, ...]


def is_shared(sets: HeadSets) -> bool:
    """Whether it is one set for all key heads."""
    return isinstance(sets, Tensor) and sets.ndim == 1


def by_head(sets: HeadSets) -> tuple[Tensor, ...]:
    """The sets of each key head, (k_h,) each; of a shared one it alone."""
    if isinstance(sets, Tensor):
        return (sets,) if sets.ndim == 1 else tuple(sets)
    return sets


def counts(sets: HeadSets) -> tuple[int, ...]:
    """Entries of each key head's set; of a shared one its own."""
    return tuple(map(len, by_head(sets)))


def longest(sets: HeadSets) -> int:
    """Entries of the head that has most."""
    return max(counts(sets))


def on_cpu(sets: HeadSets) -> HeadSets:
    return sets.cpu() if isinstance(sets, Tensor) else tuple(own.cpu() for own in sets)


def behind(sets: HeadSets, offset: int) -> HeadSets:
    """The same entries of a store that has `offset` more in front of them."""
    return sets + offset if isinstance(sets, Tensor) else tuple(own + offset for own in sets)


def joined(parts: Sequence[HeadSets]) -> HeadSets:
    """One set behind the other, head by head."""
    if all(map(is_shared, parts)):
        return torch.cat([own for part in parts for own in by_head(part)])
    heads = max(len(by_head(part)) for part in parts)
    each = [by_head(part) * heads if is_shared(part) else by_head(part) for part in parts]
    return tuple(torch.cat(own) for own in zip(*each, strict=True))


def chosen(store: HeadSets, sets: HeadSets) -> HeadSets:
    """What the entries `sets` of a store stand for, where `store` says what each head's entries stand for."""
    if is_shared(store) and isinstance(store, Tensor):
        return store[sets] if isinstance(sets, Tensor) else tuple(store[own] for own in sets)
    heads = by_head(store)
    each = by_head(sets) * len(heads) if is_shared(sets) else by_head(sets)
    return tuple(here[own] for here, own in zip(heads, each, strict=True))
