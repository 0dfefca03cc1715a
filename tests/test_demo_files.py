"""The bundled demo model as files: whichever it is, it must load everywhere and be one consistent checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
from safetensors import safe_open

from sparsevila import Engine, Image, SamplingParams, Sparsity
from sparsevila.engine import hub

DEMO = Path(hub.__file__).resolve().parents[1] / "assets" / "demo"
FILES = {
    "NOTE.md",
    "config.json",
    "generation_config.json",
    "head_scores.json",
    "model.safetensors",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.model",
    "tokenizer_config.json",
}
MAX_BYTES = 16_000_000
MIN_VISUAL_TOKENS = 2000


def document(name: str) -> dict[str, Any]:
    return json.loads((DEMO / name).read_text(encoding="utf-8"))


def special_ids() -> dict[str, int]:
    added = document("tokenizer_config.json")["added_tokens_decoder"]
    return {token["content"]: int(number) for number, token in added.items()}


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    with safe_open(DEMO / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict


def test_the_folder_is_complete_and_small() -> None:
    assert {path.name for path in DEMO.iterdir()} == FILES
    assert sum(path.stat().st_size for path in DEMO.iterdir()) <= MAX_BYTES
    assert (DEMO / "NOTE.md").read_text(encoding="utf-8").startswith("# ")


def test_the_list_of_models_says_its_size() -> None:
    size = (DEMO / "model.safetensors").stat().st_size
    assert hub.ALIASES["demo"].size_bytes == pytest.approx(size, rel=0.1)


def test_the_weights_are_bfloat16_and_finite(tensors: dict[str, torch.Tensor]) -> None:
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert [name for name, tensor in tensors.items() if not tensor.isfinite().all()] == []
    config = document("config.json")
    assert config["torch_dtype"] == config["text_config"]["torch_dtype"] == "bfloat16"


def test_transformers_finds_every_tensor_it_wants_and_no_other(tensors: dict[str, torch.Tensor]) -> None:
    import transformers

    model, info = transformers.LlavaNextVideoForConditionalGeneration.from_pretrained(
        DEMO, output_loading_info=True, dtype=torch.float32
    )
    assert {key: value for key, value in info.items() if value} == {}
    assert sum(p.numel() for p in model.parameters()) == sum(t.numel() for t in tensors.values())


def test_the_names_are_those_of_the_hub(tensors: dict[str, torch.Tensor]) -> None:
    roots = {name.rsplit(".layers.", 1)[0] for name in tensors if ".layers." in name}
    assert roots == {"vision_tower.vision_model.encoder", "language_model.model"}
    assert {"image_newline", "multi_modal_projector.linear_1.weight", "language_model.lm_head.weight"} <= set(tensors)


def test_the_documents_agree() -> None:
    config, names = document("config.json"), special_ids()
    generation, pictures = document("generation_config.json"), document("preprocessor_config.json")
    tile, patch = config["vision_config"]["image_size"], config["vision_config"]["patch_size"]
    assert config["architectures"] == ["LlavaNextVideoForConditionalGeneration"]
    assert (names["<image>"], names["<video>"]) == (config["image_token_index"], config["video_token_index"])
    assert (names["<s>"], names["</s>"]) == (generation["bos_token_id"], generation["eos_token_id"])
    assert names["<pad>"] == generation["pad_token_id"]
    assert max(names.values()) < config["text_config"]["vocab_size"]
    assert pictures["crop_size"] == {"height": tile, "width": tile}
    assert pictures["size"] == {"shortest_edge": tile}
    assert pictures["image_grid_pinpoints"] == config["image_grid_pinpoints"]
    assert document("processor_config.json")["patch_size"] == patch
    assert document("tokenizer_config.json")["model_max_length"] == config["text_config"]["max_position_embeddings"]


def test_the_tokenizer_spells_every_text() -> None:
    pieces, names = sentencepiece.SentencePieceProcessor(model_file=str(DEMO / "tokenizer.model")), special_ids()
    assert min(names[name] for name in ("<image>", "<video>", "<pad>")) == pieces.get_piece_size()
    assert sum(pieces.is_byte(number) for number in range(pieces.get_piece_size())) == 256
    for text in ("what colour is the red star?", "naïve 数 🙂 \t~", "\x00"):
        assert pieces.unk_id() not in pieces.encode(text)
        assert pieces.decode(pieces.encode(text)) == text


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_engine_answers_about_thousands_of_visual_tokens(dtype: str) -> None:
    rng = np.random.default_rng(0)
    with Engine.load("demo", device="cpu", dtype=dtype, offline=True) as engine:
        assert Path(engine.info.folder) == DEMO
        session = engine.session(sparsity=Sparsity(0.0, 0.0))
        seen = 0
        while seen < MIN_VISUAL_TOKENS:
            rgb = rng.integers(0, 256, (128, 128, 3), dtype=np.uint8)
            seen += session.attach(Image(rgb)).tokens_kept
        result = session.ask("what is in row one?", params=SamplingParams(max_new_tokens=4))
    assert result.finish_reason in ("stop", "length")
    assert result.stats.visual_tokens_active >= MIN_VISUAL_TOKENS
