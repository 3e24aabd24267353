"""The stream of micro-batches, in an order that depends on (seed, epoch) and on nothing else.

Global batch N is the same set of samples on any number of ranks and loader workers: a sample's place is its position
in one endless, seeded sequence, and everything drawn for it (masks, negatives, which text) is seeded by that position.
The state of the stream is one number, the micro-steps taken. Every rank reads every tar and decodes its share only.
"""

import signal
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from dist_fusion.batch import Lays, PairBatch, Question, Sample, Statement, Supply, content_id, drawn
from dist_fusion.data.images import UnreadableImage, decode
from dist_fusion.data.shards import Record, find_shards, read_records
from dist_fusion.data.text import Tokenizer
from dist_fusion.schema import UserError, section
from dist_fusion.types import Batch


@section
@dataclass(frozen=True)
class DataConfig:
    """Where the samples are and how they are read."""

    shards: tuple[str, ...] = ()  # folders of tars, or tars
    dev: tuple[str, ...] = ()  # held out, for scores during training
    vocabulary: str = "bert-base-uncased"
    texts_per_image: int = 1  # drawn anew at every visit; 0 is all of them
    shuffle_buffer: int = 1000  # samples
    pad_multiple: int = 8  # texts are padded to the longest of the micro-batch, rounded up to this
    num_workers: int = 0  # loader processes a rank

    def __post_init__(self) -> None:
        if self.pad_multiple < 1:
            raise ValueError(f"pad_multiple is {self.pad_multiple}; it must be at least 1")


class Loaded(NamedTuple):
    """One micro-batch, and the samples of it that could not be read, with the reason."""

    batch: Batch
    skipped: tuple[str, ...]


class Plan(NamedTuple):
    """How a stream is cut into micro-batches: this rank's share of each contrast batch (all ranks' micro-batches)."""

    micro_batch: int
    rank: int
    world_size: int
    seed: int


class Stream(IterableDataset[Loaded]):
    """Micro-batches of this rank from micro-step `start` on: endless and shuffled, or one epoch as the shards lie."""

    def __init__(
        self, config: DataConfig, tasks: Mapping[str, Lays], tokenizer: Tokenizer, image_size: int, plan: Plan,
        *, start: int = 0, endless: bool = True,
    ):  # fmt: skip
        self._config, self._tasks, self._tokenizer = config, tasks, tokenizer
        self._image_size, self._plan, self._start, self._endless = image_size, plan, start, endless
        self._shards = find_shards(config.shards)
        self.num_samples = sum(map(self._eligible, read_records(self._shards, order=None, buffer=0)))
        if self.num_samples == 0:
            asked = ", ".join(tasks)
            raise UserError(
                f"data.shards {', '.join(config.shards)} has no sample with what {asked} needs (texts, questions, "
                "statements, or a second image)"
            )

    def starting_at(self, start: int) -> "Stream":
        """The same stream from micro-step `start` on."""
        later = copy(self)
        later._start = start
        return later

    def __iter__(self) -> Iterator[Loaded]:
        worker = get_worker_info()
        mine, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        plan, share = self._plan, []
        contrast = plan.micro_batch * plan.world_size
        position = self._start * contrast - 1
        for position, record in self._positions(self._start * contrast):
            step, place = divmod(position, contrast)
            if (step - self._start) % workers != mine:
                continue
            if place // plan.micro_batch == plan.rank:
                share.append((position, record))
            if place == contrast - 1:
                yield self.load(share)
                share = []
        step, place = divmod(position, contrast)
        if place != contrast - 1 and (step - self._start) % workers == mine:
            yield self.load(share)  # the last one may be short, or empty: every rank takes the same number of steps

    def load(self, share: Sequence[tuple[int, Record]]) -> Loaded:
        """The pair batch of some records at their positions."""
        samples, skipped = [], []
        for position, record in share:
            try:
                samples.append(self._sample(position, record))
            except UnreadableImage as error:
                skipped.append(f"{record.key}: {error}")
        tokenizer = self._tokenizer
        batch = PairBatch(tokenizer.vocabulary, self._image_size, tokenizer.max_length, self._config.pad_multiple)
        for task in self._tasks.values():
            task.lay(batch, samples)
        return Loaded(batch.build(), tuple(skipped))

    def _positions(self, start: int) -> Iterator[tuple[int, Record]]:
        epoch, skip = divmod(start, self.num_samples) if self._endless else (0, start)
        while True:
            order = f"{self._plan.seed}/{epoch}" if self._endless else None
            records = filter(
                self._eligible, read_records(self._shards, order=order, buffer=self._config.shuffle_buffer)
            )
            for place, record in enumerate(records):
                if place >= skip:
                    yield epoch * self.num_samples + place, record
            if not self._endless:
                return
            epoch, skip = epoch + 1, 0

    def _eligible(self, record: Record) -> bool:
        labels = tuple(statement["label"] for statement in record.statements)
        supply = Supply(len(record.images), len(record.texts), len(record.questions), labels)
        try:
            usable = [task.eligible(supply) for task in self._tasks.values()]
        except UserError as error:
            raise UserError(f"sample {record.key}: {error}") from None
        return bool(record.images) and any(usable)

    def _sample(self, position: int, record: Record) -> Sample:
        visit = f"{self._plan.seed}/{position}"
        texts = drawn(record.texts, self._config.texts_per_image, f"{visit}/texts")
        return Sample(
            images=tuple(decode(image, self._image_size) for image in record.images),
            image_ids=tuple(content_id(f"image {name}") for name in record.image_ids),
            texts=tuple(map(self._tokenizer, texts)),
            captions=frozenset(self._tokenizer(text).content for text in record.texts),
            questions=tuple(
                Question(str(q["id"]), self._tokenizer(q["question"]), q["answers"], q.get("kind", ""))
                for q in record.questions
            ),
            statements=tuple(
                Statement(str(s["id"]), self._tokenizer(s["text"]), s["label"], s.get("group", s["text"]))
                for s in record.statements
            ),
            position=position,
            visit=visit,
        )


def load_batches(stream: Stream, num_workers: int, *, pin: bool = False) -> Iterator[Loaded]:
    """The stream through loader workers, in its own order, without touching torch's random generator.

    With `pin` batches lie in pinned memory, from which a GPU copies while the host goes on. A loader draws a seed when
    it starts; from the default generator that would shift the dropout of a resumed run.
    """
    return iter(
        DataLoader(
            stream,
            batch_size=None,
            num_workers=num_workers,
            pin_memory=pin,
            worker_init_fn=_ignore_signals,
            generator=torch.Generator(),
        )
    )


def _ignore_signals(worker: int) -> None:
    """SLURM signals every process of a step; a worker that dies or saves would break its rank."""
    for name in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(name, signal.SIG_IGN)
