"""A clip as a real H.264 file, and back."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np


def write_h264(rgb: np.ndarray, path: Path, fps: int = 4, scale: int = 1, crf: int = 10) -> None:
    """Writes frames (T, H, W, 3) uint8, each pixel `scale` times as wide and high, as H.264 in 4:2:0.

    One key frame at the start, no frames out of order. `crf` is the encoder's quality, lower being better.
    """
    rgb = rgb.repeat(scale, axis=1).repeat(scale, axis=2)
    _, height, width, _ = rgb.shape
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": str(crf), "bf": "0"})
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for picture in rgb:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def read_frames(path: Path) -> np.ndarray:
    """All frames of a file, (T, H, W, 3) uint8."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 arrays of one shape."""
    error = np.square(a.astype(np.float64) - b).mean()
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))
