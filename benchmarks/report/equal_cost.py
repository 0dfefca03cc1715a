"""Methods at the same cost, in tables: by what is held equal."""

from __future__ import annotations

from pathlib import Path

from report.accuracy_cost import COMMAND, SOURCE, dense_of
from report.markdown import interval, points, table
from report.measured import Row, command_of, read

TITLES = {
    "gflop": "Equal operations",
    "seconds": "Equal seconds on this CPU",
    "input": "Equal layer-averaged input tokens",
    "active": "Equal active tokens in decode",
}
UNITS = {"gflop": "GFLOP", "seconds": "s", "input": "visual tokens", "active": "visual tokens"}
NOTES = {
    "gflop": "Of a conversation, from the encoder to the last answer.",
    "seconds": "Of a conversation: encoding, prefill, retrieval and decoding, one thread, settings in turn, the "
    "fastest of several rounds. Settings are looked for on straight lines between measured ones, "
    "and what stands here was measured again.",
    "input": "Visual tokens that a layer prefills, mean over layers.",
    "active": "Visual tokens that a decode step reads, mean over layers and turns. It says nothing of prefill: "
    "SparseVILA prefills more than it reads.",
}


ACTIVE = "active=sparsevila:0.3/0.5"
SOURCES = {"all": SOURCE, "active": "equal_active_demo.json"}
COMMANDS = {
    "all": COMMAND,
    # At a number of active tokens that methods can reach whose first layers see everything.
    "active": "python benchmarks/accuracy/equal.py --model demo --processes 2 --questions 1000 "
    f"--budgets {ACTIVE} --methods sparsevila/0.5 fastv pdrop sparsevlm sparsevlm+ visionzip prumerge+ sparsemm "
    "random/0.5 visionzip:positions=original --out benchmarks/results/equal_active_demo.json",
}


def section(results: Path, figures: Path) -> str:
    data = read(results, SOURCES["all"], COMMANDS["all"])
    more = read(results, SOURCES["active"], COMMANDS["active"])
    asked = sum(row["questions"] for row in data["layouts"])
    lead = (
        "Each method at the prefill sparsity at which it costs what the reference does; fractions in a setting are "
        f"those removed in prefill and decode. {asked} questions; *alone*: each by itself; *first* and *later turns*: "
        "the dialogue in one session, questions and answers forgotten. In brackets 95 % intervals; differences are "
        "percentage points on the same questions, intervals by bootstrap over samples. *dialogue costs*: later turns "
        "against the same questions alone; a method that prunes without the question gives the same ones, bit for bit. "
        "Intervals are of one comparison each, not of all of them together."
    )
    budgets = list(dict.fromkeys(row["budget"] for row in data["rows"]))
    parts = [f"## Methods at the same cost\n\n{lead}\n\n{command_of(data)}"]
    parts += [_budget(data, budget) for budget in budgets]
    return "\n\n".join([*parts, _budget(more, ACTIVE), command_of(more)])


def _budget(data: Row, budget: str) -> str:
    rows = [row for row in data["rows"] if row["budget"] == budget]
    measure, reference = budget.split("=")
    dense = _figure(dense_of(data), measure)
    target = _target(data, rows[0], measure, reference)
    what = f"`{reference}`" if ":" in reference else f"{float(reference):.0%} of dense"
    title = f"### {TITLES[measure]}: {what}, {target:.4g} {UNITS[measure]} ({target / dense:.0%} of dense)"
    head = (
        "method", "setting", UNITS[measure], "input tokens", "active tokens", "alone, %", "first turn, %",
        "later turns, %", "alone against SparseVILA", "later against SparseVILA", "dialogue costs",
    )  # fmt: skip
    prices = {one["setting"]: one for one in data["settings"]}
    body = table(head, [_line(row, measure, prices) for row in rows])
    return f"{title}\n\n{NOTES[measure]}\n\n{body}\n\n{verdict(rows)}"


def verdict(rows: list[Row]) -> str:
    """Which methods answer fewer, more or as many later turns as SparseVILA, by the intervals of the differences."""
    found = [(row["method"], row["against_ours"]["later"]) for row in rows if row.get("against_ours")]
    found = [(method, gap) for method, gap in found if method != "sparsevila"]
    fewer = [method for method, gap in found if gap["high"] < 0]
    more = [method for method, gap in found if gap["low"] > 0]
    open_ones = [method for method, _ in found if method not in (*fewer, *more)]
    groups = {"fewer right than SparseVILA": fewer, "more": more, "not told apart": open_ones}
    told = [f"{name}: {', '.join(methods)}" for name, methods in groups.items() if methods]
    return f"Later turns, {'; '.join(told)}." if told else "Nothing is compared with SparseVILA here."


def _target(data: Row, row: Row, measure: str, reference: str) -> float:
    """What the budget is. Of seconds, as they were measured again with the settings that were found."""
    if measure == "seconds" and ":" in reference:
        return _figure(next(one for one in data["settings"] if one["setting"] == reference), measure)
    return float(row["target"])


def _line(row: Row, measure: str, prices: dict[str, Row]) -> tuple[str, ...]:
    if row["setting"] is None:
        lacks = f"cannot: the least it takes is {row['figure']:.4g}"
        return (row["method"], lacks, *[""] * 9)
    price, answers, against = prices[row["setting"]], row["answers"], row["against_ours"]
    tokens = [f"{price['tokens'][name]:.1f}" for name in ("input", "active")]
    shares = [interval(answers[part]) for part in ("single", "first", "later")]
    is_ours = row["method"] == "sparsevila" or not against
    differences = ["", ""] if is_ours else [points(against["single"]), points(against["later"])]
    own = points(row["later_against_single"]) if row["asked_as_dialogue"] else "0: the same answers"
    return (
        row["method"], row["setting"].partition(":")[2], f"{_figure(price, measure):.4g}", *tokens, *shares,
        *differences, own,
    )  # fmt: skip


def _figure(price: Row, measure: str) -> float:
    if measure in ("gflop", "seconds"):
        return float(price[measure]["total"])
    return float(price["tokens"][measure])
