"""Accuracy on a public benchmark from a local copy, setting beside setting.

    python benchmarks/accuracy/public.py --set gqa --data FOLDER --model llava-next-7b --out gqa.jsonl
        [--settings dense sparsevila:0.6/0.75 random:0.6/0.75] [--limit 500] [--frames 32] [--max-new-tokens 16]

Each question is asked as if it were the first about its picture; questions about one picture share its features.
Answers are greedy and appended to --out as they come, so the same command goes on after a kill. The table gives each
setting's mean score with its 95 % interval, and the difference from the first setting, question by question.
`public_sets.py` says which files a folder has to hold. None of these data sets was at hand when this was written:
readers are tested on small files of the published form.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from sparsevila import Engine, Image, SamplingParams, Video
from sparsevila.engine.hub import resolve

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from accuracy.answering import Setting
from accuracy.public_sets import SETS, MissingData, PublicQuestion, PublicSet, read
from accuracy.scoring import Z_95
from environment import describe


@dataclass(frozen=True)
class Answer:
    """One question under one setting."""

    setting: str
    key: str
    text: str
    score: float
    group: str
    visual_kept: int
    visual_active: float
    ttft_s: float


def header(args: argparse.Namespace) -> dict[str, Any]:
    """What answers depend on: a file with another header is not gone on with."""
    return {"set": args.set, "model": args.model, "frames": args.frames, "max_new_tokens": args.max_new_tokens}


def answers_in(path: Path, wanted: dict[str, Any]) -> list[Answer]:
    """What is there of an earlier run; a last line that was cut is left out, and cut off the file."""
    if not path.exists():
        path.write_text(json.dumps(wanted) + "\n")
        return []
    whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    if not whole or json.loads(whole[0]) != wanted:
        raise SystemExit(f"{path} holds answers of another run: remove it, or choose another --out")
    path.write_text("".join(whole))
    return [Answer(**json.loads(line)) for line in whole[1:]]


def ask_all(
    engine: Engine,
    public: PublicSet,
    questions: Sequence[PublicQuestion],
    settings: Sequence[Setting],
    done: set[tuple[str, str]],
    args: argparse.Namespace,
) -> Iterator[Answer]:
    """What is not done yet, picture by picture, every setting on a picture before the next one."""
    params = SamplingParams(max_new_tokens=args.max_new_tokens)
    for path, same in groupby(questions, key=lambda question: question.media):
        group = list(same)
        for setting in settings:
            left = [question for question in group if (setting.name, question.key) not in done]
            # A method that prunes for a question must not bind the next one.
            for few in [left] if not setting.needs_question else [[question] for question in left]:
                if few:
                    yield from _about_one(engine, public, path, few, setting, params, args.frames)
        engine.forget_features()


def _about_one(
    engine: Engine,
    public: PublicSet,
    path: Path,
    questions: Sequence[PublicQuestion],
    setting: Setting,
    params: SamplingParams,
    frames: int | None,
) -> Iterator[Answer]:
    if not path.is_file():
        raise MissingData(f"expected {path.name} in {path.parent}, which the questions name")
    item = Image(path) if public.kind == "image" else Video(path, frames=frames)
    with closing(engine.session(media=[item], sparsity=setting.sparsity)) as session:
        for question in questions:
            result = session.ask(question.question + public.instruction, params=params, remember=False)
            stats = result.stats
            yield Answer(
                setting.name,
                question.key,
                result.text,
                public.metric(result.text, question.truths),
                question.group,
                stats.visual_tokens_kept,
                stats.visual_tokens_active,
                stats.ttft_s,
            )


def mean_with_interval(scores: Sequence[float]) -> tuple[float, float]:
    """The mean and half of its 95 % interval, by the normal distribution; of one score the interval is unknown."""
    mean = sum(scores) / len(scores)
    if len(scores) < 2:
        return mean, math.nan
    variance = sum((score - mean) ** 2 for score in scores) / (len(scores) - 1)
    return mean, Z_95 * math.sqrt(variance / len(scores))


def table(answers: Iterable[Answer], settings: Sequence[str]) -> Iterator[str]:
    """Rows of Markdown; the first setting is what the others are compared with, on the questions both answered."""
    by_setting: dict[str, dict[str, Answer]] = {name: {} for name in settings}
    for answer in answers:
        if answer.setting in by_setting:
            by_setting[answer.setting][answer.key] = answer
    yield "| setting | questions | score, % | from the first | visual tokens kept | read |"
    yield "|---|---|---|---|---|---|"
    first = by_setting[settings[0]]
    for name, found in by_setting.items():
        if not found:
            continue
        mean, half = mean_with_interval([answer.score for answer in found.values()])
        both = [answer.score - first[key].score for key, answer in found.items() if key in first]
        difference = (
            ""
            if name == settings[0] or not both
            else "{:+.1f} ± {:.1f}".format(*(100 * number for number in mean_with_interval(both)))
        )
        kept, read_ = (sum(getattr(a, f"visual_{k}") for a in found.values()) / len(found) for k in ("kept", "active"))
        score = f"{100 * mean:.1f} ± {100 * half:.1f}"
        yield f"| {name} | {len(found)} | {score} | {difference} | {kept:.0f} | {read_:.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description="Accuracy on a public benchmark.")
    parser.add_argument("--set", required=True, choices=list(SETS))
    parser.add_argument("--data", required=True, type=Path, help="the benchmark's folder")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--settings", nargs="+", default=["dense", "sparsevila:0.6/0.75", "random:0.6/0.75"])
    parser.add_argument("--limit", type=int, help="questions, from the first on")
    parser.add_argument("--frames", type=int, help="of a clip; the model's own number if left out")
    parser.add_argument("--max-new-tokens", type=int, default=16)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", required=True, type=Path, help="answers, one JSON object a line")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        settings = [Setting.parse(text) for text in args.settings]
        questions = read(args.set, args.data)[: args.limit]
        answers = answers_in(args.out, header(args))
        done = {(answer.setting, answer.key) for answer in answers}
        with Engine.load(resolve(args.model).path) as engine, args.out.open("a") as file:
            for answer in ask_all(engine, SETS[args.set], questions, settings, done, args):
                file.write(json.dumps(asdict(answer)) + "\n")
                file.flush()
                answers.append(answer)
    except ValueError as error:  # settings and files as they are told
        raise SystemExit(str(error)) from None
    asked = {question.key for question in questions}
    print(f"{args.set}, {args.model}, commit {describe()['commit']}")
    print("\n".join(table([a for a in answers if a.key in asked], [setting.name for setting in settings])))


if __name__ == "__main__":
    main()
