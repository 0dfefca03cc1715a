"""Bad media: each is refused with a typed error and a plain sentence, or used as far as it can be read.

Nothing is opened that the user did not name, and no header makes the process allocate.
"""

from __future__ import annotations

import http.server
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import PIL.Image
import pytest

from sparsevila.engine.config import Image, Video
from sparsevila.engine.media import load_image, load_media, load_video
from sparsevila.engine.media_file import LIMITS, FileKind, MediaLimits
from sparsevila.engine.video import _Reading
from sparsevila.errors import (
    CorruptMedia,
    ImageTooLarge,
    ImageTooNarrow,
    ImageTooSmall,
    InvalidRequest,
    MediaError,
    MediaNotFound,
    NotARegularFile,
    RemoteMediaRefused,
    SparseVILAError,
    UnsupportedMedia,
)
from sparsevila.models.interface import Progress, no_progress
from sparsevila.tests.attacks import media as attacks

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test runs inside its folder, so that a path in a message that was not typed shows."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


WEBM_SIZE = (320, 256)


def written(name: str, data: bytes) -> str:
    Path(name).write_bytes(data)
    return name


def noisy_clip(name: str) -> Path:
    """Sixty frames at ten per second, a key frame every ten."""
    codec = "mpeg4" if name.endswith("avi") else "libx264"
    fast = {"movflags": "faststart"} if name.endswith("mp4") else {}
    return attacks.write_clip(
        Path(name), 60, codec=codec, picture=attacks.numbered_noise, options={"g": "10"}, container_options=fast
    )


def cut(path: Path, share: float) -> Path:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    return path


# ---- rows 1 to 13 and 15: one table of what is refused


@dataclass(frozen=True)
class Case:
    make: Callable[[], Image | Video]
    error: type[SparseVILAError]
    words: str  # a regular expression that the message matches


def _fifo() -> Video:
    os.mkfifo("pipe.mp4")
    return Video("pipe.mp4")


def _socket() -> Image:
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind("s.png")
    return Image("s.png")


def _unreadable() -> Video:
    attacks.write_clip(Path("a.mp4"))
    os.chmod("a.mp4", 0)
    return Video("a.mp4")


def _clip(patch: Callable[[bytes], bytes] = bytes, **wish: float) -> Video:
    path = attacks.fast_start(Path("whole.mp4"))
    return Video(written("a.mp4", patch(path.read_bytes())), **wish)  # type: ignore[arg-type]


def _webm(name: str, patch: Callable[[bytes], bytes]) -> Video:
    data = attacks.write_clip(Path("whole.webm"), 3, size=WEBM_SIZE, codec="libvpx").read_bytes()
    return Video(written(name, patch(data)))


def _header_of_65535() -> Video:
    return _webm("header.webm", lambda data: attacks.webm_claiming_size(data, WEBM_SIZE, 65_535))


def _stream_of_12000() -> Video:
    return _webm("stream.webm", lambda data: attacks.vp8_claiming_size(data, 12_000, 12_000))


def _png_stream() -> Video:
    return Video(attacks.write_clip(Path("a.mov"), 3, codec="png", pix_fmt="rgb24").name)


def _cut_end() -> Video:
    return Video(cut(attacks.write_clip(Path("a.mp4"), 60), 0.5).name)


def _cut_start_strict() -> Video:
    return Video(cut(noisy_clip("a.mp4"), 0.6).name, strict=True)


def _cut_start_past() -> Video:
    return Video(cut(noisy_clip("a.mp4"), 0.6).name, start=5.5)


def _zeroed(data: bytes) -> bytes:
    at = data.index(b"mdat") + 8
    return data[:at] + bytes(len(data) - at)


def _video(name: str, data: bytes) -> Callable[[], Video]:
    return lambda: Video(written(name, data))


def _image(name: str, data: bytes) -> Callable[[], Image]:
    return lambda: Image(written(name, data))


PNG = attacks.good_png()

CASES = {
    "1 missing": Case(lambda: Video("none.mp4"), MediaNotFound, "none.mp4: no such file"),
    "1 missing image": Case(lambda: Image("none.png"), MediaNotFound, "none.png: no such file"),
    "1 directory": Case(lambda: Video("."), NotARegularFile, "a directory"),
    "1 below a file": Case(lambda: Video(written("a", b"x") + "/b.mp4"), MediaNotFound, "cannot be found"),
    "1 name with NUL": Case(lambda: Video("a\0b.mp4"), MediaNotFound, "a\\?b.mp4: cannot be found"),
    "1 endless name": Case(lambda: Image("a" * 5000), MediaNotFound, "aaa…: cannot be found"),
    "1 empty name": Case(lambda: Video(""), MediaNotFound, "no such file"),
    "2 empty": Case(_video("a.mp4", b""), UnsupportedMedia, "an empty file"),
    "2 text": Case(_video("a.mp4", b"dear diary, today\n" * 99), UnsupportedMedia, "a text file"),
    "2 random": Case(_video("a.mp4", np.random.default_rng(0).bytes(5000)), UnsupportedMedia, "unknown content"),
    "2 PNG as video": Case(_video("a.mp4", PNG), UnsupportedMedia, "this is a PNG image; use --image"),
    "2 GIF as video": Case(_video("a.mp4", attacks.gif_screen(8, 8)), UnsupportedMedia, "a GIF image; use --image"),
    "2 MP4 as image": Case(
        lambda: Image(_clip().source), UnsupportedMedia, "this is an MP4 or QuickTime video; use --video"
    ),
    "2 PDF": Case(_video("a.mp4", b"%PDF-1.7\n"), UnsupportedMedia, "a PDF document"),
    "3 no index": Case(_cut_end, CorruptMedia, "the index is missing; likely an unfinished recording"),
    "3 index itself cut": Case(
        lambda: Video(cut(attacks.fast_start(Path("a.mp4")), 0.02).name), CorruptMedia, "the index is missing"
    ),
    "4 strict": Case(
        _cut_start_strict, CorruptMedia, r"the file is cut or damaged: readable up to \d\.\d\d s of 6\.00 s"
    ),
    "4 start in what is lost": Case(_cut_start_past, InvalidRequest, r"start is 5\.5 s, the clip ends at \d\.\d\d s"),
    "5 all zeros": Case(lambda: _clip(_zeroed), CorruptMedia, "damaged"),
    "6 sound only": Case(
        lambda: Video(attacks.sound_only(Path("a.mp4")).name), UnsupportedMedia, "expected a video stream"
    ),
    "6 no frames": Case(lambda: _clip(lambda data: attacks.mp4_claiming_sizes(data, 1, 0)), CorruptMedia, "damaged"),
    "8 http": Case(lambda: Video("http://127.0.0.1:9/a.mp4"), RemoteMediaRefused, "got a http: address"),
    "8 HTTPS": Case(lambda: Image("HTTPS://127.0.0.1:9/a.png"), RemoteMediaRefused, "got a https: address"),
    "8 as a Path": Case(lambda: Image(Path("http://127.0.0.1:9/a.png")), RemoteMediaRefused, "a http: address"),
    "8 file": Case(lambda: Video("file:///etc/hostname"), RemoteMediaRefused, "a file: address"),
    "8 rtsp": Case(lambda: Video(" rtsp://127.0.0.1/x"), RemoteMediaRefused, "a rtsp: address"),
    "8 data": Case(
        lambda: Image("data:image/png;base64," + "A" * (200 << 20)),
        RemoteMediaRefused,
        "AAA…: expected the path of a local file",
    ),
    "10 codec": Case(_png_stream, UnsupportedMedia, "codec png, expected one of h264"),
    "11 frames": Case(
        lambda: _clip(lambda data: attacks.mp4_claiming_frames(data, 10**9)),
        UnsupportedMedia,
        "claims 1000000000 frames",
    ),
    "11 packets": Case(
        lambda: _clip(lambda data: attacks.mp4_claiming_sizes(data, 1, 10**9)), CorruptMedia, "damaged|no frame"
    ),
    "11 size in the stream": Case(_stream_of_12000, CorruptMedia, "no frame can be decoded|of the packets"),
    "11 image": Case(_image("a.png", attacks.png(65_535, 65_535)), ImageTooLarge, "65535 x 65535"),
    "12 start": Case(lambda: _clip(start=6.0), InvalidRequest, r"start is 6 s, the clip ends at 6\.00 s"),
    "12 end": Case(lambda: Video("a", start=3, end=2), InvalidRequest, "expected more than start"),
    "12 fps 0": Case(lambda: Video("a", fps=0), InvalidRequest, "above 0"),
    "12 fps NaN": Case(lambda: Video("a", fps=float("nan")), InvalidRequest, "finite"),
    "12 frames -1": Case(lambda: Video("a", frames=-1), InvalidRequest, "at least 1"),
    "13 1x1": Case(_image("a.png", attacks.png(1, 1)), ImageTooSmall, "1 x 1"),
    "13 1x100,000": Case(_image("a.png", attacks.png(1, 100_000)), ImageTooNarrow, "200 to 1"),
    "13 88 megapixels": Case(_image("a.png", attacks.png(9400, 9400)), ImageTooLarge, "32 megapixels"),
    "14 cut": Case(_image("a.png", PNG[:-30]), CorruptMedia, "damaged or incomplete"),
    "14 zTXt": Case(_image("a.png", attacks.text_bomb(5)), CorruptMedia, "damaged or incomplete"),
}
if sys.platform == "linux":
    CASES |= {
        "1 pipe": Case(_fifo, NotARegularFile, "expected a file, got a pipe"),
        "1 socket": Case(_socket, NotARegularFile, "a socket"),
        "1 device": Case(lambda: Video("/dev/zero"), NotARegularFile, "/dev/zero: expected a file, got a device"),
        "1 device image": Case(lambda: Image("/dev/random"), NotARegularFile, "a device"),
    }
    if os.geteuid():
        CASES["1 unreadable"] = Case(_unreadable, MediaNotFound, "permission denied")


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", CASES)
def test_refused_in_plain_words(name: str, folder: Path, capfd: pytest.CaptureFixture[str]):
    case = CASES[name]
    with pytest.raises(SparseVILAError) as caught:
        load_media(case.make(), default_frames=4)
    error = caught.value
    message = f"{error} {error.hint}"
    assert type(error) is case.error
    assert re.search(case.words, str(error))
    assert len(message) < 500
    assert "\n" not in message
    # No address, no path that was not typed, no words of a library, and no way to them by the chain.
    assert "0x" not in message
    assert str(folder) not in message
    typed = ("/dev/zero", "/dev/random", "/etc/hostname", "127.0.0.1", "data:image/png")
    assert name.startswith("8") or not re.findall(r"(?<![\w.<])/\w[^\s:]*", _without(message, typed))
    assert not re.search(r"Errno|Invalid data found|cannot identify|avcodec|PIL|BytesIO", message)
    assert error.__cause__ is None
    assert error.__context__ is None or error.__suppress_context__
    shown = capfd.readouterr()
    assert "av_" not in shown.err
    assert "@ 0x" not in shown.err  # FFmpeg's own log lines


def _without(message: str, words: tuple[str, ...]) -> str:
    for word in words:
        message = message.replace(word, "")
    return message


def test_that_the_message_check_can_fail(folder: Path):
    """What Pillow and FFmpeg say themselves holds an address, and a path that was not typed."""
    with pytest.raises(PIL.UnidentifiedImageError, match="0x"), open(written("a.txt", b"no picture"), "rb") as file:
        PIL.Image.open(__import__("io").BytesIO(file.read()))
    with pytest.raises(av.error.InvalidDataError, match=str(folder)):
        av.open(str(folder / written("b.txt", b"no video")))


# ---- row 4 and 5: the readable part


@pytest.mark.parametrize("limits", [LIMITS, MediaLimits(index_bytes=0)])
def test_fast_start_cut_at_60_percent_gives_what_is_there(limits: MediaLimits):
    path = cut(noisy_clip("a.mp4"), 0.6)
    frames = load_video(Video(path, frames=5), default_frames=4, limits=limits)
    assert len(frames.rgb) == 5
    assert attacks.numbers_of(frames.rgb) == [round(t * 10) for t in frames.timestamps]
    assert 2 < frames.timestamps[-1] < frames.duration_s < 5
    (note,) = [note for note in frames.notes if "the file is cut" in note]
    last, share = re.search(r"up to (\d\.\d\d) s of 6\.00 s \((\d+)%\)", note).groups()  # type: ignore[union-attr]
    assert float(last) == pytest.approx(frames.duration_s, abs=0.01)
    assert int(share) == pytest.approx(100 * float(last) / 6, abs=1)


@pytest.mark.parametrize("name", ["a.mkv", "a.avi"])
def test_other_containers_cut_say_so_too(name: str):
    path = cut(noisy_clip(name), 0.6)
    frames = load_video(Video(path, frames=4), default_frames=4)
    assert attacks.numbers_of(frames.rgb) == [round(t * 10) for t in frames.timestamps]
    assert any("the file is cut" in note for note in frames.notes)
    with pytest.raises(CorruptMedia, match="cut"):
        load_video(Video(path, frames=4, strict=True), default_frames=4)


def test_whole_files_are_not_called_cut():
    for name in ("a.mp4", "a.mkv", "a.avi", "a.ts", "a.webm"):
        path = attacks.write_clip(Path(name), codec="libvpx" if name == "a.webm" else "libx264")
        assert load_video(Video(path, frames=4, strict=True), default_frames=4).notes == ()


def test_bad_packets_are_skipped_with_a_note_and_refused_if_strict():
    path = noisy_clip("a.avi")
    data = bytearray(path.read_bytes())
    for at in range(len(data) // 2, len(data) // 2 + 3000):
        data[at] ^= 0x5A
    path.write_bytes(data)
    frames = load_video(Video(path, frames=60), default_frames=4)
    assert 40 <= len(frames.rgb) <= 60
    assert any(re.search(r"^\d+ of \d+ packets read are damaged", note) for note in frames.notes)
    with pytest.raises(CorruptMedia, match="packets read are damaged"):
        load_video(Video(path, frames=60, strict=True), default_frames=4)


def test_too_many_bad_packets_are_refused():
    path = noisy_clip("a.avi")
    data = bytearray(path.read_bytes())
    chance = np.random.default_rng(0)
    for at in chance.integers(6000, len(data) - 1000, 3000):
        data[at] ^= 0x5A
    path.write_bytes(data)
    with pytest.raises(CorruptMedia, match="of the packets read, expected at most 50%"):
        load_video(Video(path, frames=60), default_frames=4)
    lenient = load_video(Video(path, frames=60), default_frames=4, limits=MediaLimits(damaged_share=1.0))
    assert len(lenient.rgb) > 0  # it is the limit that refuses


def test_a_lost_key_frame_leaves_neighbours_and_no_repeats():
    """The third group of pictures is gone: the frames around it are used, each once."""
    path = attacks.fast_start(Path("a.mp4"))
    with av.open(str(path)) as container:
        third = [p for p in container.demux(video=0) if p.is_keyframe and p.size][2]
        start, length = third.pos, third.size
    data = bytearray(path.read_bytes())
    data[start : start + length] = bytes(length)
    path.write_bytes(data)
    frames = load_video(Video(path, frames=60), default_frames=4)
    assert len(set(frames.timestamps.tolist())) == len(frames.timestamps) <= 60
    assert (np.diff(frames.timestamps) > 0).all()
    assert any("damaged" in note for note in frames.notes)


# ---- row 7: playlists under any name


@pytest.fixture
def server() -> Iterator[tuple[str, list[str]]]:
    """An address on this machine and the list of requests that reached it."""
    requests: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requests.append(self.path)
            self.send_error(404)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{running.server_address[1]}/clip.ts", requests
        running.shutdown()


@pytest.mark.parametrize("kind", attacks.PLAYLISTS)
@pytest.mark.parametrize("name", ["a.mp4", "a.m3u8", "a.mkv", "a.mpd", "a.png"])
@pytest.mark.parametrize("backend", ["pyav", "decord"])
def test_playlists_are_refused_without_a_request(
    kind: str, name: str, backend: str, server: tuple[str, list[str]], folder: Path
):
    if backend == "decord":
        pytest.importorskip("decord", reason="needs decord2")
    url, requests = server
    secret = attacks.write_clip(folder / "secret.ts", 2)
    written(name, attacks.PLAYLISTS[kind].format(url=url, file=secret).encode())
    with pytest.raises(UnsupportedMedia, match="a playlist"):
        load_media(Video(name), default_frames=4, backend=backend)
    with pytest.raises(UnsupportedMedia, match="a playlist"):
        load_image(Image(name))
    assert requests == []


@pytest.mark.parametrize("kind", ["hls", "dash", "concat"])
def test_the_white_lists_alone_hold_too(kind: str, server: tuple[str, list[str]], folder: Path):
    """With the sniffing taken away the named reader refuses, and nothing is fetched."""
    url, requests = server
    name = written("a.mp4", attacks.PLAYLISTS[kind].format(url=url, file=folder / "none.ts").encode())
    reading = _Reading(Video(name), 4, no_progress, LIMITS, FileKind("video", "mov", "a video"), cut=False)
    with pytest.raises(CorruptMedia):
        reading.by_index(counted=False)
    assert requests == []


def test_that_the_request_counter_can_fail(server: tuple[str, list[str]], folder: Path):
    """Without any of it FFmpeg fetches what a playlist names, if it comes as a Python file object."""
    url, requests = server
    name = written("a.mp4", attacks.PLAYLISTS["hls"].format(url=url, file=url).encode())
    with open(name, "rb") as file, pytest.raises(av.error.FFmpegError):
        av.open(file, format="hls")
    assert requests


@LINUX
def test_no_other_file_is_opened(server: tuple[str, list[str]], folder: Path):
    """System calls of a child that reads two playlists and one clip: the clip is opened, what the lists name is not."""
    if not shutil.which("strace"):
        pytest.skip("needs strace")
    url, requests = server
    clip, secret = attacks.write_clip(folder / "clip.mp4", 4), attacks.write_clip(folder / "secret.ts", 2)
    for kind in ("hls", "concat"):
        written(f"{kind}.mp4", attacks.PLAYLISTS[kind].format(url=url, file=secret).encode())
    body = """
        for name in ("hls.mp4", "concat.mp4", "clip.mp4"):
            try:
                load_media(Video(name), default_frames=2)
            except MediaError:
                print(name)
    """
    trace = folder / "trace"
    probe = subprocess.run(["strace", "-f", "-o", str(trace), "true"], capture_output=True, check=False)
    if probe.returncode:
        pytest.skip("strace may not trace here")
    calls = "trace=open,openat,openat2,connect"
    done = run_child(body, before=["strace", "-f", "-qq", "-e", calls, "-o", str(trace)])
    assert done.stdout.split() == ["hls.mp4", "concat.mp4"]
    seen = trace.read_text()
    assert "clip.mp4" in seen  # the tracer sees FFmpeg's own calls
    assert "secret.ts" not in seen
    assert "AF_INET" not in seen
    assert requests == []
    assert clip.exists()


# ---- rows 10, 11, 13: memory, in a child process with an address limit


def run_child(body: str, before: list[str] | None = None, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    """Runs Python lines with the names below in a process of its own. Fails if it crashes or hangs."""
    program = textwrap.dedent("""
        import json, resource, sys
        import av, numpy as np
        import PIL.BmpImagePlugin, PIL.GifImagePlugin, PIL.JpegImagePlugin, PIL.PngImagePlugin, PIL.WebPImagePlugin
        from pathlib import Path
        from sparsevila.engine.config import Image, Video
        from sparsevila.engine.media import load_image, load_media
        from sparsevila.engine.media_file import MediaLimits
        from sparsevila.errors import MediaError, SparseVILAError
        import sparsevila.engine.images, sparsevila.engine.video

        def peak():
            # Not `getrusage`: its maximum is inherited from the parent.
            status = Path("/proc/self/status").read_text()
            return int(status.partition("VmHWM:")[2].split()[0]) << 10

        def allow(more_bytes):
            now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (now + more_bytes, now + more_bytes))
    """)
    done = subprocess.run(
        [*(before or []), sys.executable, "-c", program + textwrap.dedent(body)],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done


BOMBS: tuple[Callable[[], bytes], ...] = (
    lambda: attacks.black_png(9400, 9400),  # 88 megapixels, real ones
    lambda: attacks.png(60_000, 60_000),
    lambda: attacks.png(65_535, 65_535),
    lambda: attacks.png(1, 100_000),
    lambda: attacks.webp_canvas(16_384, 16_384),
    lambda: attacks.gif_screen(65_535, 65_535),
    lambda: attacks.bmp_header(60_000, 60_000),
    lambda: attacks.text_bomb(120),
)


@LINUX
def test_bombs_and_lying_headers_allocate_nothing(folder: Path):
    for i, make in enumerate(BOMBS):
        written(f"{i}.bomb", make())
    videos = [_clip(lambda data: attacks.mp4_claiming_frames(data, 10**9)), _stream_of_12000()]
    for more in ((1, 10**9), (0, 10**9), (1, 2**31)):
        data = Path("whole.mp4").read_bytes()
        videos.append(Video(written(f"{more}.mp4", attacks.mp4_claiming_sizes(data, *more))))
    names = [str(video.source) for video in videos]
    # One good file of each kind first: what a decoder allocates once is not the bomb's.
    Path("good.png").write_bytes(attacks.good_png())
    body = f"""
        load_image(Image("good.png"))
        for name in ("whole.mp4", "whole.webm"):
            load_media(Video(name), default_frames=2)
        allow(100_000_000)
        start, answers = peak(), []
        for item in [Image(f"{{i}}.bomb") for i in range({len(BOMBS)})] + [Video(name) for name in {names!r}]:
            try:
                load_media(item, default_frames=4)
                answers.append("read")
            except MediaError as error:
                answers.append(type(error).__name__)
        print(json.dumps([answers, peak() - start]))
    """
    answers, growth = json.loads(run_child(body).stdout)
    assert len(answers) == len(BOMBS) + len(names)
    assert "read" not in answers
    assert growth < 100_000_000


@LINUX
def test_that_a_bomb_does_harm_without_the_limits(folder: Path):
    written("a.png", BOMBS[0]())
    body = """
        start = peak()
        load_image(Image("a.png"), limits=MediaLimits(image_pixels=10**9))
        print(peak() - start)
    """
    assert int(run_child(body).stdout) > 250_000_000


@LINUX
def test_that_a_picture_larger_than_its_header_does_harm_without_the_limit(folder: Path):
    name = _stream_of_12000().source
    body = f"""
        load_media(Video("whole.webm"), default_frames=2)
        allow(200_000_000)
        try:
            with av.open("{name}") as container:
                for frame in container.decode(video=0):
                    print(frame.width)
        except (MemoryError, av.error.FFmpegError) as error:
            print(type(error).__name__)
    """
    assert "MemoryError" in run_child(body).stdout


def test_pictures_that_grow_past_the_limit_are_never_decoded(folder: Path):
    """Five pictures of 64 x 48, then five of 96 x 48 in the same stream; the limit lies between the two."""
    small, large = (attacks.write_clip(Path(f"{w}.ts"), 5, size=(w, 48)).read_bytes() for w in (64, 96))
    name = written("a.ts", small + large)
    frames = load_video(Video(name, frames=10), default_frames=2, limits=MediaLimits(frame_pixels=4000))
    assert len(frames.rgb) <= 5
    assert not any("size changes" in note for note in frames.notes)
    assert any("damaged" in note for note in frames.notes)


def test_what_ffmpeg_is_told_when_it_opens_a_file(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """The lists act while the file is opened, before there is anything else to look at."""
    told: dict[str, object] = {}
    original, video = av.open, _clip()

    def spy(name: str, **how: Any) -> object:
        told.update(how, name=name)
        return original(name, **how)

    monkeypatch.setattr(av, "open", spy)
    load_media(video, default_frames=2)
    assert told["name"] == "file:a.mp4"
    assert told["format"] == "mov"
    assert told["options"] == {
        "protocol_whitelist": "file",
        "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts",
        "codec_whitelist": "h264,hevc,vp8,vp9,av1,mpeg4,mjpeg,libdav1d",
        "max_pixels": "40000000",
        "enable_drefs": "0",
    }


def test_a_size_that_only_the_header_claims_is_not_believed():
    """The stream says 320 x 256, and that is what is checked and read."""
    frames = load_media(_header_of_65535(), default_frames=2)
    assert frames.rgb.shape == (2, 256, 320, 3)
    with pytest.raises(ImageTooLarge, match="320 x 256"):
        load_video(_header_of_65535(), default_frames=2, limits=MediaLimits(frame_pixels=80_000))


@LINUX
def test_frames_of_a_long_clip_do_not_pile_up(folder: Path):
    """One second of 4K at 30 frames, 750 MB as RGB: eight frames need those eight, and a few of the decoder's."""
    noise = np.zeros((2160, 3840, 3), np.uint8)
    attacks.write_clip(
        Path("a.mp4"), 30, rate=30, size=(3840, 2160), picture=lambda _: noise, options={"preset": "ultrafast"}
    )
    body = """
        start = peak()
        frames = load_media(Video("a.mp4", frames=8), default_frames=4)
        print(peak() - start - frames.rgb.nbytes)
    """
    assert int(run_child(body).stdout) < 350_000_000


@LINUX
def test_ctrl_c_reaches_a_decode(folder: Path):
    """A progress callback that raises after a while, as Ctrl-C does: nothing more is decoded."""
    path = attacks.write_clip(folder / "a.mp4", 200)
    calls = 0

    def stop(_: Progress) -> None:
        nonlocal calls
        calls += 1
        if calls == 50:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_video(Video(path, frames=200), default_frames=4, progress=stop)
    assert calls == 50


# ---- mutants


@pytest.mark.timeout(120)
def test_forty_mutants_of_three_clips_give_frames_or_a_typed_error(folder: Path):
    seeds = [
        noisy_clip("a.mp4"),
        attacks.write_clip(
            folder / "b.webm", 40, codec="libvpx-vp9", picture=attacks.numbered_noise, options={"cpu-used": "8"}
        ),
        noisy_clip("c.avi"),
    ]
    made = [m for i, seed in enumerate(seeds) for m in attacks.mutants(seed.read_bytes(), (14, 13, 13)[i], seed=i)]
    assert len(made) == 40
    for i, data in enumerate(made):
        written(f"{i}.mutant", data)
    body = """
        from sparsevila.engine.media import load_video
        read = refused = 0
        for i in range(40):
            for limits in (MediaLimits(), MediaLimits(index_bytes=0)):
                try:
                    frames = load_video(Video(f"{i}.mutant", frames=6), default_frames=4, limits=limits)
                    assert 1 <= len(frames.rgb) <= 6 and (np.diff(frames.timestamps) > 0).all()
                    read += 1
                except MediaError as error:
                    assert "0x" not in str(error)
                    refused += 1
        print(json.dumps([read, refused]))
    """
    read, refused = json.loads(run_child(body, timeout=60).stdout)
    assert read + refused == 80
    assert read >= 44  # more than half, although every other mutant is hit in its headers
    assert refused > 0


@pytest.mark.parametrize("error", [MediaError, MediaNotFound, CorruptMedia])
def test_media_errors_end_the_chat_program_with_4(error: type[MediaError]):
    assert error.exit_code == 4
