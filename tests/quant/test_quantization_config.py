"""`quantization_config`: what is understood, what is refused by name, and that we write what the tools write."""

from __future__ import annotations

import contextlib
import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsevila.errors import CorruptCheckpoint, UnsupportedModel
from sparsevila.quant.quantization_config import (
    QuantizationConfig,
    Scheme,
    SchemeGroup,
    awq_config,
    compressed_config,
    parse_quantization_config,
)

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "quant"
W4, W4_SYMMETRIC, W8 = Scheme(4, 32, False), Scheme(4, 32, True), Scheme(8, None, True)
TOWER = "re:.*vision_tower.*(q_proj|k_proj|v_proj|out_proj|fc1|fc2)$"
DECODER = "re:.*language_model.*(q|k|v|o|gate|up|down)_proj$"
LINEAR = ("Linear",)


def written_by_tool(name: str) -> dict[str, Any]:
    config = json.loads((FIXTURES / name / "config.json").read_text())["quantization_config"]
    assert isinstance(config, dict)
    return config


EXPECTED = {
    "awq_llama": awq_config(32),
    "awq_llava_next": awq_config(64),
    "w4a16_asymmetric": compressed_config((SchemeGroup(LINEAR, W4),), dense=("lm_head",)),
    "w4a16_symmetric": compressed_config((SchemeGroup(LINEAR, W4_SYMMETRIC),), dense=("lm_head",)),
    "w8a8": compressed_config((SchemeGroup(LINEAR, W8),), dense=("lm_head",)),
    "mixed_llava_next": compressed_config(
        (SchemeGroup((TOWER,), W8), SchemeGroup((DECODER,), W4)),
        dense=("multi_modal_projector.linear_1", "multi_modal_projector.linear_2", "language_model.lm_head"),
    ),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_the_tools_configs_are_understood(name: str) -> None:
    assert parse_quantization_config(written_by_tool(name)) == EXPECTED[name]


@pytest.mark.parametrize("name", [name for name in EXPECTED if not name.startswith("awq")])
def test_what_we_write_is_part_of_what_compressed_tensors_writes(name: str) -> None:
    theirs = written_by_tool(name)
    if name == "w4a16_symmetric":  # calibrated with an order of the inputs that leaves no trace in the file
        theirs["config_groups"]["group_0"]["weights"]["actorder"] = None
    assert_part(EXPECTED[name].to_dict(), theirs, name)


def assert_part(ours: Any, theirs: Any, where: str) -> None:
    if not isinstance(ours, dict) or not ours:
        assert ours == theirs, where
        return
    for key, value in ours.items():
        assert key in theirs, f"{where}.{key}"
        assert_part(value, theirs[key], f"{where}.{key}")


@pytest.mark.parametrize("name", ["awq_llama", "awq_llava_next"])
def test_what_we_write_is_what_autoawq_writes(name: str) -> None:
    assert EXPECTED[name].to_dict() == written_by_tool(name)


SCHEMES = st.just(W8) | st.builds(Scheme, st.just(4), st.none() | st.integers(2, 65536), st.booleans())
NAMES = st.sampled_from(["Linear", "lm_head", "re:.*mlp.*", "re:.*self_attn\\..*_proj$", "model.layers.0.up_proj"])
GROUPS = st.lists(
    st.builds(SchemeGroup, st.lists(NAMES, min_size=1, max_size=3).map(tuple), SCHEMES), min_size=1, max_size=3
).map(tuple)


@settings(max_examples=50, deadline=None)
@given(GROUPS, st.lists(NAMES, max_size=3).map(tuple))
def test_written_configs_are_read_back(groups: tuple[SchemeGroup, ...], dense: tuple[str, ...]) -> None:
    config = compressed_config(groups, dense=dense)
    assert parse_quantization_config(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("group_size", [None, 2, 128])
def test_written_awq_configs_are_read_back(group_size: int | None) -> None:
    config = awq_config(group_size, dense=("visual",))
    assert parse_quantization_config(json.loads(json.dumps(config.to_dict()))) == config


# What is accepted beside what the fixtures have ---------------------------------------------------------------------


def awq(**more: Any) -> dict[str, Any]:
    return awq_config(128).to_dict() | more


@pytest.mark.parametrize(
    ("values", "layout"),
    [
        (awq(version="GEMM"), "gemm"),
        (awq(version="gemv"), "gemv"),
        (awq(version="GEMV_FAST"), "gemv_fast"),
        (awq(version=None), None),
        (awq(version=None, format="gemm", checkpoint_format="gemm", backend="auto"), "gemm"),
    ],
)
def test_awq_layouts(values: dict[str, Any], layout: str | None) -> None:
    assert parse_quantization_config(values).layout == layout


def test_awq_exceptions_are_parts_of_names() -> None:
    config = parse_quantization_config(awq(modules_to_not_convert=["visual", "lm_head"]))
    assert config.scheme("visual.blocks.0.mlp.up_proj") is None
    assert config.scheme("model.layers.0.mlp.up_proj") == Scheme(4, 128, False)


def compressed(bits: int = 4, **more: Any) -> dict[str, Any]:
    return compressed_config((SchemeGroup(LINEAR, W4 if bits == 4 else W8),)).to_dict() | more


def edited(path: str, value: Any, bits: int = 4) -> dict[str, Any]:
    """The config with one value replaced; `...` removes the key."""
    values = copy.deepcopy(compressed(bits))
    *parents, key = path.split(".")
    place = values
    for parent in parents:
        place = place[parent]
    if value is ...:
        del place[key]
    else:
        place[key] = value
    return values


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("sparsity_config", {"format": "dense", "global_sparsity": 0.14, "ignore": ["lm_head"]}),
        ("sparsity_config", None),
        ("sparsity_config", ...),
        ("transform_config", ...),
        ("kv_cache_scheme", ...),
        ("ignore", None),
        ("quantization_status", "frozen"),
        ("config_groups.group_0.format", ...),
        ("config_groups.group_0.weights.actorder", "static"),
        ("config_groups.group_0.weights.actorder", "weight"),
        ("config_groups.group_0.weights.actorder", False),
        ("config_groups.group_0.weights.observer", "minmax"),
        ("config_groups.group_0.input_activations", ...),
    ],
)
def test_what_changes_nothing_is_accepted(path: str, value: Any) -> None:
    assert parse_quantization_config(edited(path, value)).groups == (SchemeGroup(LINEAR, W4),)


# What is refused, by key and value ----------------------------------------------------------------------------------

GROUP = "config_groups.group_0"
REFUSED = [
    (awq(quant_method="gptq"), UnsupportedModel, r"quant_method: expected .*, got 'gptq'"),
    ({"bits": 4}, CorruptCheckpoint, "quant_method: the key is missing"),
    (awq(bits=3), UnsupportedModel, "bits: expected 4, got 3"),
    (awq(bits=4.0), UnsupportedModel, "bits: expected 4, got 4.0"),
    (awq(zero_point=False), UnsupportedModel, "zero_point: expected True, got False"),
    (awq(version="marlin"), UnsupportedModel, "version: .* got 'marlin'"),
    (awq(version="exllama"), UnsupportedModel, "version: .* got 'exllama'"),
    (awq(version="gemm", format="llm-awq"), UnsupportedModel, "format: .* got 'llm-awq'"),
    (awq(version="gemm", format="gemv"), CorruptCheckpoint, "format: expected 'gemm' as above, got 'gemv'"),
    (awq(version=7), CorruptCheckpoint, "version: expected a text, got 7"),
    (awq(backend="llm-awq"), UnsupportedModel, "backend: .* got 'llm-awq'"),
    (awq(desc_act=True), UnsupportedModel, "desc_act: expected False, got True"),
    (awq(dynamic={"-:.*": {}}), UnsupportedModel, "dynamic: expected nothing"),
    (awq(group_size=0), UnsupportedModel, "group_size: .* got 0"),
    (awq(group_size=-2), CorruptCheckpoint, "group_size: .* got -2"),
    (awq(group_size=10**30), CorruptCheckpoint, "group_size: expected a whole number from -1 to 65536"),
    (awq(group_size="128"), CorruptCheckpoint, "group_size: .* got '128'"),
    (awq(group_size=True), CorruptCheckpoint, "group_size: .* got True"),
    (awq(modules_to_not_convert="visual"), CorruptCheckpoint, "modules_to_not_convert: expected a list"),
    (awq(modules_to_not_convert=[7]), CorruptCheckpoint, "modules_to_not_convert: expected names"),
    (edited("format", "marlin-24"), UnsupportedModel, "format: .* got 'marlin-24'"),
    (edited("format", "float-quantized"), UnsupportedModel, "format: .* got 'float-quantized'"),
    (edited("format", "dense"), UnsupportedModel, "format: .* got 'dense'"),
    (edited("format", ["pack-quantized"]), UnsupportedModel, "format: "),
    (edited("format", "int-quantized"), UnsupportedModel, "num_bits: .*'int-quantized', got 4"),
    (edited(f"{GROUP}.format", "int-quantized"), UnsupportedModel, "group_0.format: .* got 'int-quantized'"),
    (edited(f"{GROUP}.format", ["x"]), UnsupportedModel, "group_0.format: "),
    (edited("kv_cache_scheme", {"num_bits": 8}), UnsupportedModel, "kv_cache_scheme: expected None"),
    (edited("transform_config", {"config_groups": {}}), UnsupportedModel, "transform_config: expected nothing"),
    (edited("sparsity_config", {"format": "sparse-24-bitmask"}), UnsupportedModel, "sparsity_config.format: "),
    (edited("sparsity_config", {"global_sparsity": 0.5}), CorruptCheckpoint, "sparsity_config.format: the key"),
    (edited("sparsity_config", "dense"), CorruptCheckpoint, "sparsity_config: expected an object"),
    (edited("config_groups", {}), CorruptCheckpoint, "config_groups: expected 1 to 64 groups"),
    (edited("config_groups", {str(i): {} for i in range(65)}), CorruptCheckpoint, "config_groups: expected 1 to 64"),
    (edited("config_groups", {"W4A16": ["Linear"]}), CorruptCheckpoint, "W4A16: expected an object"),
    (edited("config_groups", ...), CorruptCheckpoint, "config_groups: the key is missing"),
    (edited(f"{GROUP}.targets", ...), CorruptCheckpoint, "targets: the key is missing"),
    (edited(f"{GROUP}.targets", ["x" * 513]), CorruptCheckpoint, "targets: expected names of 1 to 512"),
    (edited(f"{GROUP}.targets", ["x"] * 16385), CorruptCheckpoint, "targets: expected a list of at most 16384"),
    (edited(f"{GROUP}.targets", ["re:(a+)+$"]), UnsupportedModel, r"re:\(a\+\)\+\$.*repeat '\+'"),
    (edited("ignore", ["re:" + "a" * 257]), UnsupportedModel, "more than 256 characters"),
    (edited("ignore", [f"re:{i:0200}" for i in range(21)]), CorruptCheckpoint, "4096 characters of name patterns"),
    (edited(f"{GROUP}.output_activations", {"num_bits": 8}), UnsupportedModel, "output_activations: expected None"),
    (edited(f"{GROUP}.weights", None), CorruptCheckpoint, "weights: expected an object, got None"),
    (edited(f"{GROUP}.weights.num_bits", 3), UnsupportedModel, "weights.num_bits: expected 4 or 8, got 3"),
    (edited(f"{GROUP}.weights.num_bits", 8), UnsupportedModel, "weights.strategy: expected 'channel', got 'group'"),
    (edited(f"{GROUP}.weights.type", "float"), UnsupportedModel, "weights.type: expected 'int', got 'float'"),
    (edited(f"{GROUP}.weights.actorder", "group"), UnsupportedModel, "weights.actorder: .* got 'group'"),
    (edited(f"{GROUP}.weights.actorder", "dynamic"), UnsupportedModel, "weights.actorder: .* got 'dynamic'"),
    (edited(f"{GROUP}.weights.actorder", True), UnsupportedModel, "weights.actorder: .* got True"),
    (edited(f"{GROUP}.weights.dynamic", True), UnsupportedModel, "weights.dynamic: "),
    (edited(f"{GROUP}.weights.block_structure", [128, 128]), UnsupportedModel, "weights.block_structure: "),
    (edited(f"{GROUP}.weights.strategy", "tensor"), UnsupportedModel, "weights.strategy: .* got 'tensor'"),
    (edited(f"{GROUP}.weights.symmetric", 1), UnsupportedModel, "weights.symmetric: .* got 1"),
    (edited(f"{GROUP}.weights.group_size", None), CorruptCheckpoint, "weights.group_size: expected a whole number"),
    (edited(f"{GROUP}.weights.group_size", 1), CorruptCheckpoint, "weights.group_size: expected a whole number from 2"),
    (edited(f"{GROUP}.input_activations", {"num_bits": 8}), UnsupportedModel, "input_activations: expected None"),
    (edited(f"{GROUP}.weights.symmetric", False, 8), UnsupportedModel, "weights.symmetric: expected True, got False"),
    (edited(f"{GROUP}.weights.group_size", 128, 8), UnsupportedModel, "weights.group_size: .* got 128"),
    (edited(f"{GROUP}.input_activations", None, 8), CorruptCheckpoint, "input_activations: expected an object"),
    (edited(f"{GROUP}.input_activations.dynamic", False, 8), UnsupportedModel, "dynamic: expected True, got False"),
    (edited(f"{GROUP}.input_activations.strategy", "tensor", 8), UnsupportedModel, "strategy: .* got 'tensor'"),
    (edited(f"{GROUP}.input_activations.symmetric", False, 8), UnsupportedModel, "symmetric: .* got False"),
    (edited(f"{GROUP}.input_activations.num_bits", 4, 8), UnsupportedModel, "num_bits: expected 8, got 4"),
]  # fmt: skip


@pytest.mark.parametrize(("values", "error", "said"), REFUSED)
def test_refusals_name_the_key_and_the_value(values: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said) as caught:
        parse_quantization_config(values)
    assert len(str(caught.value)) < 300


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)
PATHS = [f"{GROUP}.{key}" for key in ("targets", "weights", "format", "input_activations", "weights.num_bits")]
PATHS += [f"{GROUP}.weights.{key}" for key in ("strategy", "group_size", "actorder", "symmetric", "dynamic")]
PATHS += ["format", "config_groups", "ignore", "sparsity_config", "kv_cache_scheme", "quant_method"]


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(PATHS), JSON, st.sampled_from([4, 8]))
def test_any_json_is_understood_or_refused_by_a_typed_error(path: str, value: Any, bits: int) -> None:
    with contextlib.suppress(CorruptCheckpoint, UnsupportedModel):
        parse_quantization_config(edited(path, value, bits))


# Which scheme a layer has -------------------------------------------------------------------------------------------


def test_targets_decide_as_in_compressed_tensors() -> None:
    cases = json.loads((FIXTURES / "compressed_packers" / "targets.json").read_text())
    decided = set()
    for case in cases:
        groups = tuple(SchemeGroup((text,), Scheme(4, 2 + i, False)) for i, text in enumerate(case["targets"]))
        config = compressed_config(groups, dense=tuple(case["ignore"]))
        by_target = {group.targets[0]: group.scheme for group in groups}
        for name, target in case["decides"].items():
            assert config.scheme(name) == (by_target[target] if target else None), (name, case)
            decided.add(target)
    assert None in decided
    assert len(decided) > 8


def test_a_scheme_that_is_alone_in_its_width_needs_no_name() -> None:
    config = EXPECTED["mixed_llava_next"]
    assert config.scheme_for("anything.at.all", 8) == W8
    assert config.scheme_for("lm_head", 4) == W4
    for name in ("model.language_model.layers.0.mlp.up_proj", "language_model.model.layers.0.mlp.up_proj"):
        assert config.scheme(name) == W4


def test_two_schemes_of_a_width_need_names() -> None:
    fine = Scheme(4, 16, False)
    config = compressed_config((SchemeGroup(("re:.*mlp.*",), W4), SchemeGroup(("re:.*self_attn.*",), fine)))
    assert config.scheme_for("model.layers.0.mlp.up_proj", 4) == W4
    assert config.scheme_for("model.layers.0.self_attn.q_proj", 4) == fine
    with pytest.raises(CorruptCheckpoint, match=r"layer lm_head: .* 2 schemes of that width and names none"):
        config.scheme_for("lm_head", 4)


@pytest.mark.parametrize("scheme", [(8, 128, True), (8, None, False), (4, 1, True), (4, 10**9, True)])
def test_schemes_that_do_not_exist(scheme: tuple[Any, int | None, bool]) -> None:
    with pytest.raises(ValueError, match="expected a"):
        Scheme(*scheme)


def test_a_config_is_a_value() -> None:
    assert EXPECTED["w8a8"] == compressed_config((SchemeGroup(LINEAR, W8),), dense=("lm_head",))
    assert hash(EXPECTED["w8a8"]) == hash(parse_quantization_config(written_by_tool("w8a8")))
    assert isinstance(EXPECTED["w8a8"], QuantizationConfig)
