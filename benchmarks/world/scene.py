"""Scenes: a few shapes, numbers and codes in the cells of a picture that is mostly background."""

from __future__ import annotations

from collections import Counter
from functools import partial

from world.dialogue import Talk, further_talks
from world.dice import Dice
from world.drawing import SCENE_GRID, SIDES
from world.glyphs import LARGE, SMALL
from world.sample import QA, TILE, Fact, Plan, Thing
from world.vocabulary import CARDINALS, CODE_LETTERS, COLOURS, CONSONANTS, SHAPES, SIZES

MIN_SHAPES, MAX_SHAPES = 3, 9
MAX_COUNT = 3  # of one colour or one shape, in questions
MAX_TEXTS = 4
MAX_SIDE = 6 * TILE  # pixels; rows and columns are counted in words, up to twenty
TAGGED_PERCENT = 30
TAG_OVERLAP = {"small": 1, "large": 6}  # pixels of a shape's height that the plate of its tag covers
TAG_ROOM = {size: SMALL.height + 2 - overlap for size, overlap in TAG_OVERLAP.items()}  # what the plate adds to it

ANSWER_WORDS = ("yes", "no", "row", "column", "with", "number", "code")

Cell = tuple[int, int]  # column and row, from 1

PHRASES = {
    "colour_of": (
        "what colour is {it}?",
        "what color is {it}?",
        "which colour does {it} have?",
        "tell me the colour of {it}.",
    ),
    "shape_of": ("what shape is {it}?", "which shape does {it} have?", "tell me the shape of {it}."),
    "size_of": ("is {it} small or large?", "how large is {it}?", "what size is {it}?"),
    "where_is": ("where is {it}?", "in which row and column is {it}?", "tell me the place of {it}."),
    "what_is_at": ("what is in {place}?", "what do you see in {place}?", "name the thing in {place}."),
    "count_colour": (
        "how many {colour} shapes are there?",
        "count the {colour} shapes.",
        "how many shapes are {colour}?",
    ),
    "count_shape": (
        "how many {shape} shapes are there?",
        "count every {shape}.",
        "how many times is there a {shape}?",
    ),
    "count_all": ("how many shapes are there?", "count the shapes.", "how many shapes do you see?"),
    "exists": ("is there a {it}?", "do you see a {it}?", "does the picture have a {it}?"),
    "read_number": ("what number is in {place}?", "which number stands in {place}?", "read the number in {place}."),
    "read_code": ("what code is in {place}?", "which letters stand in {place}?", "read the code in {place}."),
    "read_tag": ("what number is on the {it}?", "which number does the {it} have?", "read the number on the {it}."),
    "further_left": (
        "which is further left, the {a} or the {b}?",
        "what is more to the left, the {a} or the {b}?",
        "name the one on the left, the {a} or the {b}.",
    ),
    "higher": (
        "which is higher, the {a} or the {b}?",
        "what is nearer to the top, the {a} or the {b}?",
        "name the upper one, the {a} or the {b}.",
    ),
    "list_row": ("list row {row}.", "what is in row {row}, from left to right?", "name all that you see in row {row}."),
    "describe": (
        "describe the picture.",
        "list everything in the picture.",
        "what do you see in the picture?",
        "tell me all the things that are here.",
    ),
}


def plan_scene(dice: Dice, width: int = 2 * TILE, height: int = 2 * TILE, dense: bool = False, talks: int = 0) -> Plan:
    """A scene of this size, in pixels: multiples of 64. A dense one fills most cells and has no questions."""
    for side in (width, height):
        if side % TILE or not TILE <= side <= MAX_SIDE:
            raise ValueError(f"expected a side that is a multiple of {TILE}, up to {MAX_SIDE}; got {width}x{height}")
    while True:
        scene = _Scene(dice, width, height, dense)
        if dense:
            return scene.plan((), ())
        talk = Talk(dice, PHRASES)
        if scene.converse(talk):
            further = further_talks(talks, dice, PHRASES, scene)
            return scene.plan(tuple(talk.turns), (scene.describe(talk),), further)


def random_text(dice: Dice, role: str) -> str:
    """A two-digit number, or a code."""
    if role == "number":
        return str(dice.between(10, 99))
    return "".join(dice.pick(CONSONANTS) for _ in range(CODE_LETTERS))


def text_chance(role: str) -> float:
    """How often a guess of `random_text` is right."""
    return 1 / 90 if role == "number" else len(CONSONANTS) ** -CODE_LETTERS


def tag_of(carrier: Thing, step: int, ident: int, role: str, text: str, is_below: bool) -> Thing:
    """Text on a plate that hangs below the carrier or stands above it, at one step of the carrier's path.

    It is centred unless that would take it across the tile's edge.
    """
    x, y = carrier.path[step]
    width, height = SMALL.text_width(text), SMALL.height
    edge, gap = x // TILE * TILE, 1 - TAG_OVERLAP[carrier.size]
    left = min(max(x + (carrier.width - width) // 2, edge + 1), edge + TILE - width - 1)
    corner = (left, y + carrier.height + gap if is_below else y - gap - height)
    start, mate = carrier.start + step, carrier.ident
    return Thing(ident, role, width, height, (corner,), start, text=text, font=SMALL, is_tag=True, partner=mate)


class _Scene:
    """What stands where, and how to ask about it."""

    def __init__(self, dice: Dice, width: int, height: int, dense: bool) -> None:
        self.dice, self.width, self.height = dice, width, height
        columns, rows = SCENE_GRID.cell_at(width - 1, height - 1)
        self.num_cells = columns * rows
        cells = dice.shuffled([(column, row) for row in range(1, rows + 1) for column in range(1, columns + 1)])
        self.max_shapes = min(MAX_SHAPES, self.num_cells // 2 + 1)
        self.counted_colour, self.counted_shape = dice.pick(COLOURS), dice.pick(SHAPES)
        self.cells: dict[int, Cell] = {}  # by ident
        self.things: list[Thing] = []
        if dense:
            filled = self.num_cells * (100 - dice.pick((5, 30, 60))) // 100
            num_shapes = dice.between(filled // 3, filled)
            num_texts = filled - num_shapes
        else:
            num_shapes = dice.between(MIN_SHAPES, self.max_shapes)
            num_texts = dice.between(1, min(MAX_TEXTS, self.num_cells - num_shapes))
        self._place_shapes(cells[:num_shapes])
        self._place_texts(cells[num_shapes : num_shapes + num_texts])
        self.shapes = [thing for thing in self.things if thing.role == "shape"]
        self.texts = [thing for thing in self.things if thing.role != "shape" and not thing.is_tag]
        self.tags = {thing.partner: thing for thing in self.things if thing.is_tag}
        self.shape_counts = Counter(thing.shape for thing in self.shapes)
        self.colour_counts = Counter(thing.colour for thing in self.shapes)
        self.name_counts = Counter(thing.name for thing in self.shapes)

    def _values(self, counted: str, values: tuple[str, ...], number: int) -> list[str]:
        """One value per shape. The counted one comes 0 to 3 times, each as likely whatever the number of shapes."""
        count = self.dice.between(0, min(MAX_COUNT, number))
        others = [value for value in values if value != counted]
        return self.dice.shuffled([counted] * count + [self.dice.pick(others) for _ in range(number - count)])

    def _corner_in(self, cell: Cell, width: int, height: int) -> tuple[int, int]:
        """Somewhere in the cell, one pixel from its edges where there is room."""
        left, top = SCENE_GRID.corner_of(*cell)
        free_x, free_y = SCENE_GRID.cell_width - width, SCENE_GRID.cell_height - height
        margin_x, margin_y = min(1, free_x // 2), min(1, free_y // 2)
        x, y = self.dice.between(margin_x, free_x - margin_x), self.dice.between(margin_y, free_y - margin_y)
        return left + x, top + y

    def _keep(self, cell: Cell, thing: Thing) -> None:
        self.things.append(thing)
        self.cells[thing.ident] = cell

    def _new_text(self, role: str) -> str:
        """A text that no other thing of the scene has."""
        taken = {thing.text for thing in self.things}
        text = random_text(self.dice, role)
        while text in taken:
            text = random_text(self.dice, role)
        return text

    def _place_shapes(self, cells: list[Cell]) -> None:
        colours = self._values(self.counted_colour, COLOURS, len(cells))
        shapes = self._values(self.counted_shape, SHAPES, len(cells))
        for cell, colour, shape in zip(cells, colours, shapes, strict=True):
            size, ident = self.dice.pick(SIZES), len(self.things) + 1
            side, is_tagged = SIDES[size], self.dice.percent(TAGGED_PERCENT)
            corner = self._corner_in(cell, side, side + TAG_ROOM[size] if is_tagged else side)
            carrier = Thing(ident, "shape", side, side, (corner,), shape=shape, colour=colour, size=size)
            self._keep(cell, carrier)
            if is_tagged:
                self._keep(cell, tag_of(carrier, 0, ident + 1, "number", self._new_text("number"), is_below=True))

    def _place_texts(self, cells: list[Cell]) -> None:
        for cell in cells:
            role = "number" if self.dice.percent(60) else "code"
            font = LARGE if role == "number" and self.dice.percent(50) else SMALL
            text, ident = self._new_text(role), len(self.things) + 1
            width, height = font.text_width(text), font.height
            corner = self._corner_in(cell, width, height)
            self._keep(cell, Thing(ident, role, width, height, (corner,), text=text, font=font))

    def plan(self, dialogue: tuple[QA, ...], alone: tuple[QA, ...], further: tuple[tuple[QA, ...], ...] = ()) -> Plan:
        return Plan(1, self.height, self.width, tuple(self.things), SCENE_GRID, dialogue, alone, further)

    # How things are named

    def _place(self, thing: Thing) -> str:
        column, row = self.cells[thing.ident]
        return f"row {CARDINALS[row]} column {CARDINALS[column]}"

    def _spoken(self, thing: Thing) -> str:
        tag = self.tags.get(thing.ident)
        return f"{thing.name} with {tag.text}" if tag else thing.name

    def _pick(self, talk: Talk, things: list[Thing]) -> Thing | None:
        """One of these of which nothing was told yet."""
        fresh = [thing for thing in things if talk.is_fresh(thing.ident)]
        return self.dice.pick(fresh) if fresh else None

    def _named(self, talk: Talk) -> list[Thing]:
        """Shapes of which nothing was told, and whose colour and shape no other one has."""
        return [thing for thing in self.shapes if self.name_counts[thing.name] == 1 and talk.is_fresh(thing.ident)]

    # Questions: each tries to add one turn and says whether it did

    def converse(self, talk: Talk) -> bool:
        counts = (self.count_all, self.count_colour, self.count_shape)
        openers = self.dice.sample(counts, self.dice.below(3))
        others = (
            *(partial(self.attribute, talk, name) for name in ("colour", "shape", "size")),
            *(partial(ask, talk) for ask in (self.where_is, self.what_is_at, self.exists)),
            *(partial(ask, talk) for ask in (self.read_tag, self.list_row)),
            *(partial(self.read, talk, role) for role in ("number", "code")),
            *(partial(self.compare, talk, axis) for axis in (0, 1)),
        )
        return talk.converse([partial(ask, talk) for ask in openers], others)

    def count_all(self, talk: Talk) -> bool:
        regions = [thing.region() for thing in self.shapes]
        choices = self.max_shapes - MIN_SHAPES + 1
        return talk.add("count_all", {}, CARDINALS[len(self.shapes)], regions, 1 / choices, [(0, "count")])

    def count_colour(self, talk: Talk) -> bool:
        word = self.counted_colour
        return self._count(talk, "colour", word, [thing for thing in self.shapes if thing.colour == word])

    def count_shape(self, talk: Talk) -> bool:
        word = self.counted_shape
        return self._count(talk, "shape", word, [thing for thing in self.shapes if thing.shape == word])

    def _count(self, talk: Talk, attribute: str, word: str, found: list[Thing]) -> bool:
        regions = [thing.region() for thing in found]
        answer, chance, asks = CARDINALS[len(found)], 1 / (MAX_COUNT + 1), [(0, f"{word} count")]
        return talk.add(f"count_{attribute}", {attribute: word}, answer, regions, chance, asks, closes=[word])

    def attribute(self, talk: Talk, name: str) -> bool:
        """Colour, shape or size of a thing named by what else it is, or by its place."""
        counts = {"colour": self.shape_counts, "shape": self.colour_counts, "size": self.name_counts}[name]
        known = {"colour": ("shape",), "shape": ("colour",), "size": ("colour", "shape")}[name]
        label = {"colour": "the {0.shape}", "shape": "the {0.colour} thing", "size": "the {0.name}"}[name]
        is_by_place = self.dice.percent(50)
        keys = {thing.ident: " ".join(getattr(thing, attribute) for attribute in known) for thing in self.shapes}
        thing = self._pick(talk, [thing for thing in self.shapes if is_by_place or counts[keys[thing.ident]] == 1])
        if thing is None:
            return False
        it = label.format(thing)
        if is_by_place:
            known, it = ("place",), f"the thing in {self._place(thing)}"
        values = {"colour": COLOURS, "shape": SHAPES, "size": SIZES}[name]
        tells = [(thing.ident, attribute) for attribute in known]
        asks = [(thing.ident, name)]
        return talk.add(f"{name}_of", {"it": it}, getattr(thing, name), [thing.region()], 1 / len(values), asks, tells)

    def where_is(self, talk: Talk) -> bool:
        thing = self._pick(talk, self._named(talk) + self.texts)
        if thing is None:
            return False
        known = ("colour", "shape") if thing.role == "shape" else ("text",)
        tells = [(thing.ident, attribute) for attribute in known]
        names, asks, chance = {"it": f"the {thing.name}"}, [(thing.ident, "place")], 1 / self.num_cells
        return talk.add("where_is", names, self._place(thing), [thing.region()], chance, asks, tells)

    def what_is_at(self, talk: Talk) -> bool:
        thing = self._pick(talk, self.shapes)
        if thing is None:
            return False
        asks = [(thing.ident, attribute) for attribute in ("colour", "shape", "size")]
        names, answer = {"place": self._place(thing)}, f"{thing.size} {thing.name}"
        chance = 1 / (len(SIZES) * len(COLOURS) * len(SHAPES))
        return talk.add("what_is_at", names, answer, [thing.region()], chance, asks, [(thing.ident, "place")])

    def exists(self, talk: Talk) -> bool:
        """No asks for the colour of one thing with the shape of another."""
        present = [thing for thing in self.shapes if talk.is_fresh(thing.ident) and talk.is_open(*thing.name.split())]
        mixed = {f"{a.colour} {b.shape}" for a in self.shapes for b in self.shapes} - set(self.name_counts)
        absent = sorted(name for name in mixed if talk.is_open(*name.split()))
        if not present or not absent:
            return False
        if self.dice.percent(50):
            thing = self.dice.pick(present)
            asks = [(thing.ident, attribute) for attribute in ("colour", "shape")]
            return talk.add("exists", {"it": thing.name}, "yes", [thing.region()], 1 / 2, asks)
        name = self.dice.pick(absent)
        return talk.add("exists", {"it": name}, "no", (), 1 / 2, [(0, name)])

    def read(self, talk: Talk, role: str) -> bool:
        thing = self._pick(talk, [text for text in self.texts if text.role == role])
        if thing is None:
            return False
        names, asks, tells = {"place": self._place(thing)}, [(thing.ident, "text")], [(thing.ident, "place")]
        return talk.add(f"read_{role}", names, thing.text, [thing.region()], text_chance(role), asks, tells)

    def read_tag(self, talk: Talk) -> bool:
        thing = self._pick(talk, [thing for thing in self._named(talk) if thing.ident in self.tags])
        if thing is None:
            return False
        tag = self.tags[thing.ident]
        tells = [(thing.ident, "colour"), (thing.ident, "shape")]
        regions = [thing.region(), tag.region()]
        return talk.add(
            "read_tag", {"it": thing.name}, tag.text, regions, text_chance(tag.role), [(tag.ident, "text")], tells
        )

    def compare(self, talk: Talk, axis: int) -> bool:
        """Which of two shapes is further left (axis 0) or higher (axis 1)."""
        named = self._named(talk)
        if len(named) < 2:
            return False
        a, b = self.dice.sample(named, 2)
        at_a, at_b = self.cells[a.ident][axis], self.cells[b.ident][axis]
        if at_a == at_b:
            return False
        answer = a.name if at_a < at_b else b.name
        asks = [(thing.ident, "order") for thing in (a, b)]
        tells = [(thing.ident, attribute) for thing in (a, b) for attribute in ("colour", "shape")]
        type = ("further_left", "higher")[axis]
        return talk.add(type, {"a": a.name, "b": b.name}, answer, [a.region(), b.region()], 1 / 2, asks, tells)

    def list_row(self, talk: Talk) -> bool:
        """A row with at least two things, all of them new."""
        rows: dict[int, list[Thing]] = {}
        for thing in self._in_order(self.shapes + self.texts):
            rows.setdefault(self.cells[thing.ident][1], []).append(thing)
        full = [r for r, found in rows.items() if len(found) > 1 and all(talk.is_fresh(t.ident) for t in found)]
        if not full:
            return False
        row = self.dice.pick(full)
        answer = ", ".join(self._spoken(thing) for thing in rows[row])
        asks = [fact for thing in rows[row] for fact in self._all_facts(thing)]
        regions = [thing.region() for thing in rows[row]]
        return talk.add("list_row", {"row": CARDINALS[row]}, answer, regions, 0.0, asks)

    def describe(self, talk: Talk) -> QA:
        things = self._in_order(self.shapes + self.texts)
        answer = ", ".join(self._spoken(thing) for thing in things)
        return talk.compose("describe", {}, answer, (), 0.0, [f for t in things for f in self._all_facts(t)])

    def _in_order(self, things: list[Thing]) -> list[Thing]:
        """By rows from the top, each from left to right."""
        return sorted(things, key=lambda thing: self.cells[thing.ident][::-1])

    def _all_facts(self, thing: Thing) -> list[Fact]:
        """What a list tells of a thing and of the tag on it."""
        if thing.role != "shape":
            return [(thing.ident, "text"), (thing.ident, "place")]
        tag = self.tags.get(thing.ident)
        told = [(thing.ident, attribute) for attribute in ("colour", "shape", "place")]
        return [*told, (tag.ident, "text")] if tag else told
