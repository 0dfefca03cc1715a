"""Dense labels stand on covered patches and nowhere else."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from world.glyphs import CHARACTERS
from world.labels import COVER_SHARE, WORDS, image_labels, patch_labels, slots_of
from world.sample import Sample, Thing
from world.splits import make
from world.vocabulary import COLOURS, SHAPES, SIZES

PATCH = 8
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("scene", {}),
    ("scene", {"dense": True}),
    ("page", {}),
    ("page", {"width": 192, "height": 128, "dense": True}),
    ("clip", {}),
]


def owner_of(pixels: np.ndarray, patch: int) -> int:
    """The ident with the most pixels of a patch, 0 if that is not a sixteenth of it; counted one by one."""
    idents, counts = np.unique(pixels[pixels > 0], return_counts=True)
    if not len(idents) or counts.max() * COVER_SHARE < patch * patch:
        return 0
    return int(idents[counts.argmax()])


def expected_labels(sample: Sample, thing: Thing, frame: int) -> dict[str, int]:
    column, row = sample.grid.cell_at(*thing.centre(frame))
    found = {"column": column, "row": row}
    for name, table, value in (
        ("shape", SHAPES, thing.shape),
        ("colour", COLOURS, thing.colour_in(frame)),
        ("size", SIZES, thing.size),
        ("word", WORDS, thing.text),
    ):
        found[name] = table.index(value) + 1 if value in table and (name != "word" or thing.role == "word") else 0
    return found


@pytest.mark.parametrize(("kind", "options"), VARIANTS)
@pytest.mark.parametrize("patch", [8, 16])
def test_labels_stand_exactly_on_covered_patches(kind: str, options: dict[str, Any], patch: int) -> None:
    sample = make(kind, 3, **options)
    labels = patch_labels(sample, patch)
    for (frame, row, column), label in np.ndenumerate(labels["row"]):
        pixels = sample.mask[frame, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
        owner = owner_of(pixels, patch)
        names = ("shape", "colour", "size", "word", "row", "column")
        expected = expected_labels(sample, sample.things[owner - 1], frame) if owner else dict.fromkeys(names, 0)
        assert {name: int(labels[name][frame, row, column]) for name in names} == expected
        assert (label > 0) == (owner > 0)


@pytest.mark.parametrize(("kind", "options"), VARIANTS)
@pytest.mark.parametrize("patch", [4, 8, 16, 32])
def test_every_character_has_one_home_with_its_ink(kind: str, options: dict[str, Any], patch: int) -> None:
    for seed in range(8):
        sample = make(kind, seed, **options)
        labels = patch_labels(sample, patch)
        slots = np.stack([labels[f"character{i}"] for i in range(slots_of(patch))])
        drawn = sorted(character for thing in sample.things for character in thing.text.upper())
        assert sorted(CHARACTERS[label - 1] for label in slots[slots > 0]) == drawn
        has_text = np.isin(sample.mask, [thing.ident for thing in sample.things if thing.text])
        frames, height, width = sample.mask.shape
        has_ink = has_text.reshape(frames, height // patch, patch, width // patch, patch).any((2, 4))
        assert has_ink[slots.any(0)].all()


def test_a_number_is_read_from_left_to_right() -> None:
    sample = make("page", 0)
    labels = patch_labels(sample, 64)
    slots = np.stack([labels[f"character{i}"] for i in range(slots_of(64))], axis=-1)
    text = "".join(CHARACTERS[label - 1] for label in slots[0, 0, 0] if label).lower()
    corner = [thing.text for thing in sample.things if thing.corner(0)[0] < 64 and thing.corner(0)[1] < 64]
    assert text == "".join(corner)


@pytest.mark.parametrize("kind", ["scene", "page"])
def test_places_within_a_tile(kind: str) -> None:
    sample = make(kind, 5)
    whole, within = patch_labels(sample, PATCH), patch_labels(sample, PATCH, tile=64)
    columns, rows = sample.grid.per_tile
    for name, count in (("column", columns), ("row", rows)):
        on = whole[name] > 0
        assert (within[name] > 0).tolist() == on.tolist()
        assert ((whole[name][on] - 1) % count + 1 == within[name][on]).all()
        assert whole[name].max() > count or count == rows


def test_partners() -> None:
    """A text tells the shape it is shown with; a value tells the word of its row; a shape tells nothing."""
    seen = 0
    for kind in ("scene", "page", "clip"):
        for seed in range(6):
            sample = make(kind, seed)
            labels = patch_labels(sample, 4, partner=True)
            for thing in sample.things:
                if not thing.partner or thing.role in ("word", "shape"):
                    continue
                mate = sample.things[thing.partner - 1]
                x, y = np.argwhere(sample.mask[thing.start] == thing.ident)[0][::-1]
                spot = (thing.start, y // 4, x // 4)
                if owner_of(sample.mask[thing.start, y // 4 * 4 :][:4, x // 4 * 4 :][:, :4], 4) != thing.ident:
                    continue
                seen += 1
                if mate.role == "shape":
                    assert labels["partner_shape"][spot] == SHAPES.index(mate.shape) + 1
                    assert labels["partner_colour"][spot] == COLOURS.index(mate.colour_in(thing.start)) + 1
                else:
                    assert labels["partner_word"][spot] == WORDS.index(mate.text) + 1
            assert not labels["partner_shape"][labels["shape"] > 0].any()
    assert seen > 50


@pytest.mark.parametrize(("kind", "options"), VARIANTS)
def test_image_labels_tell_what_occurs(kind: str, options: dict[str, Any]) -> None:
    sample = make(kind, 9, **options)
    labels = image_labels(sample, 64)
    frames, height, width = sample.mask.shape
    for frame in range(frames):
        for row in range(height // 64):
            for column in range(width // 64):
                inside = [
                    thing
                    for thing in sample.things
                    if thing.start <= frame < thing.stop
                    and (thing.corner(frame)[0] // 64, thing.corner(frame)[1] // 64) == (column, row)
                ]
                spot = (frame, row, column)
                shapes = [thing for thing in inside if thing.role == "shape"]
                assert names_at(labels["shape"][spot], SHAPES) == {thing.shape for thing in shapes}
                assert names_at(labels["colour"][spot], COLOURS) == {thing.colour_in(frame) for thing in shapes}
                assert names_at(labels["size"][spot], SIZES) == {thing.size for thing in shapes}
                text = {character for thing in inside for character in thing.text.upper()}
                assert names_at(labels["character"][spot], CHARACTERS) == text
                assert labels["count"][spot].tolist() == [i == min(len(shapes), 9) for i in range(10)]
    whole = image_labels(sample)
    assert whole["shape"].shape == (frames, 1, 1, len(SHAPES))
    assert (whole["character"][:, 0, 0] == labels["character"].max((1, 2))).all()


def names_at(vector: np.ndarray, table: Any) -> set[str]:
    return {table[i] for i in np.flatnonzero(vector)}


def test_patches_must_divide_the_picture() -> None:
    with pytest.raises(ValueError, match="expected patches"):
        patch_labels(make("scene", 0), 7)
