"""Makers of media for tests: small good clips and pictures, and files that lie, break off, or aim at a parser.

Everything is made when a test runs. A clip's frames carry their own number in black and white columns, so that
a test can tell which frames came back, and in which orientation.
"""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import PIL.Image
from av.stream import Disposition

Picture = Callable[[int], np.ndarray]

_BITS = 16
SIZE = (64, 48)  # width, height


# ---- good clips


def numbered(i: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """(H, W, 3) uint8: frame number i as 16 columns, highest bit first."""
    width, height = size
    bits = [(i >> (_BITS - 1 - b)) & 1 for b in range(_BITS)]
    columns = np.array(bits, np.uint8)[np.arange(width) * _BITS // width] * 215 + 20
    return np.broadcast_to(columns[None, :, None], (height, width, 3)).copy()


def numbered_noise(i: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """The same over a lower third of noise: so large a stream that damage hits pictures and not headers."""
    frame = numbered(i, size)
    third = size[1] // 3
    frame[-third:] = np.random.default_rng(i).integers(0, 255, (third, size[0], 3), dtype=np.uint8)
    return frame


def number_of(rgb: np.ndarray) -> int:
    """The number in an upright frame (H, W, 3)."""
    height, width, _ = rgb.shape
    middles = (np.arange(_BITS) * 2 + 1) * width // (2 * _BITS)
    bits = rgb[height // 2, middles].mean(-1) > 127
    return int(sum(int(bit) << (_BITS - 1 - b) for b, bit in enumerate(bits)))


def numbers_of(rgb: np.ndarray) -> list[int]:
    return [number_of(frame) for frame in rgb]


def write_clip(
    path: Path,
    num_frames: int = 20,
    *,
    rate: int | Fraction = 10,
    size: tuple[int, int] = SIZE,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    times_s: Sequence[float] | None = None,
    picture: Picture | None = None,
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    set_up: Callable[[av.VideoStream], None] | None = None,
) -> Path:
    """Encodes `num_frames` numbered frames, at equal distances or at `times_s`."""
    draw = picture or (lambda i: numbered(i, size))
    # With frames in flight x265 now and then gave packets that could not be muxed, on a busy machine one time in five.
    quiet = {"x265-params": "log-level=none", "tune": "zerolatency"} if codec == "libx265" else {}
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=rate, options={**quiet, **(options or {})})
        stream.width, stream.height = size
        stream.pix_fmt = pix_fmt
        stream.codec_context.thread_count = 1  # the same bytes every time
        if times_s is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        if set_up is not None:
            set_up(stream)
        for i in range(num_frames if times_s is None else len(times_s)):
            frame = av.VideoFrame.from_ndarray(draw(i), format="rgb24")
            if times_s is not None:
                frame.pts, frame.time_base = round(times_s[i] * 1000), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def fast_start(path: Path, num_frames: int = 60, **more: object) -> Path:
    """An MP4 whose index comes first, with a key frame every ten frames."""
    options = {"g": "10", "bf": "2"}
    return write_clip(path, num_frames, options=options, container_options={"movflags": "faststart"}, **more)  # type: ignore[arg-type]


def sound_only(path: Path, *, cover: bool = False) -> Path:
    """A moment of silence, with cover art on request: a stream of one picture that is no video."""
    with av.open(str(path), "w") as container:
        sound = container.add_stream("aac", rate=16_000)
        if cover:
            art = container.add_stream("mjpeg")
            art.width, art.height = SIZE
            art.pix_fmt, art.disposition = "yuvj420p", Disposition.attached_pic
            container.mux(art.encode(av.VideoFrame.from_ndarray(numbered(1), format="rgb24")))
            container.mux(art.encode(None))
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 16_000, 0
        container.mux(sound.encode(frame))
        container.mux(sound.encode(None))
    return path


def rotated(data: bytes, matrix: tuple[int, int, int, int]) -> bytes:
    """An MP4 with the matrix (a, b, c, d) of its track header set: x' = ax + cy, y' = bx + dy, y down."""
    a, b, c, d = (v * 0x10000 for v in matrix)
    at = data.index(b"tkhd") + 44
    return data[:at] + struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 0x40000000) + data[at + 36 :]


# ---- MP4 files that lie


def mp4_claiming_frames(data: bytes, count: int) -> bytes:
    """The table of times claims `count` frames of equal length."""
    at = data.index(b"stts") + 12
    return data[:at] + struct.pack(">I", count) + data[at + 4 :]


def mp4_claiming_sizes(data: bytes, sample_bytes: int, count: int) -> bytes:
    """The table of sizes claims `count` packets of `sample_bytes` each, all in one chunk."""
    at = data.index(b"stsz") + 8
    data = data[:at] + struct.pack(">II", sample_bytes, count) + data[at + 8 :]
    at = data.index(b"stsc") + 16
    return data[:at] + struct.pack(">I", count) + data[at + 4 :]


def webm_claiming_size(data: bytes, size: tuple[int, int], claimed: int) -> bytes:
    """The track's header claims a picture of `claimed` x `claimed`; both sides of `size` must be over 255."""
    for element, side in ((b"\xb0\x82", size[0]), (b"\xba\x82", size[1])):
        stated = element + struct.pack(">H", side)
        assert data.count(stated) == 1
        data = data.replace(stated, element + struct.pack(">H", claimed))
    return data


def vp8_claiming_size(data: bytes, width: int, height: int) -> bytes:
    """Every VP8 key frame claims this size (14 bits each): the stream is larger than its container says."""
    start = b"\x9d\x01\x2a"
    parts = data.split(start)
    return start.join([parts[0], *(struct.pack("<HH", width, height) + part[4:] for part in parts[1:])])


# ---- playlists: `{url}` and `{file}` are what they would fetch and open

PLAYLISTS = {
    "hls": "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{url}\n#EXTINF:10,\n{file}\n#EXT-X-ENDLIST\n",
    "dash": '<?xml version="1.0"?>\n<MPD type="static" mediaPresentationDuration="PT1S"><Period><AdaptationSet>'
    '<Representation id="1" mimeType="video/mp4"><BaseURL>{url}</BaseURL></Representation>'
    "</AdaptationSet></Period></MPD>",
    "concat": "ffconcat version 1.0\nfile '{url}'\nfile '{file}'\n",
    "pls": "[playlist]\nFile1={url}\n",
    "session": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n",
}


# ---- pictures


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(
    width: int, height: int, *, depth: int = 8, colour: int = 2, rows: bytes | None = None, chunks: bytes = b""
) -> bytes:
    """A PNG with this header, whatever its data say. `rows` None: no pixel data to speak of."""
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n" + header + chunks + _chunk(b"IDAT", zlib.compress(rows or b"", 9)) + _chunk(b"IEND", b"")
    )


def good_png(chunks: bytes = b"") -> bytes:
    """8 x 8 pixels of (16, 32, 48)."""
    return png(8, 8, rows=(b"\0" + bytes((16, 32, 48)) * 8) * 8, chunks=chunks)


def encoded(image: PIL.Image.Image, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def black_png(width: int, height: int) -> bytes:
    """A true PNG of black pixels: a bomb if it is large, a few kB on disk."""
    return png(width, height, depth=1, colour=0, rows=(b"\0" * (1 + (width + 7) // 8)) * height)


def text_bomb(megabytes: int = 50) -> bytes:
    """A PNG whose compressed comment unpacks to many megabytes."""
    return good_png(_chunk(b"zTXt", b"comment\0\0" + zlib.compress(bytes(megabytes << 20), 9)))


def wrong_checksum(of: bytes) -> bytes:
    """The PNG with a wrong checksum in its chunk `of`."""
    data = bytearray(good_png())
    at = data.index(of) + 4
    length = int.from_bytes(data[at - 8 : at - 4], "big")
    data[at + length] ^= 1
    return bytes(data)


def webp_canvas(width: int, height: int) -> bytes:
    """The extended header of a WEBP animation and nothing behind it."""
    canvas = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return b"RIFF" + struct.pack("<I", 22) + b"WEBPVP8X" + struct.pack("<I", 10) + bytes((2, 0, 0, 0)) + canvas


def gif_screen(width: int, height: int) -> bytes:
    screen = b"GIF89a" + struct.pack("<HH", width, height) + b"\x80\0\0" + bytes(6)
    return screen + b"," + struct.pack("<HHHH", 0, 0, width, height) + b"\0\2\2\x44\1\0;"


def bmp_header(width: int, height: int) -> bytes:
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + info + bytes(100)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(ran) (w) file\n%%EOF\n"
SVG = b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"><image href="http://127.0.0.1/x"/></svg>\n'


# ---- damage


def mutants(data: bytes, count: int, seed: int) -> list[bytes]:
    """Byte flips, cuts and zero blocks, in turn; every other one within the first 2 kB, where headers stand."""
    chance = random.Random(seed)
    made = []
    for i in range(count):
        mutant = bytearray(data)
        reach = len(data) if i % 2 else min(len(data), 2048)
        if i % 3 == 0:
            for _ in range(chance.choice((1, 4, 16, 64))):
                mutant[chance.randrange(reach)] ^= 1 << chance.randrange(8)
        elif i % 3 == 1:
            del mutant[chance.randrange(reach // 10, reach) :]
        else:
            start = chance.randrange(reach)
            length = min(chance.choice((16, 256, 2048)), len(data) - start)
            mutant[start : start + length] = bytes(length)
        made.append(bytes(mutant))
    return made
