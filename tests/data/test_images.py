import contextlib
import io
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dist_fusion.data.images import UnreadableImage, decode

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


@pytest.mark.parametrize("orientation", UNDO)
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_picture_is_turned_upright(picture, orientation, kind):
    undo = UNDO[orientation]
    stored = picture if undo is None else picture.transpose(undo)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    options = {"PNG": {}, "JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}[kind]
    upright, turned = decode(encoded(picture), 16), decode(encoded(stored, kind, exif=exif, **options), 16)
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
    st.sampled_from(["PNG", "JPEG", "WEBP"]),
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
def test_exif_of_the_wrong_types_is_unreadable(picture, tag):
    """A width and a resolution that are texts: of these Pillow raises struct.error and TypeError while it turns."""
    turned = struct.pack(">HHIHH", ORIENTATION, 3, 1, 6, 0)
    entries = sorted([turned, struct.pack(">HHI4s", tag, 2, 2, b"x")])
    exif = b"Exif\0\0MM\0*" + struct.pack(">IH", 8, 2) + b"".join(entries) + bytes(4)
    with pytest.raises(UnreadableImage):
        decode(encoded(picture, "JPEG", exif=exif), 8)


def test_no_format_but_the_three_is_opened(tmp_path, monkeypatch):
    """Pillow would hand an EPS to Ghostscript, whatever the member of the tar is called."""
    ran, fake = tmp_path / "ran", tmp_path / "gs"
    fake.write_text(f"#!/bin/sh\ntouch {ran}\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n%%Page: 1 1\nshowpage\n%%EOF\n"
    for data in (eps, encoded(Image.new("RGB", (4, 4)), "GIF"), encoded(Image.new("RGB", (4, 4)), "TIFF")):
        with pytest.raises(UnreadableImage):
            decode(data, 8)
    assert not ran.exists()


def test_sixteen_bits_a_pixel_become_eight_and_not_white():
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 4), 30000, dtype=np.uint16)).save(buffer, "PNG")
    assert decode(buffer.getvalue(), 4).mean().item() == pytest.approx(30000 / 65535 * 2 - 1, abs=0.01)
