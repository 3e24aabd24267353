"""Bytes to pixels: the same pixels go to the student and to the teacher."""

import io
import struct

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

EXTENSIONS = ("jpg", "jpeg", "png", "webp")
FORMATS = ("JPEG", "PNG", "WEBP")  # not all that Pillow knows: it hands an EPS to Ghostscript, whatever its file's name
REFUSALS = (OSError, ValueError, SyntaxError, TypeError, struct.error, Image.DecompressionBombError)


class UnreadableImage(ValueError):
    """These bytes are no image that can be decoded; the message says why."""


def decode(data: bytes, size: int) -> Tensor:
    """An image file as [3, size, size], upright, on white where transparent, with mean and deviation 0.5 (ViLT).

    Raises:
        UnreadableImage: for anything Pillow refuses (its exceptions have no common base).
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            image.draft("RGB", (size, size))  # JPEG: decode at a fraction of the size where that is enough
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I"):  # 16 bits a pixel, which convert() clips to white
                upright = Image.fromarray((np.asarray(upright) // 257).clip(0, 255).astype(np.uint8))
            if upright.has_transparency_data:
                clear = upright.convert("RGBA")
                upright = Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear)
            pixels = np.asarray(upright.convert("RGB").resize((size, size), Image.Resampling.BICUBIC))
    except REFUSALS as error:
        raise UnreadableImage(f"{type(error).__name__}: {error}") from None
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float().div_(127.5).sub_(1.0)
