"""Videos that are in order: which frames come back, at which times, upright, in which colours, at what cost."""

from __future__ import annotations

import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from sparsevila.engine.config import Video
from sparsevila.engine.media import load_media, load_video
from sparsevila.engine.media_file import MediaLimits
from sparsevila.errors import InvalidRequest, UnsupportedMedia
from sparsevila.models.interface import Frames, Progress
from sparsevila.tests.attacks import media as attacks

ASSETS = Path(__file__).resolve().parents[2] / "assets"
SEEKING = MediaLimits(index_bytes=0, scan_gap_s=0.3)  # every file is "large", every frame "far"

KINDS = {  # name: codec, further options. Twenty frames at ten per second each.
    "h264.mp4": ("libx264", {"g": "6", "bf": "2"}),
    "open_gop.mp4": ("libx264", {"g": "6", "bf": "2", "x264-params": "open-gop=1"}),
    "h264.mkv": ("libx264", {"g": "6", "bf": "2"}),
    "h264.ts": ("libx264", {"g": "6", "bf": "2"}),
    "h264_b_frames.avi": ("libx264", {"g": "6", "bf": "2"}),
    "hevc.mp4": ("libx265", {"g": "6", "preset": "ultrafast"}),
    "vp8_hidden_frames.webm": ("libvpx", {"g": "6", "auto-alt-ref": "1", "lag-in-frames": "6"}),
    "vp9_hidden_frames.webm": ("libvpx-vp9", {"g": "6", "auto-alt-ref": "1", "lag-in-frames": "6"}),
    "av1.mp4": ("libsvtav1", {"g": "6", "preset": "12", "svtav1-params": "lp=1"}),
    "mpeg4.avi": ("mpeg4", {"g": "6"}),
    "mpeg4_b_frames.avi": ("mpeg4", {"g": "6", "bf": "2"}),
    "mjpeg.mov": ("mjpeg", {}),
}


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("clips")
    made = {}
    for name, (codec, options) in KINDS.items():
        pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        made[name] = attacks.write_clip(folder / name, codec=codec, options=options, pix_fmt=pix_fmt)
    return made


@pytest.fixture(scope="module")
def day(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 hours at one frame in ten seconds, a key frame every 250 frames."""
    path = tmp_path_factory.mktemp("day") / "day.mp4"
    options = {"preset": "ultrafast", "g": "250", "bf": "0"}
    return attacks.write_clip(path, 8640, rate=Fraction(1, 10), options=options)


def load(path: Path, *, default_frames: int = 8, limits: MediaLimits | None = None, **wish: object) -> Frames:
    return load_video(Video(path, **wish), default_frames=default_frames, **({"limits": limits} if limits else {}))  # type: ignore[arg-type]


def numbers(frames: Frames) -> list[int]:
    return attacks.numbers_of(frames.rgb)


# ---- which frames


@pytest.mark.parametrize("name", KINDS)
def test_as_many_as_there_are_gives_every_frame(clips: dict[str, Path], name: str):
    frames = load(clips[name], frames=20)
    assert numbers(frames) == list(range(20))
    assert frames.timestamps == pytest.approx(np.arange(20) / 10, abs=1e-3)
    assert frames.duration_s == pytest.approx(2.0, abs=1e-3)
    assert frames.notes == ()
    assert frames.kind == "video"


@pytest.mark.parametrize("name", KINDS)
def test_more_than_there_are_invents_none(clips: dict[str, Path], name: str):
    frames = load(clips[name], frames=64)
    assert numbers(frames) == list(range(20))
    assert frames.notes == ("20 frames used: the clip has no more",)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(
    ("wish", "expected"),
    [
        ({"frames": 1}, [10]),
        ({"frames": 4}, [2, 7, 12, 17]),
        ({"frames": 7}, [1, 4, 7, 10, 12, 15, 18]),
        ({"fps": 2}, [0, 5, 10, 15]),
        ({"frames": 2, "start": 1.0}, [12, 17]),
        ({"frames": 3, "start": 0.5, "end": 0.8}, [5, 6, 7]),
        ({"fps": 5, "start": 1.2, "end": 1.8}, [12, 14, 16]),
        ({}, [1, 3, 6, 8, 11, 13, 16, 18]),
    ],
)
def test_a_few(clips: dict[str, Path], name: str, wish: dict[str, float], expected: list[int]):
    frames = load(clips[name], **wish)
    assert numbers(frames) == expected
    assert frames.timestamps == pytest.approx(np.array(expected) / 10, abs=1e-3)
    assert frames.notes == ()


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("wish", [{"frames": 4}, {"frames": 20}, {"fps": 2}, {"frames": 2, "start": 1.5}])
def test_seeking_finds_what_reading_through_finds(clips: dict[str, Path], name: str, wish: dict[str, float]):
    through, seeking = load(clips[name], **wish), load(clips[name], limits=SEEKING, **wish)
    assert numbers(seeking) == numbers(through)
    assert seeking.key == through.key or seeking.timestamps == pytest.approx(through.timestamps, abs=1e-3)


@pytest.mark.parametrize("num", [1, 2, 3])
def test_clips_of_one_two_and_three_frames(tmp_path: Path, num: int):
    path = attacks.write_clip(tmp_path / "a.mp4", num)
    frames = load(path, frames=64)
    assert numbers(frames) == list(range(num))
    assert frames.notes == (f"{'1 frame' if num == 1 else f'{num} frames'} used: the clip has no more",)
    assert frames.duration_s == pytest.approx(num / 10)


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_variable_frame_rate_is_sampled_in_time(tmp_path: Path, suffix: str):
    times = [0, 0.1, 0.2, 0.3, 0.4, 0.5, 4.0, 8.0]
    path = attacks.write_clip(tmp_path / f"a.{suffix}", times_s=times, options={"bf": "0"})
    assert load(path, frames=8).timestamps == pytest.approx(times, abs=2e-3)
    by_time = load(path, fps=0.25)
    assert numbers(by_time)[:3] == [0, 6, 7]
    assert by_time.timestamps[:3] == pytest.approx([0, 4, 8], abs=2e-3)


def test_edited_clip_shows_only_what_is_left(tmp_path: Path):
    """An edit list that starts at frame 5: the frames before it are decoded and not shown, time starts there."""
    data = bytearray(attacks.write_clip(tmp_path / "a.mp4", options={"g": "20", "bf": "0"}).read_bytes())
    at = data.index(b"elst") + 16  # media time of the first entry, in ticks of the stream
    with av.open(str(tmp_path / "a.mp4")) as container:
        ticks = round(0.5 / float(container.streams.video[0].time_base))
    data[at : at + 4] = ticks.to_bytes(4, "big")
    (tmp_path / "b.mp4").write_bytes(data)
    frames = load(tmp_path / "b.mp4", frames=64)
    assert numbers(frames) == list(range(5, 20))
    assert frames.timestamps[:2] == pytest.approx([0, 0.1])


# ---- pictures

CLOCKWISE, HALF, ANTICLOCKWISE = (0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0)


@pytest.mark.parametrize(("matrix", "turns"), [(CLOCKWISE, -1), (HALF, 2), (ANTICLOCKWISE, 1)])
@pytest.mark.parametrize("limits", [MediaLimits(), SEEKING])
def test_rotation_is_applied(tmp_path: Path, matrix: tuple[int, int, int, int], turns: int, limits: MediaLimits):
    stored = np.full((48, 64, 3), 40, np.uint8)
    stored[:16, :16] = (230, 30, 30)  # red in the upper left corner
    plain = attacks.write_clip(tmp_path / "a.mp4", 3, picture=lambda _: stored)
    (tmp_path / "b.mp4").write_bytes(attacks.rotated(plain.read_bytes(), matrix))
    frames = load(tmp_path / "b.mp4", frames=3, limits=limits)
    assert np.abs(frames.rgb[0].astype(int) - np.rot90(stored, turns)).mean() < 6
    assert frames.rgb.flags.c_contiguous


@pytest.mark.parametrize(
    ("size", "codec", "pix_fmt"),
    [((65, 47), "libvpx-vp9", "yuv420p"), ((66, 34), "mpeg4", "yuv420p"), ((35, 51), "libx264", "yuv444p")],
)
def test_odd_sizes(tmp_path: Path, size: tuple[int, int], codec: str, pix_fmt: str):
    frames = load(attacks.write_clip(tmp_path / "a.mkv", 5, size=size, codec=codec, pix_fmt=pix_fmt), frames=5)
    assert frames.rgb.shape == (5, size[1], size[0], 3)
    assert numbers(frames) == list(range(5))


COLOURS = np.array([[220, 40, 40], [40, 200, 60], [50, 60, 220], [230, 220, 60]], np.uint8)


def bars(_: int) -> np.ndarray:
    return np.repeat(np.broadcast_to(COLOURS[None], (48, 4, 3)), 16, axis=1)


@pytest.mark.parametrize(
    ("codec", "pix_fmt"),
    [("libx264", "yuv420p"), ("libx264", "yuv444p"), ("libx264", "yuv420p10le"), ("libx265", "yuv420p10le")],
)
def test_colours(tmp_path: Path, codec: str, pix_fmt: str):
    path = attacks.write_clip(tmp_path / "a.mp4", 2, codec=codec, pix_fmt=pix_fmt, picture=bars, options={"crf": "4"})
    got = load(path, frames=1).rgb[0, 24, 8::16]
    assert np.abs(got.astype(int) - COLOURS).max() <= 6


def test_pixels_that_are_not_square_stay_as_stored_with_a_note(tmp_path: Path):
    def stretch(stream: av.VideoStream) -> None:
        stream.codec_context.sample_aspect_ratio = Fraction(4, 3)

    frames = load(attacks.write_clip(tmp_path / "a.mp4", set_up=stretch), frames=4)
    assert frames.rgb.shape == (4, 48, 64, 3)
    assert frames.notes == ("pixels are not square (4:3); the picture is used as stored, not stretched",)


def test_interlaced_fields_stay_woven_with_a_note(tmp_path: Path):
    frames = load(attacks.write_clip(tmp_path / "a.mp4", options={"x264-params": "interlaced=1"}), frames=4)
    assert numbers(frames) == [2, 7, 12, 17]
    assert frames.notes == ("interlaced: both fields of a picture are used, woven into one",)


def test_a_change_of_size_within_the_clip_is_scaled_with_a_note(tmp_path: Path):
    small, large = (attacks.write_clip(tmp_path / f"{w}.ts", 5, size=(w, 48)) for w in (64, 96))
    joined = tmp_path / "a.ts"
    joined.write_bytes(small.read_bytes() + large.read_bytes())
    frames = load(joined, frames=10)
    assert frames.rgb.shape == (10, 48, 64, 3)
    assert numbers(frames) == [0, 1, 2, 3, 4] * 2  # although the times start again
    assert frames.timestamps == pytest.approx(np.arange(10) / 10)
    assert frames.notes == ("the picture size changes within the clip; all frames were scaled to 64 x 48",)


def test_cover_art_is_no_video(tmp_path: Path):
    try:
        path = attacks.sound_only(tmp_path / "a.mp4", cover=True)
    except TypeError:
        pytest.skip("this PyAV cannot mark a stream as cover art")
    with av.open(str(path)) as container:
        assert len(container.streams.video) == 1
    with pytest.raises(UnsupportedMedia, match="expected a video stream, found none"):
        load(path)


# ---- identity


def test_the_key_is_that_of_the_content(clips: dict[str, Path], tmp_path: Path):
    copy = tmp_path / "other name.bin"
    copy.write_bytes(clips["h264.mp4"].read_bytes())
    assert load(copy, frames=4).key == load(clips["h264.mp4"], frames=4).key
    assert load(copy, frames=4).key != load(copy, frames=5).key
    assert load(copy, frames=4).source == str(copy)


def test_the_same_pictures_at_other_times_are_other_media(tmp_path: Path):
    grey = np.full((48, 64, 3), 90, np.uint8)
    quick, slow = (
        load(attacks.write_clip(tmp_path / f"{rate}.mp4", 4, rate=rate, picture=lambda _: grey), frames=4)
        for rate in (10, 5)
    )
    assert (quick.rgb == slow.rgb).all()
    assert quick.key != slow.key


@pytest.mark.skipif("not hasattr(__import__('os'), 'fsencode') or __import__('sys').platform != 'linux'")
@pytest.mark.parametrize(
    "name", ["with space.mp4", "http:.mp4", "concat:a|b.mp4", "-x.mp4", "100%20?#.mp4", "\udcff.mp4"]
)
def test_odd_file_names(clips: dict[str, Path], tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(clips["h264.mp4"].read_bytes())
    frames = load(Path(name), frames=4)
    assert numbers(frames) == [2, 7, 12, 17]
    assert frames.source.isprintable()


# ---- cost, progress, cancelling


class Watch:
    """A progress callback that keeps what it saw, and may raise after `stop_after` calls."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.seen: list[Progress] = []
        self._stop_after = stop_after

    def __call__(self, step: Progress) -> None:
        self.seen.append(step)
        if len(self.seen) == self._stop_after:
            raise KeyboardInterrupt


@pytest.mark.parametrize("limits", [MediaLimits(), SEEKING])
def test_progress(clips: dict[str, Path], limits: MediaLimits):
    watch = Watch()
    load_video(Video(clips["h264.mp4"], frames=4), default_frames=8, progress=watch, limits=limits)
    assert {(step.stage, step.unit) for step in watch.seen} == {("decode", "frames")}
    known = [step for step in watch.seen if step.total is not None]
    assert {step.total for step in known} == {4}
    done = [step.done for step in known]
    assert done == sorted(done)
    assert done[0] == 0


@pytest.mark.parametrize("stop_after", [1, 2, 3, 7])
@pytest.mark.parametrize("limits", [MediaLimits(), SEEKING])
def test_what_progress_raises_comes_through_and_the_file_is_closed(
    clips: dict[str, Path], stop_after: int, limits: MediaLimits
):
    with pytest.raises(KeyboardInterrupt):
        load_video(Video(clips["h264.mkv"], frames=9), default_frames=8, progress=Watch(stop_after), limits=limits)
    fds = Path("/proc/self/fd")
    if not fds.exists():
        pytest.skip("needs /proc")
    assert not [fd for fd in fds.iterdir() if fd.is_symlink() and "h264.mkv" in str(fd.readlink())]


@pytest.mark.parametrize("limits", [MediaLimits(), MediaLimits(index_bytes=0)])
def test_eight_frames_of_a_day_decode_a_bounded_number(day: Path, limits: MediaLimits):
    watch = Watch()
    begin = time.perf_counter()
    frames = load_video(Video(day, frames=8), default_frames=8, progress=watch, limits=limits)
    assert time.perf_counter() - begin < 5
    assert numbers(frames) == [540 + 1080 * i for i in range(8)]
    assert frames.duration_s == pytest.approx(86_400)
    assert len(watch.seen) < 8 * 260  # of 8,640: one call per decoded frame, at most one group of pictures each


def test_the_end_of_a_day_is_entered_by_seeking(day: Path):
    watch = Watch()
    video = Video(day, frames=2, start=86_000, end=86_400)
    frames = load_video(video, default_frames=8, progress=watch, limits=MediaLimits(index_bytes=0))
    assert numbers(frames) == [8610, 8630]
    assert len(watch.seen) < 260


def test_a_file_that_cannot_be_sought_is_read_through(clips: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    """Headers without a duration, or seeks that land nowhere, end in the slow and sure way."""
    from sparsevila.engine import video as reader

    monkeypatch.setattr(reader, "_SEEK_BACK_S", ())
    assert numbers(load(clips["h264.mp4"], frames=4, limits=SEEKING)) == [2, 7, 12, 17]


def test_limits_before_decoding(clips: dict[str, Path]):
    watch = Watch()
    limits = MediaLimits(rgb_bytes=5 * 48 * 64 * 3)
    with pytest.raises(InvalidRequest, match=r"19 frames of 64 x 48 .* at most 5 frames"):
        load_video(Video(clips["h264.mp4"], frames=19), default_frames=8, progress=watch, limits=limits)
    assert not [step for step in watch.seen if step.total is not None]
    assert len(load(clips["h264.mp4"], default_frames=19, limits=limits).rgb) == 5


# ---- bundled clips


@pytest.mark.parametrize("name", ["shapes.mp4", "street.mp4"])
def test_bundled_clips(name: str):
    frames = load_media(Video(ASSETS / "clips" / name, frames=75), default_frames=8)
    assert frames.rgb.shape == (75, 240, 320, 3)
    assert frames.duration_s == pytest.approx(5)
    assert frames.notes == ()
    assert np.abs(frames.rgb[0].astype(int) - frames.rgb[-1]).mean() > 5  # something happens


def test_the_shapes_are_where_the_script_says():
    rgb = load_media(Video(ASSETS / "clips" / "shapes.mp4", frames=75), default_frames=8).rgb.astype(int)
    assert rgb[0, 86, 88].argmax() == 2  # a blue square
    assert rgb[40, 86, 88].argmax() == 1  # has turned green
    assert rgb[74, 86, 88].min() > 200  # and gone
    assert rgb[20, 82, 226].min() > 200  # no star yet
    assert rgb[60, 82, 226, 2] < 120  # a yellow one
    assert rgb[0, 170, 34].argmax() == rgb[74, 170, 286].argmax() == 0  # the red disc, left and right


# ---- the other backend


def test_unknown_backend(clips: dict[str, Path]):
    with pytest.raises(InvalidRequest, match="expected 'pyav' or 'decord'"):
        load_media(Video(clips["h264.mp4"]), default_frames=8, backend="opencv")


def test_decord_missing_is_said_plainly(clips: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "decord", None)
    with pytest.raises(UnsupportedMedia, match="decord2 is not installed") as caught:
        load_media(Video(clips["h264.mp4"]), default_frames=8, backend="decord")
    assert "pip install" in caught.value.hint


@pytest.mark.parametrize("name", ["h264.mp4", "h264.mkv", "vp9_hidden_frames.webm", "av1.mp4", "mjpeg.mov"])
@pytest.mark.parametrize("wish", [{"frames": 7}, {"frames": 64}, {"fps": 2, "start": 0.5}])
def test_decord_gives_the_same_frames(clips: dict[str, Path], name: str, wish: dict[str, float]):
    pytest.importorskip("decord", reason="needs decord2")
    ours = load_media(Video(clips[name], **wish), default_frames=8)  # type: ignore[arg-type]
    watch = Watch()
    theirs = load_media(Video(clips[name], **wish), default_frames=8, backend="decord", progress=watch)  # type: ignore[arg-type]
    assert theirs.timestamps == pytest.approx(ours.timestamps, abs=1e-5)
    assert theirs.duration_s == pytest.approx(ours.duration_s, abs=1e-5)
    assert np.abs(theirs.rgb.astype(int) - ours.rgb).max() <= 2
    assert theirs.notes == ours.notes
    assert watch.seen[-1].done == len(theirs.rgb)


def test_decord_turns_half_round_the_same_way_and_quarters_are_refused(clips: dict[str, Path], tmp_path: Path):
    pytest.importorskip("decord", reason="needs decord2")
    path = tmp_path / "a.mp4"
    path.write_bytes(attacks.rotated(clips["h264.mp4"].read_bytes(), HALF))
    ours, theirs = (load_media(Video(path, frames=3), default_frames=8, backend=b) for b in ("pyav", "decord"))
    assert np.abs(theirs.rgb.astype(int) - ours.rgb).max() <= 2
    path.write_bytes(attacks.rotated(clips["h264.mp4"].read_bytes(), CLOCKWISE))
    with pytest.raises(UnsupportedMedia, match="expected 3"):
        load_media(Video(path, frames=3), default_frames=8, backend="decord")
