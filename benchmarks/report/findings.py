"""What the measurements say, in a few lines: every number and every verdict follows from the JSON."""

from __future__ import annotations

from pathlib import Path

from report import equal_cost, leakage
from report.markdown import percent, points
from report.measured import Row, read

SOURCES = {"accuracy": leakage.SOURCE, **equal_cost.SOURCES}
COMMANDS = {"accuracy": leakage.COMMAND, **equal_cost.COMMANDS}
DEFAULT, DICE = "sparsevila:0.6/0.75", "random:0.6/0.75"
AIM = 1.0  # percentage points that the default may lose against dense
NAMES = {"gflop": "operations", "seconds": "seconds", "input": "input tokens", "active": "active tokens"}


def section(results: Path, figures: Path) -> str:
    accuracy = read(results, SOURCES["accuracy"], COMMANDS["accuracy"])
    equal = [read(results, SOURCES[name], COMMANDS[name]) for name in equal_cost.SOURCES]
    lines = [_loss(accuracy, "single", "each by itself"), _loss(accuracy, "history", "in remembered dialogues")]
    lines += [_dice(accuracy), *(line for data in equal for line in _equal(data))]
    return "## What the measurements say\n\n" + "\n".join(f"- {line}" for line in lines)


def _paired(data: Row, protocol: str, against: str, group: tuple[str, str]) -> Row:
    wanted = {
        "setting": DEFAULT, "protocol": protocol, "picture": "own", "against": against, "against_protocol": protocol,
        "by": group[0], "group": group[1],
    }  # fmt: skip
    (row,) = [row for row in data["paired"] if all(row[name] == value for name, value in wanted.items())]
    return row


def _loss(data: Row, protocol: str, how: str) -> str:
    """How much the default loses against dense, by kind, and whether that is within the aim."""
    whole = _paired(data, protocol, "dense", ("all", "all"))
    kinds = sorted({row["group"] for row in data["paired"] if row["by"] == "kind"})
    parts = ", ".join(f"{kind}s {points(_paired(data, protocol, 'dense', ('kind', kind)))}" for kind in kinds)
    met = "met" if -100 * whole["mean"] <= AIM else "missed"
    return (
        f"**Against dense**: `{DEFAULT}` {points(whole)} points on {whole['n']} questions, {how}; {parts}. The aim of "
        f"at most {AIM:g} point is {met}."
    )


def _dice(data: Row) -> str:
    row = _paired(data, "single", DICE, ("all", "all"))
    return f"**Against dice** at the same counts: {points(row)} points."


def _equal(data: Row) -> list[str]:
    found = []
    for budget in dict.fromkeys(row["budget"] for row in data["rows"]):
        rows = [row for row in data["rows"] if row["budget"] == budget]
        measure, _, reference = budget.partition("=")
        ours = next((row for row in rows if row["method"] == "sparsevila" and row["setting"]), None)
        if ours is None:
            continue
        right = percent(ours["answers"]["later"]["accuracy"])
        told = equal_cost.verdict([row for row in rows if row["method"] != "dense"])
        found.append(
            f"**Equal {NAMES[measure]}** (those of `{reference}`): SparseVILA answers {right} % of later turns. {told}"
        )
    return found
