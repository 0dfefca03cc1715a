"""The built-in model in W8A8 and W4A16: what lies in its folder, and that it still sees."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

from sparsevila import Engine, Image, SamplingParams, Sparsity
from sparsevila.engine import hub

FOLDER = Path(hub.__file__).resolve().parents[1] / "assets" / "demo-quantised"
PICTURES = {kind: FOLDER.parent / "images" / f"world-{kind}.png" for kind in ("scene", "page")}
ENOUGH = 0.5  # of the two pictures' questions; a blind guess is right one time in seven


@pytest.fixture(scope="module")
def bundled(media_script: ModuleType) -> Callable[[str], list[tuple[str, str]]]:
    """Questions and answers about the bundled picture of a kind."""
    return cache(lambda kind: [(turn.question, turn.answer) for turn in media_script.world_sample(kind).dialogue])


def test_the_folder_is_the_demo_models_and_small() -> None:
    original = {path.name: path for path in (FOLDER.parent / "demo").iterdir()}
    kept = {"tokenizer.model", "tokenizer_config.json", "preprocessor_config.json", "generation_config.json"}
    kept |= {"head_scores.json"}
    for name in kept:
        assert (FOLDER / name).read_bytes() == original[name].read_bytes(), name
    size = sum(path.stat().st_size for path in FOLDER.glob("*.safetensors"))
    assert size < 0.6 * original["model.safetensors"].stat().st_size
    assert hub.ALIASES["demo-quantised"].size_bytes == pytest.approx(size, rel=0.1)


def test_it_says_how_it_was_made() -> None:
    record = json.loads((FOLDER / "quantization.json").read_text(encoding="utf-8"))
    schemes = {(layer["scheme"], "vision" in name) for name, layer in record["layers"].items()}
    assert schemes == {("W8A8", True), ("W4A16", False)}
    assert record["record"]["num_samples"] > 0
    assert record["record"]["saliency"]["spearman"] > 0.95


def test_it_still_sees(bundled: Callable[[str], list[tuple[str, str]]]) -> None:
    right, told = 0, []
    with Engine.load("demo-quantised", device="cpu", dtype="float32") as engine:
        assert engine.info.scheme == "W8A8 / W4A16 / float32"
        for kind, picture in PICTURES.items():
            session = engine.session(media=[Image(picture)], sparsity=Sparsity())
            for question, answer in bundled(kind):
                said = session.ask(question, params=SamplingParams(max_new_tokens=32), remember=False).text.strip()
                right += said == answer
                told.append(f"{question} {answer!r}: {said!r}")
    assert right >= ENOUGH * len(told), "\n".join(told)
