"""Everything that puts pixels somewhere: integer arithmetic only, so that every machine draws the same."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from world.dice import Dice
from world.glyphs import text_ink
from world.sample import Grid, Plan, Thing

PALETTE = {
    "red": (206, 32, 36),
    "orange": (236, 112, 16),
    "yellow": (240, 212, 24),
    "green": (32, 148, 56),
    "cyan": (40, 196, 208),
    "blue": (40, 72, 208),
    "purple": (144, 44, 168),
    "black": (28, 28, 28),
}
TINTS = ((236, 236, 236), (222, 222, 226), (240, 232, 214), (218, 236, 222), (216, 228, 244), (244, 222, 226))
INK = (20, 20, 36)
PLATE = (246, 246, 246)
SIDES = {"small": 11, "large": 17}  # of a shape, in pixels
NOISE = 7  # is added to every pixel, 0 to this, the same for the three channels
TEXTURES = ("plain", "checker", "lines", "stripes", "dots", "blotches")
SCENE_GRID = Grid(21, 21)

# A pentagon's corners on a circle of radius 1000, clockwise from the top.
PENTAGON = ((0, -1000), (951, -309), (588, 809), (-588, 809), (-951, -309))


@lru_cache(maxsize=64)
def sprite(shape: str, side: int) -> np.ndarray:
    """The pixels of a shape, (side, side) bool; not to be written to. `side` is odd."""
    last = side - 1
    y, x = np.mgrid[0:side, 0:side] * 2 - last  # doubled coordinates around the centre, -last .. last
    radius_sq = x * x + y * y
    if shape == "circle":
        found = radius_sq <= side * side - side
    elif shape == "ring":
        found = (radius_sq <= side * side - side) & (3 * radius_sq >= side * side)
    elif shape == "square":
        found = np.maximum(abs(x), abs(y)) <= last - 2
    elif shape == "diamond":
        found = abs(x) + abs(y) <= last
    elif shape == "cross":
        found = np.minimum(abs(x), abs(y)) * 3 <= side
    elif shape == "triangle":
        found = 2 * abs(x) <= y + last + 1
    elif shape == "star":
        found = _star(x, y, last)
    elif shape == "heart":
        found = _heart(x, y, last)
    else:
        raise ValueError(f"expected a known shape, got {shape!r}")
    found.flags.writeable = False
    return found


def _star(x: np.ndarray, y: np.ndarray, last: int) -> np.ndarray:
    """A pentagram is where at least four of the lines through every second corner have the point inside."""
    x, y = x * 1000, (y * 10 - last) * 100  # the star is less high than wide: lowered into the middle
    inside = np.zeros(x.shape, dtype=int)
    for i in range(5):
        (ax, ay), (bx, by) = PENTAGON[i], PENTAGON[(i + 2) % 5]
        ax, ay, bx, by = (v * (last + 2) for v in (ax, ay, bx, by))
        inside += (bx - ax) * (y - ay) - (by - ay) * (x - ax) >= 0
    return inside >= 4


def _heart(x: np.ndarray, y: np.ndarray, last: int) -> np.ndarray:
    """Two discs side by side over a wedge."""
    half = last // 2
    discs = (abs(x) - half) ** 2 + (y + half) ** 2 <= half * half + 2 * last
    wedge = (y >= -half) & (abs(x) + y <= last) & (abs(x) * 4 <= (last - y) * 3 + 4)
    return discs | wedge


@lru_cache(maxsize=128)
def tinted(tint: tuple[int, int, int], texture: str, height: int, width: int) -> np.ndarray:
    """A background that is the same in every sample, (height, width, 3) uint8; not to be written to."""
    found = np.array(tint, dtype=np.uint8) - shade(texture, height, width)[..., None]
    found.flags.writeable = False
    return found


def shade(name: str, height: int, width: int) -> np.ndarray:
    """How much darker a texture is than its tint, (height, width) uint8."""
    y, x = np.mgrid[0:height, 0:width]
    if name == "plain":
        found = x * 0
    elif name == "stripes":
        found = ((x + y) % 16 < 8) * 8
    elif name == "dots":
        found = ((x % 8 == 3) & (y % 8 == 3)) * 20
    else:  # checker, lines: along the cells of a scene, as a help for the eye
        column, row = _cells(width)[x], _cells(height)[y]
        edge = np.diff(column, axis=1, prepend=1).astype(bool) | np.diff(row, axis=0, prepend=1).astype(bool)
        found = edge * 16 if name == "lines" else (column + row) % 2 * 10
    return found.astype(np.uint8)


def _cells(length: int) -> np.ndarray:
    return np.array([SCENE_GRID.cell_at(i, 0)[0] for i in range(length)])


def background(dice: Dice, height: int, width: int) -> np.ndarray:
    """A tint with a texture, (height, width, 3) uint8."""
    tint, name = dice.pick(TINTS), dice.pick(TEXTURES)
    if name != "blotches":
        return tinted(tint, name, height, width)
    blotches = (dice.octets(height // 8, width // 8) % 16).repeat(8, axis=0).repeat(8 * 3, axis=1)
    return tinted(tint, "plain", height, width) - blotches.reshape(height, width, 3)


def draw(plan: Plan, dice: Dice) -> tuple[np.ndarray, np.ndarray]:
    """rgb (T, H, W, 3) and mask (T, H, W), both uint8. Later things cover earlier ones."""
    rgb = np.empty((plan.frames, plan.height, plan.width, 3), dtype=np.uint8)
    rgb[:] = background(dice, plan.height, plan.width)
    mask = np.zeros(rgb.shape[:3], dtype=np.uint8)
    for thing in plan.things:
        paint(thing, rgb, mask)
    rgb += (dice.octets(*mask.shape) & NOISE).repeat(3).reshape(rgb.shape)  # faster than broadcasting over channels
    return rgb, mask


def paint(thing: Thing, rgb: np.ndarray, mask: np.ndarray) -> None:
    """Draws one thing into all its frames, in place."""
    ink = sprite(thing.shape, thing.width) if thing.font is None else text_ink(thing.text, thing.font)
    for frame, (x, y) in enumerate(thing.path, thing.start):
        if thing.is_tag:
            rgb[frame, y - 1 : y + thing.height + 1, x - 1 : x + thing.width + 1] = PLATE
            mask[frame, y - 1 : y + thing.height + 1, x - 1 : x + thing.width + 1] = 0
        rgb[frame, y : y + thing.height, x : x + thing.width][ink] = (
            PALETTE[thing.colour_in(frame)] if thing.font is None else INK
        )
        mask[frame, y : y + thing.height, x : x + thing.width][ink] = thing.ident
