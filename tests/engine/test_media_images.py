"""Pictures: every kind and mode to upright RGB, golden values, and what is refused."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest

from sparsevila.engine.config import Image
from sparsevila.engine.media import load_image, load_media
from sparsevila.engine.media_file import MediaLimits
from sparsevila.errors import (
    CorruptMedia,
    ImageTooLarge,
    ImageTooNarrow,
    ImageTooSmall,
    InvalidRequest,
    MediaError,
    UnsupportedMedia,
)
from sparsevila.tests.attacks import media as attacks

ASSETS = Path(__file__).resolve().parents[2] / "assets"


def only_colour(data: object) -> tuple[int, ...]:
    """The one colour that the whole picture has."""
    rgb = load_image(Image(data)).rgb.reshape(-1, 3)  # type: ignore[arg-type]
    assert (rgb == rgb[0]).all()
    return tuple(int(v) for v in rgb[0])


def plain(mode: str, colour: object, size: tuple[int, int] = (8, 6)) -> PIL.Image.Image:
    return PIL.Image.new(mode, size, colour)  # type: ignore[arg-type]


def test_a_picture_is_one_frame_at_time_zero():
    frames = load_media(Image(attacks.good_png()), default_frames=8)
    assert (frames.kind, frames.source, frames.duration_s, frames.notes) == ("image", "<bytes>", 0.0, ())
    assert frames.rgb.shape == (1, 8, 8, 3)
    assert frames.timestamps.tolist() == [0.0]
    assert frames.rgb.flags.c_contiguous
    assert (frames.rgb == (16, 32, 48)).all()


def test_all_sources_give_the_same_pixels_and_key(tmp_path: Path):
    path = tmp_path / "a picture.dat"  # the name does not matter
    path.write_bytes(attacks.good_png())
    array = np.broadcast_to(np.array([16, 32, 48], np.uint8), (8, 8, 3))
    sources = [path, str(path), path.read_bytes(), bytearray(path.read_bytes()), PIL.Image.fromarray(array), array]
    loaded = [load_image(Image(source)) for source in sources]
    assert len({frames.key for frames in loaded}) == 1
    assert [frames.source for frames in loaded][2:] == ["<bytes>", "<bytes>", "<image>", "<array>"]
    assert loaded[0].source == str(path)


def test_the_key_tells_shapes_apart_that_share_their_bytes():
    wide, tall = np.zeros((4, 6, 3), np.uint8), np.zeros((6, 4, 3), np.uint8)
    assert load_image(Image(wide)).key != load_image(Image(tall)).key


def test_an_array_written_to_later_changes_nothing():
    array = np.zeros((4, 6, 3), np.uint8)
    frames = load_image(Image(array))
    array[:] = 255
    assert not frames.rgb.any()


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "MPO"])
def test_formats(format: str):
    picture = PIL.Image.open(ASSETS / "images" / "shapes.png").convert("RGB")
    frames = load_image(Image(attacks.encoded(picture, format)))
    assert frames.rgb.shape == (1, 360, 480, 3)
    difference = np.abs(frames.rgb[0].astype(int) - np.asarray(picture))
    assert difference.mean() < 3
    assert tuple(frames.rgb[0, 100, 240] // 64) == (0, 1, 3)  # the blue square


GOLDEN = {  # mode and colour of a plain picture: format, colour expected, and how far off JPEG may be
    "grey": (plain("L", 77), "PNG", (77, 77, 77), 0),
    "black and white": (plain("1", 1), "PNG", (255, 255, 255), 0),
    "16-bit grey keeps its upper byte": (plain("I;16", 0x80FF), "PNG", (128, 128, 128), 0),
    "alpha": (plain("RGBA", (255, 0, 0, 128)), "PNG", (255, 127, 127), 0),
    "fully transparent is white": (plain("RGBA", (9, 9, 9, 0)), "PNG", (255, 255, 255), 0),
    "grey with alpha": (plain("LA", (0, 51)), "PNG", (204, 204, 204), 0),
    "alpha in WEBP": (plain("RGBA", (255, 0, 0, 128)), "WEBP", (255, 127, 127), 0),
    "CMYK": (plain("CMYK", (0, 255, 255, 0)), "JPEG", (255, 0, 0), 2),
    "palette": (plain("RGB", (10, 200, 30)).quantize(4), "GIF", (10, 200, 30), 0),
}


@pytest.mark.parametrize("case", GOLDEN)
def test_conversions(case: str):
    picture, format, expected, tolerance = GOLDEN[case]
    options = {"lossless": True} if format == "WEBP" else {}
    got = only_colour(attacks.encoded(picture, format, **options))
    assert np.abs(np.subtract(got, expected)).max() <= tolerance


def test_sixteen_bit_colour_keeps_its_upper_bytes():
    rows = (b"\0" + bytes((0x10, 0xFF, 0x20, 0x00, 0x30, 0x80)) * 8) * 8
    assert only_colour(attacks.png(8, 8, depth=16, rows=rows)) == (16, 32, 48)


@pytest.mark.parametrize("mode", ["P", "L", "RGB"])
def test_a_transparent_colour_shows_white(mode: str):
    transparent = {"P": 0, "L": 40, "RGB": (40, 50, 60)}[mode]
    picture = plain("RGB", "red").quantize(4) if mode == "P" else plain(mode, transparent)
    assert only_colour(attacks.encoded(picture, "PNG", transparency=transparent)) == (255, 255, 255)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_exif_orientation(orientation: int, format: str):
    picture = PIL.Image.fromarray(np.arange(16 * 24 * 3, dtype=np.uint8).reshape(16, 24, 3))
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    data = attacks.encoded(picture, format, exif=exif)
    with PIL.Image.open(io.BytesIO(data)) as opened:
        expected = np.asarray(PIL.ImageOps.exif_transpose(opened).convert("RGB"))
    got = load_image(Image(data)).rgb[0]
    assert got.shape == ((16, 24, 3) if orientation < 5 else (24, 16, 3))
    assert (got == expected).all()


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_turns_nothing():
    data = attacks.encoded(plain("RGB", "red", (8, 6)), "JPEG", exif=b"Exif\0\0MM\0*\0\0\xff\xff\xff")
    assert load_image(Image(data)).rgb.shape == (1, 6, 8, 3)


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_the_first_picture_of_an_animation(format: str):
    rest = [plain("RGB", "blue"), plain("RGB", "lime")]
    data = attacks.encoded(plain("RGB", "red"), format, save_all=True, append_images=rest)
    frames = load_image(Image(data))
    assert frames.rgb.shape[0] == 1
    assert frames.rgb[0, 0, 0].tolist() == pytest.approx([255, 0, 0], abs=2)
    assert frames.notes == ("the first picture of an animation",)


REFUSED = {
    "nothing": (b"", UnsupportedMedia, "an empty file"),
    "text": (b"hello, there is no picture here", UnsupportedMedia, "a text file"),
    "EPS, which would start Ghostscript": (attacks.EPS, UnsupportedMedia, "a PostScript drawing"),
    "SVG": (attacks.SVG, UnsupportedMedia, "an SVG drawing"),
    "TIFF": (attacks.encoded(plain("RGB", "red"), "TIFF"), UnsupportedMedia, "a TIFF image"),
    "JPEG 2000": (b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(64), UnsupportedMedia, "a JPEG 2000 image"),
    "HEIF": (b"\0\0\0\x18ftypheic" + bytes(64), UnsupportedMedia, "HEIF"),
    "a video": (b"\0\0\0\x18ftypisom" + bytes(64), UnsupportedMedia, "use --video"),
    "a playlist": (b"#EXTM3U\nhttp://127.0.0.1/a.png\n", UnsupportedMedia, "a playlist"),
    "no width": (attacks.png(0, 5), ImageTooSmall, "0 x 5"),
    "1 x 1": (attacks.png(1, 1), ImageTooSmall, "1 x 1"),
    "1 x 50": (attacks.png(1, 50), ImageTooSmall, "at least 2"),
    "1 x 100,000": (attacks.png(1, 100_000), ImageTooNarrow, "200 to 1"),
    "2 x 402": (attacks.png(2, 402), ImageTooNarrow, "2 x 402"),
    "long side": (attacks.png(16_385, 100), ImageTooLarge, "16384"),
    "88 megapixels": (attacks.png(9400, 9400), ImageTooLarge, "32 megapixels"),
    "3.6 gigapixels": (attacks.png(60_000, 60_000), ImageTooLarge, "60000 x 60000"),
    "WEBP canvas": (attacks.webp_canvas(16_384, 16_384), ImageTooLarge, "16384 x 16384"),
    "GIF screen": (attacks.gif_screen(65_535, 65_535), ImageTooLarge, "65535 x 65535"),
    "BMP header": (attacks.bmp_header(60_000, -60_000), ImageTooLarge, "60000 x 60000"),
    "zTXt bomb": (attacks.text_bomb(), CorruptMedia, "damaged"),
    "checksum of the header": (attacks.wrong_checksum(b"IHDR"), CorruptMedia, "damaged"),
    "PNG cut": (attacks.good_png()[:-30], CorruptMedia, "damaged"),
    "PNG cut in its signature": (attacks.good_png()[:12], CorruptMedia, "damaged"),
    "no pixel data": (attacks.png(8, 8), CorruptMedia, "damaged"),
    "WEBP cut": (attacks.encoded(plain("RGB", "red", (64, 64)), "WEBP")[:40], CorruptMedia, "damaged"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str):
    data, error, words = REFUSED[case]
    with pytest.raises(error) as caught:
        load_image(Image(data))
    assert type(caught.value) is error
    assert words in str(caught.value)


def test_a_jpeg_cut_in_half_is_damaged_and_not_half_grey():
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    data = attacks.encoded(PIL.Image.fromarray(noise), "JPEG")
    with pytest.raises(CorruptMedia, match="a JPEG image"):
        load_image(Image(data[: len(data) // 2]))


def test_a_wrong_checksum_of_whole_pixel_data_is_let_pass():
    """Nothing is lost: the pixels unpack to the last one, and Pillow checks their own sum."""
    assert only_colour(attacks.wrong_checksum(b"IDAT")) == (16, 32, 48)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((3, 8, 8), np.uint8),
        np.zeros((8, 8), np.uint8),
        np.zeros((8, 8, 4), np.uint8),
        np.zeros((8, 8, 3), np.float32),
    ],
)
def test_arrays_of_another_layout_are_named(array: np.ndarray):
    with pytest.raises(InvalidRequest, match=r"\(H, W, 3\) uint8"):
        load_image(Image(array))


def test_an_empty_array_and_an_odd_object():
    with pytest.raises(ImageTooSmall):
        load_image(Image(np.zeros((0, 8, 3), np.uint8)))
    with pytest.raises(InvalidRequest, match="got int"):
        load_image(Image(7))  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="expected an Image or a Video"):
        load_media("a.png", default_frames=1)  # type: ignore[arg-type]


def test_a_pillow_image_of_floats_is_refused_and_one_of_integers_scaled():
    with pytest.raises(UnsupportedMedia, match="mode F"):
        load_image(Image(plain("F", 0.5)))
    assert only_colour(plain("I", 0x80FF)) == (128, 128, 128)


def test_size_of_the_file_itself(tmp_path: Path):
    path = tmp_path / "a.png"
    path.write_bytes(attacks.good_png() + bytes(3 << 20))
    with pytest.raises(ImageTooLarge, match="3 MiB, expected at most 2 MiB"):
        load_image(Image(path), limits=MediaLimits(image_file_bytes=2 << 20))


def test_limits_are_what_refuses():
    """The same header passes the size check under wider limits, and fails later for want of pixels."""
    wide = MediaLimits(image_pixels=10**11, max_side=10**6)
    with pytest.raises(ImageTooLarge):
        load_image(Image(attacks.png(20_000, 10)), limits=MediaLimits(max_aspect=10**6))
    with pytest.raises(CorruptMedia):
        load_image(Image(attacks.png(20_000, 200)), limits=wide)


def test_no_file_stays_open(tmp_path: Path):
    path = tmp_path / "a.png"
    path.write_bytes(attacks.good_png())
    load_image(Image(path))
    path.write_bytes(attacks.good_png()[:-30])
    with pytest.raises(CorruptMedia):
        load_image(Image(path))
    fds = Path("/proc/self/fd")
    if not fds.exists():
        pytest.skip("needs /proc")
    assert not [fd for fd in fds.iterdir() if fd.is_symlink() and str(tmp_path) in str(fd.readlink())]


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "WEBP", "BMP"])
def test_mutants_give_a_picture_or_a_typed_error(format: str):
    picture = PIL.Image.open(ASSETS / "images" / "shapes.png").convert("RGB").resize((96, 72))
    read = 0
    for data in attacks.mutants(attacks.encoded(picture, format), 40, seed=1):
        try:
            read += load_image(Image(data)).rgb.shape[0]
        except MediaError:
            continue
    assert 0 < read < 40 or format == "BMP"  # some of either kind, so that both ways are walked


@pytest.mark.parametrize("name", ["shapes.png", "page.png", "chart.png", "badge.jpg"])
def test_bundled_pictures(name: str):
    frames = load_image(Image(ASSETS / "images" / name))
    assert min(frames.rgb.shape[1:3]) >= 300
    assert frames.rgb.std() > 20
