r"""What retrieval reads, layer by layer: sinks and retrieval tokens, overlap of turns, attention recovered, ink below.

    python benchmarks/accuracy/functional.py --model demo --samples 60 --processes 2 \
        --out benchmarks/results/functional_demo.json

The dialogues of held-out samples are asked in one session each, every question by itself (nothing is remembered). A
*sink* is a token that a layer reads in all turns, a *retrieval token* one that it reads in some. Of both, and of what a
question reads, it is told how much ink is under them and how much of what the question needs is among them.
Source: arXiv 2510.17777, section 5.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from sparsevila import Engine, SamplingParams, SparseVILAError, Sparsity
from sparsevila.engine.diagnostics import Overlap, Selection, overlap
from sparsevila.engine.hub import resolve
from sparsevila.engine.sparsity.oracle import touched

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from accuracy.answering import EngineAnswerer, answer_limit
from accuracy.limits import ask_all, ink_of_tokens, needed_regions
from accuracy.questions import Item, draw
from accuracy.run import shown_name, to_json
from accuracy.workfile import checksum_of_checkpoint, checksum_of_sources
from environment import describe
from world.labels import COVER_SHARE
from world.sample import Sample
from world.splits import make


@dataclass(frozen=True)
class Looked:
    """One dialogue, per layer; shares of the visual store, or of what is named."""

    item: Item
    turns: int
    read: float  # share of the store that a turn reads
    jaccard: list[float]  # of neighbouring turns' sets
    sinks: list[float]
    retrieval: list[float]
    recovered: list[float]  # share of the question's attention to the store that the set holds, mean over turns
    needed: list[float]  # share of what a question needs, and what is in the store, that the set holds
    ink_sinks: list[float | None]  # share of sinks that carry ink
    ink_retrieval: list[float | None]
    ink_store: float


def look_at(engine: Engine, answerer: EngineAnswerer, item: Item, sparsity: Sparsity) -> Looked:
    """Asks the dialogue of a sample and compares what its turns read."""
    sample = make(item.layout.kind, item.seed, **item.layout.options)
    selections = ask(engine, answerer, item, sparsity)
    found = overlap(selections)
    store = selections[0].store
    inked = (ink_of_tokens(sample, selections[0].token_map) * COVER_SHARE >= 1)[store]
    recovered = [selection.recovered_mass() for selection in selections]
    needed = _needed(sample, selections)
    return Looked(
        item,
        len(selections),
        len(_layer(selections[0], 0)) / len(store),
        found.jaccard,
        [len(sinks) / len(store) for sinks in found.sinks],
        [len(some) / len(store) for some in found.retrieval],
        [fmean(layer) for layer in zip(*recovered, strict=True)],
        [fmean(layer) for layer in zip(*needed, strict=True)] if needed else [],
        [_share(inked[sinks]) for sinks in found.sinks],
        [_share(inked[some]) for some in found.retrieval],
        float(inked.double().mean()),
    )


def ask(engine: Engine, answerer: EngineAnswerer, item: Item, sparsity: Sparsity) -> list[Selection]:
    """What each turn of the dialogue read."""
    media = answerer.show(item, "own").media
    with closing(engine.session(media=media, sparsity=sparsity)) as session:
        for question in item.dialogue:
            session.ask(question.text, params=SamplingParams(max_new_tokens=answer_limit(question)), remember=False)
        return list(session.selections)


def _layer(selection: Selection, layer: int) -> Tensor:
    """(k,) int64: what a layer read, where its heads share one set. Raises ValueError where they do not."""
    assert selection.active is not None, "a sparse turn"
    read = selection.active[layer]
    if not isinstance(read, Tensor) or read.dim() != 1:
        raise ValueError("expected sets that the heads of a layer share")
    return read


def _needed(sample: Sample, selections: Sequence[Selection]) -> list[list[float]]:
    """Per turn that needs something of the store, per layer: the share of it that the layer read."""
    found = []
    for qa, selection in zip(sample.dialogue, selections, strict=True):
        if not qa.regions:
            continue
        wanted = touched(selection.token_map, needed_regions(sample, qa))[selection.store]
        if wanted.any():
            layers = range(len(selection.active or ()))
            found.append([float(wanted[_layer(selection, i)].sum() / wanted.sum()) for i in layers])
    return found


def _share(flags: Tensor) -> float | None:
    return float(flags.double().mean()) if len(flags) else None


def _look_chunk(items: Sequence[Item], *, folder: str, sparsity: Sparsity) -> list[Looked]:
    torch.set_num_threads(1)
    with Engine.load(folder, device="cpu", dtype="float32") as engine, tempfile.TemporaryDirectory() as files:
        answerer = EngineAnswerer(engine, Path(files))
        found = []
        for item in items:
            found.append(look_at(engine, answerer, item, sparsity))
            answerer.forget()
        return found


def summarise(looked: Sequence[Looked]) -> list[dict[str, Any]]:
    """A row for each kind of picture and layer, means over dialogues."""
    rows = []
    for kind in ("all", *sorted({one.item.layout.kind for one in looked})):
        group = [one for one in looked if kind in ("all", one.item.layout.kind)]
        read = fmean(one.read for one in group)
        for layer in range(len(group[0].jaccard)):
            rows.append(
                {
                    "kind": kind,
                    "layer": layer,
                    "dialogues": len(group),
                    "read": read,
                    "jaccard": fmean(one.jaccard[layer] for one in group),
                    "jaccard_by_chance": read / (2 - read),
                    "sinks": fmean(one.sinks[layer] for one in group),
                    "retrieval": fmean(one.retrieval[layer] for one in group),
                    "recovered": fmean(one.recovered[layer] for one in group),
                    "needed": _mean([one.needed[layer] for one in group if one.needed]),
                    "ink_sinks": _mean([one.ink_sinks[layer] for one in group]),
                    "ink_retrieval": _mean([one.ink_retrieval[layer] for one in group]),
                    "ink_store": fmean(one.ink_store for one in group),
                }
            )
    return rows


def _mean(values: Sequence[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return fmean(found) if found else None


def example(engine: Engine, answerer: EngineAnswerer, item: Item, sparsity: Sparsity) -> dict[str, Any]:
    """One dialogue for a plot: boxes of the store's tokens, and per layer which are sinks and which are retrieved."""
    selections = ask(engine, answerer, item, sparsity)
    found: Overlap = overlap(selections)
    first = selections[0]
    boxes = first.token_map.box[first.store]
    return {
        "kind": item.layout.kind,
        "seed": item.seed,
        "options": item.layout.options,
        "questions": [question.text for question in item.dialogue],
        "frames": first.token_map.frame[first.store].tolist(),
        "boxes": [[round(edge, 5) for edge in box] for box in boxes.tolist()],
        "sinks": [one.tolist() for one in found.sinks],
        "read": [[_layer(selection, i).tolist() for i in range(len(found.sinks))] for selection in selections],
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="folder or alias of a checkpoint that knows the drawn world")
    parser.add_argument("--samples", type=int, default=60, help="dialogues, mixed over the layouts")
    parser.add_argument("--prefill", type=float, default=0.60, help="fraction removed")
    parser.add_argument("--decode", type=float, default=0.75)
    parser.add_argument("--processes", type=int, default=1, help="of one thread each")
    parser.add_argument("--out", type=Path, required=True, help="JSON")
    args = parser.parse_args(argv)
    try:
        folder = resolve(args.model).path
        sparsity = Sparsity(args.prefill, args.decode)
    except SparseVILAError as error:
        parser.error(str(error))
    items = [item for item in draw(20 * args.samples) if len(item.dialogue) > 1][: args.samples]
    looked = ask_all(items, args.processes, partial(_look_chunk, folder=str(folder), sparsity=sparsity))
    shown = next(item for item in items if item.layout.kind == "scene")
    with Engine.load(folder, device="cpu", dtype="float32") as engine, tempfile.TemporaryDirectory() as files:
        drawn = example(engine, EngineAnswerer(engine, Path(files)), shown, sparsity)
    data = {
        "environment": describe(),
        "model": {"name": shown_name(args.model), "checksum": checksum_of_checkpoint(folder)},
        "sources": checksum_of_sources(),
        "arguments": {name: value for name, value in vars(args).items() if name not in ("out", "model")},
        "turns": sum(one.turns for one in looked),
        "rows": summarise(looked),
        "example": drawn,
    }
    args.out.write_text(to_json(data))
    for row in data["rows"]:
        print({name: round(value, 3) if isinstance(value, float) else value for name, value in row.items()})


if __name__ == "__main__":
    main()
