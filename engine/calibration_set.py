"""What a quantised model is calibrated on: drawn pictures, short dialogues, or a user's own files.

The built-in set needs no download: pictures are drawn from a seed (flat shapes, charts, printed pages, landscapes,
noise like that of photographs), dialogues lie in `assets/calibration`. It covers the ranges of activations; it is no
picture of the world. Somebody with data of their own use should calibrate on that: `read_samples`.
"""

from __future__ import annotations

import colorsys
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as Pillow
from PIL import ImageDraw, ImageFont

from ..errors import InvalidRequest
from ..models.interface import Frames
from .config import Image, Video
from .media import load_media

DIALOGUES = Path(__file__).resolve().parent.parent / "assets" / "calibration" / "dialogues.txt"
MAX_FILE_BYTES = 16 << 20  # of a text or JSON lines file
MAX_SAMPLES = 4096
PASSAGE_CHARS = 2000  # of a text file that makes one sample
VIDEO_FRAMES = 8
DESCRIBE = "Describe the picture in detail."
DESCRIBE_CLIP = "Describe what happens in the clip."

_VIDEO_SUFFIXES = frozenset({".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v"})
_TEXT_SUFFIXES = frozenset({".txt", ".md"})


@dataclass(frozen=True)
class CalibrationSample:
    """One exchange that the model is run on."""

    question: str  # of the user; for a sample of text alone the text itself
    answer: str = ""
    frames: Frames | None = None  # a picture or a clip

    def __post_init__(self) -> None:
        if not self.question.strip():
            raise InvalidRequest("calibration: expected a question, got an empty text")


def fingerprint(samples: Sequence[CalibrationSample]) -> str:
    """sha256 hex of texts and pixels, in order."""
    digest = hashlib.sha256()
    for sample in samples:
        key = "" if sample.frames is None else sample.frames.key
        digest.update(json.dumps([sample.question, sample.answer, key]).encode())
    return digest.hexdigest()


# The built-in set ---------------------------------------------------------------------------------------------------


def builtin_samples(num_pictures: int = 40, *, seed: int = 0) -> list[CalibrationSample]:
    """`num_pictures` drawn pictures with a question each, and the dialogues, mixed. The same for the same seed.

    Printed letters come from Pillow's built-in font, so their pixels may differ between versions of Pillow.
    """
    pictures = [_drawn(np.random.default_rng([seed, i]), i) for i in range(num_pictures)]
    dialogues = list(_dialogues(DIALOGUES.read_text(encoding="utf-8")))
    order = np.random.default_rng(seed).permutation(len(pictures) + len(dialogues))
    return [(pictures + dialogues)[i] for i in order]


def _dialogues(text: str) -> Iterator[CalibrationSample]:
    for block in text.strip().split("\n\nQ: "):
        question, _, answer = block.removeprefix("Q: ").partition("\nA: ")
        yield CalibrationSample(question.strip(), answer.strip())


@dataclass(frozen=True)
class _Canvas:
    """A picture being drawn and the dice that decide about it."""

    rng: np.random.Generator
    picture: Pillow.Image
    draw: ImageDraw.ImageDraw

    @staticmethod
    def of(rng: np.random.Generator, background: np.ndarray) -> _Canvas:
        picture = Pillow.fromarray(background)
        return _Canvas(rng, picture, ImageDraw.Draw(picture))

    def colour(self) -> tuple[int, int, int]:
        hue, lightness, saturation = self.rng.random(3)
        red, green, blue = colorsys.hls_to_rgb(hue, 0.15 + 0.7 * lightness, saturation)
        return int(red * 255), int(green * 255), int(blue * 255)

    def text(self, xy: tuple[float, float], words: str, size: int, fill: tuple[int, int, int]) -> None:
        self.draw.text(xy, words, fill=fill, font=ImageFont.load_default(size))


def _drawn(rng: np.random.Generator, index: int) -> CalibrationSample:
    height, width = (int(n) for n in rng.integers(320, 720, 2))
    painter = _PAINTERS[index % len(_PAINTERS)]
    picture, question, answer = painter(rng, height, width)
    return CalibrationSample(question, answer, load_media(Image(picture), default_frames=1))


def _clouds(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Smooth noise over all scales with edges and grain, (H, W, 3) uint8: statistics like a photograph's."""
    total = np.zeros((height, width, 3))
    size = 2
    while size < max(height, width):
        coarse = rng.normal(size=(size, size, 3)) + 0.7 * rng.normal(size=(size, size, 1))
        layers = [Pillow.fromarray(coarse[..., c].astype(np.float32)).resize((width, height)) for c in range(3)]
        total += np.stack([np.asarray(layer) for layer in layers], axis=2) / size**0.8
        size *= 2
    total += 0.02 * rng.normal(size=total.shape)
    low, high = total.min(), total.max()
    return ((total - low) / (high - low) * 255).astype(np.uint8)


def _flat(colour: tuple[int, int, int], height: int, width: int) -> np.ndarray:
    return np.broadcast_to(np.array(colour, dtype=np.uint8), (height, width, 3)).copy()


def _shapes(rng: np.random.Generator, height: int, width: int) -> tuple[np.ndarray, str, str]:
    canvas = _Canvas.of(rng, _flat((235, 235, 228), height, width))
    names = []
    for _ in range(int(rng.integers(2, 8))):
        x, y, size = rng.integers(0, width - 60), rng.integers(0, height - 60), rng.integers(24, 140)
        box = (int(x), int(y), int(x + size), int(y + size * rng.uniform(0.5, 1.2)))
        kind = ("rectangle", "ellipse", "triangle")[int(rng.integers(3))]
        if kind == "triangle":
            canvas.draw.polygon([(box[0], box[3]), (box[2], box[3]), ((box[0] + box[2]) // 2, box[1])], canvas.colour())
        else:
            getattr(canvas.draw, kind)(box, fill=canvas.colour(), outline=canvas.colour(), width=2)
        names.append(kind)
    answer = f"The picture shows {len(names)} shapes on a light background: " + ", ".join(names) + "."
    return np.asarray(canvas.picture), "How many shapes are there, and which?", answer


def _page(rng: np.random.Generator, height: int, width: int) -> tuple[np.ndarray, str, str]:
    canvas = _Canvas.of(rng, _flat((252, 251, 247), height, width))
    words = DIALOGUES.read_text(encoding="utf-8").encode("ascii", "ignore").decode().split()
    size = int(rng.integers(12, 26))
    lines = []
    for y in range(20, height - size, int(size * 1.5)):
        start = int(rng.integers(0, len(words) - 40))
        lines.append(" ".join(words[start : start + max(2, width // (size * 4))]))
        canvas.text((18, y), lines[-1], size, (20, 20, 30))
    return np.asarray(canvas.picture), "Read the first lines of the page.", "\n".join(lines[:4])


def _chart(rng: np.random.Generator, height: int, width: int) -> tuple[np.ndarray, str, str]:
    canvas = _Canvas.of(rng, _flat((255, 255, 255), height, width))
    values = [int(v) for v in rng.integers(5, 100, int(rng.integers(3, 9)))]
    step = (width - 60) // len(values)
    for i, value in enumerate(values):
        top = height - 40 - value * (height - 90) // 100
        canvas.draw.rectangle((40 + i * step, top, 40 + i * step + step * 2 // 3, height - 40), fill=canvas.colour())
        canvas.text((40 + i * step, top - 18), str(value), 14, (0, 0, 0))
        canvas.text((40 + i * step, height - 34), "ABCDEFGH"[i], 16, (0, 0, 0))
    canvas.draw.line((36, 20, 36, height - 40, width - 10, height - 40), fill=(0, 0, 0), width=2)
    listed = ", ".join(f"{'ABCDEFGH'[i]} {value}" for i, value in enumerate(values))
    answer = f"The bars are {listed}. The tallest is {'ABCDEFGH'[values.index(max(values))]}."
    return np.asarray(canvas.picture), "What values does the bar chart show?", answer


def _landscape(rng: np.random.Generator, height: int, width: int) -> tuple[np.ndarray, str, str]:
    sky, horizon = _clouds(rng, height, width), int(height * rng.uniform(0.4, 0.7))
    sky[..., 2] = 255 - sky[..., 2] // 4
    canvas = _Canvas.of(rng, sky)
    canvas.draw.rectangle((0, horizon, width, height), fill=(60, int(rng.integers(90, 160)), 50))
    x = int(rng.integers(30, width - 90))
    canvas.draw.ellipse((x, 25, x + 60, 85), fill=(250, 220, 90))
    for _ in range(int(rng.integers(1, 5))):
        left, tall = int(rng.integers(0, width - 40)), int(rng.integers(40, 140))
        canvas.draw.rectangle((left + 14, horizon - 10, left + 24, horizon + tall // 2), fill=(90, 60, 30))
        canvas.draw.ellipse((left, horizon - tall, left + 40, horizon), fill=(30, int(rng.integers(80, 140)), 40))
    answer = "It is a drawn landscape with a yellow sun in a cloudy blue sky, trees, and a green field below."
    return np.asarray(canvas.picture), DESCRIBE, answer


def _noise(rng: np.random.Generator, height: int, width: int) -> tuple[np.ndarray, str, str]:
    answer = "The picture is abstract: soft patches of colour that run into each other, without any object."
    return _clouds(rng, height, width), DESCRIBE, answer


_Painter = Callable[[np.random.Generator, int, int], tuple[np.ndarray, str, str]]
_PAINTERS: tuple[_Painter, ...] = (_shapes, _page, _landscape, _chart, _noise)


# A user's own files -------------------------------------------------------------------------------------------------


def read_samples(paths: Sequence[Path]) -> list[CalibrationSample]:
    """Samples of files and folders: pictures, clips, texts (.txt, .md), and JSON lines.

    A line of a .jsonl file is an object with `question`, and optionally `answer` and `image` or `video` (a path beside
    the file). Folders are read one level deep, in the order of names. Raises InvalidRequest or MediaError that names
    the file.
    """
    samples: list[CalibrationSample] = []
    for path in paths:
        if not path.exists():
            raise InvalidRequest(f"calibration: {path} does not exist")
        files = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]
        for file in files:
            samples += _read_file(file)
            if len(samples) > MAX_SAMPLES:
                raise InvalidRequest(f"calibration: more than {MAX_SAMPLES} samples")
    if not samples:
        raise InvalidRequest(f"calibration: nothing to read in {', '.join(map(str, paths)) or 'no files'}")
    return samples


def _read_file(path: Path) -> list[CalibrationSample]:
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        lines = _read_text(path).splitlines()
        return [_json_sample(line, f"{path.name}:{i}", path.parent) for i, line in enumerate(lines, 1) if line.strip()]
    if suffix in _TEXT_SUFFIXES:
        text = _read_text(path)
        passages = [text[i : i + PASSAGE_CHARS] for i in range(0, len(text), PASSAGE_CHARS)]
        return [CalibrationSample(passage) for passage in passages if passage.strip()]
    if suffix in _VIDEO_SUFFIXES:
        return [CalibrationSample(DESCRIBE_CLIP, frames=load_media(Video(path), default_frames=VIDEO_FRAMES))]
    return [CalibrationSample(DESCRIBE, frames=load_media(Image(path), default_frames=1))]


def _read_text(path: Path) -> str:
    if path.stat().st_size > MAX_FILE_BYTES:
        raise InvalidRequest(f"calibration: {path} has more than {MAX_FILE_BYTES >> 20} MiB")
    return path.read_text(encoding="utf-8", errors="replace")


def _json_sample(line: str, where: str, folder: Path) -> CalibrationSample:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        raise InvalidRequest(f"{where}: not valid JSON") from None
    if not isinstance(values, dict):
        raise InvalidRequest(f"{where}: expected an object, got {type(values).__name__}")
    unknown = values.keys() - {"question", "answer", "image", "video"}
    if unknown or "question" not in values or {"image", "video"} <= values.keys():
        raise InvalidRequest(f"{where}: expected question, answer and image or video, got {', '.join(sorted(values))}")
    question, answer = (_text(values, key, where) for key in ("question", "answer"))
    media: Image | Video | None = None
    if "image" in values:
        media = Image(folder / _text(values, "image", where))
    elif "video" in values:
        media = Video(folder / _text(values, "video", where))
    frames = None if media is None else load_media(media, default_frames=VIDEO_FRAMES)
    return CalibrationSample(question, answer, frames)


def _text(values: dict[str, Any], key: str, where: str) -> str:
    value = values.get(key, "")
    if not isinstance(value, str):
        raise InvalidRequest(f"{where}: {key}: expected a text, got {value!r:.60}")
    return value
