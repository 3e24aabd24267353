"""The bytes of an image as a shard keeps them: the original ones where they serve, else a smaller JPEG."""

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from dist_fusion.data.images import FORMATS, REFUSALS, UnreadableImage
from dist_fusion.data.prepare.plan import Picture

QUALITY = 95
ROOM = 1.25
"""An image whose short side is within this factor of what is asked is not worth a second encoding."""
EXTENSION = {b"\xff\xd8": "jpg", b"\x89P": "png", b"RI": "webp"}
"""By the first two bytes of what `kept` returns: a file's name may lie (many of NLVR2's .png are JPEGs)."""
UPRIGHT = 1
ORIENTATION = 0x0112


def read_picture(source: Path, picture: Picture, short_side: int) -> bytes:
    """The bytes to keep of one image.

    Raises:
        FileNotFoundError: if no file is at any of its places.
        UnreadableImage: if it cannot be decoded.
    """
    path = next((source / place for place in picture.places if (source / place).is_file()), None)
    if path is None:
        raise FileNotFoundError(picture.places[0])
    data = path.read_bytes()
    return kept(data if picture.box is None else cropped(data, picture.box), short_side)


def kept(data: bytes, short_side: int) -> bytes:
    """The same bytes if they decode to an upright, opaque image that is small enough, else a JPEG of that short side.

    Raises:
        UnreadableImage: for anything Pillow refuses.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            serves = (
                image.mode in ("L", "RGB")
                and not image.has_transparency_data
                and getattr(image, "n_frames", 1) == 1
                and image.getexif().get(ORIENTATION, UPRIGHT) == UPRIGHT
                and min(image.size) <= ROOM * short_side
            )
            if not serves:
                return encoded(image, short_side)
            image.load()  # a header that opens says nothing of the rest
            return data
    except REFUSALS as error:
        raise UnreadableImage(f"{type(error).__name__}: {error}") from None


def encoded(image: Image.Image, short_side: int) -> bytes:
    """An image as JPEG: upright, on white where transparent, its short side at most `short_side`."""
    image.draft("RGB", _within(image.size, short_side))  # JPEG: decode at a fraction of the size where that is enough
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I"):  # 16 bits a pixel, which convert() clips to white
        upright = Image.fromarray((np.asarray(upright) // 257).clip(0, 255).astype(np.uint8))
    if upright.has_transparency_data:
        clear = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear)
    small = upright.convert("RGB").resize(_within(upright.size, short_side), Image.Resampling.BICUBIC)
    written = io.BytesIO()
    small.save(written, "JPEG", quality=QUALITY)
    return written.getvalue()


def cropped(data: bytes, box: tuple[int, int, int, int]) -> bytes:
    """A part of an image as PNG, so that nothing is lost twice.

    Raises:
        UnreadableImage: for anything Pillow refuses, and for an image that has no such part.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.size[0] < box[2] or image.size[1] < box[3]:
                raise ValueError(f"its {image.size[0]} x {image.size[1]} pixels have no part {box}")
            part = image.crop(box).convert("RGB")
    except REFUSALS as error:
        raise UnreadableImage(f"{type(error).__name__}: {error}") from None
    written = io.BytesIO()
    part.save(written, "PNG")
    return written.getvalue()


def _within(size: tuple[int, int], short_side: int) -> tuple[int, int]:
    shrink = max(1.0, min(size) / short_side)
    return max(1, round(size[0] / shrink)), max(1, round(size[1] / shrink))
