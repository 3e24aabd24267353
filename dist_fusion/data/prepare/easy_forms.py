"""easy-VQA's facts in two other forms: sentences about two images (as NLVR2 has) and hypotheses (as SNLI-VE has).

Only images whose colour and shape both follow from their questions are used, in the splits of `easy_vqa`. Every
sentence is as often true as false, and every hypothesis as often entailed as contradicted as neither, so the text
alone gives exactly 50 % and 33.3 %. "Exactly one image …" and "the two shapes …" cannot be judged from one image.

A neutral hypothesis needs an image that leaves it open, and easy-VQA has none: a grey square, ours, covers the shape.
Whoever only sees whether there is a cover judges 66.7 % of the hypotheses rightly; beyond that the shape must be seen.
"""

import io
import json
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from dist_fusion.data.prepare.easy_vqa import COLOURS, SHAPES, Split, facts, read_splits
from dist_fusion.data.shards import write_shards
from dist_fusion.data.text import train_vocabulary

Scene = tuple[str, str]
"""Colour and shape."""
SCENES = frozenset(product(COLOURS, SHAPES))
DRAWS = {"train": 6000, "dev": 400, "test": 1000}
"""How many sentences are drawn for a split, each for one picture (or pair) a label."""
HYPOTHESES = ("there is a {} in the image", "the image contains a {}", "a {} is present")
SAMPLES_PER_SHARD = 2000
COVER_SIDE, COVER_GREY = 40, 192  # pixels, more than any shape has; a grey that no shape has
GROUND = 60  # levels: every shape differs by more than this from the ground, which is one pale colour


class Picture(NamedTuple):
    """An image whose facts are known."""

    name: str
    scene: Scene
    png: bytes


class Sentence(NamedTuple):
    """What can be said of two images, and what left and right may show, in some ways, when it is true and when not."""

    text: str
    true: Sequence[tuple[frozenset[Scene], frozenset[Scene]]]
    false: Sequence[tuple[frozenset[Scene], frozenset[Scene]]]


class Counts(NamedTuple):
    """What was written of one split."""

    samples: int
    statements: int


class _Sample(NamedTuple):
    images: Mapping[str, bytes]  # by extension
    tree: Mapping[str, Any]  # the JSON


def prepare_nlvr2(folder: Path) -> dict[str, Counts]:
    """Write `train`, `dev` and `test` shards of pairs, `vocab.txt` and `prepare.json`."""
    return _prepare(folder, _pairs)


def prepare_snli_ve(folder: Path) -> dict[str, Counts]:
    """Write `train`, `dev` and `test` shards of images with hypotheses, `vocab.txt` and `prepare.json`."""
    return _prepare(folder, _images)


def sentences() -> list[Sentence]:
    """All sentences about two images."""
    said = []
    for what, scenes in _things().items():
        others = SCENES - scenes
        one = [(scenes, others), (others, scenes)]
        said += [
            Sentence(f"both images contain a {what}", [(scenes, scenes)], one),
            Sentence(f"neither image contains a {what}", [(others, others)], one),
            Sentence(f"exactly one image contains a {what}", one, [(scenes, scenes), (others, others)]),
            Sentence(f"the left image contains a {what}", [(scenes, SCENES)], [(others, SCENES)]),
            Sentence(f"the right image contains a {what}", [(SCENES, scenes)], [(SCENES, others)]),
        ]
    for text, words, place in (
        ("the two shapes have the same color", COLOURS, 0),
        ("the two shapes are of the same kind", SHAPES, 1),
    ):
        alike = [frozenset(scene for scene in SCENES if scene[place] == word) for word in words]
        said.append(Sentence(text, [(a, a) for a in alike], [(a, SCENES - a) for a in alike]))
    for left, right in product(SHAPES, repeat=2):
        a, b = (_things()[shape] for shape in (left, right))
        text = f"the left image contains a {left} and the right image contains a {right}"
        said.append(Sentence(text, [(a, b)], [(a, SCENES - b), (SCENES - a, b)]))
    return said


def hypotheses() -> dict[str, frozenset[Scene]]:
    """All sentences about one image, each with the scenes that entail it; the others contradict it."""
    things = {**_things(), **{" ".join(scene): frozenset([scene]) for scene in sorted(SCENES)}}
    return {template.format(what): scenes for template in HYPOTHESES for what, scenes in things.items()}


def cover(png: bytes) -> bytes:
    """The picture with a grey square over its shape, as large over a small shape as over a large one."""
    pixels = np.array(Image.open(io.BytesIO(png)).convert("RGB"))
    edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    shape = (np.abs(pixels - np.median(edge, 0)) > GROUND).any(-1)
    top, left = (
        int(np.clip((seen.min() + seen.max() + 1 - COVER_SIDE) // 2, 0, pixels.shape[0] - COVER_SIDE))
        for seen in shape.nonzero()
    )
    pixels[top : top + COVER_SIDE, left : left + COVER_SIDE] = COVER_GREY
    written = io.BytesIO()
    Image.fromarray(pixels).save(written, "PNG")
    return written.getvalue()


def _things() -> dict[str, frozenset[Scene]]:
    """What an image may contain -> the scenes that do."""
    colours = {f"{colour} shape": frozenset((colour, shape) for shape in SHAPES) for colour in COLOURS}
    return {**colours, **{shape: frozenset((colour, shape) for colour in COLOURS) for shape in SHAPES}}


def _prepare(folder: Path, make: Callable[[str, Sequence[Picture]], list[_Sample]]) -> dict[str, Counts]:
    folder.mkdir(parents=True, exist_ok=True)
    captions = [f"a {colour} {shape}" for colour, shape in sorted(SCENES)]
    texts = [*(sentence.text for sentence in sentences()), *hypotheses(), *captions]
    train_vocabulary(texts, 200, folder / "vocab.txt")  # the same for both forms: one model may learn both
    counts = {}
    for name, split in read_splits().items():
        samples = make(name, _pictures(split))
        write_shards(folder / name, _members(samples), SAMPLES_PER_SHARD)
        counts[name] = Counts(len(samples), sum(len(sample.tree["statements"]) for sample in samples))
    written = {name: count._asdict() for name, count in counts.items()}
    (folder / "prepare.json").write_text(json.dumps(written, indent=2) + "\n")  # last: its presence says all is there
    return counts


def _pictures(split: Split) -> list[Picture]:
    """The images of a split whose colour and shape are both known."""
    known = ((image, facts(split.questions[image])) for image in sorted(split.questions))
    return [
        Picture(f"{split.source}/{image}", (min(of.colours), min(of.shapes)), split.paths[image].read_bytes())
        for image, of in known
        if of.caption()
    ]


def _choose(
    draw: Random, pictures: Sequence[Picture], scenes: frozenset[Scene], taken: Container[Picture] = ()
) -> Picture:
    """A picture of one of `scenes` that is not taken."""
    while (picture := draw.choice(pictures)).scene not in scenes or picture in taken:
        pass
    return picture


def _pairs(split: str, pictures: Sequence[Picture]) -> list[_Sample]:
    """One true and one false pair for each sentence drawn; the two are one group."""
    draw, said, samples = Random(f"easy-nlvr2 {split}"), sentences(), []
    for number in range(DRAWS[split]):
        sentence = draw.choice(said)
        for label, ways in (("True", sentence.true), ("False", sentence.false)):
            may_left, may_right = draw.choice(ways)
            left = _choose(draw, pictures, may_left)
            right = _choose(draw, pictures, may_right, taken=(left,))
            group = f"easy-nlvr2/{split}/{number}"
            statement = {"id": f"{group}/{label}", "text": sentence.text, "label": label, "group": group}
            tree = {"image_id": f"{group}/{label}", "source": "easy-vqa", "statements": [statement]}
            samples.append(_Sample({"left.png": left.png, "right.png": right.png}, tree))
    draw.shuffle(samples)
    return samples


def _images(split: str, pictures: Sequence[Picture]) -> list[_Sample]:
    """Every picture with its caption and the hypotheses drawn for it, and covered pictures with theirs."""
    draw, said = Random(f"easy-snli-ve {split}"), list(hypotheses().items())
    plain, covered = ({text: dict[Picture, str]() for text, _ in said} for _ in range(2))  # hypothesis -> its labels
    for _ in range(DRAWS[split]):
        text, entailing = draw.choice(said)
        for label, scenes, shown in (
            ("entailment", entailing, plain),
            ("contradiction", SCENES - entailing, plain),
            ("neutral", SCENES, covered),
        ):
            shown[text][_choose(draw, pictures, scenes, taken=shown[text])] = label
    samples = [
        _Sample({"png": picture.png}, _tree(picture.name, ["a {} {}".format(*picture.scene)], plain, picture))
        for picture in pictures
    ]
    samples += [
        _Sample({"png": cover(picture.png)}, _tree(f"{picture.name}/covered", [], covered, picture))
        for picture in pictures
        if any(picture in labels for labels in covered.values())
    ]
    draw.shuffle(samples)
    return samples


def _tree(name: str, texts: list[str], shown: Mapping[str, Mapping[Picture, str]], picture: Picture) -> dict[str, Any]:
    told = [(text, labels[picture]) for text, labels in shown.items() if picture in labels]
    statements = [{"id": f"{name}/{n}", "text": text, "label": label} for n, (text, label) in enumerate(told)]
    return {"image_id": name, "source": "easy-vqa", "texts": texts, "statements": statements}


def _members(samples: Sequence[_Sample]) -> Iterator[tuple[str, dict[str, bytes]]]:
    for number, sample in enumerate(samples):
        yield f"{number:06d}", {**sample.images, "json": json.dumps(sample.tree).encode()}
