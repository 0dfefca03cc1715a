r"""What pruning takes away, and why: is it the ranking, the budget, or the reading of what is left?

    python benchmarks/accuracy/limits.py --model demo --questions 2000 --processes 2 \
        --out benchmarks/results/limits_demo.json

Every question is asked alone, over the picture as it is and as several hands prune it at the same counts: SparseVILA,
dice, one who knows what is drawn (ink first) and one who knows what is asked (the regions that the answer needs first).
Of each answer it is recorded how much of what the question needs was still there, and of each picture how much of it
carries ink. A loss that is left where everything needed stays is the reading's; one that goes with what an oracle keeps
is the ranking's; one that even the hand that knows the drawing cannot avoid is the budget's; and what comes back where
survivors stand as they stood was their places'.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from sparsevila import Engine, SamplingParams, Session, SparseVILAError, Sparsity
from sparsevila.engine.hub import resolve
from sparsevila.engine.sparsity.base import Method
from sparsevila.engine.sparsity.oracle import OracleTokens, Region, touched
from sparsevila.engine.sparsity.random import RandomTokens
from sparsevila.engine.sparsity.sparsevila import SparseVILA
from sparsevila.models.interface import TokenMap

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from accuracy.answering import EngineAnswerer, answer_limit
from accuracy.questions import Item, Question, draw
from accuracy.run import shown_name, to_json
from accuracy.scoring import facts_right, is_right, paired_difference, wilson
from accuracy.workfile import checksum_of_checkpoint, checksum_of_sources
from environment import describe
from world.labels import COVER_SHARE
from world.sample import QA, Sample, Thing
from world.splits import make
from world.vocabulary import CARDINALS

T = TypeVar("T")

CHUNK = 4  # samples that a process takes at once

# From what is drawn and what is asked to a method.
Hand = Callable[[Sample, QA], Method]


@dataclass(frozen=True)
class Asked:
    """One answer by one hand."""

    sample: str
    kind: str
    type: str
    is_long: bool
    hand: str
    right: float  # 0 or 1
    facts: float | None  # of a list
    ink: float  # share of the picture's tokens that carry ink
    needed: int  # tokens that the question needs, in the finest view of them
    kept: int  # of those, how many entered the language model
    off: int | None = None  # of a question for a number in words: how far the answer is above the truth


def hands(prefill: float, decode: float) -> dict[str, Hand]:
    """Who prunes, by name; all but the first at the same counts."""
    clip_scope = {"clip": "global"}

    def knows_question(sample: Sample, qa: QA) -> Method:
        scope: Any = clip_scope.get(sample.kind, "per_frame")
        return OracleTokens(prefill, decode, scope=scope, regions=needed_regions(sample, qa))

    def knows_drawing(sample: Sample, qa: QA) -> Method:
        scope: Any = clip_scope.get(sample.kind, "per_frame")
        return OracleTokens(prefill, decode, scope=scope, regions=drawn_regions(sample))

    return {
        "dense": lambda sample, qa: Method(),
        "SparseVILA": lambda sample, qa: SparseVILA(prefill, decode),
        "SparseVILA, gaps closed": lambda sample, qa: SparseVILA(prefill, decode, positions="contiguous"),
        "SparseVILA, prefill alone": lambda sample, qa: SparseVILA(prefill, 0.0),
        "SparseVILA, decode alone": lambda sample, qa: SparseVILA(0.0, decode),
        "knows the drawing": knows_drawing,
        "knows the question": knows_question,
        "dice": lambda sample, qa: RandomTokens(prefill, decode),
    }


# What is true


def _region(sample: Sample, start: int, stop: int, box: tuple[int, int, int, int]) -> Region:
    """box: x0, y0, x1, y1 in pixels."""
    _, height, width, _ = sample.rgb.shape
    x0, y0, x1, y1 = box
    return Region(start, stop, (y0 / height, x0 / width, y1 / height, x1 / width))


def _places(thing: Thing) -> Iterator[tuple[int, int, tuple[int, int, int, int]]]:
    """Where a thing is, frame by frame."""
    for frame, (x, y) in enumerate(thing.path, thing.start):
        yield frame, frame + 1, (x, y, x + thing.width, y + thing.height)


def drawn_regions(sample: Sample) -> tuple[Region, ...]:
    """Where anything is drawn."""
    return tuple(_region(sample, *place) for thing in sample.things for place in _places(thing))


def needed_regions(sample: Sample, qa: QA) -> tuple[Region, ...]:
    """What a reader must look at; where that is the whole sample, everything that is drawn."""
    if not qa.regions:
        return drawn_regions(sample)
    return tuple(_region(sample, r.start, r.stop, (r.x0, r.y0, r.x1, r.y1)) for r in qa.regions)


def ink_of_tokens(sample: Sample, token_map: TokenMap) -> Tensor:
    """Share of ink under each token, (N,) float64; 0 under structural ones."""
    _, height, width = sample.mask.shape
    sums = np.zeros((len(sample.mask), height + 1, width + 1))
    sums[:, 1:, 1:] = (sample.mask > 0).cumsum(1).cumsum(2)
    edges = (token_map.box.double() * torch.tensor([height, width, height, width])).round().long()
    y0, x0, y1, x1 = edges.unbind(1)
    table, frame = torch.from_numpy(sums), token_map.frame.long()
    inked = table[frame, y1, x1] - table[frame, y0, x1] - table[frame, y1, x0] + table[frame, y0, x0]
    share = inked / ((y1 - y0) * (x1 - x0)).clamp(min=1)
    return share.masked_fill(token_map.structural, 0)


def finest(token_map: TokenMap) -> Tensor:
    """Tokens of the view with the smallest boxes, (N,) bool: of a picture in tiles its tiles, not the base view."""
    y0, x0, y1, x1 = token_map.box.unbind(1)
    area = ((y1 - y0) * (x1 - x0)).masked_fill(token_map.structural, torch.inf)
    return area < 1.5 * area.min()


# Asking


def ask_about(engine: Engine, answerer: EngineAnswerer, item: Item, chosen: dict[str, Hand]) -> Iterator[Asked]:
    """Every question of a sample by every hand, each in a session of its own."""
    sample = make(item.layout.kind, item.seed, **item.layout.options)
    truths = [*sample.dialogue, *sample.alone]
    media = answerer.show(item, "own").media
    for question, qa in zip(item.questions, truths, strict=True):
        assert question.text == qa.question, "questions and truth are in one order"
        for name, hand in chosen.items():
            with closing(engine.session(media=media, sparsity=hand(sample, qa))) as session:
                yield _ask(session, item, question, name, sample, qa)


def _ask(session: Session, item: Item, question: Question, hand: str, sample: Sample, qa: QA) -> Asked:
    result = session.ask(question.text, params=SamplingParams(max_new_tokens=answer_limit(question)), remember=False)
    selection = session.selection()
    assert selection is not None, "a turn over media leaves a selection"
    where = selection.token_map
    ink = ink_of_tokens(sample, where)[~where.structural]
    needed = touched(where, needed_regions(sample, qa)) & finest(where)
    entered = torch.zeros(len(where), dtype=torch.bool)
    entered[selection.store] = True
    return Asked(
        item.key,
        item.layout.kind,
        question.type,
        question.is_long,
        hand,
        float(is_right(result.text, question.answer)),
        facts_right(result.text, question.answer) if question.is_long else None,
        float((ink * COVER_SHARE >= 1).double().mean()),
        int(needed.sum()),
        int((needed & entered).sum()),
        _off(result.text, question.answer),
    )


def _off(answer: str, truth: str) -> int | None:
    """The answer's number minus the true one; None where one of them is no number in words."""
    if answer not in CARDINALS or truth not in CARDINALS:
        return None
    return CARDINALS.index(answer) - CARDINALS.index(truth)


def _ask_chunk(items: Sequence[Item], *, folder: str, prefill: float, decode: float) -> list[Asked]:
    torch.set_num_threads(1)
    with Engine.load(folder, device="cpu", dtype="float32") as engine, tempfile.TemporaryDirectory() as files:
        answerer = EngineAnswerer(engine, Path(files))
        found = []
        for item in items:
            found += list(ask_about(engine, answerer, item, hands(prefill, decode)))
            answerer.forget()
        return found


def ask_all(items: Sequence[Item], processes: int, ask_chunk: Callable[[Sequence[Item]], list[T]]) -> list[T]:
    """What `ask_chunk` makes of all items, a few at a time in each process, in the order of the items."""
    chunks = [items[i : i + CHUNK] for i in range(0, len(items), CHUNK)]
    found: list[T] = []
    with get_context("spawn").Pool(processes) as pool:
        for number, answers in enumerate(pool.imap(ask_chunk, chunks), 1):
            found += answers
            print(f"{number}/{len(chunks)} chunks, {len(found)} answers", flush=True)
    return found


# Tables

INK_EDGES = (0.0, 0.2, 0.3, 0.4, 0.5, 0.6, 1.01)


def summarise(answers: Sequence[Asked]) -> dict[str, list[dict[str, Any]]]:
    """Rows of a report: by hand and kind, by ink, by how much of what is needed stayed, by type of question.

    `counts` are answers that are numbers in words: how many are below and above the truth.
    """
    dense = {_key(one): one for one in _numbered(answers, "dense")}
    names = list(dict.fromkeys(one.hand for one in answers))
    rows, by_ink, by_kept, by_type, counts = [], [], [], [], []
    for name in names:
        own = _numbered(answers, name)
        for kind in ("all", *sorted({one[1].kind for one in own})):
            group = [one for one in own if kind in ("all", one[1].kind)]
            rows.append({"hand": name, "kind": kind, **_figures(group, dense)})
        for low, high in itertools.pairwise(INK_EDGES):
            group = [one for one in own if low <= one[1].ink < high]
            if group:
                by_ink.append({"hand": name, "ink_from": low, "ink_to": min(high, 1.0), **_figures(group, dense)})
        for stayed, group in (
            ("all of it", [one for one in own if one[1].kept == one[1].needed]),
            ("half or more", [one for one in own if one[1].needed > one[1].kept >= one[1].needed / 2]),
            ("less than half", [one for one in own if one[1].kept < one[1].needed / 2]),
        ):
            if group:
                by_kept.append({"hand": name, "stayed": stayed, **_figures(group, dense)})
        for kind, type in sorted({(one[1].kind, one[1].type) for one in own}):
            group = [one for one in own if (one[1].kind, one[1].type) == (kind, type)]
            by_type.append({"hand": name, "kind": kind, "type": type, **_figures(group, dense)})
            off = [one.off for _, one in group if one.off is not None]
            if off:
                low, high = sum(value < 0 for value in off), sum(value > 0 for value in off)
                counts.append({"hand": name, "kind": kind, "type": type, "n": len(off), "low": low, "high": high})
    return {"rows": rows, "by_ink": by_ink, "by_kept": by_kept, "by_type": by_type, "counts": counts}


Numbered = tuple[int, Asked]  # the how-manieth answer of this hand: the same question has the same number


def _numbered(answers: Sequence[Asked], hand: str) -> list[Numbered]:
    return list(enumerate(one for one in answers if one.hand == hand))


def _key(one: Numbered) -> int:
    return one[0]


def _figures(group: Sequence[Numbered], dense: dict[int, Numbered]) -> dict[str, Any]:
    """Accuracy of a group of answers, and the paired difference to dense answers to the same questions."""
    right = [one.right for _, one in group]
    theirs = [dense[number][1].right for number, _ in group]
    low, high = wilson(int(sum(right)), len(right))
    return {
        "n": len(group),
        "accuracy": sum(right) / len(right),
        "low": low,
        "high": high,
        "dense": sum(theirs) / len(theirs),
        "difference": asdict(paired_difference([one.sample for _, one in group], right, theirs)),
        "kept_of_needed": sum(one.kept for _, one in group) / max(1, sum(one.needed for _, one in group)),
        "ink": sum(one.ink for _, one in group) / len(group),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="folder or alias of a checkpoint that knows the drawn world")
    parser.add_argument("--questions", type=int, default=2000, help="at least so many, in whole samples")
    parser.add_argument("--prefill", type=float, default=0.60, help="fraction removed")
    parser.add_argument("--decode", type=float, default=0.75)
    parser.add_argument("--processes", type=int, default=1, help="of one thread each")
    parser.add_argument("--out", type=Path, required=True, help="JSON")
    args = parser.parse_args(argv)
    try:
        folder = resolve(args.model).path
        Sparsity(args.prefill, args.decode)
    except SparseVILAError as error:
        parser.error(str(error))
    ask_chunk = partial(_ask_chunk, folder=str(folder), prefill=args.prefill, decode=args.decode)
    answers = ask_all(draw(args.questions), args.processes, ask_chunk)
    data = {
        "environment": describe(),
        "model": {"name": shown_name(args.model), "checksum": checksum_of_checkpoint(folder)},
        "sources": checksum_of_sources(),
        "arguments": {name: value for name, value in vars(args).items() if name not in ("out", "model")},
        **summarise(answers),
    }
    args.out.write_text(to_json(data))
    for row in data["rows"]:
        print(f"{row['hand']:28} {row['kind']:6} {row['n']:5} {row['accuracy']:.1%}")


if __name__ == "__main__":
    main()
