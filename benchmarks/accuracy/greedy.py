r"""The best that permanent pruning for one question could do, and what the next questions find of it.

    python benchmarks/accuracy/greedy.py --model demo --samples 40 --processes 2 \
        --out benchmarks/results/greedy_demo.json

For the first question of a dialogue a set of visual tokens is grown greedily by the likelihood of the *true* answer:
no method that prunes for a question could choose better, group by group. Then the other questions of the dialogue are
asked over that set, each by itself, beside SparseVILA with as many active tokens and others with as many for good.
Source: the greedy-oracle experiment of arXiv 2510.17777.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sparsevila import Engine, Image, SamplingParams, SparseVILAError, Sparsity, Video
from sparsevila.engine.hub import resolve
from sparsevila.engine.sparsity.base import Method, keep_count
from sparsevila.engine.sparsity.oracle import ChosenTokens
from sparsevila.models.interface import TokenMap

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from accuracy.answering import EngineAnswerer, Setting, answer_limit
from accuracy.limits import ask_all
from accuracy.questions import LAYOUTS, Item, Question, item_of
from accuracy.run import shown_name, to_json
from accuracy.scoring import is_right, paired_difference, wilson
from accuracy.workfile import checksum_of_checkpoint, checksum_of_sources
from environment import describe
from world.splits import TEST

SIDE = 2  # tokens of a group, down and across: what the greedy hand takes at once
GREEDY = "greedy oracle"


@dataclass(frozen=True)
class Asked:
    """One answer."""

    sample: str
    setting: str
    later: bool  # not the question that the greedy set was grown for
    right: float
    active: float  # visual tokens that a decode step reads, mean over layers


def groups_of(token_map: TokenMap, side: int = SIDE) -> list[tuple[int, ...]]:
    """Neighbouring visual tokens of one view, `side` by `side`; fewer at an edge."""
    y0, x0, y1, x1 = token_map.box.double().unbind(1)
    shape = torch.stack([token_map.frame.double(), (y1 - y0), (x1 - x0)], dim=1).mul(1e4).round().long()
    row = (y0 / (y1 - y0)).round().long() // side
    column = (x0 / (x1 - x0)).round().long() // side
    cells: dict[tuple[int, ...], list[int]] = {}
    for i in torch.nonzero(~token_map.structural)[:, 0].tolist():
        cells.setdefault((*shape[i].tolist(), int(row[i]), int(column[i])), []).append(i)
    return [tuple(cell) for cell in cells.values()]


def grow(
    engine: Engine, media: Sequence[Image | Video], question: Question, groups: Sequence[tuple[int, ...]], count: int
) -> tuple[int, ...]:
    """At most `count` tokens, group by group: always the one with which the true answer is likeliest."""
    kept: tuple[int, ...] = ()
    left = list(groups)
    while left and len(kept) + min(map(len, left)) <= count:
        fitting = [group for group in left if len(kept) + len(group) <= count]
        best = max(fitting, key=lambda group: _likelihood(engine, media, question, tuple(sorted(kept + group))))
        left.remove(best)
        kept = tuple(sorted(kept + best))
    return kept


def _likelihood(engine: Engine, media: Sequence[Image | Video], question: Question, keep: tuple[int, ...]) -> float:
    with closing(engine.session(media=media, sparsity=ChosenTokens(keep=keep))) as session:
        return session.rate(question.text, f" {question.answer}").log_likelihood


def ask_about(
    engine: Engine, answerer: EngineAnswerer, item: Item, settings: Sequence[Setting], removed: float
) -> Iterator[Asked]:
    """The dialogue of a sample over the greedy set of its first question, and under the other settings."""
    media = answerer.show(item, "own").media
    first, *later = [question for question in item.dialogue if not question.is_long]
    with closing(engine.session(media=media)) as session:
        (attached,) = session.media
    tokens = _encoded_map(engine, media)
    keep = grow(engine, media, first, groups_of(tokens), keep_count(attached.tokens_total, removed))
    policies: dict[str, Sparsity | Method] = {GREEDY: ChosenTokens(keep=keep)}
    policies |= {setting.name: setting.sparsity for setting in settings}
    for name, policy in policies.items():
        for question in (first, *later):
            with closing(engine.session(media=media, sparsity=policy)) as session:
                params = SamplingParams(max_new_tokens=answer_limit(question))
                result = session.ask(question.text, params=params, remember=False)
            right = float(is_right(result.text, question.answer))
            yield Asked(item.key, name, question is not first, right, result.stats.visual_tokens_active)


def _encoded_map(engine: Engine, media: Sequence[Image | Video]) -> TokenMap:
    with closing(engine.session(media=media, sparsity=Sparsity(method="dense"))) as session:
        session.ask("?", params=SamplingParams(max_new_tokens=1), remember=False)
        selection = session.selection()
        assert selection is not None, "a turn over media leaves a selection"
        return selection.token_map


def _ask_chunk(items: Sequence[Item], *, folder: str, settings: Sequence[str], removed: float) -> list[Asked]:
    torch.set_num_threads(1)
    with Engine.load(folder, device="cpu", dtype="float32") as engine, tempfile.TemporaryDirectory() as files:
        answerer = EngineAnswerer(engine, Path(files))
        found: list[Asked] = []
        for item in items:
            found += ask_about(engine, answerer, item, [Setting.parse(text) for text in settings], removed)
            answerer.forget()
        return found


def summarise(answers: Sequence[Asked]) -> list[dict[str, Any]]:
    """A row for each setting, first and later questions apart, with paired differences to the greedy set."""
    rows = []
    for name in dict.fromkeys(one.setting for one in answers):
        for later in (False, True):
            own = [one for one in answers if (one.setting, one.later) == (name, later)]
            greedy = [one for one in answers if (one.setting, one.later) == (GREEDY, later)]
            right = [one.right for one in own]
            low, high = wilson(int(sum(right)), len(right))
            difference = paired_difference([one.sample for one in own], [one.right for one in greedy], right)
            rows.append(
                {
                    "setting": name,
                    "questions": "later" if later else "first",
                    "n": len(own),
                    "accuracy": sum(right) / len(right),
                    "low": low,
                    "high": high,
                    "active": sum(one.active for one in own) / len(own),
                    "greedy_minus_this": asdict(difference),
                }
            )
    return rows


def samples(layout: str, number: int) -> list[Item]:
    """The first test samples of a layout whose dialogue has two questions with short answers."""
    (chosen,) = [one for one in LAYOUTS if one.name == layout]
    found: list[Item] = []
    index = chosen.first
    while len(found) < number:
        item = item_of(chosen, TEST[index])
        if sum(not question.is_long for question in item.dialogue) >= 2:
            found.append(item)
        index += 1
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="folder or alias of a checkpoint that knows the drawn world")
    parser.add_argument("--layout", default="scene 128x128", choices=[layout.name for layout in LAYOUTS])
    parser.add_argument("--samples", type=int, default=40)
    parser.add_argument("--removed", type=float, default=0.9, help="fraction that the greedy set leaves out for good")
    parser.add_argument(
        "--settings", nargs="+", default=["dense", "sparsevila:0.6/0.75", "sparsevila:0.9/0", "random:0.9/0"]
    )
    parser.add_argument("--processes", type=int, default=1, help="of one thread each")
    parser.add_argument("--out", type=Path, required=True, help="JSON")
    args = parser.parse_args(argv)
    try:
        folder = resolve(args.model).path
        for setting in args.settings:
            Setting.parse(setting)
    except (SparseVILAError, ValueError) as error:
        parser.error(str(error))
    work = partial(_ask_chunk, folder=str(folder), settings=args.settings, removed=args.removed)
    answers = ask_all(samples(args.layout, args.samples), args.processes, work)
    data = {
        "environment": describe(),
        "model": {"name": shown_name(args.model), "checksum": checksum_of_checkpoint(folder)},
        "sources": checksum_of_sources(),
        "arguments": {name: value for name, value in vars(args).items() if name not in ("out", "model")},
        "group": SIDE * SIDE,
        "rows": summarise(answers),
    }
    args.out.write_text(to_json(data))
    for row in data["rows"]:
        print(f"{row['setting']:24} {row['questions']:6} {row['n']:5} {row['accuracy']:.1%}")


if __name__ == "__main__":
    main()
