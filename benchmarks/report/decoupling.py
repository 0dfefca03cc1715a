"""Prefill sparsity alone, decode sparsity alone and both, at the same end-to-end time."""

from __future__ import annotations

from pathlib import Path

from report.drawing import COLOURS, drawn
from report.markdown import figure, interval, percent, points, table
from report.measured import Row, command_of, read

SOURCE = "decoupling_demo.json"
COMMAND = (
    "python benchmarks/accuracy/decoupling.py --model demo --processes 2 --out benchmarks/results/decoupling_demo.json"
)
STAGES = ("encode", "prefill", "retrieval", "decode")
SLACK = 1.001  # for figures of six digits


def section(results: Path, figures: Path) -> str:
    data = read(results, SOURCE, COMMAND)
    rows = data["rows"]
    _draw(rows, figures / "decoupling.png")
    missed = [row for row in rows if not row["met"]]
    lead = (
        f"Clips of 32 frames and their long questions ({data['timed_clips']} clips timed, one thread, the fastest of "
        f"{data['arguments']['rounds']} rounds); right answers of {data['questions']} questions about "
        f"{data['arguments']['clips']} such clips, each by itself. Gains are dense over the setting: of encoder and "
        "prefill, of retrieval and decode, and end to end. *facts of lists*: F1 of the items of long answers, which "
        "are all that decode sparsity can change beyond an answer's first token."
    )
    head = (
        "", "setting", "encode, ms", "prefill", "retrieval", "decode", "end to end", "gain of prefill", "of decode",
        "end to end", "right, %", "against both", "facts of lists, %", "against both",
    )  # fmt: skip
    made = table(head, [_line(row, rows[0]) for row in rows])
    notes = [_beside(row, rows[-1]) for row in rows[1:-1] if row["met"]] + [_cannot(row, rows) for row in missed]
    text = [f"## Prefill, decode and both at the same time\n\n{lead}", made, *notes]
    text.append(figure("decoupling.png", "Seconds by stage: dense, prefill alone, decode alone, both"))
    return "\n\n".join([*text, command_of(data)])


def gains(dense: dict[str, float], sparse: dict[str, float]) -> dict[str, float]:
    """Dense over sparse: of encoder and prefill, of retrieval and decode, end to end.

    dense, sparse: seconds by stage and `total`. Raises ValueError where the end-to-end gain does not lie between those
    of its parts: then a stage is missing.
    """
    prefill = (dense["encode"] + dense["prefill"]) / (sparse["encode"] + sparse["prefill"])
    decode = (dense["retrieval"] + dense["decode"]) / (sparse["retrieval"] + sparse["decode"])
    whole = dense["total"] / sparse["total"]
    low, high = sorted((prefill, decode))
    if not low / SLACK <= whole <= high * SLACK:
        raise ValueError(
            f"expected an end-to-end gain from {low:.3f} to {high:.3f}, got {whole:.3f}: a stage is missing"
        )
    return {"prefill": prefill, "decode": decode, "end to end": whole}


def _line(row: Row, dense: Row) -> tuple[str, ...]:
    gained = gains(dense["seconds"], row["seconds"])
    times = [f"{1e3 * row['seconds'][stage]:.1f}" for stage in (*STAGES, "total")]
    setting = row["setting"] if row["met"] else f"{row['setting']}: cannot"
    is_both = row["name"] == "both"
    against, facts = ("", "") if is_both else (points(row["against_both"]), points(row["facts_against_both"]))
    return (
        row["name"], setting, *times, *(f"{gain:.2f}x" for gain in gained.values()),
        interval(row["answers"]["all"]), against, percent(row["facts"]), facts,
    )  # fmt: skip


def _beside(row: Row, both: Row) -> str:
    """How near the times came that were meant to be equal."""
    off = row["seconds"]["total"] / both["seconds"]["total"] - 1
    taken = f"{abs(off):.1%} {'less' if off < 0 else 'more'}"
    return f"*{row['name']}* was set to take as long as both; measured again it took {taken}."


def _cannot(row: Row, rows: list[Row]) -> str:
    both, dense, own = rows[-1]["seconds"], rows[0]["seconds"], row["seconds"]
    read, share = row["tokens"]["active"] / rows[0]["tokens"]["active"], dense["decode"] / dense["total"]
    return (
        f"*{row['name']}* cannot reach the time of both ({1e3 * both['total']:.1f} ms): its strongest setting, "
        f"`{row['setting']}`, still takes {1e3 * own['total']:.1f} ms. Decoding is {share:.0%} of dense, and with "
        f"{read:.0%} of the visual entries read it keeps {own['decode'] / dense['decode']:.0%} of its time: in so "
        "small a model the rest is weights and calls, which no sparsity of tokens touches."
    )


def _draw(rows: list[Row], path: Path) -> None:
    with drawn(path, 1, 2.6) as (_, (axis,)):
        left = [0.0] * len(rows)
        names = [f"{row['name']}\n{row['setting'].partition(':')[2]}".strip() for row in rows]
        for stage, colour in zip(STAGES, COLOURS, strict=False):
            spent = [1e3 * row["seconds"][stage] for row in rows]
            axis.barh(names, spent, left=left, color=colour, label=stage, height=0.6)
            left = [before + more for before, more in zip(left, spent, strict=True)]
        axis.invert_yaxis()
        axis.set_xlabel("milliseconds of a clip and its long questions")
        axis.legend(frameon=False, ncol=4, loc="upper center", bbox_to_anchor=(0.5, 1.18), fontsize=8.5)
