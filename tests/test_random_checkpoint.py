"""The random checkpoints: `transformers` must take them for real ones, and the same command must write them again."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent


def _load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("random_checkpoint", ROOT / "benchmarks" / "random_checkpoint.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    return module


script = _load_script()
FILES = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.model",
    "tokenizer_config.json",
}
TINY = replace(script.preset("tiny"), vision_layers=2, text_layers=2, vision_hidden=32, text_hidden=48)
VARIANTS = {
    "preset": script.preset("tiny"),
    "image": replace(TINY, model="llava_next", head_dim=None),
    "mistral": replace(TINY, model="llava_next", text_model="mistral", rope_theta=1e6, text_heads=6, text_kv_heads=3),
    "scaled rope": replace(TINY, rope_scaling=("linear", 2.5)),
}


def _load_in_transformers(folder: Path, model: str) -> Any:
    import transformers

    cls: Any = {
        "llava_next": transformers.LlavaNextForConditionalGeneration,
        "llava_next_video": transformers.LlavaNextVideoForConditionalGeneration,
    }[model]
    loaded, info = cls.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    wrong = {key: value for key, value in info.items() if value}
    assert not wrong, f"transformers reports {wrong}"
    return loaded.eval()


@pytest.mark.parametrize("name", VARIANTS)
def test_transformers_loads_every_tensor(name: str, tmp_path: Path) -> None:
    shape = VARIANTS[name]
    script.write_random_checkpoint(tmp_path, shape, dtype="float32")
    model = _load_in_transformers(tmp_path, shape.model)
    stored = load_file(tmp_path / "model.safetensors")
    assert sum(t.numel() for t in stored.values()) == sum(p.numel() for p in model.parameters())
    text = model.config.text_config
    assert text.num_key_value_heads == shape.text_kv_heads
    assert text.rope_parameters["rope_theta"] == shape.rope_theta
    assert text.rope_parameters.get("factor") == (shape.rope_scaling[1] if shape.rope_scaling else None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command writes for the preset `tiny`."""
    folder = tmp_path_factory.mktemp("tiny")
    script.main(["--preset", "tiny", str(folder)])
    return folder


def test_question_and_picture_change_the_logits(folder: Path) -> None:
    shape = script.preset("tiny")
    model = _load_in_transformers(folder, shape.model)
    num_tokens = (shape.image_size // shape.patch_size // 2) ** 2
    prefix = [1, 300, 301] + [shape.token_id("<video>")] * num_tokens
    generator = torch.Generator().manual_seed(7)
    clips = torch.randn(2, 1, 1, 3, shape.image_size, shape.image_size, generator=generator)
    questions = [[310, 311, 312], [313, 311, 312], [311, 310, 312]]  # the last is the first in another order

    def logits(clip: torch.Tensor, question: list[int]) -> torch.Tensor:
        ids = torch.tensor([prefix + question])
        with torch.inference_mode():
            return model(input_ids=ids, pixel_values_videos=clip).logits[0, -1]

    base = logits(clips[0], questions[0])
    assert base[: script.EOS_ID].abs().max() == 0
    assert 2 < base[base != 0].std() < 8
    for other in (logits(clips[1], questions[0]), *(logits(clips[0], q) for q in questions[1:])):
        assert (other - base).abs().max() > 1


def test_tokenizer_ids_agree_with_the_config(folder: Path) -> None:
    import sentencepiece

    config = json.loads((folder / "config.json").read_text())
    added = json.loads((folder / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    names = {token["content"]: int(i) for i, token in added.items()}
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    assert names["<image>"] == config["image_token_index"]
    assert names["<video>"] == config["video_token_index"]
    assert min(names[n] for n in ("<image>", "<video>", "<pad>")) == pieces.get_piece_size()
    assert max(names.values()) < config["text_config"]["vocab_size"]
    assert [pieces.id_to_piece(i) for i in range(3)] == ["<unk>", "<s>", "</s>"]
    assert pieces.decode(pieces.encode("naïve 数 🙂 ok")) == "naïve 数 🙂 ok"


def test_the_command_writes_the_same_files_again(folder: Path, tmp_path: Path) -> None:
    script.main(["--preset", "tiny", str(tmp_path)])
    assert {p.name for p in tmp_path.iterdir()} == {p.name for p in folder.iterdir()} == FILES
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), name
    assert sum(p.stat().st_size for p in folder.iterdir()) < 1_500_000


def test_the_dtype_is_that_of_every_tensor(tmp_path: Path) -> None:
    script.main(["--preset", "tiny", str(tmp_path), "--dtype", "float16"])
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["torch_dtype"] == config["text_config"]["torch_dtype"] == "float16"
    assert {t.dtype for t in load_file(tmp_path / "model.safetensors").values()} == {torch.float16}


def test_shards_hold_the_same_tensors(tmp_path: Path) -> None:
    whole, split = tmp_path / "whole", tmp_path / "split"
    script.write_random_checkpoint(whole, TINY)
    script.write_random_checkpoint(split, TINY, max_shard_bytes=100_000)
    index = json.loads((split / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2
    assert not (split / "model.safetensors").exists()
    joined = {name: tensor for file in files for name, tensor in load_file(split / file).items()}
    expected = load_file(whole / "model.safetensors")
    assert index["weight_map"].keys() == joined.keys() == expected.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in expected.values())
    assert all(torch.equal(joined[name], tensor) for name, tensor in expected.items())


def test_a_quantised_one_loads_and_answers(tmp_path: Path) -> None:
    from sparsevila import Engine, Image, SamplingParams
    from sparsevila.models.checkpoint import Checkpoint
    from sparsevila.models.registry import load_model
    from sparsevila.quant.linear import W4A16Linear, W8A8Linear

    script.main(["--preset", "tiny", str(tmp_path / "model"), "--llm", "w4a16", "--vision", "w8a8", "--group", "32"])
    with Engine.load(tmp_path / "model", dtype="float32") as engine:
        assert engine.info.scheme == "W8A8 / W4A16 / float32"
        picture = torch.randint(256, (150, 200, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        session = engine.session(media=[Image(picture.numpy())])
        answer = session.ask("What do you see?", params=SamplingParams(max_new_tokens=8))
        assert len(answer.token_ids) == 8 or answer.finish_reason == "stop"
    model: Any = load_model(Checkpoint.open(tmp_path / "model"), dtype=torch.float32, device=torch.device("cpu"))
    assert isinstance(model.decoder.layer(2).mlp.down_proj, W4A16Linear)
    assert isinstance(model.vision_tower.encoder.layers[2].mlp.fc2, W8A8Linear)
    # What comes out has the size that a matrix of the dense kind gives: gain 2 for down_proj, 1 for fc2.
    x = torch.randn(400, 192, generator=torch.Generator().manual_seed(1))
    assert float(model.decoder.layer(2).mlp.down_proj(x).std()) == pytest.approx(2.0, rel=0.1)
    x = torch.randn(400, 160, generator=torch.Generator().manual_seed(1))
    assert float(model.vision_tower.encoder.layers[2].mlp.fc2(x).std()) == pytest.approx(1.0, rel=0.1)


def test_seed_changes_the_weights(tmp_path: Path) -> None:
    for seed in (0, 1):
        script.write_random_checkpoint(tmp_path / str(seed), TINY, seed=seed)
    a, b = (load_file(tmp_path / str(seed) / "model.safetensors") for seed in (0, 1))
    assert not any(torch.equal(a[name], b[name]) for name in a)


def test_presets() -> None:
    assert script.preset("vicuna-7b-3-layers").text_layers == 3
    assert script.preset("0.5b").vision_hidden == 1024
    for name in ("vicuna-7b-0-layers", "7b", ""):
        with pytest.raises(ValueError, match="preset: expected one of"):
            script.preset(name)
    with pytest.raises(ValueError, match="vocab_size: expected at least 579, got 578"):
        replace(TINY, vocab_size=578)
