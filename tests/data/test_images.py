import contextlib
import io
import struct
import time
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dist_fusion.data.images import UnreadableImage, decode, extension, kept, read

ORIENTATION = 0x0112
UNDO = {  # what a camera that held the picture so stored, from the upright one
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def picture():
    """Four quarters of different colours and sides of different lengths: no turn leaves it as it is."""
    image = Image.new("RGB", (48, 32), (250, 10, 10))
    for corner, colour in (((24, 0), (10, 250, 10)), ((0, 16), (10, 10, 250)), ((24, 16), (240, 240, 10))):
        image.paste(colour, (*corner, corner[0] + 24, corner[1] + 16))
    return image


LOSSLESS = {  # or nearly
    "PNG": {},
    "JPEG": {"quality": 100, "subsampling": 0},
    "WEBP": {"lossless": True},
    "AVIF": {"quality": 100, "subsampling": "4:4:4"},
    "TIFF": {},
}


@pytest.mark.parametrize("orientation", UNDO)
@pytest.mark.parametrize("kind", LOSSLESS)
def test_a_picture_is_turned_upright(picture, orientation, kind):
    undo = UNDO[orientation]
    stored = picture if undo is None else picture.transpose(undo)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    turned = decode(encoded(stored, kind, exif=exif, **LOSSLESS[kind]), 16)
    upright = decode(encoded(picture), 16)
    assert (upright - turned).abs().mean() < 0.02


def test_pixels_are_resized_and_run_from_minus_1_to_1(picture):
    pixels = decode(encoded(picture), 16)
    assert pixels.shape == (3, 16, 16) and pixels.dtype == torch.float32
    torch.testing.assert_close(pixels[:, 2, 2], torch.tensor([250, 10, 10]) / 127.5 - 1)
    torch.testing.assert_close(pixels[:, 13, 13], torch.tensor([240, 240, 10]) / 127.5 - 1)
    assert (decode(encoded(Image.new("L", (5, 5), 0)), 8) == -1).all()
    assert (decode(encoded(Image.new("L", (5, 5), 255)), 8) == 1).all()


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["RGB", "RGBA", "L", "LA", "P", "1", "CMYK"]),
    st.integers(1, 70),
    st.integers(1, 70),
    st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"]),
    st.integers(0, 2**32 - 1),
)
def test_every_kind_of_picture_becomes_three_planes_in_range(mode, width, height, kind, seed):
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 4), dtype=np.uint8)
    image = Image.fromarray(noise, "RGBA").convert("RGB").convert(mode)
    try:
        data = encoded(image, kind)
    except (OSError, ValueError):
        return  # this format has no such mode
    pixels = decode(data, 16)
    assert pixels.shape == (3, 16, 16)
    assert pixels.min() >= -1 and pixels.max() <= 1


def test_a_picture_of_one_pixel_fills_the_square():
    pixels = decode(encoded(Image.new("RGB", (1, 1), (255, 0, 51))), 8)
    torch.testing.assert_close(pixels, torch.tensor([1.0, -1.0, -0.6])[:, None, None].expand(3, 8, 8))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_what_is_transparent_is_white(mode):
    black = {"RGBA": (0, 0, 0), "LA": (0,)}[mode]
    image = Image.new(mode, (16, 16), (*black, 0))
    image.paste((*black, 255), (8, 0, 16, 16))
    pixels = decode(encoded(image), 16)
    assert (pixels[:, :, :6] == 1).all() and (pixels[:, :, 10:] == -1).all()
    half = decode(encoded(Image.new(mode, (4, 4), (*black, 128))), 4)
    assert half.abs().max() < 0.01


def test_a_palette_keeps_its_colours_and_its_transparent_entry_is_white():
    image = Image.new("P", (8, 8), 1)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.paste(0, (0, 0, 8, 4))
    pixels = decode(encoded(image), 8)
    assert pixels[:, 0, 0].tolist() == [1, -1, -1] and pixels[:, 7, 7].tolist() == [-1, -1, 1]
    clear = decode(encoded(image, transparency=0), 8)
    assert clear[:, 0, 0].tolist() == [1, 1, 1] and clear[:, 7, 7].tolist() == [-1, -1, 1]


def test_cmyk_is_turned_to_rgb():
    pixels = decode(encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG"), 8)
    assert (pixels[0] > 0.95).all() and (pixels[1:] < -0.95).all()


@pytest.mark.parametrize("data", [b"", b"no picture", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"RIFF____WEBP"])
def test_bytes_that_are_no_picture_are_unreadable(data):
    with pytest.raises(UnreadableImage):
        decode(data, 16)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_half_a_file_is_unreadable(picture, kind):
    data = encoded(picture.resize((480, 320)), kind)
    with pytest.raises(UnreadableImage):
        decode(data[: len(data) // 2], 16)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of damaged EXIF
@settings(max_examples=400, deadline=None)
@given(
    st.sampled_from(["PNG", "JPEG", "WEBP"]),
    st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=6),
)
def test_a_damaged_file_is_a_picture_or_unreadable_and_nothing_else(picture, kind, damage):
    exif = Image.Exif()
    exif[ORIENTATION], exif[0x010E] = 6, "a description"
    data = bytearray(encoded(picture.resize((12, 8)), kind, exif=exif))
    for place, byte in damage:
        data[place % len(data)] = byte
    with contextlib.suppress(UnreadableImage):
        assert decode(bytes(data), 8).shape == (3, 8, 8)


@pytest.mark.parametrize("tag", [0x0100, 0x011A])
def test_exif_of_the_wrong_types_still_turns_the_picture(picture, tag):
    """A width and a resolution that are texts: of these Pillow raises struct.error and TypeError if it writes them."""
    turned = struct.pack(">HHIHH", ORIENTATION, 3, 1, 6, 0)
    entries = sorted([turned, struct.pack(">HHI4s", tag, 2, 2, b"x")])
    exif = b"Exif\0\0MM\0*" + struct.pack(">IH", 8, 2) + b"".join(entries) + bytes(4)
    stored = encoded(picture.transpose(UNDO[6]), "JPEG", quality=100, subsampling=0, exif=exif)
    assert (decode(encoded(picture), 16) - decode(stored, 16)).abs().mean() < 0.02


def test_no_format_but_those_listed_is_opened(tmp_path, monkeypatch):
    """Pillow would hand an EPS to Ghostscript, whatever the member of the tar is called."""
    ran, fake = tmp_path / "ran", tmp_path / "gs"
    fake.write_text(f"#!/bin/sh\ntouch {ran}\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n%%Page: 1 1\nshowpage\n%%EOF\n"
    for data in (eps, encoded(Image.new("RGB", (4, 4)), "PPM"), encoded(Image.new("RGB", (4, 4)), "TGA")):
        with pytest.raises(UnreadableImage):
            decode(data, 8)
    assert not ran.exists()


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG2000"])
@pytest.mark.parametrize("level", [0, 300, 30000, 65535])
def test_sixteen_bits_a_pixel_become_eight_and_not_white(kind, level):
    data = encoded(Image.fromarray(np.full((8, 8), level, dtype=np.uint16)), kind)
    assert decode(data, 4).mean().item() == pytest.approx(level / 65535 * 2 - 1, abs=0.01)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_a_picture_whose_white_nobody_knows_is_unreadable(mode):
    with pytest.raises(UnreadableImage, match="white"):
        decode(encoded(Image.new(mode, (4, 4), 1), "TIFF"), 4)


def png(width, height, depth, kind, rows, *chunks):
    """A PNG by hand, for what Pillow does not write: colour type `kind`, `depth` bits a channel."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0))
    between = b"".join(chunk(name, data) for name, data in chunks)
    body = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + head + between + body + chunk(b"IEND", b"")


DEEP = {  # depth, colour type, one row of two pixels, the second of which is what tRNS says
    "2 bits grey": (2, 0, bytes([0b01_10_0000]), struct.pack(">H", 0b10)),
    "4 bits grey": (4, 0, bytes([0x5A]), struct.pack(">H", 0xA)),
    "8 bits grey": (8, 0, bytes([0x55, 0xAA]), struct.pack(">H", 0xAA)),
    "16 bits grey": (16, 0, struct.pack(">2H", 0x5555, 0xAAAA), struct.pack(">H", 0xAAAA)),
    "8 bits RGB": (8, 2, bytes([0x55] * 3 + [0xAA] * 3), struct.pack(">3H", *[0xAA] * 3)),
    "16 bits RGB": (16, 2, struct.pack(">6H", *[0x5555] * 3, *[0xAA12] * 3), struct.pack(">3H", *[0xAA12] * 3)),
}


@pytest.mark.parametrize("name", DEEP)
def test_the_transparent_colour_of_any_depth_is_white(name):
    depth, kind, row, clear = DEEP[name]
    opaque, seen = (read(png(2, 1, depth, kind, [row], *extra), 1) for extra in ((), [(b"tRNS", clear)]))
    assert [opaque.getpixel((x, 0)) for x in (0, 1)] == [(0x55,) * 3, (0xAA,) * 3]
    assert [seen.getpixel((x, 0)) for x in (0, 1)] == [(0x55,) * 3, (255,) * 3]


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk_looks_as_its_rgb_twin(picture, kind):
    """Adobe's JPEGs hold ink upside down."""
    data = encoded(picture.convert("CMYK"), kind, **LOSSLESS[kind])
    assert kind == "TIFF" or b"Adobe" in data
    assert (decode(data, 32) - decode(encoded(picture), 32)).abs().mean() < 5 / 127.5


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "AVIF", "TIFF"])
def test_of_several_frames_the_first_is_taken(kind):
    red, blue = (Image.new("RGB", (16, 12), colour) for colour in ((255, 0, 0), (0, 0, 255)))
    image = read(encoded(red, kind, save_all=True, append_images=[blue, blue]), 8)
    assert image.size == (16, 12) and image.getpixel((8, 6))[0] > 250 > 5 > image.getpixel((8, 6))[2]


@pytest.mark.parametrize("size", [(1, 1), (2, 1), (1, 3000), (3000, 1), (20000, 3)])
def test_the_thinnest_pictures_fill_the_square(size):
    pixels = decode(encoded(Image.new("RGB", size, (255, 0, 0))), 16)
    assert pixels.shape == (3, 16, 16) and (pixels[0] == 1).all() and (pixels[1:] == -1).all()


BOMBS = {
    "GIF": b"GIF89a\xff\xff\xff\xff\0\0\0,\0\0\0\0\xff\xff\xff\xff\0\x02\x02D\x01\0;",
    "PNG": png(40000, 40000, 8, 2, [bytes(100)]),
    "PNG of 100 megapixels": png(10000, 10000, 1, 0, [bytes(1250)] * 10000),
    "PNG with 100 MB of text": png(1, 1, 8, 0, [b"0"], (b"zTXt", b"x\0\0" + zlib.compress(bytes(10**8)))),
    "PNG with 100 MB of profile": png(1, 1, 8, 0, [b"0"], (b"iCCP", b"x\0\0" + zlib.compress(bytes(10**8)))),
}


@pytest.mark.filterwarnings("ignore")  # pytest undoes what the module does about Pillow's
@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_at_once(name):
    start = time.perf_counter()
    with pytest.raises(UnreadableImage):
        decode(BOMBS[name], 8)
    assert time.perf_counter() - start < 2


def test_a_jpeg_of_thousands_of_scans_is_refused_at_once(picture):
    """Each costs the time of the whole picture, and a few bytes: a small file could stop a loader for hours."""
    data = encoded(picture, "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    with pytest.raises(UnreadableImage, match="scans"):
        decode(data[:last] + data[last:-2] * 3000 + data[-2:], 8)
    assert decode(data, 8).shape == (3, 8, 8)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "AVIF", "GIF", "TIFF", "BMP"])
def test_a_file_that_lacks_its_last_rows_is_unreadable(picture, kind):
    """Pillow could make them up in grey."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8))
    data = encoded(noise, kind)
    with pytest.raises(UnreadableImage):
        decode(data[: len(data) * 9 // 10], 16)


def test_a_large_jpeg_is_decoded_at_a_fraction_that_is_large_enough():
    data = encoded(Image.new("RGB", (1600, 1200)), "JPEG")
    assert read(data, 224).size == (400, 300) and read(data, 2000).size == (1600, 1200)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("size", [(100, 100), (640, 320), (1, 1)])
def test_a_plain_picture_is_kept_to_the_byte(kind, size):
    for mode in ("RGB", "L"):
        data = encoded(Image.new(mode, size, 99), kind)
        assert kept(data, 256) == data
        assert extension(data) == {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}[kind]


def exif_turned(image):
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    return encoded(image, "JPEG", exif=exif)


REMADE = {
    "larger than asked": lambda image: encoded(image.resize((960, 640))),
    "turned": exif_turned,
    "transparent": lambda image: encoded(image.convert("RGBA")),
    "16 bits": lambda image: encoded(Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)),
    "CMYK": lambda image: encoded(image.convert("CMYK"), "JPEG"),
    "several frames": lambda image: encoded(image, "WEBP", save_all=True, append_images=[image.rotate(180)]),
    "another format": lambda image: encoded(image, "TIFF"),
}


@pytest.mark.parametrize("name", REMADE)
def test_any_other_picture_is_made_a_jpeg_that_looks_the_same_and_is_kept_then(picture, name):
    data = REMADE[name](picture.resize((240, 160)))
    made = kept(data, 128)
    assert extension(made) == "jpg" and min(read(made, 4000).size) == 128
    assert (decode(made, 32) - decode(data, 32)).abs().mean() < 0.05
    assert kept(made, 128) == made


def test_a_picture_smaller_than_asked_is_not_made_larger(picture):
    assert read(kept(encoded(picture, "TIFF"), 256), 4000).size == picture.size


@pytest.mark.parametrize("data", [b"no picture", encoded(Image.new("RGBA", (70000, 1)))])
def test_what_cannot_be_kept_is_unreadable(data):
    with pytest.raises(UnreadableImage):
        kept(data, 256)
