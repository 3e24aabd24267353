"""Real odd and broken files, each with the rule that applies to it; and thousands made of them by damage."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from dist_fusion.data.images import UnreadableImage, read

FOLDER = Path(__file__).parent / "odd_images"
MUTATIONS = int(os.environ.get("DIST_FUSION_MUTATIONS", "800"))
BLACK, WHITE = (0, 0, 0), (255, 255, 255)


class Reads(NamedTuple):
    """A file that is a picture: its size upright, and what colour is where, from 0 to 1 across and down."""

    rule: str
    width: int
    height: int
    colours: dict[tuple[float, float], tuple[int, int, int]]


class Refused(NamedTuple):
    """A file that is none, and what the reason says."""

    rule: str
    reason: str


UPRIGHT, PLAIN, ON_WHITE, FIRST = "EXIF turned it", "as it is", "transparent is white", "first frame"
CUT, BROKEN, DEPTH = "refused: it lacks its end", "refused: damaged", "8 bits a channel"
HOPPER = {(0.0, 0.0): (20, 20, 62), (0.5, 0.5): (170, 80, 58), (1.0, 1.0): (134, 158, 202)}
HOLE = {(0.0, 0.0): (255, 0, 0), (0.5, 0.5): WHITE}
ODD = {
    "exifex__Landscape_1.jpg": Reads(PLAIN, 1800, 1200, {(0.0, 0.0): (111, 157, 217), (1.0, 1.0): (31, 30, 30)}),
    "exifex__Landscape_6.jpg": Reads(UPRIGHT, 1800, 1200, {(0.0, 0.0): (111, 157, 217), (1.0, 1.0): (31, 30, 30)}),
    "pillow__1_trns.png": Reads(ON_WHITE, 64, 64, {(0.0, 0.0): BLACK, (0.5, 0.5): WHITE}),
    "pillow__anim_frame1.webp": Reads(PLAIN, 82, 82, {(0.0, 0.0): WHITE, (0.46, 0.7): (216, 0, 39)}),
    "pillow__apng_delay.png": Reads(FIRST, 128, 64, {(0.5, 0.5): (255, 0, 0)}),
    "pillow__avif_hopper.avif": Reads(PLAIN, 128, 128, HOPPER),
    "pillow__avif_hopper.heif": Reads("ffmpeg 9 reads it, 5.1 does not", 128, 128, HOPPER),
    "pillow__avif_star.avifs": Reads(FIRST, 159, 159, {(0.0, 0.0): WHITE, (0.5, 0.5): (254, 238, 171)}),
    "pillow__avif_transparency.avif": Reads(ON_WHITE, 64, 64, HOLE),
    "pillow__bmp_b_badrle.bmp": Reads("damage that nothing tells", 127, 64, {}),
    "pillow__broken.png": Refused(BROKEN, "Pillow does not know it"),
    "pillow__broken_data_stream.png": Refused(BROKEN, "unrecognized data stream"),
    "pillow__chi.gif": Reads(FIRST, 320, 240, {(0.0, 0.0): (0, 1, 0), (0.5, 0.5): (254, 255, 252)}),
    "pillow__dispose_bgnd.gif": Reads(FIRST, 100, 100, {(0.0, 0.0): (135, 206, 235), (0.5, 0.5): (30, 144, 255)}),
    "pillow__flower.webp": Reads(PLAIN, 480, 360, {(0.5, 0.5): (253, 162, 108)}),
    "pillow__hopper.webp": Reads(PLAIN, 128, 128, HOPPER),
    "pillow__hopper_16bit_qtables.jpg": Reads("16-bit tables", 128, 128, {(1.0, 1.0): (129, 148, 181)}),
    "pillow__hopper_gray.jpg": Reads("grey", 128, 128, {(0.5, 0.5): (99, 99, 99)}),
    "pillow__hopper_orientation_2.jpg": Reads(UPRIGHT, 128, 128, HOPPER),
    "pillow__hopper_orientation_3.jpg": Reads(UPRIGHT, 128, 128, HOPPER),
    "pillow__hopper_orientation_6.jpg": Reads(UPRIGHT, 128, 128, HOPPER),
    "pillow__hopper_orientation_6.webp": Reads(UPRIGHT, 128, 128, HOPPER),
    "pillow__icc-after-SOF.jpg": Reads("colour profile not applied", 10, 10, {(0.5, 0.5): BLACK}),
    "pillow__icc_profile.png": Reads("colour profile not applied", 57, 57, {(0.5, 0.5): (49, 16, 10)}),
    "pillow__invalid-exif.jpg": Reads("damaged EXIF turns nothing", 200, 200, {(0.5, 0.5): (118, 118, 118)}),
    "pillow__jpeg_ff00_header.jpg": Reads("junk before it is passed over", 300, 225, {(0.5, 0.5): (145, 73, 110)}),
    "pillow__junk_jpeg_header.jpg": Reads("junk in its head is passed over", 1024, 768, {(0.0, 0.0): (164, 203, 246)}),
    "pillow__l_trns.png": Reads(ON_WHITE, 64, 64, {(0.0, 0.0): BLACK, (0.5, 0.5): WHITE}),
    "pillow__multipage-lastframe.tif": Reads("first page", 20, 20, {(0.5, 0.5): (0, 0, 255)}),
    "pillow__multiple_exif.jpg": Reads("one pixel", 1, 1, {(0.0, 0.0): BLACK}),
    "pillow__no_palette.gif": Reads("one pixel, no palette: grey", 1, 1, {(0.0, 0.0): BLACK}),
    "pillow__p_16.png": Reads(ON_WHITE, 128, 128, {(0.0, 0.0): (255, 0, 0), (1.0, 1.0): WHITE}),
    "pillow__p_trns_single.png": Reads(ON_WHITE, 64, 64, HOLE),
    "pillow__photoshop-200dpi-broken.jpg": Reads("damaged EXIF turns nothing", 200, 200, {(0.5, 0.5): (118, 118, 118)}),
    "pillow__pil123rgba.png": Reads(ON_WHITE, 162, 150, {(0.0, 0.0): WHITE, (0.5, 0.5): (35, 22, 3)}),
    "pillow__pil_sample_rgb.jpg": Reads(PLAIN, 100, 100, {(0.0, 0.0): (231, 32, 25), (1.0, 1.0): BLACK}),
    "pillow__rgb_trns.png": Reads(ON_WHITE, 64, 64, HOLE),
    "pillow__tRNS_null_1x1.png": Reads(ON_WHITE + ", one pixel", 1, 1, {(0.0, 0.0): WHITE}),
    "pillow__tiff_16bit_RGB.tiff": Reads(DEPTH, 100, 40, {(1.0, 1.0): (62, 51, 43)}),
    "pillow__transparent.gif": Reads(ON_WHITE, 200, 150, {(0.0, 0.0): WHITE, (0.5, 0.5): (134, 60, 60)}),
    "pillow__transparent.webp": Reads(ON_WHITE, 200, 150, {(0.0, 0.0): WHITE, (0.5, 0.5): (140, 71, 68)}),
    "pillow__truncated_end_chunk.png": Refused(CUT, "Truncated File Read"),
    "pillow__truncated_jpeg.jpg": Refused(CUT, "truncated"),
    "pillow__ultrahdr.jpg": Refused(CUT, "truncated"),
    "pillow__unknown_compression_method.png": Refused(BROKEN, "Pillow does not know it"),
    "small__Mpeg4.mp4": Refused("refused: a video without pictures", "ffmpeg"),
    "small__gif.gif": Refused("refused: no pixels", "Pillow does not know it"),
    "small__jpeg.jpg": Reads("one pixel", 1, 1, {(0.0, 0.0): (190, 190, 190)}),
    "small__jpeg2.jp2": Reads("one pixel", 1, 1, {(0.0, 0.0): BLACK}),
    "small__mp4-with-audio.mp4": Refused("refused: a video without pictures", "ffmpeg"),
    "small__png-truncated.png": Reads("every row is there: " + ON_WHITE, 1, 1, {(0.0, 0.0): WHITE}),
}


@pytest.mark.parametrize("name", ODD)
def test_an_odd_file_is_read_or_refused_by_its_rule(name):
    expected, data = ODD[name], (FOLDER / name).read_bytes()
    if isinstance(expected, Refused):
        with pytest.raises(UnreadableImage, match=expected.reason):
            read(data, 2000)
        return
    try:
        image = read(data, 2000)
    except UnreadableImage:
        if name.endswith(".heif"):
            pytest.skip("there is no ffmpeg that reads HEIF")
        raise
    assert (image.mode, image.size) == ("RGB", (expected.width, expected.height))
    for (across, down), colour in expected.colours.items():
        place = (min(int(across * image.width), image.width - 1), min(int(down * image.height), image.height - 1))
        found = image.getpixel(place)
        assert max(abs(a - b) for a, b in zip(found, colour, strict=True)) <= 12, (across, down, found)


def test_every_odd_file_has_its_rule():
    assert sorted(ODD) == sorted(path.name for path in FOLDER.iterdir() if path.name != "NOTICE")


def test_odd_files_write_nothing_to_the_log():
    """Pillow warns of damaged EXIF and TIFF: in a long run, of the same files in every epoch and process."""
    program = """
import sys
from pathlib import Path
from dist_fusion.data.images import UnreadableImage, read
for path in map(Path, sys.argv[1:]):
    data = path.read_bytes()
    for image in (data, data[: len(data) // 2], data[:80] + data[90:]):
        try:
            read(image, 32)
        except UnreadableImage:
            pass
"""
    names = [str(FOLDER / name) for name in ODD if not name.endswith(("mp4", "heif"))]
    done = subprocess.run([sys.executable, "-W", "default", "-c", program, *names], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def mutated(data, other, draw):
    """`data` with one to four damages, of the kinds that disks, networks and programs do."""
    found = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        place, length = draw.randrange(len(found) + 1), draw.choice((1, 2, 4, 30, 500))
        match draw.choice(("change", "flip", "zero", "cut out", "cut off", "double", "splice")):
            case "change":
                found[place : place + length] = draw.randbytes(length)
            case "flip" if place < len(found):
                found[place] ^= 1 << draw.randrange(8)
            case "zero":
                found[place : place + length] = bytes(length)
            case "cut out":
                del found[place : place + length]
            case "cut off":
                del found[place:]
            case "double":
                found[place:place] = found[place : place + length]
            case "splice":
                start = draw.randrange(len(other))
                found[place : place + length] = other[start : start + length]
    return bytes(found)


@pytest.mark.filterwarnings("ignore")  # pytest undoes what the module does about Pillow's
def test_a_mutated_file_is_a_picture_or_unreadable_and_takes_no_time():
    """DIST_FUSION_MUTATIONS says how many; half of the damage is near the head, where the sizes are."""
    files = [data for name in ODD if len(data := (FOLDER / name).read_bytes()) < 60_000]
    draw, longest, outcomes = random.Random(0), 0.0, {True: 0, False: 0}
    for number in range(MUTATIONS):
        data, head = files[number % len(files)], draw.choice((200, None))
        image = mutated(data[:head], draw.choice(files), draw) + (data[head:] if head else b"")
        start = time.perf_counter()
        try:
            found = read(image, 32)
            assert found.mode == "RGB" and min(found.size) > 0
            outcomes[True] += 1
        except UnreadableImage:
            outcomes[False] += 1
        longest = max(longest, time.perf_counter() - start)
    assert longest < 15
    assert min(outcomes.values()) > MUTATIONS / 10
