"""What a data set's files hold, as samples still to be made: cheap to plan, and a pure function of the files."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from dist_fusion.schema import UserError

SPLITS = ("train", "restval", "dev", "test")
"""Folders of shards, in the order in which they are made; `restval` is the part of a val split that is not held out."""
MISSING = "missing image"
UNDECODABLE = "undecodable image"
EMPTY = "empty caption"
BARE = "image without caption"
DUPLICATE = "duplicate"
UNLABELLED = "label -"
UNKNOWN_IMAGE = "unknown image id"
UNANSWERABLE = "no answer in the vocabulary"
HELD_OUT = "in COCO's val or test"
"""Why something was left out: the keys of `skipped` in prepare.json."""


class Picture(NamedTuple):
    """One image of a sample: the first of some files that exists."""

    places: tuple[str, ...]  # under SRC
    box: tuple[int, int, int, int] | None = None  # pixels left, top, right, bottom, where only a part is meant


class Planned(NamedTuple):
    """One sample that is to be written: its images (two: left and right) and what its JSON says."""

    split: str
    images: tuple[Picture, ...]
    record: Mapping[str, Any]
    frames: int = 0  # of a video, each a sample of its own


class Skip(NamedTuple):
    """Something of the data set that is not in the shards."""

    split: str
    reason: str
    item: str


class Plan(NamedTuple):
    """All of a data set, in an order that never changes. `items` starts from the beginning at every call."""

    items: Callable[[], Iterator[Planned | Skip]]
    inputs: tuple[Path, ...]  # the files that the plan follows from, beside the images
    files: Mapping[str, bytes] = {}  # to be written beside the shards
    notes: Mapping[str, Any] = {}  # what else prepare.json should say


def option(default: Any, about: str) -> Any:
    """A field of `Options` with the line that `--help` shows."""
    return field(default=default, metadata={"about": about})


@dataclass(frozen=True)
class Options:
    """How a data set is prepared. An option that a set does not know must be left as it is."""

    short_side: int = option(256, "pixels: images whose short side is more than 1.25 times this are made smaller")
    samples_per_shard: int = option(1000, "planned samples a tar")
    only: str = option("", "the splits to make, as in dev,test; all if not given")
    splits: str = option("", "coco: karpathy, 2017 or 2014; the first that SRC has")
    held_out: str = option("", "vg: file of COCO's splits whose val and test images are left out, or none")
    named: str = option("", "cc3m, sbu: how images are named: row, row-from-1, md5, sha1 or sha256 (of the address)")
    answers: str = option("", "vqav2: a teacher's list of answers (JSON), to whose order they are brought")
    images: int = option(2, "nlvr: how many images the three boxes become, 2 or 3")
    image_column: str = option("image", "folder: the column of the image's path")
    text_column: str = option("caption", "folder: the column of its caption")
    frames: int = option(4, "video: how many frames of each, evenly spaced")

    def __post_init__(self) -> None:
        for name, least in (("short_side", 16), ("samples_per_shard", 1), ("frames", 1)):
            if getattr(self, name) < least:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least {least}")
        unknown = [split for split in self.only.split(",") if split and split not in SPLITS]
        if unknown:
            raise UserError(f"--only names the split {unknown[0]!r}; it can be some of {','.join(SPLITS)}")

    def wants(self, split: str) -> bool:
        """Whether a split is to be made."""
        return not self.only or split in self.only.split(",")

    def changed(self) -> tuple[str, ...]:
        """The options that are not at their defaults."""
        return tuple(known.name for known in fields(self) if getattr(self, known.name) != known.default)


def record_of(
    image_id: str,
    source: str,
    *,
    texts: Sequence[str] = (),
    questions: Sequence[Mapping[str, Any]] = (),
    statements: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """The JSON of a sample, with only the keys it has."""
    told = {"texts": list(texts), "questions": list(questions), "statements": list(statements)}
    return {"image_id": image_id, "source": source, **{key: value for key, value in told.items() if value}}


def captioned(
    split: str, pictures: tuple[Picture, ...], image_id: str, source: str, captions: Iterable[str]
) -> Iterator[Planned | Skip]:
    """One sample with all the captions of an image, white space made single; empty and repeated ones are skipped."""
    texts: dict[str, None] = {}
    for number, caption in enumerate(captions):
        text = " ".join(caption.split())
        if not text or text in texts:
            yield Skip(split, DUPLICATE if text else EMPTY, f"{image_id}, caption {number}")
        else:
            texts[text] = None
    if texts:
        yield Planned(split, pictures, record_of(image_id, source, texts=tuple(texts)))
    else:
        yield Skip(split, BARE, image_id)
