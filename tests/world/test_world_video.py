"""A clip survives H.264."""

from __future__ import annotations

from pathlib import Path

import pytest
from world.splits import make
from world.video import psnr, read_frames, write_h264


@pytest.mark.parametrize(("scale", "bound"), [(1, 30.0), (4, 38.0)])
@pytest.mark.parametrize("seed", [0, 5])
def test_frames_come_back(tmp_path: Path, seed: int, scale: int, bound: float) -> None:
    rgb = make("clip", seed).rgb
    write_h264(rgb, tmp_path / "clip.mp4", scale=scale)
    decoded = read_frames(tmp_path / "clip.mp4")
    larger = rgb.repeat(scale, axis=1).repeat(scale, axis=2)
    assert decoded.shape == larger.shape
    for frame, original in zip(decoded, larger, strict=True):
        assert psnr(frame, original) > bound


def test_psnr_sees_a_lost_frame() -> None:
    """The bounds would catch a frame that is missing or out of order, where something moved."""
    rgb = make("clip", 0).rgb
    assert psnr(rgb[1:], rgb[:-1]) < 30
