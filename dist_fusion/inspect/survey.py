"""What only reading tells: sizes of images, lengths of texts, answers. Of some samples, where there are very many."""

import io
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from dist_fusion.data.images import FORMATS, UnreadableImage, read
from dist_fusion.data.index import Damage, Outline, keys
from dist_fusion.data.record import Record, Unusable
from dist_fusion.data.shards import Reader, parse
from dist_fusion.data.stream import REASONS
from dist_fusion.data.text import Tokenizer

SURVEYED = 5000
"""Samples that are read at the most: more would tell the same, later."""
UNCUT = 1 << 20
"""Tokens that no text has."""


class Drawn(NamedTuple):
    """One sample that was read, or why it could not be."""

    number: int  # among all, as they lie
    key: str
    record: Record | None
    images: tuple[Image.Image, ...]  # as training decodes them, before they are made square
    damage: Damage | None


@dataclass
class Survey:
    """What was seen of some samples."""

    samples: int = 0
    lengths: dict[str, Counter[int]] = field(default_factory=dict)  # tokens uncut, [CLS] and [SEP] included; by what
    short_sides: Counter[int] = field(default_factory=Counter)  # pixels, in the file
    proportions: Counter[int] = field(default_factory=Counter)  # tenths: ten times the long side by the short one
    answers: Counter[str] = field(default_factory=Counter)  # the best of each question
    kinds: Counter[str] = field(default_factory=Counter)  # of questions
    damages: list[Damage] = field(default_factory=list)


def survey(outlines: Sequence[Outline], vocabulary: str, size: int, seed: int) -> Survey:
    """SURVEYED of the samples, drawn by `seed`, read as training at `size` pixels would; their sizes and lengths."""
    found, tokenizer = Survey(), Tokenizer(vocabulary, UNCUT)
    chosen = choose(outlines, SURVEYED, f"{seed}/survey")
    progress = tqdm(
        samples(outlines, chosen, size), "reading samples", len(chosen), unit="sample", disable=None, delay=2
    )
    for drawn in progress:
        found.samples += 1
        if drawn.damage:
            found.damages.append(drawn.damage)
        if drawn.record is None:
            continue
        for data, image in zip(drawn.record.images, drawn.images, strict=False):
            low, high = sorted(_sides(data, image))
            found.short_sides[low] += 1
            found.proportions[10 * high // low] += 1
        for what, texts in said(drawn.record).items():
            found.lengths.setdefault(what, Counter()).update(len(tokenizer(text).ids) for text in texts)
        for question in drawn.record.questions:
            answers = question["answers"]
            found.answers[max(answers, key=answers.__getitem__) if answers else "(no answer)"] += 1
            found.kinds[str(question.get("kind") or "(no kind)")] += 1
    return found


def said(record: Record) -> dict[str, list[str]]:
    """All that is told or asked of a sample, by what it is."""
    return {
        "texts": list(record.texts),
        "questions": [question["question"] for question in record.questions],
        "statements": [statement["text"] for statement in record.statements],
    }


def choose(outlines: Sequence[Outline], most: int, seed: str) -> list[int]:
    """Numbers of so many samples at the most, drawn by `seed`, as they lie."""
    total = sum(len(outline.begin) for outline in outlines)
    return sorted(Random(seed).sample(range(total), min(most, total)))


def samples(outlines: Sequence[Outline], numbers: Sequence[int], size: int) -> Iterator[Drawn]:
    """Samples by their numbers, read and decoded as training does; one that is damaged says how."""
    reader, ends = Reader(), np.cumsum([len(outline.begin) for outline in outlines])
    for number in numbers:
        which = int(np.searchsorted(ends, number, side="right"))
        outline = outlines[which]
        place = number - (int(ends[which - 1]) if which else 0)
        record, images = None, []
        try:
            record = parse(
                outline.shard, reader.read(outline.shard, int(outline.begin[place]), int(outline.end[place]))
            )
            for data in record.images:
                images.append(read(data, size))
            damage = None
        except (Unusable, UnreadableImage, OSError) as error:
            reason = error.reason if isinstance(error, Unusable) else REASONS[type(error) is UnreadableImage]
            damage = Damage(outline.shard, str(keys(outline.shard)[place]), reason, str(error))
        key = f"{outline.shard}/{damage.key}" if damage else record.key if record else ""
        yield Drawn(number, key, record, tuple(images), damage)


def _sides(data: bytes, image: Image.Image) -> tuple[int, int]:
    """Pixels of an image in its file, which may be more than were decoded."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as file:
            return file.size
    except UnidentifiedImageError:  # ffmpeg read it
        return image.size
