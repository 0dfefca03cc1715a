"""What a whole model is compared with on the same device: the same decoder's shape in bfloat16, dense.

`transformers` where it imports (Mistral, scaled-dot-product attention, its own growing cache); otherwise a plain
decoder of `F.linear` and scaled-dot-product attention over a cache that is allocated once. Random weights, greedy
tokens.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class DecoderShape:
    """Sizes of a decoder."""

    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


@dataclass(frozen=True)
class PeerTurn:
    """Seconds."""

    name: str
    prefill_s: float
    token_s: float


class _Peer(Protocol):
    name: str

    def prefill(self, embedded: Tensor) -> Tensor: ...

    def step(self, token: Tensor) -> Tensor: ...


class PlainDecoder:
    """The fallback. Rotary positions, RMS norms, a gated MLP; keys and values of one sequence."""

    name = "F.linear + SDPA, bfloat16"

    def __init__(self, shape: DecoderShape, capacity: int, device: torch.device, dtype: torch.dtype) -> None:
        self.shape, self.length = shape, 0
        kv = shape.kv_heads * shape.head_dim

        def matrix(rows: int, columns: int) -> Tensor:
            return torch.randn(rows, columns, device=device, dtype=dtype).mul_(columns**-0.5)

        self.layers = [
            {
                "qkv": matrix(shape.hidden + 2 * kv, shape.hidden), "o": matrix(shape.hidden, shape.hidden),
                "gate_up": matrix(2 * shape.ffn, shape.hidden), "down": matrix(shape.hidden, shape.ffn),
                "keys": torch.zeros(1, shape.kv_heads, capacity, shape.head_dim, device=device, dtype=dtype),
                "values": torch.zeros(1, shape.kv_heads, capacity, shape.head_dim, device=device, dtype=dtype),
            }
            for _ in range(shape.layers)
        ]  # fmt: skip
        self.table, self.head = matrix(shape.vocab, shape.hidden), matrix(shape.vocab, shape.hidden)
        frequencies = 10000.0 ** (-torch.arange(0, shape.head_dim, 2, device=device) / shape.head_dim)
        angle = torch.arange(capacity, device=device)[:, None] * frequencies
        self.cos, self.sin = angle.cos().to(dtype), angle.sin().to(dtype)

    def prefill(self, embedded: Tensor) -> Tensor:
        """A new sequence: embedded (M, hidden) -> the next token (1,)."""
        self.length = 0
        return self._run(embedded)

    def step(self, token: Tensor) -> Tensor:
        return self._run(self.table[token])

    def _run(self, x: Tensor) -> Tensor:
        start, end = self.length, self.length + len(x)
        cos, sin = self.cos[start:end], self.sin[start:end]
        for layer in self.layers:
            x = x + F.linear(self._attend(_normed(x), layer, cos, sin, start, end), layer["o"])
            gate, up = F.linear(_normed(x), layer["gate_up"]).chunk(2, dim=-1)
            x = x + F.linear(F.silu(gate) * up, layer["down"])
        self.length = end
        return F.linear(_normed(x[-1:]), self.head).argmax(-1)

    def _attend(self, x: Tensor, layer: dict[str, Tensor], cos: Tensor, sin: Tensor, start: int, end: int) -> Tensor:
        shape = self.shape
        parts = F.linear(x, layer["qkv"]).view(len(x), -1, shape.head_dim).transpose(0, 1)
        q, k, v = parts.split([shape.heads, shape.kv_heads, shape.kv_heads])
        layer["keys"][0, :, start:end], layer["values"][0, :, start:end] = _turned(k, cos, sin), v
        keys, values = layer["keys"][:, :, :end], layer["values"][:, :, :end]
        q = _turned(q, cos, sin)[None]
        grouped = shape.heads != shape.kv_heads
        attended = F.scaled_dot_product_attention(q, keys, values, is_causal=len(x) > 1, enable_gqa=grouped)
        return attended[0].transpose(0, 1).reshape(len(x), -1)


def _normed(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],))


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class TransformersDecoder:
    """`MistralForCausalLM` of the shape, as its `generate` drives it."""

    name = "transformers, bfloat16"

    def __init__(self, shape: DecoderShape, capacity: int, device: torch.device, dtype: torch.dtype) -> None:
        """Raises ImportError where transformers is not here."""
        from transformers import DynamicCache, MistralConfig, MistralForCausalLM

        settings: dict[str, Any] = dict(
            hidden_size=shape.hidden, intermediate_size=shape.ffn, num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, vocab_size=shape.vocab,
            max_position_embeddings=capacity, sliding_window=None, attn_implementation="sdpa",
        )  # fmt: skip
        with torch.device(device):
            model: Any = MistralForCausalLM(MistralConfig(**settings))
        self.model = model.to(dtype).eval()
        self._new_cache = DynamicCache
        self.cache: Any = DynamicCache()

    def prefill(self, embedded: Tensor) -> Tensor:
        self.cache = self._new_cache()
        return self._next(inputs_embeds=embedded[None])

    def step(self, token: Tensor) -> Tensor:
        return self._next(input_ids=token[None])

    def _next(self, **inputs: Tensor) -> Tensor:
        out = self.model(**inputs, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        token: Tensor = out.logits[0, -1:].argmax(-1)
        return token


def peer_turn(
    shape: DecoderShape, context: int, tokens: int, device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> PeerTurn:
    """A prefill of `context` embedded tokens and `tokens` steps, after both have run once on a short prompt."""

    def made() -> _Peer:
        try:
            return TransformersDecoder(shape, context + 2 * tokens + 64, device, dtype)
        except ImportError:
            return PlainDecoder(shape, context + 2 * tokens + 64, device, dtype)

    def timed(call: Callable[[], Tensor]) -> tuple[float, Tensor]:
        _wait(device)
        start = time.perf_counter()
        found = call()
        _wait(device)
        return time.perf_counter() - start, found

    with torch.inference_mode():
        peer = made()
        short = torch.randn(16, shape.hidden, device=device, dtype=dtype)
        token = peer.prefill(short)
        for _ in range(2):
            token = peer.step(token)
        embedded = torch.randn(context, shape.hidden, device=device, dtype=dtype)
        prefill_s, token = timed(lambda: peer.prefill(embedded))

        def decode() -> Tensor:
            last = token
            for _ in range(tokens):
                last = peer.step(last)
            return last

        decode_s, _ = timed(decode)
    assert math.isfinite(decode_s)
    return PeerTurn(peer.name, prefill_s, decode_s / tokens)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
