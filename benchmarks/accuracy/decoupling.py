"""Prefill sparsity alone, decode sparsity alone and both, at the same end-to-end time where that can be reached.

    python benchmarks/accuracy/decoupling.py --model demo --processes 2 --out benchmarks/results/decoupling_demo.json
        [--reference sparsevila:0.6/0.75] [--clips 100] [--timed 6] [--rounds 5]

Seconds are of clips of 32 frames and their long questions alone, where decoding matters most, each answer as long as
the true one, one thread, settings in turn, the fastest of several rounds. The reference has both; the other two are
looked for on straight lines between measured settings. Where decode sparsity alone cannot reach the reference's time,
its strongest setting stands in the row, which says so. Right answers are of all questions about the same kind of clips,
each by itself. The same command goes on after a kill.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from sparsevila import Engine, SparseVILAError
from sparsevila.engine.hub import resolve

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from accuracy.answering import Setting
from accuracy.equal import DENSE, answers_of, difference_row, kept, on_line, share_row
from accuracy.prices import Sample, Seconds
from accuracy.questions import LAYOUTS, Item, count, item_of
from accuracy.run import CHUNK, shown_name, to_json
from accuracy.scoring import paired_difference
from accuracy.summary import Answered
from accuracy.workfile import WorkFile, checksum_of_checkpoint, checksum_of_sources
from environment import describe
from world.splits import TEST

LAYOUT = next(layout for layout in LAYOUTS if layout.name == "clip 32")
PREFILL = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9)  # fractions at which prefill sparsity alone is measured
DECODE = (0.5, 0.75, 0.9, 0.99)  # and decode sparsity alone


def clips(number: int) -> list[Item]:
    """The first test clips of 32 frames, with all their questions."""
    return [item_of(LAYOUT, TEST[LAYOUT.first + i]) for i in range(number)]


def long_talk(item: Item) -> Item:
    """The same clip with its long questions alone, as a dialogue."""
    asked = [question for question in item.questions if question.is_long]
    return replace(item, questions=tuple(replace(question, turn=turn) for turn, question in enumerate(asked)))


def alone(fractions: Sequence[float], seconds: Callable[[float], float], target: float) -> tuple[float, bool]:
    """The fraction at which one sparsity alone takes `target` seconds, and whether it can.

    Raises ValueError where no sparsity at all takes less.
    """
    points = [(round(1000 * fraction), seconds(fraction)) for fraction in (0.0, *fractions)]
    if points[0][1] <= target:
        raise ValueError(f"expected a target below what dense takes, {points[0][1]:.4g} s, got {target:.4g} s")
    step, figure = on_line(points, target)
    return step / 1000, figure <= target


def timed(sample: Sample, reference: Setting, rounds: int) -> list[dict[str, Any]]:
    """The four settings with their seconds; those that were found are measured again, in turn with the others."""

    def only_prefill(fraction: float) -> Setting:
        return Setting.parse(f"sparsevila:{fraction:g}/0") if fraction else DENSE

    def only_decode(fraction: float) -> Setting:
        return Setting.parse(f"sparsevila:0/{fraction:g}") if fraction else DENSE

    settings = [DENSE, reference, *map(only_prefill, PREFILL), *map(only_decode, DECODE)]
    first = sample.seconds(settings, rounds)
    target = first[reference].total
    prefill, prefill_meets = alone(PREFILL, lambda f: first[only_prefill(f)].total, target)
    decode, decode_meets = alone(DECODE, lambda f: first[only_decode(f)].total, target)
    rows = [
        ("dense", DENSE, True),
        ("prefill alone", only_prefill(prefill), prefill_meets),
        ("decode alone", only_decode(decode), decode_meets),
        ("both", reference, True),
    ]
    again = sample.seconds([setting for _, setting, _ in rows], rounds)
    return [{"name": name, "setting": s.name, "met": met, **_priced(sample, s, again[s])} for name, s, met in rows]


def _priced(sample: Sample, setting: Setting, seconds: Seconds) -> dict[str, Any]:
    counts = sample.counts(setting)
    tokens = {"input": counts.input_tokens, "active": counts.active_tokens, "encoder": counts.encoder_tokens}
    return {"seconds": {**asdict(seconds), "total": seconds.total}, "tokens": tokens, **counts.cost}


def judged(row: dict[str, Any], ours: Sequence[Answered], both: Sequence[Answered]) -> dict[str, Any]:
    """A row with shares of right answers, and what it has over the setting with both sparsities."""
    told = {one.key: one.facts for one in both}
    lists = [(one.item.key, one.facts, told[one.key]) for one in ours if one.facts is not None]
    keys, own, theirs = zip(*lists, strict=True)
    return {
        **row,
        "answers": {"all": share_row(ours), "long": share_row([one for one in ours if one.question.is_long])},
        "facts": fmean(own),
        "against_both": difference_row(ours, both),
        "facts_against_both": asdict(paired_difference(keys, own, theirs)),
    }


def measure(args: argparse.Namespace, folder: Path, reference: Setting) -> dict[str, Any]:
    torch.set_num_threads(1)
    with (
        tempfile.TemporaryDirectory() as files,
        Engine.load(folder, device=args.device, dtype=args.dtype) as engine,
    ):
        engine.warmup()
        talks = [talk for talk in map(long_talk, clips(args.clips)) if talk.questions][: args.timed]
        sample = Sample(engine, talks, Path(files))
        return {"rows": timed(sample, reference, args.rounds), "sizes": asdict(sample.sizes), "timed_clips": len(talks)}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="folder, alias or hf:USER/REPO")
    parser.add_argument("--out", type=Path, required=True, help="JSON; results so far lie beside it")
    parser.add_argument("--reference", default="sparsevila:0.6/0.75", help="the setting with both")
    parser.add_argument("--clips", type=int, default=100, help="that are asked about")
    parser.add_argument("--timed", type=int, default=6, help="of them those that are timed")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args(argv)
    args.history = False
    try:
        reference = Setting.parse(args.reference)
        folder = resolve(args.model).path
    except (ValueError, SparseVILAError) as error:
        parser.error(str(error))
    items = clips(args.clips)
    header = {
        "model": checksum_of_checkpoint(folder),
        "sources": checksum_of_sources(),
        "clips": args.clips,
        "device": args.device,
        "dtype": args.dtype,
        "chunk": CHUNK,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    work = WorkFile(args.out.with_suffix(".work.jsonl"), header)
    timing = {"reference": reference.name, "timed": args.timed, "rounds": args.rounds}
    made = kept(args.out.with_suffix(".timed.work.jsonl"), header | timing, lambda: measure(args, folder, reference))
    for row in made["rows"]:
        print(f"{row['name']}: {row['setting']} {row['seconds']['total']:.4g} s{'' if row['met'] else ', cannot'}")
    answered = answers_of(items, [row["setting"] for row in made["rows"]], args, folder, work)
    told = [answered[f"{row['setting']} single own"] for row in made["rows"]]
    data = {
        "environment": describe(),
        "model": {
            "name": shown_name(args.model),
            "checksum": header["model"],
            "device": args.device,
            "dtype": args.dtype,
        },
        "sources": header["sources"],
        "arguments": {name: value for name, value in vars(args).items() if name not in ("out", "model", "history")},
        "layout": LAYOUT.name,
        "questions": count(items),
        "timed_clips": made["timed_clips"],
        "sizes": made["sizes"],
        "rows": [judged(row, ours, told[-1]) for row, ours in zip(made["rows"], told, strict=True)],
    }
    args.out.write_text(to_json(data))
    print(args.out)


if __name__ == "__main__":
    main()
