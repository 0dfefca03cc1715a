"""Three conversations with a model, one per kind, as Markdown with the pictures beside it.

    python benchmarks/world/transcripts.py --model FOLDER --out docs/demo-model/transcripts.md

The samples are the first of the test split, the questions the first three of their dialogues, and every answer stands
as the engine gave it, right or wrong. A clip goes through a real H.264 file. Each conversation is one session.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from environment import describe
from world.sample import QA, Sample
from world.splits import TEST, make
from world.video import write_h264

from sparsevila import Engine, Image, SamplingParams, Sparsity, Video
from sparsevila.engine.config import Result

SEEDS = {"scene": TEST[0], "page": TEST[0], "clip": TEST[0]}
TURNS = 3
SPARSITY = Sparsity(prefill=0.60, decode=0.75)
PARAMS = SamplingParams(max_new_tokens=96)
ZOOM = 3  # of the pictures shown
CLIP_SCALE = 2  # of the video file: so that a pixel's colour survives 4:2:0
FRAMES_PER_ROW = 8
MARKUP = "\\`*_[]<>#|~&$"


@dataclass(frozen=True)
class Turn:
    """A question of the world and what the engine said."""

    asked: QA
    result: Result

    @property
    def is_right(self) -> bool:
        return self.result.text.strip() == self.asked.answer


def converse(engine: Engine, sample: Sample, turns: int = TURNS) -> list[Turn]:
    """The first questions of the sample's dialogue, in one session."""
    engine.forget_features()
    with tempfile.TemporaryDirectory() as folder:
        item: Image | Video = Image(sample.rgb[0])
        if sample.kind == "clip":
            path = Path(folder) / "clip.mp4"
            write_h264(sample.rgb, path, scale=CLIP_SCALE)
            item = Video(path, frames=len(sample.rgb))
        session = engine.session(media=[item], sparsity=SPARSITY)
        try:
            return [Turn(asked, session.ask(asked.question, params=PARAMS)) for asked in sample.dialogue[:turns]]
        finally:
            session.close()


def strip(sample: Sample) -> np.ndarray:
    """The sample enlarged, (height, width, 3) uint8; a clip's frames in rows, with white between them."""
    frames = sample.rgb.repeat(ZOOM, axis=1).repeat(ZOOM, axis=2)
    if len(frames) == 1:
        return frames[0]
    frames = np.pad(frames, ((0, -len(frames) % FRAMES_PER_ROW), (2, 2), (2, 2), (0, 0)), constant_values=255)
    rows = frames.reshape(-1, FRAMES_PER_ROW, *frames.shape[1:])  # (rows, frames, height, width, 3)
    return rows.swapaxes(1, 2).reshape(-1, FRAMES_PER_ROW * frames.shape[2], 3)


def write_picture(sample: Sample, path: Path) -> None:
    from PIL import Image as Picture

    Picture.fromarray(strip(sample)).save(path)


def markdown(sample: Sample, turns: Sequence[Turn], picture: str) -> str:
    """One conversation: the picture, the turns, what each of them cost."""
    lines = [
        f"## A {sample.kind}",
        "",
        f"![{sample.kind} {sample.seed}]({picture})",
        "",
        "| question | answer | truth | visual tokens: encoder > kept > active | encode | prefill | decode |",
        "|---|---|---|---|---|---|---|",
    ]
    for turn in turns:
        stats = turn.result.stats
        truth = "same" if turn.is_right else f"**wrong:** {turn.asked.answer}"
        tokens = f"{stats.visual_tokens_total} > {stats.visual_tokens_kept} > {stats.visual_tokens_active:.0f}"
        times = " | ".join(f"{1e3 * time:.1f} ms" for time in (stats.encode_s, stats.prefill_s, stats.decode_s))
        lines.append(f"| {turn.asked.question} | {shown(turn.result.text)} | {truth} | {tokens} | {times} |")
    return "\n".join(lines)


def shown(text: str) -> str:
    """What a model said, as a table can hold it: nothing in it is markup, and nothing of it is lost."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text.strip())
    return text.translate({ord(c): f"&#{ord(c)};" for c in MARKUP}) or "(nothing)"


def document(engine: Engine, checksum: str, out: Path) -> str:
    """All conversations; writes their pictures beside `out`."""
    engine.warmup()  # first-use costs belong to no turn
    parts, right, asked = [], 0, 0
    for kind, seed in SEEDS.items():
        sample = make(kind, seed)
        turns = converse(engine, sample)
        picture = f"transcript-{kind}.png"
        write_picture(sample, out.with_name(picture))
        parts.append(markdown(sample, turns, picture))
        right, asked = right + sum(turn.is_right for turn in turns), asked + len(turns)
    environment = describe()
    opening = (
        f"# Transcripts\n\n`{environment['command']}`, model {checksum[:12]}, {engine.info.scheme}, "
        f"{environment['cpu']}, {environment['threads']} thread(s).\n\n"
        f"Three sessions of the engine at sparsities {SPARSITY.prefill:.0%} and {SPARSITY.decode:.0%}: the first test "
        f"sample of each kind and the first {TURNS} questions of its dialogue. {right} of {asked} answers are right. "
        "Times are those of the turn; media are encoded in the first turn and stay in the cache."
    )
    return "\n\n".join([opening, *parts]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Write three conversations with a model.")
    parser.add_argument("--model", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--out", type=Path, required=True, metavar="OUT.md")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    checksum = hashlib.sha256((args.model / "model.safetensors").read_bytes()).hexdigest()
    with Engine.load(args.model) as engine:
        args.out.write_text(document(engine, checksum, args.out), encoding="utf-8")
    print(args.out)


if __name__ == "__main__":
    main()
