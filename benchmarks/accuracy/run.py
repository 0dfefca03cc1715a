"""Accuracy of the engine on held-out samples of the synthetic world, dense and sparse.

    python benchmarks/accuracy/run.py --model demo --questions 2000 --out benchmarks/results/accuracy_demo.json
        [--processes 2] [--settings dense sparsevila:0.6/0.75 random:0.6/0.75] [--protocols single history]

Protocols: `single` asks each question as if it were the first; `history` asks a sample's dialogue in order and
remembers it, the engine's own answers in it; `eviction` asks the dialogue in order in one session and forgets each
question and answer, but not what a method pruned meanwhile: the evaluation protocol of arXiv 2510.17777. A method that
prunes without the question answers `eviction` as `single`, bit for bit. It is not run again then, and `--fresh`
questions are asked once more in a session of their own to check it.

Results are appended to a file beside --out, so the same command goes on after a kill. `report.py` makes a table.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from sparsevila import Engine, SparseVILAError
from sparsevila.engine.hub import resolve

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from accuracy.answering import (
    CLIP_CRF,
    CLIP_SCALE,
    MAX_NEW_TOKENS,
    MAX_NEW_TOKENS_LONG,
    Answerer,
    Conversation,
    EngineAnswerer,
    Extras,
    Setting,
    Task,
)
from accuracy.questions import LAYOUTS, Item, count, describe_layouts, draw, first_items
from accuracy.scoring import learn_guesser
from accuracy.summary import summarise
from accuracy.workfile import Result, WorkFile, checksum_of_checkpoint, checksum_of_sources
from environment import describe

SETTINGS = ("dense", "sparsevila:0.6/0.75", "sparsevila:0.75/0.9", "random:0.6/0.75", "random:0.75/0.9")
CHUNK = 6  # samples: what a kill can cost one process


@dataclass(frozen=True)
class Loading:
    """How a process gets its engine."""

    folder: str
    device: str
    dtype: str
    w4a8: bool
    threads: int


@dataclass(frozen=True)
class Job:
    """One chunk of samples and what is still to be done with it."""

    chunk: int
    items: tuple[Item, ...]
    tasks: tuple[Task, ...]
    fresh: frozenset[str]  # keys of the samples that a fresh session is asked about, too
    agreement: frozenset[str]


def plan_tasks(settings: Sequence[Setting], protocols: Sequence[str], pictures: Sequence[str]) -> list[Task]:
    """Every setting under every protocol with the right picture, and the first one with the others, too.

    Without `eviction` where `single` gives it.
    """
    tasks = []
    for number, setting in enumerate(settings):
        for protocol in protocols:
            if protocol == "eviction" and "single" in protocols and not setting.needs_question:
                continue
            shown = pictures if number == 0 else [picture for picture in pictures if picture == "own"]
            tasks += [Task(setting, protocol, picture) for picture in shown]
    return tasks


def plan_jobs(
    items: Sequence[Item], tasks: Sequence[Task], done: set[tuple[str, int]], *, fresh: int, agreement: int
) -> list[Job]:
    """What is left to do, chunk by chunk."""
    also_fresh, compared = first_items(items, fresh), first_items(items, agreement)
    jobs = []
    for chunk, start in enumerate(range(0, len(items), CHUNK)):
        left = tuple(task for task in tasks if (task.key, chunk) not in done)
        if left:
            jobs.append(Job(chunk, tuple(items[start : start + CHUNK]), left, also_fresh, compared))
    return jobs


def do(job: Job, answerer: Answerer) -> list[Result]:
    """All tasks on one sample after the other, so that each picture is encoded once."""
    found: defaultdict[str, list[Conversation]] = defaultdict(list)
    for item in job.items:
        for task in job.tasks:
            is_own = task.picture == "own"
            extras = Extras(is_own and item.key in job.fresh, is_own and item.key in job.agreement)
            found[task.key].append(answerer.converse(item, task, extras))
        answerer.forget()
    return [Result(key, job.chunk, tuple(conversations)) for key, conversations in found.items()]


def run_here(jobs: Iterable[Job], loading: Loading) -> Iterator[list[Result]]:
    """In this process."""
    torch.set_num_threads(loading.threads)
    with (
        tempfile.TemporaryDirectory() as folder,
        Engine.load(loading.folder, device=loading.device, dtype=loading.dtype, w4a8=loading.w4a8) as engine,
    ):
        engine.warmup()
        answerer = EngineAnswerer(engine, Path(folder))
        for job in jobs:
            yield do(job, answerer)


def run_processes(jobs: Sequence[Job], loading: Loading, processes: int) -> Iterator[list[Result]]:
    """In processes of their own, each with its engine; results as they come.

    Raises SystemExit if a process stops early; the others are stopped, too.
    """
    context = get_context("spawn")  # threads of torch do not survive a fork
    waiting = list(jobs)[::-1]
    workers: dict[Connection, Any] = {}
    try:
        for _ in range(min(processes, len(jobs))):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, loading), daemon=True)
            process.start()
            there.close()
            workers[here] = process
            here.send(waiting.pop())
        while workers:
            for ready in wait(list(workers)):
                assert isinstance(ready, Connection)
                try:
                    results = ready.recv()
                except EOFError:
                    workers[ready].join()
                    raise SystemExit(
                        f"a process stopped with exit code {workers[ready].exitcode}: the same command goes on"
                    ) from None
                if waiting:
                    ready.send(waiting.pop())
                else:
                    ready.send(None)
                    workers.pop(ready).join()
                yield results
    finally:
        for process in workers.values():
            process.terminate()


def _serve(connection: Connection, loading: Loading) -> None:
    """A process of its own: one job after the other until there is none."""
    for results in run_here(_received(connection), loading):
        connection.send(results)


def _received(connection: Connection) -> Iterator[Job]:
    while (job := connection.recv()) is not None:
        yield job


def answer_all(jobs: Sequence[Job], results: Iterator[list[Result]], work: WorkFile) -> None:
    """Stores results as they come, and says how far it is."""
    total, done, begun = sum(count(job.items) * len(job.tasks) for job in jobs), 0, time.monotonic()
    sizes = {job.chunk: count(job.items) * len(job.tasks) for job in jobs}
    for made in results:
        work.append(made)
        done += sizes[made[0].chunk]
        spent = time.monotonic() - begun
        print(f"{done}/{total} answers, {spent:.0f} s, {spent / done * (total - done):.0f} s to go", flush=True)


def shown_name(model: str) -> str:
    """A model as a reader could name it: without the folders of this machine."""
    return Path(model).name if Path(model).is_absolute() else model


def to_json(data: dict[str, Any]) -> str:
    """JSON with a line for each row of a list; numbers to six digits."""

    def short(value: Any) -> Any:
        if isinstance(value, float):
            return float(f"{value:.6g}")
        if isinstance(value, dict):
            return {name: short(one) for name, one in value.items()}
        return [short(one) for one in value] if isinstance(value, list | tuple) else value

    def entry(name: str, value: Any) -> str:
        if isinstance(value, list) and value:
            return f'"{name}": [\n  ' + ",\n  ".join(json.dumps(short(row)) for row in value) + "\n ]"
        return f'"{name}": {json.dumps(short(value))}'

    return "{\n " + ",\n ".join(entry(name, value) for name, value in data.items()) + "\n}\n"


def parse_arguments(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[Setting], Path]:
    """The arguments, the settings among them and the folder of the checkpoint; each setting once."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="folder, alias or hf:USER/REPO")
    parser.add_argument("--out", type=Path, required=True, help="JSON; results so far lie beside it as .work.jsonl")
    parser.add_argument("--questions", type=int, default=2000, help="at least so many, in whole samples")
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), help="the first is also asked blind")
    parser.add_argument(
        "--protocols", nargs="+", default=["single", "history"], choices=["single", "history", "eviction"]
    )
    parser.add_argument("--pictures", nargs="+", default=["own", "wrong", "none"], choices=["own", "wrong", "none"])
    parser.add_argument("--fresh", type=int, default=100, help="questions to ask again in a session of their own")
    parser.add_argument("--agreement", type=int, default=200, help="questions to compare with dense decoding")
    parser.add_argument("--prior-samples", type=int, default=1000, help="of each layout, from which guesses are learnt")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--w4a8", action="store_true", help="8-bit products in 4-bit layers")
    args = parser.parse_args(argv)
    try:
        settings = [Setting.parse(text) for text in args.settings]
    except ValueError as error:
        parser.error(f"--settings: {error}")
    try:
        folder = resolve(args.model).path
    except SparseVILAError as error:
        parser.error(f"--model: {error}")
    return args, list(dict.fromkeys(settings)), folder


def main(argv: Sequence[str] | None = None) -> None:
    args, settings, folder = parse_arguments(argv)
    loading = Loading(str(folder), args.device, args.dtype, args.w4a8, args.threads)
    header = {
        "model": checksum_of_checkpoint(folder),
        "sources": checksum_of_sources(),
        "questions": args.questions,
        "layouts": [asdict(layout) for layout in LAYOUTS],
        "fresh": args.fresh,
        "agreement": args.agreement,
        "device": args.device,
        "dtype": args.dtype,
        "w4a8": args.w4a8,
        "chunk": CHUNK,
    }
    items = draw(args.questions)
    tasks = plan_tasks(settings, args.protocols, args.pictures)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    work = WorkFile(args.out.with_suffix(".work.jsonl"), header)
    done = {(result.task, result.chunk) for result in work.results()}
    jobs = plan_jobs(items, tasks, done, fresh=args.fresh, agreement=args.agreement)
    print(f"{count(items)} questions about {len(items)} samples, {len(tasks)} tasks, {len(jobs)} chunks to go")
    if jobs and args.processes > 1:
        answer_all(jobs, run_processes(jobs, loading, args.processes), work)
    elif jobs:
        answer_all(jobs, run_here(jobs, loading), work)
    data = {
        "environment": describe(),
        "model": {
            "name": shown_name(args.model),
            "checksum": header["model"],
            "device": args.device,
            "dtype": args.dtype,
            "w4a8": args.w4a8,
        },
        "sources": header["sources"],
        "arguments": {name: value for name, value in vars(args).items() if name not in ("out", "model")},
        "limits": {"new_tokens": MAX_NEW_TOKENS, "new_tokens_long": MAX_NEW_TOKENS_LONG},
        "clip_files": {"codec": "H.264, 4:2:0", "crf": CLIP_CRF, "scale": CLIP_SCALE},
        "layouts": describe_layouts(items),
        **summarise(items, tasks, work.results(), learn_guesser(items, args.prior_samples)),
    }
    args.out.write_text(to_json(data))
    print(f"{args.out}: {len(data['rows'])} rows")


if __name__ == "__main__":
    main()
