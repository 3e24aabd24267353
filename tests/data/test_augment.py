import random
import subprocess
import sys
from hashlib import sha256

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from dist_fusion.data.augment import AUGMENTATIONS, OPERATIONS, augment, randaugment


def drawing():
    """A picture that no flip, turn or change of colour leaves as it is; the red square is on the left."""
    shades = np.linspace(40, 210, 96 * 64).reshape(64, 96)
    image = Image.fromarray(np.stack([shades, shades.T.reshape(64, 96), 250 - shades], -1).astype(np.uint8))
    ImageDraw.Draw(image).rectangle((12, 20, 30, 40), (230, 20, 20))
    return image


def digests(seeds):
    image = drawing()
    return [sha256(augment(image, "randaugment", seed).tobytes()).hexdigest() for seed in seeds]


SEEDS = [f"0/{position}" for position in range(12)]


def test_equal_seeds_give_equal_pixels_in_another_process():
    program = f"from tests.data.test_augment import *; random.seed(7); np.random.seed(7); print(*digests({SEEDS}))"
    other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert digests(SEEDS) == digests(SEEDS) == other


def test_other_visits_give_other_pixels():
    assert len(set(digests(SEEDS))) >= len(SEEDS) - 2


def states():
    name, keys, *rest = np.random.get_state()
    return random.getstate(), name, keys.tolist(), rest, torch.get_rng_state().tolist()


@pytest.mark.parametrize("kind", AUGMENTATIONS)
def test_global_generators_are_left_as_they_were(kind):
    before = states()
    augment(drawing(), kind, "0/1")
    assert states() == before


def test_global_generators_are_left_as_they_were_by_one_that_fails(monkeypatch):
    def fails(image):
        random.random(), np.random.random()
        raise OSError("no picture")

    monkeypatch.setitem(AUGMENTATIONS, "fails", lambda: fails)
    before = states()
    with pytest.raises(OSError, match="no picture"):
        augment(drawing(), "fails", "0/1")
    assert states() == before


def test_it_is_vilts_list_without_inversion_cutout_and_flips():
    transform = randaugment()
    names = [op.name for op in transform.ops]
    assert sorted(names) == sorted(OPERATIONS) and len(names) == 14
    assert not any(word in name.lower() for name in names for word in ("invert", "cutout", "flip", "erase"))
    assert transform.num_layers == 2 and transform.choice_weights is None  # with replacement
    assert all(op.prob == 1 and op.magnitude_std == 0 for op in transform.ops)


STRENGTHS = {  # of 9 in 30, between the ends that ViLT's code gives, with either sign where it draws one
    "Rotate": 30 * 0.3,
    "Posterize": 1,
    "Solarize": 76,
    "SolarizeAdd": 33,
    "Color": 0.1 + 1.8 * 0.3,
    "Contrast": 0.1 + 1.8 * 0.3,
    "Brightness": 0.1 + 1.8 * 0.3,
    "Sharpness": 0.1 + 1.8 * 0.3,
    "ShearX": 0.3 * 0.3,
    "ShearY": 0.3 * 0.3,
    "TranslateXRel": 30 / 640,
    "TranslateYRel": 30 / 640,
}


def test_strengths_are_those_of_vilts_magnitude_9():
    """timm's own 9 would turn a picture by 27 degrees, ViLT's does by 9."""
    found = {op.name: op.level_fn(op.magnitude, op.hparams)[0] for op in randaugment().ops if op.level_fn}
    assert {name: abs(value) for name, value in found.items()} == pytest.approx(STRENGTHS)


def test_left_stays_left_and_the_size_stays():
    for position in range(60):
        image = augment(drawing(), "randaugment", f"place/{position}")
        assert image.size == (96, 64) and image.mode == "RGB"
    white = Image.new("RGB", (96, 64), "white")
    ImageDraw.Draw(white).rectangle((8, 16, 30, 48), "black")
    for position in range(60):
        row = np.asarray(augment(white, "randaugment", f"place/{position}").convert("L"), dtype=int)[32]
        assert abs(row[20] - row[48]) >= abs(row[75] - row[48])  # the square differs from the middle, not the right


def test_none_changes_nothing():
    image = drawing()
    assert augment(image, "none", "0/1").tobytes() == image.tobytes()
