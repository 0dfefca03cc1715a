"""The answers are right: found again from the question's words and from where ink is, not from how they were made."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from world.sample import QA, Sample, Thing
from world.splits import make
from world.vocabulary import CARDINALS, COLOURS, SHAPES

NAME = re.compile(rf"\b({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})\b")


@dataclass(frozen=True)
class Seen:
    """A thing where its ink is: the middle of its first and its last frame."""

    thing: Thing
    frames: list[int]
    first: tuple[float, float]
    last: tuple[float, float]


def look(sample: Sample) -> list[Seen]:
    found = []
    for thing in sample.things:
        frames = [int(frame) for frame in np.flatnonzero((sample.mask == thing.ident).any((1, 2)))]
        middles = []
        for frame in (frames[0], frames[-1]):
            y, x = np.nonzero(sample.mask[frame] == thing.ident)
            middles.append(((x.min() + x.max()) / 2, (y.min() + y.max()) / 2))
        found.append(Seen(thing, frames, *middles))
    return found


def cell(seen: Seen) -> tuple[str, str]:
    """Row and column in words: a tile has three of each, of 21 pixels."""
    x, y = seen.first
    column, row = (int(v // 64 * 3 + v % 64 // 21) + 1 for v in (x, y))
    return CARDINALS[row], CARDINALS[column]


def named(seen: list[Seen], words: str) -> list[Seen]:
    """The shapes that a text names, in its order."""
    return [one for name in NAME.findall(words) for one in seen if (one.thing.colour, one.thing.shape) == name]


def placed(seen: list[Seen], words: str) -> list[Seen]:
    places = re.findall(r"row (\w+) column (\w+)", words)
    return [one for place in places for one in seen if cell(one) == place and not one.thing.is_tag]


def answer_of_scene(turn: QA, seen: list[Seen]) -> str:
    shapes = [one for one in seen if one.thing.role == "shape"]
    words = set(re.findall(r"\w+", turn.question))
    if turn.type in ("colour_of", "shape_of", "size_of", "what_is_at"):
        found = placed(shapes, turn.question) or [
            one for one in shapes if words & {*COLOURS, *SHAPES} <= {one.thing.colour, one.thing.shape}
        ]
        (one,) = found
        if turn.type == "what_is_at":
            return f"{one.thing.size} {one.thing.colour} {one.thing.shape}"
        return str(getattr(one.thing, turn.type.removesuffix("_of")))
    if turn.type == "where_is":
        (one,) = named(shapes, turn.question) or [one for one in seen if one.thing.text and one.thing.text in words]
        return "row {} column {}".format(*cell(one))
    if turn.type.startswith("count"):
        wanted = words & {*COLOURS, *SHAPES}
        return CARDINALS[sum(wanted <= {one.thing.colour, one.thing.shape} for one in shapes)]
    if turn.type == "exists":
        return "yes" if named(shapes, turn.question) else "no"
    if turn.type in ("read_number", "read_code"):
        (one,) = placed(seen, turn.question)
        assert f"read_{one.thing.role}" == turn.type
        return one.thing.text
    if turn.type == "read_tag":
        (carrier,) = named(shapes, turn.question)
        (tag,) = [one for one in seen if one.thing.is_tag and cell(one) == cell(carrier)]
        return tag.thing.text
    if turn.type in ("further_left", "higher"):
        axis = 0 if turn.type == "further_left" else 1
        return min(named(shapes, turn.question), key=lambda one: one.first[axis]).thing.name
    row = re.search(r"row (\w+)", turn.question)
    things = [one for one in seen if not one.thing.is_tag and (row is None or cell(one)[0] == row[1])]
    things.sort(key=lambda one: [CARDINALS.index(word) for word in cell(one)])
    tags = {cell(one): f" with {one.thing.text}" for one in seen if one.thing.is_tag}
    return ", ".join(one.thing.name + tags.get(cell(one), "") for one in things)


def answer_of_page(turn: QA, seen: list[Seen], width: int) -> str:
    lines: dict[tuple[int, int], list[Seen]] = {}  # by column and line
    for one in sorted(seen[1:], key=lambda one: one.first[0]):
        x, y = one.first
        lines.setdefault((int(x // 64), int(y // 64 * 7 + y % 64 // 9)), []).append(one)
    bottom = max(line for _, line in lines)
    rows = {spot: [one.thing.text for one in found] for spot, found in lines.items() if spot[1] < bottom}
    names = {64: ["the page"], 128: ["the left column", "the right column"]}[width]
    words = re.findall(r"\w+", turn.question)
    if turn.type == "title":
        return seen[0].thing.text
    if turn.type == "reference":
        return lines[0, bottom][-1].thing.text
    column = next((i for i, name in enumerate(names) if name in turn.question), 0)
    if turn.type == "count_rows":
        return CARDINALS[sum(at == column for at, _ in rows)]
    numbers = [CARDINALS.index(word) for word in words if word in CARDINALS]
    if turn.type == "exists":
        return "yes" if {row[0] for row in rows.values()} & set(words) else "no"
    if turn.type == "larger":
        values = {row[0]: int(row[1]) for row in rows.values() if row[0] in words and row[1].isdigit()}
        return max(values, key=lambda word: values[word])
    if turn.type in ("read_number", "read_code", "read_label", "which_row"):
        pairs = [(spot, row) for spot, row in rows.items() if set(row) & set(words[1:])]
        ((spot, row),) = [pair for pair in pairs if pair[1][0] not in ("page",)]
        if turn.type == "which_row":
            return f"row {CARDINALS[spot[1] - 1]} of {names[spot[0]]}"
        return row[0] if turn.type == "read_label" else row[1]
    first, last = (numbers[0], numbers[-1]) if numbers else (1, 99)
    wanted = [spot for spot in sorted(rows) if spot[0] == column and first <= spot[1] - 1 <= last]
    return ", ".join(" ".join(rows[spot]) for spot in wanted)


def motion_of(one: Seen) -> str:
    dx, dy = one.last[0] - one.first[0], one.last[1] - one.first[1]
    if abs(dx) + abs(dy) < 6:  # a tag hides some of a shape, but moves are longer
        return "nowhere"
    return ("right" if dx > 0 else "left") if abs(dx) > abs(dy) else "down" if dy > 0 else "up"


def answer_of_clip(turn: QA, seen: list[Seen]) -> str:
    shapes = sorted((one for one in seen if one.thing.role == "shape"), key=lambda one: one.frames[0])
    texts = [one for one in seen if one.thing.text]
    words = re.findall(r"\w+", turn.question)
    asked = named(shapes, turn.question)
    order = [one.thing.name for one in shapes]
    if turn.type == "count_shapes":
        return CARDINALS[len(shapes)]
    if turn.type in ("first", "last"):
        return order[0 if turn.type == "first" else -1]
    if turn.type == "after":
        return order[order.index(asked[0].thing.name) + 1]
    if turn.type == "which_first":
        return min(asked, key=lambda one: one.frames[0]).thing.name
    if turn.type == "order":
        return ", ".join(order)
    if turn.type == "direction":
        return motion_of(asked[0])
    if turn.type == "exists":
        return "yes" if asked else "no"
    if turn.type == "becomes":
        return asked[0].thing.later_colour
    if turn.type == "what_changes":
        return next(one.thing.name for one in shapes if one.thing.later_colour)
    if turn.type.startswith("needle"):
        (one,) = [one for one in texts if turn.type.endswith(one.thing.role)]
        assert len(one.frames) == 1
        return one.thing.text
    mentioned = [one for one in texts if one.thing.text in words]
    if turn.type == "where_is":
        x, y = (asked or mentioned)[0].first
        return f"{('top', 'middle', 'bottom')[int(y // 21)]} {('left', 'centre', 'right')[int(x // 21)]}"
    if turn.type == "shown_while":
        (one,) = [one for one in shapes if mentioned[0].frames[0] in one.frames]
        return one.thing.name
    if turn.type == "shown_with":
        role = "code" if {"code", "letters"} & set(words) else "number"
        (one,) = [one for one in texts if one.frames[0] in asked[0].frames and one.thing.role == role]
        return one.thing.text
    events = []
    for one in shapes:
        motion = motion_of(one)
        does = "stays" if motion == "nowhere" else f"moves {motion}"
        events.append((one.frames[0], f"{one.thing.name} {does}"))
        if one.thing.later_colour:
            events.append((one.thing.change, f"{one.thing.name} turns {one.thing.later_colour}"))
    events += [(one.frames[0], one.thing.name) for one in texts]
    return ", ".join(text for _, text in sorted(events, key=lambda event: event[0]))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("scene", {}),
        ("scene", {"width": 64, "height": 64}),
        ("scene", {"width": 128, "height": 64}),
        ("page", {}),
        ("page", {"width": 64, "height": 128}),
        ("clip", {}),
        ("clip", {"frames": 4}),
        ("clip", {"frames": 40}),
    ],
)
def test_answers_are_what_is_seen(kind: str, options: dict[str, Any]) -> None:
    for seed in range(150):
        sample = make(kind, seed, **options)
        seen = look(sample)
        for turn in (*sample.dialogue, *sample.alone):
            if kind == "scene":
                answer = answer_of_scene(turn, seen)
            elif kind == "page":
                answer = answer_of_page(turn, seen, sample.mask.shape[2])
            else:
                answer = answer_of_clip(turn, seen)
            assert answer == turn.answer, f"seed {seed}: {turn}"


def test_a_changed_colour_is_seen_from_its_frame_on() -> None:
    changes = 0
    for seed in range(40):
        sample = make("clip", seed)
        for thing in sample.things:
            if thing.later_colour:
                changes += 1
                tones = [
                    tuple(sample.rgb[frame][sample.mask[frame] == thing.ident].min(0))
                    for frame in range(thing.start, thing.stop)
                ]
                step = thing.change - thing.start
                assert 0 < step < len(tones)
                assert np.ptp(tones[:step], axis=0).max() <= 2
                assert np.ptp(tones[step:], axis=0).max() <= 2
                assert np.abs(np.subtract(tones[step], tones[step - 1])).sum() > 60
    assert changes > 10


def test_shapes_meet_in_some_clips() -> None:
    """Half of the shapes stay a little beside the next one, and no frame is without a shape."""
    num_shapes = []
    for seed in range(60):
        sample = make("clip", seed)
        idents = [thing.ident for thing in sample.things if thing.role == "shape"]
        num_shapes += [sum(int((frame == ident).any()) for ident in idents) for frame in sample.mask]
    assert set(num_shapes) == {1, 2}
    assert 0.05 < num_shapes.count(2) / len(num_shapes) < 0.3


def test_a_flash_is_alone_with_its_shape() -> None:
    for seed in range(60):
        sample = make("clip", seed)
        for thing in sample.things:
            if thing.text:
                there = set(np.unique(sample.mask[thing.start])) - {0, thing.ident}
                assert there == {thing.partner}
