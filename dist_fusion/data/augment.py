"""Pictures changed a little at every visit, seeded by the visit: the same on any rank, worker and restart."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import numpy as np
from PIL import Image

from dist_fusion.batch import content_id

Augmentation = Callable[[Image.Image], Image.Image]

# ViLT's list: without Invert (colours are asked for), CutoutAbs (what is asked for may go), and flips (so are left and
# right).
OPERATIONS = (
    "AutoContrast", "Equalize", "Rotate", "Posterize", "Solarize", "SolarizeAdd", "Color", "Contrast", "Brightness",
    "Sharpness", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel",
)  # fmt: skip
# ViLT's magnitude 9 is of 30, timm's of 10; and ViLT always applies an operation, timm one in two unless told.
STRENGTH = "rand-n2-m3-p1"
SHIFT = 100 / 640  # ViLT's 100 pixels at the most, as a share, since a decoded picture may be smaller than its file


@cache
def randaugment() -> Augmentation:
    """RandAugment (arXiv:1909.13719) as in ViLT (arXiv:2102.03334): 2 operations, magnitude 9 of 30; by timm.

    What comes into the picture is black, and its pixels are the nearest ones, as there. One difference: SolarizeAdd
    brightens the darker half of the levels, where ViLT's code brightens all and then inverts the brighter half.
    """
    from timm.data.auto_augment import rand_augment_transform  # takes seconds, and only those who augment need it

    settings = {"translate_pct": SHIFT, "img_mean": (0, 0, 0), "interpolation": Image.Resampling.NEAREST}
    return rand_augment_transform(STRENGTH, settings, list(OPERATIONS))


AUGMENTATIONS: dict[str, Callable[[], Augmentation | None]] = {"none": lambda: None, "randaugment": randaugment}
"""Recipe word -> what makes the augmentation. Call it before loaders start, and they need not import timm each."""


def augment(image: Image.Image, kind: str, seed: str) -> Image.Image:
    """An RGB image of the same size, changed by AUGMENTATIONS[`kind`] in a way that `seed` alone decides.

    Of one process one thread may augment: the libraries draw from Python's and numpy's global generators, which are
    left as they were.
    """
    change = AUGMENTATIONS[kind]()
    if change is None:
        return image
    with _seeded(seed):
        return change(image)


@contextmanager
def _seeded(seed: str) -> Iterator[None]:
    python, arrays = random.getstate(), np.random.get_state()
    try:
        random.seed(seed)
        np.random.seed(content_id(seed) % 2**32)
        yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)
