"""Dense labels for training a vision tower: what covers each patch, and what occurs in each tile.

Only patches that are really covered by ink have labels, so that a pruned patch is a loss and a wrong one no help.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from world.glyphs import CHARACTERS, SMALL, Font, glyphs
from world.sample import TILE, Sample, Thing
from world.vocabulary import COLOURS, ROW_WORDS, SHAPES, SIZES, TITLES

COVER_SHARE = 16  # a thing is on a patch if its ink covers one sixteenth of it
WORDS = (*ROW_WORDS, *TITLES)
MIN_LINE = 8  # pixels between the middles of texts above each other, at least
MAX_COUNT = 9  # of shapes in a tile; more are counted as this

# Name and number of classes of each label of a patch, 0 being "nothing there".
CLASSES = {
    "shape": 1 + len(SHAPES),
    "colour": 1 + len(COLOURS),
    "size": 1 + len(SIZES),
    "word": 1 + len(WORDS),
    "character": 1 + len(CHARACTERS),
}
ATTRIBUTES = {"shape": SHAPES, "colour": COLOURS, "size": SIZES, "word": WORDS}


def patch_labels(sample: Sample, patch: int, tile: int | None = None, partner: bool = False) -> dict[str, np.ndarray]:
    """What covers each patch of `patch` pixels: int16 arrays (T, H / patch, W / patch), 0 where nothing does.

    shape, colour, size, word: of the thing with the most ink there, from 1 in the order of the tables.
    row, column: of the cell with that thing's centre, from 1; counted within a tile of `tile` pixels, if given.
    character0, character1, ...: the characters at home there, from left to right and top to bottom, as an index into
    CHARACTERS plus 1. A character has one home: the patch with the ink nearest to its middle.
    With `partner`, also partner_shape, partner_colour and partner_word: of the shape that a text hangs on or shares
    its frame with, and of the word that a value shares its row with.
    """
    covered = coverage(sample, patch)
    owner = covered[..., 1:].argmax(-1) + 1  # (T, rows, columns)
    owner[covered[..., 1:].max(-1) * COVER_SHARE < patch * patch] = 0
    tables = _tables(sample, tile, partner)  # by name (T, idents)
    frame = np.arange(len(owner))[:, None, None]
    labels = {name: table[frame, owner] for name, table in tables.items()}
    homes = character_homes(sample, patch)
    slots = np.zeros((slots_of(patch), *owner.shape), dtype=np.int16)
    filled: dict[tuple[int, int, int], int] = {}
    for spot, label in homes:
        slot = filled.get(spot, 0)
        slots[(slot, *spot)] = label
        filled[spot] = slot + 1
    return labels | {f"character{i}": slot for i, slot in enumerate(slots)}


def image_labels(sample: Sample, tile: int | None = None) -> dict[str, np.ndarray]:
    """What occurs, for a summary token: uint8 vectors of zeros and ones, (T, H / tile, W / tile, classes).

    shape, colour, size and character say which ones occur in a tile, in the order of the tables; `count` has a one at
    the number of shapes, 0 to 9. Without `tile` (in pixels, square) the whole picture is one tile: (T, 1, 1, classes).
    """
    _, height, width = sample.mask.shape
    seen = coverage(sample, tile or (height, width)) > 0  # (T, rows, columns, idents)
    seen[..., 0] = False
    found = {}
    for name, table in _tables(sample, None, False).items():
        if name in ("shape", "colour", "size"):
            present = np.zeros((*seen.shape[:3], CLASSES[name]), dtype=np.uint8)
            where = np.nonzero(seen)
            present[(*where[:3], table[where[0], where[3]])] = 1
            found[name] = present[..., 1:]
    character = np.zeros((*seen.shape[:3], len(CHARACTERS)), dtype=np.uint8)
    for spot, label in character_homes(sample, tile or (height, width)):
        character[(*spot, label - 1)] = 1
    is_shape = np.array([False, *(thing.role == "shape" for thing in sample.things)])
    count = np.minimum((seen & is_shape).sum(-1), MAX_COUNT)
    return found | {"character": character, "count": np.eye(MAX_COUNT + 1, dtype=np.uint8)[count]}


def coverage(sample: Sample, patch: int | tuple[int, int]) -> np.ndarray:
    """Pixels of each patch that each ident covers: (T, rows, columns, 1 + things) int64. A patch is a side or
    (height, width) in pixels."""
    high, wide = (patch, patch) if isinstance(patch, int) else patch
    frames, height, width = sample.mask.shape
    if height % high or width % wide:
        raise ValueError(f"expected patches that divide {width}x{height}, got {wide}x{high}")
    rows, columns, idents = height // high, width // wide, len(sample.things) + 1
    spots = np.arange(frames * rows * columns).reshape(frames, rows, 1, columns, 1)
    index = spots * idents + sample.mask.reshape(frames, rows, high, columns, wide)
    counts = np.bincount(index.ravel(), minlength=frames * rows * columns * idents)
    return counts.reshape(frames, rows, columns, idents)


def slots_of(patch: int) -> int:
    """How many characters can be at home on one patch: middles are up to a glyph's width closer than the pitch."""
    return ((patch + SMALL.width - 2) // SMALL.pitch + 1) * ((patch - 1) // MIN_LINE + 1)


def character_homes(sample: Sample, patch: int | tuple[int, int]) -> list[tuple[tuple[int, int, int], int]]:
    """((frame, row, column) of the home, label) of every drawn character, in reading order within a thing."""
    high, wide = (patch, patch) if isinstance(patch, int) else patch
    homes = []
    for thing in sample.things:
        if thing.font is None:
            continue
        for frame, (x, y) in enumerate(thing.path, thing.start):
            for i, character in enumerate(thing.text.upper()):
                dx, dy = _middle(character, thing.font)
                spot = (frame, (y + dy) // high, (x + i * thing.font.pitch + dx) // wide)
                homes.append((spot, CHARACTERS.index(character) + 1))
    return homes


@cache
def _middle(character: str, font: Font) -> tuple[int, int]:
    """The ink pixel in the middle row of a glyph that is next to the middle column: x, y."""
    y = font.height // 2
    xs = np.flatnonzero(glyphs(font)[character][y])
    return int(xs[abs(2 * xs - font.width + 1).argmin()]), y


def _tables(sample: Sample, tile: int | None, partner: bool) -> dict[str, np.ndarray]:
    """Every thing's labels by frame, (T, 1 + things) int16; those of ident 0 are 0."""
    shape = (len(sample.mask), len(sample.things) + 1)
    names = [*ATTRIBUTES, "row", "column", *(["partner_shape", "partner_colour", "partner_word"] if partner else [])]
    tables = {name: np.zeros(shape, dtype=np.int16) for name in names}
    columns, rows = sample.grid.per_tile
    for thing in sample.things:
        mate = sample.things[thing.partner - 1] if thing.partner else None
        for frame in range(thing.start, thing.stop):
            column, row = sample.grid.cell_at(*thing.centre(frame))
            if tile:
                column, row = (column - 1) % (columns * tile // TILE) + 1, (row - 1) % (rows * tile // TILE) + 1
            tables["column"][frame, thing.ident], tables["row"][frame, thing.ident] = column, row
            for name in ATTRIBUTES:
                tables[name][frame, thing.ident] = _label(thing, name, frame)
                if mate and f"partner_{name}" in tables:
                    tables[f"partner_{name}"][frame, thing.ident] = _label(mate, name, frame)
    return tables


def _label(thing: Thing, name: str, frame: int) -> int:
    value = {
        "shape": thing.shape,
        "colour": thing.colour and thing.colour_in(frame),
        "size": thing.size,
        "word": thing.text,  # numbers and codes are never among the words
    }[name]
    return ATTRIBUTES[name].index(value) + 1 if value in ATTRIBUTES[name] else 0
