"""What quantising a 7B model takes: time and memory of a few decoder layers of the true width, and of the whole tower.

    python benchmarks/quantise.py --work FOLDER [--layers 2] [--samples N] [--json OUT]

Writes a random LLaVA-NeXT of Vicuna-7B's widths with as many decoder layers, quantises it with the built-in calibration
set as `python -m sparsevila.quant` does, and extrapolates the time to the model's 32 layers; the memory does not depend
on their number. Memory is what the process holds beside files (RssAnon), read every tenth of a second.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch

from sparsevila.engine.calibration_set import builtin_samples
from sparsevila.engine.quantise import QuantSettings, quantise_checkpoint
from sparsevila.engine.quantised_copy import estimate
from sparsevila.models.checkpoint import Checkpoint
from sparsevila.models.interface import Progress

sys.path.insert(0, str(Path(__file__).resolve().parent))
from environment import describe
from random_checkpoint import preset, write_random_checkpoint

FULL_LAYERS = 32
PERIOD_S = 0.1


def held_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("no RssAnon in /proc/self/status: this needs Linux")


@dataclass
class Meter:
    """Peaks of memory and times by stage. A stage is "encode", "tower 3", "decoder 1" or "rest"."""

    num_layers: int  # of the decoder
    stage: str = "start"
    peak: dict[str, int] = field(default_factory=dict)
    since: dict[str, float] = field(default_factory=dict)

    def tell(self, step: Progress) -> None:
        """The progress callback. The tower is compared by encoding again, which counts as its last layer."""
        if step.stage == "encode" and not any(name.startswith("tower") for name in self.since):
            self.enter("encode")
        elif step.stage == "quantise" and "encode" in self.since:
            assert step.total is not None
            layer = step.done - (step.total - self.num_layers)  # the tower's come first
            if layer < 0:
                self.enter(f"tower {step.done}")
            else:
                self.enter(f"decoder {layer}" if layer < self.num_layers else "rest")

    def enter(self, stage: str) -> None:
        if stage not in self.since:
            self.since[stage] = time.perf_counter()
        self.stage = stage

    @contextmanager
    def sampling(self) -> Iterator[None]:
        over = threading.Event()

        def watch() -> None:
            while not over.wait(PERIOD_S):
                stage = self.stage
                self.peak[stage] = max(self.peak.get(stage, 0), held_bytes())

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def seconds(self, end: float) -> dict[str, float]:
        names = list(self.since)
        ends = [*(self.since[name] for name in names[1:]), end]
        return {name: stop - self.since[name] for name, stop in zip(names, ends, strict=True)}


def grouped(values: dict[str, Any], total: Callable[[list[Any]], Any]) -> dict[str, Any]:
    """Layers of one kind together."""
    found: dict[str, list[Any]] = {}
    for name, value in values.items():
        found.setdefault(name.split()[0], []).append(value)
    return {name: total(each) for name, each in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory of quantising a 7B model, from a few of its layers.")
    parser.add_argument("--work", type=Path, required=True, help="a folder for the checkpoints; the source is kept")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--samples", type=int, help="of the built-in calibration set; all if left out")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shape = preset(f"vicuna-7b-{args.layers}-layers")
    source, out = args.work / f"vicuna-7b-{args.layers}-layers", args.work / "quantised"
    if not source.exists():
        write_random_checkpoint(source, shape)
    shutil.rmtree(out, ignore_errors=True)
    settings, samples = QuantSettings(), builtin_samples()[: args.samples]
    planned = estimate(Checkpoint.open(source), settings, num_samples=len(samples))
    meter = Meter(shape.text_layers)
    start = time.perf_counter()
    with meter.sampling():
        quantise_checkpoint(source, out, settings, samples, progress=meter.tell)
    end = time.perf_counter()
    shutil.rmtree(out)
    seconds = meter.seconds(end)
    layer_s = median(s for name, s in seconds.items() if name.startswith("decoder"))
    whole_s = end - start + (FULL_LAYERS - args.layers) * layer_s
    times, peaks = grouped(seconds, sum), grouped(meter.peak, max)
    print(
        f"{len(samples)} samples, {args.threads} threads; peaks beside files, estimate {planned.memory_bytes >> 20} MiB"
    )
    for name in peaks:
        print(f"{name:>10} {times.get(name, 0.0):>8.0f} s {peaks[name] >> 20:>8} MiB")
    print(f"a decoder layer {layer_s:.0f} s; all {FULL_LAYERS} of them with the rest: {whole_s / 3600:.1f} h")
    if args.json:
        found = {
            "environment": describe(), "layers": args.layers, "samples": len(samples), "seconds": seconds,
            "peak_bytes": meter.peak, "estimated_bytes": planned.memory_bytes, "layer_s": layer_s, "whole_s": whole_s,
        }  # fmt: skip
        args.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
