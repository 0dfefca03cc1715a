"""Trains the demo model from scratch, first the tower on dense labels, then projector and decoder on dialogues.

    python benchmarks/world/train.py --run RUN [--size small] [--minutes 60] [--export assets/demo]

RUN holds the state, the log (log.jsonl) and the documents of the checkpoint. `--minutes` stops cleanly; the same
command goes on where it stopped, with the same batches in the same order. The checkpoint so far is in RUN as well;
`--export` copies it once the training is done. The tower is frozen in the second stage.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from environment import describe
from random_checkpoint import train_tokenizer
from world.batches import EARLY, IGNORED, LATE, BatchMaker, Dialogues, Tiles
from world.crew import Crew, run_crew
from world.labels import CLASSES
from world.splits import KINDS, TRAIN, VALIDATION, make, world_vocabulary
from world.student import (
    NUM_PIECES,
    SHAPES,
    build,
    decode,
    decoder_layer,
    embed_visual,
    export,
    standardise,
    tower_hidden,
)

from sparsevila.engine.tokenizer import load_tokenizer
from sparsevila.models.checkpoint import Checkpoint
from sparsevila.models.registry import load_model

CELLS = 17  # classes of a row's or a column's number, 0 for none
BACKGROUND_WEIGHT = 0.1  # most patches are empty, and that is quickly learnt
EVALUATIONS = 6
EVALUATION_SIZE = 16  # samples of each layout
MAX_PARAMETERS = 32_000_000  # of a stage; bounds the memory that processes share


@dataclass(frozen=True)
class Recipe:
    """What fixes the result, given the machine's rounding."""

    size: str = "small"
    vision_steps: int = 3000
    vision_batch: int = 96
    vision_muon: float = 0.02
    vision_adam: float = 2e-3
    language_steps: int = 8000
    language_batches: int = 2  # for one step, of one layout
    language_batch: int = 16
    language_first: int = 600  # steps with one kind, at the beginning
    language_early: int = 900  # steps with small layouts, after these
    language_grounded: int = 1500  # steps in which some heads are told where answers are, at the beginning
    language_grounding: float = 0.15  # the weight of that
    language_muon: float = 0.004
    language_adam: float = 2e-3
    language_weight_decay: float = 0.05  # without it matrices grew, and attention ended on single tokens
    language_decay: float = 0.3  # the last part of the steps, in which the rate falls; the tower's falls all the time
    warmup: int = 100
    seed: int = 0


class Heads(nn.Module):
    """Linear readers of patches and of the summary token, for the first stage alone."""

    def __init__(self, width: int, sample: Tiles) -> None:
        super().__init__()
        self.patches = nn.ModuleDict({name: nn.Linear(width, _classes(name)) for name in sample.patches})
        self.whole = nn.ModuleDict({name: nn.Linear(width, v.shape[1]) for name, v in sample.whole.items()})

    def forward(self, hidden: Tensor, tiles: Tiles) -> tuple[Tensor, dict[str, float]]:
        """hidden (B, 1 + patches, width), summary first -> loss, and the accuracy of each label where there is one."""
        losses, accuracy = [], {}
        for name, labels in tiles.patches.items():
            logits = self.patches[name](hidden[:, 1:]).float()
            each = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none")
            weight = torch.where(labels.flatten() > 0, 1.0, BACKGROUND_WEIGHT)
            weight = weight.masked_fill(labels.flatten() == IGNORED, 0)
            losses.append((each * weight).sum() / weight.sum().clamp(min=1))
            covered = labels > 0
            if covered.any():
                accuracy[name] = float((logits.argmax(-1)[covered] == labels[covered]).float().mean())
        for name, wanted in tiles.whole.items():
            logits = self.whole[name](hidden[:, 0]).float()
            losses.append(F.binary_cross_entropy_with_logits(logits, wanted))
            accuracy[f"whole_{name}"] = float(((logits > 0) == (wanted > 0.5)).float().mean())
        return torch.stack(losses).sum(), accuracy


def _classes(name: str) -> int:
    if name in ("row", "column"):
        return CELLS
    return CLASSES["character" if name.startswith("character") else name.removeprefix("partner_")]


class Optimisers:
    """Muon for the matrices of the layers, AdamW for everything else; one schedule."""

    def __init__(
        self,
        named: list[tuple[str, nn.Parameter]],
        *,
        muon: float,
        adam: float,
        steps: int,
        warmup: int,
        decay: float,
        weight_decay: float,
    ) -> None:
        matrices = [p for n, p in named if p.ndim == 2 and ".layers." in n]
        chosen = {id(p) for p in matrices}
        others = [p for _, p in named if id(p) not in chosen]
        self.parameters = [p for _, p in named]
        self.steps, self.warmup, self.decay = steps, warmup, decay
        self.each: list[tuple[torch.optim.Optimizer, float]] = [
            (torch.optim.Muon(matrices, lr=muon, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"), muon),
            (torch.optim.AdamW(others, lr=adam, betas=(0.9, 0.98), weight_decay=0.02), adam),
        ]

    def rate(self, step: int) -> float:
        """Share of the full learning rate: warm-up, a plateau, then half a cosine down to 1 %."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        falling = max(1.0, self.decay * self.steps)
        left = min(1.0, (self.steps - step) / falling)
        return 0.01 + 0.99 * 0.5 * (1 - math.cos(math.pi * left))

    def step(self, step: int) -> None:
        """One update from the gradients at hand."""
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimiser, full in self.each:
            for group in optimiser.param_groups:
                group["lr"] = full * self.rate(step)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)

    def state(self) -> list[dict[str, Any]]:
        return [optimiser.state_dict() for optimiser, _ in self.each]

    def load(self, states: list[dict[str, Any]]) -> None:
        for (optimiser, _), state in zip(self.each, states, strict=True):
            optimiser.load_state_dict(state)


def _goes_on(old: Recipe, new: Recipe, stage: str, step: int) -> bool:
    """Whether a run of one recipe may be continued by another: the number of language steps may change while the
    rate has not begun to fall."""
    first_falling = (1 - new.language_decay) * min(old.language_steps, new.language_steps)
    if stage == "vision" or step <= first_falling:
        return replace(old, language_steps=new.language_steps) == new
    return old == new


class _Numbered(Dataset[Any]):
    """Batch number i of a maker; a worker makes whole batches."""

    def __init__(self, make_batch: Callable[[int, int], Any], size: int, numbers: Sequence[int]) -> None:
        self.make_batch, self.size, self.numbers = make_batch, size, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, i: int) -> Any:
        return self.make_batch(self.numbers[i], self.size)


def stream(make_batch: Callable[[int, int], Any], size: int, numbers: Sequence[int], workers: int) -> Iterator[Any]:
    """The batches `numbers` in order, made by worker processes."""
    data = _Numbered(make_batch, size, numbers)
    if not workers:
        return iter(DataLoader(data, batch_size=None))
    # A fork takes the model along, whose tower the worker runs.
    return iter(
        DataLoader(data, batch_size=None, num_workers=workers, prefetch_factor=4, multiprocessing_context="fork")
    )


class Trainer:
    """Model, optimisers, log and state of one run."""

    def __init__(
        self,
        run: Path,
        recipe: Recipe,
        *,
        device: torch.device,
        workers: int,
        minutes: float,
        compiled: bool = False,
        crew: Crew | None = None,
        start: Path | None = None,
    ) -> None:
        self.crew = crew or Crew()
        self.run, self.recipe, self.device, self.workers = run, recipe, device, workers
        self.tower_hidden, self.decoder_layer = tower_hidden, decoder_layer
        if compiled:  # once per layout
            torch._dynamo.config.recompile_limit = 64
            self.tower_hidden = torch.compile(tower_hidden, dynamic=False)
            self.decoder_layer = torch.compile(decoder_layer, dynamic=False)
        self.deadline = time.monotonic() + 60 * minutes
        run.mkdir(parents=True, exist_ok=True)
        folder = run if self.crew.leads else run / f"process{self.crew.rank}"  # each writes documents of its own
        folder.mkdir(exist_ok=True)
        tokenizer = (start or run) / "tokenizer.model"
        pieces = tokenizer.read_bytes() if tokenizer.exists() else make_tokenizer()
        self.model = build(SHAPES[recipe.size], folder, pieces, seed=recipe.seed).to(device)
        self.tokenizer = load_tokenizer(Checkpoint(folder))  # there are no weights yet to open
        on_cpu = build(SHAPES[recipe.size], folder, pieces)  # workers preprocess with it; its weights are not used
        together = recipe.language_batches
        self.maker = BatchMaker(
            on_cpu,
            self.tokenizer,
            first=recipe.language_first * together,
            early=recipe.language_early * together,
            together=together,
            grounded=recipe.language_grounded * together,
        )
        self.validation = BatchMaker(on_cpu, self.tokenizer, seeds=VALIDATION)
        self.stage, self.step = "vision", 0
        self.heads = Heads(self.model.config.vision.hidden_size, self.maker.tiles(0, 6)).to(device)
        if start and not (run / "state.pt").exists():
            self._begin_with(start)
        self.optimisers = self._optimisers()
        if (run / "state.pt").exists():
            self._load()

    # State

    def _optimisers(self) -> Optimisers:
        recipe = self.recipe
        tower = [(f"vision_tower.{n}", p) for n, p in self.model.vision_tower.named_parameters()]
        if self.stage == "vision":
            named = tower + [(f"heads.{n}", p) for n, p in self.heads.named_parameters()]
            rates = {"muon": recipe.vision_muon, "adam": recipe.vision_adam, "steps": recipe.vision_steps, "decay": 1.0}
            rates["weight_decay"] = 0.01
        else:
            for _, parameter in tower:
                parameter.requires_grad_(False)
            named = [(n, p) for n, p in self.model.named_parameters() if not n.startswith("vision_tower.")]
            rates = {"muon": recipe.language_muon, "adam": recipe.language_adam, "steps": recipe.language_steps}
            rates |= {"decay": recipe.language_decay, "weight_decay": recipe.language_weight_decay}
        return Optimisers(named, warmup=recipe.warmup, **rates)  # type: ignore[arg-type]

    def save(self) -> None:
        """Writes the state beside the old one and swaps them, so that a cut leaves one of the two whole."""
        state = {
            "recipe": asdict(self.recipe), "stage": self.stage, "step": self.step, "model": self.model.state_dict(),
            "heads": self.heads.state_dict(), "optimisers": self.optimisers.state(),
        }  # fmt: skip
        torch.save(state, self.run / "state.new")
        (self.run / "state.new").replace(self.run / "state.pt")

    def _begin_with(self, folder: Path) -> None:
        """The second stage, from an exported checkpoint; fresh optimisers."""
        model = load_model(Checkpoint.open(folder), dtype=torch.float32, device=self.device)
        assert isinstance(model, nn.Module)
        self.model.load_state_dict(model.state_dict())
        self.stage = "language"

    def _load(self) -> None:
        state = torch.load(self.run / "state.pt", map_location=self.device, weights_only=True)
        if not _goes_on(Recipe(**state["recipe"]), self.recipe, state["stage"], state["step"]):
            raise SystemExit(f"{self.run} was begun with another recipe: {state['recipe']}")
        self.stage, self.step = state["stage"], state["step"]
        self.model.load_state_dict(state["model"])
        self.heads.load_state_dict(state["heads"])
        self.optimisers = self._optimisers()
        self.optimisers.load(state["optimisers"])

    def log(self, **figures: Any) -> None:
        line = {"stage": self.stage, "step": self.step, **figures}
        with open(self.run / "log.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)

    def _standardise(self) -> None:
        """Fits the projector to the tower that it will be behind."""
        seen = [self.maker.dialogues(i, 16, layout=layout).pixels for i, (*layout, _) in enumerate(EARLY)]
        features = [self._features(pixels.to(self.device)).float().flatten(0, 2) for pixels in seen]
        standardise(self.model, torch.cat(features))

    # Loops

    def train(self) -> bool:
        """Runs until done (True) or out of time (False)."""
        recipe = self.recipe
        if self.stage == "vision":
            done = self._loop(recipe.vision_steps, 1, recipe.vision_batch, self.maker.tiles, self._vision_loss)
            if not done:
                return False
            self.stage, self.step = "language", 0
            self._standardise()
            self.optimisers = self._optimisers()
            if self.crew.leads:
                self.save()
        make_batch = self._looked_at if self.device.type == "cpu" else self.maker.dialogues
        return self._loop(
            recipe.language_steps, recipe.language_batches, recipe.language_batch, make_batch, self._language_loss
        )

    def _loop(
        self,
        steps: int,
        batches: int,
        size: int,
        make_batch: Callable[[int, int], Any],
        loss_of: Callable[[Any], tuple[Tensor, dict[str, float]]],
    ) -> bool:
        """`batches` of `size` samples are one step."""
        every, saved = max(1, steps // 100), time.monotonic()
        start, first = time.monotonic(), self.step
        own = self.crew.share(batches)
        numbers = [step * batches + i for step in range(self.step, steps) for i in own]
        source = stream(make_batch, size, numbers, self.workers)
        while self.step < steps:
            figures: dict[str, float] = defaultdict(float)
            for _ in own:
                loss, of_batch = loss_of(next(source))
                (loss / batches).backward()
                for name, value in {"loss": float(loss.detach()), **of_batch}.items():
                    figures[name] += value / len(own)
            stop = self.crew.sum_gradients(self.optimisers.parameters, stop=time.monotonic() > self.deadline)
            self.optimisers.step(self.step)
            self.step += 1
            last = self.step == steps or stop
            if self.stage == "language" and (self.step % max(1, steps // EVALUATIONS) == 0 or last):
                self._log_evaluations()
            if not self.crew.leads:
                if last:
                    return self.step == steps
                continue
            if self.step % every == 0 or last:
                rate = (self.step - first) * batches * size / (time.monotonic() - start)
                self.log(per_s=round(rate, 1), **{k: round(v, 4) for k, v in figures.items()})
            if last or time.monotonic() - saved > 120:
                self.save()
                saved = time.monotonic()
            if last:
                return self.step == steps
        return True

    def _vision_loss(self, tiles: Tiles) -> tuple[Tensor, dict[str, float]]:
        tiles = _moved(tiles, self.device)
        with torch.autocast(self.device.type, torch.bfloat16):
            hidden = self.tower_hidden(self.model, tiles.pixels)
        return self.heads(hidden.float(), tiles)

    @torch.no_grad()
    def _looked_at(self, number: int, size: int) -> Dialogues:
        """A batch whose pictures the tower has seen already: work that a process of its own can do on a CPU."""
        batch = self.maker.dialogues(number, size)
        return replace(batch, pixels=self._features(batch.pixels))

    @torch.no_grad()
    def _features(self, pixels: Tensor) -> Tensor:
        """(B, tiles, 3, TILE, TILE) -> (B, tiles, patches, D)."""
        with torch.autocast(self.device.type, torch.bfloat16):
            hidden = tower_hidden(self.model, pixels.flatten(0, 1))[:, 1:]
        return hidden.unflatten(0, pixels.shape[:2]).bfloat16()

    def _logits(self, batch: Dialogues) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (n, V) and targets (n,) of every row that has to say something, and the lack of grounding ()."""
        features = batch.pixels if batch.pixels.ndim == 4 else self._features(batch.pixels)
        layer = self.decoder_layer if torch.is_grad_enabled() else decoder_layer  # evaluation has too many shapes
        targets = batch.targets[:, -batch.rows.text.shape[1] :]
        with torch.autocast(self.device.type, torch.bfloat16):
            visual = embed_visual(self.model, features.float(), batch.token_map, batch.sources)
            rows, lacking = decode(self.model, visual, batch.rows, layer, batch.shown)
            return self.model.decoder.logits(rows[targets != IGNORED]), targets[targets != IGNORED], lacking

    def _language_loss(self, batch: Dialogues) -> tuple[Tensor, dict[str, float]]:
        batch = _moved(batch, self.device)
        logits, targets, lacking = self._logits(batch)
        weights = batch.weights[batch.targets != IGNORED]
        accuracy = float((logits.argmax(-1) == targets).float().mean())
        loss = (F.cross_entropy(logits, targets, reduction="none") * weights).sum() / weights.sum()
        figures = {"token_accuracy": accuracy}
        if batch.shown is not None:
            figures["grounding"] = float(lacking.detach())
        return loss + self.recipe.language_grounding * lacking, figures

    def _log_evaluations(self) -> None:
        """One line each; with two processes, each makes one of them."""
        for i in self.crew.share(2):
            self.log(**{("exact", "wrong_picture")[i]: self.evaluate(wrong=i == 1)})

    @torch.no_grad()
    def evaluate(self, *, wrong: bool = False) -> dict[str, float]:
        """Exact match of whole answers per question type, on held-out seeds, every answer's tokens being given.

        `wrong` shows each sample its neighbour's picture: what is left then was guessed.
        """
        right: dict[str, int] = defaultdict(int)
        asked: dict[str, int] = defaultdict(int)
        for number, (kind, options, _) in enumerate(LATE):
            batch = self.validation.dialogues(number, EVALUATION_SIZE, layout=(kind, options))
            batch = _moved(batch, self.device)
            if wrong:
                batch = replace(batch, pixels=batch.pixels.roll(1, dims=0))
            logits, targets, _ = self._logits(batch)
            good = logits.argmax(-1) == targets
            samples, columns = torch.nonzero(batch.targets != IGNORED, as_tuple=True)
            turns = batch.turns[samples, columns]
            for i, types in enumerate(batch.types):
                for turn, name in enumerate(types):
                    rows = good[(samples == i) & (turns == turn)]
                    key = f"{kind}_{name}"
                    asked[key] += 1
                    right[key] += bool(rows.all())
        result = {name: round(right[name] / count, 3) for name, count in sorted(asked.items())}
        return {"all": round(sum(right.values()) / sum(asked.values()), 4), **result}


def _moved(batch: Any, device: torch.device) -> Any:
    """A batch's tensors on another device; frozen dataclasses and dicts of tensors are rebuilt."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {key: _moved(value, device) for key, value in batch.items()}
    if hasattr(batch, "__dataclass_fields__"):
        return type(batch)(**{name: _moved(getattr(batch, name), device) for name in batch.__dataclass_fields__})
    return batch


def make_tokenizer(per_kind: int = 400) -> bytes:
    """Pieces learnt from dialogues of the world, every word of its vocabulary among them."""
    lines = [" ".join(world_vocabulary())] * 20
    for kind in KINDS:
        for seed in TRAIN[:per_kind]:
            sample = make(kind, seed)
            lines += [f"USER: {qa.question} ASSISTANT: {qa.answer}" for qa in (*sample.dialogue, *sample.alone)]
    return train_tokenizer(lines, NUM_PIECES)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo model from scratch.")
    parser.add_argument("--run", type=Path, required=True, help="folder of the run: state, log, documents")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop cleanly after this time")
    parser.add_argument("--processes", type=int, default=1, help="that train together, up to one per batch of a step")
    parser.add_argument("--workers", type=int, default=1, help="processes that draw, for each of these")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument(
        "--compile",
        action="store_true",
        help="fuse with torch.compile: 1.5 to 1.7 times as fast on a CPU, needs a C++ compiler",
    )
    parser.add_argument("--start", type=Path, help="checkpoint to go on from with the second stage, in a new run")
    parser.add_argument("--export", type=Path, help="folder that gets the checkpoint when the training is done")
    for name, value in asdict(Recipe()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    args = parser.parse_args()
    if args.workers < 1 and args.processes > 1:
        parser.error("--processes: expected at least one worker each")
    run_crew(args.processes, MAX_PARAMETERS, partial(_train, args))


def _train(args: argparse.Namespace, crew: Crew) -> None:
    """What one process of the crew does."""
    if args.threads:
        torch.set_num_threads(args.threads)
    recipe = Recipe(**{name: getattr(args, name) for name in asdict(Recipe())})
    trainer = Trainer(
        args.run, recipe, device=torch.device(args.device), workers=args.workers, minutes=args.minutes,
        compiled=args.compile, crew=crew, start=args.start,
    )  # fmt: skip
    if not crew.leads:
        trainer.train()
        return
    trainer.log(environment=describe(), recipe=asdict(recipe))
    done = trainer.train()
    files = export(trainer.model, args.run)
    if done and args.export:
        args.export.mkdir(parents=True, exist_ok=True)
        for file in files:
            shutil.copy(file, args.export)
    print("done" if done else "out of time: the same command goes on")


if __name__ == "__main__":
    main()
