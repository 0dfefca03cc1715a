"""From files to RGB frames: the door to `images`, `video` and `video_decord`.

Whatever comes in is untrusted. `media_file` looks at a file before a decoder does and holds the limits.
"""

from __future__ import annotations

from ..errors import InvalidRequest
from ..models.interface import Frames, ProgressFn, no_progress
from .config import Image, Video
from .media_file import LIMITS, MediaLimits


def load_media(
    item: Image | Video,
    *,
    default_frames: int,
    default_fps: float | None = None,
    progress: ProgressFn = no_progress,
    backend: str = "pyav",
) -> Frames:
    """Decodes one item. A video that asks for neither `frames` nor `fps` gives `default_frames` or what fits.

    `default_fps` bounds that number for a short clip: no more a second.
    `progress` is called between decoded frames; what it raises stops the work and passes through.
    Raises MediaError for what is wrong with the file, InvalidRequest for what is wrong with the wish.
    """
    if isinstance(item, Image):
        return load_image(item)
    if isinstance(item, Video):
        return load_video(
            item, default_frames=default_frames, default_fps=default_fps, progress=progress, backend=backend
        )
    raise InvalidRequest(f"media: expected an Image or a Video, got {type(item).__name__}")


def load_image(image: Image, *, limits: MediaLimits = LIMITS) -> Frames:
    """One frame at time 0: (1, H, W, 3) uint8, upright, alpha over white, the first picture of an animation."""
    from .images import read_image

    return read_image(image, limits)


def load_video(
    video: Video,
    *,
    default_frames: int,
    default_fps: float | None = None,
    progress: ProgressFn = no_progress,
    backend: str = "pyav",
    limits: MediaLimits = LIMITS,
) -> Frames:
    """Frames spread evenly over time: (T, H, W, 3) uint8, upright, with their times in seconds.

    `frames=N`: the frame in the middle of each of N equal parts of [start, end); `fps=R`: the one nearest to
    start, start + 1/R, ... No frame comes twice: a shorter range gives every frame it has, and a note says so.
    `backend`: "pyav", or "decord" (package decord2) for files that are trusted.
    """
    if backend == "pyav":
        from .video import read_video
    elif backend == "decord":
        from .video_decord import read_video
    else:
        raise InvalidRequest(f"backend: expected 'pyav' or 'decord', got {backend!r}")
    return read_video(video, default_frames, progress, limits, default_fps)
