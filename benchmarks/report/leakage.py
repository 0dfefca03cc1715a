"""What earlier turns' text gives away: the same questions asked alone and in a remembered dialogue."""

from __future__ import annotations

from pathlib import Path

from report.markdown import percent, points, table
from report.measured import Row, command_of, read

SOURCE = "accuracy_demo.json"
COMMAND = (
    "python benchmarks/accuracy/run.py --model demo --questions 2000 --processes 2 --settings dense "
    "sparsevila:0.6/0.75 sparsevila:0.75/0.9 random:0.6/0.75 random:0.75/0.9 "
    "--out benchmarks/results/accuracy_demo.json"
)
PICTURES = {"own": "shown", "none": "not shown"}


def section(results: Path, figures: Path) -> str:
    data = read(results, SOURCE, COMMAND)
    found = [
        row
        for row in data["paired"]
        if (row["setting"], row["protocol"], row["against_protocol"]) == (row["against"], "history", "single")
        and row["by"] == "all"
        and row["picture"] in PICTURES
    ]
    lead = (
        "The dialogues of the drawn world are made so that no answer follows from earlier turns. Whether that holds is "
        "measured: each question of a dialogue asked alone, and behind the turns before it with the model's own "
        "answers to them. Without the picture nothing but text can help. *Gain*: percentage points that the history "
        "brings, with 95 % intervals. Under partial eviction, the protocol of all comparisons above, there is no "
        "earlier text."
    )
    rows = [(*_names(row), str(row["n"]), *_shares(data, row), points(row)) for row in found]
    head = ("setting", "picture", "questions", "alone, %", "with history, %", "gain")
    return "\n\n".join([f"## What the history gives away\n\n{lead}", table(head, rows), command_of(data)])


def _names(row: Row) -> tuple[str, str]:
    return f"`{row['setting']}`", PICTURES[row["picture"]]


def _shares(data: Row, row: Row) -> tuple[str, str]:
    """Of the dialogues' questions: right alone, and with the history."""
    task = {name: row[name] for name in ("setting", "picture")}
    history = _accuracy(data, **task, protocol="history", by="all", group="all")
    return percent(history - row["mean"]), percent(history)


def _accuracy(data: Row, **fields: str) -> float:
    (row,) = [row for row in data["rows"] if all(row[name] == value for name, value in fields.items())]
    return float(row["accuracy"])
