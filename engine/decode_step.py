"""One step of decoding, from a token to the next, over buffers that stay where they are.

What changes from step to step (token, position, lengths of the stores, the random numbers' index) lives in tensors on
the device, and the step itself moves it on. So nothing in it depends on the host: on a GPU it is captured in a CUDA
graph once and replayed until a store has grown or another kind of choice is asked for; elsewhere the same function runs
as it is written. The host reads the chosen tokens behind the steps, and may let one step run ahead of what it has read.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from ..kernels.decode_attention import decode_attention
from ..kernels.rope_append import rope_append
from ..models.interface import VisionLanguageModel
from .cache import KVCache
from .sampler import Sampler, checked

_LEAST_ROWS = 1024  # of the table of angles
_LEAST_DICE = 256


class AngleTable:
    """cos and sin of text positions 0, 1, ...: what a step looks up by a position that only the device knows."""

    def __init__(self, model: VisionLanguageModel, device: torch.device) -> None:
        self._model, self._device = model, device
        self.cos = self.sin = torch.empty(0)  # (rows, D/2) in the model's dtype
        self.moves = 0  # how often the table was made anew

    def reach(self, position: int) -> None:
        """Makes sure that `position` is in it."""
        if position < len(self.cos):
            return
        rows = max(_LEAST_ROWS, 1 << position.bit_length())
        positions, _ = self._model.text_positions(rows, 0)
        self.cos, self.sin = self._model.decoder.angles(positions.to(self._device))
        self.moves += 1


class DecodeStep:
    """The buffers of one cache's steps and, on a GPU, the graph. Holds no reference to the cache."""

    def __init__(
        self, model: VisionLanguageModel, angles: AngleTable, device: torch.device, *, graphs: bool = False
    ) -> None:
        self._decoder, self._angles = model.decoder, angles
        self._token, self._position, self._index, self.chosen = (
            torch.zeros(1, dtype=torch.int64, device=device) for _ in range(4)
        )
        self._lag = torch.empty(0)  # (layers,) int64, once a cache has one: behind the position, per layer
        self._dice = torch.zeros(_LEAST_DICE, dtype=torch.float64, device=device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._captured: tuple[object, ...] = ()  # what the graph was captured for
        self._graphs = graphs
        self.warmup_s = 0.0  # spent on compiling and capturing, ever

    def begin(self, cache: KVCache, sampler: Sampler | None = None, limit: int = 1) -> None:
        """Brings the buffers to where the cache is, for at most `limit` steps."""
        cache.publish()
        self._position.fill_(cache.next_position)
        if cache.lag:
            if len(self._lag) == 0:
                self._lag = self._position.new_zeros(cache.num_layers)
            self._lag.copy_(torch.tensor(cache.lag))
        self._index.zero_()
        self._angles.reach(cache.next_position - min(cache.lag, default=0) + limit)
        if len(self._dice) < limit:
            self._dice = self._dice.new_zeros(1 << limit.bit_length())
        if sampler is not None and sampler.params.temperature > 0:
            self._dice[:limit].copy_(sampler.draw(limit), non_blocking=True)

    def feed(self, token_id: int) -> None:
        """Sets the token that the next step reads, where the caller and not a sampler chose it."""
        self._token.fill_(token_id)

    def choose(self, logits: Tensor, sampler: Sampler) -> None:
        """logits (V,) float32 -> the next token, which stays on the device: `chosen` (1,) int64."""
        token = sampler.choose(logits, self._dice.index_select(0, self._index))
        self._index.add_(1)
        self.chosen.copy_(token)
        self._token.copy_(token.clamp(min=0))  # a step may run on it before the host has seen that it is none

    def forward(self, cache: KVCache) -> Tensor:
        """Appends the token to the cache, whose lengths on the device count it -> logits (V,) float32."""
        decoder, lengths = self._decoder, cache.lengths
        lengths[..., 1].add_(1)
        position = self._position - self._lag if cache.lag else self._position
        # (1, D/2), or (layers, D/2) where every layer counts for itself
        cos, sin = (table.index_select(0, position) for table in (self._angles.cos, self._angles.sin))
        hidden, added = decoder.embed(self._token), None
        ends = lengths[:, 1:] if lengths.ndim == 2 else lengths[:, 0, 1:]  # (layers, 1): of the text stores
        for layer, (own, end) in enumerate(zip(lengths.unbind(0), ends.unbind(0), strict=True)):
            module = decoder.layer(layer)
            seen, text = cache.stores(layer)
            hidden, qkv = module.enter(hidden, added)
            turn = (cos[layer : layer + 1], sin[layer : layer + 1]) if cache.lag else (cos, sin)
            q = rope_append(qkv, *turn, *text, end)
            hidden, added = module.leave(hidden, decode_attention(q[:, 0], seen, text, own).reshape(1, -1))
        self._position.add_(1)
        return decoder.logits(hidden, added)[0]

    def run(self, cache: KVCache, sampler: Sampler) -> None:
        """The whole step: `chosen` becomes the token after the last chosen one. Does not wait for the device."""
        if not self._graphs:
            self._whole(cache, sampler)
            return
        params = sampler.params
        wanted = (
            cache.moves, cache.sparse, bool(cache.lag), self._angles.moves, len(self._dice),
            params.temperature, params.top_k if params.temperature else 0, params.top_p if params.temperature else 1.0,
        )  # fmt: skip
        if self._graph is None or self._captured != wanted:
            self._graph, self._captured = self._capture(lambda: self._whole(cache, sampler), cache), wanted
        self._graph.replay()

    def _whole(self, cache: KVCache, sampler: Sampler) -> None:
        self.choose(self.forward(cache), sampler)

    def _capture(self, whole: Callable[[], None], cache: KVCache) -> torch.cuda.CUDAGraph:
        """Runs the step once, which compiles its kernels, takes that back, and records it."""
        start = time.perf_counter()
        self._graph = None  # its memory goes before more is taken
        buffers = (self._token, self._position, self._index, self.chosen, cache.lengths)
        before = [buffer.clone() for buffer in buffers]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            whole()
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Another thread may be preparing media meanwhile: what it does is not of this capture.
        with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
            whole()
        self.warmup_s += time.perf_counter() - start
        return graph


class TokenReader:
    """Carries chosen tokens to the host, in order: one wait for each, and at most two on the way."""

    def __init__(self, device: torch.device) -> None:
        is_cuda = device.type == "cuda"
        self._slots = torch.zeros(2, dtype=torch.int64, pin_memory=is_cuda)
        self._arrived = [torch.cuda.Event() for _ in range(2)] if is_cuda else []
        self._posted = self._read = 0

    def post(self, chosen: Tensor) -> None:
        """Sends a token (1,) on its way, behind the work that makes it and before any that comes later."""
        assert self._posted - self._read < 2, "two tokens are on the way already"
        slot = self._posted % 2
        self._slots[slot : slot + 1].copy_(chosen, non_blocking=True)
        if self._arrived:
            self._arrived[slot].record()
        self._posted += 1

    def read(self) -> int:
        """Waits for the oldest token that was posted."""
        slot = self._read % 2
        if self._arrived:
            self._arrived[slot].synchronize()
        self._read += 1
        return int(self._slots[slot])


class Answer:
    """The tokens of one answer, one after the other, at most `limit`.

    With `runs_ahead` a step is started before the token that it reads is known to the host: the device never waits, and
    what was decoded past the end of the answer is for the caller to take back (`KVCache.forget_text`, `restore`).
    """

    def __init__(
        self,
        step: DecodeStep,
        cache: KVCache,
        sampler: Sampler,
        first_logits: Callable[[], Tensor],
        launch: Callable[[DecodeStep, KVCache, Sampler], None],
        *,
        limit: int,
        runs_ahead: bool,
        device: torch.device,
    ) -> None:
        self._step, self._cache, self._sampler = step, cache, sampler
        self._first_logits, self._launch = first_logits, launch
        self._limit, self._runs_ahead = limit, runs_ahead
        self._reader = TokenReader(device)
        self._posted = self._returned = 0

    @torch.inference_mode()
    def next(self) -> int:
        """The next token id. Raises SparseVILAError where the logits are not finite."""
        assert self._returned < self._limit, "the answer is as long as it may be"
        if self._posted == 0:
            self._step.begin(self._cache, self._sampler, self._limit)
            self._step.choose(self._first_logits(), self._sampler)
            self._post()
        # The first token is read before a step follows it: capturing one would delay it.
        ahead = 2 if self._runs_ahead and self._returned else 1
        while self._posted < min(self._returned + ahead, self._limit):
            self._launch(self._step, self._cache, self._sampler)
            self._post()
        self._returned += 1
        return checked(self._reader.read())

    def _post(self) -> None:
        self._reader.post(self._step.chosen)
        self._posted += 1

    @property
    def warmup_s(self) -> float:
        """Seconds that the steps of this cache have spent on compiling and capturing."""
        return self._step.warmup_s
