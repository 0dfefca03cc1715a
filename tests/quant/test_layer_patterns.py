"""Targets and exceptions made from names of files, against the names of the same layers in memory."""

from __future__ import annotations

import re

import pytest

from sparsevila.quant.layer_patterns import dense_parts, target_patterns
from sparsevila.quant.name_pattern import NamePattern

TOWER = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")
DECODER = (*TOWER[:3], "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")

# Model and naming -> prefixes of the tower's stack, of the decoder's, the head, and other layers; then those in memory.
NAMINGS = {
    "llava, hub": (
        ("vision_tower.vision_model.encoder.layers", "language_model.model.layers", "language_model.lm_head"),
        ("multi_modal_projector.linear_1", "multi_modal_projector.linear_2"),
    ),
    "llava, re-saved": (
        ("model.vision_tower.vision_model.encoder.layers", "model.language_model.layers", "lm_head"),
        ("model.multi_modal_projector.linear_1", "model.multi_modal_projector.linear_2"),
    ),
    "llava, transformers 5": (
        ("vision_tower.encoder.layers", "language_model.model.layers", "language_model.lm_head"),
        ("multi_modal_projector.linear_1", "multi_modal_projector.linear_2"),
    ),
    "llava, in memory": (
        ("model.vision_tower.encoder.layers", "model.language_model.layers", "lm_head"),
        ("model.multi_modal_projector.linear_1", "model.multi_modal_projector.linear_2"),
    ),
    "qwen, hub": (("visual.blocks", "model.layers", "lm_head"), ("visual.merger.mlp.0", "visual.merger.mlp.2")),
    "qwen, in memory": (
        ("model.visual.blocks", "model.language_model.layers", "lm_head"),
        ("model.visual.merger.mlp.0", "model.visual.merger.mlp.2"),
    ),
}
IN_MEMORY = {"llava": "llava, in memory", "qwen": "qwen, in memory"}
NUM_LAYERS = 28


def names_of(naming: str) -> dict[tuple[str, int, str], str]:
    """(part, layer, leaf) -> name: what is the same layer has the same key in each naming."""
    (tower, decoder, head), others = NAMINGS[naming]
    # Qwen's two towers call their MLPs as the decoder does: the stack alone tells them apart.
    leaves = ("attn.qkv", "attn.proj", "mlp.gate_proj", "mlp.up_proj") if "qwen" in naming else TOWER
    names = {("tower", i, leaf): f"{tower}.{i}.{leaf}" for i in range(NUM_LAYERS) for leaf in leaves}
    names |= {("decoder", i, leaf): f"{decoder}.{i}.{leaf}" for i in range(NUM_LAYERS) for leaf in DECODER}
    names |= {("other", i, ""): name for i, name in enumerate(others)}
    return names | {("head", 0, ""): head}


def in_memory(naming: str) -> dict[tuple[str, int, str], str]:
    return names_of(IN_MEMORY[naming.partition(",")[0]])


CHOICES = {
    "tower": lambda part, i, leaf: part == "tower",
    "decoder": lambda part, i, leaf: part == "decoder",
    "used layers of the tower": lambda part, i, leaf: part == "tower" and i < NUM_LAYERS - 1,
    "one leaf left out": lambda part, i, leaf: part == "decoder" and leaf != "mlp.down_proj",
    "one layer left out": lambda part, i, leaf: part == "decoder" and i != 11,
    "every other layer": lambda part, i, leaf: part == "decoder" and i % 2 == 0,
    "a mixture": lambda part, i, leaf: part == "decoder" and (i + len(leaf)) % 3 == 0,
    "head": lambda part, i, leaf: part == "head",
    "head and projector": lambda part, i, leaf: part in ("head", "other"),
    "all": lambda part, i, leaf: True,
}


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("naming", NAMINGS)
def test_targets_mean_the_same_layers_in_a_file_and_in_memory(naming: str, choice: str) -> None:
    stored = names_of(naming)
    wanted = {key for key in stored if CHOICES[choice](*key)}
    patterns = target_patterns([stored[key] for key in wanted], list(stored.values()))
    read = [NamePattern(text) for text in patterns]
    compiled = [re.compile(text.removeprefix("re:")) for text in patterns]
    for names in (stored, in_memory(naming)):
        assert {key for key, name in names.items() if any(p.matches(name) for p in read)} == wanted
        assert {key for key, name in names.items() if any(p.match(name) for p in compiled)} == wanted


def test_containers_and_norms_are_not_targets() -> None:
    stored = names_of("llava, hub")
    layers = [name for (part, _, _), name in stored.items() if part in ("tower", "decoder")]
    patterns = [NamePattern(text) for text in target_patterns(layers, list(stored.values()))]
    for name in ("language_model.model.layers.0", "language_model.model.layers.0.mlp", "language_model.model.norm",
                 "language_model.model.layers.0.input_layernorm", "language_model.model.layers.0.mlp.act_fn",
                 "language_model.model.layers.0.mlp.up_proj.weight_quantizer"):  # fmt: skip
        assert not any(pattern.matches(name) for pattern in patterns)


def test_names_of_eighty_layers_fit_the_limits() -> None:
    stored = [f"model.layers.{i}.{leaf}" for i in range(80) for leaf in DECODER]
    chosen = [name for name in stored if "layers.79." not in name]
    patterns = [NamePattern(text) for text in target_patterns(chosen, stored)]
    assert all(len(pattern.text) <= 256 for pattern in patterns)
    assert [name for name in stored if any(pattern.matches(name) for pattern in patterns)] == chosen


@pytest.mark.parametrize("naming", NAMINGS)
def test_dense_parts_are_found_in_a_file_and_in_memory(naming: str) -> None:
    stored = names_of(naming)
    quantised = {key for key in stored if key[0] == "decoder" and (key[2] != "mlp.down_proj" or key[1] != 1)}
    parts = dense_parts([stored[key] for key in stored if key not in quantised], [stored[key] for key in quantised])
    for names in (stored, in_memory(naming)):
        assert {key for key, name in names.items() if not any(part in name for part in parts)} == quantised
        # As transformers 5 reads them: `re.match` at the begin of a name, or its end.
        kept = {key for key, name in names.items() if not any(re.match(p, name) or name.endswith(p) for p in parts)}
        assert kept == quantised
    assert len(parts) < 10  # a tower is one entry


def test_layers_that_no_part_tells_apart() -> None:
    with pytest.raises(ValueError, match=r"a\.proj"):
        dense_parts(["a.proj"], ["a.proj_2"])
