"""What retrieval reads, layer by layer: sinks, retrieval tokens, overlap of turns."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from report.drawing import COLOURS, drawn
from report.markdown import figure, percent, table
from report.measured import Row, command_of, read
from world.splits import make

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SOURCE = "functional_demo.json"
COMMAND = (
    "python benchmarks/accuracy/functional.py --model demo --samples 60 --processes 2 "
    "--out benchmarks/results/functional_demo.json"
)
TURNS_SHOWN = 3


def section(results: Path, figures: Path) -> str:
    data = read(results, SOURCE, COMMAND)
    rows = [row for row in data["rows"] if row["kind"] == "all"]
    _draw_layers(data, figures / "functional.png")
    shown = max(rows, key=lambda row: row["retrieval"])["layer"]
    _draw_example(data["example"], shown, figures / "tokens.png")
    arguments = data["arguments"]
    lead = (
        f"{rows[0]['dialogues']} dialogues of {data['turns']} turns in all, {arguments['prefill']:.0%} pruned and "
        f"{arguments['decode']:.0%} of the rest not read, every question by itself. A *sink* is read in all turns at a "
        "layer, a *retrieval token* in some. All but the overlap in percent, sinks and retrieval tokens of the visual "
        "store. *Overlap*: Jaccard index of neighbouring turns' sets, "
        f"{rows[0]['jaccard_by_chance']:.2f} for sets drawn by dice, 1 for a fixed set. *Recovered*: share of the "
        "question's attention to the store that the set holds. *Needed*: share of what the question needs, of what "
        f"pruning left of it, that the set holds; dice would hold {percent(rows[0]['read'])} %. *Ink*: share of these "
        f"tokens that carry ink; of the store, {percent(rows[0]['ink_store'])} %."
    )
    names = ("sinks", "retrieval", "recovered", "needed", "ink_sinks", "ink_retrieval")
    head = ("layer", "overlap", "sinks", "retrieval tokens", "recovered", "needed", "ink: sinks", "ink: retrieval")
    cells = [(str(row["layer"]), f"{row['jaccard']:.2f}", *(percent(row[name]) for name in names)) for row in rows]
    questions = data["example"]["questions"][:TURNS_SHOWN]
    asked = "; ".join(f'"{question}"' for question in questions)
    return "\n\n".join(
        [
            f"## What retrieval reads\n\n{lead}",
            table(head, cells),
            figure("functional.png", "Overlap of turns, attention recovered and tokens read, by layer"),
            f"One scene at layer {shown}, turn by turn ({asked}): what the turn reads, sinks and the rest of it.",
            figure("tokens.png", "A scene with sinks and retrieval tokens of three turns"),
            command_of(data),
        ]
    )


def _draw_layers(data: Row, path: Path) -> None:
    kinds = list(dict.fromkeys(row["kind"] for row in data["rows"]))
    plotted = (
        ("overlap of turns", "jaccard"),
        ("attention recovered", "recovered"),
        ("what is needed, read", "needed"),
    )
    with drawn(path, 3, 2.8) as (_, axes):
        for (title, name), axis in zip(plotted, axes, strict=True):
            for kind, colour, marker in zip(kinds, COLOURS, "os^D", strict=False):
                found = [row for row in data["rows"] if row["kind"] == kind and row[name] is not None]
                axis.plot(
                    [row["layer"] for row in found], [row[name] for row in found],
                    color=colour, marker=marker, markersize=4, linewidth=1.2, label=kind,
                )  # fmt: skip
            chance = data["rows"][0]["jaccard_by_chance"] if name == "jaccard" else data["rows"][0]["read"]
            axis.axhline(chance, color="0.5", linestyle=":", linewidth=1, label="dice")
            axis.set_ylim(0, 1)
            axis.set_xlabel("decoder layer")
            axis.set_title(title, fontsize=9)
        axes[0].set_ylabel("share")
        axes[-1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))


def _draw_example(example: dict[str, Any], layer: int, path: Path) -> None:
    """The picture once a turn; tokens of the finest view and of the base view by their outlines."""
    sample = make(example["kind"], example["seed"], **example["options"])
    sinks = set(example["sinks"][layer])
    with drawn(path, TURNS_SHOWN, 3.3) as (_, axes):
        for axis, question, read_now in zip(axes, example["questions"], example["read"], strict=False):
            axis.imshow(sample.rgb[0], alpha=0.55, interpolation="nearest")
            for i in read_now[layer]:
                _outline(axis, example["boxes"][i], sample.rgb.shape[1:3], is_sink=i in sinks)
            axis.set_title(question, fontsize=8, wrap=True)
            axis.set_xticks([])
            axis.set_yticks([])


def _outline(axis: Axes, box: list[float], size: tuple[int, int], *, is_sink: bool) -> None:
    from matplotlib.patches import Rectangle

    height, width = size
    y0, x0, y1, x1 = box[0] * height, box[1] * width, box[2] * height, box[3] * width
    colour = COLOURS[1] if is_sink else COLOURS[0]
    corner = (x0 - 0.5, y0 - 0.5)
    axis.add_patch(
        Rectangle(corner, x1 - x0, y1 - y0, fill=not is_sink, alpha=0.45 if not is_sink else 1.0, color=colour, lw=1.0)
    )
