"""Video files to RGB frames with decord (package `decord2`, extra `[decord]`).

For trusted files only: decord has no white lists, follows playlists, and decodes pictures of any size. A file is
still sniffed first, so that a playlist never reaches it under any name. Damaged files are refused whole: the
readable part of a cut file is lost. The choice of frames is that of the PyAV reader, and so are the pixels, with
two exceptions seen in decord2 3.4: clips turned by a quarter come out mangled and are refused here, and single
frames of HEVC with open groups of pictures may be their neighbours.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from ..errors import CorruptMedia, UnsupportedMedia
from ..models.interface import Frames, Progress, ProgressFn
from .config import Video
from .frame_sampling import choose
from .media_file import MediaLimits, check_size, expect_kind, is_cut, make_frames, open_local, read_head, shown

_BATCH = 8  # frames between two calls of `progress`


def read_video(
    video: Video, default_frames: int, progress: ProgressFn, limits: MediaLimits, default_fps: float | None = None
) -> Frames:
    """Video -> Frames, rgb (T, H, W, 3) uint8. Raises MediaError or InvalidRequest; see `media.load_video`."""
    try:
        import decord
    except ImportError:
        raise UnsupportedMedia(
            "backend 'decord': the package decord2 is not installed",
            hint="pip install 'sparsevila[decord]', or use backend='pyav'",
        ) from None
    with open_local(video.source) as file:
        kind = expect_kind(video.source, read_head(file), "video")
        if is_cut(file, kind, video.source):
            raise CorruptMedia(f"{shown(video.source)}: the file is cut", hint="backend='pyav' reads the part before")
    with _readable(video, decord.DECORDError):
        # An absolute path: a name such as `concat:a|b` would be taken for a protocol.
        reader = decord.VideoReader(os.path.abspath(video.source), ctx=decord.cpu(0), num_threads=1)
        times_s, duration_s = _times(reader)
        height, width, channels = reader[0].shape  # rotation applied
    if channels != 3:
        raise UnsupportedMedia(
            f"{shown(video.source)}: decord gives {channels} channels, expected 3; is the clip turned?",
            hint="use backend='pyav'",
        )
    check_size(width, height, video.source, limits.frame_pixels, limits)
    choice = choose(video, times_s, duration_s, (height, width), default_frames, limits, default_fps)
    count = len(choice.indices)
    rgb = np.empty((count, height, width, 3), np.uint8)
    for done in range(0, count, _BATCH):
        progress(Progress("decode", done, count, "frames"))
        with _readable(video, decord.DECORDError):
            rgb[done : done + _BATCH] = reader.get_batch(choice.indices[done : done + _BATCH].tolist()).asnumpy()
    progress(Progress("decode", count, count, "frames"))
    return make_frames("video", rgb, times_s[choice.indices], video.source, duration_s, choice.notes)


def _times(reader: Any) -> tuple[np.ndarray, float]:
    """(times of all frames in seconds from the first, duration); at equal distances where the file has none."""
    count = len(reader)
    spans = np.asarray(reader.get_frame_timestamp(list(range(count))), np.float64)  # (F, 2) start, end
    starts = spans[:, 0]
    if np.all(np.abs(spans) < 1e9) and np.all(np.diff(starts) > 0):
        return starts - starts[0], float(max(spans[-1, 1], starts[-1]) - starts[0])
    rate = float(reader.get_avg_fps()) or 25.0
    return np.arange(count) / rate, count / rate


@contextmanager
def _readable(video: Video, library_error: type[Exception]) -> Iterator[None]:
    """Turns what decord raises on a file it cannot read into CorruptMedia; its words hold addresses and paths."""
    try:
        yield
    except (library_error, RuntimeError, LookupError, ValueError):
        raise CorruptMedia(
            f"{shown(video.source)}: decord cannot read it: damaged, or of an unusual kind", hint="use backend='pyav'"
        ) from None
