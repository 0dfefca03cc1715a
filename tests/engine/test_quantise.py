"""A whole checkpoint quantised: what is written, how good it is, and that it can be interrupted at any layer."""

from __future__ import annotations

import gc
import itertools
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from random_checkpoint import preset, write_random_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sparsevila import CorruptCheckpoint, Engine, Image, InvalidRequest, SamplingParams, Sparsity
from sparsevila.engine.calibration_inputs import embed_sample, encode_frames
from sparsevila.engine.calibration_set import CalibrationSample
from sparsevila.engine.media import load_image
from sparsevila.engine.quantise import QuantReport, QuantSettings, quantise_checkpoint
from sparsevila.engine.runner import Runner, TextSpan, VisualSpan
from sparsevila.engine.sparsity.base import Method
from sparsevila.engine.streamed_model import StreamedModel
from sparsevila.engine.tokenizer import load_tokenizer
from sparsevila.models.checkpoint import Checkpoint
from sparsevila.models.interface import Frames, Progress, VisualTokens
from sparsevila.models.registry import load_model
from sparsevila.models.vision_tower import tiles_in_turn
from sparsevila.quant.awq import quantise_int4
from sparsevila.quant.formats import by_layer, detect, read_layer
from sparsevila.quant.plan import scheme_name
from sparsevila.quant.quantization_config import parse_quantization_config
from sparsevila.quant.scheme import Int4Weight, Int8Weight
from sparsevila.quant.smoothquant import quantise_int8
from sparsevila.quant.stored_layer import StoredLayer

CPU = torch.device("cpu")
SHAPE = replace(
    preset("tiny"), text_layers=2, vision_layers=3
)  # two key heads for four query heads; 96, 128 and 192 inputs
QUICK = QuantSettings(group_size=32, num_rows=128, max_positions=96, max_tiles=6)
TOWER_LAYERS, LAYERS = SHAPE.vision_layers - 1, SHAPE.text_layers
UNITS = [f"vision_tower.encoder.layers.{i}" for i in range(TOWER_LAYERS)] + [
    f"language_model.layers.{i}" for i in range(LAYERS)
]


def picture(seed: int, height: int = 90, width: int = 130) -> Frames:
    """Smooth noise."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return load_image(Image(np.kron(coarse, np.ones((height // 6, width // 8, 1), dtype=np.uint8))))


ATTENTION = tuple(f"self_attn.{part}_proj" for part in "qkv")
READERS = {  # of the outputs of a norm
    "layer_norm1": ATTENTION,
    "layer_norm2": ("mlp.fc1",),
    "input_layernorm": ATTENTION,
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
SAMPLES = [
    CalibrationSample("What do you see in this image?", "A red circle and a blue square.", picture(1)),
    CalibrationSample("Which colour is the car, and where does it stop?", "It is grey."),
    CalibrationSample("Describe the scene in one sentence.", "The street is wet.", picture(2, 60, 160)),
    CalibrationSample("The page has a title.", "", picture(3)),
]


def with_outliers(tensors: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """A few channels behind every norm of a layer made 32 times larger, and read with an eighth of the weight."""
    rng = torch.Generator().manual_seed(seed)
    for name, tensor in tensors.items():
        layer, _, norm = name.removesuffix(".weight").rpartition(".")
        if norm not in READERS:
            continue
        channels = torch.randperm(len(tensor), generator=rng)[:3]
        tensor[channels] *= 32
        for reader in READERS[norm]:
            if (weight := tensors.get(f"{layer}.{reader}.weight")) is not None:
                weight[:, channels] /= 8
    return tensors


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "model"
    write_random_checkpoint(folder, SHAPE, seed=3)
    file = folder / "model.safetensors"
    save_file(with_outliers(load_file(file), 5), file)
    (folder / "LICENSE").write_text("Anybody may use these numbers.")
    (folder / ".hidden.json").write_text("{}")
    (folder / "modeling.py").write_text("raise SystemExit")
    return folder


def quantised(
    source: Path,
    out: Path,
    settings: QuantSettings = QUICK,
    samples: Sequence[CalibrationSample] = SAMPLES,
    **more: Any,
) -> QuantReport:
    return quantise_checkpoint(source, out, settings, samples, **more)


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, QuantReport]:
    """Tower, decoder and output matrix, in one run."""
    out = tmp_path_factory.mktemp("whole") / "model"
    return out, quantised(source, out, replace(QUICK, lm_head="int8"))


@pytest.fixture(scope="module")
def plain(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, QuantReport]:
    """The same by plain rounding."""
    out = tmp_path_factory.mktemp("plain") / "model"
    return out, quantised(source, out, replace(QUICK, lm_head="int8", search=False))


# What is written ----------------------------------------------------------------------------------------------------


def stored_layers(folder: Path) -> dict[str, StoredLayer]:
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return {name: StoredLayer(name, found) for name, found in by_layer(tensors).items()}


def weights_of(folder: Path, source: Path) -> dict[str, Int4Weight | Int8Weight]:
    """Every quantised matrix of a folder by its name; shapes are the source's."""
    config = parse_quantization_config(json.loads((folder / "config.json").read_text())["quantization_config"])
    dense = load_file(source / "model.safetensors")
    return {
        name: read_layer(layer, tuple(dense[f"{name}.weight"].shape), config)
        for name, layer in stored_layers(folder).items()
        if detect(layer) != "dense"
    }


def test_the_folder_loads_and_answers(whole: tuple[Path, QuantReport]) -> None:
    engine = Engine.load(whole[0], device="cpu", dtype="float32")
    assert engine.info.scheme == "W8A8 / W4A16 / float32"
    session = engine.session(media=[Image(np.zeros((40, 50, 3), dtype=np.uint8))])
    first = session.ask("What is it?", params=SamplingParams(max_new_tokens=5))
    assert first.text
    assert session.ask("And then?", params=SamplingParams(max_new_tokens=5)).text


def test_what_is_quantised_and_what_is_not(whole: tuple[Path, QuantReport], source: Path) -> None:
    bits = {name: 4 if isinstance(w, Int4Weight) else 8 for name, w in weights_of(whole[0], source).items()}
    tower = {
        f"vision_tower.vision_model.encoder.layers.{i}.{leaf}": 8
        for i in range(TOWER_LAYERS)
        for leaf in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1",
                     "mlp.fc2")
    }  # fmt: skip
    decoder = {
        f"language_model.model.layers.{i}.{leaf}": 4
        for i in range(LAYERS)
        for leaf in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
                     "mlp.up_proj", "mlp.down_proj")
    }  # fmt: skip
    assert bits == {**tower, **decoder, "language_model.lm_head": 8}


def test_everything_else_is_there_bit_for_bit(whole: tuple[Path, QuantReport], source: Path) -> None:
    before = load_file(source / "model.safetensors")
    after: dict[str, Tensor] = {}
    for path in whole[0].glob("*.safetensors"):
        after |= load_file(path)
    root, language = "vision_tower.vision_model.encoder.layers", "language_model.model"
    foldable = {
        f"{root}.{i}.layer_norm{j}.{leaf}" for i in range(TOWER_LAYERS) for j in (1, 2) for leaf in ("weight", "bias")
    }
    foldable |= {f"{root}.{i}.self_attn.v_proj.bias" for i in range(TOWER_LAYERS)} | {f"{language}.norm.weight"}
    foldable |= {
        f"{language}.layers.{i}.{norm}.weight"
        for i in range(LAYERS)
        for norm in ("input_layernorm", "post_attention_layernorm")
    }
    same = {name for name in before if name in after and after[name].dtype == before[name].dtype}
    assert all(torch.equal(after[name], before[name]) for name in same)
    changed = {name for name in after.keys() & before.keys() if after[name].dtype == torch.float32}
    assert changed <= foldable
    assert len(changed) > len(foldable) / 2
    rounded = {f"{name}.weight" for name in weights_of(whole[0], source)}
    assert same | changed | rounded == set(before)


def test_the_other_files_come_along(whole: tuple[Path, QuantReport], source: Path) -> None:
    names = {path.name for path in whole[0].iterdir() if path.suffix != ".safetensors"}
    assert names == {
        "config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json",
        "tokenizer_config.json", "tokenizer.model", "LICENSE", "quantization.json", "model.safetensors.index.json",
    }  # fmt: skip
    for name in ("tokenizer.model", "LICENSE", "preprocessor_config.json"):
        assert (whole[0] / name).read_bytes() == (source / name).read_bytes()
    config, before = (json.loads((folder / "config.json").read_text()) for folder in (whole[0], source))
    assert config.pop("quantization_config")
    assert config == before


def test_the_report_is_what_the_folder_says(whole: tuple[Path, QuantReport]) -> None:
    out, report = whole
    assert [unit.unit for unit in report.units] == [*UNITS, "language_model.lm_head"]
    said = json.loads((out / "quantization.json").read_text())
    for unit in report.units:
        record = said["units"][unit.unit]["record"]
        assert record["searches"] == json.loads(json.dumps(unit.to_json()["searches"]))
        assert unit.error is not None
        assert 0 < unit.error.cosine < 0.02
        assert 0 < unit.error.relative < 0.3
    assert [len(unit.searches.scales) for unit in report.units] == [3] * TOWER_LAYERS + [4] * LAYERS + [1]
    assert [len(unit.searches.clips) for unit in report.units] == [0] * TOWER_LAYERS + [4] * LAYERS + [0]
    assert {unit.searches.unscaled for unit in report.units[:TOWER_LAYERS]} == {
        (("mlp.fc2", "an activation stands before it"),)
    }
    assert report.saliency is not None
    assert said["record"]["saliency"] == report.to_json()["saliency"]
    assert report.saliency.held_out
    assert report.saliency.num_media == 1
    assert 0.9 < report.saliency.spearman <= 1
    assert set(report.saliency.kept_overlap) == {"0.60", "0.75"}
    assert all(0.8 < share <= 1 for share in report.saliency.kept_overlap.values())
    assert said["record"]["settings"]["lm_head"] == "int8"


def test_without_a_search_it_is_plain_rounding(plain: tuple[Path, QuantReport], source: Path) -> None:
    before = load_file(source / "model.safetensors")
    found = weights_of(plain[0], source)
    assert len(found) == 6 * TOWER_LAYERS + 7 * LAYERS + 1
    for name, weight in found.items():
        dense = before[f"{name}.weight"].float()
        if isinstance(weight, Int4Weight):
            assert weight.scales.dtype == torch.bfloat16  # the matrices' own
            assert torch.equal(weight.dequantise(), quantise_int4(dense, 32, scale_dtype=torch.bfloat16).dequantise())
        else:
            assert torch.equal(weight.dequantise(), quantise_int8(dense).dequantise())
    for path in plain[0].glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            if name in before and tensor.dtype != torch.int8:
                assert torch.equal(tensor, before[name])
                assert tensor.dtype == before[name].dtype
    assert all(unit.searches.scales == () for unit in plain[1].units)


def test_plain_rounding_needs_no_samples(plain: tuple[Path, QuantReport], source: Path, tmp_path: Path) -> None:
    report = quantised(source, tmp_path / "out", replace(QUICK, lm_head="int8", search=False), [])
    assert report.saliency is None
    assert all(unit.error is None for unit in report.units)
    found, expected = weights_of(tmp_path / "out", source), weights_of(plain[0], source)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name].dequantise(), expected[name].dequantise()) for name in found)


# How good it is -----------------------------------------------------------------------------------------------------


def outcomes(folder: Path, media: Sequence[Frames]) -> tuple[Tensor, Tensor]:
    """Of every item: the tower's features, and the logits after a question about it."""
    model = load_model(Checkpoint.open(folder), dtype=torch.float32, device=CPU)
    tokenizer = load_tokenizer(Checkpoint.open(folder))
    runner = Runner(model)
    features, logits = [], []
    for frames in media:
        tokens = encode_frames(model, frames)
        features.append(tokens.features)
        for text in ("What is it?", "Which colour is the bus?"):
            ids = tuple(tokenizer.encode(text, first=True))
            cache = runner.new_cache()
            cache.reserve(visual=len(tokens), text=len(ids) + len(tokens))
            spans = [TextSpan((1,)), VisualSpan(tokens), TextSpan(ids)]
            logits.append(runner.logits(runner.prefill(cache, spans, method=Method()).hidden))
    return torch.cat(features), torch.stack(logits)


def relative(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


UNSEEN = [picture(101), picture(102, 48, 48), picture(103, 120, 64)]


def test_awq_beats_plain_rounding_on_the_logits(source: Path, tmp_path: Path) -> None:
    exact = outcomes(source, UNSEEN)[1]
    errors = {}
    for search in (True, False):
        settings = replace(QUICK, vision="none", search=search)
        quantised(source, tmp_path / str(search), settings)
        errors[search] = relative(outcomes(tmp_path / str(search), UNSEEN)[1], exact)
    assert errors[True] < 0.8 * errors[False]


def test_smoothing_beats_plain_rounding_on_the_features(source: Path, tmp_path: Path) -> None:
    exact = outcomes(source, UNSEEN)[0]
    errors = {}
    for search in (True, False):
        report = quantised(source, tmp_path / str(search), replace(QUICK, llm="none", search=search))
        assert [unit.unit for unit in report.units] == UNITS[:TOWER_LAYERS]
        errors[search] = relative(outcomes(tmp_path / str(search), UNSEEN)[0], exact)
    assert errors[True] < 0.8 * errors[False]


def test_the_errors_of_the_layers_fall(whole: tuple[Path, QuantReport], plain: tuple[Path, QuantReport]) -> None:
    for searched, rounded in zip(whole[1].units, plain[1].units, strict=True):
        assert searched.error is not None
        assert rounded.error is not None
        assert searched.error.relative < rounded.error.relative, searched.unit


# Interrupted --------------------------------------------------------------------------------------------------------


class _Cancelled(Exception):
    pass


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("at", [1, TOWER_LAYERS + 1, TOWER_LAYERS + LAYERS])
def test_a_run_that_was_cancelled_goes_on_and_ends_with_the_same_bytes(
    source: Path, whole: tuple[Path, QuantReport], tmp_path: Path, at: int
) -> None:
    out, settings = tmp_path / "model", replace(QUICK, lm_head="int8")
    seen: list[Progress] = []

    def cancel(step: Progress) -> None:
        seen.append(step)
        if step.stage == "quantise" and step.done == at and len([s for s in seen if s.done == at]) > 3:
            raise _Cancelled

    with pytest.raises(_Cancelled):
        quantised(source, out, settings, progress=cancel)
    assert not out.exists()
    assert out.with_name("model.partial").exists()
    report = quantised(source, out, settings)
    assert report.units == whole[1].units
    assert report.saliency == whole[1].saliency
    assert files_of(out) == files_of(whole[0])


def test_done_layers_are_not_searched_again(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsevila.engine import quantise

    searched = []

    def counted(block: Any, *args: Any, **more: Any) -> Any:
        searched.append(block)
        return real(block, *args, **more)

    real = quantise.awq_block
    monkeypatch.setattr(quantise, "awq_block", counted)

    def cancel(step: Progress) -> None:
        if step.stage == "quantise" and step.done == TOWER_LAYERS + 1:
            raise _Cancelled

    with pytest.raises(_Cancelled):
        quantised(source, tmp_path / "out", progress=cancel)
    assert len(searched) == 1
    searched.clear()
    quantised(source, tmp_path / "out")
    assert len(searched) == LAYERS - 1


def test_other_samples_begin_anew(source: Path, tmp_path: Path) -> None:
    def cancel(step: Progress) -> None:
        if step.stage == "quantise" and step.done == TOWER_LAYERS + LAYERS:
            raise _Cancelled

    out = tmp_path / "out"
    with pytest.raises(_Cancelled):
        quantised(source, out, progress=cancel)
    report = quantised(source, out, samples=SAMPLES[:2])
    expected = quantised(source, tmp_path / "fresh", samples=SAMPLES[:2])
    assert report.units == expected.units
    assert report.saliency is not None
    assert not report.saliency.held_out  # one picture alone


def test_progress_counts_to_the_end(source: Path, tmp_path: Path) -> None:
    steps: list[Progress] = []
    quantised(source, tmp_path / "out", replace(QUICK, lm_head="int8"), progress=steps.append)
    assert {step.stage for step in steps} == {"load", "encode", "quantise"}
    done = [step.done for step in steps if step.stage == "quantise"]
    assert done == sorted(done)
    assert set(done) == set(range(len(UNITS) + 2))
    assert {(step.total, step.unit) for step in steps if step.stage == "quantise"} == {(len(UNITS) + 1, "layers")}
    assert min(done.count(n) for n in range(len(UNITS) + 1)) > 5  # often enough to stop soon


# Memory -------------------------------------------------------------------------------------------------------------


def live_bytes() -> int:
    """Of all parameters that hold memory, dense or quantised; what several share counts once."""
    found = [p for p in gc.get_objects() if type(p) is nn.Parameter and p.device.type != "meta"]
    # Packed parameters of a backend show no storage, and share none.
    held = {id(p) if p.is_mkldnn else p.untyped_storage().data_ptr(): p.numel() * p.element_size() for p in found}
    return sum(held.values())


def test_one_decoder_layer_is_in_memory_at_a_time(tmp_path: Path) -> None:
    shape = replace(SHAPE, text_layers=6, vision_layers=2)
    write_random_checkpoint(tmp_path / "model", shape)
    layer = 4 * sum(
        t.numel() for n, t in load_file(tmp_path / "model" / "model.safetensors").items() if ".layers.5." in n
    )
    gc.collect()
    before, held, steps = live_bytes(), [], itertools.count()

    def watch(step: Progress) -> None:
        if step.stage == "quantise" and step.done >= 1 and next(steps) % 40 == 0:  # looking takes its time
            held.append((live_bytes() - before) / layer)

    settings = replace(QUICK, llm="w4a16", num_rows=32, max_positions=48)
    quantised(tmp_path / "model", tmp_path / "out", settings, SAMPLES[:2], progress=watch)
    assert len(held) > 20
    assert 0.9 < max(held) < 2.5, "expected the shell, or one layer in float32 and its codes"
    assert sum(share > 1.3 for share in held) < len(held) / 2  # the shell goes before the decoder's layers come


# What the layers are run on -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shell(source: Path) -> StreamedModel:
    streamed = StreamedModel(Checkpoint.open(source), CPU)
    streamed.load_shell()
    return streamed


@pytest.mark.parametrize("limit", [40, 90, 4096])
def test_a_sequence_is_the_prompt_with_the_front_of_the_visual_tokens(shell: StreamedModel, limit: int) -> None:
    model, tokenizer = shell.model, load_tokenizer(shell.checkpoint)
    sample = CalibrationSample("Which bus?", "A white bus.", picture(1))
    assert sample.frames is not None
    tokens = encode_frames(model, sample.frames)
    before = [1, *tokenizer.encode("USER: ", first=True)]
    after = tokenizer.encode("\nWhich bus? ASSISTANT: A white bus.", first=False)
    text = (before + after)[: limit // 2]
    num_visual = min(len(tokens), limit - len(text))
    front: VisualTokens = tokens.select(torch.arange(num_visual))
    with torch.no_grad():
        made = embed_sample(model, tokenizer, sample, tokens, max_positions=limit)
        ids = model.decoder.embed(torch.tensor(text))
        wanted = torch.cat([ids[: len(before)], model.embed_visual(front), ids[len(before) :]])
    assert torch.equal(made.hidden, wanted)
    assert made.positions.tolist() == list(range(len(wanted)))
    assert len(wanted) <= limit


def test_a_sequence_of_text_alone(shell: StreamedModel) -> None:
    model, tokenizer = shell.model, load_tokenizer(shell.checkpoint)
    sample = CalibrationSample("Which bus?", "A white bus.")
    ids = [1, *tokenizer.encode("USER: Which bus? ASSISTANT: A white bus.", first=True)]
    made = embed_sample(model, tokenizer, sample, None, max_positions=4096)
    assert torch.equal(made.hidden, model.decoder.embed(torch.tensor(ids)))


def test_tiles_come_from_every_picture(shell: StreamedModel) -> None:
    media = [shell.model.preprocess(frames) for frames in (picture(1), picture(2, 60, 160), picture(3))]
    tiles = [inputs.pixels for inputs in media]
    found = tiles_in_turn(media, 5)
    assert torch.equal(found, torch.stack([tiles[0][0], tiles[1][0], tiles[2][0], tiles[0][1], tiles[1][1]]))
    assert len(tiles_in_turn(media, 1000)) == sum(map(len, tiles))


# Refusals -----------------------------------------------------------------------------------------------------------


def test_a_quantised_source_is_refused(whole: tuple[Path, QuantReport], tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="expected a checkpoint of floats, this one is quantised already"):
        quantised(whole[0], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_exists_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="exists: a model is not written over"):
        quantised(source, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group_size": 64}, r"group_size: 64 does not divide the 96 inputs of language_model\.layers\.0\."
                             r"self_attn\.q_proj; of 32, 64, 128 these do: 32"),
        ({"group_size": 48}, "group_size: expected one of 32, 64, 128, got 48"),
        ({"llm": "w3"}, "llm: expected one of w4a16, none, got 'w3'"),
        ({"llm": "none", "vision": "none"}, "expected one of them to be quantised"),
        ({"form": "awq"}, "the awq format holds 4-bit layers alone"),
        ({"num_rows": 0}, "num_rows: expected a whole number of at least 1, got 0"),
        ({"max_positions": True}, "max_positions: expected a whole number"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused(
    source: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        quantised(source, tmp_path / "out", replace(QUICK, **change))
    assert list(tmp_path.iterdir()) == []


def test_samples_that_do_not_do_are_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="expected at least one sample, got none"):
        quantised(source, tmp_path / "out", samples=[])
    with pytest.raises(InvalidRequest, match="expected a picture or a clip for the vision tower, got text alone"):
        quantised(source, tmp_path / "out", samples=[SAMPLES[1]])
    assert list(tmp_path.iterdir()) == []


def edited(source: Path, folder: Path, edit: Any) -> Path:
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.update(surprise=torch.zeros(3)), "tensor surprise: this model has no such tensor"),
        (lambda t: t.pop("language_model.model.layers.1.mlp.up_proj.weight"), "1 tensors are missing"),
        (lambda t: t.update({"language_model.lm_head.weight": torch.zeros(640, 95)}), r"expected shape \(640, 96\)"),
        (
            lambda t: t.update({"language_model.model.layers.7.input_layernorm.weight": torch.zeros(96)}),
            r"layers\.7\.input_layernorm\.weight: this model has no such tensor",
        ),
    ],
)
def test_a_source_that_does_not_fit_is_refused_before_any_work(
    source: Path, tmp_path: Path, edit: Any, message: str
) -> None:
    folder = edited(source, tmp_path / "bad", edit)
    with pytest.raises(CorruptCheckpoint, match=message):
        quantised(folder, tmp_path / "out", replace(QUICK, llm="none"))
    assert {path.name for path in tmp_path.iterdir()} == {"bad"}


def test_a_weight_that_is_no_number_is_named_with_its_layer(source: Path, tmp_path: Path) -> None:
    name = "language_model.model.layers.1.mlp.down_proj.weight"
    folder = edited(source, tmp_path / "bad", lambda t: t[name].__setitem__((0, 0), float("inf")))
    with pytest.raises(CorruptCheckpoint, match=r"language_model\.layers\.1: mlp\.down_proj: expected finite numbers"):
        quantised(folder, tmp_path / "out", replace(QUICK, vision="none"), SAMPLES[:2])


# Other forms --------------------------------------------------------------------------------------------------------


def test_the_awq_form(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantised(source, out, replace(QUICK, vision="none", form="awq"), SAMPLES[:2])
    assert json.loads((out / "config.json").read_text())["quantization_config"]["quant_method"] == "awq"
    model = load_model(Checkpoint.open(out), dtype=torch.float32, device=CPU)
    assert isinstance(model, nn.Module)
    assert scheme_name(model, torch.float32) == "W4A16 / float32"
    assert relative(outcomes(out, UNSEEN[:1])[1], outcomes(source, UNSEEN[:1])[1]) < 0.5


def test_the_output_matrix_alone(source: Path, tmp_path: Path) -> None:
    settings = replace(QUICK, llm="none", vision="none", lm_head="int8")
    report = quantised(source, tmp_path / "out", settings)
    assert [unit.unit for unit in report.units] == ["language_model.lm_head"]
    assert list(weights_of(tmp_path / "out", source)) == ["language_model.lm_head"]
    assert relative(outcomes(tmp_path / "out", UNSEEN)[1], outcomes(source, UNSEEN)[1]) < 0.02
    engine = Engine.load(tmp_path / "out", device="cpu", dtype="float32")
    assert engine.session(sparsity=Sparsity(0.0, 0.0)).ask("Hi", params=SamplingParams(max_new_tokens=2)).text
