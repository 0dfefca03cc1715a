"""Keys and values of a session: what makes soft retrieval cheap.

Per decoder layer there are three stores, keys already rotated:

- visual: every visual token that survived prefill, of all media. Written once, read by every question, never
  shortened by retrieval.
- text: system text, questions, answers, structural tokens, in order.
- active: a compacted copy of the visual entries that this turn may read.

A checkpoint is a few lengths; restoring one forgets what came after it. Lengths are kept per layer, because a
method may prune inside the language model. The host keeps the books; while an answer is decoded, a copy of the lengths
on the device is what its steps read and count up (`lengths`), so that none of them waits for the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..kernels.compaction import compaction

Segment = tuple[Tensor, Tensor]  # k, v, each (H_kv, n, D)

_GRAIN = 256  # capacities are multiples of it, so that every head's first row is aligned alike


@dataclass(frozen=True)
class CacheCheckpoint:
    """What a cache holds at one moment."""

    visual_len: tuple[int, ...]  # per layer
    text_len: tuple[int, ...]  # per layer
    next_position: int
    lag: tuple[int, ...] = ()

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
        self.length = 0

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
        self.k[:, self.length : end] = k
        self.v[:, self.length : end] = v
        self.length = end

    def segment(self) -> Segment:
        """A view of what is there; valid until the next append or reserve."""
        return self.k[:, : self.length], self.v[:, : self.length]


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
        # Per layer: entries of (active set or visual store, text store). Valid from `publish` to the next prefill.
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

    def activate(self, keep: Sequence[Tensor]) -> None:
        """Compacts the visual entries keep[layer] (k,) int64, ascending, into the active set of each layer."""
        for target, indices in zip(self.active, keep, strict=True):
            target.length = 0
            self.moves += target.reserve(_rounded(len(indices)))
        compaction(
            [t[:, : source.length] for source in self.visual for t in (source.k, source.v)],
            [indices for indices in keep for _ in range(2)],
            [t for target in self.active for t in (target.k, target.v)],
        )
        for target, indices in zip(self.active, keep, strict=True):
            target.length = len(indices)
        self.sparse = True

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

    def visual_lens(self) -> list[int]:
        return [store.length for store in self.visual]

    def entries(self) -> list[int]:
        """Entries of all a layer holds, visual and text, whatever is active."""
        return [visual.length + text.length for visual, text in zip(self.visual, self.text, strict=True)]

    def active_lens(self) -> list[int]:
        """Visual entries that a decode step reads, per layer."""
        return [store.length for store in (self.active if self.sparse else self.visual)]

    def read_bytes(self) -> int:
        """Bytes of keys and values that one decode step reads."""
        return (sum(self.active_lens()) + sum(store.length for store in self.text)) * self._entry_bytes

    # Decoding: the lengths on the device

    def publish(self) -> None:
        """Writes the lengths to the device, before the first step of an answer."""
        seen = self.active if self.sparse else self.visual
        lengths = torch.tensor([[s.length, t.length] for s, t in zip(seen, self.text, strict=True)])
        if len(self.lengths) == 0:
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
        )

    def empty_checkpoint(self) -> CacheCheckpoint:
        return CacheCheckpoint((0,) * self.num_layers, (0,) * self.num_layers, 0)

    def restore(self, checkpoint: CacheCheckpoint) -> None:
        """Forgets everything after the checkpoint, the active set included."""
        for stores, lengths in ((self.visual, checkpoint.visual_len), (self.text, checkpoint.text_len)):
            for store, length in zip(stores, lengths, strict=True):
                assert length <= store.length, "a checkpoint lies in the past"
                store.length = length
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
