"""easy-VQA (Victor Zhou, 2019, MIT; the PyPI package `easy-vqa`) as shards.

5,000 images of one coloured shape and 48,248 questions, made by others. Captions follow from the questions and answers
by logic: a positive answer fixes the colour or the shape, a negative one rules it out. Where both are known the caption
is "a teal rectangle". Dev is split off train by image, never by question, so no dev image is trained on.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple

from easy_vqa import get_answers, get_test_image_paths, get_test_questions, get_train_image_paths, get_train_questions

from dist_fusion.data.shards import write_shards
from dist_fusion.data.text import train_vocabulary

COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
KINDS = ("colour", "shape", "yes/no")
SAMPLES_PER_SHARD = 1000
DEV_IMAGES = 400


class Facts(NamedTuple):
    """What an image's questions and answers leave possible."""

    colours: frozenset[str]
    shapes: frozenset[str]

    def caption(self) -> str | None:
        """`a teal rectangle` if colour and shape are known, else None."""
        if len(self.colours) == 1 and len(self.shapes) == 1:
            return f"a {min(self.colours)} {min(self.shapes)}"
        return None


class Split(NamedTuple):
    """The images of a split by number, with what is asked about them."""

    source: str  # of the numbers
    questions: Mapping[int, Sequence[tuple[str, str]]]  # (question, answer)
    paths: Mapping[int, Path]


class Counts(NamedTuple):
    """What was written of one split."""

    images: int
    captions: int
    questions: int


def prepare(folder: Path) -> dict[str, Counts]:
    """Write `train`, `dev` and `test` shards, `answers.json`, `vocab.txt` (learned on train) and `prepare.json`."""
    splits = read_splits()
    folder.mkdir(parents=True, exist_ok=True)
    answers = sorted(get_answers())
    (folder / "answers.json").write_text(json.dumps({"answers": answers, "kinds": KINDS}) + "\n")
    words = [q for questions in splits["train"].questions.values() for q, _ in questions] + list(SHAPES) + list(COLOURS)
    train_vocabulary(words, 200, folder / "vocab.txt")
    counts = {}
    for name, split in splits.items():
        write_shards(folder / name, _samples(split), SAMPLES_PER_SHARD)
        captions = sum(facts(asked).caption() is not None for asked in split.questions.values())
        counts[name] = Counts(len(split.questions), captions, sum(map(len, split.questions.values())))
    written = {split: count._asdict() for split, count in counts.items()}
    (folder / "prepare.json").write_text(json.dumps(written, indent=2) + "\n")  # last: its presence says all is there
    return counts


def read_splits() -> dict[str, Split]:
    """`train`, `dev` and `test`, disjoint by image."""
    train, test = _by_image(get_train_questions()), _by_image(get_test_questions())
    dev = set(Random("easy-vqa dev").sample(sorted(train), DEV_IMAGES))
    paths = {image: Path(path) for image, path in get_train_image_paths().items()}
    return {
        "train": Split("easy-vqa/train", {i: q for i, q in train.items() if i not in dev}, paths),
        "dev": Split("easy-vqa/train", {i: q for i, q in train.items() if i in dev}, paths),
        "test": Split("easy-vqa/test", test, {image: Path(path) for image, path in get_test_image_paths().items()}),
    }


def facts(asked: Sequence[tuple[str, str]]) -> Facts:
    """What (question, answer) pairs about one image tell of its colour and shape."""
    colours, shapes = set(COLOURS), set(SHAPES)
    for question, answer in asked:
        named = set(re.findall(r"\w+", question))
        if answer in ("yes", "no"):
            there = (answer == "yes") != bool(named & {"not", "no"})
            for possible in (colours, shapes):
                if named & possible:
                    possible &= named if there else possible - named
        else:
            for possible, known in ((colours, COLOURS), (shapes, SHAPES)):
                told = (named | {answer}) & set(known)
                if told:
                    possible &= told
    assert colours and shapes, asked
    return Facts(frozenset(colours), frozenset(shapes))


def kind_of(answer: str) -> str:
    """Which of KINDS a question with this answer is."""
    return "colour" if answer in COLOURS else "shape" if answer in SHAPES else "yes/no"


def _by_image(read: tuple[list[str], list[str], list[int]]) -> dict[int, list[tuple[str, str]]]:
    by_image = defaultdict(list)
    for question, answer, image in zip(*read, strict=True):
        by_image[image].append((question, answer))
    return dict(by_image)


def _samples(split: Split) -> Iterator[tuple[str, dict[str, bytes]]]:
    for image in sorted(split.questions):
        caption = facts(split.questions[image]).caption()
        name = f"{split.source}/{image}"
        sample = {
            "image_id": name,
            "source": "easy-vqa",
            "texts": [caption] if caption else [],
            "questions": [
                {
                    "id": f"{name.removeprefix('easy-vqa/')}/{n}",
                    "question": question,
                    "answers": {answer: 1.0},
                    "kind": kind_of(answer),
                }
                for n, (question, answer) in enumerate(split.questions[image])
            ],
        }
        yield (
            f"{image:09d}",
            {
                "png": split.paths[image].read_bytes(),
                "txt": (caption or "").encode(),
                "json": json.dumps(sample).encode(),
            },
        )
