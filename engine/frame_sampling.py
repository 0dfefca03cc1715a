"""Which frames of a video are used: a rule over times, the same for every decoder.

`frames=N` cuts [start, end) into N equal parts and wants the middle of each; `fps=R` wants start, start + 1/R,
... before end. Each wanted time takes the frame with the nearest timestamp, and no frame is taken twice. The
middles are moved back by half a frame, since a frame is on the screen from its timestamp on: thus N = number of
frames gives every frame exactly once, whatever the rounding of the container's clock.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ..errors import InvalidRequest
from .config import Video
from .media_file import MediaLimits, check_frame_count, frames_that_fit, shown

_ROUNDING_S = 1e-6  # seconds typed with decimals against a container's clock
# With an even number of frames per part the middle lies between two of them. The later one is taken, by this
# margin of a frame, so that the rounding of a clock does not decide.
_TIE_FRAMES = 0.1


@dataclass(frozen=True)
class Choice:
    """Frames to use and what the user should know about the choice."""

    targets_s: np.ndarray  # (N,) float64, wanted times, increasing
    indices: np.ndarray  # (N,) int64 into the frame times, increasing; empty where these are not known
    notes: tuple[str, ...]


def chosen_range(video: Video, duration_s: float) -> tuple[float, float, tuple[str, ...]]:
    """[start, end) in seconds within the clip. Raises InvalidRequest if `start` lies behind its end."""
    if video.start > 0 and video.start >= duration_s:
        raise InvalidRequest(f"{shown(video.source)}: start is {video.start:g} s, the clip ends at {duration_s:.2f} s")
    if video.end is not None and video.end > duration_s + _ROUNDING_S:
        return video.start, duration_s, (f"the clip ends at {duration_s:.2f} s, before {video.end:g} s",)
    return video.start, duration_s if video.end is None else video.end, ()


def num_wanted(video: Video, length_s: float, default_frames: int, default_fps: float | None = None) -> int:
    """How many frames the request asks for in a range of `length_s` seconds.

    Where it asks for none in particular, `default_frames`, and of a short range no more than `default_fps` a second.
    """
    if video.fps is None:
        most = math.inf if default_fps is None else length_s * default_fps
        return video.frames or max(1, int(min(default_frames, most)))
    count = length_s * video.fps
    return max(1, math.ceil(count - _ROUNDING_S * video.fps)) if math.isfinite(count) else 2**62


def choose(
    video: Video,
    times_s: np.ndarray,  # (F,) float64, of every frame, increasing
    duration_s: float,
    size: tuple[int, int],  # height, width
    default_frames: int,
    limits: MediaLimits,
    default_fps: float | None = None,
) -> Choice:
    """The frames of a clip whose frame times are known.

    Raises InvalidRequest for a range outside the clip, or for more frames than the limits allow.
    """
    start, end, notes = chosen_range(video, duration_s)
    inside = np.flatnonzero((times_s >= start - _ROUNDING_S) & (times_s < end - _ROUNDING_S))
    if not len(inside):  # a range within one long frame: the frame that is on the screen
        inside = np.array([max(0, int(np.searchsorted(times_s, start, side="right")) - 1)])
    wanted = num_wanted(video, end - start, default_frames, default_fps)
    count, short = limit_count(video, wanted, len(inside), size, limits)
    # The median, because a clip of uneven times may have one picture that stands for minutes.
    frame_s = float(np.median(np.diff(times_s[inside]))) if len(inside) > 1 else end - start
    targets = spread(video, start, end, count, frame_s)
    return Choice(targets, inside[nearest_distinct(times_s[inside], targets)], notes + short)


def limit_count(
    video: Video, wanted: int, available: int, size: tuple[int, int], limits: MediaLimits
) -> tuple[int, tuple[str, ...]]:
    """(frames to use, notes): never more than there are; a default that does not fit becomes what fits."""
    count = min(wanted, available)
    notes: tuple[str, ...] = ()
    if wanted > available and (video.frames, video.fps) != (None, None):
        part = "clip" if video.start == 0 and video.end is None else "chosen part"
        notes = (f"{_counted(count)} used: the {part} has no more",)
    if video.frames is None and video.fps is None and count > (fits := frames_that_fit(*size, limits)):
        count, notes = fits, (f"{_counted(fits)} used: more of {size[1]} x {size[0]} pixels do not fit",)
    check_frame_count(count, *size, video.source, limits)
    return count, notes


def _counted(count: int) -> str:
    return "1 frame" if count == 1 else f"{count} frames"


def spread(video: Video, start: float, end: float, count: int, frame_s: float) -> np.ndarray:
    """(count,) float64: the wanted timestamps in seconds, by the rule at the top."""
    later = _TIE_FRAMES * frame_s
    if video.fps is not None and count / video.fps >= end - start - _ROUNDING_S:  # fewer: there are no more frames
        return start + np.arange(count) / video.fps + later
    return start + (np.arange(count) + 0.5) * ((end - start) / count) - frame_s / 2 + later


def nearest_distinct(times_s: np.ndarray, targets_s: np.ndarray) -> np.ndarray:
    """(N,) int64, increasing: for each target the nearest time, moved on where another target took it.

    Needs N <= number of times.
    """
    num, last = len(targets_s), len(times_s) - 1
    after = np.searchsorted(times_s, targets_s).clip(0, last)
    before = (after - 1).clip(0)
    index = np.where(targets_s - times_s[before] <= times_s[after] - targets_s, before, after)
    steps = np.arange(num)
    index = np.maximum.accumulate(index - steps) + steps  # each at least one behind the one before it
    return np.minimum(index, last - (num - 1 - steps))  # and with enough left for those that follow
