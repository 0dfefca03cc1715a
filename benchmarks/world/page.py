"""Pages: columns of rows, each a word and its value in fine print, under a title and over a reference."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from world.dialogue import Talk, further_talks
from world.dice import Dice
from world.glyphs import LARGE, SMALL
from world.sample import QA, TILE, Fact, Grid, Plan, Region, Thing
from world.vocabulary import CARDINALS, CODE_LETTERS, COLUMN_NAMES, CONSONANTS, REFERENCE, ROW_WORDS, TITLES

PAGE_GRID = Grid(TILE, 9)  # a column is one tile wide, a line 9 pixels high
MAX_WIDTH, MAX_HEIGHT = len(COLUMN_NAMES) * TILE, 3 * TILE
HEADER_LINES, FOOTER_LINES = 2, 1
MIN_ROWS = 3  # in a column
ROW_CHOICES = 8  # how many different numbers of rows a column may have, if the page is high enough
NUMBER_PERCENT = 65  # of the values; the others are codes
VALUE_END = 61  # the pixel of a column where values end

PHRASES = {
    "read_number": (
        "what is the value of {word}?",
        "which number stands beside {word}?",
        "read the number of {word}.",
        "how much is {word}?",
    ),
    "read_code": ("what is the code of {word}?", "which letters stand beside {word}?", "read the code of {word}."),
    "read_label": ("which word stands beside {value}?", "what has the value {value}?", "whose value is {value}?"),
    "read_row": ("read {row}.", "what does {row} say?", "what is written in {row}?"),
    "which_row": ("in which row is {word}?", "where is {word}?", "tell me the row of {word}."),
    "larger": (
        "which has the larger number, {a} or {b}?",
        "which is more, {a} or {b}?",
        "name the one with the larger value, {a} or {b}.",
    ),
    "exists": ("is there a row for {word}?", "does the page have {word}?", "do you see {word} on the page?"),
    "title": ("what is the title?", "what is the page called?", "read the title of the page."),
    "reference": (
        "what is the reference?",
        "which code is at the bottom of the page?",
        "read the code in the last line.",
    ),
    "count_rows": (
        "how many rows does {column} have?",
        "count the rows of {column}.",
        "how many rows are in {column}?",
    ),
    "list_rows": (
        "read rows {first} to {last} of {column}.",
        "list rows {first} to {last} of {column}.",
        "what do rows {first} to {last} of {column} say?",
    ),
    "list_column": (
        "read {column} from top to bottom.",
        "list all rows of {column}.",
        "what does {column} say?",
    ),
}
ANSWER_WORDS = ("yes", "no", "row", "of")


@dataclass(frozen=True)
class Row:
    """Row `number`, from 1, of column `column`, from 1: a word and its value."""

    column: int
    number: int
    word: Thing
    value: Thing

    @property
    def said(self) -> str:
        return f"{self.word.text} {self.value.text}"

    @property
    def facts(self) -> list[Fact]:
        return [(self.word.ident, "text"), (self.value.ident, "text"), (self.word.ident, "place")]


def plan_page(dice: Dice, width: int = 2 * TILE, height: int = 2 * TILE, dense: bool = False, talks: int = 0) -> Plan:
    """A page of this size, in pixels: multiples of 64. A dense one is full, half of its words being random letters,
    and has no questions."""
    if width % TILE or height % TILE or not TILE <= width <= MAX_WIDTH or not TILE <= height <= MAX_HEIGHT:
        limits = f"{MAX_WIDTH}x{MAX_HEIGHT}"
        raise ValueError(f"expected multiples of {TILE}, up to {limits}; got {width}x{height}")
    while True:
        page = _Page(dice, width, height, dense)
        if dense:
            return page.plan((), ())
        talk = Talk(dice, PHRASES)
        if page.converse(talk):
            further = further_talks(talks, dice, PHRASES, page)
            return page.plan(tuple(talk.turns), page.columns_read(talk), further)


class _Page:
    """What is written where, and how to ask about it."""

    def __init__(self, dice: Dice, width: int, height: int, dense: bool) -> None:
        self.dice, self.width, self.height = dice, width, height
        self.num_columns, lines = PAGE_GRID.cell_at(width - 1, height - 1)
        self.last_line = lines
        self.max_rows = min(lines - HEADER_LINES - FOOTER_LINES, len(ROW_WORDS) // self.num_columns)
        self.min_rows = max(MIN_ROWS, self.max_rows - ROW_CHOICES + 1)
        self.names = COLUMN_NAMES[self.num_columns]
        self.things: list[Thing] = []
        self.rows: list[Row] = []
        self.margin_x, self.margin_y = dice.between(1, 3), dice.between(0, 1)
        words = dice.shuffled(ROW_WORDS)
        self._write_title()
        for column in range(1, self.num_columns + 1):
            count = self.max_rows if dense else dice.between(self.min_rows, self.max_rows)
            for number in range(1, count + 1):
                word = words.pop()
                if dense and dice.percent(50):
                    word = self._letters(dice.between(3, 6))
                self._write_row(column, number, word)
        self._write_reference()
        self.absent = words

    def _letters(self, count: int) -> str:
        return "".join(chr(ord("a") + self.dice.below(26)) for _ in range(count))

    def _write(self, role: str, text: str, x: int, line: int, partner: int = 0) -> Thing:
        """A word of fine print at a pixel of a line, both counted from the page's corner."""
        y = PAGE_GRID.corner_of(1, line)[1] + self.margin_y
        width = SMALL.text_width(text)
        ident = len(self.things) + 1
        thing = Thing(ident, role, width, SMALL.height, ((x, y),), text=text, font=SMALL, partner=partner)
        self.things.append(thing)
        return thing

    def _write_title(self) -> None:
        text = self.dice.pick(TITLES)
        corner = (self.margin_x, 2 + self.margin_y)
        self.title = Thing(1, "word", LARGE.text_width(text), LARGE.height, (corner,), text=text, font=LARGE)
        self.things.append(self.title)

    def _write_reference(self) -> None:
        self._write("word", REFERENCE, self.margin_x, self.last_line)
        x = self.margin_x + SMALL.text_width(REFERENCE) + 2 * SMALL.pitch
        self.reference = self._write("code", self._new_value("code"), x, self.last_line)

    def _write_row(self, column: int, number: int, word: str) -> None:
        left, line, ident = (column - 1) * TILE, number + HEADER_LINES, len(self.things) + 1
        role = "number" if self.dice.percent(NUMBER_PERCENT) else "code"
        text = self._new_value(role)
        label = self._write("word", word, left + self.margin_x, line, partner=ident + 1)
        value = self._write(role, text, left + VALUE_END - SMALL.text_width(text), line, partner=ident)
        self.rows.append(Row(column, number, label, value))

    def _new_value(self, role: str) -> str:
        """A number of two or three digits, or a code, that is not on the page yet."""
        taken = {thing.text for thing in self.things}
        while True:
            if role == "number":
                text = str(self.dice.between(*self.dice.pick(((10, 99), (100, 999)))))
            else:
                text = "".join(self.dice.pick(CONSONANTS) for _ in range(CODE_LETTERS))
            if text not in taken:
                return text

    def plan(self, dialogue: tuple[QA, ...], alone: tuple[QA, ...], further: tuple[tuple[QA, ...], ...] = ()) -> Plan:
        return Plan(1, self.height, self.width, tuple(self.things), PAGE_GRID, dialogue, alone, further)

    # How things are named

    def _column_name(self, column: int) -> str:
        return self.names[column - 1]

    def _row_name(self, row: Row) -> str:
        return f"row {CARDINALS[row.number]} of {self._column_name(row.column)}"

    def _column_box(self, column: int) -> Region:
        return Region(0, 1, (column - 1) * TILE, 0, column * TILE, self.height)

    def _regions(self, *rows: Row) -> list[Region]:
        return [thing.region() for row in rows for thing in (row.word, row.value)]

    def _fresh(self, talk: Talk, role: str = "") -> list[Row]:
        """Rows of which nothing was told, by the role of their value if one is given."""
        rows = [row for row in self.rows if talk.is_fresh(row.word.ident) and talk.is_fresh(row.value.ident)]
        return [row for row in rows if row.value.role == role] if role else rows

    # Questions: each tries to add one turn and says whether it did

    def converse(self, talk: Talk) -> bool:
        others = (
            *(partial(self.read_value, talk, role) for role in ("number", "code")),
            *(partial(ask, talk) for ask in (self.read_label, self.read_row, self.which_row, self.larger)),
            *(partial(ask, talk) for ask in (self.exists, self.read_title, self.read_reference, self.list_rows)),
        )
        openers = [partial(self.count_rows, talk)] if self.dice.percent(50) else []
        return talk.converse(openers, others)

    def read_value(self, talk: Talk, role: str) -> bool:
        rows = self._fresh(talk, role)
        if not rows:
            return False
        row = self.dice.pick(rows)
        chance = 1 / 180 if role == "number" else len(CONSONANTS) ** -CODE_LETTERS
        names, asks, tells = {"word": row.word.text}, [(row.value.ident, "text")], [(row.word.ident, "text")]
        return talk.add(f"read_{role}", names, row.value.text, self._regions(row), chance, asks, tells)

    def read_label(self, talk: Talk) -> bool:
        rows = self._fresh(talk)
        if not rows:
            return False
        row = self.dice.pick(rows)
        asks, tells = [(row.word.ident, "text")], [(row.value.ident, "text")]
        names, chance = {"value": row.value.text}, 1 / len(ROW_WORDS)
        return talk.add("read_label", names, row.word.text, self._regions(row), chance, asks, tells)

    def read_row(self, talk: Talk) -> bool:
        rows = self._fresh(talk)
        if not rows:
            return False
        row = self.dice.pick(rows)
        names, chance = {"row": self._row_name(row)}, 1 / (180 * len(ROW_WORDS))
        return talk.add("read_row", names, row.said, self._regions(row), chance, row.facts[:2], row.facts)

    def which_row(self, talk: Talk) -> bool:
        """Not after a count, which would tell how far rows go. The best guess is the first row of some column."""
        rows = self._fresh(talk)
        if not rows or any(turn.type == "count_rows" for turn in talk.turns):
            return False
        row = self.dice.pick(rows)
        counts = range(self.min_rows, self.max_rows + 1)
        chance = sum(1 / count for count in counts) / len(counts) / self.num_columns
        asks, tells = [(row.word.ident, "place")], [(row.word.ident, "text")]
        names, answer = {"word": row.word.text}, self._row_name(row)
        return talk.add("which_row", names, answer, [row.word.region()], chance, asks, tells)

    def larger(self, talk: Talk) -> bool:
        rows = self._fresh(talk, "number")
        if len(rows) < 2:
            return False
        a, b = self.dice.sample(rows, 2)
        answer = max(a, b, key=lambda row: int(row.value.text)).word.text
        asks = [(row.value.ident, "order") for row in (a, b)]
        tells = [(row.word.ident, "text") for row in (a, b)]
        names = {"a": a.word.text, "b": b.word.text}
        return talk.add("larger", names, answer, self._regions(a, b), 1 / 2, asks, tells)

    def exists(self, talk: Talk) -> bool:
        rows = self._fresh(talk)
        if not rows or not self.absent:
            return False
        if self.dice.percent(50):
            row = self.dice.pick(rows)
            asks, regions = [(row.word.ident, "text")], [row.word.region()]
            return talk.add("exists", {"word": row.word.text}, "yes", regions, 1 / 2, asks)
        word = self.dice.pick(self.absent)
        return talk.add("exists", {"word": word}, "no", (), 1 / 2, [(0, word)])

    def read_title(self, talk: Talk) -> bool:
        chance, asks = 1 / len(TITLES), [(self.title.ident, "text")]
        return talk.add("title", {}, self.title.text, [self.title.region()], chance, asks)

    def read_reference(self, talk: Talk) -> bool:
        chance, asks = len(CONSONANTS) ** -CODE_LETTERS, [(self.reference.ident, "text")]
        return talk.add("reference", {}, self.reference.text, [self.reference.region()], chance, asks)

    def count_rows(self, talk: Talk) -> bool:
        column = self.dice.between(1, self.num_columns)
        count, choices = self._height_of(column), self.max_rows - self.min_rows + 1
        names, asks = {"column": self._column_name(column)}, [(0, f"rows of column {column}")]
        return talk.add("count_rows", names, CARDINALS[count], [self._column_box(column)], 1 / choices, asks)

    def _height_of(self, column: int) -> int:
        return sum(row.column == column for row in self.rows)

    def list_rows(self, talk: Talk) -> bool:
        """Two to four rows that follow each other, all of them new."""
        column, length = self.dice.between(1, self.num_columns), self.dice.between(2, 4)
        fresh = {row.number: row for row in self._fresh(talk) if row.column == column}
        firsts = [first for first in fresh if all(first + i in fresh for i in range(length))]
        if not firsts:
            return False
        first = self.dice.pick(firsts)
        rows = [fresh[first + i] for i in range(length)]
        names = {
            "first": CARDINALS[first],
            "last": CARDINALS[first + length - 1],
            "column": self._column_name(column),
        }
        return talk.add("list_rows", names, self._said(rows), self._regions(*rows), 0.0, self._facts(rows))

    def columns_read(self, talk: Talk) -> tuple[QA, ...]:
        """One question per column: a long answer each."""
        found = []
        for column in range(1, self.num_columns + 1):
            rows = [row for row in self.rows if row.column == column]
            names, box = {"column": self._column_name(column)}, [self._column_box(column)]
            found.append(talk.compose("list_column", names, self._said(rows), box, 0.0, self._facts(rows)))
        return tuple(found)

    def _said(self, rows: list[Row]) -> str:
        return ", ".join(row.said for row in rows)

    def _facts(self, rows: list[Row]) -> list[Fact]:
        return [fact for row in rows for fact in row.facts]
