"""Transcripts of a student with random weights contain what they must, and its answers as they are."""

from __future__ import annotations

import html
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from world.show import percent, types_table
from world.splits import KINDS, PHRASES, TEST, make
from world.student import SHAPES, build, export
from world.train import make_tokenizer
from world.transcripts import SEEDS, TURNS, Turn, converse, document, markdown, shown, strip

from sparsevila import Engine
from sparsevila.engine.config import Result, Stats


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("student")
    export(build(SHAPES["small"], folder, make_tokenizer(per_kind=30)), folder)
    with Engine.load(folder, device="cpu", dtype="float32") as loaded:
        yield loaded


@pytest.fixture(scope="module")
def written(engine: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("document")
    return document(engine, "0123456789abcdef", folder / "transcripts.md"), folder


def rows(text: str) -> list[list[str]]:
    """The cells of every turn's row."""
    lines = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| question")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_seeds_are_held_out() -> None:
    assert SEEDS.keys() == KINDS.keys()
    assert all(seed in TEST for seed in SEEDS.values())


def test_every_turn_is_there_with_question_and_truth(written: tuple[str, Path]) -> None:
    text, _ = written
    found = rows(text)
    asked = [qa for kind, seed in SEEDS.items() for qa in make(kind, seed).dialogue[:TURNS]]
    assert [row[0] for row in found] == [qa.question for qa in asked]
    for row, qa in zip(found, asked, strict=True):
        assert row[2] in ("same", f"**wrong:** {qa.answer}")
        assert (row[2] == "same") == (html.unescape(row[1]) == qa.answer)
    right = sum(row[2] == "same" for row in found)
    assert f"{right} of {len(asked)} answers are right" in text
    assert "model 0123456789ab," in text


def test_costs_are_those_of_the_engine(written: tuple[str, Path]) -> None:
    """40 % of the tokens are kept, a quarter of these read; only a first turn runs the encoder."""
    found = rows(written[0])
    assert [row[3] for row in found] == 6 * ["320 > 128 > 32"] + 3 * ["256 > 96 > 24"]
    for i, row in enumerate(found):
        encode, prefill, decode = (float(re.fullmatch(r"(\d+\.\d) ms", cell)[1]) for cell in row[4:])  # type: ignore[index]
        assert (encode > 0) == (i % TURNS == 0)
        assert prefill > 0
        assert decode >= 0


def test_answers_are_the_engines_own(engine: Any, written: tuple[str, Path]) -> None:
    """The same session again gives the same words, and later turns know the earlier ones."""
    sample = make("page", SEEDS["page"])
    turns = converse(engine, sample)
    answers = [shown(turn.result.text) for turn in turns]
    assert answers == [row[1] for row in rows(written[0])[TURNS : 2 * TURNS]]
    assert turns[2].result.stats.cached_tokens > turns[1].result.stats.cached_tokens > 0
    assert turns[0].result.stats.prefill_sparsity == 0.60
    assert turns[0].result.stats.decode_sparsity == 0.75


def test_pictures_lie_beside_the_document(written: tuple[str, Path]) -> None:
    text, folder = written
    names = re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)
    assert names == [f"transcript-{kind}.png" for kind in SEEDS]
    for name, kind in zip(names, SEEDS, strict=True):
        with Image.open(folder / name) as picture:
            assert picture.size == {"clip": (8 * 196, 2 * 196)}.get(kind, (384, 384))


def test_a_clip_is_shown_frame_by_frame() -> None:
    sample = make("clip", TEST[3], frames=11)
    shown_pixels = strip(sample)
    assert shown_pixels.shape == (2 * 196, 8 * 196, 3)
    ninth = shown_pixels[196 + 2 : 196 + 2 + 192, 196 + 2 : 196 + 2 + 192]  # second row, second frame
    assert (ninth[1::3, 1::3] == sample.rgb[9]).all()
    assert (shown_pixels[196:, 3 * 196 :] == 255).all()
    still = make("scene", TEST[3])
    assert (strip(still) == np.kron(still.rgb[0], np.ones((3, 3, 1), dtype=np.uint8))).all()


def test_a_right_answer_is_told_from_a_wrong_one() -> None:
    sample = make("scene", TEST[0])
    qa = sample.dialogue[0]
    stats = Stats(visual_tokens_total=10, visual_tokens_kept=4, visual_tokens_active=1.0, decode_s=0.25)
    right, wrong = Turn(qa, Result(f" {qa.answer}", "stop", stats)), Turn(qa, Result(f"{qa.answer}s", "stop", stats))
    text = markdown(sample, [right, wrong], "x.png")
    assert rows(text)[0] == [qa.question, qa.answer, "same", "10 > 4 > 1", "0.0 ms", "0.0 ms", "250.0 ms"]
    assert rows(text)[1][1:3] == [f"{qa.answer}s", f"**wrong:** {qa.answer}"]
    assert not replace(wrong, result=Result("", "stop", stats)).is_right


@pytest.mark.parametrize("text", ["a | b", "**bold** `x` #1", "<b>&amp;</b>", "a\nb\x1a", "[x](y) \\ $z$"])
def test_no_answer_breaks_the_table(text: str) -> None:
    assert not set("|`*<>[]\n\x1a") & set(shown(text))
    assert html.unescape(shown(text)) == text.replace("\n", "\\n").replace("\x1a", "\\x1a")


def test_nothing_is_shown_as_nothing() -> None:
    assert shown(" ") == "(nothing)"


def test_the_table_of_types_has_them_all() -> None:
    table = types_table(samples=200).splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert [(row[0], row[1]) for row in cells] == [(kind, name) for kind in PHRASES for name in PHRASES[kind]]
    chances = {(row[0], row[1]): row[4] for row in cells}
    assert chances["scene", "exists"] == "50 %"
    assert chances["clip", "direction"] == "20 %"
    assert chances["page", "read_code"] == "< 1 %"
    assert chances["scene", "describe"] == "0 %"
    with pytest.raises(ValueError, match="expected it about one of 1 samples"):
        types_table(samples=1)


def test_percent_does_not_round_to_nothing() -> None:
    assert [percent(x) for x in (0, 0.004, 0.01, 0.126, 1)] == ["0 %", "< 1 %", "1 %", "13 %", "100 %"]
