"""Chooses frames by time as a decoder lets them go by, and keeps those alone, as upright RGB."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from ..errors import CorruptMedia
from .media_file import MediaLimits, check_frame_count, check_size, shown


class DecodedFrame(Protocol):
    """What is used of a decoder's frame (PyAV's `VideoFrame`)."""

    @property
    def width(self) -> int: ...

    @property
    def height(self) -> int: ...

    @property
    def rotation(self) -> float: ...

    @property
    def interlaced_frame(self) -> bool: ...

    def reformat(self, *, width: int, height: int, format: str) -> Any: ...


class TimesLie(Exception):
    """Frames came without times or out of order: they must be counted instead."""


class FramePicker:
    """Keeps for each wanted time, in turn, the nearest of the frames that come by. No frame is kept twice.

    Besides the kept pictures one decoded frame is held: the last one, which may be the nearer one.
    """

    def __init__(self, wanted: list[int], source: object, limits: MediaLimits) -> None:
        self.wanted = wanted  # ticks, increasing
        self.kept: list[int] = []  # ticks of the kept frames, increasing
        self.notes: dict[str, None] = {}  # sentences for the user, each once
        self._next = 0  # the first wanted time that is still open
        self._previous: list[tuple[int, DecodedFrame]] = []  # none or one
        self._not_before: int | None = None
        self._source, self._limits = source, limits
        self._size = (0, 0)  # width, height of the first picture as stored, before rotation
        self._rgb: np.ndarray | None = None  # (len(wanted), H, W, 3) uint8

    @property
    def done(self) -> bool:
        return self.num_open == 0

    @property
    def num_open(self) -> int:
        """How many wanted times are not served yet."""
        return len(self.wanted) - self._next

    @property
    def target(self) -> int:
        """The wanted time that is open."""
        return self.wanted[self._next]

    def offer(self, tick: int | None, frame: DecodedFrame) -> None:
        """The next frame in the order of showing. Raises TimesLie if it is not."""
        if tick is None or (self._previous and tick <= self._previous[0][0]):
            raise TimesLie
        if self._not_before is not None and tick < self._not_before:
            return  # shown before the key frame, and refers to pictures before it
        while not self.done and tick >= self.target:
            self._take([*self._previous, (tick, frame)])
        self._previous = [(tick, frame)]

    def jump(self, not_before: int | None = None) -> None:
        """The next frame comes from elsewhere; the last one is no neighbour of it."""
        self._previous, self._not_before = [], not_before

    def end(self) -> None:
        """No frame follows: the last one may serve one open time."""
        while not self.done:
            self._take(self._previous)

    def _take(self, candidates: list[tuple[int, DecodedFrame]]) -> None:
        target = self.target
        self._next += 1
        fresh = [c for c in candidates if not self.kept or c[0] > self.kept[-1]]
        if fresh:
            tick, frame = min(fresh, key=lambda c: abs(c[0] - target))
            self._keep(frame)
            self.kept.append(tick)

    def _keep(self, frame: DecodedFrame) -> None:
        if self._rgb is None:
            self._size = frame.width, frame.height
            check_size(*self._size, self._source, self._limits.frame_pixels, self._limits)
            check_frame_count(len(self.wanted), frame.height, frame.width, self._source, self._limits)
        width, height = self._size
        if (frame.width, frame.height) != self._size:
            self.notes[f"the picture size changes within the clip; all frames were scaled to {width} x {height}"] = None
        if frame.interlaced_frame:
            self.notes["interlaced: both fields of a picture are used, woven into one"] = None
        picture = frame.reformat(width=width, height=height, format="rgb24").to_ndarray()
        picture = np.rot90(picture, k=(int(frame.rotation) // 90) % 4)
        if self._rgb is None:
            self._rgb = np.empty((len(self.wanted), *picture.shape), np.uint8)
        elif picture.shape != self._rgb.shape[1:]:
            raise CorruptMedia(f"{shown(self._source)}: expected one orientation, got several")
        self._rgb[len(self.kept)] = picture

    def rgb(self) -> np.ndarray:
        """(T, H, W, 3) uint8, the kept frames."""
        assert self._rgb is not None
        return self._rgb[: len(self.kept)]
