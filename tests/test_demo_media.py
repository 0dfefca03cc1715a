"""The bundled media of the drawn world: what their seeds say, and what `make demo` asks about them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
MAX_BYTES = 100_000


@pytest.mark.parametrize("kind", ["scene", "page"])
def test_a_picture_has_the_pixels_of_its_seed(kind: str, media_script: Any) -> None:
    path = ROOT / "assets" / "images" / f"world-{kind}.png"
    assert path.stat().st_size < MAX_BYTES
    assert np.array_equal(np.asarray(Image.open(path)), media_script.world_sample(kind).rgb[0])


def test_the_clip_shows_its_seed_slowly_enough_to_watch(media_script: Any) -> None:
    from world.video import psnr  # the script has put the benchmarks where they are found

    from sparsevila import Video
    from sparsevila.engine.media import load_media

    path = ROOT / "assets" / "clips" / "world.mp4"
    assert path.stat().st_size < MAX_BYTES
    frames = load_media(Video(path), default_frames=32)
    scale = media_script.WORLD_SCALE
    drawn = media_script.world_sample("clip").rgb.repeat(scale, axis=1).repeat(scale, axis=2)
    assert frames.duration_s == pytest.approx(len(drawn) / media_script.WORLD_FPS)
    assert frames.rgb.shape == drawn.shape
    assert [index for index, (a, b) in enumerate(zip(frames.rgb, drawn, strict=True)) if psnr(a, b) < 36] == []
    assert psnr(frames.rgb[1:], drawn[:-1]) < 30  # a frame out of order would be seen


def test_make_demo_asks_what_has_an_answer(media_script: Any) -> None:
    """In the words of the world; and no answer stands in the turns before."""
    asked = re.findall(r'--prompt "([^"]+)"', (ROOT / "Makefile").read_text(encoding="utf-8"))
    truth = {turn.question: turn.answer for turn in media_script.world_sample("clip").dialogue}
    assert len(set(asked)) == len(asked) >= 2
    before = ""
    for question in asked:
        assert truth[question] not in before + question
        before += f"{question} {truth[question]} "
