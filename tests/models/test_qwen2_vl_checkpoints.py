"""Checkpoints of Qwen2-VL and Qwen2.5-VL as others write them: names, nested configs, tied heads, quantised layers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_qwen import QwenOracle, build, write_files
from torch import Tensor, nn

from sparsevila import CorruptCheckpoint, Engine, Image, SamplingParams
from sparsevila.engine.quantise import QuantSettings, quantise_checkpoint
from sparsevila.engine.runner import Runner, Span, TextSpan, VisualSpan
from sparsevila.engine.sparsity.base import Method
from sparsevila.models.checkpoint import Checkpoint
from sparsevila.models.interface import Frames, VisualTokens
from sparsevila.models.qwen2_vl import Qwen2VL, rename
from sparsevila.models.registry import load_model
from sparsevila.models.weights import _slots
from sparsevila.quant.formats import by_layer, detect, read_layer
from sparsevila.quant.linear import LinearLayer, W8A8Linear
from sparsevila.quant.plan import matrices_of
from sparsevila.quant.quantization_config import parse_quantization_config
from sparsevila.quant.stored_layer import StoredLayer

HEAD = "lm_head.weight"
AWQ_FOLDER = Path(__file__).resolve().parents[1] / "fixtures" / "qwen" / "awq"


@pytest.fixture(scope="module")
def qwens(tmp_path_factory: pytest.TempPathFactory) -> dict[str, QwenOracle]:
    return {
        "qwen2": build(tmp_path_factory.mktemp("qwen2"), generation="qwen2", tied=True),
        "qwen2.5": build(tmp_path_factory.mktemp("qwen2.5"), generation="qwen2.5"),
    }


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return load_model(Checkpoint.open(folder), dtype=dtype, device=torch.device("cpu"))


def weights(folder: Path) -> dict[str, Tensor]:
    return dict(load(folder).named_parameters())


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    tensors = change(load_file(folder / "model.safetensors"))
    save_file({k: v.clone().contiguous() for k, v in tensors.items()}, folder / "model.safetensors")


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def resaved(name: str) -> str:
    """Names in memory since transformers 4.52, which some files have."""
    if name.startswith("model."):
        return name.replace("model.", "model.language_model.", 1)
    return f"model.{name}" if name.startswith("visual.") else name


class TestNames:
    @pytest.mark.parametrize("name", ["qwen2", "qwen2.5"])
    def test_both_schemes_load_the_same_weights(self, qwens, tmp_path, name):
        want = weights(qwens[name].folder)
        folder = Path(shutil.copytree(qwens[name].folder, tmp_path / "copy"))
        rewrite(folder, lambda tensors: {resaved(k): v for k, v in tensors.items()})
        assert any(k.startswith("model.visual.") for k in load_file(folder / "model.safetensors"))
        got = weights(folder)
        assert got.keys() == want.keys()
        assert all(torch.equal(got[k], want[k]) for k in want)

    @pytest.mark.parametrize("name", ["qwen2", "qwen2.5"])
    def test_what_transformers_5_writes(self, qwens, tmp_path, name):
        """Text keys in text_config, rope_parameters, everything under the names it has."""
        qwens[name].hf.save_pretrained(tmp_path)
        write_files(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        assert "hidden_size" not in config
        assert "rope_parameters" in config["text_config"]
        model, want = load(tmp_path), load(qwens[name].folder)
        assert model.config == want.config
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), want.parameters(), strict=True))

    def test_renaming_twice_is_renaming_once(self, qwens):
        for stored in load_file(qwens["qwen2.5"].folder / "model.safetensors"):
            for name in (stored, resaved(stored)):
                once = rename(name)
                assert once is not None
                assert rename(once) == once

    def test_old_buffers_are_not_needed(self, qwens, tmp_path):
        folder = Path(shutil.copytree(qwens["qwen2"].folder, tmp_path / "copy"))
        extra = {
            "visual.rotary_pos_emb.inv_freq": torch.ones(4),
            "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
        }
        rewrite(folder, lambda tensors: tensors | extra)
        load(folder)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda t: t | {"visual.blocks.9.norm1.weight": torch.ones(48)}, "no such tensor"),
            (lambda t: {k: v for k, v in t.items() if k != "visual.merger.ln_q.weight"}, "1 tensors are missing"),
            (lambda t: t | {"model.visual.merger.ln_q.weight": torch.ones(48)}, "came twice"),
            (lambda t: t | {"visual.patch_embed.proj.weight": torch.ones(48, 1176)}, "expected shape"),
        ],
    )
    def test_loading_is_strict(self, qwens, tmp_path, change, message):
        folder = Path(shutil.copytree(qwens["qwen2.5"].folder, tmp_path / "copy"))
        rewrite(folder, change)
        with pytest.raises(CorruptCheckpoint, match=message):
            load(folder)


# As the hub has them, but for the numbers of layers; the last is cut down as the published AWQ folders are.
MROPE = {"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}
HUB: dict[str, dict[str, Any]] = {
    "Qwen2-VL-2B": {
        "model_type": "qwen2_vl", "hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12,
        "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
        "vision_config": {"depth": 2, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16, "in_chans": 3,
                          "hidden_size": 1536, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2},
    },
    "Qwen2-VL-7B": {
        "model_type": "qwen2_vl", "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28,
        "num_key_value_heads": 4, "vocab_size": 152064, "vision_config": {"depth": 2, "hidden_size": 3584},
    },
    "Qwen2.5-VL-7B": {
        "model_type": "qwen2_5_vl", "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28,
        "num_key_value_heads": 4, "vocab_size": 152064,
        "vision_config": {"depth": 8, "hidden_act": "silu", "hidden_size": 1280, "intermediate_size": 3420,
                          "num_heads": 16, "in_chans": 3, "out_hidden_size": 3584, "patch_size": 14,
                          "spatial_merge_size": 2, "spatial_patch_size": 14, "window_size": 112,
                          "fullatt_block_indexes": [7, 15, 23, 31], "tokens_per_second": 2, "temporal_patch_size": 2},
    },
    "Qwen2.5-VL-32B-AWQ": {
        "model_type": "qwen2_5_vl", "hidden_size": 5120, "intermediate_size": 27648, "num_attention_heads": 40,
        "num_key_value_heads": 8, "vocab_size": 152064,
        "vision_config": {"hidden_size": 1280, "in_chans": 3, "intermediate_size": 3456, "model_type": "qwen2_5_vl",
                          "out_hidden_size": 5120, "spatial_patch_size": 14, "tokens_per_second": 2},
    },
}  # fmt: skip


@pytest.mark.parametrize("name", HUB)
def test_real_sizes_have_the_tensors_of_transformers(name):
    """Names and shapes of every tensor, of the real widths and two layers, without their values."""
    import transformers

    architecture = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL"}[HUB[name]["model_type"]]
    values = {
        **HUB[name],
        **MROPE,
        "num_hidden_layers": 2,
        "architectures": [f"{architecture}ForConditionalGeneration"],
    }
    hf_class = getattr(transformers, f"{architecture}ForConditionalGeneration")

    class Folder:
        config = values

        def read_json(self, _: str) -> None:
            return None

    with torch.device("meta"):
        theirs = hf_class(hf_class.config_class.from_dict(values))
        ours = Qwen2VL.from_checkpoint(Folder())  # type: ignore[arg-type]
    want = {rename(key): tuple(p.shape) for key, p in theirs.named_parameters()}
    found = {key: slot.shape for key, slot in _slots(ours).items()}
    found.update({f"{key}.weight": shape for key, _, _, shape in matrices_of(ours)})
    if HUB[name].get("tie_word_embeddings"):
        assert found.pop("language_model.lm_head.weight") == want["language_model.embed_tokens.weight"]
    assert found == want


class TestTiedHead:
    def test_shares_the_embedding(self, qwens):
        model = load(qwens["qwen2"].folder)
        assert model.decoder.lm_head.weight.data_ptr() == model.decoder.embed_tokens.weight.data_ptr()

    def test_a_head_that_is_there_is_loaded(self, qwens, tmp_path):
        folder = Path(shutil.copytree(qwens["qwen2"].folder, tmp_path / "copy"))
        own = torch.randn(load_file(folder / "model.safetensors")["model.embed_tokens.weight"].shape)
        rewrite(folder, lambda tensors: tensors | {HEAD: own})
        assert torch.equal(load(folder).decoder.lm_head.weight, own)

    def test_either_level_of_the_config_may_say_so(self, qwens, tmp_path):
        qwens["qwen2"].hf.save_pretrained(tmp_path)
        write_files(tmp_path)
        text = json.loads((tmp_path / "config.json").read_text())["text_config"]
        for top, inner in ((True, None), (False, True), (None, True)):
            edit_config(tmp_path, tie_word_embeddings=top, text_config=text | {"tie_word_embeddings": bool(inner)})
            assert load(tmp_path).config.text.tie_word_embeddings
        edit_config(tmp_path, tie_word_embeddings=False, text_config=text | {"tie_word_embeddings": False})
        with pytest.raises(CorruptCheckpoint, match=r"1 tensors are missing: language_model\.lm_head\.weight"):
            load(tmp_path)


# Quantised layers


def picture() -> Frames:
    rgb = np.random.default_rng(0).integers(0, 256, (1, 90, 130, 3), dtype=np.uint8)
    return Frames("image", rgb, np.zeros(1), "<test>", 0.0, key="picture")


@pytest.fixture(scope="module")
def quantised(qwens, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Plainly rounded copies: AWQ's layout with the tower as it is, and everything in compressed-tensors."""
    found = {}
    for name, settings in {
        "awq": QuantSettings(llm="w4a16", vision="none", group_size=32, form="awq", search=False),
        "both": QuantSettings(llm="w4a16", vision="w8a8", group_size=32, search=False),
        "tower": QuantSettings(llm="none", vision="w8a8", search=False),
    }.items():
        for generation in qwens:
            out = tmp_path_factory.mktemp("quantised") / f"{generation}-{name}"
            quantise_checkpoint(qwens[generation].folder, out, settings, [])
            found[f"{generation}-{name}"] = out
    return found


def dense_copy(folder: Path, target: Path) -> Path:
    """The same model with every quantised matrix as float32."""
    shutil.copytree(folder, target)
    config = parse_quantization_config(json.loads((folder / "config.json").read_text())["quantization_config"])
    checkpoint = Checkpoint.open(folder)
    tensors: dict[str, Tensor] = {}
    shapes = {k.removesuffix(".weight"): tuple(v.shape) for k, v in load_file(target.parent / "source").items()}
    for name, found in by_layer(checkpoint.read_tensors(list(checkpoint.tensors))).items():
        layer = StoredLayer(name, found)
        if detect(layer) == "dense":
            tensors.update({f"{name}.{suffix}" if name else suffix: t.float() for suffix, t in found.items()})
            continue
        tensors[f"{name}.weight"] = read_layer(layer, shapes[name], config).dequantise()
        if layer.has("bias"):
            tensors[f"{name}.bias"] = layer.get("bias").float()
    for file in target.glob("*.safetensors*"):
        file.unlink()
    save_file({k: v.contiguous() for k, v in tensors.items()}, target / "model.safetensors")
    edit_config(target, quantization_config=None)
    return target


def kinds(model: nn.Module, part: str) -> set[str]:
    return {
        type(layer).__name__
        for name, layer in model.named_modules()
        if isinstance(layer, LinearLayer) and name.startswith(part)
    }


@torch.inference_mode()
def logits(model: Any, seen: VisualTokens) -> Tensor:
    runner = Runner(model)
    cache = runner.new_cache()
    cache.reserve(visual=len(seen), text=40)
    spans = [TextSpan((1, 40, 41)), VisualSpan(seen), TextSpan((13, 60, 61, 62))]
    return runner.logits(runner.prefill(cache, spans, method=Method()).hidden)


@torch.inference_mode()
def encode(model: Any) -> VisualTokens:
    return model.encode(model.preprocess(picture()))


def relative(got: Tensor, want: Tensor) -> float:
    assert torch.isfinite(got).all()
    return float((got - want).abs().max() / want.abs().max())


@pytest.mark.parametrize("generation", ["qwen2", "qwen2.5"])
@pytest.mark.parametrize("form", ["awq", "both", "tower"])
def test_quantised_layers_run(qwens, quantised, tmp_path, generation, form):
    """4 bits are the dequantised matrices; 8 bits quantise what goes in too, so they come close to them."""
    folder = quantised[f"{generation}-{form}"]
    (tmp_path / "source").write_bytes((qwens[generation].folder / "model.safetensors").read_bytes())
    model, dense = load(folder), load(dense_copy(folder, tmp_path / "dense"))
    assert kinds(model, "language_model.layers") == ({"Linear"} if form == "tower" else {"W4A16Linear"})
    assert kinds(model, "visual.blocks") == ({"Linear"} if form == "awq" else {"W8A8Linear"})
    assert kinds(model, "visual.merger") == {"Linear"}
    seen, want = encode(model), encode(dense)
    if form == "awq":
        assert torch.equal(seen.features, want.features)
    else:
        error = float((seen.features - want.features).norm() / want.features.norm())
        assert 1e-4 < error < 0.1
        down = next(
            m for n, m in model.named_modules() if isinstance(m, W8A8Linear) and n.endswith(("fc2", "down_proj"))
        )
        assert down.in_features % 16 or generation == "qwen2"
    assert relative(logits(model, want), logits(dense, want)) < 1e-4


@pytest.mark.parametrize("form", ["awq", "both"])
def test_the_engine_answers(quantised, form):
    for generation in ("qwen2", "qwen2.5"):
        with Engine.load(quantised[f"{generation}-{form}"], device="cpu", dtype="bfloat16") as engine:
            assert engine.info.scheme == {"awq": "W4A16 / bfloat16", "both": "W8A8 / W4A16 / bfloat16"}[form]
            session = engine.session(media=[Image(picture().rgb[0])])
            for question in ("What is it?", "And now?"):
                assert session.ask(question, params=SamplingParams(max_new_tokens=4)).stats.output_tokens > 0


def test_awq_folder_of_the_hub_with_its_list_of_exceptions(quantised, tmp_path):
    """`modules_to_not_convert` may be `visual`, as in published folders, or null: the tensors decide."""
    folder = Path(shutil.copytree(quantised["qwen2.5-awq"], tmp_path / "copy"))
    want = encode(load(folder)).features
    stated = json.loads((folder / "config.json").read_text())["quantization_config"]
    for exceptions in (["visual"], None):
        edit_config(folder, quantization_config=stated | {"modules_to_not_convert": exceptions})
        model = load(folder)
        assert kinds(model, "visual") == {"Linear"}
        assert torch.equal(encode(model).features, want)


@torch.inference_mode()
def test_a_folder_that_autoawq_wrote(tmp_path):
    """Against its own dequantised matrices in its own version of `transformers` (tests/models/oracles/awq_qwen.py)."""
    folder = Path(shutil.copytree(AWQ_FOLDER, tmp_path / "copy"))
    write_files(folder)
    shutil.copy(AWQ_FOLDER / "preprocessor_config.json", folder)
    (folder / "video_preprocessor_config.json").unlink()
    want = load_file(folder / "answer.safetensors")
    (folder / "answer.safetensors").unlink()
    model = load(folder)
    assert kinds(model, "language_model.layers") == {"W4A16Linear"}
    assert kinds(model, "visual") == {"Linear"}
    rgb = want["noise"].numpy()[None]
    seen = model.encode(model.preprocess(Frames("image", rgb, np.zeros(1), "<test>", 0.0, key="noise")))
    before, after = (tuple(want[key].tolist()) for key in ("before", "after"))
    runner = Runner(model)
    cache = runner.new_cache()
    cache.reserve(visual=len(seen), text=40)
    spans: list[Span] = [TextSpan(before), VisualSpan(seen), TextSpan(after[:1])]
    for position, row in enumerate(want["logits"]):
        got = runner.logits(runner.prefill(cache, spans, method=Method()).hidden)
        assert relative(got, row) < 1e-4
        spans = [TextSpan(after[position + 1 : position + 2])]
