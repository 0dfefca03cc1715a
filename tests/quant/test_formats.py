"""Quantised formats against the tools that publish them: their files, their packers, and what no file may do.

The files under `fixtures/quant` were made by AutoAWQ and llm-compressor (`oracles/build_fixtures.py`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from sparsevila.errors import CorruptCheckpoint, SparseVILAError, UnsupportedModel
from sparsevila.quant.awq_format import layout_of, padded_groups, read_awq, write_awq_gemm
from sparsevila.quant.compressed_format import (
    read_int_quantized,
    read_pack_quantized,
    write_int_quantized,
    write_pack_quantized,
)
from sparsevila.quant.formats import by_layer, check_layer, detect, read_layer
from sparsevila.quant.quantization_config import (
    QuantizationConfig,
    Scheme,
    SchemeGroup,
    awq_config,
    compressed_config,
    parse_quantization_config,
)
from sparsevila.quant.scheme import Int4Weight, Int8Weight, pack_nibbles, unpack_nibbles
from sparsevila.quant.stored_layer import StoredLayer

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "quant"
CHECKPOINTS = ("awq_llama", "awq_llava_next", "w4a16_asymmetric", "w4a16_symmetric", "w8a8", "mixed_llava_next")
AWQ_SUFFIXES = ("qweight", "qzeros", "scales")
GEMM_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def layers_of(name: str) -> Iterator[StoredLayer]:
    """Every layer of a fixture, dense ones included."""
    tensors = by_layer(load_file(FIXTURES / name / "model.safetensors"))
    yield from (StoredLayer(layer, found) for layer, found in tensors.items())


def config_of(name: str) -> QuantizationConfig:
    return parse_quantization_config(json.loads((FIXTURES / name / "config.json").read_text())["quantization_config"])


def packed(tool: str) -> dict[str, dict[str, torch.Tensor]]:
    """What a packer made: "NxKgG" -> name -> tensor."""
    cases: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in load_file(FIXTURES / f"{tool}_packers" / "packers.safetensors").items():
        case, _, rest = name.partition(".")
        cases.setdefault(case, {})[rest] = tensor
    return cases


def sizes(case: str) -> tuple[int, int, int]:
    """N, K and group size."""
    N, K, g = (int(part) for part in case.replace("x", " ").replace("g", " ").split())
    return N, K, g


def random_int4(N: int, K: int, g: int, seed: int, dtype: torch.dtype = torch.float16) -> Int4Weight:
    rng = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (N, K), generator=rng)
    zeros = torch.randint(0, 16, (N, K // g), generator=rng, dtype=torch.uint8)
    scales = (torch.rand(N, K // g, generator=rng) + 0.01).to(dtype)
    return Int4Weight(pack_nibbles(codes), scales, zeros, K, g)


def same_int4(a: Int4Weight, b: Int4Weight) -> bool:
    return (
        torch.equal(a.codes, b.codes)
        and torch.equal(a.zeros, b.zeros)
        and torch.equal(a.scales, b.scales)
        and a.scales.dtype == b.scales.dtype
        and (a.in_features, a.group_size) == (b.in_features, b.group_size)
    )


# The tools' files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_matrix_is_the_one_its_tool_sees(name: str) -> None:
    expected = load_file(FIXTURES / name / "dequantised.safetensors")
    config = config_of(name)
    layers = {layer.name: layer for layer in layers_of(name)}
    assert len(expected) >= 4
    for layer, matrix in expected.items():
        N, K = matrix.shape
        got = read_layer(layers[layer], (N, K), config).dequantise(matrix.dtype)
        assert torch.equal(got, matrix), layer


@pytest.mark.parametrize("name", ["awq_llama", "awq_llava_next"])
def test_autoawq_computes_the_same_outputs(name: str) -> None:
    recorded = by_layer(load_file(FIXTURES / name / "forward.safetensors"))
    quantised = {layer.name: layer for layer in layers_of(name) if detect(layer) != "dense"}
    assert quantised.keys() == recorded.keys()
    assert len(recorded) == 14
    for layer, tensors in recorded.items():
        x, y = tensors["x"].float(), tensors["y"].float()
        got = x @ read_layer(quantised[layer], (y.shape[1], x.shape[1]), config_of(name)).dequantise().t()
        assert (got - y).abs().max() <= 1e-3 * y.abs().max(), layer


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("awq_llama", {"awq_gemm": 14}),
        ("awq_llava_next", {"awq_gemm": 14}),
        ("w4a16_asymmetric", {"pack_quantized": 14}),
        ("w4a16_symmetric", {"pack_quantized": 14}),
        ("w8a8", {"int_quantized": 14}),
        ("mixed_llava_next", {"pack_quantized": 14, "int_quantized": 18}),
    ],
)
def test_formats_are_found_layer_by_layer(name: str, expected: dict[str, int]) -> None:
    found: dict[str, int] = {}
    for layer in layers_of(name):
        form = detect(layer)
        found[form] = found.get(form, 0) + 1
        is_projection = layer.name.endswith("_proj") or layer.name.endswith((".fc1", ".fc2"))
        in_tower = "vision_tower" in layer.name
        assert (form != "dense") == (is_projection and not (in_tower and name == "awq_llava_next")), layer.name
    assert found.pop("dense") > 3
    assert found == expected


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_what_was_read_is_written_with_the_same_bits(name: str) -> None:
    config = config_of(name)
    for layer in layers_of(name):
        form = detect(layer)
        if form == "dense":
            continue
        stored = {suffix: tensor for suffix, tensor in layer.tensors.items() if suffix != "bias"}
        N, K = shape_of(form, stored)
        weight = read_layer(layer, (N, K), config)
        assert write_like(form, weight, symmetric=name == "w4a16_symmetric").keys() == stored.keys()
        for suffix, tensor in write_like(form, weight, symmetric=name == "w4a16_symmetric").items():
            assert tensor.dtype == stored[suffix].dtype
            assert torch.equal(tensor, stored[suffix]), (layer.name, suffix)


def shape_of(form: str, stored: dict[str, torch.Tensor]) -> tuple[int, int]:
    if form == "awq_gemm":
        return stored["scales"].shape[1], stored["qweight"].shape[0]
    if form == "pack_quantized":
        N, K = stored["weight_shape"].tolist()
        return N, K
    return stored["weight"].shape[0], stored["weight"].shape[1]


def write_like(form: str, weight: Int4Weight | Int8Weight, *, symmetric: bool) -> dict[str, torch.Tensor]:
    if isinstance(weight, Int8Weight):
        return write_int_quantized(weight)
    return write_awq_gemm(weight) if form == "awq_gemm" else write_pack_quantized(weight, symmetric=symmetric)


# The tools' packers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gemm", "gemv", "gemv_fast"])
@pytest.mark.parametrize("case", packed("awq"))
def test_integers_that_autoawq_packed_come_back(case: str, kind: str) -> None:
    tensors, (N, K, g) = packed("awq")[case], sizes(case)
    layer = StoredLayer("layer", {suffix: tensors[f"{kind}.{suffix}"] for suffix in AWQ_SUFFIXES})
    assert layout_of(layer) == kind
    weight = read_awq(layer, (N, K), g)
    assert torch.equal(unpack_nibbles(weight.codes, K), tensors["codes"])
    assert torch.equal(weight.zeros, tensors["zeros"])
    assert torch.equal(weight.scales, tensors["group_scales"])


@pytest.mark.parametrize("case", packed("awq"))
def test_our_gemm_packer_is_autoawqs_bit_for_bit(case: str) -> None:
    tensors, (_, K, g) = packed("awq")[case], sizes(case)
    ours = write_awq_gemm(Int4Weight(pack_nibbles(tensors["codes"]), tensors["group_scales"], tensors["zeros"], K, g))
    assert tuple(ours) == AWQ_SUFFIXES
    for suffix, tensor in ours.items():
        assert tensor.is_contiguous()
        assert tensor.dtype == tensors[f"gemm.{suffix}"].dtype
        assert torch.equal(tensor, tensors[f"gemm.{suffix}"]), suffix


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("case", packed("compressed"))
def test_pack_quantized_is_compressed_tensors_bit_for_bit(case: str, symmetric: bool) -> None:
    (N, K, g), kind = sizes(case), "symmetric" if symmetric else "asymmetric"
    tensors = by_layer(packed("compressed")[case])[kind]
    zeros = (tensors["zeros"] + 8).to(torch.uint8)
    ours = Int4Weight(pack_nibbles(tensors["codes"] + 8), tensors["weight_scale"], zeros, K, g)
    stored = {name: tensor for name, tensor in tensors.items() if name.startswith("weight_")}
    written = write_pack_quantized(ours, symmetric=symmetric)
    assert written.keys() == stored.keys()
    for suffix, tensor in written.items():
        assert tensor.is_contiguous()
        assert tensor.dtype == stored[suffix].dtype
        assert torch.equal(tensor, stored[suffix]), suffix
    read = read_pack_quantized(StoredLayer("layer", stored), (N, K), g, symmetric=symmetric)
    assert same_int4(read, ours)
    assert torch.equal(read.dequantise(torch.bfloat16), tensors["dequantised"])


@pytest.mark.parametrize("case", packed("compressed"))
def test_int_quantized_is_compressed_tensors_bit_for_bit(case: str) -> None:
    N, K, _ = sizes(case)
    tensors = by_layer(packed("compressed")[case])["int8"]
    stored = {"weight": tensors["weight"], "weight_scale": tensors["weight_scale"]}
    assert torch.equal(tensors["weight"], tensors["codes"])
    read = read_int_quantized(StoredLayer("layer", stored), (N, K))
    assert torch.equal(read.dequantise(torch.bfloat16), tensors["dequantised"])
    written = write_int_quantized(read)
    assert written.keys() == stored.keys()
    assert all(torch.equal(written[suffix], stored[suffix]) for suffix in stored)


# Literal words ------------------------------------------------------------------------------------------------------


def test_a_word_of_gemm() -> None:
    weight = Int4Weight(
        pack_nibbles(torch.arange(8)[:, None].expand(8, 2)),
        torch.ones(8, 1, dtype=torch.float16),
        torch.arange(8, dtype=torch.uint8)[:, None],
        in_features=2,
        group_size=2,
    )
    tensors = write_awq_gemm(weight)
    assert tensors["qweight"].tolist() == [[0x75316420], [0x75316420]]
    assert tensors["qzeros"].tolist() == [[0x75316420]]
    assert same_int4(read_awq(StoredLayer("layer", tensors), (8, 2), 2), weight)


def test_a_word_of_pack_quantized() -> None:
    scales = torch.ones(8, 1)
    weight = Int4Weight(
        pack_nibbles(torch.arange(8).expand(8, 8)), scales, torch.arange(8).to(torch.uint8)[:, None], 8, 8
    )
    tensors = write_pack_quantized(weight)
    assert tensors["weight_packed"].tolist() == [[0x76543210]] * 8
    assert tensors["weight_zero_point"].tolist() == [[0x76543210]]  # along the rows
    assert tensors["weight_shape"].tolist() == [8, 8]


def test_a_word_of_gemv() -> None:
    tensors = {
        "qweight": torch.tensor([[0x76543210] * 4]),
        "qzeros": torch.tensor([[0x0000000A, 0, 0, 0]]),
        "scales": torch.tensor([[0.5] + [0.0] * 31]).half(),
    }
    tensors = {name: t.to(torch.int32) if name != "scales" else t for name, t in tensors.items()}
    weight = read_awq(StoredLayer("layer", tensors), (1, 32), 32)
    assert unpack_nibbles(weight.codes, 32).tolist() == [list(range(8)) * 4]
    assert weight.zeros.tolist() == [[10]]


def test_a_word_of_gemv_fast() -> None:
    qweight = torch.zeros(1, 64, dtype=torch.int16)
    qweight[0, 3] = 0x4321  # row 0: columns 3, 11, 19, 27
    qweight[0, 16 * 2 + 8 + 5] = -0x789B  # 0x8765 in row 2: columns 37, 45, 53, 61
    products = torch.zeros(16, 4, dtype=torch.float16)
    scales = torch.zeros(16, 4, dtype=torch.float16)
    scales[0] = 0.5
    products[0] = torch.tensor([0.0, -0.5, -4.0, -7.5])
    tensors = {"qweight": qweight, "qzeros": products, "scales": scales}
    weight = read_awq(StoredLayer("layer", tensors), (4, 64), 64)
    codes = torch.zeros(4, 64, dtype=torch.uint8)
    codes[0, 3::8][:4] = torch.tensor([1, 2, 3, 4])
    codes[2, 37::8] = torch.tensor([5, 6, 7, 8])
    assert torch.equal(unpack_nibbles(weight.codes, 64), codes)
    assert weight.zeros.tolist() == [[0], [1], [8], [15]]


# Round trips over sizes ---------------------------------------------------------------------------------------------

SIZES = st.tuples(st.integers(1, 20), st.integers(1, 7), st.integers(1, 40), st.integers(0, 2**32))


@settings(max_examples=60, deadline=None)
@given(SIZES, st.sampled_from([torch.float16, torch.bfloat16, torch.float32]))
@example((269, 9, 19, 0), torch.bfloat16)  # 4304 / 16 rows, 3420 / 20 columns: nothing divides by 8
def test_pack_quantized_comes_back_whatever_the_sizes(case: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    N, groups, g, seed = case
    weight = random_int4(N, groups * g, g, seed, dtype)
    tensors = write_pack_quantized(weight)
    assert tensors["weight_packed"].shape == (N, -(-groups * g // 8))
    assert tensors["weight_zero_point"].shape == (-(-N // 8), groups)
    assert same_int4(read_pack_quantized(StoredLayer("layer", tensors), (N, groups * g), g, symmetric=False), weight)


@settings(max_examples=60, deadline=None)
@given(SIZES)
@example((5, 3, 19, 0))
def test_gemm_comes_back_whatever_the_sizes(case: tuple[int, int, int, int]) -> None:
    words, groups, g, seed = case
    g += 1
    N, K = 8 * words, groups * g
    weight = random_int4(N, K, g, seed)
    tensors = write_awq_gemm(weight)
    codes = unpack_nibbles(weight.codes, K)
    n, k = seed % N, seed % K
    word, nibble = int(tensors["qweight"][k, n // 8]), GEMM_ORDER.index(n % 8)
    assert word >> 4 * nibble & 15 == codes[n, k]
    assert same_int4(read_awq(StoredLayer("layer", tensors), (N, K), g, layout="gemm"), weight)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(1, 4), st.sampled_from([32, 64]), st.integers(0, 2**32))
def test_gemv_fast_is_its_closed_form(fours: int, blocks: int, g: int, seed: int) -> None:
    N, K = 4 * fours, 64 * blocks
    rng = torch.Generator().manual_seed(seed)
    qweight = torch.randint(-(2**15), 2**15, (N // 4, K), generator=rng, dtype=torch.int16)
    scales = torch.rand(padded_groups(K, g), N, generator=rng).half() + 0.01
    tensors = {"qweight": qweight, "qzeros": -3 * scales, "scales": scales}
    weight = read_awq(StoredLayer("layer", tensors), (N, K), g)
    codes = unpack_nibbles(weight.codes, K)
    n, k = seed % N, seed // 7 % K
    b, c, i, m = k // 64, k % 64 // 32, k % 32 // 8, k % 8
    assert int(codes[n, k]) == int(qweight[n // 4, 64 * b + 16 * (n % 4) + 8 * c + m]) >> 4 * i & 15
    assert (weight.zeros == 3).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.integers(1, 40), st.integers(0, 2**32))
def test_int_quantized_comes_back_whatever_the_sizes(N: int, K: int, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    codes = torch.randint(-128, 128, (N, K), generator=rng, dtype=torch.int8)
    weight = Int8Weight(codes, torch.rand(N, generator=rng) + 0.1)
    read = read_int_quantized(StoredLayer("layer", write_int_quantized(weight)), (N, K))
    assert torch.equal(read.codes, weight.codes)
    assert torch.equal(read.scales, weight.scales)


def test_nothing_of_a_file_is_left_behind_the_last_code() -> None:
    weight = random_int4(2, 7, 7, 0)
    tensors = write_pack_quantized(weight)
    tensors["weight_packed"] |= -(1 << 28)  # the nibble that no code has
    before = tensors["weight_packed"].clone()
    assert same_int4(read_pack_quantized(StoredLayer("layer", tensors), (2, 7), 7, symmetric=False), weight)
    assert torch.equal(tensors["weight_packed"], before)


@pytest.mark.parametrize(
    ("write", "weight", "said"),
    [
        (write_awq_gemm, lambda: random_int4(12, 8, 8, 0), "rows in eights"),
        (write_awq_gemm, lambda: random_int4(8, 8, 8, 0, torch.bfloat16), "float16 scales, got torch.bfloat16"),
        (write_awq_gemm, lambda: ragged(), "whole groups"),
        (write_pack_quantized, lambda: ragged(), "whole groups"),
        (lambda w: write_pack_quantized(w, symmetric=True), lambda: random_int4(8, 8, 8, 0), "zero point of 8"),
    ],
)
def test_writers_refuse_what_a_format_cannot_hold(
    write: Callable[[Int4Weight], Any], weight: Callable[[], Int4Weight], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        write(weight())


def ragged() -> Int4Weight:
    """A last group that is shorter than the others."""
    zeros = torch.full((8, 2), 8, dtype=torch.uint8)
    return Int4Weight(torch.zeros(8, 5, dtype=torch.uint8), torch.ones(8, 2).half(), zeros, 10, 8)


# Which layout a square matrix is in ---------------------------------------------------------------------------------


def test_a_square_matrix_is_told_by_its_scales() -> None:
    tensors = packed("awq")["128x128g64"]
    gemm, gemv = ({suffix: tensors[f"{kind}.{suffix}"] for suffix in AWQ_SUFFIXES} for kind in ("gemm", "gemv"))
    assert gemm["qweight"].shape == gemv["qweight"].shape
    for stored, form, other in ((gemm, "gemm", "gemv"), (gemv, "gemv", "gemm")):
        layer = StoredLayer("model.q_proj", stored)
        assert detect(layer) == f"awq_{form}"
        config = QuantizationConfig("awq", awq_config(64).groups, layout=None)
        weight = read_layer(layer, (128, 128), config)
        assert isinstance(weight, Int4Weight)
        assert torch.equal(unpack_nibbles(weight.codes, 128), tensors["codes"])
        contradicting = parse_quantization_config({**awq_config(64).to_dict(), "version": other})
        with pytest.raises(CorruptCheckpoint, match=f"q_proj: .* layout {form}, quantization_config says {other}"):
            read_layer(layer, (128, 128), contradicting)


# What no file may do ------------------------------------------------------------------------------------------------

SHAPE = (16, 64)
Change = Callable[[dict[str, torch.Tensor]], object]


def example_layer(form: str) -> tuple[dict[str, torch.Tensor], QuantizationConfig]:
    """A sound layer of 16 x 64 with groups of 32."""
    linear = ("Linear",)
    if form == "gemm":
        return write_awq_gemm(random_int4(*SHAPE, 32, 1)), awq_config(32)
    if form in ("gemv", "gemv_fast"):
        codes = torch.zeros(16, 8, dtype=torch.int32) if form == "gemv" else torch.zeros(4, 64, dtype=torch.int16)
        padded = padded_groups(64, 32)
        assert padded == 32
        scales = torch.ones((16, padded) if form == "gemv" else (padded, 16), dtype=torch.float16)
        zeros = torch.zeros(16, padded // 8, dtype=torch.int32) if form == "gemv" else -8 * scales
        return {"qweight": codes, "qzeros": zeros, "scales": scales}, QuantizationConfig("awq", awq_config(32).groups)
    if form == "int_quantized":
        weight = Int8Weight(torch.ones(SHAPE, dtype=torch.int8), torch.ones(16))
        return write_int_quantized(weight), compressed_config((SchemeGroup(linear, Scheme(8, None, True)),))
    symmetric = form == "symmetric"
    config = compressed_config((SchemeGroup(linear, Scheme(4, 32, symmetric)),))
    value = random_int4(*SHAPE, 32, 1)
    zeros = torch.full_like(value.zeros, 8) if symmetric else value.zeros
    return write_pack_quantized(Int4Weight(value.codes, value.scales, zeros, 64, 32), symmetric=symmetric), config


FORMS = ("gemm", "gemv", "gemv_fast", "asymmetric", "symmetric", "int_quantized")


@pytest.mark.parametrize("form", FORMS)
def test_the_sound_layer_is_read_and_its_headers_suffice_for_the_check(form: str) -> None:
    tensors, config = example_layer(form)
    tensors["bias"] = torch.zeros(16)
    weight = read_layer(StoredLayer("model.q_proj", tensors), SHAPE, config)
    assert (weight.out_features, weight.in_features) == SHAPE
    on_meta = {suffix: tensor.to("meta") for suffix, tensor in tensors.items()}
    assert check_layer(StoredLayer("model.q_proj", on_meta), SHAPE, config) == config.groups[0].scheme


def set_(suffix: str, value: torch.Tensor) -> Change:
    return lambda tensors: tensors.update({suffix: value})


def drop(suffix: str) -> Change:
    return lambda tensors: tensors.pop(suffix)


def first(suffix: str, value: float) -> Change:
    """Overwrites one value."""
    return lambda tensors: tensors[suffix].view(-1)[:1].fill_(value)


# form, change, error, the tensor, a word of the reason, whether the headers alone show it
REFUSED: list[tuple[str, Change, type[SparseVILAError], str, str, bool]] = [
    ("gemm", drop("qzeros"), CorruptCheckpoint, "qzeros", "missing; the layer has qweight, scales", True),
    ("gemm", drop("scales"), CorruptCheckpoint, "scales", "missing", True),
    ("gemm", set_("qweight", torch.zeros(64, 3, dtype=torch.int32)), CorruptCheckpoint, "qweight",
     r"expected shape \(64, 2\), got \(64, 3\)", True),
    ("gemm", set_("qweight", torch.zeros(64, 2)), CorruptCheckpoint, "qweight", "expected int32, got float32", True),
    ("gemm", set_("qweight", torch.zeros((), dtype=torch.int32)), CorruptCheckpoint, "qweight", "shape", True),
    ("gemm", set_("qweight", torch.zeros(64, 2, 1, dtype=torch.int32)), CorruptCheckpoint, "qweight", "shape", True),
    ("gemm", set_("qweight", torch.zeros(0, 2, dtype=torch.int32)), CorruptCheckpoint, "qweight", "shape", True),
    ("gemm", set_("qzeros", torch.zeros(1, 2, dtype=torch.int32)), CorruptCheckpoint, "qzeros", "shape", True),
    ("gemm", set_("scales", torch.ones(2, 16)), CorruptCheckpoint, "scales", "expected float16, got float32", True),
    ("gemm", set_("scales", torch.ones(4, 16).half()), CorruptCheckpoint, "scales", r"expected shape \(2, 16\)", True),
    ("gemm", set_("g_idx", torch.zeros(64, dtype=torch.int32)), UnsupportedModel, "g_idx", "reordered", True),
    ("gemm", set_("extra", torch.zeros(1)), CorruptCheckpoint, "extra", "does not belong beside qweight", True),
    ("gemm", set_("weight", torch.zeros(SHAPE)), CorruptCheckpoint, "qweight", "two formats at once", True),
    ("gemm", first("scales", float("nan")), CorruptCheckpoint, "scales", "not a finite number", False),
    ("gemm", first("scales", float("inf")), CorruptCheckpoint, "scales", "not a finite number", False),
    ("gemm", first("scales", 0), CorruptCheckpoint, "scales", "scale of 0", False),
    ("gemv", set_("scales", torch.ones(16, 16).half()), CorruptCheckpoint, "scales", r"shape \(16, 32\)", True),
    ("gemv", set_("qzeros", torch.zeros(16, 1, dtype=torch.int32)), CorruptCheckpoint, "qzeros", "shape", True),
    ("gemv", first("scales", 0), CorruptCheckpoint, "scales", "scale of 0", False),
    ("gemv_fast", set_("qzeros", torch.zeros(32, 2, dtype=torch.int32)), CorruptCheckpoint, "qzeros", "int32", True),
    ("gemv_fast", first("qzeros", -16), CorruptCheckpoint, "qzeros", "0 to 15", False),
    ("gemv_fast", first("qzeros", 1), CorruptCheckpoint, "qzeros", "0 to 15", False),
    ("gemv_fast", first("qzeros", -2.5), CorruptCheckpoint, "qzeros", "0 to 15", False),
    ("gemv_fast", first("qzeros", float("nan")), CorruptCheckpoint, "qzeros", "0 to 15", False),
    ("gemv_fast", first("scales", 0), CorruptCheckpoint, "qzeros", "0 to 15", False),
    ("asymmetric", drop("weight_zero_point"), CorruptCheckpoint, "weight_zero_point", "missing", True),
    ("asymmetric", drop("weight_scale"), CorruptCheckpoint, "weight_scale", "missing", True),
    ("asymmetric", drop("weight_shape"), CorruptCheckpoint, "weight_shape", "missing", True),
    ("asymmetric", set_("weight_packed", torch.zeros(16, 9, dtype=torch.int32)), CorruptCheckpoint, "weight_packed",
     r"expected shape \(16, 8\), got \(16, 9\)", True),
    ("asymmetric", set_("weight_packed", torch.zeros(16, 64, dtype=torch.int8)), CorruptCheckpoint, "weight_packed",
     "expected int32, got int8", True),
    ("asymmetric", set_("weight_zero_point", torch.zeros(16, 2, dtype=torch.int8)), CorruptCheckpoint,
     "weight_zero_point", "expected int32, got int8", True),
    ("asymmetric", set_("weight_zero_point", torch.zeros(16, 2, dtype=torch.int32)), CorruptCheckpoint,
     "weight_zero_point", r"expected shape \(2, 2\)", True),
    ("asymmetric", set_("weight_scale", torch.ones(16, 1)), CorruptCheckpoint, "weight_scale", "shape", True),
    ("asymmetric", set_("weight_scale", torch.ones(16, 2, dtype=torch.float8_e4m3fn)), CorruptCheckpoint,
     "weight_scale", "got float8_e4m3fn", True),
    ("asymmetric", set_("weight_shape", torch.tensor([2**62, 2**62])), CorruptCheckpoint, "weight_shape",
     r"expected \(16, 64\), got \(4611686018427387904, ", False),
    ("asymmetric", set_("weight_shape", torch.tensor([16, 63])), CorruptCheckpoint, "weight_shape", "63", False),
    ("asymmetric", set_("weight_shape", torch.tensor([16, -64])), CorruptCheckpoint, "weight_shape", "-64", False),
    ("asymmetric", set_("weight_shape", torch.ones(2)), CorruptCheckpoint, "weight_shape", "float32", True),
    ("asymmetric", set_("weight_g_idx", torch.zeros(64)), UnsupportedModel, "weight_g_idx", "reordered", True),
    ("asymmetric", first("weight_scale", float("nan")), CorruptCheckpoint, "weight_scale", "finite", False),
    ("symmetric", set_("weight_zero_point", torch.zeros(2, 2, dtype=torch.int32)), CorruptCheckpoint,
     "weight_zero_point", "symmetric", True),
    ("symmetric", first("weight_scale", 0), CorruptCheckpoint, "weight_scale", "scale of 0", False),
    ("int_quantized", set_("weight", torch.zeros(16, 64)), CorruptCheckpoint, "weight", "expected int8, got", True),
    ("int_quantized", set_("weight", torch.zeros(16, 9, dtype=torch.int8)), CorruptCheckpoint, "weight", "shape", True),
    ("int_quantized", drop("weight_scale"), CorruptCheckpoint, "weight_scale", "missing", True),
    ("int_quantized", set_("weight_scale", torch.ones(1)), CorruptCheckpoint, "weight_scale", r"\(16, 1\)", True),
    ("int_quantized", set_("weight_scale", torch.ones(16, 2)), CorruptCheckpoint, "weight_scale", r"\(16, 1\)", True),
    ("int_quantized", set_("weight_zero_point", torch.zeros(16, 1, dtype=torch.int8)), UnsupportedModel,
     "weight_zero_point", "zero point of 8-bit", True),
    ("int_quantized", set_("input_scale", torch.ones(1)), UnsupportedModel, "input_scale", "static scale", True),
    ("int_quantized", set_("bitmask", torch.ones(1)), UnsupportedModel, "bitmask", "sparse", True),
    ("int_quantized", first("weight_scale", float("inf")), CorruptCheckpoint, "weight_scale", "finite", False),
]  # fmt: skip


@pytest.mark.parametrize(("form", "change", "error", "tensor", "said", "by_header"), REFUSED)
def test_a_damaged_layer_is_refused_by_name_before_anything_is_made_of_it(
    form: str, change: Change, error: type[SparseVILAError], tensor: str, said: str, by_header: bool
) -> None:
    tensors, config = example_layer(form)
    change(tensors)
    layer = StoredLayer("model.layers.3.q_proj", tensors)
    with pytest.raises(error, match=rf"tensor model\.layers\.3\.q_proj\.{tensor}: .*{said}"):
        read_layer(layer, SHAPE, config)
    on_meta = StoredLayer(layer.name, {suffix: value.to("meta") for suffix, value in tensors.items()})
    if by_header:
        with pytest.raises(error, match=said), Allocations() as made:
            check_layer(on_meta, SHAPE, config)
        assert made.total_bytes == 0
    else:
        check_layer(on_meta, SHAPE, config)


def test_every_format_has_refusals() -> None:
    assert {row[0] for row in REFUSED} == set(FORMS)


@pytest.mark.parametrize("form", [form for form in FORMS if form != "gemv_fast"])
def test_the_scan_of_the_scales_can_be_left_out(form: str) -> None:
    tensors, config = example_layer(form)
    first("weight_scale" if "weight_scale" in tensors else "scales", float("nan"))(tensors)
    layer = StoredLayer("q_proj", tensors)
    assert torch.isnan(read_layer(layer, SHAPE, config, verify=False).scales).sum() == 1
    with pytest.raises(CorruptCheckpoint):
        read_layer(layer, SHAPE, config)


@pytest.mark.parametrize(
    ("form", "shape", "group_size", "said"),
    [
        ("gemm", (16, 72), 32, "q_proj: a group size of 32 does not divide its 72 inputs"),
        ("gemm", (12, 64), 32, "qweight: the layout gemm cannot hold a matrix of 12 x 64"),
        ("gemv_fast", (16, 96), 32, "qweight: the layout gemv_fast cannot hold a matrix of 16 x 96"),
        ("asymmetric", (16, 16), 32, "a group size of 32 does not divide its 16 inputs"),
    ],
)
def test_a_matrix_that_does_not_fit_its_format(form: str, shape: tuple[int, int], group_size: int, said: str) -> None:
    tensors, config = example_layer(form)
    assert config.groups[0].scheme.group_size == group_size
    with pytest.raises(CorruptCheckpoint, match=said):
        check_layer(StoredLayer("model.q_proj", tensors), shape, config)


def test_tensors_and_config_of_different_tools() -> None:
    awq, awq_says = example_layer("gemm")
    compressed, compressed_says = example_layer("int_quantized")
    with pytest.raises(CorruptCheckpoint, match="up: its tensors are awq_gemm, quantization_config says compressed"):
        check_layer(StoredLayer("up", awq), SHAPE, compressed_says)
    with pytest.raises(CorruptCheckpoint, match="up: its tensors are int_quantized, quantization_config says awq"):
        check_layer(StoredLayer("up", compressed), SHAPE, awq_says)
    with pytest.raises(CorruptCheckpoint, match="up: expected a quantised layer, got weight"):
        check_layer(StoredLayer("up", {"weight": torch.zeros(SHAPE)}), SHAPE, awq_says)
    only_four = compressed_config((SchemeGroup(("Linear",), Scheme(4, 32, True)),))
    with pytest.raises(CorruptCheckpoint, match="up: the file holds 8-bit weights, quantization_config has 0 schemes"):
        check_layer(StoredLayer("up", compressed), SHAPE, only_four)


def test_a_channel_scheme_is_one_group_per_row() -> None:
    weight = random_int4(13, 37, 37, 5, torch.bfloat16)
    config = compressed_config((SchemeGroup(("Linear",), Scheme(4, None, False)),))
    read = read_layer(StoredLayer("up", write_pack_quantized(weight)), (13, 37), config)
    assert isinstance(read, Int4Weight)
    assert same_int4(read, weight)


# Memory -------------------------------------------------------------------------------------------------------------


class Allocations(TorchDispatchMode):
    """Adds up the bytes of every tensor that an operation makes in memory of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.total_bytes = 0
        self._seen: set[int] = set()
        self._kept: list[torch.Tensor] = []  # so that no address is used twice

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self._seen | inputs:
                    self._seen.add(storage.data_ptr())
                    self._kept.append(tensor)
                    self.total_bytes += storage.nbytes()
        return result


@pytest.mark.parametrize(("form", "factor"), [("gemm", 5), ("gemv", 1), ("gemv_fast", 6), ("pack", 1), ("int8", 1)])
def test_reading_allocates_a_fixed_multiple_of_the_layer(form: str, factor: float) -> None:
    N, K, g = 256, 1024, 128
    weight = random_int4(N, K, g, 0)
    if form == "int8":
        tensors = write_int_quantized(Int8Weight(torch.ones(N, K, dtype=torch.int8), torch.ones(N)))
    elif form == "pack":
        tensors = write_pack_quantized(weight)
    elif form == "gemm":
        tensors = write_awq_gemm(weight)
    else:
        rows = (N, padded_groups(K, g))
        scales = torch.ones(rows if form == "gemv" else rows[::-1], dtype=torch.float16)
        words = (
            torch.zeros(N, K // 8, dtype=torch.int32) if form == "gemv" else torch.zeros(N // 4, K, dtype=torch.int16)
        )
        zeros = torch.zeros(N, rows[1] // 8, dtype=torch.int32) if form == "gemv" else torch.zeros_like(scales)
        tensors = {"qweight": words, "qzeros": zeros, "scales": scales}
    layer = StoredLayer("up", tensors)
    stored = sum(tensor.nbytes for tensor in tensors.values())
    with Allocations() as made:
        if form == "int8":
            read_int_quantized(layer, (N, K))
        elif form == "pack":
            read_pack_quantized(layer, (N, K), g, symmetric=False)
        else:
            read_awq(layer, (N, K), g)
    assert made.total_bytes <= factor * stored
