"""Sections of docs/results.md about causes: limits, the greedy oracle, leakage, what retrieval reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from report import findings, functional, greedy, leakage, limits
from report.measured import MissingMeasurement

PLACE = {"commit": "0123456789abcdef", "dirty": False, "torch": "2.13.0", "cpu": "Some CPU", "command": "python one.py"}


def difference(mean: float) -> dict[str, float]:
    return {"mean": mean, "low": mean - 0.05, "high": mean + 0.05}


def figures_of(right: float, dense: float = 0.8, n: int = 50) -> dict:
    made = {"n": n, "accuracy": right, "low": right - 0.1, "high": right + 0.1, "dense": dense}
    return made | {"difference": difference(right - dense), "kept_of_needed": 0.5, "ink": 0.3}


HANDS = {
    "dense": 0.8, "SparseVILA": 0.6, "SparseVILA, gaps closed": 0.5, "SparseVILA, prefill alone": 0.65,
    "SparseVILA, decode alone": 0.78, "knows the drawing": 0.62, "knows the question": 0.79, "dice": 0.3,
}  # fmt: skip
LIMITS = {
    "environment": PLACE,
    "arguments": {"prefill": 0.6, "decode": 0.75},
    "rows": [
        {"hand": hand, "kind": kind, **figures_of(right - 0.2 * (kind == "page" and hand != "dense"))}
        for hand, right in HANDS.items()
        for kind in ("all", "page", "scene")
    ],
    "by_ink": [
        {"hand": hand, "ink_from": low, "ink_to": low + 0.2, **figures_of(right)}
        for hand, right in HANDS.items()
        for low in (0.2, 0.4)
    ],
    "by_type": [
        {"hand": hand, "kind": "scene", "type": type, **figures_of(right if type == "count_all" else 0.8)}
        for hand, right in HANDS.items()
        for type in ("count_all", "colour_of")
    ],
    "counts": [
        {"hand": hand, "kind": "scene", "type": "count_all", "n": 19, "low": 6, "high": high}
        for hand, high in (("dense", 2), ("SparseVILA, prefill alone", 18), ("dice", 1))
    ],
    "by_kept": [{"hand": hand, "stayed": "all of it", **figures_of(right)} for hand, right in HANDS.items()],
}
GREEDY = {
    "environment": PLACE,
    "arguments": {"samples": 7, "layout": "scene 128x128", "removed": 0.9},
    "group": 4,
    "rows": [
        {
            "setting": setting, "questions": which, "n": 7, "accuracy": right, "low": 0.1, "high": 0.9, "active": 32,
            "greedy_minus_this": difference(0.25),
        }
        for setting, first, later in (("greedy oracle", 0.95, 0.4), ("dense", 0.8, 0.85))
        for which, right in (("first", first), ("later", later))
    ],
}  # fmt: skip
TASK = {"setting": "dense", "picture": "none", "by": "all", "group": "all"}
LEAKAGE = {
    "environment": PLACE,
    "rows": [TASK | {"protocol": "history", "accuracy": 0.21}, TASK | {"protocol": "single", "accuracy": 0.5}],
    "paired": [
        TASK | {"protocol": "history", "against": "dense", "against_protocol": "single", "n": 70, **difference(0.02)},
        TASK | {"protocol": "history", "against": "other", "against_protocol": "history", "n": 70, **difference(0.9)},
    ],
}
FUNCTIONAL = {
    "environment": PLACE,
    "arguments": {"prefill": 0.6, "decode": 0.75},
    "turns": 12,
    "rows": [
        {
            "kind": kind, "layer": layer, "dialogues": 3, "read": 0.25, "jaccard": 0.4 + 0.1 * layer,
            "jaccard_by_chance": 0.14, "sinks": 0.1, "retrieval": 0.3 + 0.05 * layer, "recovered": 0.7, "needed": 0.6,
            "ink_sinks": None, "ink_retrieval": 0.5, "ink_store": 0.4,
        }
        for kind in ("all", "scene")
        for layer in (0, 1)
    ],
    "example": {
        "kind": "scene", "seed": 5, "options": {}, "questions": ["one?", "two?", "three?"],
        "frames": [0, 0], "boxes": [[0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1]], "sinks": [[0], [0]],
        "read": [[[0], [0, 1]]] * 3,
    },
}  # fmt: skip


def made(section, data: dict, folder: Path) -> str:
    (folder / section.SOURCE).write_text(json.dumps(data))
    text = section.section(folder, folder / "figures")
    assert "    python one.py" in text
    return text


def test_limits(tmp_path):
    text = made(limits, LIMITS, tmp_path)
    assert "closing the gaps costs 10.0 points more" in text
    assert "who knows the question loses 1.0 points at the same counts, SparseVILA 20.0, dice 50.0" in text
    assert "on a page, 38.0 where SparseVILA loses 40.0" in text
    assert "prefill alone costs 15.0 points, decode alone 2.0" in text
    assert "| knows the question | 79.0 [69.0, 89.0] | -1.0 [-6.0, +4.0] |" in text
    assert "| dice | 30.0 / 80.0 (50) |" in text
    assert "| scene count_all | 50 | 80.0 | 60.0 | 10.0 |" in text
    assert "Of the 10.0 points that SparseVILA loses, 10.0 are in 2 of 2 types" in text
    assert "SparseVILA, prefill alone 18 too high and 6 too low of 19" in text
    assert (tmp_path / "figures" / "limits.png").stat().st_size > 10_000


def test_greedy(tmp_path):
    text = made(greedy, GREEDY, tmp_path)
    assert "answers its own question at 95 % answers the others (7) at 40 %" in text
    assert "| `dense` | 32 | 80.0 [10.0, 90.0] | +25.0 [+20.0, +30.0] | 85.0" in text
    assert "until 10% of all are" in text


def test_leakage(tmp_path):
    text = made(leakage, LEAKAGE, tmp_path)
    assert "| `dense` | not shown | 70 | 19.0 | 21.0 | +2.0 [-3.0, +7.0] |" in text
    assert "+90" not in text


def test_functional(tmp_path):
    text = made(functional, FUNCTIONAL, tmp_path)
    assert "| 1 | 0.50 | 10.0 | 35.0 | 70.0 | 60.0 |  | 50.0 |" in text
    assert "at layer 1, turn by turn" in text
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {"functional.png", "tokens.png"}


def comparison(protocol: str, against: str, group: tuple[str, str], mean: float) -> dict:
    made = {"setting": "sparsevila:0.6/0.75", "protocol": protocol, "picture": "own", "against": against}
    made |= {"against_protocol": protocol, "by": group[0], "group": group[1], "n": 90}
    return made | difference(mean)


def test_findings(tmp_path):
    everything, scenes = ("all", "all"), ("kind", "scene")
    accuracy = {
        "environment": PLACE,
        "paired": [
            comparison("single", "dense", everything, -0.005),
            comparison("single", "dense", scenes, 0.01),
            comparison("history", "dense", everything, -0.2),
            comparison("history", "dense", scenes, -0.3),
            comparison("single", "random:0.6/0.75", everything, 0.15),
        ],
    }
    asked = {"budget": "active=sparsevila:0.6/0.75", "setting": "some"}
    equal = {
        "environment": PLACE,
        "rows": [
            asked | {"method": "dense", "against_ours": {"later": difference(0.4)}},
            asked | {"method": "sparsevila", "answers": {"later": {"accuracy": 0.61}}},
            asked | {"method": "fastv", "against_ours": {"later": difference(-0.2)}},
            asked | {"method": "visionzip", "against_ours": {"later": difference(0.01)}},
        ],
    }
    (tmp_path / findings.SOURCES["accuracy"]).write_text(json.dumps(accuracy))
    (tmp_path / findings.SOURCES["all"]).write_text(json.dumps(equal))
    (tmp_path / findings.SOURCES["active"]).write_text(json.dumps({"rows": []}))
    text = findings.section(tmp_path, tmp_path)
    assert "-0.5 [-5.5, +4.5] points on 90 questions, each by itself; scenes +1.0 [-4.0, +6.0]." in text
    assert text.count("is met.") == text.count("is missed.") == 1
    assert "**Against dice** at the same counts: +15.0" in text
    assert "SparseVILA answers 61.0 % of later turns" in text
    assert "fewer right than SparseVILA: fastv; not told apart: visionzip" in text


@pytest.mark.parametrize("section", [limits, greedy, leakage, functional])
def test_what_is_missing_says_how_to_make_it(section, tmp_path):
    with pytest.raises(MissingMeasurement, match=r"python benchmarks/accuracy/\w+\.py --model demo"):
        section.section(tmp_path, tmp_path)
    assert section.SOURCE in section.COMMAND
