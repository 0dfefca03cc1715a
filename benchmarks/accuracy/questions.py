"""Which questions are asked: held-out samples of the world, always the same for a given number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from world.sample import QA
from world.splits import TEST, make_plan

# Types whose answers are lists, items parted by commas.
LONG_TYPES = frozenset(
    {
        ("scene", "describe"),
        ("scene", "list_row"),
        ("page", "list_column"),
        ("page", "list_rows"),
        ("clip", "tell"),
        ("clip", "order"),
    }
)

WRONG_OFFSET = 50_000  # from a sample's seed to that of the picture that is wrongly shown with it


@dataclass(frozen=True)
class Layout:
    """One kind of sample at one size; `share` of all questions are of it."""

    name: str
    kind: str
    options: dict[str, int]
    share: float
    first: int  # index into TEST of its first sample; layouts lie 100,000 apart


LAYOUTS = (
    Layout("scene 128x128", "scene", {"width": 128, "height": 128}, 0.20, 0),
    Layout("scene 192x128", "scene", {"width": 192, "height": 128}, 0.10, 100_000),
    Layout("page 128x128", "page", {"width": 128, "height": 128}, 0.20, 200_000),
    Layout("page 128x192", "page", {"width": 128, "height": 192}, 0.10, 300_000),
    Layout("clip 08", "clip", {"frames": 8}, 0.10, 400_000),
    Layout("clip 16", "clip", {"frames": 16}, 0.20, 500_000),
    Layout("clip 32", "clip", {"frames": 32}, 0.10, 600_000),
)


@dataclass(frozen=True)
class Question:
    """One question about a sample. `turn` counts from 0 within the dialogue; -1 for one that is asked alone."""

    kind: str  # of the sample
    type: str
    text: str
    answer: str
    chance: float
    turn: int

    @property
    def is_long(self) -> bool:
        """Whether the answer is a list."""
        return (self.kind, self.type) in LONG_TYPES


@dataclass(frozen=True)
class Item:
    """One held-out sample: what is needed to draw it, and what is asked about it, the dialogue first."""

    layout: Layout
    seed: int
    questions: tuple[Question, ...]

    @property
    def key(self) -> str:
        return f"{self.layout.name} #{self.seed}"

    @property
    def wrong_seed(self) -> int:
        """The sample of the same layout whose picture stands in for the right one."""
        return self.seed + WRONG_OFFSET

    @property
    def dialogue(self) -> tuple[Question, ...]:
        return tuple(question for question in self.questions if question.turn >= 0)


def item_of(layout: Layout, seed: int) -> Item:
    """The questions of a sample, without drawing it."""
    plan, _ = make_plan(layout.kind, seed, **layout.options)
    asked: list[tuple[int, QA]] = [*enumerate(plan.dialogue), *((-1, qa) for qa in plan.alone)]
    questions = [Question(layout.kind, qa.type, qa.question, qa.answer, qa.chance, turn) for turn, qa in asked]
    return Item(layout, seed, tuple(questions))


def draw(num_questions: int, layouts: Sequence[Layout] = LAYOUTS) -> list[Item]:
    """Samples with at least `num_questions` questions, each layout's share rounded up to whole samples.

    Layouts are mixed, so that the first part of the list has about the same shares as the whole.
    """
    placed: list[tuple[float, int, Item]] = []
    for number, layout in enumerate(layouts):
        wanted = math.ceil(num_questions * layout.share)
        items: list[Item] = []
        while wanted > 0:
            items.append(item_of(layout, TEST[layout.first + len(items)]))
            wanted -= len(items[-1].questions)
        placed += [((i + 0.5) / len(items), number, item) for i, item in enumerate(items)]
    return [item for _, _, item in sorted(placed, key=lambda one: one[:2])]


def count(items: Sequence[Item]) -> int:
    """How many questions."""
    return sum(len(item.questions) for item in items)


def first_items(items: Sequence[Item], num_questions: int) -> frozenset[str]:
    """Keys of the first samples that have `num_questions` questions between them, or of all."""
    keys: set[str] = set()
    for item in items:
        if num_questions <= 0:
            break
        keys.add(item.key)
        num_questions -= len(item.questions)
    return frozenset(keys)


def describe_layouts(items: Sequence[Item]) -> list[dict[str, Any]]:
    """For the record: what was asked of each layout."""
    rows = []
    for layout in dict.fromkeys(item.layout.name for item in items):
        own = [item for item in items if item.layout.name == layout]
        seeds = [item.seed for item in own]
        rows.append({"layout": layout, "samples": len(own), "questions": count(own), "seeds": [min(seeds), max(seeds)]})
    return rows
