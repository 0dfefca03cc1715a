"""The values of the world: what is drawn, what is asked about it, and the sample that holds both."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from world.glyphs import Font

TILE = 64  # side in pixels of the vision tower's input: nothing that is drawn crosses a tile's edge

Fact = tuple[int, str]  # a thing's ident and one of its attributes


@dataclass(frozen=True, slots=True)
class Region:
    """A box of pixels [x0, x1) x [y0, y1) in the frames [start, stop)."""

    start: int
    stop: int
    x0: int
    y0: int
    x1: int
    y1: int


@dataclass(frozen=True, slots=True)
class QA:
    """One turn.

    `regions` are what a reader must look at, none of them meaning the whole sample. `chance` is the accuracy of the
    best guess without the picture.
    `asks` are the facts in the answer; `tells` are those in question and answer together.
    """

    type: str
    question: str
    answer: str
    regions: tuple[Region, ...]
    chance: float
    asks: frozenset[Fact]
    tells: frozenset[Fact]


@dataclass(frozen=True, slots=True)
class Thing:
    """A drawn object: a shape, or a line of text.

    `path` holds the top left corner in each frame of [start, start + len(path)). A text's `partner` is the ident of
    the shape it hangs on or is shown with; a word's and a value's partner is the other one of their row.
    """

    ident: int  # the object mask's value, from 1
    role: str  # shape, number, code, word
    width: int
    height: int
    path: tuple[tuple[int, int], ...]
    start: int = 0
    shape: str = ""
    colour: str = ""
    size: str = ""
    text: str = ""
    font: Font | None = None
    is_tag: bool = False  # text on a plate that hangs on its partner
    partner: int = 0
    motion: str = ""
    later_colour: str = ""  # from frame `change` on, where there is one
    change: int = 0

    @property
    def stop(self) -> int:
        return self.start + len(self.path)

    @property
    def name(self) -> str:
        """How a question names it: `red star`, `number 42`, `code kqz`."""
        return f"{self.colour} {self.shape}" if self.role == "shape" else f"{self.role} {self.text}"

    def corner(self, frame: int) -> tuple[int, int]:
        return self.path[frame - self.start]

    def centre(self, frame: int) -> tuple[int, int]:
        x, y = self.corner(frame)
        return x + self.width // 2, y + self.height // 2

    def colour_in(self, frame: int) -> str:
        return self.later_colour if self.later_colour and frame >= self.change else self.colour

    def region(self, start: int | None = None, stop: int | None = None) -> Region:
        """The box it covers in some of its frames, by default in all."""
        start, stop = self.start if start is None else start, self.stop if stop is None else stop
        path = self.path[start - self.start : stop - self.start]
        left, top = min(x for x, _ in path), min(y for _, y in path)
        right, bottom = max(x for x, _ in path), max(y for _, y in path)
        return Region(start, stop, left, top, right + self.width, bottom + self.height)


@dataclass(frozen=True, slots=True)
class Grid:
    """Cells of a fixed size in pixels that start anew in each tile, so that no cell crosses a tile's edge."""

    cell_width: int
    cell_height: int

    @property
    def per_tile(self) -> tuple[int, int]:
        """Columns and rows in one tile."""
        return TILE // self.cell_width, TILE // self.cell_height

    def cell_at(self, x: int, y: int) -> tuple[int, int]:
        """Column and row, from 1, of the cell at a pixel; a tile's last pixels belong to its last cell."""
        columns, rows = self.per_tile
        column = x // TILE * columns + min(x % TILE // self.cell_width, columns - 1)
        row = y // TILE * rows + min(y % TILE // self.cell_height, rows - 1)
        return column + 1, row + 1

    def corner_of(self, column: int, row: int) -> tuple[int, int]:
        """The top left pixel of a cell given by column and row, from 1."""
        columns, rows = self.per_tile
        x = (column - 1) // columns * TILE + (column - 1) % columns * self.cell_width
        y = (row - 1) // rows * TILE + (row - 1) % rows * self.cell_height
        return x, y


@dataclass(frozen=True, eq=False)
class Sample:
    """A picture, a page or a clip with its truth.

    rgb (T, H, W, 3) uint8; mask (T, H, W) uint8: the ident of the thing whose ink covers a pixel, 0 for background.
    `dialogue` is one conversation in which no answer follows from earlier turns. `alone` are questions whose answers
    tell too much for that: each is to be asked by itself. `further` are conversations like the first, each of its own:
    together they would tell too much.
    """

    kind: str
    seed: int
    rgb: np.ndarray = field(repr=False)
    mask: np.ndarray = field(repr=False)
    things: tuple[Thing, ...]
    grid: Grid
    dialogue: tuple[QA, ...]
    alone: tuple[QA, ...]
    further: tuple[tuple[QA, ...], ...] = ()


@dataclass(frozen=True)
class Plan:
    """A sample before it is drawn: frames, height and width in pixels, and everything that will be seen and asked."""

    frames: int
    height: int
    width: int
    things: tuple[Thing, ...]
    grid: Grid
    dialogue: tuple[QA, ...]
    alone: tuple[QA, ...]
    further: tuple[tuple[QA, ...], ...] = ()
