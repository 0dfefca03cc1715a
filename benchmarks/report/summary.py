"""What the README says of the results: a few lines, from the same JSON as the page."""

from __future__ import annotations

from pathlib import Path

from report.accuracy_cost import COMMAND, SOURCE, dense_of
from report.markdown import percent, points, table
from report.measured import Row, read

BEGIN, END = "<!-- made by benchmarks/report/page.py -->", "<!-- end of what page.py made -->"
SHOWN = (
    "dense", "sparsevila", "visionzip", "visionzip:positions=original", "sparsevlm+", "pdrop", "fastv", "random",
)  # fmt: skip


def block(results: Path) -> str:
    """The lines between the README's two marks: methods at the operations of the first budget."""
    data = read(results, SOURCE, COMMAND)
    budget = data["rows"][0]["budget"]
    if not budget.startswith("gflop="):
        raise ValueError(f"{SOURCE}: expected a first budget of operations, got {budget}")
    rows = {row["method"]: row for row in data["rows"] if row["budget"] == budget}
    part = rows["dense"]["target"] / dense_of(data)["gflop"]["total"]
    asked = sum(row["questions"] for row in data["layouts"])
    lead = (
        f"Methods at the same {part:.0%} of dense's operations, the encoder's among them; {asked} questions to the "
        "built-in model, right answers in percent. Later turns are of dialogues in one session, each question and "
        "answer forgotten; points are of those turns against SparseVILA, with 95 % intervals. "
        "[docs/results.md](docs/results.md) has all methods, equal tokens and equal time, and what is not shown."
    )
    head = ("method", "alone", "later turns", "points against SparseVILA")
    made = table(head, [_line(rows[name]) for name in SHOWN if name in rows])
    return f"{lead}\n\n{made}\n\n`{data['environment']['command']}`"


def _line(row: Row) -> tuple[str, ...]:
    if row["setting"] is None:
        return (row["method"], "cannot", "", "")
    answers = row["answers"]
    against = "" if row["method"] == "sparsevila" else points(row["against_ours"]["later"])
    return (
        f"`{row['setting']}`",
        percent(answers["single"]["accuracy"]),
        percent(answers["later"]["accuracy"]),
        against,
    )


def placed(readme: str, made: str) -> str:
    """A README with `made` between its marks. Raises ValueError unless each mark is there once, in order."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(BEGIN) > readme.index(END):
        raise ValueError(f"README: expected the lines {BEGIN} and {END} once each, in this order")
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n\n{made}\n\n{END}{rest.split(END)[1]}"
