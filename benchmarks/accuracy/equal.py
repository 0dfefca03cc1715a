"""Methods beside each other at the same cost: each gets the prefill sparsity at which it costs what a reference does.

    python benchmarks/accuracy/equal.py --model demo --processes 2 --out benchmarks/results/equal_demo.json
        [--budgets gflop=sparsevila:0.6/0.75 input=0.5 ...] [--methods sparsevila/0.75 fastv ...] [--questions 2000]

A budget is MEASURE=SETTING, what that setting costs, or MEASURE=FRACTION of what dense costs. Measures, of a
conversation about one picture (`prices.py`): `gflop` counts all of it, encoder to last answer; `seconds` are of this
machine, one thread; `input` is the visual tokens that a layer prefills, mean over layers; `active` those that a decode
step reads. A method is METHOD[/DECODE][:SWITCHES]; its prefill sparsity is looked for in thousandths. What a budget
asks of a method may be beyond it, because its first layers see everything: the row says so, and nothing is asked of it.

Then all settings that were found answer the same questions (`run.py`): each by itself (`single`), and as a dialogue of
which each question and answer is forgotten (`eviction`), whose first turn and later turns are told apart. The same
command goes on after a kill; measured seconds are kept.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, get_args

import torch

from sparsevila import Engine, InvalidRequest, SparseVILAError
from sparsevila.engine.hub import resolve
from sparsevila.engine.sparsity.registry import make_method

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from accuracy.answering import MAX_NEW_TOKENS, MAX_NEW_TOKENS_LONG, Setting
from accuracy.cost import Manner, ModelSizes, conversation_cost, own_steps
from accuracy.prices import Counts, Sample, Seconds
from accuracy.questions import LAYOUTS, Item, count, describe_layouts, draw
from accuracy.run import CHUNK, Loading, answer_all, plan_jobs, plan_tasks, run_here, run_processes, shown_name, to_json
from accuracy.scoring import paired_difference, wilson
from accuracy.summary import Answered, answered_by_task
from accuracy.workfile import WorkFile, checksum_of_checkpoint, checksum_of_sources
from environment import describe

Measure = Literal["gflop", "seconds", "input", "active"]
BUDGETS = (
    "gflop=sparsevila:0.6/0.75",
    "gflop=sparsevila:0.3/0.75",
    "seconds=sparsevila:0.6/0.75",
    "input=sparsevila:0.5/0.75",
    "active=sparsevila:0.6/0.75",
)
METHODS = (
    "sparsevila/0.75", "fastv", "pdrop", "sparsevlm", "sparsevlm+", "visionzip", "prumerge+", "sparsemm", "random/0.75",
    "sparsevila/0.75:positions=contiguous", "visionzip:positions=original",
)  # fmt: skip
OURS = "sparsevila"  # what the others are compared with
STEPS = 1000  # prefill sparsities are looked for in so many parts
CLOSE = 0.001  # of the budget, where the search ends
TOLERANCE = 0.02  # of the budget, by which the most that a method can do may miss it
TIMED = (0, 300, 600, 800, 950)  # thousandths whose seconds are measured; between them, straight lines
DENSE = Setting.parse("dense")


@dataclass(frozen=True)
class Budget:
    """What a conversation may cost: what a setting does, or a fraction of dense."""

    measure: Measure
    reference: Setting | float

    @staticmethod
    def parse(text: str) -> Budget:
        """Raises ValueError with the form that is expected."""
        measure, _, reference = text.partition("=")
        if measure not in get_args(Measure) or not reference:
            raise ValueError(f"expected MEASURE=SETTING or MEASURE=FRACTION, got {text!r}")
        try:
            share = float(reference)
        except ValueError:
            return Budget(measure, Setting.parse(reference))  # type: ignore[arg-type]
        if not 0 < share <= 1:
            raise ValueError(f"expected a fraction above 0 and at most 1, got {text!r}")
        return Budget(measure, share)  # type: ignore[arg-type]

    @property
    def name(self) -> str:
        reference = self.reference.name if isinstance(self.reference, Setting) else f"{self.reference:g}"
        return f"{self.measure}={reference}"


@dataclass(frozen=True)
class Contender:
    """A method, with a decode sparsity and switches of its own, whose prefill sparsity is looked for."""

    method: str
    decode: float = 0.0
    switches: str = ""

    @staticmethod
    def parse(text: str) -> Contender:
        """METHOD[/DECODE][:SWITCHES]. Raises ValueError."""
        head, _, switches = text.partition(":")
        method, _, decode = head.partition("/")
        contender = Contender(method, float(decode or 0), switches)
        contender.setting(0)
        return contender

    @property
    def name(self) -> str:
        """What a row calls it."""
        return self.method + (f":{self.switches}" if self.switches else "")

    def setting(self, step: int) -> Setting:
        """With so many thousandths removed in prefill."""
        switches = f":{self.switches}" if self.switches else ""
        return Setting.parse(f"{self.method}:{step / STEPS:g}/{self.decode:g}{switches}")

    def is_of(self, setting: Setting) -> bool:
        """Whether a setting is this method with another prefill sparsity."""
        return self.setting(0).sparsity == replace(setting.sparsity, prefill=0.0)

    def highest(self, num_layers: int) -> int:
        """The most it can do in a decoder of that depth."""
        low, high = 0, STEPS - 1
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self._can(middle, num_layers) else (low, middle - 1)
        return low

    def _can(self, step: int, num_layers: int) -> bool:
        try:
            make_method(self.setting(step).sparsity).at_depth(num_layers)
        except InvalidRequest:
            return False
        return True


@dataclass(frozen=True)
class Found:
    """The setting of a method that is nearest to a budget; None where even the most it can do costs more."""

    budget: str
    measure: Measure
    target: float
    method: str
    setting: str | None
    figure: float  # of the setting; without one, of the most it can do

    @property
    def is_met(self) -> bool:
        return self.setting is not None


def nearest(figure: Callable[[int], float], highest: int, target: float) -> tuple[int, bool]:
    """The step of 0 to `highest` whose figure is the target or nearest to it; whether that can be reached at all.

    Figures fall from step to step, about evenly: looked for where a straight line would have it, and half-way, in turn.
    """
    low, high = 0, highest  # figure(low) > target >= figure(high)
    if figure(low) <= target:
        return low, True
    if figure(high) > target:
        return high, figure(high) <= (1 + TOLERANCE) * target
    is_line = True
    while high - low > 1:
        part = (figure(low) - target) / (figure(low) - figure(high)) if is_line else 0.5
        middle = min(max(low + round(part * (high - low)), low + 1), high - 1)
        if abs(figure(middle) - target) <= CLOSE * target:
            return middle, True
        low, high = (low, middle) if figure(middle) <= target else (middle, high)
        is_line = not is_line
    return min((high, low), key=lambda step: abs(figure(step) - target)), True


def on_line(points: Sequence[tuple[int, float]], target: float) -> tuple[int, float]:
    """The step at which straight lines between measured (step, figure) points first come down to the target.

    Figures that rise again are noise: a point counts as low as the lowest before it. Returns the step and its figure;
    of a target below all of them, the last step.
    """
    lowest = [min(figure for _, figure in points[: i + 1]) for i in range(len(points))]
    for i, (step, _) in enumerate(points):
        if lowest[i] <= target:
            if i == 0:
                return step, lowest[0]
            before, above = points[i - 1][0], lowest[i - 1]
            part = (above - target) / (above - lowest[i])
            return round(before + part * (step - before)), target
    return points[-1][0], lowest[-1]


class Finder:
    """Settings that cost the same, on a sample of conversations."""

    def __init__(self, sample: Sample, contenders: Sequence[Contender], rounds: int) -> None:
        self._sample, self._contenders, self._rounds = sample, contenders, rounds
        self._highest = {one: one.highest(sample.sizes.layers) for one in contenders}
        self._seconds: dict[Setting, Seconds] = {}

    def find(self, budgets: Sequence[Budget]) -> list[Found]:
        """Every method at every budget."""
        timed = [budget.reference for budget in budgets if budget.measure == "seconds"]
        if timed:
            self._measure([reference for reference in timed if isinstance(reference, Setting)])
        found = [self._at(budget, one) for budget in budgets for one in self._contenders]
        names = dict.fromkeys(one.setting for one in found if one.measure == "seconds" and one.setting)
        if names:
            self._seconds |= self._sample.seconds([DENSE, *map(Setting.parse, names)], self._rounds)
        return found

    @property
    def seconds(self) -> dict[Setting, Seconds]:
        """What was measured; of the settings that were found, together and last."""
        return dict(self._seconds)

    def _measure(self, references: Sequence[Setting]) -> None:
        settings = [DENSE, *references]
        settings += [one.setting(step) for one in self._contenders for step in self._timed(one)]
        self._seconds = self._sample.seconds(list(dict.fromkeys(settings)), self._rounds)

    def _timed(self, one: Contender) -> list[int]:
        return sorted({min(step, self._highest[one]) for step in TIMED})

    def figure(self, setting: Setting, measure: Measure) -> float:
        """What a setting costs. Seconds of those that were measured alone."""
        if measure == "seconds":
            return self._seconds[setting].total
        counts = self._sample.counts(setting)
        return {"gflop": counts.gflop, "input": counts.input_tokens, "active": counts.active_tokens}[measure]

    def target(self, budget: Budget) -> float:
        if isinstance(budget.reference, Setting):
            return self.figure(budget.reference, budget.measure)
        return budget.reference * self.figure(DENSE, budget.measure)

    def _at(self, budget: Budget, one: Contender) -> Found:
        target, measure = self.target(budget), budget.measure
        if isinstance(budget.reference, Setting) and one.is_of(budget.reference):
            return Found(budget.name, measure, target, one.name, budget.reference.name, target)
        if measure == "seconds":
            points = [(step, self.figure(one.setting(step), measure)) for step in self._timed(one)]
            step, figure = on_line(points, target)
            met = figure <= target
        else:
            step, met = nearest(lambda s: self.figure(one.setting(s), measure), self._highest[one], target)
            figure = self.figure(one.setting(step), measure)
        return Found(budget.name, measure, target, one.name, one.setting(step).name if met else None, figure)


# From answers to rows


def parts_of(
    setting: Setting, answered: dict[str, list[Answered]], protocols: Sequence[str]
) -> dict[str, list[Answered]]:
    """Answers of a setting: each question by itself, the first turn and the later turns of the dialogue.

    A method that prunes without the question answers `eviction` as `single`, bit for bit, and was not asked again.
    """
    single = answered[f"{setting.name} single own"]
    talk = answered.get(f"{setting.name} eviction own", [one for one in single if one.question.turn >= 0])
    parts = {"single": single, "first": [one for one in talk if one.question.turn == 0]}
    parts["later"] = [one for one in talk if one.question.turn > 0]
    if "history" in protocols:
        told = answered[f"{setting.name} history own"]
        parts["history"] = [one for one in told if one.question.turn > 0]
    return parts


def share_row(found: Sequence[Answered]) -> dict[str, Any]:
    """Share of right answers with its interval."""
    right = sum(int(one.right) for one in found)
    low, high = wilson(right, len(found))
    return {"n": len(found), "right": right, "accuracy": right / len(found), "low": low, "high": high}


def difference_row(ours: Sequence[Answered], theirs: Sequence[Answered]) -> dict[str, float]:
    """`ours - theirs` on the questions that both were asked."""
    known = {one.key: one.right for one in theirs}
    both = [one for one in ours if one.key in known]
    keys = [one.item.key for one in both]
    return asdict(paired_difference(keys, [one.right for one in both], [known[one.key] for one in both]))


def own_gflop(sizes: ModelSizes, tiles: dict[str, int], setting: Setting, talk: Sequence[Answered]) -> float:
    """GFLOP of a conversation with the answers that were given, as long as they came; mean over conversations."""
    by_item: defaultdict[str, list[Answered]] = defaultdict(list)
    for one in talk:
        by_item[one.item.key].append(one)
    manner = Manner.of(setting)
    costs = []
    for turns in by_item.values():
        replies = [one.reply for one in turns]
        steps = [own_steps(reply) for reply in replies]
        layout = turns[0].item.layout.name
        costs.append(conversation_cost(sizes, tiles[layout], replies, steps, manner).total.gflop)
    return fmean(costs)


def compared(
    found: Sequence[Found], answered: dict[str, list[Answered]], protocols: Sequence[str]
) -> list[dict[str, Any]]:
    """A row for each method at each budget, dense first: shares of right answers, and differences to SparseVILA's."""
    rows = []
    for budget in dict.fromkeys(one.budget for one in found):
        own = [one for one in found if one.budget == budget]
        ours = next((one for one in own if one.method == OURS and one.setting), None)
        against = parts_of(Setting.parse(ours.setting), answered, protocols) if ours and ours.setting else {}
        dense = Found(budget, own[0].measure, own[0].target, "dense", "dense", float("nan"))
        for one in [dense, *own]:
            row: dict[str, Any] = {**asdict(one), "met": one.is_met}
            if one.method == "dense":
                row["figure"] = None
            if one.setting:
                parts = parts_of(Setting.parse(one.setting), answered, protocols)
                row["asked_as_dialogue"] = f"{one.setting} eviction own" in answered
                row["answers"] = {name: share_row(some) for name, some in parts.items()}
                row["against_ours"] = {
                    name: difference_row(some, against[name]) for name, some in parts.items() if against
                }
                row["later_against_single"] = difference_row(parts["later"], parts["single"])
            rows.append(row)
    return rows


def priced(setting: Setting, counts: Counts, seconds: Seconds | None) -> dict[str, Any]:
    """What a setting costs, on the sample."""
    timed = None if seconds is None else {**asdict(seconds), "total": seconds.total}
    tokens = {"input": counts.input_tokens, "active": counts.active_tokens, "encoder": counts.encoder_tokens}
    return {"setting": setting.name, **counts.cost, "tokens": tokens, "seconds": timed}


# The command


def parse_arguments(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[Budget], list[Contender], Path]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="folder, alias or hf:USER/REPO")
    parser.add_argument("--out", type=Path, required=True, help="JSON; results so far lie beside it")
    parser.add_argument("--budgets", nargs="+", default=list(BUDGETS), help="MEASURE=SETTING or MEASURE=FRACTION")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), help="METHOD[/DECODE]")
    parser.add_argument("--questions", type=int, default=2000, help="at least so many, in whole samples")
    parser.add_argument(
        "--sample", type=int, default=20, help="questions of the conversations that settings are priced on"
    )
    parser.add_argument("--rounds", type=int, default=3, help="times that seconds are measured; the least counts")
    parser.add_argument("--history", action="store_true", help="also as a dialogue that is remembered")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args(argv)
    try:
        budgets = [Budget.parse(text) for text in args.budgets]
        contenders = [Contender.parse(text) for text in args.methods]
    except ValueError as error:
        parser.error(str(error))
    try:
        folder = resolve(args.model).path
    except SparseVILAError as error:
        parser.error(f"--model: {error}")
    return args, list(dict.fromkeys(budgets)), list(dict.fromkeys(contenders)), folder


def priced_and_found(args: argparse.Namespace, folder: Path, budgets: list[Budget], contenders: list[Contender]) -> Any:
    """The search on the sample, as it goes into a file: settings, what they cost, and the model's sizes."""
    torch.set_num_threads(1)
    with (
        tempfile.TemporaryDirectory() as clips,
        Engine.load(folder, device=args.device, dtype=args.dtype) as engine,
    ):
        engine.warmup()
        sample = Sample(engine, draw(args.sample), Path(clips))
        finder = Finder(sample, contenders, args.rounds)
        found = finder.find(budgets)
        names = dict.fromkeys(one.setting for one in found if one.setting)
        seconds = finder.seconds
        settings = list(dict.fromkeys([DENSE, *map(Setting.parse, names), *seconds]))
        return {
            "found": [asdict(one) for one in found],
            "prices": [priced(one, sample.counts(one), seconds.get(one)) for one in settings],
            "sizes": asdict(sample.sizes),
            "tiles": sample.tiles,
        }


def kept(path: Path, header: dict[str, Any], make: Callable[[], Any]) -> Any:
    """What a file holds of the same header; else what `make` returns, which goes into the file."""
    head = json.dumps(header, sort_keys=True)
    if path.exists():
        lines = path.read_text().splitlines()
        if len(lines) == 2 and lines[0] == head:
            return json.loads(lines[1])
    made = make()
    path.write_text(f"{head}\n{json.dumps(made)}\n")
    return json.loads(json.dumps(made))


def checksum_of_search() -> str:
    """sha256 over the code that prices and finds."""
    files = [Path(__file__).parent / f"{name}.py" for name in ("cost", "prices", "equal")]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def answers_of(
    items: Sequence[Item], settings: Iterable[str], args: argparse.Namespace, folder: Path, work: WorkFile
) -> dict[str, list[Answered]]:
    """Asks all settings, or goes on with it."""
    protocols = ["single", "eviction"] + ["history"] * args.history
    tasks = plan_tasks([Setting.parse(name) for name in settings], protocols, ["own"])
    done = {(result.task, result.chunk) for result in work.results()}
    jobs = plan_jobs(items, tasks, done, fresh=0, agreement=0)
    print(
        f"{count(items)} questions about {len(items)} samples, {len(tasks)} tasks, {len(jobs)} chunks to go", flush=True
    )
    loading = Loading(str(folder), args.device, args.dtype, False, 1)
    if jobs and args.processes > 1:
        answer_all(jobs, run_processes(jobs, loading, args.processes), work)
    elif jobs:
        answer_all(jobs, run_here(jobs, loading), work)
    return answered_by_task(items, tasks, work.results())


def main(argv: Sequence[str] | None = None) -> None:
    args, budgets, contenders, folder = parse_arguments(argv)
    items = draw(args.questions)
    header = {
        "model": checksum_of_checkpoint(folder),
        "sources": checksum_of_sources(),
        "questions": args.questions,
        "layouts": [asdict(layout) for layout in LAYOUTS],
        "device": args.device,
        "dtype": args.dtype,
        "chunk": CHUNK,
    }
    asked = {name: value for name, value in vars(args).items() if name in ("budgets", "methods", "sample", "rounds")}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    work = WorkFile(args.out.with_suffix(".work.jsonl"), header)  # first, so that another run's is refused at once
    search = kept(
        args.out.with_suffix(".found.work.jsonl"),
        header | asked | {"search": checksum_of_search()},
        lambda: priced_and_found(args, folder, budgets, contenders),
    )
    found = [Found(**one) for one in search["found"]]
    for one in found:
        print(
            f"{one.budget}: {one.method} {one.setting or 'cannot'} ({one.figure:.4g} of {one.target:.4g})", flush=True
        )
    names = list(dict.fromkeys(["dense", *(one.setting for one in found if one.setting)]))
    answered = answers_of(items, names, args, folder, work)
    protocols = ["single", "eviction"] + ["history"] * args.history
    sizes = ModelSizes(**search["sizes"])
    prices = []
    for price in search["prices"]:
        if price["setting"] in names:
            setting = Setting.parse(price["setting"])
            parts = parts_of(setting, answered, protocols)
            own = own_gflop(sizes, search["tiles"], setting, [*parts["first"], *parts["later"]])
            shares = {name: share_row(some) for name, some in parts.items()}
            price = {**price, "own_gflop": own, "answers": shares}
        prices.append(price)
    data = {
        "environment": describe(),
        "model": {
            "name": shown_name(args.model),
            "checksum": header["model"],
            "device": args.device,
            "dtype": args.dtype,
        },
        "sources": header["sources"],
        "arguments": {name: value for name, value in vars(args).items() if name not in ("out", "model")},
        "limits": {"new_tokens": MAX_NEW_TOKENS, "new_tokens_long": MAX_NEW_TOKENS_LONG},
        "layouts": describe_layouts(items),
        "sizes": search["sizes"],
        "tiles": search["tiles"],
        "settings": prices,
        "rows": compared(found, answered, protocols),
    }
    args.out.write_text(to_json(data))
    print(f"{args.out}: {len(data['rows'])} rows")


if __name__ == "__main__":
    main()
