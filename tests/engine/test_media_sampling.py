"""The rule that chooses frames, over plain numbers: no file, no decoder."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsevila.engine.config import Video
from sparsevila.engine.frame_picker import FramePicker, TimesLie
from sparsevila.engine.frame_sampling import choose, nearest_distinct
from sparsevila.engine.media_file import LIMITS, MediaLimits
from sparsevila.errors import InvalidRequest

SIZE = (48, 64)


def chosen(video: Video, times: np.ndarray, duration: float, default: int = 8, limits: MediaLimits = LIMITS):
    return choose(video, times, duration, SIZE, default, limits)


@given(num=st.integers(1, 300), rate=st.sampled_from([1, 10, 23.976, 29.97, 30, 59.94, 240]), clock=st.integers(0, 2))
def test_as_many_as_there_are_gives_every_frame(num: int, rate: float, clock: int):
    """Also with times rounded as Matroska and MPEG-TS store them."""
    times = np.arange(num) / rate
    if clock:
        times = np.round(times * (1000, 90_000)[clock - 1]) / (1000, 90_000)[clock - 1]
    found = chosen(Video("a", frames=num), times, num / rate)
    assert found.indices.tolist() == list(range(num))
    assert found.notes == ()


@given(
    gaps=st.lists(st.floats(0.001, 10), min_size=1, max_size=200),
    frames=st.integers(1, 300),
    start=st.floats(0, 0.9),
    length=st.floats(0.01, 1),
)
def test_never_twice_and_always_within_the_range(gaps: list[float], frames: int, start: float, length: float):
    times = np.concatenate([[0.0], np.cumsum(gaps)])
    duration = float(times[-1] + 0.1)
    begin, end = start * duration, (start + length) * duration
    found = chosen(Video("a", frames=frames, start=begin, end=end), times, duration)
    assert (np.diff(found.indices) > 0).all()
    inside = ((times >= begin - 1e-6) & (times < min(end, duration) - 1e-6)).sum()
    assert len(found.indices) == min(frames, max(1, inside))
    if inside:
        kept = times[found.indices]
        assert (kept >= begin - 1e-5).all()
        assert (kept < end).all()


@pytest.mark.parametrize(
    ("frames", "expected"), [(1, [5]), (2, [2, 7]), (3, [1, 5, 8]), (4, [1, 3, 6, 8]), (5, [1, 3, 5, 7, 9])]
)
def test_the_middle_of_each_part(frames: int, expected: list[int]):
    """Ten frames in a second; where the middle lies between two frames, the later one."""
    found = chosen(Video("a", frames=frames), np.arange(10) / 10, 1.0)
    assert found.indices.tolist() == expected


@pytest.mark.parametrize(
    ("fps", "expected"), [(1, [0, 10]), (2, [0, 5, 10, 15]), (4, [0, 3, 5, 8, 10, 13, 15, 18]), (0.1, [0])]
)
def test_fps_counts_from_start(fps: float, expected: list[int]):
    assert chosen(Video("a", fps=fps), np.arange(20) / 10, 2.0).indices.tolist() == expected


def test_fps_above_the_clips_gives_every_frame_once():
    found = chosen(Video("a", fps=100), np.arange(20) / 10, 2.0)
    assert found.indices.tolist() == list(range(20))
    assert found.notes == ("20 frames used: the clip has no more",)


def test_uneven_times_are_sampled_by_time_and_not_by_index():
    times = np.array([0, 0.1, 0.2, 0.3, 0.4, 0.5, 5.0, 9.5])
    found = chosen(Video("a", frames=2), times, 10.0)
    assert times[found.indices].tolist() == [0.5, 9.5]  # nearest to 2.5 and 7.5 s; by index it would be 0.2 and 5.0


def test_range_within_one_long_frame_shows_what_is_on_the_screen():
    assert chosen(Video("a", frames=4, start=6, end=7), np.array([0.0, 5.0, 9.0]), 10.0).indices.tolist() == [1]


def test_range_past_the_end():
    found = chosen(Video("a", frames=4, end=60), np.arange(20) / 10, 2.0)
    assert found.notes == ("the clip ends at 2.00 s, before 60 s",)
    with pytest.raises(InvalidRequest, match=r"start is 2 s, the clip ends at 2\.00 s"):
        chosen(Video("a", frames=4, start=2), np.arange(20) / 10, 2.0)


def test_limits_on_what_is_asked_for():
    times, fits = np.arange(6000) / 10, LIMITS.frames
    with pytest.raises(InvalidRequest, match=f"at most {fits} frames") as caught:
        chosen(Video("a", frames=5000), times, 600.0)
    assert f"--frames {fits}" in caught.value.hint
    with pytest.raises(InvalidRequest):
        chosen(Video("a", fps=1e300), times, 600.0)
    small = MediaLimits(rgb_bytes=7 * 48 * 64 * 3)
    with pytest.raises(InvalidRequest, match="at most 7 frames"):
        chosen(Video("a", frames=8), times, 600.0, limits=small)
    assert len(chosen(Video("a", frames=7), times, 600.0, limits=small).indices) == 7


def test_a_default_that_does_not_fit_becomes_what_fits():
    found = chosen(Video("a"), np.arange(60) / 10, 6.0, default=32, limits=MediaLimits(rgb_bytes=7 * 48 * 64 * 3))
    assert len(found.indices) == 7
    assert found.notes == ("7 frames used: more of 64 x 48 pixels do not fit",)


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=60, unique=True), st.data())
def test_nearest_distinct_is_nearest_where_nobody_else_wants_it(times: list[int], data: st.DataObject):
    known = np.array(sorted(times), float)
    count = data.draw(st.integers(1, len(known)))
    targets = np.sort(np.array(data.draw(st.lists(st.floats(0, 1000), min_size=count, max_size=count))))
    index = nearest_distinct(known, targets)
    assert (np.diff(index) > 0).all()
    assert index[0] >= 0
    assert index[-1] < len(known)
    if count == 1:
        assert abs(known[index[0]] - targets[0]) == np.abs(known - targets[0]).min()


# ---- the picker: the same choice while frames go by


class Decoded:
    """A decoder's frame of one grey, as far as the picker looks at it."""

    width, height, rotation, interlaced_frame = 4, 2, 0, False

    def __init__(self, grey: int) -> None:
        self._grey = grey

    def reformat(self, *, width: int, height: int, format: str) -> Decoded:
        return self

    def to_ndarray(self) -> np.ndarray:
        return np.full((self.height, self.width, 3), self._grey, np.uint8)


def picked(wanted: list[int], ticks: list[int]) -> list[int]:
    picker = FramePicker(wanted, "a", LIMITS)
    for tick in ticks:
        if not picker.done:
            picker.offer(tick, Decoded(tick))
    picker.end()
    if picker.kept:
        assert picker.rgb()[:, 0, 0, 0].tolist() == picker.kept  # pixels and times belong together
    return picker.kept


@pytest.mark.parametrize(
    ("wanted", "ticks", "expected"),
    [
        ([0, 10, 20], [0, 10, 20], [0, 10, 20]),
        ([4, 16], [0, 10, 20], [0, 20]),
        ([10], [0, 20], [0]),  # a tie: the earlier one
        ([10], [0, 9, 12], [9]),
        ([10, 11], [0, 20, 30], [0, 20]),  # nobody twice
        ([10, 11, 12], [0, 20], [0, 20]),
        ([50], [0, 10], [10]),  # the clip ends before it
        ([50, 60], [0, 10], [10]),
        ([5], [], []),
    ],
)
def test_picker(wanted: list[int], ticks: list[int], expected: list[int]):
    assert picked(wanted, ticks) == expected


@given(st.sets(st.integers(0, 200), min_size=1, max_size=40), st.data())
def test_picker_finds_exactly_what_is_wanted_where_it_exists(ticks: set[int], data: st.DataObject):
    wanted = sorted(data.draw(st.sets(st.sampled_from(sorted(ticks)), min_size=1)))
    assert picked(wanted, sorted(ticks)) == wanted


def test_picker_says_when_times_are_missing_or_out_of_order():
    for tick in (None, 5, 4):
        picker = FramePicker([50], "a", LIMITS)
        picker.offer(5, Decoded(5))
        with pytest.raises(TimesLie):
            picker.offer(tick, Decoded(0))


def test_picker_after_a_jump_leaves_out_what_comes_before_the_key_frame():
    picker = FramePicker([10, 30], "a", LIMITS)
    picker.offer(10, Decoded(10))
    picker.jump(not_before=30)
    for tick in (28, 29, 32):  # 30 itself is lost
        picker.offer(tick, Decoded(tick))
    assert picker.kept == [10, 32]


def test_picker_checks_the_true_size_before_it_allocates():
    picker = FramePicker([0] * 9, "a", MediaLimits(rgb_bytes=8 * 24))
    with pytest.raises(InvalidRequest, match="at most 8 frames"):
        picker.offer(0, Decoded(0))
