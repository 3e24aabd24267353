"""How samples become a pair batch.

A `Sample` is one image (or pair of images) with all its texts, as read from a shard. A task lays what it needs into a
`PairBatch`, which keeps each distinct image, text and pair once: two tasks that ask for the same pair share it.
"""

from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b
from random import Random
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from dist_fusion.types import Batch, Target, Vocabulary

T = TypeVar("T")


class Text(NamedTuple):
    """One text as tokens."""

    ids: tuple[int, ...]  # [CLS] ... [SEP]
    words: tuple[int | None, ...]  # which word each token is part of; None at specials

    @property
    def content(self) -> int:
        """Content id: equal for texts that a model cannot tell apart."""
        return content_id(",".join(map(str, self.ids)))


class Question(NamedTuple):
    """A question with its scored answers."""

    id: str
    text: Text
    answers: Mapping[str, float]
    kind: str


class Statement(NamedTuple):
    """A sentence about a sample's images, and what it is to them: true, false, entailed, …."""

    id: str
    text: Text
    label: str
    group: str  # statements of one group are right only together (NLVR2's consistency): the sentence, if not told


class Sample(NamedTuple):
    """One decoded sample of the stream."""

    images: tuple[Tensor, ...]  # one, or left and right; each [3, h, w]
    image_ids: tuple[int, ...]  # content ids
    texts: tuple[Text, ...]  # those drawn for this visit
    captions: frozenset[int]  # content ids of all its texts, drawn or not
    questions: tuple[Question, ...]
    statements: tuple[Statement, ...]
    position: int  # in the stream, over all epochs and ranks
    visit: str  # seed of everything drawn for this sample at this visit


def content_id(string: str) -> int:
    """A number that is equal for equal strings (63 bits, the same on every machine)."""
    return int.from_bytes(blake2b(string.encode(), digest_size=8).digest(), "big") >> 1


class Supply(NamedTuple):
    """How much a sample of a shard has of what tasks ask for."""

    images: int
    texts: int
    questions: int
    labels: tuple[str, ...]  # of its statements


def drawn(items: Sequence[T], limit: int, seed: str) -> Sequence[T]:
    """`limit` of the items, drawn by `seed`; all of them, in their order, if they are no more or the limit is 0."""
    return Random(seed).sample(items, limit) if 0 < limit < len(items) else items


class _Picture(NamedTuple):
    row: int
    slot: int
    sample: Sample


class PairBatch:
    """Collects images, texts and pairs of a micro-batch, each once, and what the tasks ask of them."""

    def __init__(self, vocabulary: Vocabulary, image_size: int, max_length: int, pad_multiple: int):
        self.vocabulary = vocabulary
        self._image_size, self._max_length, self._pad_multiple = image_size, max_length, pad_multiple
        self._images: dict[tuple[int, int], _Picture] = {}
        self._texts: dict[tuple[int, ...], tuple[int, Text]] = {}
        self._pairs: dict[tuple[int, int], int] = {}
        self._pair_sample: list[int] = []
        self._weights: dict[str, list[float]] = {"attention": []}
        self._targets: dict[str, Target] = {}
        self._answering: dict[int, int] = {}

    def image(self, sample: Sample, slot: int = 0) -> int:
        """The row of a sample's image."""
        row = len(self._images)
        return self._images.setdefault((sample.position, slot), _Picture(row, slot, sample)).row

    def text(self, text: Text) -> int:
        """The row of a text."""
        return self._texts.setdefault(text.ids, (len(self._texts), text))[0]

    def pair(self, sample: Sample, image: int, text: int, *, attention: float) -> int:
        """The row of a pair; `attention` is added to its weight in attention distillation."""
        row = self._pairs.setdefault((image, text), len(self._pairs))
        if row == len(self._pair_sample):
            self._pair_sample.append(self._answering.setdefault(sample.position, len(self._answering)))
            self._weights["attention"].append(0.0)
        self._weights["attention"][row] += attention
        return row

    def ask(self, task: str, target: Target) -> None:
        """What `task` wants to know of this batch."""
        self._targets[task] = target

    def build(self) -> Batch:
        """The tensors, texts padded to the longest, rounded up to the multiple but never beyond the longest allowed."""
        longest = max((len(text.ids) for _, text in self._texts.values()), default=1)
        length = max(longest, min(-(-longest // self._pad_multiple) * self._pad_multiple, self._max_length))
        ids = torch.full((len(self._texts), length), self.vocabulary.pad)
        mask = torch.zeros(len(self._texts), length, dtype=torch.bool)
        for row, text in self._texts.values():
            ids[row, : len(text.ids)] = torch.tensor(text.ids)
            mask[row, : len(text.ids)] = True
        size = self._image_size
        pictures = self._images.values()
        pixels = [picture.sample.images[picture.slot] for picture in pictures]
        return Batch(
            images=torch.stack(pixels) if pixels else torch.zeros(0, 3, size, size),
            image_slot=integers(picture.slot for picture in pictures),
            image_id=integers(picture.sample.image_ids[picture.slot] for picture in pictures),
            text_ids=ids,
            text_mask=mask,
            caption_id=integers(text.content for _, text in self._texts.values()),
            pairs=integers(self._pairs, 2),
            pair_sample=integers(self._pair_sample),
            weights={term: torch.tensor(weights, dtype=torch.float32) for term, weights in self._weights.items()},
            targets=self._targets,
        )


class Lays(Protocol):
    """What the stream needs of a task."""

    def eligible(self, supply: Supply) -> bool: ...  # can such a sample be used? UserError for an unknown label

    def lay(self, batch: PairBatch, samples: Sequence[Sample]) -> None: ...


def integers(values: Iterable[int | Sequence[int]], width: int = 0) -> Tensor:
    """`values` as an int64 tensor, [R] or [R, width] also when there are none."""
    return torch.tensor(list(values), dtype=torch.int64).view((-1, width) if width else -1)


def answers_to(
    rows: Sequence[Sequence[int]], width: int, labels: Tensor, *, weight: Sequence[float] | None = None,
    kind: Sequence[int] | None = None, group: Sequence[int] | None = None,
) -> Target:  # fmt: skip
    """A Target whose rows weigh 1, are of kind 0 and of one group unless told."""
    count = len(rows)
    return Target(
        rows=integers(rows, width),
        labels=labels,
        weight=torch.tensor([1.0] * count if weight is None else list(weight), dtype=torch.float32),
        kind=integers([0] * count if kind is None else kind),
        group=integers([0] * count if group is None else group),
    )
