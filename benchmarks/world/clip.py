"""Clips: shapes that come and go one after the other, move or change colour; numbers and codes that flash once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from world.dialogue import Talk, further_talks
from world.dice import Dice
from world.drawing import SCENE_GRID, SIDES
from world.glyphs import LARGE, SMALL
from world.sample import QA, TILE, Fact, Plan, Region, Thing
from world.scene import TAG_OVERLAP, random_text, tag_of, text_chance
from world.vocabulary import CARDINALS, COLOURS, MOTIONS, PLACES, SHAPES, SIZES

MIN_FRAMES, MAX_FRAMES = 4, 64
MIN_ACTORS, MAX_ACTORS = 2, 6
FRAMES_PER_ACTOR = 4  # at least, where there are more than two actors
MAX_FLASHES = 3
MIN_TRAVEL = 20  # pixels that a moving shape goes in all
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1), "nowhere": (0, 0)}
CELLS = [(column, row) for row in (1, 2, 3) for column in (1, 2, 3)]  # of a frame, in the order of PLACES

PHRASES = {
    "count_shapes": (
        "how many shapes appear?",
        "count the shapes in the clip.",
        "how many shapes does the clip show?",
    ),
    "first": ("what appears first?", "which shape comes first?", "name the first shape of the clip."),
    "last": ("what appears last?", "which shape comes last?", "name the last shape of the clip."),
    "after": (
        "what appears after the {it}?",
        "which shape comes next after the {it}?",
        "name the shape that follows the {it}.",
    ),
    "which_first": (
        "which appears first, the {a} or the {b}?",
        "what comes earlier, the {a} or the {b}?",
        "name the earlier one, the {a} or the {b}.",
    ),
    "order": (
        "list the shapes in order.",
        "which shapes appear, from first to last?",
        "name the shapes in the order in which they come.",
    ),
    "direction": ("which way does the {it} move?", "where does the {it} go?", "in which direction does the {it} go?"),
    "where_is": ("where is the {it}?", "in which part of the picture is the {it}?", "tell me the place of the {it}."),
    "exists": ("is there a {it} in the clip?", "does a {it} appear?", "do you see a {it}?"),
    "becomes": (
        "what colour does the {it} become?",
        "which colour does the {it} turn?",
        "to what color does the {it} change?",
    ),
    "what_changes": (
        "which shape changes its colour?",
        "what changes colour in the clip?",
        "name the shape that turns to another colour.",
    ),
    "needle_number": (
        "what number appears in the clip?",
        "which number flashes once?",
        "read the number that is shown for a moment.",
    ),
    "needle_code": (
        "what code appears in the clip?",
        "which letters flash once?",
        "read the code that is shown for a moment.",
    ),
    "shown_with": (
        "what {role} is shown with the {it}?",
        "which {role} appears together with the {it}?",
        "read the {role} that comes with the {it}.",
    ),
    "shown_while": (
        "which shape is shown with the {it}?",
        "what appears together with the {it}?",
        "name the shape that comes with the {it}.",
    ),
    "tell": (
        "what happens in the clip?",
        "tell the clip in order.",
        "describe the clip.",
        "describe what you see, from the beginning to the end.",
    ),
}
ANSWER_WORDS = ("yes", "no", "moves", "stays", "turns", "number", "code")


def plan_clip(dice: Dice, frames: int = 16, talks: int = 0) -> Plan:
    """A clip of 4 to 64 frames of 64x64 pixels."""
    if not MIN_FRAMES <= frames <= MAX_FRAMES:
        raise ValueError(f"expected {MIN_FRAMES} to {MAX_FRAMES} frames, got {frames}")
    while True:
        clip = _Clip(dice, frames)
        talk = Talk(dice, PHRASES)
        if clip.converse(talk):
            things = tuple(clip.actors + clip.flashes)
            further = further_talks(talks, dice, PHRASES, clip)
            return Plan(frames, TILE, TILE, things, SCENE_GRID, tuple(talk.turns), (clip.tell(talk),), further)


Ask = Callable[[Talk], bool]  # tries to add one turn and says whether it did


@dataclass(frozen=True)
class Slot:
    """The frames of one actor, [start, stop); up to `alone` no later actor is there, from `free` on no earlier one."""

    start: int
    free: int
    alone: int
    stop: int


def slots_of(dice: Dice, frames: int, count: int) -> list[Slot]:
    """Cuts the clip into one slot per actor; half of the actors stay for up to two frames beside the next one."""
    starts = [0]
    spare = frames % count
    for i in range(count):
        longer = dice.between(0, spare) if i < count - 1 else spare
        spare -= longer
        starts.append(starts[-1] + frames // count + longer)
    longest = frames // count - 2  # so that two frames are each actor's own
    lingers = [0, *(min(dice.pick((0, 0, 1, 2)), longest) for _ in range(count - 1)), 0]
    return [
        Slot(starts[i], starts[i] + lingers[i], starts[i + 1], starts[i + 1] + lingers[i + 1]) for i in range(count)
    ]


class _Clip:
    """What happens when, and how to ask about it."""

    def __init__(self, dice: Dice, frames: int) -> None:
        self.dice, self.frames = dice, frames
        self.max_actors = min(MAX_ACTORS, max(MIN_ACTORS, frames // FRAMES_PER_ACTOR))
        count = dice.between(MIN_ACTORS, self.max_actors)
        slots = slots_of(dice, frames, count)
        names = dice.sample([(colour, shape) for colour in COLOURS for shape in SHAPES], count)
        self.has_tags = dice.percent(50)  # texts hang on their shape; in other clips they stand anywhere
        self.actors: list[Thing] = []  # in the order of their appearance
        for ident, (slot, (colour, shape)) in enumerate(zip(slots, names, strict=True), 1):
            self.actors.append(self._actor(ident, slot, colour, shape))
        self.flashes: list[Thing] = []
        self._change_one(slots)
        self._flash(slots)

    def _actor(self, ident: int, slot: Slot, colour: str, shape: str) -> Thing:
        """A shape with a way that does not touch the one before it; if none is found, that one leaves earlier."""
        size = self.dice.pick(SIZES)
        side = SIDES[size]
        for _ in range(8):
            motion = self.dice.pick(MOTIONS)
            path = self._way(motion, side, slot.stop - slot.start)
            actor = Thing(ident, "shape", side, side, path, slot.start, shape, colour, size, motion=motion)
            if not self.actors or not _touch(self.actors[-1], actor):
                return actor
        earlier = self.actors[-1]
        self.actors[-1] = replace(earlier, path=earlier.path[: slot.start - earlier.start])
        return actor

    def _way(self, motion: str, side: int, steps: int) -> tuple[tuple[int, int], ...]:
        """The corner at each step: straight, at least MIN_TRAVEL pixels in all, or at rest in a cell."""
        dx, dy = DIRECTIONS[motion]
        if not dx and not dy:
            return (self._corner_in(self.dice.pick(CELLS), side, side),) * steps
        room = TILE - side
        travel = self.dice.between(MIN_TRAVEL, room)
        start, across = self.dice.between(0, room - travel), self.dice.between(0, room)
        along = [start + travel * step // (steps - 1) for step in range(steps)]
        if dx + dy < 0:
            along.reverse()
        return tuple((at, across) if dx else (across, at) for at in along)

    def _corner_in(self, cell: tuple[int, int], width: int, height: int) -> tuple[int, int]:
        """A corner inside the frame for a box whose centre lies in the cell."""
        left, top = SCENE_GRID.corner_of(*cell)
        free_x, free_y = SCENE_GRID.cell_width - width, SCENE_GRID.cell_height - height
        x = left + (self.dice.between(0, free_x) if free_x > 0 else free_x // 2)
        return min(max(x, 0), TILE - width), top + self.dice.between(0, free_y)

    def _change_one(self, slots: list[Slot]) -> None:
        """In half of the clips one actor changes its colour in the middle of its time."""
        if self.dice.percent(50):
            i = self.dice.below(len(self.actors))
            actor = self.actors[i]
            taken = {other.colour for other in self.actors if other.shape == actor.shape}
            later = self.dice.pick([colour for colour in COLOURS if colour not in taken])
            middle = (slots[i].start + slots[i].alone + 1) // 2
            self.actors[i] = replace(actor, later_colour=later, change=middle)

    def _flash(self, slots: list[Slot]) -> None:
        """Up to three actors have a number or a code beside them in one frame, in which no other actor is there."""
        steady = [i for i, actor in enumerate(self.actors) if not actor.later_colour]
        count = self.dice.between(1, min(MAX_FLASHES, len(steady)))
        for i in sorted(self.dice.sample(steady, count)):
            role = "number" if self.dice.percent(60) else "code"
            text = random_text(self.dice, role)
            if all(text != other.text for other in self.flashes):
                ident = len(self.actors) + len(self.flashes) + 1
                self.flashes.append(self._flashed(ident, self.actors[i], slots[i], role, text))

    def _flashed(self, ident: int, actor: Thing, slot: Slot, role: str, text: str) -> Thing:
        if self.has_tags:
            step = self.dice.between(slot.free, slot.alone - 1) - slot.start
            y = actor.path[step][1]
            is_below = y + actor.height + SMALL.height + 2 - TAG_OVERLAP[actor.size] <= TILE
            return tag_of(actor, step, ident, role, text, is_below)
        font = self.dice.pick((SMALL, LARGE))
        width = font.text_width(text)
        while True:
            corner = self._corner_in(self.dice.pick(CELLS), width, font.height)
            start = self.dice.between(slot.free, slot.alone - 1)
            flash = Thing(ident, role, width, font.height, (corner,), start, text=text, font=font, partner=actor.ident)
            if not _touch(actor, flash):
                return flash

    # How things are named

    def _place(self, thing: Thing) -> str:
        return PLACES[CELLS.index(SCENE_GRID.cell_at(*thing.centre(thing.start)))]

    def _arrival(self, actor: Thing) -> Region:
        return actor.region(actor.start, actor.start + 1)

    def _pick(self, things: list[Thing]) -> Thing | None:
        return self.dice.pick(things) if things else None

    def _unnamed(self, talk: Talk) -> list[Thing]:
        """Actors that no turn has named."""
        return [actor for actor in self.actors if (actor.ident, "identity") not in talk.told]

    # Questions: each tries to add one turn and says whether it did

    def converse(self, talk: Talk) -> bool:
        """Questions for the identity of an actor mostly come early: once it was named, they are forbidden."""
        ends = (partial(self.end, type="first"), partial(self.end, type="last"))
        early: tuple[Ask, ...] = (*ends, self.after, self.order, self.what_changes, self.shown_while, self.exists)
        openers = self.dice.sample(early, self.dice.below(4))
        if self.dice.percent(40):
            openers.insert(0, self.count_shapes)
        others = (self.which_first, self.direction, self.where_is, self.becomes, self.needle, self.exists, self.after)
        asks = (*others, self.shown_with, self.shown_with)
        return talk.converse([partial(ask, talk) for ask in openers], [partial(ask, talk) for ask in asks])

    def count_shapes(self, talk: Talk) -> bool:
        """Comes first, because each turn that names another shape narrows the answer."""
        choices = self.max_actors - MIN_ACTORS + 1
        if choices == 1:
            return False
        regions = [self._arrival(actor) for actor in self.actors]
        return talk.add("count_shapes", {}, CARDINALS[len(self.actors)], regions, 1 / choices, [(0, "count")])

    def order(self, talk: Talk) -> bool:
        regions = [self._arrival(actor) for actor in self.actors]
        asks = [fact for actor in self.actors for fact in self._arrival_facts(actor)]
        return talk.add("order", {}, ", ".join(actor.name for actor in self.actors), regions, 0.0, asks)

    def _arrival_facts(self, actor: Thing) -> list[Fact]:
        return [(actor.ident, "identity"), (actor.ident, "order")]

    def end(self, talk: Talk, type: str) -> bool:
        actor = self.actors[0 if type == "first" else -1]
        chance = 1 / (len(COLOURS) * len(SHAPES))
        return talk.add(type, {}, actor.name, [self._arrival(actor)], chance, self._arrival_facts(actor))

    def after(self, talk: Talk) -> bool:
        i = self.dice.below(len(self.actors) - 1)
        earlier, actor = self.actors[i : i + 2]
        regions, chance = [self._arrival(earlier), self._arrival(actor)], 1 / (len(COLOURS) * len(SHAPES))
        asks, tells = self._arrival_facts(actor), self._arrival_facts(earlier)
        return talk.add("after", {"it": earlier.name}, actor.name, regions, chance, asks, tells)

    def which_first(self, talk: Talk) -> bool:
        a, b = self.dice.sample(self.actors, 2)
        answer = min(a, b, key=lambda actor: actor.start).name
        asks, tells = [(actor.ident, "order") for actor in (a, b)], [(actor.ident, "identity") for actor in (a, b)]
        regions = [self._arrival(a), self._arrival(b)]
        return talk.add("which_first", {"a": a.name, "b": b.name}, answer, regions, 1 / 2, asks, tells)

    def direction(self, talk: Talk) -> bool:
        actor = self.dice.pick(self.actors)
        asks, tells = [(actor.ident, "motion")], [(actor.ident, "identity")]
        chance = 1 / len(MOTIONS)
        return talk.add("direction", {"it": actor.name}, actor.motion, [actor.region()], chance, asks, tells)

    def where_is(self, talk: Talk) -> bool:
        """Of an actor at rest, which tells that it is, or of a text that does not hang on one."""
        resting = [actor for actor in self.actors if actor.motion == "nowhere"]
        thing = self._pick(resting + [flash for flash in self.flashes if not flash.is_tag])
        if thing is None:
            return False
        asks, tells = [(thing.ident, "place")], [(thing.ident, "text")]
        if thing.role == "shape":
            asks, tells = [*asks, (thing.ident, "motion")], [(thing.ident, "identity")]
        names, answer = {"it": thing.name}, self._place(thing)
        return talk.add("where_is", names, answer, [thing.region()], 1 / len(PLACES), asks, tells)

    def exists(self, talk: Talk) -> bool:
        """Only while an actor is unnamed, so that yes and no are both possible."""
        actor = self._pick(self._unnamed(talk))
        absent = {f"{a.colour} {b.shape}" for a in self.actors for b in self.actors} - self._all_names()
        if actor is None or not absent:
            return False
        if self.dice.percent(50):
            return talk.add("exists", {"it": actor.name}, "yes", [actor.region()], 1 / 2, [(actor.ident, "identity")])
        name = self.dice.pick(sorted(absent))
        return talk.add("exists", {"it": name}, "no", (), 1 / 2, [(0, name)])

    def _all_names(self) -> set[str]:
        return {f"{colour} {actor.shape}" for actor in self.actors for colour in (actor.colour, actor.later_colour)}

    def becomes(self, talk: Talk) -> bool:
        actor = self._pick([actor for actor in self.actors if actor.later_colour])
        if actor is None:
            return False
        asks, tells = [(actor.ident, "change")], [(actor.ident, "identity")]
        regions, chance = [actor.region(actor.change)], 1 / (len(COLOURS) - 1)
        return talk.add("becomes", {"it": actor.name}, actor.later_colour, regions, chance, asks, tells)

    def what_changes(self, talk: Talk) -> bool:
        actor = self._pick([actor for actor in self.actors if actor.later_colour])
        if actor is None:
            return False
        regions, chance = [actor.region(actor.change - 1, actor.change + 1)], 1 / (len(COLOURS) * len(SHAPES))
        return talk.add("what_changes", {}, actor.name, regions, chance, [(actor.ident, "identity")])

    def needle(self, talk: Talk) -> bool:
        """A text that is the only one of its role."""
        roles = [flash.role for flash in self.flashes]
        flash = self._pick([flash for flash in self.flashes if roles.count(flash.role) == 1])
        if flash is None:
            return False
        asks = [(flash.ident, "text")]
        return talk.add(f"needle_{flash.role}", {}, flash.text, [flash.region()], text_chance(flash.role), asks)

    def shown_with(self, talk: Talk) -> bool:
        """From a shape to the text of its frame: two hops where other texts of that role flash too."""
        flash = self._pick(self.flashes)
        if flash is None:
            return False
        actor = self.actors[flash.partner - 1]
        asks, tells = [(flash.ident, "text")], [(actor.ident, "identity")]
        names, regions = {"role": flash.role, "it": actor.name}, self._meeting(actor, flash)
        return talk.add("shown_with", names, flash.text, regions, text_chance(flash.role), asks, tells)

    def shown_while(self, talk: Talk) -> bool:
        """From a text to the shape of its frame."""
        flash = self._pick(self.flashes)
        if flash is None:
            return False
        actor = self.actors[flash.partner - 1]
        asks, tells = [(actor.ident, "identity")], [(flash.ident, "text")]
        names, chance = {"it": flash.name}, 1 / (len(COLOURS) * len(SHAPES))
        return talk.add("shown_while", names, actor.name, self._meeting(actor, flash), chance, asks, tells)

    def _meeting(self, actor: Thing, flash: Thing) -> list[Region]:
        return [actor.region(flash.start, flash.stop), flash.region()]

    def tell(self, talk: Talk) -> QA:
        """Arrivals with their motion, changes and flashes, in the order of the frames."""
        events = []
        facts: list[Fact] = []
        for actor in self.actors:
            does = "stays" if actor.motion == "nowhere" else f"moves {actor.motion}"
            events.append((actor.start, actor.ident, f"{actor.name} {does}"))
            facts += [*self._arrival_facts(actor), (actor.ident, "motion")]
            if actor.later_colour:
                events.append((actor.change, actor.ident, f"{actor.name} turns {actor.later_colour}"))
                facts.append((actor.ident, "change"))
        for flash in self.flashes:
            events.append((flash.start, flash.ident, flash.name))
            facts.append((flash.ident, "text"))
        answer = ", ".join(text for _, _, text in sorted(events))
        return talk.compose("tell", {}, answer, (), 0.0, facts)


def _touch(a: Thing, b: Thing) -> bool:
    """Whether their boxes come within a pixel of each other in a frame."""
    for frame in range(max(a.start, b.start), min(a.stop, b.stop)):
        (ax, ay), (bx, by) = a.corner(frame), b.corner(frame)
        if bx - a.width <= ax <= bx + b.width and by - a.height <= ay <= by + b.height:
            return True
    return False
