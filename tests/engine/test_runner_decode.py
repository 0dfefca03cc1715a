"""The decode step over static buffers: what it computes, that nothing in it waits for or depends on the host, and what
is taken back when it ran ahead."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from oracles import Oracle
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sparsevila import Engine, Image, SamplingParams, SparseVILAError, Sparsity
from sparsevila.engine.cache import KVCache
from sparsevila.engine.decode_step import AngleTable, DecodeStep, TokenReader
from sparsevila.engine.runner import Runner, TextSpan, VisualSpan
from sparsevila.engine.sampler import NO_TOKEN, Sampler, nucleus
from sparsevila.engine.sparsity.base import Method
from sparsevila.kernels.decode_attention import decode_attention
from sparsevila.kernels.w4a16 import W4A16Layout
from sparsevila.models.checkpoint import Checkpoint
from sparsevila.models.clip import ClipConfig, ClipLayer
from sparsevila.models.decoder import Decoder, DecoderConfig
from sparsevila.models.interface import TokenMap, VisionLanguageModel, VisualTokens
from sparsevila.models.registry import load_model
from sparsevila.models.rotary import RopeConfig
from sparsevila.quant.linear import LinearLayer, W4A16Linear, quantised_like
from sparsevila.quant.scheme import Int8Weight

NUM_VISUAL, STEPS = 17, 6
GREEDY = SamplingParams()
DICE = SamplingParams(temperature=1.5, top_k=40, top_p=0.9, seed=4)


@pytest.fixture(scope="module", params=["vicuna", "mistral"])
def model(request: pytest.FixtureRequest, oracles: dict[str, Oracle]) -> VisionLanguageModel:
    folder = oracles[request.param].folder
    return load_model(Checkpoint.open(folder), dtype=torch.float32, device=torch.device("cpu"))


def filled(runner: Runner, *, sparse: bool) -> tuple[KVCache, Tensor]:
    """A cache behind a picture and a question, and the hidden state that the question left."""
    n = NUM_VISUAL
    maps = TokenMap(
        torch.ones(n, dtype=torch.int32), torch.zeros(n, dtype=torch.int32), torch.rand(n, 4),
        torch.zeros(n, dtype=torch.bool), torch.full((n,), -1, dtype=torch.int32),
    )  # fmt: skip
    size = runner.model.config.vision.hidden_size  # type: ignore[attr-defined]
    features = torch.randn(n, size, generator=torch.Generator().manual_seed(0))
    cache = runner.new_cache()
    cache.reserve(visual=n, text=40)
    runner.prefill(cache, [TextSpan((1, 30)), VisualSpan(VisualTokens(features, maps, None))], method=Method())
    hidden = runner.prefill(cache, [TextSpan((40, 41, 42))], method=Method()).hidden
    if sparse:
        cache.activate([torch.arange(layer % 2, n, 3) for layer in range(cache.num_layers)])
    return cache, hidden


@torch.inference_mode()
def plain_decode(runner: Runner, cache: KVCache, token_id: int) -> Tensor:
    """A step as one would write it: lengths are the host's, stores are views of what is in use."""
    decoder = runner.decoder
    positions, next_position = runner.model.text_positions(1, cache.next_position)
    hidden, (cos, sin) = decoder.embed(torch.tensor([token_id])), decoder.angles(positions)
    for layer in range(cache.num_layers):
        module = decoder.layer(layer)
        q, k, v = module.project(hidden, cos, sin)
        cache.append(layer, k, v)
        hidden = module.finish(hidden, decode_attention(q[:, 0], *cache.segments(layer))[:, None])
    cache.next_position = next_position
    return decoder.logits(hidden)[0]


def plain_answer(runner: Runner, cache: KVCache, hidden: Tensor, params: SamplingParams) -> list[int]:
    sampler, logits, ids = Sampler(params), runner.logits(hidden), []
    for _ in range(STEPS):
        ids.append(sampler(logits))
        logits = plain_decode(runner, cache, ids[-1])
    return ids


def contents(cache: KVCache) -> list[Tensor]:
    return [t for store in cache.text for t in store.segment()]


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
class TestAgainstThePlainPath:
    def test_logits_and_cache_bit_for_bit(self, model: VisionLanguageModel, sparse: bool) -> None:
        runner = Runner(model)
        (cache, _), (plain, _) = (filled(runner, sparse=sparse) for _ in range(2))
        for token in (44, 45, 7):
            assert torch.equal(runner.decode(cache, token), plain_decode(runner, plain, token))
        assert cache.checkpoint() == plain.checkpoint()
        assert all(map(torch.equal, contents(cache), contents(plain)))

    @pytest.mark.parametrize("params", [GREEDY, DICE], ids=["greedy", "dice"])
    @pytest.mark.parametrize("runs_ahead", [False, True], ids=["behind", "ahead"])
    def test_answers(self, model: VisionLanguageModel, sparse: bool, params: SamplingParams, runs_ahead: bool) -> None:
        runner = Runner(model, runs_ahead=runs_ahead)
        (cache, hidden), (plain, _) = (filled(runner, sparse=sparse) for _ in range(2))
        want = plain_answer(runner, plain, hidden, params)
        assert len(set(want)) > 2
        answer = runner.answer(cache, hidden, Sampler(params), STEPS)
        before = cache.checkpoint()
        assert [answer.next() for _ in range(STEPS)] == want
        # The last token is chosen and not fed; nothing ran further than that.
        assert cache.checkpoint().before_text(STEPS - 1) == before
        assert all(
            torch.equal(got, w[:, : got.shape[1]]) for got, w in zip(contents(cache), contents(plain), strict=True)
        )
        # Taken back and asked again, the lengths on the device follow the host's.
        cache.forget_text(STEPS - 1)
        again = runner.answer(cache, hidden, Sampler(params), STEPS)
        assert [again.next() for _ in range(STEPS)] == want

    def test_a_step_reads_nothing_that_the_host_counts(self, model: VisionLanguageModel, sparse: bool) -> None:
        runner = Runner(model)
        cache, hidden = filled(runner, sparse=sparse)
        want = plain_answer(runner, filled(runner, sparse=sparse)[0], hidden, GREEDY)
        answer = runner.answer(cache, hidden, Sampler(GREEDY), STEPS)
        step, host = runner._step_of(cache), [*cache.visual, *cache.text, *cache.active]
        run = DecodeStep.run

        def blind(self: DecodeStep, *args: Any) -> None:
            kept = [store.length for store in host], cache.next_position
            for store in host:
                store.length = None  # type: ignore[assignment]
            cache.next_position = None  # type: ignore[assignment]
            run(self, *args)
            for store, length in zip(host, kept[0], strict=True):
                store.length = length
            cache.next_position = kept[1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(DecodeStep, "run", blind)
            assert [answer.next() for _ in range(STEPS)] == want
        assert step.warmup_s == 0


def test_a_table_row_is_what_the_position_alone_gives(model: VisionLanguageModel) -> None:
    table = AngleTable(model, torch.device("cpu"))
    for position in (0, 1023, 1024, 3000):
        table.reach(position)
        own = model.decoder.angles(model.text_positions(1, position)[0])
        assert torch.equal(table.cos[position], own[0][0])
        assert torch.equal(table.sin[position], own[1][0])
    assert table.moves == 3


class _Watch(TorchDispatchMode):
    """Every operation, in order, and an error for one that makes the host wait or takes numbers to it."""

    WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "unique", "masked_select", "_pin_memory")

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in self.WAITS, f"{name} waits for the device"
        self.calls.append(f"{func}{described((args, kwargs))}")
        out = func(*args, **(kwargs or {}))
        places = {t.device for t in tensors([args, kwargs, out])}
        assert len(places) < 2, f"{name} moves numbers between {places}"
        return out


def tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from tensors(each)
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))


def described(value: Any) -> Any:
    """Arguments as text: of a tensor what does not depend on its numbers."""
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)} {value.stride()} {value.device}"
    if isinstance(value, (list, tuple)):
        return [described(each) for each in value]
    if isinstance(value, dict):
        return {key: described(each) for key, each in value.items()}
    return repr(value)


class TestOnThisMachine:
    @pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
    def test_no_operation_waits(self, model: VisionLanguageModel, sparse: bool) -> None:
        runner = Runner(model)
        cache, hidden = filled(runner, sparse=sparse)
        answer = runner.answer(cache, hidden, Sampler(GREEDY), STEPS)
        answer.next()
        step, sampler = runner._step_of(cache), Sampler(GREEDY)
        with torch.inference_mode(), _Watch() as watch:
            step.run(cache, sampler)
        assert len(watch.calls) > 10 * cache.num_layers

    def test_the_watch_sees_what_waits(self) -> None:
        for waits in (lambda x: x.item(), lambda x: bool(x > 0), torch.nonzero):
            with pytest.raises(AssertionError, match="waits"), _Watch():
                waits(torch.ones(()))


# On a GPU that is not there: tensors without numbers, which raise where one is asked for, take the path of CUDA
# tensors, whose kernels are recorded instead of launched. This is what a real one captures.

DEVICE = torch.device("meta")
CONFIG = DecoderConfig(
    hidden_size=128, intermediate_size=256, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=32, vocab_size=99,
    rms_norm_eps=1e-5, rope=RopeConfig(), max_context=4096, qkv_bias=False, tie_word_embeddings=False,
)  # fmt: skip


def quantised(layers: Iterable[nn.Module], bits: int) -> None:
    """Every linear layer of the blocks in 4 or 8 bits; the numbers do not matter."""
    for layer in layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, old in list(parent.named_children()):
                if not isinstance(old, LinearLayer):
                    continue
                made = quantised_like(old, 128 if bits == 4 else None)
                if isinstance(made, W4A16Linear):  # packing it for a GPU looks at the numbers
                    N, K = old.out_features, old.in_features
                    made.layout = W4A16Layout(N, K, 128, "words")
                    made.qweight, made.scales, made.zeros = (
                        nn.Parameter(torch.empty(*shape, dtype=dtype, device=DEVICE), requires_grad=False)
                        for shape, dtype in (
                            ((N, K // 8), torch.int32), ((K // 128, N), torch.float16), ((K // 128, N), torch.uint8)
                        )
                    )  # fmt: skip
                for part, (rows, columns) in made.waits_for().items() if bits == 8 else ():
                    codes = torch.empty(rows, columns, dtype=torch.int8, device=DEVICE)
                    weight = Int8Weight(codes, torch.ones(rows, device=DEVICE))
                    made.fill(part, weight, dtype=torch.bfloat16, device=DEVICE)
                setattr(parent, name, made)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Triton kernels as they are called."""
    jit = pytest.importorskip("triton.runtime.jit")
    from sparsevila.kernels.gpu import rope_append

    if not isinstance(rope_append._rope_append, jit.JITFunction):
        pytest.skip("Triton's interpreter has no launches to record")
    for name, module in list(sys.modules.items()):
        if name.startswith("sparsevila.") and hasattr(module, "runs_triton"):
            monkeypatch.setattr(module, "runs_triton", lambda tensor: tensor.is_meta)
    seen: list[str] = []

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **constants: Any) -> None:
        seen.append(f"{self.__name__} {grid} {described(args)} {described(constants)}")

    monkeypatch.setattr(jit.JITFunction, "run", record)
    return seen


class TestOnAGpu:
    @pytest.mark.parametrize("bits", [16, 8, 4])
    @pytest.mark.parametrize("params", [GREEDY, DICE], ids=["greedy", "dice"])
    def test_every_step_makes_the_same_calls(self, launches: list[str], bits: int, params: SamplingParams) -> None:
        with torch.inference_mode():
            torch.set_default_dtype(torch.bfloat16)
            try:
                with DEVICE:
                    decoder = Decoder(CONFIG)
            finally:
                torch.set_default_dtype(torch.float32)
            if bits < 16:
                quantised(decoder.layers, bits)
            model = SimpleNamespace(decoder=decoder, text_positions=lambda n, at: (torch.arange(at, at + n), at + n))
            cache = KVCache(num_layers=2, num_kv_heads=2, head_dim=32, dtype=torch.bfloat16, device=DEVICE)
            cache.reserve(visual=30, text=300)
            for store in (*cache.visual, *cache.text):
                store.length = 20
            step = DecodeStep(model, AngleTable(model, DEVICE), DEVICE)  # type: ignore[arg-type]
            sampler = Sampler(params)
            step.begin(cache, sampler, limit=10)
            del launches[:]
            calls = []
            for _ in range(3):
                cache.advance()
                with _Watch() as watch:
                    step._whole(cache, sampler)
                calls.append((list(launches), watch.calls))
                del launches[:]
        assert calls[0] == calls[1] == calls[2]
        kernels = [line.split()[0] for line in calls[0][0]]
        assert kernels.count("_rope_append") == kernels.count("_attend") == CONFIG.num_layers
        assert kernels.count("_rms_norm") == 2 * CONFIG.num_layers + 1
        assert ("_pairs" in kernels) == (bits == 4)
        assert ("_int8_linear" in kernels) == (bits == 8)
        assert len(calls[0][1]) > 0

    def test_norms_and_activations_are_in_the_kernels_of_8_bit_layers(self, launches: list[str]) -> None:
        config = ClipConfig(
            hidden_size=128, intermediate_size=200, num_layers=1, num_heads=2, image_size=28, patch_size=14,
            hidden_act="quick_gelu", layer_norm_eps=1e-5,
        )  # fmt: skip
        with torch.inference_mode(), DEVICE:
            layer = ClipLayer(config)
            quantised([layer], 8)
            out, _ = layer(torch.empty(2, 5, 128), score=False)
        assert out.shape == (2, 5, 128)
        rows = [line for line in launches if line.startswith("_quantize_rows")]
        assert [(line.count("'NORM': '1'"), line.count("'NORM': '0'")) for line in rows] == [
            (1, 0),
            (0, 1),
            (1, 0),
            (0, 1),
        ]
        products = [line for line in launches if line.startswith("_int8_linear")]
        assert [line.count("'ACTIVATION': '2'") for line in products] == [0, 0, 1, 0]
        assert len(launches) == 8
        assert "'OUT': '208'" in rows[3]  # 200 inputs in rows of whole 16 bytes

    def test_a_graph_is_captured_anew_when_it_no_longer_fits(
        self, model: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        runner = Runner(model)
        cache, hidden = filled(runner, sparse=False)
        step = runner._step_of(cache)
        captures = 0

        def capture(self: DecodeStep, whole: Any, cache: KVCache) -> Any:
            nonlocal captures
            captures += 1
            return SimpleNamespace(replay=whole)

        monkeypatch.setattr(DecodeStep, "_capture", capture)
        step._graphs = True

        def ask(params: SamplingParams) -> list[int]:
            nonlocal captures
            captures, before = 0, cache.checkpoint()
            answer = runner.answer(cache, hidden, Sampler(params), STEPS)
            ids = [answer.next() for _ in range(STEPS)]
            sparse = cache.sparse
            cache.restore(before)
            cache.sparse = sparse
            return ids

        first = ask(GREEDY)
        assert captures == 1
        assert ask(GREEDY) == first
        assert captures == 0  # the next turn finds the graph
        ask(DICE)
        assert captures == 1
        ask(SamplingParams(temperature=1.5, top_k=40, top_p=0.9, seed=8))
        assert captures == 0  # another seed is no other step
        cache.activate([torch.arange(5)] * cache.num_layers)
        ask(DICE)
        assert captures == 1
        cache.activate([torch.arange(7)] * cache.num_layers)  # fits into the same stores
        ask(DICE)
        assert captures == 0
        cache.reserve(text=5000)
        ask(DICE)
        assert captures == 1


class TestRunningAhead:
    @pytest.fixture(scope="class")
    def engines(self, oracles: dict[str, Oracle]) -> Iterator[tuple[Engine, Engine]]:
        made = [Engine.load(oracles["vicuna"].folder, device="cpu", dtype="float32") for _ in range(2)]
        made[1].runner.runs_ahead = True
        yield made[0], made[1]
        for engine in made:
            engine.close()

    @pytest.mark.parametrize("sparsity", [Sparsity(0.0, 0.0), Sparsity(0.5, 0.5)], ids=["dense", "sparse"])
    @pytest.mark.parametrize("end", ["length", "stop", "stop string", "cancel", "close"])
    def test_what_was_decoded_past_the_end_is_taken_back(
        self, engines: tuple[Engine, Engine], sparsity: Sparsity, end: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        picture = Image(np.random.default_rng(3).integers(0, 256, (70, 90, 3), dtype=np.uint8))
        found = []
        for engine in engines:
            session = engine.session(media=[picture], sparsity=sparsity)
            first = session.ask("What is it?", params=SamplingParams(max_new_tokens=8))
            params = SamplingParams(max_new_tokens=8)
            if end == "stop":
                ids = session.ask("And then?", params=params, remember=False).token_ids
                monkeypatch.setattr(engine.tokenizer, "eos_ids", (ids[3],))
            if end == "stop string":
                text = session.ask("And then?", params=params, remember=False).text
                params = SamplingParams(max_new_tokens=8, stop=(text[len(text) // 2 :][:3],))
            stream, got = session.stream("And then?", params=params), []
            for chunk in stream:
                got.append((chunk.text, chunk.token_id, chunk.finish_reason))
                if len(got) == 3 and end == "cancel":
                    session.cancel()
                if len(got) == 3 and end == "close":
                    stream.close()  # type: ignore[attr-defined]
                    break
            monkeypatch.undo()
            last = session.ask("Why?", params=SamplingParams(max_new_tokens=8))
            cache = session._cache
            found.append((first.token_ids, got, last.token_ids, cache.checkpoint(), contents(cache)))
            session.close()
        plain, ahead = found
        assert plain[:4] == ahead[:4]
        assert all(map(torch.equal, plain[4], ahead[4]))

    def test_steps_run_ahead_by_one(self, model: VisionLanguageModel) -> None:
        runner = Runner(model, runs_ahead=True)
        cache, hidden = filled(runner, sparse=False)
        start = cache.checkpoint().text_len[0]
        answer = runner.answer(cache, hidden, Sampler(GREEDY), 4)
        fed = []
        for _ in range(4):
            answer.next()
            fed.append(cache.checkpoint().text_len[0] - start)
        assert fed == [0, 2, 3, 3]


class TestSampling:
    def test_logits_that_are_no_numbers_are_found_behind_the_steps(self, model: VisionLanguageModel) -> None:
        runner = Runner(model, runs_ahead=True)
        cache, hidden = filled(runner, sparse=False)
        answer = runner.answer(cache, hidden * torch.nan, Sampler(GREEDY), 4)
        with pytest.raises(SparseVILAError, match="not finite"):
            answer.next()

    @pytest.mark.parametrize("params", [GREEDY, DICE], ids=["greedy", "dice"])
    def test_no_token(self, params: SamplingParams) -> None:
        logits = torch.full((50,), torch.nan)
        assert Sampler(params).choose(logits, torch.zeros(1, dtype=torch.float64)).tolist() == [NO_TOKEN]

    def test_numbers_drawn_at_once_are_those_drawn_one_by_one(self) -> None:
        one, all_of_them = Sampler(DICE), Sampler(DICE)
        assert torch.cat([one.draw(1) for _ in range(100)]).tolist() == all_of_them.draw(100).tolist()

    @pytest.mark.parametrize("top_p", [0.05, 0.5, 0.97])
    def test_the_nucleus_with_and_without_candidates(self, top_p: float) -> None:
        for seed in range(5):
            p = (torch.randn(301, generator=torch.Generator().manual_seed(seed)) * 3).double().softmax(0)
            p[7] = p[8]
            p /= p.sum()
            assert torch.equal(nucleus(p, top_p, candidates=True), nucleus(p, top_p, candidates=False))

    def test_no_more_than_two_tokens_are_on_the_way(self) -> None:
        reader = TokenReader(torch.device("cpu"))
        token = torch.tensor([5])
        reader.post(token)
        token.fill_(6)  # a later step writes where the earlier one did
        reader.post(token)
        with pytest.raises(AssertionError, match="two tokens"):
            reader.post(token)
        assert [reader.read(), reader.read()] == [5, 6]
