"""Learning curves of a training run, from its log.

    python benchmarks/world/curves.py LOG.jsonl [LOG.jsonl ...] --out docs/demo-model

Writes tower.png (accuracy of each label over tiles seen), answers.png (exact match over pictures and clips seen, with
the right picture and with a neighbour's) and loss.png; what the log has nothing for is left out. The same log gives the
same files. A log may hold several parts of one run, each opened by a line with its recipe; a step that comes twice
counts as it came last. Several logs are runs that each began with what the one before had exported: their curves are
drawn one behind the other.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STAGES = ("vision", "language")
EVALUATIONS = ("exact", "wrong_picture")
BESIDE_LABELS = ("stage", "step", "loss", "per_s", "token_accuracy")
WIDTH, DPI = 9.0, 180  # inches, dots per inch: twice the width of a README, for sharp screens
# Okabe and Ito's colours, which colour-blind readers can tell apart, without the yellow that is lost on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", ":", "-.")
PARTNERED = ("partner_", "row", "column")
# Per kind the types that tell most: from one thing seen to a list of everything.
TELLING = {
    "scene": ("colour_of", "where_is", "read_code", "count_all", "describe"),
    "page": ("read_label", "read_number", "read_code", "larger", "list_column"),
    "clip": ("first", "after", "direction", "needle_number", "tell"),
}
Curve = tuple[list[float], list[float]]  # samples seen, value


@dataclass(frozen=True)
class Point:
    """The figures of one line of the log."""

    seen: int  # tiles in the vision stage, pictures and clips in the language stage
    figures: Mapping[str, Any]


@dataclass(frozen=True)
class Log:
    """A run, each list in the order of its steps."""

    vision: Sequence[Point]
    language: Sequence[Point]
    exact: Sequence[Point]  # share of whole answers by kind and type, on validation samples
    wrong_picture: Sequence[Point]  # the same when another sample's picture is shown


def read_log(path: Path) -> Log:
    """Raises ValueError for a line of no stage or without a recipe before it. A last line that is still being written
    is left out."""
    recipe: dict[str, Any] = {}
    found: dict[str, dict[int, Point]] = {name: {} for name in (*STAGES, *EVALUATIONS)}
    for number, text in enumerate(path.read_text().splitlines(keepends=True), 1):
        if not text.endswith("\n"):
            continue
        line = json.loads(text)
        if "recipe" in line:
            recipe = line["recipe"]
            continue
        stage = line.get("stage")
        if stage not in STAGES or f"{stage}_batch" not in recipe:
            raise ValueError(f"{path}:{number}: expected one of {STAGES} behind a recipe, got stage {stage!r}")
        samples = recipe[f"{stage}_batch"] * recipe.get(f"{stage}_batches", 1)
        seen, evaluations = line["step"] * samples, [name for name in EVALUATIONS if name in line]
        for name in evaluations:
            found[name][line["step"]] = Point(seen, line[name])
        if not evaluations:
            found[stage][line["step"]] = Point(seen, line)
    return Log(**{name: [points[step] for step in sorted(points)] for name, points in found.items()})


def joined(logs: Sequence[Log]) -> Log:
    """One log of runs that each went on from the one before: samples count on, stage by stage."""
    whole: dict[str, list[Point]] = {field.name: [] for field in fields(Log)}
    seen = {"vision": 0, "language": 0}
    for log in logs:
        for name, points in whole.items():
            before = seen["vision" if name == "vision" else "language"]
            points += [replace(point, seen=before + point.seen) for point in getattr(log, name)]
        for stage in STAGES:
            seen[stage] = max([seen[stage], *(point.seen for point in whole[stage])])
    return Log(**whole)


def curves(points: Sequence[Point], names: Iterable[str]) -> dict[str, Curve]:
    """One curve per name that occurs; a point without it is left out."""
    found = {}
    for name in names:
        some = [(point.seen, point.figures[name]) for point in points if name in point.figures]
        if some:
            found[name] = ([float(seen) for seen, _ in some], [float(value) for _, value in some])
    return found


def labels(points: Sequence[Point]) -> dict[str, list[str]]:
    """The labels of the tower by panel, in the order of the log: no label is left out."""
    names = {name: None for point in points for name in point.figures if name not in BESIDE_LABELS}
    panels: dict[str, list[str]] = {"patches: what is there": [], "patches: where, beside what": [], "whole tile": []}
    here, beside, whole = panels.values()
    for name in names:
        (whole if name.startswith("whole_") else beside if name.startswith(PARTNERED) else here).append(name)
    return panels


def mean_over_types(points: Sequence[Point], kind: str) -> Curve:
    """Mean of all types of a kind; every type counts the same."""
    found: Curve = ([], [])
    for point in points:
        values = [value for name, value in point.figures.items() if name.startswith(f"{kind}_")]
        if values:
            found[0].append(float(point.seen))
            found[1].append(sum(values) / len(values))
    return found


# Pictures


def draw_tower(log: Log) -> Figure | None:
    """Accuracy of each label, on the batches trained on; patches count where the label is not "nothing"."""
    panels = labels(log.vision)
    if not log.vision:
        return None
    figure, axes = _panels(1, len(panels), height=3.8)
    for axis, (title, names) in zip(axes[0], panels.items(), strict=True):
        _draw(axis, curves(log.vision, names), prefix="whole_")
        _percent(axis, "tiles seen")
        _legend(axis)
        axis.set_title(title)
    axes[0][0].set_ylabel("accuracy")
    return figure


def draw_answers(log: Log) -> Figure | None:
    """A column per kind: above with the sample's own picture, below with another one's."""
    if not log.exact:
        return None
    figure, axes = _panels(2, len(TELLING), height=6.0, heights=(2, 1))
    for column, (kind, types) in enumerate(TELLING.items()):
        above, below = axes[0][column], axes[1][column]
        for axis, points in ((above, log.exact), (below, log.wrong_picture)):
            _draw(axis, curves(points, [f"{kind}_{name}" for name in types]), prefix=f"{kind}_")
            axis.plot(*mean_over_types(points, kind), color="black", linewidth=2.4, label="mean over all types")
            _percent(axis, "pictures or clips seen" if axis is below else "")
        _legend(below)
        above.set_title(kind)
    axes[0][0].set_ylabel("exact match")
    axes[1][0].set_ylabel("another sample's picture")
    return figure


def draw_loss(log: Log) -> Figure | None:
    """The training loss of both stages."""
    parts = {"tower, tiles seen": log.vision, "language model, pictures or clips seen": log.language}
    parts = {title: points for title, points in parts.items() if points}
    if not parts:
        return None
    figure, axes = _panels(1, len(parts), height=2.8)
    for axis, (title, points) in zip(axes[0], parts.items(), strict=True):
        _draw(axis, curves(points, ["loss"]))
        _decades(axis)
        _plain(axis, title)
    axes[0][0].set_ylabel("loss")
    return figure


def _panels(rows: int, columns: int, *, height: float, heights: Sequence[int] = ()) -> tuple[Figure, list[list[Axes]]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, height_ratios=heights or None, sharex="col")
    return figure, [list(row) for row in axes]


def _draw(axis: Axes, found: Mapping[str, Curve], prefix: str = "") -> None:
    """Curves told apart by colour and by dashes; `prefix` is not part of what they are called."""
    for i, (name, (seen, values)) in enumerate(found.items()):
        colour, dashes = COLOURS[i % len(COLOURS)], DASHES[i % len(DASHES)]
        axis.plot(seen, values, color=colour, linestyle=dashes, linewidth=1.3, label=_spoken(name, prefix))


def _spoken(name: str, prefix: str) -> str:
    """`whole_shape` is called shape, and `character0` is the first character of a patch."""
    name = name.removeprefix(prefix).replace("_", " ")
    return f"character {int(name[-1]) + 1}" if name[-1].isdigit() else name


def _legend(axis: Axes) -> None:
    """Under the axis and its label, where no curve is hidden."""
    axis.legend(fontsize=7.5, ncol=2, loc="upper center", bbox_to_anchor=(0.5, 0), borderaxespad=4.6, frameon=False)


def _percent(axis: Axes, unit: str) -> None:
    from matplotlib.ticker import PercentFormatter

    axis.set_ylim(-0.02, 1.02)
    axis.yaxis.set_major_formatter(PercentFormatter(1))
    _plain(axis, unit)


def _decades(axis: Axes) -> None:
    """A logarithmic axis with plain numbers."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def _plain(axis: Axes, unit: str) -> None:
    from matplotlib.ticker import EngFormatter

    axis.set_xlabel(unit)
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.grid(color="0.9", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)


def write(log: Log, folder: Path) -> list[Path]:
    """The pictures for which the log has something."""
    import matplotlib

    written = []
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever the reader's own settings are
        matplotlib.rcParams["font.size"] = 9
        for name, draw in (("tower", draw_tower), ("answers", draw_answers), ("loss", draw_loss)):
            figure = draw(log)
            if figure is not None:
                written.append(folder / f"{name}.png")
                figure.savefig(written[-1], metadata={"Software": None})
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the learning curves of a training run.")
    parser.add_argument("logs", type=Path, nargs="+", metavar="LOG.jsonl")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    written = write(joined([read_log(path) for path in args.logs]), args.out)
    if not written:
        raise SystemExit(f"{args.logs[0]}: expected steps of a stage, got none yet")
    for path in written:
        print(path)


if __name__ == "__main__":
    main()
