"""Loading accounts for every tensor, both ways, once, under every naming scheme."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from oracles import Oracle
from safetensors.torch import load_file, save_file

from sparsevila import CorruptCheckpoint, UnsupportedModel
from sparsevila.models.checkpoint import Checkpoint
from sparsevila.models.llava_next import rename
from sparsevila.models.registry import load_model


@pytest.fixture
def folder(oracles: dict[str, Oracle], tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(oracles["vicuna"].folder, tmp_path / "copy"))


def load(folder: Path):
    return load_model(Checkpoint.open(folder), dtype=torch.float32, device=torch.device("cpu"))


def rewrite(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({k: v.clone().contiguous() for k, v in change(tensors).items()}, folder / "model.safetensors")


def canonical(name: str) -> str:
    """Our name, or the given one for a tensor that our model does not hold."""
    return rename(name) or name


def scheme_hub(name: str) -> str:
    name = canonical(name)
    if name.startswith("vision_tower."):
        return name.replace("vision_tower.", "vision_tower.vision_model.", 1)
    if name.startswith("language_model.") and "lm_head" not in name:
        return name.replace("language_model.", "language_model.model.", 1)
    return name


def scheme_resaved(name: str) -> str:
    name = canonical(name)
    if "lm_head" in name:
        return "lm_head.weight"
    if name.startswith("vision_tower."):
        name = name.replace("vision_tower.", "vision_tower.vision_model.", 1)
    return f"model.{name}"


def scheme_5(name: str) -> str:
    return scheme_hub(name).replace("vision_model.", "")


@pytest.mark.parametrize("scheme", [scheme_hub, scheme_resaved, scheme_5])
def test_every_naming_scheme_loads_the_same_weights(oracles, folder, scheme):
    want = dict(load(oracles["vicuna"].folder).named_parameters())
    rewrite(folder, lambda t: {scheme(k): v for k, v in t.items()})
    names = set(load_file(folder / "model.safetensors"))
    assert len(names) > 50
    got = dict(load(folder).named_parameters())
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_renaming_twice_is_renaming_once(oracles):
    for name in load_file(oracles["vicuna"].folder / "model.safetensors"):
        for scheme in (scheme_hub, scheme_resaved, scheme_5):
            once = rename(scheme(name))
            assert once is not None
            assert rename(once) == once


def test_fused_parts_land_in_their_rows(oracles):
    model, source = load(oracles["vicuna"].folder), load_file(oracles["vicuna"].folder / "model.safetensors")
    by_name = {rename(k): v for k, v in source.items()}
    prefix = "language_model.layers.1.self_attn."
    parts = [by_name[f"{prefix}{p}_proj.weight"] for p in "qkv"]
    assert len({p.shape for p in parts}) == 2
    assert torch.equal(model.decoder.layers[1].self_attn.qkv_proj.weight, torch.cat(parts))


def test_layers_behind_the_features_are_neither_held_nor_needed(oracles, folder):
    model = load(oracles["vicuna"].folder)
    assert len(model.vision_tower.encoder.layers) == 2  # of three: features are those of the layer before the last
    rewrite(folder, lambda t: {k: v for k, v in t.items() if "layers.2." not in k and "post_layernorm" not in k})
    load(folder)


class TestRefused:
    def test_missing(self, folder):
        rewrite(folder, lambda t: {k: v for k, v in t.items() if "layers.1.mlp.up_proj" not in k})
        with pytest.raises(CorruptCheckpoint, match=r"missing.*layers\.1\.mlp\.up_proj\.weight"):
            load(folder)

    def test_unknown(self, folder):
        rewrite(folder, lambda t: {**t, "language_model.model.layers.0.self_attn.extra.weight": torch.zeros(2)})
        with pytest.raises(CorruptCheckpoint, match="no such tensor"):
            load(folder)

    def test_a_layer_beyond_the_config_is_unknown(self, folder):
        def more(tensors):
            name = next(k for k in tensors if "vision_tower" in k and "layers.0.mlp.fc1.weight" in k)
            return {**tensors, name.replace("layers.0", "layers.7"): tensors[name]}

        rewrite(folder, more)
        with pytest.raises(CorruptCheckpoint, match=r"layers\.7"):
            load(folder)

    def test_twice_under_two_schemes(self, folder):
        def doubled(tensors):
            name = next(k for k in tensors if k.endswith("embed_tokens.weight"))
            return {**tensors, "model.language_model.embed_tokens.weight": tensors[name]}

        rewrite(folder, doubled)
        with pytest.raises(CorruptCheckpoint, match="twice"):
            load(folder)

    def test_shape(self, folder):
        rewrite(folder, lambda t: {k: v.T if k.endswith("down_proj.weight") else v for k, v in t.items()})
        with pytest.raises(CorruptCheckpoint, match=r"down_proj.*expected shape"):
            load(folder)

    def test_dtype(self, folder):
        rewrite(folder, lambda t: {k: v.to(torch.int32) if k.endswith("image_newline") else v for k, v in t.items()})
        with pytest.raises(CorruptCheckpoint, match="image_newline"):
            load(folder)

    @pytest.mark.parametrize(
        ("section", "key", "value"),
        [
            ("text_config", "num_hidden_layers", 10**6),
            ("text_config", "num_attention_heads", 0),
            ("text_config", "head_dim", 7),
            ("text_config", "vocab_size", 591),
            ("text_config", "hidden_act", "relu"),
            ("text_config", "rope_parameters", {"rope_type": "magic"}),
            ("text_config", "attention_bias", True),
            ("vision_config", "image_size", "large"),
            (None, "vision_feature_layer", -9),
            (None, "vision_feature_select_strategy", "full"),
            (None, "image_grid_pinpoints", [[56]]),
            (None, "architectures", ["GPT9"]),
            (None, "architectures", []),
        ],
    )
    def test_config_values(self, folder, section, key, value):
        config = json.loads((folder / "config.json").read_text())
        (config[section] if section else config)[key] = value
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises((CorruptCheckpoint, UnsupportedModel)) as caught:
            load(folder)
        shown = value["rope_type"] if isinstance(value, dict) else str(value)[:20].strip("[]'")
        assert shown in str(caught.value) or key in str(caught.value)


def test_tied_head_shares_the_embedding(folder):
    config = json.loads((folder / "config.json").read_text())
    rewrite(folder, lambda t: {k: v for k, v in t.items() if "lm_head" not in k})
    with pytest.raises(CorruptCheckpoint, match="lm_head"):
        load(folder)
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = True
    (folder / "config.json").write_text(json.dumps(config))
    model = load(folder)
    assert torch.equal(model.decoder.lm_head.weight, model.decoder.embed_tokens.weight)
    assert model.decoder.lm_head.weight.data_ptr() == model.decoder.embed_tokens.weight.data_ptr()
