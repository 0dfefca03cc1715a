"""The Triton kernels on a GPU: first whether they are right, then how fast, beside their peers in the same run.

    python benchmarks/kernels/gpu.py [--json benchmarks/results/GPU-DATE.json] [--seconds 0.2] [--only retrieval ...]

Without --json the file is named after the device and the day; a Markdown page of the same tables lies beside it.

Runs the kernels' tests on the device first and stops where one fails. Then two ceilings (copy, bfloat16 product), and
each kernel as milliseconds, as a fraction of its bound, and as times as fast as its peers. Inputs are random and
rotated so that none is found in the L2 cache; calls are captured in a CUDA graph and replayed; median of the replays. A
kernel or a peer whose result is wrong has no time. At the end random models made on the device, LLaVA-NeXT-7B's shape
quantised and in bfloat16, and Qwen2-7B's decoder at some 16 and 50 thousand tokens: dense against sparse, the decode
step replayed from a graph against the same step call by call, and a dense bfloat16 decoder of the same shape beside
them.
`--rehearse` runs everything at tiny sizes on the CPU, in Triton's interpreter, without times that mean anything.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sparsevila import Engine, Image, SamplingParams, Sparsity
from sparsevila.engine.config import Stats
from sparsevila.kernels.attention import attention, merge_attention
from sparsevila.kernels.gpu.column_sums import column_sums
from sparsevila.kernels.gpu.decode_attention import decode_attention
from sparsevila.kernels.gpu.extend_attention import extend_attention
from sparsevila.kernels.gpu.gather import gather
from sparsevila.kernels.gpu.int4_linear import dequantised, int4_linear, lop3_agrees, pack_scales, pack_words
from sparsevila.kernels.gpu.int8_linear import int8_linear, padded
from sparsevila.kernels.gpu.quantize_rows import quantize_rows
from sparsevila.kernels.gpu.top_k import top_k

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from device_model import device_engine
from environment import ROOT, describe
from peers.bf16_decoder import DecoderShape, PeerTurn, peer_turn
from random_checkpoint import preset

Call = Callable[[], object]
Linear = Callable[[Tensor], Tensor]
ROTATED_BYTES = 1 << 28  # of the inputs that take turns: several times the L2 cache of an H200
REPLAYS = 20
GROUP = 128
WORST = 0.03  # error of a result that is timed, relative to the largest value
QUESTION = "What happens in this picture, from the beginning to the end?"


@dataclass(frozen=True)
class Row:
    """One measurement. `bytes` and `flop` are what has to be moved and computed at least."""

    kernel: str
    shape: str
    ms: float
    peer: str
    peer_ms: float | None  # None: not here, or wrong as it is called here (a line says which)
    bytes: float
    flop: float
    error: float  # relative to the largest value, against float64 or float32

    def __post_init__(self) -> None:
        if not self.error < WORST:
            raise SystemExit(f"{self.kernel}, {self.shape}: error {self.error:.1e}, at most {WORST}: nothing is timed")

    def fraction(self, copy: float, product: float) -> float:
        """Of the bound that the ceilings (bytes a second, operations a second) set."""
        return max(self.bytes / copy, self.flop / product) / (self.ms / 1e3)


class Bench:
    """Sizes and a clock; `small` for a rehearsal without a GPU."""

    def __init__(self, *, small: bool, seconds: float) -> None:
        self.small, self.seconds = small, seconds
        self.device = "cpu" if small else "cuda"
        self.dtype = torch.float16 if small else torch.bfloat16

    def size(self, n: int) -> int:
        return max(16, n // 64) if self.small else n

    def rand(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device).to(self.dtype)

    def copies(self, tensor: Tensor) -> list[Tensor]:
        limit = 1 << 16 if self.small else ROTATED_BYTES
        count = max(2, min(64, -(-limit // (tensor.numel() * tensor.element_size()))))
        return [tensor, *(tensor.clone() for _ in range(count - 1))]

    def ms(self, calls: list[Call]) -> float:
        """Of one call, the median over replays of a graph of all of them in turn."""
        for call in calls[:2]:
            call()
        if self.small:
            start = time.perf_counter()
            calls[0]()
            return (time.perf_counter() - start) * 1e3
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        graph.replay()
        found: list[float] = []
        start = time.perf_counter()
        while len(found) < REPLAYS or time.perf_counter() - start < self.seconds:
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
            graph.replay()
            after.record()
            after.synchronize()
            found.append(before.elapsed_time(after) / len(calls))
        return median(found)


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).abs().max() / want.double().abs().max())


def ceilings(bench: Bench) -> tuple[float, float]:
    """Bytes a second of a copy (read and written), operations a second of a product; on random numbers."""
    n = bench.size(1 << 14)
    source = bench.rand(n, n)
    target = torch.empty_like(source)
    copy = 2 * source.numel() * source.element_size() / (bench.ms([lambda: target.copy_(source)]) / 1e3)
    m = bench.size(8192)
    a, b = bench.rand(m, m), bench.rand(m, m)
    return copy, 2 * m**3 / (bench.ms([lambda: torch.mm(a, b)]) / 1e3)


def retrieval_rows(bench: Bench) -> Iterator[Row]:
    for H, H_kv, M, N, D in ((28, 4, 64, 16384, 128), (28, 4, 64, 50176, 128), (32, 32, 64, 2880, 128)):
        n, m = bench.size(N), bench.size(M)
        q, k = bench.rand(H_kv, H // H_kv * m, D), bench.rand(H_kv, n, D)
        lse = torch.logsumexp((q.float() @ k.float().transpose(1, 2)) * D**-0.5, dim=-1)
        want = torch.exp((q.float() @ k.float().transpose(1, 2)) * D**-0.5 - lse[..., None]).sum(dim=1)
        off = error(column_sums(q, k, lse, D**-0.5), want)
        calls: list[Call] = [partial(column_sums, q, each, lse, D**-0.5) for each in bench.copies(k)]
        peer: float | None = None
        if not bench.small:
            from flash_colreduce import flash_colreduce

            keys = k.repeat_interleave(H // H_kv, 0)[None]
            peer = bench.ms([partial(flash_colreduce, q.view(1, H, m, D), keys, reduction="sum")])
        yield Row(
            "retrieval", f"{H}/{H_kv} heads, {m} rows, {n} keys, d {D}", bench.ms(calls), "flash-colreduce", peer,
            k.numel() * k.element_size(), 2.0 * H * m * n * D, off,
        )  # fmt: skip


def decode_rows(bench: Bench) -> Iterator[Row]:
    for H, H_kv, N, D in ((28, 4, 16384, 128), (28, 4, 50176, 128), (32, 32, 2880, 128), (32, 32, 288, 128)):
        n = bench.size(N)
        q = bench.rand(H, D)
        stores = [(k, bench.rand(H_kv, n, D)) for k in bench.copies(bench.rand(H_kv, n, D))]
        text = bench.rand(H_kv, 64, D), bench.rand(H_kv, 64, D)
        lengths = torch.tensor([n, 64], device=bench.device)
        k, v = (torch.cat(pair, dim=1) for pair in zip(stores[0], text, strict=True))
        want = F.scaled_dot_product_attention(
            q.float()[None, :, None], k.float()[None], v.float()[None], enable_gqa=True
        )
        off = error(decode_attention(q, stores[0], text, lengths, D**-0.5), want[0, :, 0])
        joined = [(torch.cat((k, text[0]), dim=1)[None], torch.cat((v, text[1]), dim=1)[None]) for k, v in stores[:4]]
        sdpa = partial(F.scaled_dot_product_attention, q[None, :, None], enable_gqa=True)
        peer: list[Call] = [partial(sdpa, k, v) for k, v in joined]
        calls: list[Call] = [partial(decode_attention, q, store, text, lengths, D**-0.5) for store in stores]
        yield Row(
            "decode attention", f"{H}/{H_kv} heads, {n} keys, d {D}", bench.ms(calls), "SDPA", bench.ms(peer),
            2.0 * H_kv * (n + 64) * D * q.element_size(), 4.0 * H * (n + 64) * D, off,
        )  # fmt: skip


def question_rows(bench: Bench) -> Iterator[Row]:
    for H, H_kv, M, N, D in (
        (28, 4, 40, 16384, 128),
        (28, 4, 40, 50176, 128),
        (32, 32, 40, 2880, 128),
        (28, 4, 300, 16384, 128),
    ):
        m, n = bench.size(M), bench.size(N)
        q, own = bench.rand(H, m, D), (bench.rand(H_kv, m, D), bench.rand(H_kv, m, D))
        stores = [(k, bench.rand(H_kv, n, D)) for k in bench.copies(bench.rand(H_kv, n, D))]
        text = bench.rand(H_kv, 64, D), bench.rand(H_kv, 64, D)
        keys, values = (torch.cat(parts, dim=1) for parts in zip(stores[0], text, own, strict=True))
        mask = torch.ones(m, n + 64 + m, dtype=torch.bool, device=bench.device).tril(n + 64)
        exact = F.scaled_dot_product_attention(
            q.float()[None], keys.float()[None], values.float()[None], attn_mask=mask, enable_gqa=True
        )
        off = error(extend_attention(q, *own, stores[0], text, D**-0.5)[0], exact[0])
        calls: list[Call] = [partial(extend_attention, q, *own, store, text, D**-0.5) for store in stores]
        peer: list[Call] = [partial(_by_parts, q, own, store, text) for store in stores]
        yield Row(
            "question", f"{H}/{H_kv} heads, {m} rows, {n} keys, d {D}", bench.ms(calls), "flash, joined",
            bench.ms(peer), 2.0 * H_kv * (n + 64 + m) * D * q.element_size(), 4.0 * H * m * (n + 64 + m / 2) * D, off,
        )  # fmt: skip


def _by_parts(q: Tensor, own: tuple[Tensor, Tensor], a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> None:
    parts = [attention(q, *store, causal=False) for store in (a, b)]
    merge_attention([*parts, attention(q, *own, causal=True)])


def top_k_rows(bench: Bench) -> Iterator[Row]:
    for L, N in ((28, 12544), (28, 50176), (32, 2880)):
        n = bench.size(N)
        k = max(1, n // 10)
        scores = torch.rand(L, n, device=bench.device)
        want = torch.sort(scores, dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values
        wrong = float((top_k(scores, k) != want).float().mean())
        calls: list[Call] = [partial(top_k, each, k) for each in bench.copies(scores)]
        peer: list[Call] = [partial(torch.topk, each, k, dim=1) for each in bench.copies(scores)]
        yield Row(
            "top-k", f"{L} rows, {k} of {n}", bench.ms(calls), "torch.topk", bench.ms(peer),
            4.0 * L * n + 8.0 * L * k, 0.0, wrong,
        )  # fmt: skip


def saliency_rows(bench: Bench) -> Iterator[Row]:
    for B, H, M, D in ((8, 16, 729, 72), (16, 16, 1024, 80), (8, 16, 1024, 64)):
        m = bench.size(M)
        q, k = bench.rand(B * H, m, D), bench.rand(B * H, m, D)
        lse = torch.logsumexp((q.float() @ k.float().transpose(1, 2)) * D**-0.5, dim=-1)
        want = torch.exp((q.float() @ k.float().transpose(1, 2)) * D**-0.5 - lse[..., None]).sum(dim=1)
        off = error(column_sums(q, k, lse, D**-0.5), want)
        peer: float | None = None
        if not bench.small:
            from flash_colreduce import flash_colreduce

            peer = bench.ms([partial(flash_colreduce, *(t.view(B, H, m, D) for t in (q, k)), reduction="sum")])
        calls: list[Call] = [partial(column_sums, q, each, lse, D**-0.5) for each in bench.copies(k)]
        yield Row(
            "saliency", f"{B} x {H} heads, {m} rows and keys, d {D}", bench.ms(calls), "flash-colreduce", peer,
            2.0 * q.numel() * q.element_size(), 2.0 * B * H * m * m * D, off,
        )  # fmt: skip


def int4_rows(bench: Bench) -> Iterator[Row]:
    for N, K in ((4096, 4096), (11008, 4096), (18944, 3584)):
        n, k = bench.size(N), max(GROUP, bench.size(K) // GROUP * GROUP)
        codes = torch.randint(0, 16, (n, k), device=bench.device)
        scales = ((torch.rand(n, k // GROUP, device=bench.device) + 0.5) * 0.01).half()
        zeros = torch.randint(0, 16, (n, k // GROUP), device=bench.device, dtype=torch.uint8)
        words, packed = pack_words(codes), pack_scales(scales, zeros, k, GROUP)
        weight = dequantised(words, *packed, GROUP, k, bench.dtype)
        lop3 = not bench.small and lop3_agrees(words, *packed, GROUP, k)
        print(f"  (W4A16, {n} x {k}: the form with lop3 {'agrees' if lop3 else 'is not used'})")
        for T in (1, 4, 16, 64, 1024, 3072):
            t = min(T, 64) if bench.small else T
            x = bench.rand(t, k)
            want = x.float() @ weight.float().t()
            product = partial(int4_linear, lop3=lop3)
            off = error(product(x, words, *packed, GROUP, None), want)
            calls: list[Call] = [partial(product, x, each, *packed, GROUP, None) for each in bench.copies(words)]
            dense: list[Call] = [partial(F.linear, x, each) for each in bench.copies(weight)]
            moved = n * k / 2 + packed[0].numel() * 3 + (t * k + t * n) * 2.0
            ms, flop, shape = bench.ms(calls), 2.0 * t * n * k, f"{t} tokens, {n} x {k}"
            yield Row("W4A16", shape, ms, "cuBLAS bf16", bench.ms(dense), moved, flop, off)
            if lop3:
                plain = partial(int4_linear, x, words, *packed, GROUP, None)
                yield Row("W4A16", shape, ms, "without lop3", bench.ms([plain]), moved, flop, off)
            if T <= 64 and not bench.small:
                for name, make in (("torch int4", _tinygemm), ("gemlite", _gemlite)):
                    theirs = _checked_peer(name, partial(make, codes, scales, zeros), x, want)
                    peer_ms = None if theirs is None else bench.ms([partial(theirs, x)])
                    yield Row("W4A16", shape, ms, name, peer_ms, moved, flop, off)


def _checked_peer(name: str, make: Callable[[], Linear], x: Tensor, want: Tensor) -> Linear | None:
    """A peer that computes what it should, or None and a line that says why not."""
    try:
        call = make()
        off = error(call(x), want)
    except (ImportError, RuntimeError, AttributeError, TypeError, ValueError) as reason:
        print(f"  ({name} is not timed: {type(reason).__name__}: {str(reason).splitlines()[0]:.100})")
        return None
    if off < WORST:
        return call
    print(f"  ({name} is not timed: as it is called here its error is {off:.1e})")
    return None


def _tinygemm(codes: Tensor, scales: Tensor, zeros: Tensor) -> Linear:
    """torch's int4 product on CUDA: w = (q - 8) * s + z, the even input in the high nibble."""
    packed = torch.ops.aten._convert_weight_to_int4pack((codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8), 8)
    offset = (8 - zeros.float()) * scales.float()
    scale_zero = torch.stack((scales.float(), offset), dim=2).transpose(0, 1).contiguous().bfloat16()
    return lambda x: torch.ops.aten._weight_int4pack_mm(x, packed, GROUP, scale_zero)


def _gemlite(codes: Tensor, scales: Tensor, zeros: Tensor) -> Linear:
    from gemlite.core import DType, GemLiteLinear

    N, K = codes.shape
    layer = GemLiteLinear(4, GROUP, K, N, input_dtype=DType.BF16, output_dtype=DType.BF16)
    layer.pack(codes.to(torch.uint8), scales.bfloat16().view(-1, 1), zeros.bfloat16().view(-1, 1), bias=None)
    return layer


def int8_rows(bench: Bench) -> Iterator[Row]:
    for M, N, K in ((2885, 4096, 1024), (2885, 1024, 4096), (23328, 4304, 1152), (16384, 3420, 1280)):
        m, n, k = bench.size(M), bench.size(N), bench.size(K)
        x, bias = bench.rand(m, k), bench.rand(n)
        codes = torch.randint(-127, 128, (n, k), device=bench.device, dtype=torch.int8)
        scales = (torch.rand(n, device=bench.device) + 0.5) * 1e-3
        weight = (codes.float() * scales[:, None]).to(bench.dtype)

        plain = F.linear(x.float(), weight.float(), bias.float())
        codes = padded(codes)
        off = error(_int8(x, codes, scales, bias), plain * torch.sigmoid(1.702 * plain))
        peer: list[Call] = [partial(_dense, x, each, bias) for each in bench.copies(weight)]
        calls: list[Call] = [partial(_int8, x, each, scales, bias) for each in bench.copies(codes)]
        yield Row(
            "W8A8 + quick-GELU", f"{m} tokens, {n} x {k}", bench.ms(calls), "cuBLAS bf16", bench.ms(peer),
            n * k + 2.0 * (m * k + m * n), 1.0 * m * n * k, off,  # int8 products count half: the peak is twice bf16's
        )  # fmt: skip


def _int8(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor) -> Tensor:
    return int8_linear(*quantize_rows(x, width=codes.shape[1]), codes, scales, bias, x.dtype, "quick_gelu")


def _dense(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    y = F.linear(x, weight, bias)
    return y * torch.sigmoid(1.702 * y)


def gather_rows(bench: Bench) -> Iterator[Row]:
    for L, H_kv, N, share, D in ((28, 4, 12544, 0.1, 128), (32, 32, 2880, 0.1, 128)):
        n = bench.size(N)
        k = max(1, int(n * share))
        sources = [bench.rand(H_kv, n, D) for _ in range(2 * (2 if bench.small else L))]
        keep = [torch.randperm(n, device=bench.device)[:k].sort().values for _ in sources]
        targets = [torch.empty(H_kv, k, D, dtype=bench.dtype, device=bench.device) for _ in sources]
        gather(sources, keep, targets)
        off = max(error(t, s[:, i]) for s, i, t in zip(sources, keep, targets, strict=True))
        start = time.perf_counter()
        # Its table is made by the host at every call, so it is timed as it is called, not in a graph.
        for _ in range(1 if bench.small else REPLAYS):
            gather(sources, keep, targets)
        if not bench.small:
            torch.cuda.synchronize()
        ms = (time.perf_counter() - start) * 1e3 / (1 if bench.small else REPLAYS)
        peer = partial(_select, sources, keep, targets)
        yield Row(
            "gather", f"{len(sources) // 2} layers, {H_kv} heads, {k} of {n}, d {D}", ms, "index_select",
            bench.ms([peer]), 2.0 * len(sources) * H_kv * k * D * 2, 0.0, off,
        )  # fmt: skip


def _select(sources: list[Tensor], keep: list[Tensor], targets: list[Tensor]) -> None:
    for source, index, target in zip(sources, keep, targets, strict=True):
        torch.index_select(source, 1, index, out=target)


FAMILIES = {
    "retrieval": retrieval_rows, "decode": decode_rows, "question": question_rows, "saliency": saliency_rows,
    "top_k": top_k_rows, "int4": int4_rows, "int8": int8_rows, "gather": gather_rows,
}  # fmt: skip

# Whole models -------------------------------------------------------------------------------------------------------

POLICIES = {"dense": Sparsity(), "60/75": Sparsity(0.60, 0.75), "75/90": Sparsity(0.75, 0.90)}


@dataclass(frozen=True)
class Case:
    """A random model and what it is shown: a number of pictures of 2,880 visual tokens each."""

    preset: str
    quantised: bool
    pictures: tuple[int, ...]


CASES = (
    Case("vicuna-7b-32-layers", True, (1,)),
    Case("vicuna-7b-32-layers", False, (1,)),
    Case("qwen2-7b", True, (6, 17)),
    Case("qwen2-7b", False, (6, 17)),
)


@dataclass(frozen=True)
class Turn:
    """Pictures, a question and an answer of a fixed length; milliseconds, medians over the rounds."""

    policy: str
    steps: str  # "graph" or "eager"
    encode: float
    prefill: float
    retrieval: float
    token: float  # of a decode step
    warmup: float  # of the first round, which is none of the others
    total: float  # encode to the last token, warm-up left out
    prompt_tokens: int
    visual_kept: int
    visual_active: float
    kv_read_bytes: int


def whole_model(bench: Bench, case: Case, *, tokens: int, rounds: int) -> Iterator[dict[str, object]]:
    """Per number of pictures: what the model is, a turn for each policy and kind of steps, and the peer's turn."""
    shape = preset("tiny" if bench.small else case.preset)
    device, dtype = torch.device(bench.device), torch.float32 if bench.small else torch.bfloat16
    with tempfile.TemporaryDirectory() as scratch:
        engine = device_engine(
            shape, Path(scratch) / "model", device=device, dtype=dtype, group_size=32 if bench.small else GROUP,
            quantised=case.quantised,
        )  # fmt: skip
    decoder = engine.model.decoder
    blocks = [*decoder.layers.parameters(), *decoder.norm.parameters(), *decoder.lm_head.parameters()]
    read_by_a_step = sum(p.numel() * p.element_size() for p in blocks)
    info = engine.info
    found: list[dict[str, object]] = []
    for pictures in case.pictures if not bench.small else (1, 2):
        turns = _turns(bench, engine, pictures, tokens, rounds)
        found.append(
            {
                "model": case.preset, "scheme": info.scheme, "parameters": info.parameters, "pictures": pictures,
                "weight_bytes": info.weight_bytes, "decode_bytes": read_by_a_step, "tokens": tokens, "rounds": rounds,
                "turns": turns,
            }
        )  # fmt: skip
    config = decoder.config
    sizes = DecoderShape(
        config.hidden_size, config.intermediate_size, config.num_layers, config.num_heads, config.num_kv_heads,
        config.vocab_size,
    )  # fmt: skip
    engine.close()
    for case_found in found:
        listed = case_found["turns"]
        assert isinstance(listed, list)
        context = next(turn.prompt_tokens for turn in listed if turn.policy == "dense")
        # The peer is bfloat16 whatever the case: it is measured where ours is too.
        peer = None if case.quantised else peer_turn(sizes, context, tokens, device, dtype)
        yield case_found | {"peer": peer}


def _turns(bench: Bench, engine: Engine, pictures: int, tokens: int, rounds: int) -> list[Turn]:
    side = 112 if bench.small else 672
    rng = np.random.default_rng(0)
    shown = [Image(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)) for _ in range(pictures)]
    found: dict[tuple[str, str], list[Stats]] = {}
    for _ in range(rounds + 1):  # the first one compiles
        for steps in ("eager",) if bench.small else ("graph", "eager"):
            engine.runner.graphs = steps == "graph"
            for name, policy in POLICIES.items():
                engine.forget_features()
                session = engine.session(media=shown, sparsity=policy)
                stats = session.ask(QUESTION, params=SamplingParams(max_new_tokens=tokens)).stats
                session.close()
                assert stats.output_tokens == tokens, f"expected {tokens} tokens, got {stats.output_tokens}"
                found.setdefault((name, steps), []).append(stats)
    return [_turn(*key, runs) for key, runs in found.items()]


def _turn(policy: str, steps: str, runs: list[Stats]) -> Turn:
    timed = runs[1:]

    def ms(of: Callable[[Stats], float]) -> float:
        return median(map(of, timed)) * 1e3

    last = timed[-1]
    return Turn(
        policy, steps, ms(lambda s: s.encode_s), ms(lambda s: s.prefill_s), ms(lambda s: s.retrieval_s),
        ms(lambda s: s.decode_s / (s.output_tokens - 1)), max(s.warmup_s for s in timed) * 1e3,
        ms(lambda s: s.encode_s + s.prefill_s + s.retrieval_s + s.decode_s), last.prompt_tokens,
        last.visual_tokens_kept, last.visual_tokens_active, last.kv_read_bytes,
    )  # fmt: skip


def turn_lines(found: dict[str, object], copy: float) -> Iterator[str]:
    """The table of one case; of a step also which share of the copy's bandwidth weights and cache alone take."""
    turns, decode_bytes, peer = found["turns"], found["decode_bytes"], found["peer"]
    assert isinstance(turns, list)
    assert isinstance(decode_bytes, int)
    yield f"{found['model']}, {found['scheme']}, {found['pictures']} pictures, {found['tokens']} tokens an answer"
    names = (
        "policy",
        "steps",
        "prompt",
        "encode",
        "prefill",
        "retrieval",
        "token",
        "of copy",
        "warm-up",
        "total",
        "gain",
    )
    yield " ".join(f"{name:>9}" for name in names)
    dense = {turn.steps: turn.total for turn in turns if turn.policy == "dense"}
    for turn in turns:
        share = (decode_bytes + turn.kv_read_bytes) / copy / (turn.token / 1e3)
        times = (turn.encode, turn.prefill, turn.retrieval, turn.token)
        cells = [turn.policy, turn.steps, str(turn.prompt_tokens), *(f"{ms:.2f}" for ms in times)]
        cells += [f"{share:.0%}", f"{turn.warmup:.1f}", f"{turn.total:.1f}", f"{dense[turn.steps] / turn.total:.2f}x"]
        yield " ".join(f"{cell:>9}" for cell in cells)
    if isinstance(peer, PeerTurn):
        times_ms = f"prefill {peer.prefill_s * 1e3:.2f}, token {peer.token_s * 1e3:.2f}"
        yield f"{peer.name}, the language model alone: {times_ms}"


def row_line(row: Row, copy: float, product: float) -> str:
    faster = "" if row.peer_ms is None else f"{row.peer_ms / row.ms:.2f}x"
    peer_ms = "" if row.peer_ms is None else f"{row.peer_ms:.4f}"
    return (
        f"{row.kernel:<18} {row.shape:<42} {row.ms:>9.4f} {row.fraction(copy, product):>8.0%} {row.peer:>16} "
        f"{peer_ms:>9} {faster:>7} {row.error:>8.1e}"
    )


def default_json() -> Path:
    """benchmarks/results/<device>-<day>.json"""
    device = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    return ROOT / "benchmarks" / "results" / f"{device}-{time.strftime('%Y-%m-%d')}.json"


class Page:
    """What is printed, kept for the Markdown page."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def tell(self, line: str) -> None:
        print(line, flush=True)
        self.lines.append(line)


def main() -> None:
    parser = argparse.ArgumentParser(description="Check and time the Triton kernels on a GPU.")
    parser.add_argument("--only", nargs="*", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--seconds", type=float, default=0.2, help="at least, for each figure")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--tokens", type=int, default=64, help="of each answer of the whole model")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each policy, after one that is not timed")
    parser.add_argument("--no-model", action="store_true", help="kernels alone")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on the CPU, in Triton's interpreter")
    args = parser.parse_args()
    if args.rehearse and os.environ.get("TRITON_INTERPRET") != "1":
        parser.error("--rehearse needs TRITON_INTERPRET=1 in the environment")
    if not args.rehearse:
        if not torch.cuda.is_available():
            parser.error("there is no CUDA device here")
        tests = [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-p",
            "no:cacheprovider",
            str(ROOT / "tests" / "kernels" / "gpu"),
        ]
        if subprocess.run(tests, cwd=ROOT, check=False).returncode:
            raise SystemExit("a kernel is wrong on this device: nothing is timed")
    torch.manual_seed(0)
    bench, page = Bench(small=args.rehearse, seconds=args.seconds), Page()
    copy, product = ceilings(bench)
    page.tell(f"copy {copy / 1e9:.0f} GB/s, bfloat16 product {product / 1e12:.1f} TFLOP/s")
    page.tell(
        f"{'kernel':<18} {'shape':<42} {'ms':>9} {'of bound':>8} {'peer':>16} {'peer ms':>9} {'faster':>7} {'error':>8}"
    )
    rows = []
    for name in args.only:
        for row in FAMILIES[name](bench):
            page.tell(row_line(row, copy, product))
            rows.append(asdict(row) | {"fraction": row.fraction(copy, product)})
    found: dict[str, object] = {"environment": describe(), "copy_bytes_per_s": copy, "product_flop_per_s": product}
    found["rows"] = rows
    models: list[dict[str, object]] = []
    for case in () if args.no_model else CASES:
        tokens, rounds = (3, 1) if args.rehearse else (args.tokens, args.rounds)
        for measured in whole_model(bench, case, tokens=tokens, rounds=rounds):
            for line in turn_lines(measured, copy):
                page.tell(line)
            models.append(_plain(measured))
            found["models"] = models
            _write(found, page, args.json if args.rehearse else args.json or default_json())
    _write(found, page, args.json if args.rehearse else args.json or default_json())


def _plain(measured: dict[str, object]) -> dict[str, object]:
    turns, peer = measured["turns"], measured["peer"]
    assert isinstance(turns, list)
    return measured | {
        "turns": [asdict(turn) for turn in turns],
        "peer": asdict(peer) if isinstance(peer, PeerTurn) else None,
    }


def _write(found: dict[str, object], page: Page, path: Path | None) -> None:
    """After every model, so that a run that is cut off has left what it had."""
    if path is not None:
        path.write_text(json.dumps(found, indent=2) + "\n")
        path.with_suffix(".md").write_text("\n".join(["```", *page.lines, "```", ""]))


if __name__ == "__main__":
    main()
