"""Checkpoints that AutoAWQ and llm-compressor wrote, run from their quantised weights.

Held to the same model with the weights dequantised to float32; where activations are quantised too, to that model with
its activations quantised and the rest of the layer in float64.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles import tokenizer_model, write_tokenizer_config
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sparsevila import CorruptCheckpoint, Engine, Image, InsufficientMemory, SamplingParams
from sparsevila.engine.runner import Runner, TextSpan, VisualSpan
from sparsevila.engine.sparsity.base import Method
from sparsevila.models.checkpoint import Checkpoint, ConfigReader
from sparsevila.models.decoder import Decoder, DecoderConfig
from sparsevila.models.interface import Frames, VisualTokens
from sparsevila.models.registry import load_model
from sparsevila.models.weights import load_weights
from sparsevila.quant.formats import by_layer, detect, read_layer
from sparsevila.quant.linear import Linear, LinearLayer, W4A16Linear, W8A8Linear
from sparsevila.quant.plan import QuantPlan
from sparsevila.quant.quantization_config import parse_quantization_config
from sparsevila.quant.scheme import Int4Weight, Int8Weight
from sparsevila.quant.stored_layer import StoredLayer

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "quant"
LLAVA = ("awq_llava_next", "mixed_llava_next")
LLAMA = ("awq_llama", "w4a16_asymmetric", "w4a16_symmetric", "w8a8")
CPU = torch.device("cpu")
TOLERANCE = 1e-4  # of the largest logit, as against transformers
LAYER_TOLERANCE = 1e-6  # of the largest output of an 8-bit layer: sums are exact, two float32 factors remain


def copy_of(name: str, folder: Path) -> Path:
    """A fixture with a tokenizer, as a folder of a model is."""
    shutil.copytree(FIXTURES / name, folder, ignore=shutil.ignore_patterns("dequantised*", "forward*"))
    (folder / "tokenizer.model").write_bytes(tokenizer_model())
    write_tokenizer_config(folder)
    return folder


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def rewrite(folder: Path, change) -> None:
    tensors = change(load_file(folder / "model.safetensors"))
    save_file({k: v.clone().contiguous() for k, v in tensors.items()}, folder / "model.safetensors")


def shape_of(layer: StoredLayer) -> tuple[int, int]:
    if layer.has("qweight"):
        return layer.get("scales").shape[1], layer.get("qweight").shape[0]
    shape = layer.get("weight_shape").tolist() if layer.has("weight_packed") else layer.get("weight").shape
    return shape[0], shape[1]


def dequantised(folder: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint with every quantised matrix as float32."""
    config = parse_quantization_config(json.loads((folder / "config.json").read_text())["quantization_config"])
    tensors: dict[str, Tensor] = {}
    for name, found in by_layer(load_file(folder / "model.safetensors")).items():
        layer = StoredLayer(name, found)
        if detect(layer) == "dense":
            tensors.update({f"{name}.{suffix}" if name else suffix: t.float() for suffix, t in found.items()})
            continue
        tensors[f"{name}.weight"] = read_layer(layer, shape_of(layer), config).dequantise()
        if layer.has("bias"):
            tensors[f"{name}.bias"] = layer.get("bias").float()
    return tensors


class FakeQuantised(nn.Module):
    """A linear layer whose input is rounded to 8 bits per token; the quotient in float32, the rest in float64."""

    def __init__(self, layer: Linear) -> None:
        super().__init__()
        self.weight = layer.weight.double()
        self.bias = layer.bias.double() if layer.bias is not None else torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        scale = x.float().abs().amax(-1, keepdim=True) / 127
        rounded = (x.float() / scale).round().double() * scale.double()
        return (rounded @ self.weight.t() + self.bias).to(x.dtype)


def compare_layers(model: nn.Module, dense: nn.Module) -> list[tuple[float, float]]:
    """Has each W8A8 layer of a model, whenever it runs, compared with the dense one on the same input.

    The list that comes back fills with pairs: the relative error against that layer with its inputs quantised, and
    against the dense layer. A whole tower cannot be compared: a code that moves to its neighbour by a rounding
    difference, and that one code moves others, makes two exact towers differ by percents.
    """
    errors: list[tuple[float, float]] = []

    def watch(plain: Linear):
        fake = FakeQuantised(plain)

        def hook(_: nn.Module, arguments: tuple[Tensor], out: Tensor) -> None:
            errors.append((relative(out, fake(arguments[0])), relative(out, plain(arguments[0]))))

        return hook

    for name, layer in model.named_modules():
        if isinstance(layer, W8A8Linear):
            plain = dense.get_submodule(name)
            assert isinstance(plain, Linear)
            layer.register_forward_hook(watch(plain))
            layer.fused = partial(LinearLayer.fused, layer)  # through forward, where the hook is
    return errors


def assert_layers_agree(errors: list[tuple[float, float]], num_layers: int) -> None:
    assert len(errors) >= num_layers
    assert max(error for error, _ in errors) < LAYER_TOLERANCE
    assert min(unquantised for _, unquantised in errors) > 100 * LAYER_TOLERANCE  # activations are quantised


def kinds(model: nn.Module) -> dict[str, int]:
    names = [type(layer).__name__ for layer in model.modules() if isinstance(layer, LinearLayer)]
    return {name: names.count(name) for name in sorted(set(names))}


def relative(got: Tensor, want: Tensor) -> float:
    assert torch.isfinite(got).all()
    return float((got - want).abs().max() / want.abs().max())


# LLaVA-NeXT ---------------------------------------------------------------------------------------------------------


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return load_model(Checkpoint.open(folder), dtype=dtype, device=CPU)


def picture() -> Frames:
    rgb = np.random.default_rng(0).integers(0, 256, (1, 70, 90, 3), dtype=np.uint8)
    return Frames("image", rgb, np.zeros(1), "<test>", 0.0, key="picture")


@torch.inference_mode()
def encode(model: Any) -> VisualTokens:
    return model.encode(model.preprocess(picture()))


@torch.inference_mode()
def logits(model: Any, seen: VisualTokens | None = None) -> Tensor:
    """(5, vocab): after a prefill with a picture, many rows at a time, and after four single tokens."""
    visual = VisualSpan(encode(model) if seen is None else seen)
    runner = Runner(model)
    cache = runner.new_cache()
    cache.reserve(visual=len(visual), text=40)
    spans = [TextSpan((1, 40, 41)), visual, TextSpan((13, 60, 61, 62))]
    found = [runner.logits(runner.prefill(cache, spans, method=Method()).hidden)]
    return torch.stack(found + [runner.decode(cache, token) for token in (5, 70, 200, 9)]).float()


def dense_copy(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    save_file(dequantised(folder), target / "model.safetensors")
    edit_config(target, quantization_config=None)
    return target


@pytest.fixture(params=LLAVA)
def llava(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return copy_of(request.param, tmp_path / request.param)


def test_logits_are_those_of_the_dequantised_model(llava: Path, tmp_path: Path) -> None:
    model, dense = load(llava), load(dense_copy(llava, tmp_path / "dense"))
    assert kinds(dense) == {"Linear": 19}
    assert all(not isinstance(layer, Linear) for layer in model.decoder.layers.modules())
    errors = compare_layers(model, dense)
    seen = encode(model)
    if llava.name == "awq_llava_next":
        assert kinds(model) == {"Linear": 11, "W4A16Linear": 8}
        assert torch.equal(seen.features, encode(dense).features)
    else:
        assert kinds(model) == {"Linear": 3, "W4A16Linear": 8, "W8A8Linear": 8}
        assert_layers_agree(errors, 8)
    assert relative(logits(model, seen), logits(dense, seen)) < TOLERANCE


def test_it_runs_in_bfloat16(llava: Path, tmp_path: Path) -> None:
    """And errs as much as the dense model does in bfloat16: a random tiny model magnifies rounding."""
    model, dense = load(llava, torch.bfloat16), dense_copy(llava, tmp_path / "dense")
    layer = model.decoder.layers[0].self_attn
    assert layer.o_proj(torch.zeros(2, layer.o_proj.in_features, dtype=torch.bfloat16)).dtype == torch.bfloat16
    seen = encode(load(dense, torch.bfloat16))
    want = logits(load(dense), replace(seen, features=seen.features.float()))
    assert relative(logits(model, seen), want) < 1.5 * relative(logits(load(dense, torch.bfloat16), seen), want)


def test_the_engine_answers(llava: Path) -> None:
    with Engine.load(llava, device="cpu", dtype="float32") as engine:
        want = {"awq_llava_next": "W4A16 / float32", "mixed_llava_next": "W8A8 / W4A16 / float32"}
        assert engine.info.scheme == want[llava.name]
        dense = dequantised(llava)
        unused = [k for k in dense if "vision_tower" in k and (".layers.2." in k or "post_layernorm" in k)]
        assert engine.info.parameters == sum(t.numel() for k, t in dense.items() if k not in unused)
        assert engine.info.weight_bytes < 4 * engine.info.parameters
        session = engine.session(media=[Image(picture().rgb[0])])
        answers = [session.ask(q, params=SamplingParams(max_new_tokens=6)) for q in ("what is it?", "and now?")]
        assert all(answer.stats.output_tokens > 0 for answer in answers)


def test_the_language_model_may_have_the_config(llava: Path) -> None:
    """Of a model put together from a tower and a language model that was quantised by itself."""
    want = logits(load(llava))
    config = json.loads((llava / "config.json").read_text())
    inner = config["text_config"] | {"quantization_config": config["quantization_config"]}
    edit_config(llava, text_config=inner, quantization_config=None)
    assert torch.equal(logits(load(llava)), want)


def test_shards_may_part_a_layer(llava: Path) -> None:
    """Codes in one file and scales in the other, as files sorted by dtypes fall apart."""
    want = logits(load(llava))
    tensors = load_file(llava / "model.safetensors")
    names = sorted(tensors, key=lambda name: (tensors[name].is_floating_point(), name))
    shards = {"model-1.safetensors": names[: len(names) // 2], "model-2.safetensors": names[len(names) // 2 :]}
    for shard, held in shards.items():
        save_file({name: tensors[name] for name in held}, llava / shard)
    (llava / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {name: shard for shard, held in shards.items() for name in held}}
    (llava / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(logits(load(llava)), want)


def test_tensors_of_one_layer_are_read_one_after_the_other(llava: Path) -> None:
    checkpoint = Checkpoint.open(llava)
    layers = [name.rpartition(".")[0] for name, _ in checkpoint.iter_tensors(lambda name: name.rpartition(".")[0])]
    changes = sum(a != b for a, b in pairwise(layers))
    assert changes == len(set(layers)) - 1
    assert sorted(name for name, _ in checkpoint.iter_tensors(lambda _: "")) == sorted(checkpoint.tensors)


def test_the_estimate_before_loading_knows_packed_weights(llava: Path) -> None:
    with Engine.load(llava, device="cpu", dtype="float32") as engine:
        weight_bytes = engine.info.weight_bytes
    with pytest.raises(InsufficientMemory):
        Engine.load(llava, device="cpu", dtype="float32", max_memory=(512 << 20) + weight_bytes // 2)
    Engine.load(llava, device="cpu", dtype="float32", max_memory=(512 << 20) + 2 * weight_bytes + (64 << 10)).close()


def test_four_bit_layers_that_multiply_in_eight(llava: Path, limit_cpu: Callable[[str], None]) -> None:
    """Close to the same model with float activations, but not it; the estimate before loading counts wider weights."""
    question, params = "What is it?", SamplingParams(max_new_tokens=1)
    found: list[torch.Tensor] = []
    sizes: list[int] = []
    for w4a8 in (False, True):
        with Engine.load(llava, device="cpu", dtype="float32", w4a8=w4a8) as engine:
            assert ("W4A8" in engine.info.scheme) == w4a8
            decoder = engine.model.decoder
            ids = torch.tensor(engine.tokenizer.encode(question, first=True))
            hidden = decoder.embed(ids)
            found.append(decoder.layers[0].mlp(hidden).double())
            assert engine.session().ask(question, params=params).token_ids
    error = float((found[1] - found[0]).norm() / found[0].norm())
    assert 1e-4 < error < 0.05
    limit_cpu("torch")  # packed without padding, which outweighs layers that small
    for w4a8 in (False, True):
        with Engine.load(llava, device="cpu", dtype="float32", w4a8=w4a8) as engine:
            sizes.append(engine.info.weight_bytes)
    assert sizes[1] > sizes[0]
    with pytest.raises(InsufficientMemory) as plain:
        Engine.load(llava, device="cpu", dtype="float32", max_memory=512 << 20)
    with pytest.raises(InsufficientMemory) as wide:
        Engine.load(llava, device="cpu", dtype="float32", max_memory=512 << 20, w4a8=True)
    packed = [
        tensor
        for name, tensor in load_file(llava / "model.safetensors").items()
        if name.endswith(("qweight", "packed"))
    ]
    assert wide.value.need_bytes - plain.value.need_bytes == sum(tensor.numel() * 4 for tensor in packed)


# Llama alone --------------------------------------------------------------------------------------------------------


def decoder_of(folder: Path) -> Decoder:
    checkpoint = Checkpoint.open(folder, tokenizer=False)
    with torch.device("meta"):
        decoder = Decoder(DecoderConfig.from_hf(ConfigReader(checkpoint.config)))

    def rename(name: str) -> str:
        return name.removeprefix("model.")

    stated = checkpoint.config.get("quantization_config")
    plan = QuantPlan.of(decoder, checkpoint.headers(), rename, stated and parse_quantization_config(stated))
    plan.apply(decoder)
    tied = {"lm_head.weight": "embed_tokens.weight"} if decoder.config.tie_word_embeddings else {}
    load_weights(decoder, checkpoint, rename, tied=tied, dtype=torch.float32, device=CPU, plan=plan)
    return decoder


def run(decoder: Decoder, num_tokens: int) -> Tensor:
    """Every linear layer once, attention left out: the queries stand for what was attended to."""
    hidden = decoder.embed(torch.arange(3, 3 + num_tokens))
    cos, sin = decoder.angles(torch.arange(num_tokens))
    for index in range(decoder.config.num_layers):
        q, k, v = decoder.layer(index).project(hidden, cos, sin)
        repeat = q.shape[0] // k.shape[0]
        hidden = decoder.layer(index).finish(hidden, q + (k + v).repeat_interleave(repeat, 0))
    return decoder.logits(hidden)


@pytest.mark.parametrize("num_tokens", [1, 30])
@pytest.mark.parametrize("name", LLAMA)
def test_a_decoder_computes_with_its_dequantised_weights(name: str, num_tokens: int, tmp_path: Path) -> None:
    decoder, dense = decoder_of(FIXTURES / name), decoder_of(dense_copy(FIXTURES / name, tmp_path / "dense"))
    kind = "W8A8Linear" if name == "w8a8" else "W4A16Linear"
    assert kinds(decoder) == {"Linear": 1, kind: 4 * decoder.config.num_layers}
    errors = compare_layers(decoder, dense)
    got = run(decoder, num_tokens)
    if name == "w8a8":
        assert_layers_agree(errors, 4 * decoder.config.num_layers)
    else:
        assert relative(got, run(dense, num_tokens)) < TOLERANCE


@pytest.mark.parametrize("name", ["awq_llama", "awq_llava_next"])
def test_a_layer_computes_what_autoawq_computes(name: str) -> None:
    forward = load_file(FIXTURES / name / "forward.safetensors")
    decoder = (
        decoder_of(FIXTURES / name)
        if name == "awq_llama"
        else load_model(Checkpoint.open(FIXTURES / name, tokenizer=False), dtype=torch.float32, device=CPU).decoder
    )
    checked = 0
    for layer_name, layer in decoder.named_modules():
        if isinstance(layer, W4A16Linear) and not layer.parts:
            stored = next((k.removesuffix(".x") for k in forward if k.endswith(f"{layer_name}.x")), None)
            if stored is None:
                continue
            got = layer(forward[f"{stored}.x"].float())
            assert relative(got, forward[f"{stored}.y"].float()) < 4e-3  # they accumulate and return float16
            checked += 1
    assert checked >= 2


# Refused ------------------------------------------------------------------------------------------------------------


class TestRefused:
    @pytest.fixture
    def awq(self, tmp_path: Path) -> Path:
        return copy_of("awq_llava_next", tmp_path / "awq")

    def test_no_quantization_config(self, awq: Path) -> None:
        edit_config(awq, quantization_config=None)
        with pytest.raises(CorruptCheckpoint, match=r"layer language_model\..*no quantization_config"):
            load(awq)

    def test_a_quantization_config_that_is_none(self, awq: Path) -> None:
        edit_config(awq, quantization_config=[1])
        with pytest.raises(CorruptCheckpoint, match="expected an object"):
            load(awq)

    @pytest.mark.parametrize("suffix", ["qweight", "qzeros", "scales"])
    def test_a_missing_tensor(self, awq: Path, suffix: str) -> None:
        rewrite(awq, lambda t: {k: v for k, v in t.items() if not k.endswith(f"layers.1.mlp.down_proj.{suffix}")})
        with pytest.raises(CorruptCheckpoint, match=r"layers\.1\.mlp\.down_proj"):
            load(awq)

    def test_a_missing_matrix(self, awq: Path) -> None:
        rewrite(awq, lambda t: {k: v for k, v in t.items() if "layers.1.mlp.down_proj" not in k})
        with pytest.raises(CorruptCheckpoint, match=r"missing.*layers\.1\.mlp\.down_proj\.weight"):
            load(awq)

    def test_a_layer_that_the_model_does_not_have(self, awq: Path) -> None:
        rewrite(awq, lambda t: t | {k.replace("layers.0", "layers.7"): v for k, v in t.items() if "layers.0.mlp" in k})
        with pytest.raises(CorruptCheckpoint, match=r"layers\.7.*no such"):
            load(awq)

    def test_one_layer_under_two_names(self, awq: Path) -> None:
        rewrite(
            awq,
            lambda t: (
                t
                | {
                    k.replace("language_model.model", "model.language_model"): v
                    for k, v in t.items()
                    if "layers.0.mlp.up_proj" in k
                }
            ),
        )
        with pytest.raises(CorruptCheckpoint, match=r"layers\.0\.mlp\.up_proj.*twice"):
            load(awq)

    def test_another_shape(self, awq: Path) -> None:
        rewrite(awq, lambda t: {k: v[:-8] if k.endswith("layers.0.mlp.up_proj.qweight") else v for k, v in t.items()})
        with pytest.raises(CorruptCheckpoint, match=r"layers\.0\.mlp\.up_proj\.qweight: expected shape"):
            load(awq)

    def test_a_dense_part_of_a_fused_layer(self, awq: Path) -> None:
        def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            layer = "language_model.model.layers.0.self_attn.k_proj"
            N, K = tensors[f"{layer}.scales"].shape[1], tensors[f"{layer}.qweight"].shape[0]
            kept = {k: v for k, v in tensors.items() if not k.startswith(layer)}
            return kept | {f"{layer}.weight": torch.zeros(N, K, dtype=torch.float16)}

        rewrite(awq, change)
        with pytest.raises(CorruptCheckpoint, match=r"alike: .*q_proj is W4A16 in groups of 64, .*k_proj is dense"):
            load(awq)

    def test_a_scale_that_is_no_number(self, awq: Path) -> None:
        name = "language_model.model.layers.0.self_attn.k_proj.scales"
        rewrite(awq, lambda t: t | {name: t[name].fill_(float("nan"))})
        with pytest.raises(CorruptCheckpoint, match=r"k_proj\.scales"):
            load(awq)


def test_values_are_what_the_reader_gives() -> None:
    """The two kinds of values that this file relies on."""
    tensors = by_layer(load_file(FIXTURES / "mixed_llava_next" / "model.safetensors"))
    config = parse_quantization_config(
        json.loads((FIXTURES / "mixed_llava_next" / "config.json").read_text())["quantization_config"]
    )
    found = {
        type(read_layer(StoredLayer(n, t), shape_of(StoredLayer(n, t)), config))
        for n, t in tensors.items()
        if detect(StoredLayer(n, t)) != "dense"
    }
    assert found == {Int4Weight, Int8Weight}
