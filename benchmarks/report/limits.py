"""Why pruning costs what it costs: the ranking, the budget, the reading, the places of what is left."""

from __future__ import annotations

from pathlib import Path

from report.drawing import drawn, looks
from report.markdown import figure, interval, percent, points, table
from report.measured import Row, command_of, read

SOURCE = "limits_demo.json"
COMMAND = (
    "python benchmarks/accuracy/limits.py --model demo --questions 1000 --processes 2 "
    "--out benchmarks/results/limits_demo.json"
)
LOSERS = 8  # types of question that the page names
COUNTING = ("scene", "count_all")
PLOTTED = ("SparseVILA", "SparseVILA, gaps closed", "knows the drawing", "knows the question", "dice")


def section(results: Path, figures: Path) -> str:
    data = read(results, SOURCE, COMMAND)
    _draw(data, figures / "limits.png")
    arguments = data["arguments"]
    kinds = sorted({row["kind"] for row in data["rows"]} - {"all"})
    rows = {(row["hand"], row["kind"]): row for row in data["rows"]}
    hands = list(dict.fromkeys(row["hand"] for row in data["rows"]))
    whole = [
        (
            hand,
            interval(rows[hand, "all"]),
            "" if hand == "dense" else points(rows[hand, "all"]["difference"]),
            *("" if hand == "dense" else points(rows[hand, kind]["difference"]) for kind in kinds),
            percent(rows[hand, "all"]["kept_of_needed"]),
        )
        for hand in hands
    ]
    stayed = {(row["hand"], row["stayed"]): row for row in data["by_kept"]}
    ways = list(dict.fromkeys(row["stayed"] for row in data["by_kept"]))

    def cell(hand: str, way: str) -> str:
        row = stayed.get((hand, way))
        return "" if row is None else f"{percent(row['accuracy'])} / {percent(row['dense'])} ({row['n']})"

    by_kept = [(hand, *(cell(hand, way) for way in ways)) for hand in hands if hand != "dense"]
    lead = (
        f"Every question by itself ({rows['dense', 'all']['n']}), {arguments['prefill']:.0%} of the encoder's tokens "
        f"pruned and {arguments['decode']:.0%} of the rest not read in decode, by several hands: SparseVILA; the same "
        "with survivors moved up to close the gaps; either half alone; one that knows what is drawn and keeps ink "
        "first; one that knows what is asked and keeps what the answer needs first; dice. Differences to dense in "
        "percentage points with 95 % intervals, by kind of picture. *Needed that stayed*: of the tokens that show what "
        "the answer needs, in the finest view."
    )
    head = ("hand", "right, %", "points", *kinds, "needed that stayed, %")
    found = "\n".join(f"- {line}" for line in _conclusions(rows, stayed, kinds))
    more = (
        "By how much of what a question needs entered the language model: right, in percent, beside dense on the same "
        "questions, and how many they are."
    )
    return "\n\n".join(
        [
            f"## Why pruning costs what it costs\n\n{lead}",
            table(head, whole),
            found,
            f"{more}\n\n{table(('hand', *ways), by_kept)}",
            _types(data),
            figure("limits.png", "Right answers by the share of the picture that carries ink"),
            command_of(data),
        ]
    )


def _types(data: Row) -> str:
    """The types of question that most of SparseVILA's loss is in, and how its answers to a count go wrong."""
    own = [row for row in data["by_type"] if row["hand"] == "SparseVILA"]
    asked = sum(row["n"] for row in own)

    def lost(row: Row) -> float:
        return float(-100 * row["n"] * row["difference"]["mean"] / asked)

    worst = sorted(own, key=lost, reverse=True)[:LOSERS]
    lines = []
    for row in worst:
        shares = percent(row["dense"]), percent(row["accuracy"])
        lines.append((f"{row['kind']} {row['type']}", str(row["n"]), *shares, f"{lost(row):.1f}"))
    lead = (
        f"Of the {sum(map(lost, own)):.1f} points that SparseVILA loses, {sum(map(lost, worst)):.1f} are in "
        f"{len(worst)} of {len(own)} types of question:"
    )
    made = table(("type", "n", "dense, %", "SparseVILA, %", "points of the whole"), lines)
    counts = {row["hand"]: row for row in data["counts"] if (row["kind"], row["type"]) == COUNTING}
    told = ", ".join(
        f"{hand} {row['high']} too high and {row['low']} too low of {row['n']}"
        for hand in ("dense", "SparseVILA, prefill alone", "dice")
        if (row := counts.get(hand))
    )
    counted = (
        f"How many shapes a scene has: {told}. So errs who tells a number by the *share* of tokens that show "
        "something, where only empty ones are taken away; the cause inside the model was not looked for."
    )
    return f"{lead}\n\n{made}\n\n{counted}"


def _conclusions(rows: dict[tuple[str, str], Row], stayed: dict[tuple[str, str], Row], kinds: list[str]) -> list[str]:
    """What the figures say, in words that follow from them."""

    def loss(hand: str, kind: str = "all") -> float:
        return -100 * rows[hand, kind]["difference"]["mean"]

    worst = max(kinds, key=lambda kind: loss("SparseVILA", kind))
    return [
        f"**Places**: closing the gaps costs {loss('SparseVILA, gaps closed') - loss('SparseVILA'):.1f} points more.",
        f"**Ranking**: who knows the question loses {loss('knows the question'):.1f} points at the same counts, "
        f"SparseVILA {loss('SparseVILA'):.1f}, dice {loss('dice'):.1f}.",
        f"**Budget**: who knows the drawing but not the question loses {loss('knows the drawing'):.1f} points; on a "
        f"{worst}, {loss('knows the drawing', worst):.1f} where SparseVILA loses {loss('SparseVILA', worst):.1f}: "
        "where more is drawn than may stay, no ranking without the question can keep what will be asked.",
        f"**Halves**: prefill alone costs {loss('SparseVILA, prefill alone'):.1f} points, decode alone "
        f"{loss('SparseVILA, decode alone'):.1f}.",
    ]


def _draw(data: Row, path: Path) -> None:
    with drawn(path, 1, 3.4) as (_, (axis,)):
        dense = {row["ink_from"]: row for row in data["by_ink"] if row["hand"] == "dense"}
        places = [100 * row["ink"] for row in dense.values()]
        axis.plot(places, [100 * row["accuracy"] for row in dense.values()], color="0.4", linewidth=1.5, label="dense")
        for hand, look in looks(PLOTTED).items():
            found = [row for row in data["by_ink"] if row["hand"] == hand]
            axis.plot(
                [100 * row["ink"] for row in found],
                [100 * row["accuracy"] for row in found],
                color=look.colour, marker=look.marker, linestyle=look.dashes, markersize=5, linewidth=1.2, label=hand,
            )  # fmt: skip
        kept = 100 * (1 - data["arguments"]["prefill"])
        axis.axvline(kept, color="0.7", linewidth=0.8)
        axis.text(kept, 2, " what may stay", color="0.4", fontsize=8)
        axis.set_ylim(0, 100)
        axis.set_xlabel("tokens of the picture that carry ink, %")
        axis.set_ylabel("right answers, %")
        axis.legend(frameon=False, fontsize=8.5, loc="center left", bbox_to_anchor=(1.01, 0.5))
