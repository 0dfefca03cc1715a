"""Keys and values of a session: what makes soft retrieval cheap.

Per decoder layer there are three stores, keys already rotated:

- visual: every visual token that survived prefill, of all media. Written once, read by every question, never
  shortened by retrieval.
- text: system text, questions, answers, structural tokens, in order.
- active: a compacted copy of the visual entries that this turn may read.

A checkpoint is a few lengths; restoring one forgets what came after it. Lengths are kept per layer, because a
method may prune inside the language model, and per key head where one has evicted entries of each head by itself: only
visual stores and active sets can be so. The host keeps the books; while an answer is decoded, a copy of the lengths
on the device is what its steps read and count up (`lengths`), so that none of them waits for the host.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from operator import le

import torch
from torch import Tensor

from ..kernels.compaction import compaction
from .head_sets import HeadSets, by_head, counts, is_shared, longest

Segment = tuple[Tensor, Tensor]  # k, v, each (H_kv, n, D)

_GRAIN = 256  # capacities are multiples of it, so that every head's first row is aligned alike


@dataclass(frozen=True)
class CacheCheckpoint:
    """What a cache holds at one moment."""

    visual_len: tuple[int, ...]  # per layer, of the head that has most
    text_len: tuple[int, ...]  # per layer
    next_position: int
    lag: tuple[int, ...] = ()
    # Per layer the visual entries of each key head, None where they have as many; empty: in every layer.
    visual_heads: tuple[tuple[int, ...] | None, ...] = ()

    def before_text(self, count: int) -> CacheCheckpoint:
        """The moment `count` text tokens earlier, whose positions were one apart."""
        return replace(
            self,
            text_len=tuple(length - count for length in self.text_len),
            next_position=self.next_position - count,
        )


class _Store:
    """Keys and values of one layer, contiguous per head, with room to grow."""

    def __init__(self, num_kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
        self.k = torch.empty(num_kv_heads, 0, head_dim, dtype=dtype, device=device)
        self.v = torch.empty_like(self.k)
        self.length = 0  # of the head that has most
        self.heads: tuple[int, ...] | None = None  # of each head, where they differ

    @property
    def capacity(self) -> int:
        return self.k.shape[1]

    def reserve(self, capacity: int) -> bool:
        """Makes room for `capacity` entries; what is there stays. Whether it had to move."""
        if capacity <= self.capacity:
            return False
        for name in ("k", "v"):
            old = getattr(self, name)
            new = torch.empty(old.shape[0], capacity, old.shape[2], dtype=old.dtype, device=old.device)
            new[:, : self.length].copy_(old[:, : self.length])
            setattr(self, name, new)
        return True

    def append(self, k: Tensor, v: Tensor) -> None:
        """k, v (H_kv, n, D)."""
        end = self.length + k.shape[1]
        assert end <= self.capacity, f"store of {self.capacity} entries was reserved too small for {end}"
        if self.heads is None:
            self.k[:, self.length : end] = k
            self.v[:, self.length : end] = v
            self.length = end
            return
        for head, start in enumerate(self.heads):
            self.k[head, start : start + k.shape[1]] = k[head]
            self.v[head, start : start + k.shape[1]] = v[head]
        self.hold([start + k.shape[1] for start in self.heads])

    def hold(self, lengths: Sequence[int]) -> None:
        """Says how many entries each head has."""
        self.length = max(lengths)
        self.heads = None if min(lengths) == self.length else tuple(lengths)

    def keep_of_last(self, n: int, keep: Sequence[Tensor]) -> None:
        """Of each head's last n entries keeps keep[head] (k_h,) int64, ascending; the rest is gone for good."""
        starts = [end - n for end in self.head_lens()]
        for head, (start, own) in enumerate(zip(starts, keep, strict=True)):
            for tensor in (self.k, self.v):
                tensor[head, start : start + len(own)] = tensor[head, start + own]
        self.hold([start + len(own) for start, own in zip(starts, keep, strict=True)])

    def go_back(self, length: int, heads: tuple[int, ...] | None) -> None:
        """Forgets what came after it had so many entries."""
        before = self.head_lens()
        self.length, self.heads = length, heads
        assert all(map(le, self.head_lens(), before)), "a checkpoint lies in the past"

    def head_lens(self) -> tuple[int, ...]:
        """Entries of each head."""
        return self.heads or (self.length,) * self.k.shape[0]

    def entries(self) -> float:
        """Entries of a head, on average."""
        return self.length if self.heads is None else sum(self.heads) / len(self.heads)

    def segment(self) -> Segment:
        """A view of what is there; valid until the next append or reserve."""
        assert self.heads is None, "heads hold different numbers of entries"
        return self.k[:, : self.length], self.v[:, : self.length]

    def segment_of(self, head: int) -> Segment:
        """A view (1, n, D) of what one head has; valid as `segment` is."""
        own = slice(head, head + 1), slice(self.head_lens()[head])
        return self.k[own], self.v[own]


def _rounded(entries: int) -> int:
    return -(-entries // _GRAIN) * _GRAIN


class KVCache:
    """The stores of every layer and the next position."""

    def __init__(
        self, *, num_layers: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        def stores() -> list[_Store]:
            return [_Store(num_kv_heads, head_dim, dtype, device) for _ in range(num_layers)]

        self.visual, self.text, self.active = stores(), stores(), stores()
        self.num_layers = num_layers
        self.next_position = 0
        # Per layer: how far its next position lies behind `next_position`, where pruning inside the decoder made tokens
        # move up; below 0 where new tokens took more room than the dropped ones. Empty: nowhere.
        self.lag: tuple[int, ...] = ()
        self.sparse = False  # whether this turn reads the active set
        self.moves = 0  # how often stores were allocated anew: what has kept an address asks whether it still holds
        # Entries of (active set or visual store, text store), (layers, 2) or, where key heads differ anywhere,
        # (layers, H_kv, 2). Valid from `publish` to the next prefill.
        self.lengths = torch.empty(0, 2, dtype=torch.int64, device=device)
        self._entry_bytes = 2 * num_kv_heads * head_dim * torch.empty((), dtype=dtype).element_size()

    # Capacity

    def bytes_with(self, *, visual: int = 0, text: int = 0, active: Sequence[int] = ()) -> int:
        """Bytes of all stores once `reserve` made room for that many more entries, and for active sets of that size."""
        sets = active or [0] * self.num_layers
        entries = sum(_grown(s, visual) for s in self.visual) + sum(_grown(s, text) for s in self.text)
        entries += sum(max(s.capacity, _rounded(n)) for s, n in zip(self.active, sets, strict=True))
        return entries * self._entry_bytes

    def reserve(self, *, visual: int = 0, text: int = 0) -> None:
        """Makes room for that many more entries in every layer. Called between turns and before a prefill."""
        for stores, more in ((self.visual, visual), (self.text, text)):
            for store in stores:
                self.moves += store.reserve(_grown(store, more))

    # Writing

    def append(self, layer: int, k: Tensor, v: Tensor, visual: Tensor | None = None, num_visual: int = 0) -> None:
        """Adds the entries of a chunk to one layer.

        k, v (H_kv, M, D); visual (M,) bool says which `num_visual` of them belong in the visual store, None: none.
        """
        if visual is None or num_visual == 0:
            self.text[layer].append(k, v)
        elif num_visual == len(visual):
            self.visual[layer].append(k, v)
        else:
            self.visual[layer].append(k[:, visual], v[:, visual])
            self.text[layer].append(k[:, ~visual], v[:, ~visual])

    def activate(self, keep: Sequence[HeadSets]) -> None:
        """Compacts the visual entries keep[layer], ascending, into the active set of each layer.

        The entries of a head's set are counted among those that this head has.
        """
        for target, sets in zip(self.active, keep, strict=True):
            target.length, target.heads = 0, None
            self.moves += target.reserve(_rounded(longest(sets)))
        if all(isinstance(sets, Tensor) for sets in keep):
            compaction(
                [t[:, : source.length] for source in self.visual for t in (source.k, source.v)],
                [sets for sets in keep if isinstance(sets, Tensor) for _ in range(2)],
                [t for target in self.active for t in (target.k, target.v)],
            )
        else:  # head by head: one gather has as many entries for each head of a store
            compaction(*map(list, zip(*self._head_gathers(keep), strict=True)))
        for target, sets in zip(self.active, keep, strict=True):
            target.hold(counts(sets))
        self.sparse = True

    def _head_gathers(self, keep: Sequence[HeadSets]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """What is gathered for each head by itself: source (1, n, D), set (k_h,), target (1, capacity, D)."""
        for source, sets, target in zip(self.visual, keep, self.active, strict=True):
            heads = by_head(sets) * source.k.shape[0] if is_shared(sets) else by_head(sets)
            for head, own in enumerate(heads):
                for there, here in zip(source.segment_of(head), (target.k, target.v), strict=True):
                    yield there, own, here[head : head + 1]

    def evict(self, layer: int, n: int, keep: Sequence[Tensor]) -> None:
        """Of the last n entries that were put into a layer's visual store, each key head keeps its own, for good.

        keep[head] (k_h,) int64, ascending, counted among those n.
        """
        self.visual[layer].keep_of_last(n, keep)

    def deactivate(self) -> None:
        """Later reads see the whole visual store again."""
        self.sparse = False

    # Reading

    def segments(self, layer: int) -> tuple[Segment, Segment]:
        """Views of (active set or visual store, text store) of one layer."""
        seen = self.active if self.sparse else self.visual
        return seen[layer].segment(), self.text[layer].segment()

    def visual_keys(self, layer: int) -> Tensor:
        """(H_kv, N, D): the whole visual store, whatever is active."""
        return self.visual[layer].segment()[0]

    def last_visual_keys(self, layer: int, n: int) -> Tensor:
        """(H_kv, n, D): the last n of each key head."""
        store = self.visual[layer]
        if store.heads is None:
            return self.visual_keys(layer)[:, -n:]
        return torch.cat([store.segment_of(head)[0][:, -n:] for head in range(len(store.heads))])

    def visual_lens(self) -> list[int]:
        """Entries of the visual store, per layer: of the key head that has most."""
        return [store.length for store in self.visual]

    def entries(self) -> list[float]:
        """Entries of all a layer holds, visual and text, whatever is active; mean over key heads."""
        return [visual.entries() + text.length for visual, text in zip(self.visual, self.text, strict=True)]

    def by_head(self, layer: int) -> list[tuple[Segment, Segment]]:
        """`segments` of each key head by itself, (1, n, D): the way to read where heads differ."""
        seen, text = (self.active if self.sparse else self.visual)[layer], self.text[layer]
        return [(seen.segment_of(head), text.segment_of(head)) for head in range(seen.k.shape[0])]

    def reads_by_head(self, layer: int) -> bool:
        """Whether key heads of what this turn reads at a layer hold different numbers of entries."""
        return (self.active if self.sparse else self.visual)[layer].heads is not None

    def active_lens(self) -> list[float]:
        """Visual entries that a decode step reads, per layer, mean over key heads."""
        return [store.entries() for store in (self.active if self.sparse else self.visual)]

    def read_bytes(self) -> int:
        """Bytes of keys and values that one decode step reads."""
        return round((sum(self.active_lens()) + sum(store.length for store in self.text)) * self._entry_bytes)

    # Decoding: the lengths on the device

    def publish(self) -> None:
        """Writes the lengths to the device, before the first step of an answer."""
        seen = self.active if self.sparse else self.visual
        if all(store.heads is None for store in seen):
            lengths = torch.tensor([[s.length, t.length] for s, t in zip(seen, self.text, strict=True)])
        else:
            pairs = zip(seen, self.text, strict=True)
            lengths = torch.tensor([[[own, t.length] for own in s.head_lens()] for s, t in pairs])
        if self.lengths.shape != lengths.shape:
            self.moves += len(self.lengths) > 0
            self.lengths = torch.empty_like(lengths, device=self.lengths.device)
        self.lengths.copy_(lengths, non_blocking=True)

    def advance(self) -> None:
        """Books the text token that the next step puts into every layer and counts on the device."""
        for store in self.text:
            assert store.length < store.capacity, f"no room for a token behind {store.length} entries"
            store.length += 1
        self.next_position += 1

    def stores(self, layer: int) -> tuple[Segment, Segment]:
        """(active set or visual store, text store) of one layer, up to their capacities."""
        seen = (self.active if self.sparse else self.visual)[layer]
        text = self.text[layer]
        return (seen.k, seen.v), (text.k, text.v)

    # Rolling back

    def checkpoint(self) -> CacheCheckpoint:
        return CacheCheckpoint(
            tuple(store.length for store in self.visual),
            tuple(store.length for store in self.text),
            self.next_position,
            self.lag,
            tuple(store.heads for store in self.visual) if any(store.heads for store in self.visual) else (),
        )

    def empty_checkpoint(self) -> CacheCheckpoint:
        return CacheCheckpoint((0,) * self.num_layers, (0,) * self.num_layers, 0)

    def restore(self, checkpoint: CacheCheckpoint) -> None:
        """Forgets everything after the checkpoint, the active set included."""
        for stores, lengths in ((self.visual, checkpoint.visual_len), (self.text, checkpoint.text_len)):
            heads = (checkpoint.visual_heads if stores is self.visual else ()) or (None,) * self.num_layers
            for store, length, own in zip(stores, lengths, heads, strict=True):
                store.go_back(length, own)
        self.next_position = checkpoint.next_position
        self.lag = checkpoint.lag
        self.sparse = False

    def forget_text(self, count: int) -> None:
        """Takes back the last `count` text tokens, whose positions were one apart. The active set stays."""
        earlier = self.checkpoint().before_text(count)
        for store, length in zip(self.text, earlier.text_len, strict=True):
            assert length >= 0, "more tokens to forget than there are"
            store.length = length
        self.next_position = earlier.next_position


def _grown(store: _Store, more: int) -> int:
    """The capacity that room for `more` entries takes; at least doubled, so that a long chat rarely copies."""
    need = store.length + more
    return store.capacity if need <= store.capacity else _rounded(max(need, min(2 * store.capacity, need + 4096)))
