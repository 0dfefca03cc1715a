"""How well each attention head of a model finds what it reads in a picture: the scores that `sparsemm` needs.

    python benchmarks/head_scores.py --model FOLDER [--samples 150] [--out FOLDER/head_scores.json]

Shows held-out validation samples of the drawn world and asks for the texts in them, the true answer given token by
token. For every token that the model would have said itself, a head scores where what it looks at most, text included,
is a visual token that touches the region that the answer needs: one over the number of tokens that do. A score is the
mean over those tokens.
Source: arXiv 2506.05344, section 3, and the authors' code; they have the model read synthetic documents with boxes, and
count the tokens of its transcript that occur in one box alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))
from environment import describe
from world.sample import QA, Sample
from world.splits import KINDS, VALIDATION, make

from sparsevila.engine.engine import Engine
from sparsevila.engine.head_scores import HEAD_SCORES
from sparsevila.engine.prompt import encode_pieces
from sparsevila.engine.sparsity.oracle import Region, touched
from sparsevila.kernels.attention import attention
from sparsevila.models.interface import Frames, MediaKind, VisualTokens

# Questions whose answer is text that stands in the picture.
READING = frozenset(
    {"read_number", "read_code", "read_tag", "read_label", "read_row", "title", "reference", "needle_number",
     "needle_code", "shown_with"}
)  # fmt: skip


@dataclass
class Tally:
    """Over all tokens that were read."""

    hits: Tensor  # (layers, query heads) float64, each hit by its weight
    tokens: int = 0  # that the model would have said itself
    asked: int = 0  # of all answers

    def add(self, hits: Tensor, right: Tensor, size: int) -> None:
        """hits (layers, heads, tokens) bool, right (tokens,) bool; size: visual tokens that the region touches."""
        self.hits += hits[..., right].sum(dim=-1).double() / max(1, size)
        self.tokens += int(right.sum())
        self.asked += len(right)


def readings(sample: Sample) -> Iterator[QA]:
    """Every question about a text in the picture, once."""
    talks = (*sample.dialogue, *sample.alone, *(qa for talk in sample.further for qa in talk))
    yield from {qa.question: qa for qa in talks if qa.type in READING and qa.regions}.values()


def regions_of(sample: Sample, qa: QA) -> list[Region]:
    _, height, width, _ = sample.rgb.shape
    return [Region(r.start, r.stop, (r.y0 / height, r.x0 / width, r.y1 / height, r.x1 / width)) for r in qa.regions]


def frames_of(sample: Sample) -> Frames:
    kind: MediaKind = "video" if sample.kind == "clip" else "image"
    return Frames(kind, sample.rgb, np.arange(len(sample.rgb), dtype=float), "<world>", 0.0, f"{kind} {sample.seed}")


@torch.inference_mode()
def watch(engine: Engine, tokens: VisualTokens, sample: Sample, qa: QA) -> tuple[Tensor, Tensor, int]:
    """hits (layers, heads, tokens of the answer) bool; which of the tokens the model would have said, (tokens,) bool;
    how many visual tokens the region touches."""
    model, tokenizer = engine.model, engine.tokenizer
    decoder, device = model.decoder, engine.runner.device
    before = encode_pieces(tokenizer, model.prompt.opening(first=True, system=None), start=True)
    question = encode_pieces(tokenizer, model.prompt.question(qa.question, after_media=True), start=False)
    answer = tokenizer.encode(f" {qa.answer}", first=False)
    text = [*question, *answer[:-1]]
    hidden = torch.cat(
        [
            decoder.embed(torch.tensor(before, dtype=torch.long, device=device)),
            model.embed_visual(tokens),
            decoder.embed(torch.tensor(text, device=device)),
        ]
    )
    first, start = model.text_positions(len(before), 0)
    inside, start = model.visual_positions(tokens.token_map, start)
    last, _ = model.text_positions(len(text), start)
    cos, sin = decoder.angles(torch.cat([first, inside, last], dim=-1).to(device))
    shown = touched(tokens.token_map, regions_of(sample, qa)) & ~tokens.token_map.structural
    wanted = torch.zeros(len(hidden), dtype=torch.bool)
    wanted[len(before) : len(before) + len(tokens)] = shown
    wanted = wanted.to(device)
    later = torch.ones(len(answer), len(hidden), dtype=torch.bool, device=device).triu(len(hidden) - len(answer) + 1)
    hits = []
    for index in range(len(decoder.layers)):
        layer = decoder.layer(index)
        q, k, v = layer.project(hidden, cos, sin)
        keys = k.repeat_interleave(len(q) // len(k), 0)
        dots = (q[:, -len(answer) :] @ keys.transpose(1, 2)).masked_fill(later, -torch.inf)
        hits.append(wanted[dots.argmax(dim=-1)])  # (heads, tokens): a softmax keeps the order
        hidden = layer.finish(hidden, attention(q, k, v, causal=True)[0])
    said = decoder.logits(hidden[-len(answer) :]).argmax(dim=-1)
    return torch.stack(hits).cpu(), (said == torch.tensor(answer, device=device)).cpu(), int(shown.sum())


def measure(engine: Engine, samples: int) -> Tally:
    """Over the first `samples` validation samples of each kind."""
    config = engine.model.decoder.config
    tally = Tally(torch.zeros(config.num_layers, config.num_heads, dtype=torch.float64))
    for kind in KINDS:
        for seed in VALIDATION[:samples]:
            sample = make(kind, seed)
            asked = list(readings(sample))
            if not asked:
                continue
            with torch.inference_mode():
                tokens = engine.model.encode(engine.model.preprocess(frames_of(sample)))
            for qa in asked:
                tally.add(*watch(engine, tokens, sample, qa))
    return tally


def checksum(folder: Path) -> str:
    """SHA-256 of the weights, file after file by name."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.safetensors")):
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def record(tally: Tally, *, model_sha256: str, samples: int) -> dict[str, Any]:
    """What `head_scores.json` holds. Raises SystemExit where nothing was read."""
    if not tally.tokens:
        raise SystemExit(f"expected a model that reads some of these texts, got 0 of {tally.asked} tokens right")
    environment = describe()
    return {
        "scores": [[round(float(hits) / tally.tokens, 6) for hits in row] for row in tally.hits],
        "tokens": tally.tokens,
        "tokens_asked": tally.asked,
        "data": "benchmarks/world",
        "split": "validation",
        "samples_of_each_kind": samples,
        "questions": sorted(READING),
        "model_sha256": model_sha256,
        **{name: environment[name] for name in ("command", "torch")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Find how well each attention head sees, for the method sparsemm.")
    parser.add_argument("--model", required=True, metavar="FOLDER")
    parser.add_argument("--out", type=Path, metavar="JSON", help=f"default: {HEAD_SCORES} beside the checkpoint")
    parser.add_argument("--samples", type=int, default=150, help="of each kind of picture")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    if args.samples < 1:
        parser.error(f"--samples: expected at least 1, got {args.samples}")
    if args.threads:
        torch.set_num_threads(args.threads)
    with Engine.load(args.model, device=args.device, dtype=args.dtype) as engine:
        folder = Path(engine.info.folder)
        found = record(measure(engine, args.samples), model_sha256=checksum(folder), samples=args.samples)
    out = args.out or folder / HEAD_SCORES
    rows = ",\n  ".join(json.dumps(row) for row in found.pop("scores"))
    rest = "".join(f',\n "{name}": {json.dumps(value)}' for name, value in found.items())
    out.write_text(f'{{\n "scores": [\n  {rows}\n ]{rest}\n}}\n')
    print(f"{out}: {found['tokens']} of {found['tokens_asked']} tokens were read")


if __name__ == "__main__":
    main()
