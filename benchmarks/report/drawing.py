"""What the plots share: size, colours that colour-blind readers can tell apart, files that do not change by chance."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, DPI = 9.0, 160  # inches, dots per inch: twice the width of a page, for sharp screens
# Okabe and Ito's colours without the yellow that is lost on white; methods that share one differ by marker and dashes.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*")
DASHES = ("-", "--", ":", "-.")


@dataclass(frozen=True)
class Look:
    """How one of several things is drawn."""

    colour: str
    marker: str
    dashes: str


def looks(names: Iterable[str]) -> dict[str, Look]:
    """A look for each name, by its place."""
    return {
        name: Look(COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)], DASHES[i % len(DASHES)])
        for i, name in enumerate(dict.fromkeys(names))
    }


@contextmanager
def drawn(path: Path, columns: int, height: float, **options: Any) -> Iterator[tuple[Figure, list[Axes]]]:
    """A figure of one row, whose axes the block fills; on disk when it ends. A reader's settings change nothing."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams["font.size"] = 9
        made = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
        axes = list(made.subplots(1, columns, squeeze=False, **options)[0])
        yield made, axes
        for axis in axes:
            axis.grid(color="0.9", linewidth=0.6)
            axis.set_axisbelow(True)
            axis.spines[["top", "right"]].set_visible(False)
        path.parent.mkdir(parents=True, exist_ok=True)
        made.savefig(path, metadata={"Software": None})
