"""The greedy oracle: what even ideal pruning for one question leaves the next ones."""

from __future__ import annotations

from pathlib import Path

from report.markdown import interval, points, table
from report.measured import Row, command_of, read

SOURCE = "greedy_demo.json"
COMMAND = (
    "python benchmarks/accuracy/greedy.py --model demo --samples 40 --processes 2 "
    "--out benchmarks/results/greedy_demo.json"
)


def section(results: Path, figures: Path) -> str:
    data = read(results, SOURCE, COMMAND)
    rows = {(row["setting"], row["questions"]): row for row in data["rows"]}
    names = list(dict.fromkeys(row["setting"] for row in data["rows"]))
    arguments = data["arguments"]
    lead = (
        f"For the first question of {arguments['samples']} dialogues ({arguments['layout']}), {data['group']} "
        "neighbouring tokens at a time are kept by the likelihood of the *true* answer, until "
        f"{1 - arguments['removed']:.0%} of all are: no method that prunes for a question can know more. Then the "
        "dialogue's other questions are asked over that set. *Against*: percentage points by which the greedy set is "
        "ahead, with 95 % intervals."
    )

    def line(name: str) -> tuple[str, ...]:
        first, later = rows[name, "first"], rows[name, "later"]
        against = tuple("" if name == names[0] else points(row["greedy_minus_this"]) for row in (first, later))
        return (f"`{name}`", f"{first['active']:.0f}", interval(first), against[0], interval(later), against[1])

    head = ("setting", "tokens read", "first question, %", "against", "later questions, %", "against")
    text = [f"## The best pruning for one question, and the next\n\n{lead}", table(head, map(line, names))]
    return "\n\n".join([*text, _said(rows, names), command_of(data)])


def _said(rows: dict[tuple[str, str], Row], names: list[str]) -> str:
    first, later = (100 * rows[names[0], which]["accuracy"] for which in ("first", "later"))
    count = rows[names[0], "later"]["n"]
    return (
        f"The set that answers its own question at {first:.0f} % answers the others ({count}) at {later:.0f} %: what "
        "matters to later turns is what was kept for them, not how well the first was served."
    )
