"""Writes samples of the world's training split as files to calibrate the demo model's quantisation on.

    python benchmarks/world/calibration.py FOLDER [--samples 48]
    python -m sparsevila.quant demo --out OUT --group 64 --calib FOLDER/samples.jsonl

Scenes and pages become PNGs, clips H.264 files; each has one question with its answer, long ones where there are any.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from world.splits import TRAIN, make
from world.video import write_h264

FIRST = 2**30  # of the training seeds; far from where a training run begins
SCALE, CRF, FPS = 1, 0, 4  # of clips, as in the accuracy harness
LAYOUTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("scene", {"width": 128, "height": 128}),
    ("page", {"width": 128, "height": 128}),
    ("clip", {"frames": 8}),
    ("scene", {"width": 192, "height": 128}),
    ("page", {"width": 128, "height": 192}),
)


def write_samples(folder: Path, num_samples: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(num_samples):
        kind, options = LAYOUTS[i % len(LAYOUTS)]
        sample = make(kind, TRAIN[FIRST + i], **options)
        asked = (sample.alone or sample.dialogue)[0]
        line = {"question": asked.question, "answer": asked.answer}
        if kind == "clip":
            write_h264(sample.rgb, folder / f"{i:03d}.mp4", fps=FPS, scale=SCALE, crf=CRF)
            line["video"] = f"{i:03d}.mp4"
        else:
            Image.fromarray(sample.rgb[0]).save(folder / f"{i:03d}.png")
            line["image"] = f"{i:03d}.png"
        lines.append(json.dumps(line))
    (folder / "samples.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write calibration samples of the demo model's world.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--samples", type=int, default=48)
    args = parser.parse_args()
    write_samples(args.folder, args.samples)
    print(f"{args.samples} samples in {args.folder / 'samples.jsonl'}")


if __name__ == "__main__":
    main()
