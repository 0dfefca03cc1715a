"""Every family quantised: what of it became integers, and that it still says what it said before, about."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES, TinyFolders
from torch import Tensor, nn

from sparsevila import Engine, Image, InvalidRequest, SamplingParams, Sparsity
from sparsevila.engine.calibration_set import CalibrationSample
from sparsevila.engine.media import load_image
from sparsevila.engine.quantise import QuantReport, QuantSettings, quantise_checkpoint
from sparsevila.engine.quantised_copy import estimate
from sparsevila.models.checkpoint import Checkpoint
from sparsevila.models.interface import Frames
from sparsevila.models.registry import load_model
from sparsevila.quant.linear import Linear, W4A16Linear, W8A8Linear

CPU = torch.device("cpu")
SETTINGS = QuantSettings(group_size=32, num_rows=64, max_positions=96, max_tiles=4)
NAMES = [name for name in FAMILIES if name in ("qwen2", "qwen2.5", "onevision", "nvila", "longvila", "radio")]


def picture(seed: int, height: int = 60, width: int = 84) -> Frames:
    """Smooth noise."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 7, 3), dtype=np.uint8)
    return load_image(Image(np.kron(coarse, np.ones((height // 6, width // 7, 1), dtype=np.uint8))))


SAMPLES = [
    CalibrationSample("What do you see in this image?", "A red circle and a blue square.", picture(1)),
    CalibrationSample("Which colour is the car, and where does it stop?", "It is grey."),
    CalibrationSample("Describe the scene.", "The street is wet.", picture(2)),
]


@pytest.fixture(scope="module", params=NAMES)
def made(
    request: pytest.FixtureRequest, tiny_folders: TinyFolders, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, QuantReport]:
    """Source, quantised copy, report."""
    source, out = tiny_folders[request.param], tmp_path_factory.mktemp("quantised") / request.param
    return source, out, quantise_checkpoint(source, out, SETTINGS, SAMPLES)


def linears(module: nn.Module) -> dict[str, nn.Module]:
    return {n: m for n, m in module.named_modules() if isinstance(m, (Linear, W4A16Linear, W8A8Linear))}


def load(folder: Path) -> Any:
    return load_model(Checkpoint.open(folder), dtype=torch.float32, device=CPU)


def cosine(a: Tensor, b: Tensor) -> float:
    return float(nn.functional.cosine_similarity(a.flatten().double(), b.flatten().double(), dim=0))


def test_layers_are_integers_and_the_rest_is_not(made: tuple[Path, Path, QuantReport]) -> None:
    source, out, _ = made
    dense, model = load(source), load(out)
    assert {type(m) for m in linears(model.tower.blocks).values()} == {W8A8Linear}
    assert {type(m) for m in linears(model.decoder.layers).values()} == {W4A16Linear}
    assert isinstance(model.decoder.lm_head, Linear)
    assert {type(m) for m in linears(dense).values()} == {Linear}
    assert linears(dense).keys() == linears(model).keys()


def test_features_saliency_and_report(made: tuple[Path, Path, QuantReport]) -> None:
    source, out, report = made
    dense, model = load(source), load(out)
    with torch.inference_mode():
        before, after = (m.encode(m.preprocess(picture(7))) for m in (dense, model))
    assert cosine(before.features, after.features) > 0.99
    assert cosine(before.saliency, after.saliency) > 0.995
    assert report.saliency is not None
    assert report.saliency.spearman > 0.9
    units = [unit.unit for unit in report.units]
    assert len(units) == len(dense.tower.blocks) + len(dense.decoder.layers)
    assert all(unit.error is not None and 0 < unit.error.relative < 0.5 for unit in report.units)


def test_it_answers_about_a_picture_and_again(made: tuple[Path, Path, QuantReport]) -> None:
    _, out, _ = made
    item = Image(picture(3).rgb[0])
    with Engine.load(out, device="cpu", dtype="float32") as engine:
        assert engine.info.scheme.startswith("W8A8 / W4A16")
        session = engine.session(media=[item], sparsity=Sparsity(0.5, 0.5))
        params = SamplingParams(max_new_tokens=5)
        answers = [session.ask(question, params=params) for question in ("What is it?", "And then?")]
        assert all(len(answer.token_ids) >= 1 for answer in answers)


def test_what_was_estimated(made: tuple[Path, Path, QuantReport]) -> None:
    """Tiny files are mostly what stays dense: the estimate is held where it can be, within two parts in ten."""
    source, out, _ = made
    size = Checkpoint.open(out).weight_bytes
    cost = estimate(Checkpoint.open(source), SETTINGS)
    assert size < cost.source_bytes
    assert 0.8 < cost.out_bytes / size < 1.2


def test_a_quantised_source_is_refused(made: tuple[Path, Path, QuantReport], tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="quantised already"):
        quantise_checkpoint(made[1], tmp_path / "again", SETTINGS, SAMPLES)


def test_an_interrupted_run_ends_with_the_same_bytes(tiny_folders: TinyFolders, tmp_path: Path) -> None:
    """A model of several folders: stopped in the middle, and begun again."""

    class Stop(Exception):
        pass

    source, partial = tiny_folders["nvila"], tmp_path / "a.partial"

    def progress(_: object) -> None:
        if len(list(partial.glob("unit-*.safetensors"))) == 3:
            raise Stop

    with pytest.raises(Stop):
        quantise_checkpoint(source, tmp_path / "a", SETTINGS, SAMPLES, progress=progress)
    assert partial.is_dir()
    quantise_checkpoint(source, tmp_path / "a", SETTINGS, SAMPLES)
    quantise_checkpoint(source, tmp_path / "b", SETTINGS, SAMPLES)
    files = {p.relative_to(tmp_path / "a"): p.read_bytes() for p in (tmp_path / "a").rglob("*") if p.is_file()}
    assert files == {p.relative_to(tmp_path / "b"): p.read_bytes() for p in (tmp_path / "b").rglob("*") if p.is_file()}
    assert {p.parent.name for p in files} == {"", "llm", "vision_tower", "mm_projector"}
