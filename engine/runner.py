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

from ..kernels.extend_attention import extend_attention
from ..kernels.retrieval import retrieval
from ..models.interface import Progress, ProgressFn, VisionLanguageModel, VisualTokens, no_progress
from .cache import KVCache
from .decode_step import AngleTable, Answer, DecodeStep
from .sampler import Sampler
from .sparsity.base import Method, Rows

CHUNK_TOKENS = 1024  # bounds a prefill's activations; results depend on it only by rounding


@dataclass(frozen=True)
class TextSpan:
    """Token ids that are prefilled as they stand."""

    ids: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class VisualSpan:
    """Visual tokens that survived pruning, structural ones included."""

    tokens: VisualTokens

    def __len__(self) -> int:
        return len(self.tokens)


Span = TextSpan | VisualSpan


@dataclass(frozen=True)
class Prefilled:
    """What a prefill leaves behind besides the cache."""

    hidden: Tensor  # (hidden_size,) of the last token
    scores: list[Tensor] | None  # per layer (N,) float32, mean over heads and rows, if they were asked for
    layer_tokens: list[int]  # tokens that each layer computed


@dataclass
class _Chunk:
    """Consecutive tokens on their way through the layers; pruning inside the decoder shortens them."""

    hidden: Tensor  # (M, hidden_size)
    cos: Tensor  # (M, D/2), of the positions
    sin: Tensor
    visual: Tensor  # (M,) bool
    after_media: Tensor  # (M,) bool: stands after the last visual token of this prefill
    num_visual: int

    def __len__(self) -> int:
        return self.hidden.shape[0]

    def select(self, stays: Tensor) -> None:
        """Keeps the tokens stays (M,) bool; they keep their positions."""
        for name in ("hidden", "cos", "sin", "visual", "after_media"):
            setattr(self, name, getattr(self, name)[stays])
        self.num_visual = int(self.visual.sum())


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

        They attend to the visual store, or to the active set while one is active. With `score`, every row's attention
        to the visual store is averaged over heads and rows: the rows of a question, after its media.
        """
        total = sum(len(span) for span in spans)
        assert total > 0, "nothing to prefill"
        has_visual = any(isinstance(span, VisualSpan) for span in spans)
        assert not (score and has_visual), "only a question behind its media is scored"
        prunes = has_visual and any(method.layer_rows(i) for i in range(cache.num_layers))
        # A method that prunes after a layer needs all tokens at that layer, so they walk through it together.
        block = total if prunes else self.chunk_tokens
        positions, next_position = self._positions(spans, cache.next_position)
        mass = [torch.zeros(n, device=self.device) for n in cache.visual_lens()] if score else None
        layer_tokens = [0] * cache.num_layers
        hidden = torch.empty(0)
        for start in range(0, total, block):
            end = min(start + block, total)
            chunks = [
                self._chunk(spans, positions, c, min(c + self.chunk_tokens, end))
                for c in range(start, end, self.chunk_tokens)
            ]
            for layer in range(cache.num_layers):
                progress(Progress("prefill", start + (end - start) * layer // cache.num_layers, total, "tokens"))
                layer_tokens[layer] += sum(map(len, chunks))
                self._layer(cache, layer, chunks, method if prunes else None, mass)
            hidden = chunks[-1].hidden[-1]
        cache.next_position = next_position
        progress(Progress("prefill", total, total, "tokens"))
        scores = None if mass is None else [m / (self.decoder.config.num_heads * total) for m in mass]
        return Prefilled(hidden, scores, layer_tokens)

    def _layer(
        self, cache: KVCache, layer: int, chunks: list[_Chunk], method: Method | None, mass: list[Tensor] | None
    ) -> None:
        """One layer over all chunks of a block, in order."""
        module = self.decoder.layer(layer)
        rows = method.layer_rows(layer) if method else None
        first_visual = cache.visual[layer].length
        seen: list[tuple[Tensor, Tensor]] = []  # q and lse of the rows that the method wants
        for i, chunk in enumerate(chunks):
            q, k, v = module.project(chunk.hidden, chunk.cos, chunk.sin)
            attended, lse = extend_attention(q, k, v, *cache.segments(layer))
            if mass is not None and len(mass[layer]):
                mass[layer] += retrieval(q, cache.visual_keys(layer), lse)
            cache.append(layer, k, v, chunk.visual, chunk.num_visual)
            chunk.hidden = module.finish(chunk.hidden, attended)
            if rows is not None:
                wanted = _wanted_rows(chunk, rows, last=i == len(chunks) - 1)
                seen.append((q[:, wanted], lse[:, wanted]))
        if method is not None and rows is not None:
            self._prune(cache, layer, chunks, method, seen, first_visual)

    def _prune(
        self,
        cache: KVCache,
        layer: int,
        chunks: list[_Chunk],
        method: Method,
        seen: list[tuple[Tensor, Tensor]],
        first_visual: int,
    ) -> None:
        """Asks the method which of this block's visual tokens go on, and drops the others from the chunks."""
        q, lse = torch.cat([q for q, _ in seen], dim=1), torch.cat([lse for _, lse in seen], dim=1)
        scores = retrieval(q, cache.visual_keys(layer)[:, first_visual:], lse) / (q.shape[0] * q.shape[1])
        keep = method.on_layer(layer, scores)
        if keep is None:
            return
        goes_on = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
        goes_on[keep] = True
        offset = 0
        for chunk in chunks:
            count = int(chunk.visual.sum())
            stays = ~chunk.visual
            stays[chunk.visual] = goes_on[offset : offset + count]
            offset += count
            chunk.select(stays)
        chunks[:] = [chunk for chunk in chunks if len(chunk)]

    def _positions(self, spans: Sequence[Span], start: int) -> tuple[Tensor, int]:
        """Positions (M,) or, of multimodal RoPE, (3, M) of all tokens, and the next free one."""
        parts = []
        for span in spans:
            if isinstance(span, TextSpan):
                positions, start = self.model.text_positions(len(span), start)
            else:
                positions, start = self.model.visual_positions(span.tokens.token_map, start)
            parts.append(positions)
        return torch.cat(parts, dim=-1).to(self.device), start

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
        return _Chunk(
            torch.cat(hidden),
            *self.decoder.angles(positions[..., start:end]),
            is_visual.to(self.device),
            torch.arange(start, end, device=self.device) >= last_visual,
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


def _wanted_rows(chunk: _Chunk, rows: Rows, *, last: bool) -> Tensor:
    """(M,) bool: the rows of a chunk whose scores a method wants."""
    if rows == "question":
        return chunk.after_media
    wanted = torch.zeros_like(chunk.after_media)
    if last:
        wanted[-1] = True
    return wanted
