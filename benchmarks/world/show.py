"""Looks at the world: a contact sheet, one clip as a video, the speed, the words, the types of questions.

python benchmarks/world/show.py --sheet OUT.png [--seed N] [--split test] [--columns 4]
python benchmarks/world/show.py --video OUT.mp4 --seed N [--frames 16] [--scale 4]
python benchmarks/world/show.py --speed
python benchmarks/world/show.py --words
python benchmarks/world/show.py --types > TYPES.md
"""

from __future__ import annotations

import argparse
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from world.sample import QA, Sample
from world.splits import PHRASES, SPLITS, TEST, make, make_plan, world_vocabulary
from world.video import psnr, read_frames, write_h264

SHEET: tuple[tuple[str, dict[str, Any]], ...] = (
    ("scene", {}),
    ("scene", {}),
    ("scene", {"width": 192, "height": 64}),
    ("scene", {"dense": True}),
    ("page", {}),
    ("page", {"width": 64, "height": 64}),
    ("page", {"width": 192, "height": 192}),
    ("page", {"dense": True}),
    ("clip", {}),
    ("clip", {}),
    ("clip", {"frames": 8}),
    ("clip", {"frames": 32}),
)
SPEEDS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("scene", {}),
    ("scene", {"width": 64, "height": 64}),
    ("scene", {"dense": True}),
    ("page", {}),
    ("page", {"width": 128, "height": 192}),
    ("clip", {}),
    ("clip", {"frames": 64}),
)
ZOOM, PANEL_WIDTH, GAP, LINE_HEIGHT = 3, 580, 14, 15  # pixels of the sheet
TEXT_COLUMNS = 92  # characters
FRAMES_PER_ROW = 8


def picture(sample: Sample) -> np.ndarray:
    """The sample enlarged, (height, width, 3); a clip's frames side by side, eight to a row, with white lines."""
    if len(sample.rgb) == 1:
        zoom = min(ZOOM, PANEL_WIDTH // sample.rgb.shape[2])
        return sample.rgb[0].repeat(zoom, axis=0).repeat(zoom, axis=1)
    padded = np.pad(sample.rgb, ((0, 0), (2, 2), (2, 2), (0, 0)), constant_values=255)
    rows = [np.concatenate(padded[i : i + FRAMES_PER_ROW], axis=1) for i in range(0, len(padded), FRAMES_PER_ROW)]
    return np.concatenate(rows, axis=0)


def told(turn: QA) -> list[str]:
    return textwrap.wrap(f"{turn.type}: {turn.question} -> {turn.answer}", TEXT_COLUMNS, subsequent_indent="      ")


def panel(sample: Sample, title: str) -> Any:
    """A sample over its questions and answers, as a Pillow image."""
    from PIL import Image, ImageDraw, ImageFont

    pixels = picture(sample)
    lines = [title, *(line for turn in (*sample.dialogue, *sample.alone) for line in told(turn))]
    sheet = Image.new("RGB", (PANEL_WIDTH, len(pixels) + LINE_HEIGHT * len(lines) + 2 * GAP), "white")
    sheet.paste(Image.fromarray(pixels), (0, 0))
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for i, line in enumerate(lines):
        pen.text((0, len(pixels) + GAP // 2 + i * LINE_HEIGHT), line, "black" if i else "blue", font)
    return sheet


def write_sheet(path: Path, split: str, seed: int, columns: int = 4) -> None:
    """All kinds, `columns` panels to a row."""
    from PIL import Image

    panels = []
    for i, (kind, options) in enumerate(SHEET):
        number = SPLITS[split][seed + i]
        described = " ".join(f"{name}={value}" for name, value in options.items())
        panels.append(panel(make(kind, number, **options), f"{kind} {split}[{seed + i}] {described}"))
    rows = [panels[i : i + columns] for i in range(0, len(panels), columns)]
    heights = [max(one.height for one in row) + GAP for row in rows]
    sheet = Image.new("RGB", (columns * (PANEL_WIDTH + GAP) + GAP, sum(heights) + GAP), "white")
    y = GAP
    for row, height in zip(rows, heights, strict=True):
        for i, one in enumerate(row):
            sheet.paste(one, (GAP + i * (PANEL_WIDTH + GAP), y))
        y += height
    sheet.save(path)


def write_clip(path: Path, seed: int, frames: int, scale: int) -> None:
    """A clip as H.264, with what was lost on the way and the questions that can be asked."""
    sample = make("clip", seed, frames=frames)
    write_h264(sample.rgb, path, scale=scale)
    enlarged = sample.rgb.repeat(scale, axis=1).repeat(scale, axis=2)
    print(f"{path}: {frames} frames, {path.stat().st_size:,} bytes, PSNR {psnr(read_frames(path), enlarged):.1f} dB")
    for turn in (*sample.dialogue, *sample.alone):
        print("\n".join(told(turn)))


def print_speed(seconds: float = 2.0) -> None:
    """Samples per second of this process, dialogues included."""
    for kind, options in SPEEDS:
        count, begun = 0, time.perf_counter()
        while time.perf_counter() - begun < seconds:
            make(kind, count, **options)
            count += 1
        described = " ".join(f"{name}={value}" for name, value in options.items())
        print(f"{kind:6} {described:24} {count / (time.perf_counter() - begun):7.0f} samples/s")


def types_table(samples: int = 500) -> str:
    """Markdown: every type of question, one way to ask it, an answer, and the chance of the best guess without the
    picture, mean over the questions about `samples` test samples of each kind. Nothing is drawn for it."""
    lines = ["| kind | type | for example | answer | best guess |", "|---|---|---|---|---|"]
    for kind, phrases in PHRASES.items():
        plans = [make_plan(kind, seed)[0] for seed in TEST[:samples]]
        turns = [turn for plan in plans for turn in (*plan.dialogue, *plan.alone)]
        for name in phrases:
            asked = [turn for turn in turns if turn.type == name]
            if not asked:
                raise ValueError(f"{kind} {name}: expected it about one of {samples} samples; take more")
            chance = np.mean([turn.chance for turn in asked])
            lines.append(f"| {kind} | {name} | {asked[0].question} | {asked[0].answer} | {percent(float(chance))} |")
    return "\n".join(lines)


def percent(share: float) -> str:
    """Whole per cents, but what is rare is not made to look impossible."""
    return "< 1 %" if 0 < share < 0.01 else f"{share:.0%}".replace("%", " %")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sheet", type=Path, metavar="OUT.png")
    parser.add_argument("--video", type=Path, metavar="OUT.mp4")
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--words", action="store_true")
    parser.add_argument("--types", action="store_true", help="as a Markdown table")
    parser.add_argument("--columns", type=int, default=4, help="of the sheet")
    parser.add_argument("--seed", type=int, default=0, help="of the clip; within the split for the sheet")
    parser.add_argument("--split", choices=SPLITS, default="train", help="of the sheet")
    parser.add_argument("--frames", type=int, default=16, help="of the clip")
    parser.add_argument("--scale", type=int, default=1, help="how many times larger the clip is written")
    args = parser.parse_args()
    if not (args.sheet or args.video or args.speed or args.words or args.types):
        parser.error("expected --sheet, --video, --speed, --words or --types")
    if args.columns < 1:
        parser.error(f"--columns: expected at least 1, got {args.columns}")
    if args.sheet:
        write_sheet(args.sheet, args.split, args.seed, args.columns)
    if args.video:
        write_clip(args.video, args.seed, args.frames, args.scale)
    if args.speed:
        print_speed()
    if args.words:
        print(" ".join(world_vocabulary()))
    if args.types:
        print(types_table())


if __name__ == "__main__":
    main()
