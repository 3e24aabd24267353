"""Bytes to pixels, by rule: the same pixels go to the student and to the teacher.

A picture is read upright (EXIF), in 8 bits a channel, on white where it is transparent, and of several frames the
first. What lacks its end is refused: rows made up in grey would teach what is not there. Colour profiles are not
applied. What Pillow does not know goes to ffmpeg (`video`).
"""

import io
import logging
import warnings
from typing import NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from dist_fusion.data.video import MAX_PIXELS, UnreadableVideo, first_frame

# Not all that Pillow knows: it hands an EPS to Ghostscript, whatever its file's name.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "AVIF", "TIFF", "BMP", "JPEG2000")
KEPT = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}  # formats that shards hold -> extension of the member
EXTENSIONS = ("jpeg", *KEPT.values())
QUALITY = 95  # of pictures encoded anew
SLACK = 1.25  # how much larger than asked a picture may be to be kept as it is
MAX_SCANS = 500  # of a progressive JPEG: each takes a few bytes, and the time of a whole picture
TURNS = {  # EXIF orientation -> what makes the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# How a PNG's samples lie -> from its transparent colour as the file says it to that colour among Pillow's 8 bits.
COLOURS = {"L;2": lambda value: value * 85, "L;4": lambda value: value * 17, "RGB;16B": lambda value: value >> 8}

# A damaged file is reported once, by UnreadableImage. Pillow would warn of every odd one, in every loader process.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").addHandler(logging.NullHandler())


class UnreadableImage(ValueError):
    """These bytes are no image that can be decoded; the message says why."""


class _Picture(NamedTuple):
    image: Image.Image  # RGB, upright
    plain: bool  # whether the file holds it so, in a format of KEPT, and nothing more
    short_side: int  # pixels, in the file


def decode(data: bytes, size: int) -> Tensor:
    """An image file as [3, size, size], upright, on white where transparent, with mean and deviation 0.5 (ViLT).

    Raises:
        UnreadableImage: as `read`.
    """
    return pixels(read(data, size), size)


def read(data: bytes, size: int) -> Image.Image:
    """An image file as an upright RGB image, its sides no shorter than `size` where the file's are not.

    Raises:
        UnreadableImage: for what neither Pillow nor ffmpeg reads, what lacks its end, has more than MAX_PIXELS, or
            more than 16 bits a channel (nothing says what is white there).
    """
    return _picture(data, size).image


def pixels(image: Image.Image, size: int) -> Tensor:
    """An RGB image as [3, size, size] from -1 (black) to 1 (white), squashed if it is no square."""
    array = np.array(image.resize((size, size), Image.Resampling.BICUBIC))
    return torch.from_numpy(array).permute(2, 0, 1).float().div_(127.5).sub_(1.0)


def kept(data: bytes, short_side: int) -> bytes:
    """The bytes of an image as a shard should hold them: the original ones if they are plain and small enough.

    Plain is JPEG, PNG or WebP, upright, opaque, of one frame, 8 bits a channel and RGB, grey or a palette; small
    enough is a short side of at most SLACK x `short_side` pixels. Else it is made a JPEG, no larger than asked.

    Raises:
        UnreadableImage: as `read`, so that a shard holds only what decodes; or if it is too long for a JPEG.
    """
    picture = _picture(data, short_side)
    if picture.plain and picture.short_side <= SLACK * short_side:
        return data
    image, buffer = picture.image, io.BytesIO()
    shrink = min(1.0, short_side / min(image.size))
    sides = tuple(max(1, round(side * shrink)) for side in image.size)
    if max(sides) > 65535:
        raise UnreadableImage(f"{sides[0]} x {sides[1]} pixels are too long for a JPEG")
    image.resize((sides[0], sides[1]), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


def extension(data: bytes) -> str:
    """What a shard's member with these bytes, from `kept`, is called: jpg, png or webp."""
    with Image.open(io.BytesIO(data), formats=tuple(KEPT)) as image:
        assert image.format is not None
        return KEPT[image.format]


def _picture(data: bytes, size: int) -> _Picture:
    try:
        return _by_pillow(data, size)
    except UnidentifiedImageError:
        pass  # it may be a video
    try:
        return _by_pillow(first_frame(data), size)._replace(plain=False)
    except (UnreadableVideo, UnidentifiedImageError) as error:
        raise UnreadableImage(f"UnidentifiedImageError: Pillow does not know it; {error}") from None


def _by_pillow(data: bytes, size: int) -> _Picture:
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_cost(image, data)
            width, height = image.size
            image.draft("RGB", (size, size))  # JPEG: decode at a fraction of the size where that is enough
            layout = image.tile[0].args if image.tile else None
            image.load()
            turn = TURNS.get(_orientation(image))
            plain = (
                image.format in KEPT
                and image.mode in ("RGB", "L", "P", "1")
                and turn is None
                and not image.has_transparency_data
                and not getattr(image, "is_animated", False)
            )
            lying = _on_white(_in_eight_bits(image, layout))
            return _Picture(lying if turn is None else lying.transpose(turn), plain, min(width, height))
    except (UnidentifiedImageError, UnreadableImage):
        raise
    except Exception as error:  # Pillow's readers raise whatever a damaged file leads them to
        raise UnreadableImage(f"{type(error).__name__}: {error}") from None


def _check_cost(image: Image.Image, data: bytes) -> None:
    """Refuse what its head alone shows to take too much memory or time; raises UnreadableImage."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise UnreadableImage(f"{width} x {height} pixels are more than {MAX_PIXELS}")
    if width * height == 0:
        raise UnreadableImage("it has no pixels")
    if "progressive" in image.info and data.count(b"\xff\xda") > MAX_SCANS:
        raise UnreadableImage(f"a progressive JPEG of more than {MAX_SCANS} scans")


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation of a loaded image (a TIFF is turned while it loads, and then says 1)."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # as above; and viewers too show a picture as it lies where its EXIF is damaged
        return 1


def _in_eight_bits(image: Image.Image, layout: object) -> Image.Image:
    """The image with 8 bits a channel, its transparent colour among them; `layout` is how its samples lay."""
    clear = image.info.get("transparency")
    if image.mode.startswith("I;16"):  # which convert() would clip to white
        values = np.asarray(image)
        grey = Image.fromarray((values // 257).astype(np.uint8))
        if clear is not None:
            grey.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
        return grey
    if image.mode in ("I", "F"):
        raise UnreadableImage("32 bits a pixel, of which nothing says what is white")
    if clear is not None and layout in COLOURS:
        scaled = COLOURS[str(layout)]
        image.info["transparency"] = tuple(map(scaled, clear)) if isinstance(clear, tuple) else scaled(clear)
    return image


def _on_white(image: Image.Image) -> Image.Image:
    if image.has_transparency_data:
        clear = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear)
    return image.convert("RGB")
