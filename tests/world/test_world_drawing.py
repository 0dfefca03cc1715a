"""What is drawn is what the truth says, to the pixel, and the same on every machine."""

from __future__ import annotations

import hashlib
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from world.dice import Dice
from world.drawing import INK, NOISE, PALETTE, PLATE, SIDES, TEXTURES, TINTS, sprite, tinted
from world.glyphs import CHARACTERS, LARGE, SMALL, Font, glyphs
from world.sample import TILE, Sample
from world.splits import SPLITS, make
from world.vocabulary import COLOURS, SHAPES

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("scene", {}),
    ("scene", {"width": 64, "height": 64}),
    ("scene", {"width": 192, "height": 64}),
    ("scene", {"dense": True}),
    ("page", {}),
    ("page", {"width": 64, "height": 64}),
    ("page", {"width": 192, "height": 192}),
    ("page", {"dense": True}),
    ("clip", {}),
    ("clip", {"frames": 4}),
    ("clip", {"frames": 64}),
]
SEEDS = range(12)


def digest(sample: Sample) -> str:
    """Of pixels, mask, truth and dialogue."""
    spoken = [(turn.type, turn.question, turn.answer) for turn in (*sample.dialogue, *sample.alone)]
    found = hashlib.sha256()
    for part in (sample.rgb.tobytes(), sample.mask.tobytes(), repr(sample.things).encode(), repr(spoken).encode()):
        found.update(hashlib.sha256(part).digest())
    return found.hexdigest()[:16]


@pytest.mark.parametrize(
    ("kind", "seed", "options", "expected"),
    [
        ("scene", 0, {}, "4f0a0cd5d4d0bb29"),
        ("scene", 1, {"width": 64, "height": 64}, "fc531bcec49a939b"),
        ("scene", 2, {"width": 192, "height": 64}, "a5fed84498535713"),
        ("scene", 3, {"dense": True}, "9114a60582a62621"),
        ("page", 0, {}, "60f8c339913ecdef"),
        ("page", 1, {"width": 192, "height": 192}, "e54beee04b5e3ff1"),
        ("page", 2148483648, {}, "a2c69c54ffc8b88b"),
        ("page", 3, {"dense": True}, "6ebe596213906b1f"),
        ("clip", 0, {}, "15271aebe05cba43"),
        ("clip", 2147483648, {"frames": 4}, "22196dbc910d736d"),
        ("clip", 2, {"frames": 64}, "1e2ebbe77185741f"),
    ],
)
def test_a_seed_gives_the_same_sample_everywhere(kind: str, seed: int, options: dict[str, Any], expected: str) -> None:
    assert digest(make(kind, seed, **options)) == expected


def test_dice_do_not_depend_on_numpy_streams() -> None:
    dice = Dice(7, 11)
    assert [dice.below(1000) for _ in range(6)] == [561, 977, 83, 546, 773, 274]
    assert dice.octets(5).tolist() == [141, 38, 134, 115, 166]


def test_dice_are_fair() -> None:
    dice = Dice(3)
    counts = np.bincount([dice.below(6) for _ in range(12_000)], minlength=6)
    assert counts.min() > 1850
    assert counts.max() < 2150
    firsts = np.bincount([dice.shuffled(range(5))[0] for _ in range(5_000)], minlength=5)
    assert firsts.min() > 880


def test_the_splits_share_no_seed() -> None:
    for a, b in combinations(SPLITS.values(), 2):
        assert a.stop <= b.start or b.stop <= a.start
        assert len(a) >= 10**6


@pytest.mark.parametrize("font", [SMALL, LARGE])
def test_glyphs_are_complete_and_different(font: Font) -> None:
    table = glyphs(font)
    assert sorted(table) == sorted(CHARACTERS)
    assert {ink.shape for ink in table.values()} == {(font.height, font.width)}
    for a, b in combinations(table, 2):
        assert (table[a] != table[b]).sum() >= 3, f"{a} looks like {b}"


@pytest.mark.parametrize("side", SIDES.values())
def test_shapes_are_different(side: int) -> None:
    for shape in SHAPES:
        assert side * side // 5 < sprite(shape, side).sum() < side * side
    for a, b in combinations(SHAPES, 2):
        assert (sprite(a, side) != sprite(b, side)).sum() > side, f"{a} looks like {b}"


def test_colours_are_far_apart() -> None:
    assert tuple(PALETTE) == COLOURS
    backgrounds = [tinted(tint, texture, TILE, TILE) for tint in TINTS for texture in TEXTURES if texture != "blotches"]
    for name, colour in PALETTE.items():
        for other, value in PALETTE.items():
            assert name == other or np.abs(np.subtract(colour, value)).sum() > 100, f"{name} looks like {other}"
        for background in backgrounds:
            assert np.abs(background - np.array(colour)).sum(-1).min() > 150, f"{name} is hard to see"


@pytest.mark.parametrize(("kind", "options"), VARIANTS)
def test_mask_and_picture_are_the_things(kind: str, options: dict[str, Any]) -> None:
    """Each thing's ink is where its path says, in its colour, and nothing else has colour."""
    for seed in SEEDS:
        sample = make(kind, seed, **options)
        covered = np.zeros_like(sample.mask)
        plates = np.zeros(sample.mask.shape, dtype=bool)
        for thing in sample.things:
            ink = ink_of(thing)
            for frame in range(thing.start, thing.stop):
                x, y = thing.corner(frame)
                if thing.is_tag:
                    covered[frame, y - 1 : y + thing.height + 1, x - 1 : x + thing.width + 1] = 0
                    plates[frame, y - 1 : y + thing.height + 1, x - 1 : x + thing.width + 1] = True
                covered[frame, y : y + thing.height, x : x + thing.width][ink] = thing.ident
                colour = PALETTE[thing.colour_in(frame)] if thing.role == "shape" else INK
                seen = sample.rgb[frame][sample.mask[frame] == thing.ident].astype(int) - colour
                assert len(seen), f"{thing} is hidden in frame {frame}"
                assert seen.min() >= 0
                assert seen.max() <= NOISE
                assert (seen == seen[:, :1]).all()
        assert (sample.mask == covered).all()
        empty = sample.mask == 0
        assert (sample.rgb[empty & plates] >= PLATE).all()
        assert sample.rgb[empty & ~plates].min() > 190


def ink_of(thing: Any) -> np.ndarray:
    """The pixels of a thing, put together here from shapes and glyphs."""
    if thing.role == "shape":
        return sprite(thing.shape, thing.width)
    gap = np.zeros((thing.height, thing.font.pitch - thing.font.width), dtype=bool)
    columns = [part for character in thing.text.upper() for part in (glyphs(thing.font)[character], gap)]
    return np.concatenate(columns[:-1], axis=1)


@pytest.mark.parametrize(("kind", "options"), VARIANTS)
def test_nothing_crosses_a_tile_or_another_thing(kind: str, options: dict[str, Any]) -> None:
    for seed in SEEDS:
        sample = make(kind, seed, **options)
        boxes: dict[int, list[tuple[int, int, int, int]]] = {}
        for thing in sample.things:
            margin = 1 if thing.is_tag else 0
            for frame in range(thing.start, thing.stop):
                x, y = thing.corner(frame)
                x0, y0, x1, y1 = x - margin, y - margin, x + thing.width + margin, y + thing.height + margin
                assert x0 // TILE == (x1 - 1) // TILE, f"{thing} is cut"
                assert y0 // TILE == (y1 - 1) // TILE, f"{thing} is cut"
                if not thing.is_tag:
                    boxes.setdefault(frame, []).append((x0, y0, x1, y1))
        for found in boxes.values():
            for (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) in combinations(found, 2):
                assert ax1 <= bx0 or bx1 <= ax0 or ay1 <= by0 or by1 <= ay0


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("scene", {"width": 100}),
        ("scene", {"height": 0}),
        ("scene", {"width": 448}),
        ("page", {"width": 256}),
        ("clip", {"frames": 3}),
        ("clip", {"frames": 65}),
        ("poem", {}),
    ],
)
def test_options_that_cannot_be(kind: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        make(kind, 0, **options)


def test_the_picture_is_mostly_background() -> None:
    for kind, share in (("scene", 0.85), ("clip", 0.9)):
        empty = [(make(kind, seed).mask == 0).mean() for seed in range(30)]
        assert np.mean(empty) > share
