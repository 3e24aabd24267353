"""The bytes of an image as a shard keeps them, from a file, a part of a file, or a video."""

import io
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from dist_fusion.data import video
from dist_fusion.data.images import QUALITY, UnreadableImage, kept, read
from dist_fusion.data.prepare.plan import Picture

WHOLE = 65535
"""Pixels that no image's side exceeds: asked for so many, none is read at a fraction of its size."""


def read_picture(source: Path, picture: Picture, short_side: int) -> bytes:
    """The bytes to keep of one image, no larger than `images.kept` allows.

    Raises:
        FileNotFoundError: if no file is at any of its places.
        UnreadableImage: if it cannot be decoded, or has not the part that is meant.
    """
    data = _place(source, picture).read_bytes()
    return kept(data if picture.box is None else cropped(data, picture.box), short_side)


def read_frames(source: Path, picture: Picture, count: int, short_side: int) -> Iterator[bytes]:
    """`count` frames of a video as JPEG, their short sides at most `short_side` pixels.

    Raises:
        FileNotFoundError: if no file is at any of its places.
        UnreadableVideo: if it cannot be decoded to its end.
    """
    for image in video.frames(_place(source, picture), count):
        shrink = min(1.0, short_side / min(image.size))
        width, height = (max(1, round(side * shrink)) for side in image.size)
        written = io.BytesIO()
        image.resize((width, height), Image.Resampling.BICUBIC).save(written, "JPEG", quality=QUALITY)
        yield written.getvalue()


def cropped(data: bytes, box: tuple[int, int, int, int]) -> bytes:
    """A part of an image (pixels left, top, right, bottom) as PNG, so that nothing is lost twice.

    Raises:
        UnreadableImage: as `images.read`, and for an image that has no such part.
    """
    image = read(data, WHOLE)
    if image.size[0] < box[2] or image.size[1] < box[3]:
        raise UnreadableImage(f"its {image.size[0]} x {image.size[1]} pixels have no part {box}")
    written = io.BytesIO()
    image.crop(box).save(written, "PNG")
    return written.getvalue()


def _place(source: Path, picture: Picture) -> Path:
    for place in picture.places:
        if (source / place).is_file():
            return source / place
    raise FileNotFoundError(picture.places[0])
