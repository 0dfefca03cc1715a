"""Draws the bundled clips and pictures: `python assets/make_media.py OUT` writes OUT/clips and OUT/images.

Everything is drawn here or in `benchmarks/world`, and encoded as H.264 with PyAV, so nothing needs a licence of its
own. The drawing is deterministic; encoders may differ in a few bits. What can be asked about the media is plain:
colours, counts, words, numbers, and what happens when. Of those called world it is known in full: they are samples of
`benchmarks/world`, whose dialogues come with them.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
from PIL import Image, ImageDraw, ImageFont

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))
from world.sample import Sample
from world.splits import TEST, make
from world.video import write_h264

Colour = tuple[int, int, int]
Point = tuple[float, float]
DrawFrame = Callable[[float], Image.Image]

CLIP_SIZE = (320, 240)
FPS = 15
CLIP_S = 5
SCALE = 3  # drawn larger and reduced, for smooth edges

WHITE, INK, GREY = (255, 255, 255), (34, 38, 46), (120, 126, 138)
RED, GREEN, BLUE = (214, 48, 49), (39, 158, 84), (36, 92, 200)
YELLOW, ORANGE, PURPLE = (246, 200, 40), (240, 138, 36), (126, 72, 176)

# Of the world: a kind's number within the seeds that nothing is trained on, and its options.
WORLD: dict[str, tuple[int, dict[str, Any]]] = {
    "clip": (444, {"frames": 16}),
    "scene": (846, {"width": 128, "height": 128}),
    "page": (44, {"width": 128, "height": 128}),
}
WORLD_FPS = 4
WORLD_SCALE = 4  # of the clip: a person sees more, and more of the colours survives the encoder


class Canvas:
    """A picture with coordinates in its final pixels, drawn larger."""

    def __init__(self, width: int, height: int, background: Colour) -> None:
        self.size = (width, height)
        self._image = Image.new("RGB", (width * SCALE, height * SCALE), background)
        self._draw = ImageDraw.Draw(self._image)

    def box(self, x0: float, y0: float, x1: float, y1: float, fill: Colour, radius: float = 0) -> None:
        corners = [v * SCALE for v in (x0, y0, x1, y1)]
        self._draw.rounded_rectangle(corners, radius * SCALE, fill)

    def disc(self, x: float, y: float, radius: float, fill: Colour) -> None:
        self._draw.ellipse([v * SCALE for v in (x - radius, y - radius, x + radius, y + radius)], fill)

    def polygon(self, points: list[Point], fill: Colour) -> None:
        self._draw.polygon([(x * SCALE, y * SCALE) for x, y in points], fill)

    def star(self, x: float, y: float, radius: float, fill: Colour) -> None:
        corners = []
        for i in range(10):
            r, angle = radius * (1 if i % 2 == 0 else 0.42), math.pi * (i / 5 - 0.5)
            corners.append((x + r * math.cos(angle), y + r * math.sin(angle)))
        self.polygon(corners, fill)

    def line(self, x0: float, y0: float, x1: float, y1: float, fill: Colour, width: float = 1) -> None:
        self._draw.line([v * SCALE for v in (x0, y0, x1, y1)], fill, round(width * SCALE))

    def text(self, x: float, y: float, text: str, size: float, fill: Colour = INK, anchor: str = "mm") -> None:
        font = ImageFont.load_default(size * SCALE)
        self._draw.text((x * SCALE, y * SCALE), text, fill, font, anchor)

    def vertical_gradient(self, top: Colour, bottom: Colour, height: float) -> None:
        rows = round(height * SCALE)
        for y in range(rows):
            self._draw.line([(0, y), (self._image.width, y)], mixed(top, bottom, y / rows))

    def picture(self) -> Image.Image:
        return self._image.resize(self.size, Image.Resampling.LANCZOS)


def mixed(a: Colour, b: Colour, share: float) -> Colour:
    """`share` 0 gives a, 1 gives b."""
    share = min(max(share, 0.0), 1.0)
    red, green, blue = (round(x + (y - x) * share) for x, y in zip(a, b, strict=True))
    return red, green, blue


def eased(time_s: float, start_s: float, end_s: float) -> float:
    """0 before start, 1 after end, smooth between."""
    x = min(max((time_s - start_s) / (end_s - start_s), 0.0), 1.0)
    return x * x * (3 - 2 * x)


# ---- clips


def shapes_at(time_s: float) -> Image.Image:
    """A red disc goes from left to right; a blue square turns green; a yellow star comes; the square leaves."""
    canvas = Canvas(*CLIP_SIZE, (238, 240, 244))
    canvas.box(0, 196, 320, 240, (214, 219, 227))
    side = 34 * (1 - eased(time_s, 4.0, 4.6))
    if side > 1:
        colour = mixed(BLUE, GREEN, eased(time_s, 1.6, 2.0))
        canvas.box(88 - side, 86 - side, 88 + side, 86 + side, colour, radius=4)
    radius = 38 * eased(time_s, 2.8, 3.2)
    if radius > 1:
        canvas.star(226, 82, radius, YELLOW)
    canvas.disc(34 + 252 * eased(time_s, 0.2, 4.6), 170, 26, RED)
    return canvas.picture()


def street_at(time_s: float) -> Image.Image:
    """The sun sets over a street; a red car drives past house 7; the lamp and the windows light up."""
    dusk = eased(time_s, 0.8, 3.6)
    canvas = Canvas(*CLIP_SIZE, WHITE)
    canvas.vertical_gradient(
        mixed((120, 186, 240), (24, 28, 66), dusk), mixed((222, 238, 250), (226, 120, 70), dusk), 160
    )
    canvas.disc(250, 46 + 128 * eased(time_s, 0, 3.8), 20, mixed((255, 220, 80), (244, 96, 48), dusk))
    canvas.box(0, 150, 320, 182, mixed((104, 168, 92), (38, 62, 58), dusk))
    canvas.box(0, 182, 320, 240, mixed((98, 102, 112), (44, 46, 58), dusk))
    for x in range(-4, 320, 56):
        canvas.box(x, 210, x + 30, 214, mixed((240, 240, 236), (150, 150, 156), dusk))
    _house(canvas, dusk)
    _bus_stop(canvas, dusk)
    _lamp(canvas, lit=time_s >= 3.0, dusk=dusk)
    _car(canvas, -70 + 400 * (time_s / CLIP_S), dusk)
    return canvas.picture()


def _house(canvas: Canvas, dusk: float) -> None:
    canvas.box(30, 92, 122, 176, mixed((236, 214, 178), (104, 90, 92), dusk))
    canvas.polygon([(20, 94), (76, 48), (132, 94)], mixed((168, 70, 52), (82, 40, 48), dusk))
    window = mixed((150, 196, 222), (255, 216, 112), eased(dusk, 0.6, 0.9))
    for x in (40, 92):
        canvas.box(x, 104, x + 20, 126, WHITE)
        canvas.box(x + 2, 106, x + 18, 124, window)
    canvas.box(64, 130, 88, 176, mixed((92, 62, 48), (46, 34, 38), dusk))
    canvas.box(94, 138, 114, 158, mixed(BLUE, (30, 52, 104), dusk), radius=3)
    canvas.text(104, 148, "7", 15, WHITE)


def _bus_stop(canvas: Canvas, dusk: float) -> None:
    canvas.box(166, 104, 169, 178, mixed((112, 116, 124), (62, 64, 76), dusk))
    canvas.box(148, 92, 188, 114, mixed(YELLOW, (176, 140, 50), dusk), radius=3)
    canvas.text(168, 103, "BUS", 14, INK)


def _lamp(canvas: Canvas, *, lit: bool, dusk: float) -> None:
    pole = mixed((90, 94, 104), (58, 60, 72), dusk)
    if lit:
        canvas.polygon([(268, 104), (280, 104), (300, 182), (248, 182)], (104, 88, 74))
    canvas.box(286, 96, 290, 180, pole)
    canvas.box(268, 94, 290, 98, pole)
    canvas.disc(274, 102, 7, (255, 236, 150) if lit else (206, 210, 214))


def _car(canvas: Canvas, x: float, dusk: float) -> None:
    red = mixed(RED, (150, 34, 40), dusk)
    canvas.polygon([(x + 12, 186), (x + 22, 170), (x + 50, 170), (x + 62, 186)], red)
    canvas.polygon([(x + 18, 185), (x + 25, 174), (x + 35, 174), (x + 35, 185)], (196, 224, 240))
    canvas.polygon([(x + 38, 185), (x + 38, 174), (x + 48, 174), (x + 55, 185)], (196, 224, 240))
    canvas.box(x, 185, x + 76, 204, red, radius=6)
    if dusk > 0.6:
        canvas.polygon([(x + 74, 190), (x + 116, 184), (x + 116, 206)], (112, 104, 86))
    canvas.box(x + 71, 188, x + 76, 194, (255, 244, 180))
    for wheel in (x + 17, x + 59):
        canvas.disc(wheel, 204, 9, (28, 30, 36))
        canvas.disc(wheel, 204, 4, (176, 180, 188))


def write_clip(path: Path, draw: DrawFrame) -> None:
    """Encodes CLIP_S seconds as H.264 in MP4, index first, a key frame per second."""
    with av.open(str(path), "w", format="mp4", options={"movflags": "faststart", "fflags": "+bitexact"}) as container:
        stream = container.add_stream(
            _h264_encoder(), rate=FPS, options={"crf": "21", "preset": "slow", "threads": "1"}
        )
        stream.width, stream.height = CLIP_SIZE
        stream.pix_fmt = "yuv420p"
        stream.codec_context.gop_size = FPS
        for i in range(FPS * CLIP_S):
            container.mux(stream.encode(av.VideoFrame.from_image(draw(i / FPS))))
        container.mux(stream.encode(None))


def _h264_encoder() -> str:
    """The first H.264 encoder of this build of FFmpeg. Raises LookupError if it has none."""
    for name in ("libx264", "libopenh264", "h264_videotoolbox", "h264"):
        if name in av.codecs_available:
            try:
                return av.codec.Codec(name, "w").name
            except av.error.FFmpegError:
                continue  # there as a decoder only
    raise LookupError("expected an H.264 encoder in PyAV, found none")


# ---- pictures


def shapes_picture() -> Image.Image:
    """Five shapes in two rows on white; the only circle is red, the only star yellow."""
    canvas = Canvas(480, 360, WHITE)
    canvas.disc(90, 100, 58, RED)
    canvas.box(184, 46, 296, 154, BLUE, radius=6)
    canvas.polygon([(390, 40), (452, 156), (328, 156)], GREEN)
    canvas.star(150, 262, 66, YELLOW)
    canvas.polygon([(330, 196), (398, 262), (330, 328), (262, 262)], PURPLE)
    return canvas.picture()


def page_picture() -> Image.Image:
    """A page to read: a timetable with a title, three columns and a footer."""
    canvas = Canvas(600, 760, (252, 251, 247))
    canvas.text(48, 66, "NORTH HARBOUR FERRY", 32, INK, "lm")
    canvas.text(48, 106, "Timetable, 1 May to 30 September", 18, GREY, "lm")
    canvas.box(48, 136, 552, 172, BLUE, radius=3)
    columns = (64, 250, 440)
    for x, title in zip(columns, ("Departs", "Arrives", "Pier"), strict=True):
        canvas.text(x, 154, title, 18, WHITE, "lm")
    rows = [
        ("06:40", "07:15", "A"),
        ("08:10", "08:45", "A"),
        ("09:55", "10:30", "B"),
        ("12:20", "12:55", "C"),
        ("14:05", "14:40", "B"),
        ("16:30", "17:05", "A"),
        ("18:15", "18:50", "C"),
        ("21:00", "21:35", "A"),
    ]
    for i, row in enumerate(rows):
        y = 198 + 48 * i
        if i % 2:
            canvas.box(48, y - 24, 552, y + 24, (236, 239, 245))
        for x, text in zip(columns, row, strict=True):
            canvas.text(x, y, text, 22, INK, "lm")
    canvas.line(48, 592, 552, 592, GREY, 1)
    canvas.text(48, 622, "A single ticket costs 14.50. Children under six travel free.", 17, INK, "lm")
    canvas.text(48, 652, "Bicycles need a reservation: call 555 0172.", 17, INK, "lm")
    canvas.text(48, 694, "No service in storms above force 8.", 17, RED, "lm")
    return canvas.picture()


def badge_picture() -> Image.Image:
    """A visitor's badge with a portrait, a name and a number."""
    canvas = Canvas(480, 300, (196, 203, 212))
    canvas.box(24, 20, 456, 280, WHITE, radius=16)
    canvas.box(24, 20, 456, 84, GREEN, radius=16)
    canvas.box(24, 66, 456, 84, GREEN)
    canvas.box(216, 30, 264, 40, (196, 203, 212), radius=5)
    canvas.text(240, 62, "VISITOR", 28, WHITE)
    canvas.box(48, 104, 168, 256, (216, 228, 240), radius=6)
    canvas.box(66, 208, 150, 256, ORANGE, radius=22)
    canvas.box(96, 188, 120, 218, (226, 178, 144))
    canvas.disc(108, 156, 34, (84, 52, 36))
    canvas.disc(108, 164, 28, (236, 190, 156))
    for x in (98, 118):
        canvas.disc(x, 160, 3, INK)
    canvas.box(98, 175, 118, 178, (172, 84, 76), radius=1)
    canvas.text(192, 130, "MIRA OKAFOR", 30, INK, "lm")
    canvas.text(192, 168, "Bridge inspection", 20, GREY, "lm")
    canvas.text(192, 220, "No. 4182", 26, INK, "lm")
    canvas.text(192, 250, "Valid until 18:00", 16, GREY, "lm")
    return canvas.picture()


def chart_picture() -> Image.Image:
    """A bar chart: four quarters, the third is the highest."""
    canvas = Canvas(520, 360, WHITE)
    canvas.text(36, 36, "Bicycles counted per day", 24, INK, "lm")
    for value in (0, 200, 400, 600):
        y = 300 - value * 0.34
        canvas.line(70, y, 492, y, (222, 226, 232), 1)
        canvas.text(60, y, str(value), 14, GREY, "rm")
    bars = [("Spring", 410, GREEN), ("Summer", 585, ORANGE), ("Autumn", 640, RED), ("Winter", 120, BLUE)]
    for i, (name, value, colour) in enumerate(bars):
        x = 96 + 100 * i
        canvas.box(x, 300 - value * 0.34, x + 62, 300, colour)
        canvas.text(x + 31, 288 - value * 0.34, str(value), 16, INK)
        canvas.text(x + 31, 320, name, 16, INK)
    return canvas.picture()


# ---- the world


def world_sample(kind: str) -> Sample:
    """The bundled scene, page or clip, with what is true of it."""
    number, options = WORLD[kind]
    return make(kind, TEST[number], **options)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draws the bundled clips and pictures.")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder that gets clips/ and images/")
    out = parser.parse_args().out
    clips, images = out / "clips", out / "images"
    clips.mkdir(parents=True, exist_ok=True)
    images.mkdir(parents=True, exist_ok=True)
    write_clip(clips / "shapes.mp4", shapes_at)
    write_clip(clips / "street.mp4", street_at)
    for name, picture in (("shapes", shapes_picture()), ("page", page_picture()), ("chart", chart_picture())):
        picture.quantize(128, dither=Image.Dither.NONE).save(images / f"{name}.png", optimize=True)
    badge_picture().save(images / "badge.jpg", quality=90)
    write_h264(world_sample("clip").rgb, clips / "world.mp4", fps=WORLD_FPS, scale=WORLD_SCALE, crf=18)
    for kind in ("scene", "page"):
        Image.fromarray(world_sample(kind).rgb[0]).save(images / f"world-{kind}.png", optimize=True)


if __name__ == "__main__":
    main()
