"""Still pictures to RGB with Pillow.

Order: what is it (by content), how large is it (before anything is decompressed), decode, turn upright,
RGB over white. Colour profiles are not applied, as in the models' own preprocessing. JPEG's cheap reading at
a reduced size (`draft`) is not used: it changes the pixels a model sees, and the size limit already bounds
the memory that it would save.
"""

from __future__ import annotations

import importlib
import io
import struct
import zlib
from contextlib import closing
from pathlib import Path
from typing import BinaryIO

import numpy as np
import PIL.Image

from ..errors import CorruptMedia, ImageTooLarge, InvalidRequest, UnsupportedMedia
from ..models.interface import Frames
from .config import Image
from .media_file import MediaLimits, check_size, expect_kind, make_frames, open_local, read_head, shown

# One reader per sniffed format. `PIL.Image.open` would offer the file to further readers (over forty, one of
# which starts Ghostscript) and warn about large pictures on its own, after its own limit.
# A multi-picture JPEG (MPO) begins with an ordinary JPEG and is read as that.
_READERS = {
    "PNG": ("PIL.PngImagePlugin", "PngImageFile"),
    "JPEG": ("PIL.JpegImagePlugin", "JpegImageFile"),
    "WEBP": ("PIL.WebPImagePlugin", "WebPImageFile"),
    "BMP": ("PIL.BmpImagePlugin", "BmpImageFile"),
    "GIF": ("PIL.GifImagePlugin", "GifImageFile"),
}

# What Pillow's parsers are known to let out on bad input. The texts may hold addresses and are never shown.
_PILLOW_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    ArithmeticError,
    AttributeError,
    NotImplementedError,
    RuntimeError,
    UserWarning,  # where the caller turned warnings into errors
    struct.error,
    zlib.error,
    PIL.Image.DecompressionBombError,
)

_UPRIGHT = {  # EXIF orientation: what makes it upright
    2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
    3: PIL.Image.Transpose.ROTATE_180,
    4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
    5: PIL.Image.Transpose.TRANSPOSE,
    6: PIL.Image.Transpose.ROTATE_270,
    7: PIL.Image.Transpose.TRANSVERSE,
    8: PIL.Image.Transpose.ROTATE_90,
}
_ORIENTATION_TAG = 0x0112


def read_image(image: Image, limits: MediaLimits) -> Frames:
    """Image -> Frames with one frame. Raises MediaError, or InvalidRequest for an object that is no picture."""
    source = image.source
    if isinstance(source, np.ndarray):
        return _from_array(source, limits)
    if isinstance(source, PIL.Image.Image):  # opened by the caller, with the reader of the caller's choice
        return _from_pillow(source, "<image>", limits)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _from_file(io.BytesIO(source), "<bytes>", limits)
    if isinstance(source, (str, Path)):
        with open_local(source) as file:
            return _from_file(file, source, limits)
    raise InvalidRequest(f"image: expected a path, bytes, a Pillow image or an array, got {type(source).__name__}")


def _from_array(array: np.ndarray, limits: MediaLimits) -> Frames:
    if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8:
        raise InvalidRequest(f"image: expected an array (H, W, 3) uint8, got {array.shape} {array.dtype}")
    height, width, _ = array.shape
    check_size(width, height, "<array>", limits.image_pixels, limits)
    # A copy: the caller may write into its array later, and the key would then lie.
    return make_frames("image", np.array(array[None], order="C"), np.zeros(1), "<array>")


def _from_file(file: BinaryIO, source: object, limits: MediaLimits) -> Frames:
    num_bytes = file.seek(0, io.SEEK_END)
    file.seek(0)
    head = read_head(file)
    kind = expect_kind(source, head, "image")
    if num_bytes > limits.image_file_bytes:
        raise ImageTooLarge(
            f"{shown(source)}: a file of {num_bytes >> 20} MiB, expected at most {limits.image_file_bytes >> 20} MiB"
        )
    if stated := _stated_size(head, kind.format):
        check_size(*stated, source, limits.image_pixels, limits)
    module, name = _READERS[kind.format]
    reader = getattr(importlib.import_module(module), name)
    try:
        opened = reader(file)
    except _PILLOW_ERRORS:
        raise _corrupt(source, kind.name) from None
    with closing(opened):
        return _from_pillow(opened, source, limits, kind.name)


def _stated_size(head: bytes, format: str) -> tuple[int, int] | None:
    """(width, height) where they stand at a fixed place; the readers of other formats tell them at no cost.

    Pillow's WEBP reader allocates two canvases before it tells, and its PNG reader calls a size of 0 damage.
    """
    if len(head) < 30:
        return None
    if format == "PNG":
        return int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")
    if format != "WEBP":
        return None
    if head[12:16] == b"VP8X":  # extended: two fields of 24 bits
        return 1 + int.from_bytes(head[24:27], "little"), 1 + int.from_bytes(head[27:30], "little")
    if head[12:16] == b"VP8L":  # lossless: two of 14
        bits = int.from_bytes(head[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    return int.from_bytes(head[26:28], "little") & 0x3FFF, int.from_bytes(head[28:30], "little") & 0x3FFF


def _from_pillow(image: PIL.Image.Image, source: object, limits: MediaLimits, kind: str = "a picture") -> Frames:
    check_size(*image.size, source, limits.image_pixels, limits)
    notes = ("the first picture of an animation",) if _is_animated(image) else ()
    try:
        image.load()
        check_size(*image.size, source, limits.image_pixels, limits)  # an animation may grow with its first picture
        rgb = _over_white(_upright(image))
    except _PILLOW_ERRORS:
        raise _corrupt(source, kind) from None
    return make_frames("image", np.array(rgb)[None], np.zeros(1), source, notes=notes)


def _is_animated(image: PIL.Image.Image) -> bool:
    try:
        return bool(getattr(image, "is_animated", False))
    except _PILLOW_ERRORS:  # a damaged second picture does not matter
        return False


def _upright(image: PIL.Image.Image) -> PIL.Image.Image:
    """The picture turned as its camera says; damaged EXIF data turn nothing."""
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG, 1)
    except _PILLOW_ERRORS:
        return image
    method = _UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return image if method is None else image.transpose(method)


def _over_white(image: PIL.Image.Image) -> PIL.Image.Image:
    """RGB. What is transparent shows white; 16 bits keep their upper eight."""
    if image.mode.startswith("I"):  # 16-bit grey; `convert` would clip it instead of scaling
        image = PIL.Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    elif image.mode == "F":
        raise UnsupportedMedia("a Pillow image of mode F: expected 8 or 16 bits per channel", hint="convert it first")
    if "transparency" in image.info or image.mode in ("LA", "PA", "La", "RGBa", "RGBA"):
        coloured = image.convert("RGBA")
        white = PIL.Image.new("RGBA", coloured.size, "white")
        return PIL.Image.alpha_composite(white, coloured).convert("RGB")
    return image.convert("RGB")


def _corrupt(source: object, kind: str) -> CorruptMedia:
    return CorruptMedia(f"{shown(source)}: expected {kind}, but its data are damaged or incomplete")
