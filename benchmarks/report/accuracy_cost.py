"""Right answers over cost, method by method: one question, and later turns."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from report.drawing import drawn, looks
from report.markdown import figure
from report.measured import Row, command_of, read

SOURCE = "equal_demo.json"
COMMAND = (
    "python benchmarks/accuracy/equal.py --model demo --processes 2 --questions 1000 "
    "--out benchmarks/results/equal_demo.json"
)
PANELS = {"single": "each question by itself", "later": "later turns of a dialogue"}


def section(results: Path, figures: Path) -> str:
    data = read(results, SOURCE, COMMAND)
    _draw(data, figures / "accuracy_cost.png")
    lead = (
        "Every point is a setting; a method's points are what the budgets below gave it, and dense stands at 100 %. "
        "A conversation is one picture, encoded once, and its dialogue; its cost counts encoder, projector, prefill, "
        "retrieval and decode (`benchmarks/accuracy/cost.py`), with answers as long as the true ones. *Later turns* "
        "are those after the first of a dialogue in one session, each question and answer forgotten, what a method "
        "pruned meanwhile not. Bars are 95 % intervals. Whatever is left of dense at the left end is the encoder, "
        "which sees all patches before anything is pruned."
    )
    name = "Right answers over the cost of a conversation, each question by itself and later turns"
    return f"## Right answers over cost\n\n{lead}\n\n{figure('accuracy_cost.png', name)}\n\n{command_of(data)}"


def by_method(data: Row) -> dict[str, list[Row]]:
    """Settings that were asked, with what they cost as a share of dense, cheapest first; dense is left out."""
    dense = dense_of(data)["gflop"]["total"]
    found: defaultdict[str, list[Row]] = defaultdict(list)
    for one in data["settings"]:
        if "answers" in one and one["setting"] != "dense":
            found[method_of(one["setting"])].append({**one, "share": one["gflop"]["total"] / dense})
    return {method: sorted(rows, key=lambda row: float(row["share"])) for method, rows in found.items()}


def method_of(setting: str) -> str:
    """A setting's method, with its switches."""
    method, _, rest = setting.partition(":")
    switches = rest.partition(":")[2]
    return f"{method}:{switches}" if switches else method


def dense_of(data: Row) -> Row:
    found: Row = next(one for one in data["settings"] if one["setting"] == "dense")
    return found


def _draw(data: Row, path: Path) -> None:
    from matplotlib.ticker import PercentFormatter

    methods, dense = by_method(data), dense_of(data)["answers"]
    style = looks(methods)
    with drawn(path, len(PANELS), 4.6, sharey=True) as (made, axes):
        for axis, (part, title) in zip(axes, PANELS.items(), strict=True):
            for method, rows in methods.items():
                shares = [row["share"] for row in rows]
                right = [row["answers"][part]["accuracy"] for row in rows]
                low = [row["answers"][part]["accuracy"] - row["answers"][part]["low"] for row in rows]
                high = [row["answers"][part]["high"] - row["answers"][part]["accuracy"] for row in rows]
                look = style[method]
                axis.errorbar(
                    shares, right, yerr=(low, high), color=look.colour, marker=look.marker, linestyle=look.dashes,
                    linewidth=1.3, markersize=5, elinewidth=0.7, capsize=2, label=method,
                )  # fmt: skip
            axis.plot([1.0], [dense[part]["accuracy"]], "k*", markersize=10, label="dense")
            axis.axhline(dense[part]["accuracy"], color="0.5", linewidth=0.8, linestyle=":")
            axis.set_title(title)
            axis.set_xlabel("operations of a conversation, share of dense")
            axis.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
            axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
            axis.set_ylim(0, 1)
        axes[0].set_ylabel("right answers")
        handles, labels = axes[0].get_legend_handles_labels()
        made.legend(handles, labels, loc="outside lower center", ncol=5, frameon=False, fontsize=8.5)
