"""SparseVILA's switches, each against the default on the same questions."""

from __future__ import annotations

from pathlib import Path

from report.drawing import COLOURS, drawn
from report.markdown import figure, interval, points, table
from report.measured import Row, command_of, read

SOURCE = "accuracy_demo_switches.json"
BASE = "sparsevila:0.6/0.75"
SWITCHES = (
    "budgets=mass", "score_layers=middle", "sets=per_kv_head", "sinks=4", "refresh=4", "refresh=16", "diversity=0.5",
    "diversity=0.75", "rerotate=on", "positions=contiguous", "global",
)  # fmt: skip
COMMAND = (
    "python benchmarks/accuracy/run.py --model demo --questions 1200 --processes 2 --protocols single --pictures own "
    f"--fresh 0 --settings {BASE} {' '.join(f'{BASE}:{switch}' for switch in SWITCHES)} "
    "--out benchmarks/results/accuracy_demo_switches.json"
)


def section(results: Path, figures: Path) -> str:
    data = read(results, SOURCE, COMMAND)
    found = against(data)
    if not found:
        raise ValueError(f"{SOURCE}: expected settings that are {BASE} with switches, got none")
    _draw(found, figures / "switches.png")
    whole = {row["setting"]: row for row in data["rows"] if row["by"] == "all" and row["picture"] == "own"}
    costs = {row["setting"]: row for row in data["costs"] if row["by"] == "all"}
    agreed = {row["setting"]: row for row in data["agreement"] if row["by"] == "all"}

    def line(name: str, differences: tuple[str, str]) -> tuple[str, ...]:
        cost, kl = costs[name], f"{agreed[name]['kl']:.4f}" if name in agreed else ""
        spent = 1e3 * (cost["retrieval_s"] + cost["decode_s"])
        shown = name.removeprefix(BASE + ":")
        return (f"`{shown}`", interval(whole[name]), *differences, kl, f"{cost['visual_active']:.1f}", f"{spent:.2f}")

    rows = [line(BASE, ("", ""))]
    rows += [line(name, (points(groups["all"]), points(groups["long"]))) for name, groups in found.items()]
    lead = (
        f"Each switch beside `{BASE}`, which has none: right answers, and differences in percentage points on the same "
        f"questions ({whole[BASE]['n']}), with 95 % intervals. Long questions ask for lists: there alone can decode "
        "sparsity change an answer beyond its first token. *KL*: of the next token's distribution against dense "
        "decoding over what the same setting's prefill kept, from the second token on."
    )
    head = (
        "switch", "right, %", "points", "points, long", "KL, nats", "visual tokens read", "retrieval and decode, ms"
    )  # fmt: skip
    text = [f"## Switches\n\n{lead}", table(head, rows), figure("switches.png", "Differences with their intervals")]
    return "\n\n".join([*text, verdict(found), command_of(data)])


def verdict(found: dict[str, dict[str, Row]]) -> str:
    """Which switches help, cost or do neither, by the intervals of the differences over all questions."""
    gaps = {name.removeprefix(f"{BASE}:"): groups["all"] for name, groups in found.items()}
    helps = [name for name, gap in gaps.items() if gap["low"] > 0]
    costs = [name for name, gap in gaps.items() if gap["high"] < 0]
    others = [name for name in gaps if name not in (*helps, *costs)]
    told = {"more right": helps, "fewer right": costs, "not told apart": others}
    parts = [f"{what}: {', '.join(f'`{name}`' for name in names)}" for what, names in told.items() if names]
    return (
        f"By their intervals, {'; '.join(parts)}. All stay off unless asked for: what helps one small model is no "
        "default for others."
    )


def against(data: Row) -> dict[str, dict[str, Row]]:
    """Differences to the setting without switches: setting -> group ("all", "long", ...) -> row."""
    found: dict[str, dict[str, Row]] = {}
    for row in data["paired"]:
        if (
            row["against"] == BASE
            and row["setting"].startswith(f"{BASE}:")
            and row["protocol"] == row["against_protocol"]
        ):
            found.setdefault(row["setting"], {})[row["group"]] = row
    return found


def _draw(found: dict[str, dict[str, Row]], path: Path) -> None:
    with drawn(path, 1, 1.2 + 0.4 * len(found)) as (_, (axis,)):
        names = [name.removeprefix(f"{BASE}:") for name in found]
        for offset, (group, marker) in enumerate((("all", "o"), ("long", "s"))):
            rows = [groups[group] for groups in found.values()]
            mean = [100 * row["mean"] for row in rows]
            error = (
                [100 * (row["mean"] - row["low"]) for row in rows],
                [100 * (row["high"] - row["mean"]) for row in rows],
            )
            places = [i + 0.3 * (offset - 0.5) for i in range(len(rows))]
            label = "all questions" if group == "all" else "long questions"
            axis.errorbar(
                mean, places, xerr=error, fmt=marker, color=COLOURS[offset], capsize=2, markersize=5, label=label
            )
        axis.axvline(0, color="0.4", linewidth=0.8)
        axis.set_yticks(range(len(names)), names)
        axis.invert_yaxis()
        axis.set_xlabel(f"percentage points against {BASE}")
        axis.legend(frameon=False, fontsize=8.5)
