"""Drives the decoder over a cache: prefill in chunks, decode token by token.

The loop over layers lives here, so that models know nothing of caches and sparsity. No mask over all keys is ever
built: a chunk attends to the two stores (everything in them came before it) and causally to itself. So causality
follows the order of the sequence, whatever the order in the stores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..kernels.attention import attention, merge_attention
from ..kernels.extend_attention import extend_attention
from ..kernels.retrieval import retrieval
from ..models.interface import Progress, ProgressFn, TokenMap, VisionLanguageModel, VisualTokens, no_progress
from .cache import KVCache
from .decode_step import AngleTable, Answer, DecodeStep
from .head_sets import HeadSets
from .sampler import Sampler
from .sparsity.base import Method, Rows

CHUNK_TOKENS = 1024  # bounds a prefill's activations; results depend on it only by rounding


@dataclass(frozen=True)
class TextSpan:
    """Token ids that are prefilled as they stand."""

    ids: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, eq=False)
class Places:
    """Where the survivors of a medium stand among all positions that the medium takes, where those have one axis."""

    index: Tensor  # (M,) int64
    total: int


@dataclass(frozen=True)
class VisualSpan:
    """Visual tokens that survived pruning, structural ones included."""

    tokens: VisualTokens
    places: Places | None = None  # None: where the model puts what is there

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def num_positions(self) -> int:
        """Positions it takes at most."""
        return len(self.tokens) if self.places is None else self.places.total


Span = TextSpan | VisualSpan
_Part = int | TokenMap | Places


@dataclass(frozen=True)
class Prefilled:
    """What a prefill leaves behind besides the cache."""

    hidden: Tensor  # (hidden_size,) of the last token
    # Per layer float32, if they were asked for: (N,), mean over heads and rows, or, where the method has them by head,
    # (H_kv, N), mean over the query heads of each key head; -1 where a head has no such entry.
    scores: list[Tensor] | None
    layer_tokens: list[int]  # tokens that each layer computed
    # Per layer, where a method prunes inside the decoder or evicts by head: which of this prefill's visual tokens are
    # in its store or, if merged, what the entry stands for, in the order of the store.
    stayed: tuple[HeadSets, ...] | None = None


@dataclass
class _Chunk:
    """Consecutive tokens on their way through the layers; pruning inside the decoder shortens them."""

    hidden: Tensor  # (M, hidden_size)
    positions: Tensor  # (M,) or, of multimodal RoPE, (3, M)
    cos: Tensor  # (M, D/2), of the positions
    sin: Tensor
    visual: Tensor  # (M,) bool
    after_media: Tensor  # (M,) bool: stands after the last visual token of this prefill
    raters: Tensor  # (M,) bool: those of them that the method has rate
    num_visual: int

    def __len__(self) -> int:
        return self.hidden.shape[0]

    def select(self, stays: Tensor) -> None:
        """Keeps the tokens stays (M,) bool; they keep their positions."""
        for name in ("hidden", "cos", "sin", "visual", "after_media", "raters"):
            setattr(self, name, getattr(self, name)[stays])
        self.positions = self.positions[..., stays]
        self.num_visual = int(self.visual.sum())

    def insert(self, at: int, hidden: Tensor) -> None:
        """Puts new visual tokens hidden (m, hidden_size) in front of the token `at`; they have no positions yet."""
        m = len(hidden)
        none = self.visual.new_zeros(m)
        for name, new in (("hidden", hidden), ("visual", ~none), ("after_media", none), ("raters", none)):
            old = getattr(self, name)
            setattr(self, name, torch.cat([old[:at], new, old[at:]]))
        self.num_visual += m


class Runner:
    """Knows the model; the cache is an argument. What it keeps for each cache are buffers (and graphs) of its steps.

    `runs_ahead` lets a step begin before the host has read the token it follows; None: on a GPU.
    """

    def __init__(
        self, model: VisionLanguageModel, *, chunk_tokens: int = CHUNK_TOKENS, runs_ahead: bool | None = None
    ) -> None:
        self.model = model
        self.decoder = model.decoder
        self.chunk_tokens = chunk_tokens
        self.runs_ahead = self.device.type == "cuda" if runs_ahead is None else runs_ahead
        self.graphs = self.device.type == "cuda"  # of caches that have not decoded yet; off for comparisons
        self._angles = AngleTable(model, self.device)
        self._steps: WeakKeyDictionary[KVCache, DecodeStep] = WeakKeyDictionary()

    @property
    def device(self) -> torch.device:
        return self.decoder.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder.norm.weight.dtype

    def new_cache(self) -> KVCache:
        config = self.decoder.config
        return KVCache(
            num_layers=config.num_layers,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            dtype=self.dtype,
            device=self.device,
        )

    # Prefill

    @torch.inference_mode()
    def prefill(
        self,
        cache: KVCache,
        spans: Sequence[Span],
        *,
        method: Method,
        score: bool = False,
        progress: ProgressFn = no_progress,
    ) -> Prefilled:
        """Appends `spans` to the cache, which has room for them (`cache.reserve`).

        They attend to the visual store, or to the active set while one is active. With `score`, the question's
        attention to the visual store is averaged over heads and rows: all rows, or those after the media among them.
        """
        total = sum(len(span) for span in spans)
        assert total > 0, "nothing to prefill"
        has_visual = any(isinstance(span, VisualSpan) for span in spans)
        num_visual = sum(s.tokens.token_map.num_visual for s in spans if isinstance(s, VisualSpan))
        prunes = num_visual > 0 and any(method.layer_rows(i) for i in range(cache.num_layers))
        evicts = num_visual > 0 and method.window > 0
        assert not (prunes and evicts), "a method drops tokens on their way or entries by head, not both"
        # A method that prunes after a layer needs all tokens at that layer, so they walk through it together; so does a
        # question that is scored over media which are not in the store before it.
        block = total if prunes or evicts or (score and has_visual) else self.chunk_tokens
        positions, next_position = self._positions(_parts(spans), cache.next_position)
        mass = _Mass(cache, self.device, apart=method.scores_per_head) if score else None
        eviction = _Eviction(cache, method, num_visual) if evicts else None
        layer_tokens = [0] * cache.num_layers
        pruning = _Pruning(self, cache, spans, next_position, method) if prunes else None
        hidden = torch.empty(0)
        num_rows = len(spans[-1]) if has_visual else total
        assert not score or isinstance(spans[-1], TextSpan), "a question ends the prompt"
        for start in range(0, total, block):
            end = min(start + block, total)
            chunks = [
                self._chunk(spans, positions, c, min(c + self.chunk_tokens, end))
                for c in range(start, end, self.chunk_tokens)
            ]
            if pruning is not None:
                pruning.choose_raters(chunks)
            for layer in range(cache.num_layers):
                progress(Progress("prefill", start + (end - start) * layer // cache.num_layers, total, "tokens"))
                if cache.lag and (step := cache.lag[layer] - (cache.lag[layer - 1] if layer else 0)):
                    for chunk in chunks:
                        self._move(chunk, chunk.positions - step)
                if pruning is not None:
                    pruning.before(layer, chunks)
                layer_tokens[layer] += sum(map(len, chunks))
                self._layer(cache, layer, chunks, pruning or eviction, mass, with_media=has_visual)
            hidden = chunks[-1].hidden[-1]
        cache.next_position = next_position
        if pruning is not None:
            cache.lag = pruning.lag()
        progress(Progress("prefill", total, total, "tokens"))
        scores = None if mass is None else mass.means(self.decoder.config.num_heads, num_rows)
        stayed = next((tuple(found.stayed) for found in (pruning, eviction) if found is not None), None)
        return Prefilled(hidden, scores, layer_tokens, stayed)

    def _move(self, chunk: _Chunk, positions: Tensor) -> None:
        """Puts the tokens of a chunk at other positions, from the next layer on."""
        chunk.positions = positions
        chunk.cos, chunk.sin = self.decoder.angles(positions)

    def _layer(
        self,
        cache: KVCache,
        layer: int,
        chunks: list[_Chunk],
        pruning: _Pruning | _Eviction | None,
        mass: _Mass | None,
        *,
        with_media: bool,
    ) -> None:
        """One layer over all chunks of a block, in order; `with_media` says that its media are in the block too."""
        module = self.decoder.layer(layer)
        rows = None if pruning is None else pruning.rows_after(layer)
        seen: list[tuple[Tensor, Tensor]] = []  # q and lse of the rows that the method wants
        asked: list[tuple[Tensor, Tensor]] = []  # and of the question's, where its media are not in the store yet
        for i, chunk in enumerate(chunks):
            q, k, v = module.project(chunk.hidden, chunk.cos, chunk.sin)
            attended, lse = _extended(q, k, v, cache, layer)
            if mass is not None and with_media:
                asked.append((q[:, chunk.after_media], lse[:, chunk.after_media]))
            elif mass is not None:
                mass.add(layer, q, lse)
            cache.append(layer, k, v, chunk.visual, chunk.num_visual)
            chunk.hidden = module.finish(chunk.hidden, attended)
            if rows is not None:
                wanted = _wanted_rows(chunk, rows, last=i == len(chunks) - 1)
                seen.append((q[:, wanted], lse[:, wanted]))
        if isinstance(pruning, _Eviction):  # before the question is scored: over what it leaves
            pruning.after(layer, seen)
        if mass is not None and asked:
            mass.add(layer, *_joined(asked))
        if isinstance(pruning, _Pruning):
            pruning.after(layer, chunks, seen)

    def _positions(self, parts: Sequence[_Part], start: int) -> tuple[Tensor, int]:
        """Positions (M,) or, of multimodal RoPE, (3, M) of all tokens, and the next free one.

        A part is a number of text tokens, what there is of one media item, or where that stands.
        """
        found = []
        for part in parts:
            if isinstance(part, int):
                positions, start = self.model.text_positions(part, start)
            elif isinstance(part, Places):
                places, start = self.model.text_positions(part.total, start)
                positions = places[part.index]
            else:
                positions, start = self.model.visual_positions(part, start)
            found.append(positions)
        return torch.cat(found, dim=-1).to(self.device), start

    def _chunk(self, spans: Sequence[Span], positions: Tensor, start: int, end: int) -> _Chunk:
        """Tokens start..end of the spans, embedded; the projector runs here, so its output is never held whole."""
        hidden, visual = [], []
        offset = last_visual = 0
        for span in spans:
            here = slice(max(start - offset, 0), min(end - offset, len(span)))
            if isinstance(span, VisualSpan):
                last_visual = offset + len(span)
            offset += len(span)
            if here.start >= here.stop:
                continue
            if isinstance(span, TextSpan):
                hidden.append(self.decoder.embed(torch.tensor(span.ids[here], device=self.device)))
                visual.append(torch.zeros(here.stop - here.start, dtype=torch.bool))
            else:
                tokens = span.tokens.select(torch.arange(here.start, here.stop))
                hidden.append(self.model.embed_visual(tokens))
                visual.append(~tokens.token_map.structural)
        is_visual = torch.cat(visual)
        after_media = torch.arange(start, end, device=self.device) >= last_visual
        return _Chunk(
            torch.cat(hidden),
            positions[..., start:end],
            *self.decoder.angles(positions[..., start:end]),
            is_visual.to(self.device),
            after_media,
            after_media,
            num_visual=int(is_visual.sum()),
        )

    # Decode

    def answer(self, cache: KVCache, hidden: Tensor, sampler: Sampler, limit: int) -> Answer:
        """The answer behind a prefill that left `hidden`; the cache has room for `limit` more text tokens."""
        return Answer(
            self._step_of(cache), cache, sampler, lambda: self.logits(hidden), self.step,
            limit=limit, runs_ahead=self.runs_ahead, device=self.device,
        )  # fmt: skip

    @torch.inference_mode()
    def step(self, step: DecodeStep, cache: KVCache, sampler: Sampler) -> None:
        """One step of an answer: appends the token that was chosen last and chooses the next, without waiting."""
        cache.advance()
        step.run(cache, sampler)

    @torch.inference_mode()
    def decode(self, cache: KVCache, token_id: int) -> Tensor:
        """Appends one token that the caller chose and returns the logits (vocab_size,) float32 of the next."""
        step = self._step_of(cache)
        step.begin(cache)
        step.feed(token_id)
        cache.advance()
        return step.forward(cache)

    def _step_of(self, cache: KVCache) -> DecodeStep:
        if cache not in self._steps:
            self._steps[cache] = DecodeStep(self.model, self._angles, self.device, graphs=self.graphs)
        return self._steps[cache]

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (hidden_size,) of a last token -> (vocab_size,) float32."""
        return self.decoder.logits(hidden[None])[0]


class _Mass:
    """How much the rows of a question look at each entry of the visual stores, layer by layer, chunk by chunk."""

    def __init__(self, cache: KVCache, device: torch.device, *, apart: bool) -> None:
        self._cache, self._apart = cache, apart
        # (N,) or (H_kv, N), of N as it is when the layer is first scored: media may come with the question.
        self._sums: list[Tensor | None] = [None] * cache.num_layers
        self._device = device

    def add(self, layer: int, q: Tensor, lse: Tensor) -> None:
        """q (H, M, D) and lse (H, M) of rows behind everything that the visual store holds."""
        store = self._cache.visual[layer]
        if store.length == 0:
            return
        if store.heads is None:
            new = retrieval(q, self._cache.visual_keys(layer), lse, per_head=self._apart)
        else:
            assert self._apart, "heads that hold different entries are scored each for itself"
            new = torch.zeros(len(store.heads), store.length, device=self._device)
            own = zip(q.chunk(len(store.heads)), lse.chunk(len(store.heads)), strict=True)
            for head, (rows, row_lse) in enumerate(own):
                k, _ = store.segment_of(head)
                if k.shape[1]:
                    new[head, : k.shape[1]] = retrieval(rows, k, row_lse)
        earlier = self._sums[layer]
        self._sums[layer] = new if earlier is None else earlier + new

    def means(self, num_heads: int, num_rows: int) -> list[Tensor]:
        """`Prefilled.scores`."""
        found = []
        for store, sums in zip(self._cache.visual, self._sums, strict=True):
            H_kv = store.k.shape[0]
            if sums is None:
                sums = torch.zeros((H_kv, 0) if self._apart else (0,), device=self._device)
            mean = sums / ((num_heads // H_kv if self._apart else num_heads) * num_rows)
            for head, length in enumerate(store.heads or ()):
                mean[head, length:] = -1
            found.append(mean)
        return found


class _Eviction:
    """What each key head keeps of one prefill's visual tokens, all of which go through all layers."""

    def __init__(self, cache: KVCache, method: Method, num_visual: int) -> None:
        self._cache, self._method, self._num_visual = cache, method, num_visual
        self.stayed: list[HeadSets] = []  # per layer

    def rows_after(self, layer: int) -> Rows:
        """Which rows of a layer `after` needs."""
        return "question"

    def after(self, layer: int, seen: list[tuple[Tensor, Tensor]]) -> None:
        """Evicts from a layer's store; seen: q and lse of the rows behind the media, chunk by chunk."""
        q, lse = _joined(seen)
        assert q.shape[1], "a method that evicts by head needs the question"
        q, lse = q[:, -self._method.window :], lse[:, -self._method.window :]
        keys = self._cache.last_visual_keys(layer, self._num_visual)
        scores = retrieval(q, keys, lse, per_head=True) / (q.shape[0] // len(keys) * q.shape[1])
        keep = self._method.on_heads(layer, scores)
        self._cache.evict(layer, self._num_visual, keep)
        self.stayed.append(tuple(own.cpu() for own in keep))


class _Pruning:
    """What a method drops of one prefill's visual tokens on their way through the layers, which they walk together."""

    def __init__(self, runner: Runner, cache: KVCache, spans: Sequence[Span], next_position: int, method: Method):
        self._runner, self._cache, self._method = runner, cache, method
        self._parts, self._next_position = _maps(spans), next_position
        # Indices among this prefill's visual tokens of those that are still there, in the order of the sequence.
        self._num_visual = sum(part.num_visual for part in self._parts if not isinstance(part, int))
        self._there = torch.arange(self._num_visual)
        self._merged = torch.zeros(self._num_visual, dtype=torch.bool)  # which of them are new tokens that stand for it
        self._lag = list(cache.lag or [0] * cache.num_layers)
        self.stayed: list[Tensor] = []  # per layer, what `_there` was when it ran

    def choose_raters(self, chunks: list[_Chunk]) -> None:
        """Asks the method for the rows that rate, before the first layer, if any layer wants them."""
        if all(self._method.layer_rows(layer) != "raters" for layer in range(self._cache.num_layers)):
            return
        text = torch.cat([chunk.hidden[chunk.after_media] for chunk in chunks])
        chosen = self._method.raters((chunk.hidden[chunk.visual] for chunk in chunks), text)
        for chunk in chunks:
            count = int(chunk.after_media.sum())
            chunk.raters = chunk.after_media.clone()
            chunk.raters[chunk.after_media], chosen = chosen[:count], chosen[count:]

    def rows_after(self, layer: int) -> Rows | None:
        """Which rows of a layer `after` needs."""
        rows = self._method.layer_rows(layer)
        return None if rows == "before" else rows

    def before(self, layer: int, chunks: list[_Chunk]) -> None:
        """Prunes before a layer runs, where the method does: the last row, by this layer's projections."""
        if self._method.layer_rows(layer) == "before":
            module = self._runner.decoder.layer(layer)
            projected = [module.project(chunk.hidden, chunk.cos, chunk.sin) for chunk in chunks]
            q = projected[-1][0][:, -1:]  # (H, 1, D): sees every key
            pairs = [*self._cache.segments(layer), *((k, v) for _, k, v in projected)]
            _, lse = merge_attention([attention(q, *pair, causal=False) for pair in pairs if pair[0].shape[1]])
            keys = [k[:, chunk.visual] for (_, k, _), chunk in zip(projected, chunks, strict=True)]
            self._drop(layer, retrieval(q, torch.cat(keys, dim=1), lse) / q.shape[0], chunks, first_without=layer)
        self.stayed.append(self._there)

    def after(self, layer: int, chunks: list[_Chunk], seen: list[tuple[Tensor, Tensor]]) -> None:
        """Prunes after a layer, where the method does; seen: q and lse of the rows it wanted, chunk by chunk."""
        if not seen:
            return
        q, lse = _joined(seen)
        keys = self._cache.visual_keys(layer)[:, -len(self._there) :]
        self._drop(layer, retrieval(q, keys, lse) / (q.shape[0] * q.shape[1]), chunks, first_without=layer + 1)

    def _drop(self, layer: int, scores: Tensor, chunks: list[_Chunk], *, first_without: int) -> None:
        """Asks the method which visual tokens go on, and drops the others from the chunks."""
        keep = self._method.on_layer(layer, scores)
        if keep is None or len(keep) == len(scores):
            return
        goes_on = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
        goes_on[keep] = True
        stays_there = goes_on.cpu()
        there, merged = self._there[stays_there], self._merged[stays_there]
        new = None
        if self._method.recycles:
            dropped = torch.cat([chunk.hidden[chunk.visual] for chunk in chunks])[~goes_on]
            new, stand_for = self._method.recycle(dropped, scores[~goes_on])
            there = torch.cat([there, self._there[~stays_there][stand_for.cpu()]])
            merged = torch.cat([merged, torch.ones(len(new), dtype=torch.bool)])
        self._there, self._merged = there, merged
        offset = 0
        for chunk in chunks:
            count = int(chunk.visual.sum())
            stays = ~chunk.visual
            stays[chunk.visual] = goes_on[offset : offset + count]
            offset += count
            chunk.select(stays)
        chunks[:] = [chunk for chunk in chunks if len(chunk)]
        if new is not None:
            question = next(chunk for chunk in chunks if bool(chunk.after_media.any()))
            question.insert(int(torch.nonzero(question.after_media)[0]), new)
        if self._method.renumbers:
            self._renumber(layer, chunks, first_without)

    def _renumber(self, layer: int, chunks: list[_Chunk], first_without: int) -> None:
        """Places the tokens of the chunks as if the dropped ones had never been, from `first_without` on."""
        earlier = self._cache.lag[layer] if self._cache.lag else 0
        positions, after = self._runner._positions(self._parts_there(), self._cache.next_position - earlier)
        for chunk, own in zip(chunks, positions.split([len(chunk) for chunk in chunks], dim=-1), strict=True):
            self._runner._move(chunk, own)
        behind = self._next_position - earlier - after
        for later in range(first_without, self._cache.num_layers):
            self._lag[later] = behind + (self._cache.lag[later] if self._cache.lag else 0)

    def _parts_there(self) -> list[int | TokenMap]:
        """Text, and what is still there of the media; merged tokens count as text behind them."""
        parts: list[int | TokenMap] = []
        there = torch.zeros(self._num_visual, dtype=torch.bool)
        there[self._there[~self._merged]] = True
        offset, last = 0, max(i for i, part in enumerate(self._parts) if not isinstance(part, int))
        for i, part in enumerate(self._parts):
            if not isinstance(part, int):
                stays = part.structural.clone()
                stays[~part.structural] = there[offset : offset + part.num_visual]
                offset += part.num_visual
                part = part.select(torch.nonzero(stays)[:, 0])
            parts.append(part)
            if i == last:
                parts.append(int(self._merged.sum()))
        return parts

    def lag(self) -> tuple[int, ...]:
        """`KVCache.lag` behind this prefill."""
        return tuple(self._lag) if any(self._lag) else ()


def _extended(q: Tensor, k: Tensor, v: Tensor, cache: KVCache, layer: int) -> tuple[Tensor, Tensor]:
    """Attention of a chunk over the stores and itself; head by head where key heads hold different numbers."""
    if not cache.reads_by_head(layer):
        return extend_attention(q, k, v, *cache.segments(layer))
    stores = cache.by_head(layer)
    group = q.shape[0] // len(stores)
    found = [
        extend_attention(q[h * group : (h + 1) * group], k[h : h + 1], v[h : h + 1], *own)
        for h, own in enumerate(stores)
    ]
    return torch.cat([out for out, _ in found]), torch.cat([lse for _, lse in found])


def _joined(rows: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """q (H, M, D) and lse (H, M) of chunks, one behind the other."""
    return torch.cat([q for q, _ in rows], dim=1), torch.cat([lse for _, lse in rows], dim=1)


def _maps(spans: Sequence[Span]) -> list[int | TokenMap]:
    """The number of text tokens, or the map of a media item."""
    return [len(span) if isinstance(span, TextSpan) else span.tokens.token_map for span in spans]


def _parts(spans: Sequence[Span]) -> list[_Part]:
    """What positions depend on: the number of text tokens, the map of a media item, or the places it keeps."""
    return [len(span) if isinstance(span, TextSpan) else span.places or span.tokens.token_map for span in spans]


def _wanted_rows(chunk: _Chunk, rows: Rows, *, last: bool) -> Tensor:
    """(M,) bool: the rows of a chunk whose scores a method wants."""
    if rows == "question":
        return chunk.after_media
    if rows == "raters":
        return chunk.raters
    wanted = torch.zeros_like(chunk.after_media)
    if last:
        wanted[-1] = True
    return wanted
