"""Written checkpoints: read back, run, seen by transformers, and whole whatever ends the writer."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import resource
import stat
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.append(str(Path(__file__).resolve().parent / "oracles"))
import interrupted_write
import write_export
from interrupted_write import int4, int8, small_write
from write_export import AFTER, BEFORE, DECODED, LAYOUTS, Source, random_source, write

from sparsevila.engine.runner import Runner, TextSpan, VisualSpan
from sparsevila.engine.sparsity.base import Method
from sparsevila.errors import InvalidRequest, ModelNotFound, UnsupportedModel
from sparsevila.models.checkpoint import Checkpoint
from sparsevila.models.llava_next import rename
from sparsevila.models.registry import load_model
from sparsevila.quant import export
from sparsevila.quant.export import CheckpointWriter, OutputFormat
from sparsevila.quant.formats import by_layer, detect, read_layer
from sparsevila.quant.linear import Linear, LinearLayer, W4A16Linear, W8A8Linear
from sparsevila.quant.quantization_config import Scheme, parse_quantization_config
from sparsevila.quant.scheme import Int4Weight, Int8Weight
from sparsevila.quant.stored_layer import StoredLayer

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "quant" / "exported"
CPU = torch.device("cpu")
LINUX = sys.platform == "linux"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return random_source(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def awq_source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return write_export.awq_source(tmp_path_factory.mktemp("awq"))


def load(folder: Path) -> Any:
    return load_model(Checkpoint.open(folder, tokenizer=False), dtype=torch.float32, device=CPU)


@torch.inference_mode()
def logits(model: Any) -> Tensor:
    """(5, vocab): behind the picture and the prompt, then behind each of four tokens."""
    visual = VisualSpan(model.encode(model.preprocess(write_export.picture())))
    runner = Runner(model)
    cache = runner.new_cache()
    cache.reserve(visual=len(visual), text=40)
    spans = [TextSpan(BEFORE), visual, TextSpan(AFTER)]
    found = [runner.logits(runner.prefill(cache, spans, method=Method()).hidden)]
    return torch.stack(found + [runner.decode(cache, token) for token in DECODED]).float()


def relative(got: Tensor, want: Tensor) -> float:
    assert torch.isfinite(got).all()
    return float((got - want).abs().max() / want.abs().max())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def stored_tensors(folder: Path) -> dict[str, Tensor]:
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


# Reading back -------------------------------------------------------------------------------------------------------


CASES: dict[str, tuple[OutputFormat, dict[str, Any]]] = {
    "mixed": ("compressed-tensors", {}),
    "symmetric": ("compressed-tensors", {"symmetric": True}),
    "4 bits alone": ("compressed-tensors", {"eight_bit": lambda name: False, "scale_dtype": torch.float16}),
    "8 bits alone": ("compressed-tensors", {"eight_bit": lambda name: ".layers." in name or "lm_head" in name}),
    "awq": ("awq", {}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_what_was_written_is_read(case: str, layout: str, source: Source, awq_source: Source, tmp_path: Path) -> None:
    """Every code, scale and zero point bit for bit, every other tensor too, and the model they make."""
    form, changes = CASES[case]
    chosen = replace(awq_source if form == "awq" else source, layout=layout, **changes)
    folder = write(chosen, tmp_path / "out", form)
    config = parse_quantization_config(Checkpoint.open(folder).config["quantization_config"])
    found = by_layer(stored_tensors(folder))
    num_quantised = 0
    for _, dense, quantised in chosen.units():
        for name, tensor in dense.items():
            owner, _, suffix = name.rpartition(".")
            assert torch.equal(found[owner].pop(suffix), tensor)
        for name, weight in quantised.items():
            layer = StoredLayer(name, found.pop(name))
            assert detect(layer) != "dense"
            read = read_layer(layer, (weight.out_features, weight.in_features), config)
            assert_equal(read, weight)
            assert config.scheme(name) == (
                Scheme(8, None, True) if isinstance(weight, Int8Weight) else Scheme(4, 16, chosen.symmetric)
            )
            num_quantised += 1
    assert not any(found.values())
    counts = {"mixed": 25, "symmetric": 25, "4 bits alone": 12, "8 bits alone": 33, "awq": 12}
    assert num_quantised == counts[case]
    model = load(folder)
    is_8_bit = case == "8 bits alone"
    assert isinstance(model.decoder.layers[0].self_attn.o_proj, W8A8Linear if is_8_bit else W4A16Linear)
    assert isinstance(model.decoder.layers[0].mlp.down_proj, W8A8Linear if is_8_bit else Linear)
    assert isinstance(model.decoder.lm_head, W8A8Linear if case not in ("4 bits alone", "awq") else Linear)


def assert_equal(got: Int4Weight | Int8Weight, want: Int4Weight | Int8Weight) -> None:
    assert type(got) is type(want)
    assert torch.equal(got.codes, want.codes)
    assert torch.equal(got.scales, want.scales)
    assert got.scales.dtype == want.scales.dtype
    if isinstance(got, Int4Weight):
        assert isinstance(want, Int4Weight)
        assert torch.equal(got.zeros, want.zeros)
        assert (got.in_features, got.group_size) == (want.in_features, want.group_size)


@pytest.mark.parametrize("case", ["4 bits alone", "awq"])
def test_logits_are_those_of_the_dequantised_model(
    case: str, source: Source, awq_source: Source, tmp_path: Path
) -> None:
    form, changes = CASES[case]
    chosen = replace(awq_source if form == "awq" else source, **changes)
    dense = tmp_path / "dense"
    dense.mkdir()
    tensors: dict[str, Tensor] = {}
    for _, plain, quantised in chosen.units():
        tensors |= plain | {f"{name}.weight": weight.dequantise() for name, weight in quantised.items()}
    save_file(tensors, dense / "model.safetensors")
    (dense / "config.json").write_text(json.dumps(chosen.config()))
    for name, data in chosen.documents().items():
        (dense / name).write_bytes(data)
    got = logits(load(write(chosen, tmp_path / "out", form)))
    assert relative(got, logits(load(dense))) < 1e-4


def test_names_make_no_difference(source: Source, tmp_path: Path) -> None:
    found = [logits(load(write(replace(source, layout=layout), tmp_path / layout))) for layout in LAYOUTS]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


# What transformers sees ---------------------------------------------------------------------------------------------


def module_of(model: Any, stored: str) -> tuple[LinearLayer, slice]:
    """The layer that has a module of transformers, and its rows."""
    renamed = rename(f"{stored}.weight")
    assert renamed is not None
    name = renamed.removesuffix(".weight")
    modules = dict(model.named_modules())
    if name in modules:
        return modules[name], slice(None)
    owner, _, part = name.rpartition(".")
    layer = next(child for child in modules[owner].children() if part in getattr(child, "parts", {}))
    return layer, layer.parts[part]


@pytest.mark.parametrize("name", ["mixed", "awq"])
def test_transformers_quantises_exactly_our_layers(name: str) -> None:
    """By the names of its own modules, which differ from those in the file."""
    seen = json.loads((FIXTURES / f"{name}_oracle" / "modules.json").read_text())
    model = load(FIXTURES / name)
    assert len(seen) == 35  # three layers of 6 in the tower, two of 7 in the decoder, the projector, the head
    checked = 0
    for module, scheme in seen.items():
        if f"layers.{write_export.USED_TOWER_LAYERS}." in module and "vision_tower" in module:
            assert scheme is None  # a layer that we do not even load
            continue
        layer, _ = module_of(model, module)
        want = {Linear: None, W4A16Linear: [4, 16, False], W8A8Linear: [8, None, True]}[type(layer)]
        assert scheme == want, module
        checked += scheme is not None
    assert checked == {"mixed": 25, "awq": 12}[name]


class TheirActivations(nn.Module):
    """A W8A8 layer as compressed-tensors computes it: codes to -128, the largest input at 127.5 steps, not 127."""

    def __init__(self, layer: W8A8Linear) -> None:
        super().__init__()
        assert layer.scales is not None
        # The codes may be packed: one input at a time shows each column, times 127 / 127.
        shown = layer(torch.eye(layer.in_features)) - (0.0 if layer.bias is None else layer.bias)
        self.weight = (shown / layer.scales).round().t().double() * layer.scales.double()[:, None]
        self.bias = None if layer.bias is None else layer.bias.double()
        self.parts = layer.parts

    fused = LinearLayer.fused  # after norm and before activation, by `forward` below

    def forward(self, x: Tensor) -> Tensor:
        scale = x.abs().amax(-1, keepdim=True) / 127.5
        rounded = (x / scale).round().clamp(-128, 127) * scale
        return F.linear(rounded.double(), self.weight, self.bias).float()


def test_a_layer_computes_what_transformers_computes() -> None:
    """4 bits to the rounding of float32. 8 bits to the two roundings of the activations, and to the rounding of
    float32 once the activations are rounded their way, which holds the weights to theirs."""
    answers = load_file(FIXTURES / "mixed_oracle" / "answers.safetensors")
    model = load(FIXTURES / "mixed")
    names = [name.removesuffix(".x") for name in answers if name.endswith(".x")]
    assert len(names) == 25
    for name in names:
        layer, rows = module_of(model, name)
        x, want = answers[f"{name}.x"], answers[f"{name}.y"]
        got = layer(x)[:, rows]
        if isinstance(layer, W4A16Linear):
            assert relative(got, want) < 2e-6, name
            continue
        assert isinstance(layer, W8A8Linear)
        theirs = TheirActivations(layer)
        assert relative(theirs(x)[:, rows], want) < 2e-6, name
        # Half a step each, of 1/127 and of 1/127.5 of the largest input, the second also at the end of its range.
        largest = x.abs().amax(-1, keepdim=True)
        bound = theirs.weight[rows].abs().sum(1) * largest * (0.5 / 127 + 0.5 / 127.5)
        assert bool(((got - want).abs() <= bound * 1.001).all()), name
        assert relative(got, want) > 1e-4  # or this compares nothing


def test_hidden_states_are_those_of_transformers() -> None:
    """Through the decoder alone, all of it in 4 bits or dense."""
    model = load(FIXTURES / "mixed")
    want = load_file(FIXTURES / "mixed_oracle" / "answers.safetensors")["text_hidden"]
    runner = Runner(model)
    cache = runner.new_cache()
    cache.reserve(visual=0, text=40)
    with torch.inference_mode():
        hidden = runner.prefill(cache, [TextSpan((*BEFORE, *AFTER, *DECODED))], method=Method()).hidden
        assert relative(model.decoder.norm(hidden), want[-1]) < 1e-5


def test_logits_are_those_of_transformers() -> None:
    """Of the largest logit they differ by 0.035, of which the step of the activations is all: rounded their way,
    0.0034 is left, one code that a rounding difference has moved. Quantising activations at all moves 0.015 to 0.030.
    """
    inputs = load_file(FIXTURES / "inputs.safetensors")
    want = load_file(FIXTURES / "mixed_oracle" / "answers.safetensors")["logits"]
    model = load(FIXTURES / "mixed")
    assert torch.equal(model.preprocess(write_export.picture()).pixels[None], inputs["pixel_values"])
    assert relative(logits(model), want) < 0.07
    for name, layer in list(model.named_modules()):
        if isinstance(layer, W8A8Linear):
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, TheirActivations(layer))
    assert relative(logits(model), want) < 0.012


def test_layers_and_logits_are_those_of_autoawq() -> None:
    answers = load_file(FIXTURES / "awq_oracle" / "answers.safetensors")
    model = load(FIXTURES / "awq")
    names = [name.removesuffix(".x") for name in answers if name.endswith(".x")]
    assert len(names) == 12
    for name in names:
        layer, rows = module_of(model, name)
        assert relative(layer(answers[f"{name}.x"])[:, rows], answers[f"{name}.y"]) < 2e-3, name  # theirs is float16
    assert relative(logits(model), answers["logits"]) < 1e-2  # the whole model in float16


# The folder ---------------------------------------------------------------------------------------------------------


def test_a_folder_accounts_for_itself(source: Source, tmp_path: Path) -> None:
    old = os.umask(0o077)
    try:
        folder = write(source, tmp_path / "out")
    finally:
        os.umask(old)
    assert not (tmp_path / "out.partial").exists()
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o644 for path in folder.iterdir())
    account = json.loads((folder / "quantization.json").read_text())
    assert account["format_version"] == 1
    assert account["tool"]["name"] == "sparsevila"
    assert account["record"] == {"calibration": "none"}
    assert {name: unit["record"]["layers"] for name, unit in account["units"].items()} == {
        "tower": 12, "decoder": 12, "rest": 1
    }  # fmt: skip
    assert len(account["layers"]) == 25
    assert account["layers"]["language_model.lm_head"] == {
        "scheme": "W8A8", "bits": 8, "group_size": None, "symmetric": True
    }  # fmt: skip
    assert account["layers"]["language_model.model.layers.1.mlp.up_proj"] == {
        "scheme": "W4A16", "bits": 4, "group_size": 16, "symmetric": False
    }  # fmt: skip
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    assert shards == [f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)] == sorted(account["shards"])
    for shard, stated in account["shards"].items():
        data = (folder / shard).read_bytes()
        assert stated == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    tensors = stored_tensors(folder)
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in tensors.values())
    assert index["weight_map"].keys() == tensors.keys()
    with safe_open(folder / account["units"]["decoder"]["shard"], "pt") as file:
        assert file.metadata() == {"format": "pt", "scheme": "W4A16", "bits": "4", "group_size": "16"}
    config = json.loads((folder / "config.json").read_text())
    assert {**config, "quantization_config": None} == {**source.config(), "quantization_config": None}
    for name, data in source.documents().items():
        assert (folder / name).read_bytes() == data


def test_one_unit_makes_one_file(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path / "out", form="compressed-tensors", fingerprint="a")
    writer.add("all", dense={}, quantised={"layers.0.proj": int8()}, record={})
    writer.finish({}, documents={}, record={})
    assert sorted(contents(tmp_path / "out")) == ["config.json", "model.safetensors", "quantization.json"]
    assert len(Checkpoint.open(tmp_path / "out", tokenizer=False).tensors) == 2


def written(folder: Path, quantised: dict[str, Any], form: OutputFormat = "compressed-tensors", **dense: Tensor):
    """The quantization_config of a checkpoint of these layers."""
    writer = CheckpointWriter(folder, form=form, fingerprint="a")
    writer.add("all", dense=dense, quantised=quantised, record={})
    writer.finish({}, documents={}, record={})
    return parse_quantization_config(json.loads((folder / "config.json").read_text())["quantization_config"])


def test_a_row_that_is_one_group_shares_the_scheme_of_its_group_size(tmp_path: Path) -> None:
    layers = {"layers.0.up": int4(), "layers.0.down": int4(columns=8)}
    config = written(tmp_path / "shared", layers)
    assert {config.scheme(name) for name in layers} == {Scheme(4, 8, False)}
    whole = {"layers.0.up": int4(group_size=16), "layers.0.down": int4(columns=8)}
    config = written(tmp_path / "whole", whole)
    assert {config.scheme(name) for name in whole} == {Scheme(4, None, False)}
    config = written(tmp_path / "awq", whole, "awq")
    assert {config.scheme(name) for name in whole} == {Scheme(4, None, False)}


def test_several_group_sizes(tmp_path: Path) -> None:
    layers = {"layers.0.up": int4(), "layers.1.up": int4(group_size=4)}
    config = written(tmp_path / "out", layers)
    assert {name: config.scheme(name) for name in layers} == {
        "layers.0.up": Scheme(4, 8, False), "layers.1.up": Scheme(4, 4, False)
    }  # fmt: skip
    with pytest.raises(UnsupportedModel, match="one scheme"):
        written(tmp_path / "awq", layers, "awq")


def test_names_that_no_config_tells_apart_are_refused(tmp_path: Path) -> None:
    """Two towers whose layers have the same tails: by tails alone one of them could not stay dense."""
    dense = {"second.encoder.layers.0.proj.weight": torch.zeros(8, 16)}
    with pytest.raises(UnsupportedModel, match=r"encoder\.layers\.0\.proj"):
        written(tmp_path / "out", {"first.encoder.layers.0.proj": int8()}, **dense)
    assert not (tmp_path / "out").exists()


class TestRefused:
    @pytest.fixture
    def writer(self, tmp_path: Path) -> CheckpointWriter:
        return CheckpointWriter(tmp_path / "out", form="compressed-tensors", fingerprint="a")

    def test_existing_folders(self, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        with pytest.raises(InvalidRequest, match="exists"):
            CheckpointWriter(tmp_path / "out", form="awq", fingerprint="a")

    def test_a_folder_that_came_meanwhile(self, writer: CheckpointWriter, tmp_path: Path) -> None:
        writer.add("all", dense={}, quantised={"layers.0.proj": int8()}, record={})
        (tmp_path / "out").mkdir()
        with pytest.raises(InvalidRequest, match="exists"):
            writer.finish({}, documents={}, record={})
        (tmp_path / "out").rmdir()
        writer.finish({}, documents={}, record={})

    @pytest.mark.parametrize("kind", ["folder", "file", "link"])
    def test_what_is_no_partial_checkpoint_is_left_alone(self, kind: str, tmp_path: Path) -> None:
        partial, mine = tmp_path / "out.partial", tmp_path / "mine"
        mine.mkdir()
        if kind == "folder":
            partial.mkdir()
            (partial / "thesis.txt").write_text("mine")
        elif kind == "file":
            partial.write_text("mine")
        else:
            (mine / "progress.json").write_text("{}")
            partial.symlink_to(mine)
        with pytest.raises(InvalidRequest):
            CheckpointWriter(tmp_path / "out", form="awq", fingerprint="a")
        kept = {"folder": partial / "thesis.txt", "file": partial, "link": mine / "progress.json"}[kind]
        assert kept.read_text()

    def test_units_and_tensors_that_come_twice(self, writer: CheckpointWriter) -> None:
        writer.add("a", dense={"norm.weight": torch.ones(2)}, quantised={"layers.0.proj": int8()}, record={})
        with pytest.raises(ValueError, match="added before"):
            writer.add("a", dense={"other": torch.ones(2)}, quantised={}, record={})
        with pytest.raises(ValueError, match=r"norm\.weight: in the unit 'b'.* 'a'"):
            writer.add("b", dense={"norm.weight": torch.ones(2)}, quantised={}, record={})
        with pytest.raises(ValueError, match="quantised, and dense"):
            writer.add("b", dense={"x.weight": torch.ones(2)}, quantised={"x": int8()}, record={})
        with pytest.raises(ValueError, match="no tensor"):
            writer.add("b", dense={}, quantised={}, record={})
        assert not writer.has("b")

    def test_values_that_are_no_json(self, writer: CheckpointWriter, tmp_path: Path) -> None:
        for record in ({"error": float("nan")}, {"scales": torch.ones(1)}):
            with pytest.raises((ValueError, TypeError)):
                writer.add("a", dense={"x": torch.ones(1)}, quantised={}, record=record)
        writer.add("a", dense={}, quantised={"layers.0.proj": int8()}, record={})
        with pytest.raises(ValueError):
            writer.finish({"rope_theta": float("inf")}, documents={}, record={})
        assert not (tmp_path / "out").exists()
        writer.finish({"rope_theta": 1.0}, documents={}, record={})

    @pytest.mark.parametrize("name", ["config.json", "../x", "a/b", "model.safetensors", "x.safetensors", "."])
    def test_documents_under_the_writers_own_names(self, name: str, writer: CheckpointWriter, tmp_path: Path) -> None:
        writer.add("a", dense={}, quantised={"layers.0.proj": int8()}, record={})
        with pytest.raises(ValueError, match="plain file name"):
            writer.finish({}, documents={name: b""}, record={})
        assert not (tmp_path / "out").exists()

    def test_models_without_a_quantised_layer(self, writer: CheckpointWriter) -> None:
        with pytest.raises(ValueError, match="expected all units"):
            writer.finish({}, documents={}, record={})
        writer.add("a", dense={"x": torch.ones(1)}, quantised={}, record={})
        with pytest.raises(UnsupportedModel, match="without a quantised layer"):
            writer.finish({}, documents={}, record={})

    @pytest.mark.parametrize(
        ("weight", "why"),
        [
            (int8(), "one of 8 bits"),
            (int4(rows=12), "rows in eights"),
            (int4(columns=12), "whole groups"),
            (int4(scale_dtype=torch.bfloat16), "float16 scales"),
        ],
    )
    def test_layers_that_awq_cannot_hold(self, weight: Any, why: str, tmp_path: Path) -> None:
        writer = CheckpointWriter(tmp_path / "out", form="awq", fingerprint="a")
        with pytest.raises(ValueError, match=rf"layers\.0\.proj.*{why}"):
            writer.add("a", dense={}, quantised={"layers.0.proj": weight}, record={})
        assert not writer.has("a")

    def test_layers_that_compressed_tensors_cannot_hold(self, writer: CheckpointWriter, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"x: expected whole groups"):
            writer.add("a", dense={}, quantised={"x": int4(columns=12)}, record={})
        symmetric = CheckpointWriter(tmp_path / "b", form="compressed-tensors", fingerprint="a", symmetric=True)
        with pytest.raises(ValueError, match="zero point of 8"):
            symmetric.add("a", dense={}, quantised={"x": int4()}, record={})
        with pytest.raises(ValueError, match="symmetric"):
            CheckpointWriter(tmp_path / "c", form="awq", fingerprint="a", symmetric=True)


def test_tensors_of_any_memory_are_written(tmp_path: Path) -> None:
    whole = torch.arange(24.0).view(4, 6)
    dense = {
        "a": whole, "b": whole[1:3, 2:], "c": whole.t(), "d": whole, "e": torch.tensor(5.0), "f": torch.empty(0, 3),
        "g": nn.Parameter(torch.ones(3, dtype=torch.bfloat16)), "h": torch.ones(1, 1, dtype=torch.bool),
        "i": torch.tensor([5, 6, 7])[1:2].as_strided((1,), (2,)),
    }  # fmt: skip
    written(tmp_path / "out", {"layers.0.proj": int8()}, **dense)
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in dense.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    Checkpoint.open(tmp_path / "out", tokenizer=False)


def test_awq_matrices_of_many_rows(tmp_path: Path) -> None:
    """More than are packed at a time, and a remainder."""
    weight = int4(rows=2 * 512 + 24)
    config = written(tmp_path / "out", {"layers.0.proj": weight}, "awq")
    tensors = by_layer(load_file(tmp_path / "out" / "model.safetensors"))["layers.0.proj"]
    assert_equal(read_layer(StoredLayer("layers.0.proj", tensors), (weight.out_features, 16), config), weight)


def test_dtypes_that_safetensors_lacks_are_refused(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path / "out", form="awq", fingerprint="a")
    with pytest.raises(ValueError, match=r"tensor x: expected a dtype .* got torch\.complex64"):
        writer.add("a", dense={"x": torch.zeros(1, dtype=torch.complex64)}, quantised={}, record={})
    assert sorted(contents(tmp_path / "out.partial")) == ["progress.json"]


# Going on after an end ----------------------------------------------------------------------------------------------


@pytest.mark.skipif(not LINUX, reason="needs fork")
def test_a_kill_before_any_operation_on_files_is_made_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)  # what it is for only a power cut would show; it takes the time
    small_write(tmp_path / "undisturbed")
    want = contents(tmp_path / "undisturbed")
    # A process of its own: forking one that has run threads, as this one has, may leave a child that waits for ever.
    command = [sys.executable, interrupted_write.__file__, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    operations, finished_before_the_kill = int(done.stdout), 0
    for operation in range(1, operations + 1):
        folder = tmp_path / f"out{operation}"
        partial = tmp_path / f"out{operation}.partial"
        if folder.exists():  # killed while it removed the partial folder
            finished_before_the_kill += 1
            assert contents(folder) == want
            continue
        assert not (partial / "config.json").exists()
        if partial.exists():
            with pytest.raises(ModelNotFound):
                Checkpoint.open(partial, tokenizer=False)
        if (partial / "ready" / "config.json").exists():
            Checkpoint.open(partial / "ready")
        small_write(folder)
        assert contents(folder) == want
        assert not partial.exists()
    assert operations > 40
    assert 1 < finished_before_the_kill < 10


WRITE_MUCH = """
import time, torch
from pathlib import Path
from sparsevila.quant.export import CheckpointWriter
from sparsevila.quant.smoothquant import quantise_int8
torch.set_num_threads(1)
writer = CheckpointWriter(Path({folder!r}), form="compressed-tensors", fingerprint="much")
print("begin", sum(writer.has(str(i)) for i in range(30)), flush=True)
for i in range(30):
    if not writer.has(str(i)):
        weight = torch.randn(512, 1024, generator=torch.Generator().manual_seed(i))
        quantised = {{f"layers.{{i}}.proj": quantise_int8(weight)}}
        writer.add(str(i), dense={{f"{{i}}.bias": weight}}, quantised=quantised, record={{"i": i}})
if {whole}:
    writer.finish({{}}, documents={{}}, record={{}})
else:
    time.sleep(600)
"""


@pytest.mark.skipif(not LINUX, reason="needs SIGKILL")
def test_kills_at_random_moments_are_made_good(tmp_path: Path) -> None:
    delay = random.Random(7)
    partial = tmp_path / "out.partial"

    def num_shards() -> int:
        return len(list(partial.glob("unit-*.safetensors")))

    def start(*, whole: bool) -> subprocess.Popen[str]:
        script = WRITE_MUCH.format(folder=str(tmp_path / "out"), whole=whole)
        return subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)

    def begun(process: subprocess.Popen[str]) -> int:
        assert process.stdout is not None
        return int(process.stdout.readline().removeprefix("begin "))

    done = []
    for _ in range(2):
        with start(whole=False) as process:
            done.append(begun(process))
            while process.poll() is None and num_shards() <= done[-1]:
                time.sleep(0.001)
            time.sleep(delay.uniform(0, 0.02))
            process.kill()
        assert not (tmp_path / "out").exists()
    with start(whole=True) as process:
        done.append(begun(process))
    assert process.returncode == 0
    assert 0 == done[0] < done[1] < done[2] <= 30
    exec(WRITE_MUCH.format(folder=str(tmp_path / "undisturbed"), whole=True), {})
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")


@pytest.mark.skipif(not LINUX, reason="reads /proc")
def test_everything_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[tuple[str, ...]] = []
    fsync = os.fsync

    def logged(descriptor: int) -> None:
        log.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", logged)
    for operation in ("rename", "replace"):
        plain = getattr(os, operation)
        monkeypatch.setattr(
            os, operation, lambda a, b, plain=plain: (log.append(("name", str(a), str(b))), plain(a, b))
        )
    small_write(tmp_path / "out")
    partial, ready = str(tmp_path / "out.partial"), str(tmp_path / "out.partial" / "ready")
    named = [i for i, entry in enumerate(log) if entry[0] == "name"]
    assert (
        len(named) == 1 + 2 * 2 + 2 + 4 + 1
    )  # progress; a record and a shard each; both again; four files; the folder
    for i in named[:-1]:
        _, before, after = log[i]
        if Path(after).parent.name != "ready" or before.endswith(".tmp"):
            assert ("sync", before) in log[:i]
    shards = [i for i in named if log[i][2].startswith(f"{partial}/unit") and log[i][2].endswith(".safetensors")]
    assert len(shards) == 2
    assert all(("sync", partial) in log[i : i + 2] for i in shards)
    assert log[named[-1]] == ("name", ready, str(tmp_path / "out"))
    assert ("sync", ready) in log[named[-2] : named[-1]]
    assert log[-1] == ("sync", str(tmp_path))


def test_another_fingerprint_begins_anew(tmp_path: Path) -> None:
    def writer(fingerprint: str, **options: Any) -> CheckpointWriter:
        return CheckpointWriter(tmp_path / "out", form="compressed-tensors", fingerprint=fingerprint, **options)

    writer("a").add("unit", dense={"x": torch.ones(2)}, quantised={}, record={"alpha": [0.5, 1]})
    assert writer("a").has("unit")
    assert writer("a").record("unit") == {"alpha": [0.5, 1]}
    with pytest.raises(KeyError):
        writer("a").record("other")
    assert not writer("a", symmetric=True).has("unit")
    writer("b").add("unit", dense={"x": torch.zeros(2)}, quantised={}, record={})
    assert not writer("a").has("unit")


def test_a_shard_that_is_not_whole_is_written_again(tmp_path: Path) -> None:
    def writer() -> CheckpointWriter:
        return CheckpointWriter(tmp_path / "out", form="compressed-tensors", fingerprint="a")

    first = writer()
    for name in "abc":
        first.add(name, dense={name: torch.ones(2)}, quantised={}, record={})
    shard = tmp_path / "out.partial" / "unit-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    again = writer()
    assert [again.has(name) for name in "abc"] == [True, False, True]
    again.add("b", dense={"b": torch.ones(2)}, quantised={"layers.0.proj": int8()}, record={})
    again.finish({}, documents={}, record={})
    assert list(json.loads((tmp_path / "out" / "quantization.json").read_text())["units"]) == ["a", "b", "c"]


@pytest.mark.skipif(not LINUX, reason="needs a limit on file sizes")
def test_a_full_disk_leaves_no_folder_and_what_was_done(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path / "out", form="compressed-tensors", fingerprint="a")
    writer.add("small", dense={}, quantised={"layers.0.proj": int8()}, record={})
    before = contents(tmp_path / "out.partial")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match=os.strerror(errno.EFBIG)):
            writer.add("large", dense={"x": torch.ones(100_000)}, quantised={}, record={})
        assert contents(tmp_path / "out.partial") == before
        with pytest.raises(OSError, match=os.strerror(errno.EFBIG)):
            writer.finish({}, documents={"tokenizer.json": b"x" * 200_000}, record={})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (tmp_path / "out").exists()
    writer.add("large", dense={"x": torch.ones(100_000)}, quantised={}, record={})
    writer.finish({}, documents={"tokenizer.json": b"x" * 200_000}, record={})
    assert Checkpoint.open(tmp_path / "out").tensors["x"].shape == (100_000,)


def test_an_error_at_the_very_end_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = export._write

    def failing(path: Path, data: bytes) -> None:
        if path.name == "config.json":
            raise OSError(errno.ENOSPC, "no space")
        plain(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(export, "_write", failing)
        with pytest.raises(OSError, match="no space"):
            small_write(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    small_write(tmp_path / "out")
    small_write(tmp_path / "undisturbed")
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")


@pytest.mark.skipif(not LINUX, reason="reads /proc")
def test_adding_a_unit_takes_no_more_than_its_tensors_once_more(tmp_path: Path) -> None:
    def resident(key: str) -> int:
        text = Path("/proc/self/status").read_text()
        return int(text.partition(f"{key}:")[2].split()[0]) * 1024

    quantised: dict[str, Int4Weight | Int8Weight] = {
        f"layers.{i}.proj": Int4Weight(
            codes=torch.ones(2048, 4096, dtype=torch.uint8), scales=torch.ones(2048, 64, dtype=torch.float16),
            zeros=torch.ones(2048, 64, dtype=torch.uint8), in_features=8192, group_size=128,
        )
        for i in range(4)
    }  # fmt: skip
    dense = {f"layers.{i}.norm.weight": torch.ones(1024, 4096, dtype=torch.bfloat16).t() for i in range(4)}
    unit_bytes = 4 * (2048 * 4096 + 2 * 1024 * 4096)
    for form in ("compressed-tensors", "awq"):
        writer = CheckpointWriter(tmp_path / form, form=form, fingerprint="a")  # type: ignore[arg-type]
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
        before = resident("VmRSS")
        writer.add("unit", dense=dense, quantised=quantised, record={})
        assert resident("VmHWM") - before < 1.1 * unit_bytes, form
