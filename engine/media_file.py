"""What a media file is, found out before any decoder sees it: an ordinary local file, and its kind by content.

Also the limits on media, all in one place, and the identity of decoded media.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np

from ..errors import (
    CorruptMedia,
    ImageTooLarge,
    ImageTooNarrow,
    ImageTooSmall,
    InvalidRequest,
    MediaNotFound,
    NotARegularFile,
    RemoteMediaRefused,
    UnsupportedMedia,
)
from ..models.interface import Frames, MediaKind


@dataclass(frozen=True)
class MediaLimits:
    """How large media may be. Tests pass smaller ones; everyone else uses the defaults."""

    min_side: int = 2  # the smallest picture that has an inside; a model may ask for more
    max_side: int = 16_384  # the largest WEBP, and twice 8K video
    max_aspect: int = 200  # beyond it a resize to a square leaves less than one pixel of the short side
    image_pixels: int = 32_000_000  # 96 MB as RGB: affordable twice on a board with 8 GB
    image_file_bytes: int = 256 << 20  # twice an uncompressed picture of 32 megapixels with alpha
    frame_pixels: int = 40_000_000  # 8K cinema (8192 x 4320) fits
    header_frames: int = 25_000_000  # 24 hours at 240 frames per second fit; a header that claims more lies
    frames: int = 4096  # of one video in one request: far beyond what any context holds
    rgb_bytes: int = 2 << 30  # chosen frames of one video: 345 frames of 1080p
    index_bytes: int = 1 << 30  # files up to here are read through once (below a second) to know every frame time
    index_packets: int = 10_000_000  # 9 bytes each
    scan_gap_s: float = 5.0  # reading on costs less than seeking when the next frame is nearer: half of a long GOP
    damaged_share: float = 0.5  # of packets read; with more, most of what would be shown is concealment


LIMITS = MediaLimits()

_MAX_SHOWN = 200  # characters of a name in a message
_HEAD_BYTES = 4096  # what sniffing reads
_MAX_BOXES = 100_000  # top-level boxes of an mp4 that are walked; a day in two-second fragments has 86,400


# ---- local files


def shown(source: object) -> str:
    """What the user typed, fit for one line of a message: no control characters, not endless."""
    if isinstance(source, bytes):
        return "<bytes>"
    text = str(source)
    if len(text) > _MAX_SHOWN:
        text = text[: _MAX_SHOWN - 1] + "…"
    return "".join(c if c.isprintable() else "?" for c in text)


# `Path("http://x")` has one slash left; a single letter before the colon is a Windows drive.
_ADDRESS = re.compile(r"\s*[a-z][a-z0-9+.-]+:/|\s*data:", re.IGNORECASE)


def refuse_address(source: str | Path) -> None:
    """Raises RemoteMediaRefused for anything that is an address and not a path."""
    if match := _ADDRESS.match(str(source)):
        scheme = match.group().partition(":")[0].strip().lower()
        raise RemoteMediaRefused(
            f"{shown(source)}: expected the path of a local file, got a {scheme}: address",
            hint="download the file and give its path",
        )


def open_local(source: str | Path) -> BinaryIO:
    """The file, opened for reading, if it is an ordinary one. Pipes and devices are never opened.

    Raises RemoteMediaRefused, MediaNotFound (also for files that may not be read) or NotARegularFile.
    """
    refuse_address(source)
    name = shown(source)
    try:
        mode = os.stat(source).st_mode
    except FileNotFoundError:
        raise MediaNotFound(f"{name}: no such file") from None
    except (OSError, ValueError):  # no right to look, a name that is too long, a NUL byte
        raise MediaNotFound(f"{name}: cannot be found") from None
    if not stat.S_ISREG(mode):
        raise NotARegularFile(f"{name}: expected a file, got {_file_type(mode)}")
    try:
        return open(source, "rb")
    except OSError:
        raise MediaNotFound(f"{name}: cannot be read, permission denied") from None


def _file_type(mode: int) -> str:
    kinds = (
        (stat.S_ISDIR, "a directory"),
        (stat.S_ISFIFO, "a pipe"),
        (stat.S_ISCHR, "a device"),
        (stat.S_ISBLK, "a device"),
        (stat.S_ISSOCK, "a socket"),
    )
    return next((text for test, text in kinds if test(mode)), "something else")


# ---- what it is, by content


@dataclass(frozen=True)
class FileKind:
    """`format` names a reader: a Pillow plug-in or an FFmpeg demuxer; empty where we read it with neither."""

    kind: MediaKind | Literal["other"]
    format: str
    name: str  # "a PNG image", for messages


_EMPTY = FileKind("other", "", "an empty file")
_PLAYLIST = FileKind("other", "", "a playlist, which names other files and addresses")
_HEIF = FileKind("other", "", "a HEIF or AVIF image")

_MAGIC: tuple[tuple[int, bytes, FileKind], ...] = (
    (0, b"\x89PNG\r\n\x1a\n", FileKind("image", "PNG", "a PNG image")),
    (0, b"\xff\xd8\xff", FileKind("image", "JPEG", "a JPEG image")),
    (0, b"GIF87a", FileKind("image", "GIF", "a GIF image")),
    (0, b"GIF89a", FileKind("image", "GIF", "a GIF image")),
    (0, b"\x1a\x45\xdf\xa3", FileKind("video", "matroska", "a Matroska or WebM video")),
    (0, b"%PDF", FileKind("other", "", "a PDF document")),
    (0, b"%!PS", FileKind("other", "", "a PostScript drawing")),
    (0, b"\xc5\xd0\xd3\xc6", FileKind("other", "", "a PostScript drawing")),
    (0, b"II*\0", FileKind("other", "", "a TIFF image")),
    (0, b"MM\0*", FileKind("other", "", "a TIFF image")),
    (0, b"PK\x03\x04", FileKind("other", "", "a ZIP archive")),
    (4, b"jP  ", FileKind("other", "", "a JPEG 2000 image")),
)
_BMP = FileKind("image", "BMP", "a BMP image")
_WEBP = FileKind("image", "WEBP", "a WEBP image")
_AVI = FileKind("video", "avi", "an AVI video")
_MP4 = FileKind("video", "mov", "an MP4 or QuickTime video")
_MPEGTS = FileKind("video", "mpegts", "an MPEG transport stream")

_BMP_HEADERS = (12, 40, 52, 56, 64, 108, 124)  # sizes of the second header, all that exist
_MP4_FIRST_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot", b"styp")
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"mif1", b"avif", b"avis")
_PLAYLIST_STARTS = ("#extm3u", "ffconcat", "[playlist]", "[internetshortcut]", "<smil", "<asx", "v=0\r\n", "v=0\n")


def sniff(head: bytes) -> FileKind:
    """What a file is, from its first bytes and never from its name."""
    if not head:
        return _EMPTY
    for offset, magic, found in _MAGIC:
        if head.startswith(magic, offset):
            return found
    if head[:4] == b"RIFF" and head[8:12] in (b"WEBP", b"AVI "):
        return _WEBP if head[8:12] == b"WEBP" else _AVI
    if head[:2] == b"BM" and int.from_bytes(head[14:18], "little") in _BMP_HEADERS:
        return _BMP
    if head[4:8] in _MP4_FIRST_BOXES:
        return _HEIF if head[4:8] == b"ftyp" and head[8:12] in _HEIF_BRANDS else _MP4
    sync = head[0::188]
    if len(sync) > 1 and sync.count(0x47) == len(sync):
        return _MPEGTS
    return _sniff_text(head)


def _sniff_text(head: bytes) -> FileKind:
    text = head.decode("utf-8", "replace").lstrip("\ufeff \t\r\n").lower()
    if text.startswith(_PLAYLIST_STARTS) or "<mpd" in text:
        return _PLAYLIST
    if "<svg" in text:
        return FileKind("other", "", "an SVG drawing")
    odd = sum(not c.isprintable() and not c.isspace() for c in text)
    return FileKind("other", "", "a text file" if odd * 20 <= len(text) else "a file of unknown content")


def expect_kind(source: object, head: bytes, wanted: MediaKind) -> FileKind:
    """The kind of a file that begins with `head`. Raises UnsupportedMedia if it is not of the wanted kind."""
    found = sniff(head)
    if found.kind == wanted:
        return found
    if found.kind == "other":
        hint = "export it as PNG or JPEG" if wanted == "image" else "give an MP4, MKV, WebM, AVI or MPEG-TS file"
        raise UnsupportedMedia(f"{shown(source)}: expected {_READABLE[wanted]}, got {found.name}", hint=hint)
    hint = f"in Python: {found.kind.capitalize()}(...)"
    raise UnsupportedMedia(f"{shown(source)}: this is {found.name}; use --{found.kind}", hint=hint)


_READABLE = {
    "image": "an image (JPEG, PNG, WEBP, BMP or GIF)",
    "video": "a video (MP4, QuickTime, MKV, WebM, AVI or MPEG-TS)",
}


def read_head(file: BinaryIO) -> bytes:
    """The bytes that `sniff` looks at; the file is back at its beginning."""
    head = file.read(_HEAD_BYTES)
    file.seek(0)
    return head


# ---- is the file whole


def is_cut(file: BinaryIO, kind: FileKind, source: object) -> bool:
    """Whether a video file ends before the size that its container states. A transport stream states none.

    Raises CorruptMedia for an MP4 without its index, which the recorder writes last.
    """
    size = os.fstat(file.fileno()).st_size
    if kind.format == "mov":
        has_index, end = False, 0
        for name, start, end in _mp4_boxes(file, size):
            has_index = has_index or (name == b"moov" and start < end <= size)
        if not has_index:
            raise CorruptMedia(
                f"{shown(source)}: the index is missing; likely an unfinished recording or an incomplete copy",
                hint="finish the recording or copy the file again",
            )
        return end > size
    if kind.format == "avi":
        return 8 + int.from_bytes(read_head(file)[4:8], "little") > size
    if kind.format == "matroska":
        return _matroska_end(read_head(file)) > size
    return False


def _mp4_boxes(file: BinaryIO, size: int) -> Iterator[tuple[bytes, int, int]]:
    """(name, start, end) of the top-level boxes; the end of the last may lie beyond the file's."""
    start = 0
    for _ in range(_MAX_BOXES):
        file.seek(start)
        head = file.read(16)
        if len(head) < 8:
            break
        length = int.from_bytes(head[:4], "big")
        if length == 1:
            length = int.from_bytes(head[8:16], "big")
        end = start + length if length else size  # 0: to the end of the file
        if length and length < 8:
            break  # no box: rubbish
        yield head[4:8], start, end
        start = end
    file.seek(0)


def _matroska_end(head: bytes) -> int:
    """Where the segment ends by its own account; 0 where that is unknown, as in a live recording."""
    body, length = _vint(head, 4)
    segment = body + length
    if head[segment : segment + 4] != b"\x18\x53\x80\x67":
        return 0
    body, length = _vint(head, segment + 4)
    return body + length if length else 0


def _vint(head: bytes, start: int) -> tuple[int, int]:
    """(where the payload begins, its length) of a Matroska element; a length with all bits set is unknown: 0."""
    first = head[start] if start < len(head) else 0
    width = 9 - first.bit_length()  # leading zeros tell the width, 1 to 8 bytes
    if width > 8:
        return start, 0
    bits = int.from_bytes(head[start : start + width], "big") & ((1 << 7 * width) - 1)
    return start + width, 0 if bits == (1 << 7 * width) - 1 else bits


# ---- sizes and identity


def check_size(width: int, height: int, source: object, max_pixels: int, limits: MediaLimits = LIMITS) -> None:
    """Raises ImageTooSmall, ImageTooNarrow or ImageTooLarge with the size found and the one allowed."""
    short, long = sorted((width, height))
    what = f"{shown(source)}: {width} x {height} pixels"
    if long < limits.min_side or short < 1:
        raise ImageTooSmall(f"{what}, expected sides of at least {limits.min_side}")
    if long > limits.max_aspect * short:
        raise ImageTooNarrow(f"{what}, expected sides of at most {limits.max_aspect} to 1", hint="crop it")
    if short < limits.min_side:
        raise ImageTooSmall(f"{what}, expected sides of at least {limits.min_side}")
    if long > limits.max_side or width * height > max_pixels:
        raise ImageTooLarge(
            f"{what}, expected sides of at most {limits.max_side} and {max_pixels / 1e6:.0f} megapixels in all",
            hint="scale it down",
        )


def check_frame_count(count: int, height: int, width: int, source: object, limits: MediaLimits = LIMITS) -> None:
    """Raises InvalidRequest if `count` RGB frames are more than one request may hold; names what fits."""
    fits = frames_that_fit(height, width, limits)
    if count > fits:
        need = f"{count * height * width * 3 / 2**30:.1f} GiB" if count <= limits.frames else "too many"
        raise InvalidRequest(
            f"{shown(source)}: {count} frames of {width} x {height} are {need}, expected at most {fits} frames",
            hint=f"use --frames {fits} or fewer",
        )


def frames_that_fit(height: int, width: int, limits: MediaLimits = LIMITS) -> int:
    """How many RGB frames of this size one request may hold, at least 1."""
    return max(1, min(limits.frames, limits.rgb_bytes // (height * width * 3)))


def make_frames(
    kind: MediaKind,
    rgb: np.ndarray,  # (T, H, W, 3) uint8
    timestamps: np.ndarray,  # (T,) float64
    source: object,
    duration_s: float = 0.0,
    notes: tuple[str, ...] = (),
) -> Frames:
    """Decoded media with its identity: sha256 over kind, shape, times and pixels, so that equal bytes of two
    shapes, or equal pictures at other times, are different media. The name of the file plays no part."""
    digest = hashlib.sha256(f"{kind} {rgb.shape} ".encode())
    digest.update(np.ascontiguousarray(timestamps, dtype="<f8").data)
    digest.update(np.ascontiguousarray(rgb).data)
    return Frames(kind, rgb, timestamps, shown(source), duration_s, digest.hexdigest(), notes)
