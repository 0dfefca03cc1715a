"""The state of a session as values: media, remembered turns, and what of them is in the cache.

Everything a turn changes is one frozen `State`. It is replaced when a step is complete, and kept when a turn fails.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..models.interface import MediaKind, ProgressFn, TokenMap, VisualInputs, VisualTokens
from .cache import CacheCheckpoint
from .config import Sparsity
from .diagnostics import Selection, held_mass
from .head_sets import HeadSets, behind, by_head, chosen, is_shared, joined, on_cpu
from .sparsity.base import Method, Survivors
from .sparsity.registry import make_method


@dataclass(eq=False)
class MediaItem:
    """One attached image or video. Pixels go once the features are there; features stay, unpruned."""

    number: int
    key: str  # content hash
    kind: MediaKind
    source: str
    height: int
    width: int
    num_frames: int
    duration_s: float
    notes: tuple[str, ...]
    decode_s: float
    token_map: TokenMap  # of the encoder's tokens
    inputs: VisualInputs | None
    # From its source, as it was or scaled down by that fraction of its tokens. Raises MediaError where the source is no
    # longer the same, InvalidRequest where no size has about as many tokens.
    read_again: Callable[[ProgressFn, float], VisualInputs]
    tokens: VisualTokens | None = None


@dataclass(frozen=True, eq=False)
class Placed:
    """A media item in the cache: the encoder's tokens, and what of them entered. Equal to itself alone."""

    tokens: VisualTokens
    survivors: Survivors
    # Per decoder layer, where a method pruned inside the decoder or evicted by head: which of the prompt's `in_store`
    # its store holds or, if merged, what the entry stands for, in the order of the store. The first item of a prompt
    # tells it of all of them, one behind the other; the others' are empty. None: every layer's store holds all.
    layers: tuple[HeadSets, ...] | None = None
    # Where positions have one axis: that of its first place, how many places it takes, and those of its survivors, (M,)
    # int64; None: it takes one for each.
    start: int = 0
    room: int = 0
    places: Tensor | None = None

    def in_store(self) -> Tensor:
        """Indices into the encoder's tokens of what entered the visual store, in its order."""
        return self.survivors.sources[~self.survivors.tokens.token_map.structural]

    @property
    def spared(self) -> int:
        """Positions that would be free if the survivors moved up."""
        return 0 if self.places is None else self.room - len(self.places)

    def store_positions(self) -> Tensor:
        """Of what entered the visual store, where positions have one axis: (S,) int64 in its order."""
        structural = self.survivors.tokens.token_map.structural
        places = torch.arange(len(structural)) if self.places is None else self.places
        return self.start + places[~structural]


@dataclass(frozen=True)
class State:
    """What a session holds between two steps."""

    checkpoint: CacheCheckpoint
    records: tuple[Record, ...] = ()
    open_media: tuple[MediaItem, ...] = ()  # of the user's turn that has no question yet
    prefilled: int = 0  # how many of them are in the cache
    placed: tuple[Placed, ...] = ()  # in the order of the visual store
    next_number: int = 1
    stale: bool = False  # the cache is empty and has to be built again from the records

    @property
    def media(self) -> tuple[MediaItem, ...]:
        """All items, in the order of the conversation."""
        return tuple(m for record in self.records for m in record.media) + self.open_media

    @property
    def pending(self) -> tuple[MediaItem, ...]:
        """Items that are not in the cache yet."""
        return self.open_media[self.prefilled :]

    def with_media(self, item: MediaItem) -> State:
        """The same with one more item for the next question."""
        return replace(self, open_media=(*self.open_media, item), next_number=item.number + 1)

    def without_media(self, number: int) -> State:
        """The same without the item `number`; the cache no longer fits it."""
        records = tuple(record.without_media(number) for record in self.records)
        return replace(self, records=records, open_media=tuple(m for m in self.open_media if m.number != number))


@dataclass(frozen=True)
class Record:
    """One remembered turn."""

    question: str
    answer: str
    answer_ids: tuple[int, ...]
    session_media: tuple[MediaItem, ...]  # attached before the question
    own_media: tuple[MediaItem, ...]  # that came with the question
    before: State  # where `undo` goes back to: session media in the cache, nothing of the turn
    asked: State  # all media in the cache, the question not yet

    @property
    def media(self) -> tuple[MediaItem, ...]:
        return self.session_media + self.own_media

    def without_media(self, number: int) -> Record:
        return replace(
            self,
            session_media=tuple(m for m in self.session_media if m.number != number),
            own_media=tuple(m for m in self.own_media if m.number != number),
        )


@dataclass(frozen=True)
class Policy:
    """The sparsity a caller asked for, by name or as a method of their own; None: the default of each kind of media."""

    sparsity: Sparsity | Method | None
    auto: Mapping[MediaKind, Sparsity]

    def of_kind(self, kind: MediaKind) -> Sparsity | Method:
        return self.auto[kind] if self.sparsity is None else self.sparsity

    def of_all(self, media: Sequence[MediaItem]) -> Sparsity | Method:
        """One policy for a turn over several items: a video's, if there is one."""
        return self.of_kind("video" if any(m.kind == "video" for m in media) else "image")

    def method(self, kind: MediaKind) -> Method:
        return make_method(self.of_kind(kind))

    def planned_keep(self, item: MediaItem) -> int:
        """Non-structural tokens of an item that will enter the language model."""
        return self.method(item.kind).planned_keep(item.token_map, item.kind)

    def planned_positions(self, item: MediaItem) -> int:
        """Upper bound of the positions an item takes."""
        return self.planned_keep(item) + int(item.token_map.structural.sum())


def select(placed: Sequence[Placed], scores: Sequence[Tensor] | None, active: Sequence[HeadSets] | None) -> Selection:
    """One turn's view of the media in the cache.

    scores and active, per layer, are of the entries of that layer's store: scores (n,), or (H_kv, n) of each key head.
    """
    stored = _stored(placed)
    if stored is not None:
        size = sum(len(item.in_store()) for item in placed)
        if scores is not None:
            scores = [_spread(s.cpu(), here, size) for here, s in zip(stored, scores, strict=True)]
        if active is None:
            active = stored
        else:
            active = [chosen(here, on_cpu(sets)) for here, sets in zip(stored, active, strict=True)]
    mass = None
    if scores is not None:
        scores = [s.cpu() for s in scores]
        if active is not None and any(s.ndim == 2 for s in scores):
            mass = tuple(held_mass(s, on_cpu(sets)) for s, sets in zip(scores, active, strict=True))
        scores = [s.mean(dim=0) if s.ndim == 2 else s for s in scores]
    offset, store, saliency = 0, [], []
    for item in placed:
        store.append(item.in_store() + offset)
        offset += len(item.tokens)
        given = item.tokens.saliency
        saliency.append(torch.zeros(len(item.tokens)) if given is None else given.cpu())
    return Selection(
        token_map=TokenMap.concat([item.tokens.token_map for item in placed]),
        saliency=torch.cat(saliency),
        store=torch.cat(store),
        scores=None if scores is None else tuple(scores),
        active=None if active is None else tuple(map(on_cpu, active)),
        mass=mass,
    )


def _spread(scores: Tensor, here: HeadSets, size: int) -> Tensor:
    """Scores of a layer's entries, (n,) or (H_kv, n), as those of all that entered: 0 for what the layer lacks."""
    if scores.ndim == 1 and isinstance(here, Tensor):
        return torch.zeros(size).scatter(0, here, scores)
    each = by_head(here) * len(scores) if is_shared(here) else by_head(here)
    rows = [torch.zeros(size).scatter(0, own, s[: len(own)]) for own, s in zip(each, scores, strict=True)]
    return torch.stack(rows)


def _stored(placed: Sequence[Placed]) -> Sequence[HeadSets] | None:
    """Per layer, which of all that entered its store holds, in its order; None: each holds all of it."""
    pruned = [item.layers for item in placed if item.layers is not None]
    if not pruned:
        return None
    if len(placed) == 1:
        return pruned[0]  # as it is: a session keeps it once, however many turns look at it
    offset, parts = 0, []
    for item in placed:
        size = len(item.in_store())
        layers = item.layers or (torch.arange(size),) * len(pruned[0])
        parts.append([behind(layer, offset) for layer in layers])
        offset += size
    return [joined(layer) for layer in zip(*parts, strict=True)]


def pruned_inside(placed: Sequence[Placed], stayed: Sequence[HeadSets] | None) -> list[Placed]:
    """Items that one prefill placed, with what of them each layer's store holds.

    stayed: `Prefilled.stayed`, indices into all visual tokens of that prefill.
    """
    if stayed is None:
        return list(placed)
    nothing = (torch.empty(0, dtype=torch.int64),) * len(stayed)
    return [replace(item, layers=nothing if i else tuple(stayed)) for i, item in enumerate(placed)]
