"""Curves from a small log: what is read, what is drawn, and that the same log gives the same files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from world.curves import (
    TELLING,
    curves,
    draw_answers,
    draw_tower,
    joined,
    labels,
    mean_over_types,
    read_log,
    write,
)
from world.splits import PHRASES

ROOT = Path(__file__).resolve().parents[2]
RECIPE = {"vision_batch": 96, "language_batch": 16, "language_batches": 2}
FIGURES = {"loss": 2.5, "per_s": 280.0}
LABELS = {"shape": 0.5, "row": 0.9, "partner_word": 0.3, "character0": 0.7, "whole_shape": 0.8}


def opening(stage: str = "vision", step: int = 0, recipe: dict[str, Any] = RECIPE) -> dict[str, Any]:
    return {"stage": stage, "step": step, "environment": {"commit": "x"}, "recipe": recipe}


def evaluation(step: int, exact: float, wrong: float) -> dict[str, Any]:
    def figures(value: float) -> dict[str, float]:
        return {"all": value, **{f"{kind}_{name}": value for kind, table in PHRASES.items() for name in table}}

    return {"stage": "language", "step": step, "exact": figures(exact), "wrong_picture": figures(wrong)}


def a_run() -> list[dict[str, Any]]:
    """Two parts: the second begins before the first one's last line, as after a cut."""
    lines = [opening()]
    lines += [{"stage": "vision", "step": step, **FIGURES, **LABELS} for step in (30, 60, 90)]
    lines += [opening(step=60)]
    lines += [{"stage": "vision", "step": step, **FIGURES, **LABELS, "shape": 0.6} for step in (90, 120)]
    lines += [{"stage": "language", "step": step, **FIGURES, "token_accuracy": 0.4} for step in (80, 160)]
    return [*lines, evaluation(80, 0.25, 0.125), evaluation(160, 0.75, 0.125)]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return write_log(tmp_path / "log.jsonl", a_run())


def write_log(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_steps_become_samples_and_the_last_word_on_a_step_counts(log: Path) -> None:
    read = read_log(log)
    assert [point.seen for point in read.vision] == [96 * step for step in (30, 60, 90, 120)]
    assert curves(read.vision, ["shape", "unknown"]) == {"shape": ([2880, 5760, 8640, 11520], [0.5, 0.5, 0.6, 0.6])}
    assert [point.seen for point in read.language] == [32 * 80, 32 * 160]
    assert mean_over_types(read.exact, "page") == ([2560, 5120], [0.25, 0.75])
    assert mean_over_types(read.wrong_picture, "clip") == ([2560, 5120], [0.125, 0.125])


def test_a_recipe_with_one_batch_a_step(tmp_path: Path) -> None:
    recipe = {"vision_batch": 10, "language_batch": 7}
    lines = [opening(recipe=recipe), {"stage": "language", "step": 3, **FIGURES}]
    assert read_log(write_log(tmp_path / "log", lines)).language[0].seen == 21


def test_every_label_is_in_one_panel(log: Path) -> None:
    panels = labels(read_log(log).vision)
    assert sorted(name for names in panels.values() for name in names) == sorted(LABELS)
    assert panels["whole tile"] == ["whole_shape"]
    assert panels["patches: where, beside what"] == ["row", "partner_word"]


def test_telling_types_are_types_of_the_world() -> None:
    assert TELLING.keys() == PHRASES.keys()
    for kind, types in TELLING.items():
        assert set(types) <= PHRASES[kind].keys()


def test_what_is_drawn_is_what_was_logged(log: Path) -> None:
    read = read_log(log)
    figure = draw_answers(read)
    assert figure is not None
    scene, wrong = figure.axes[0], figure.axes[3]
    drawn = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in scene.lines}
    assert drawn["where is"] == drawn["mean over all types"] == ([2560, 5120], [0.25, 0.75])
    assert [list(line.get_ydata()) for line in wrong.lines] == [[0.125, 0.125]] * len(scene.lines)
    styles = {(line.get_color(), line.get_linestyle(), line.get_linewidth()) for line in scene.lines}
    assert len(styles) == len(scene.lines)
    tower = draw_tower(read)
    assert tower is not None
    assert [line.get_label() for axis in tower.axes for line in axis.lines] == [
        "shape", "character 1", "row", "partner word", "shape",
    ]  # fmt: skip


def test_files_of_the_same_log_are_the_same(log: Path, tmp_path: Path) -> None:
    (tmp_path / "again").mkdir()
    first, again = (write(read_log(log), folder) for folder in (tmp_path, tmp_path / "again"))
    assert [path.name for path in first] == ["tower.png", "answers.png", "loss.png"]
    for one, other in zip(first, again, strict=True):
        assert one.read_bytes() == other.read_bytes()
        with Image.open(one) as picture:
            assert picture.width == 1620
            assert 400 < picture.height < 1400
            assert len(picture.convert("RGB").getcolors(1 << 20) or []) > 20
        assert 10_000 < one.stat().st_size < 400_000


def test_runs_that_went_on_stand_behind_each_other(log: Path) -> None:
    one = read_log(log)
    two = joined([one, one])
    for name in ("vision", "language", "exact", "wrong_picture"):
        stage = one.vision if name == "vision" else one.language
        points, last = getattr(one, name), stage[-1].seen
        assert [p.seen for p in getattr(two, name)] == [p.seen for p in points] + [last + p.seen for p in points]
        assert [p.figures for p in getattr(two, name)] == 2 * [p.figures for p in points]
    assert joined([one]) == one


def test_a_run_in_its_first_stage(tmp_path: Path) -> None:
    """And one whose last line is being written."""
    path = write_log(tmp_path / "log", a_run()[:3])
    with open(path, "a") as file:
        file.write('{"stage": "vision", "st')
    assert [path.name for path in write(read_log(path), tmp_path)] == ["tower.png", "loss.png"]


@pytest.mark.parametrize(
    "lines",
    [[{"stage": "vision", "step": 1, **FIGURES}], [opening(), {"stage": "third", "step": 1}]],
    ids=["no recipe", "unknown stage"],
)
def test_logs_that_cannot_be_read(tmp_path: Path, lines: list[dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match=r"log:\d: expected one of"):
        read_log(write_log(tmp_path / "log", lines))


def test_the_command(log: Path, tmp_path: Path) -> None:
    script = str(ROOT / "benchmarks" / "world" / "curves.py")
    done = subprocess.run([sys.executable, script, str(log), "--out", str(tmp_path / "new")], check=True)
    assert done.returncode == 0
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"tower.png", "answers.png", "loss.png"}
    empty = write_log(tmp_path / "empty", [opening()])
    done = subprocess.run(
        [sys.executable, script, str(empty), "--out", str(tmp_path)], capture_output=True, check=False
    )
    assert done.returncode == 1
    assert b"expected steps of a stage" in done.stderr
