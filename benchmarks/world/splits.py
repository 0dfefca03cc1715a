"""Which seeds are for what, and the one entry to all samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from world import clip, page, scene
from world.dice import Dice
from world.drawing import draw
from world.sample import Plan, Sample
from world.vocabulary import REFERENCE, vocabulary

TRAIN = range(0, 2**31)
VALIDATION = range(2**31, 2**31 + 10**6)
TEST = range(2**31 + 10**6, 2**31 + 2 * 10**6)
SPLITS = {"train": TRAIN, "validation": VALIDATION, "test": TEST}

# A kind's number is part of the key of its random numbers: keep it.
KINDS: dict[str, tuple[int, Callable[..., Plan]]] = {
    "scene": (1, scene.plan_scene),
    "page": (2, page.plan_page),
    "clip": (3, clip.plan_clip),
}
PHRASES: dict[str, Mapping[str, tuple[str, ...]]] = {
    "scene": scene.PHRASES,
    "page": page.PHRASES,
    "clip": clip.PHRASES,
}


def make(kind: str, seed: int, **options: Any) -> Sample:
    """The sample of this seed, always the same.

    Options of scene and page: `width`, `height` in pixels (multiples of 64) and `dense=True`, full pictures without
    questions to train a vision tower on. Option of clip: `frames`, 4 to 64. Option of all: `talks`, how many further
    conversations are held about it.
    """
    plan, dice = make_plan(kind, seed, **options)
    rgb, mask = draw(plan, dice)
    return Sample(kind, seed, rgb, mask, plan.things, plan.grid, plan.dialogue, plan.alone, plan.further)


def make_plan(kind: str, seed: int, **options: Any) -> tuple[Plan, Dice]:
    """What `make` would draw, with truth and dialogue but no pixels, and the dice to draw it with."""
    if kind not in KINDS:
        raise ValueError(f"expected one of {sorted(KINDS)}, got {kind!r}")
    number, plan = KINDS[kind]
    dice = Dice(number, seed)
    return plan(dice, **options), dice


def world_vocabulary() -> tuple[str, ...]:
    """All words of all kinds' dialogues, and the word in pages' last lines."""
    phrases = [text for table in PHRASES.values() for texts in table.values() for text in texts]
    return vocabulary([*phrases, *scene.ANSWER_WORDS, *page.ANSWER_WORDS, *clip.ANSWER_WORDS, REFERENCE])
