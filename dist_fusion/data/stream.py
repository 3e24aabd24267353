"""The stream of micro-batches, in an order that depends on (seed, epoch, place) and on nothing else.

Global batch N is the same set of samples on any number of ranks and loader workers (`order.py`), and everything drawn
for a sample (masks, negatives, which text) is seeded by its position. The state of the stream is one number, the
micro-steps taken; it starts anywhere at once. A rank reads the lanes that feed its slots, a window at a time.
"""

import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from itertools import accumulate, count
from types import MappingProxyType
from typing import Annotated, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from dist_fusion.batch import Lays, PairBatch, Question, Sample, Statement, content_id, drawn
from dist_fusion.data.augment import AUGMENTATIONS, augment
from dist_fusion.data.catalog import Catalog
from dist_fusion.data.images import UnreadableImage, pixels, read
from dist_fusion.data.index import Damage, outlines, reasons
from dist_fusion.data.order import Chunks, Order, Source
from dist_fusion.data.record import Record, Unusable
from dist_fusion.data.shards import Reader, find_shards, parse
from dist_fusion.data.text import Tokenizer
from dist_fusion.data.windows import Run, Visit, Windows
from dist_fusion.schema import UserError, one_of, section
from dist_fusion.types import Batch

REASONS = {True: "undecodable image", False: "cannot be read"}
"""Why a sample could not be had, by whether its image was at fault."""


@section
@dataclass(frozen=True)
class SourceConfig:
    """One of several data sets of a stream."""

    shards: tuple[str, ...] = ()  # folders of tars, or tars
    weight: float = 1.0  # how often an epoch visits each of its samples
    texts_per_image: int | None = None  # in place of the stream's

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise ValueError(f"weight is {self.weight}; it must be above 0 (leave the source out in place of 0)")


@section
@dataclass(frozen=True)
class DataConfig:
    """Where the samples are and how they are read."""

    shards: tuple[str, ...] = ()  # folders of tars, or tars
    sources: Mapping[str, SourceConfig] = field(default_factory=dict)  # beside them, by name, each with a weight
    dev: tuple[str, ...] = ()  # held out, for scores during training
    vocabulary: str = "bert-base-uncased"
    texts_per_image: int = 1  # drawn anew at every visit; 0 is all of them
    shuffle_buffer: int = 8192  # samples that are mixed at a time, on all ranks together
    pad_multiple: int = 8  # texts are padded to the longest of the micro-batch, rounded up to this
    augment: Annotated[str, one_of(AUGMENTATIONS)] = "none"  # of pictures in training
    num_workers: int = 0  # loader processes a rank
    cache: str = ""  # folder for copies of shards that are addresses
    trust_shards: bool = False  # run the commands (`pipe:…`) among the shards
    most_damaged: float = 0.01  # share of samples, or of shards, that may be unusable

    def __post_init__(self) -> None:
        if self.pad_multiple < 1:
            raise ValueError(f"pad_multiple is {self.pad_multiple}; it must be at least 1")


class Loaded(NamedTuple):
    """One micro-batch, what of it could not be read, and how many samples came from which source."""

    batch: Batch
    damages: tuple[Damage, ...] = ()
    sources: Mapping[str, int] = MappingProxyType({})


class Plan(NamedTuple):
    """How a stream is cut into micro-batches: this rank's share of each contrast batch (all ranks' micro-batches)."""

    micro_batch: int
    rank: int
    world_size: int
    seed: int


class Stream(IterableDataset[Loaded]):
    """Micro-batches of this rank from micro-step `start` on: endless and mixed, or one epoch as the shards lie."""

    def __init__(
        self, config: DataConfig, tasks: Mapping[str, Lays], tokenizer: Tokenizer, image_size: int, plan: Plan,
        *, start: int = 0, endless: bool = True,
    ):  # fmt: skip
        """Collective. Raises UserError for shards that are not there or hold nothing of use, or too much damage."""
        self._config, self._tasks, self._tokenizer = config, tasks, tokenizer
        self._image_size, self._plan, self._start, self._endless = image_size, plan, start, endless
        named = {"": SourceConfig(config.shards)} if config.shards or not config.sources else {}
        self._sources = {**named, **config.sources}
        AUGMENTATIONS[config.augment]()  # its library is loaded once, before loader processes part
        shards = {
            name: find_shards(source.shards, cache=config.cache, trust=config.trust_shards)
            for name, source in self._sources.items()
        }
        self._catalog = Catalog(outlines([shard for some in shards.values() for shard in some]), tasks)
        self.damages = self._catalog.damages
        _check_damage(config, self._catalog)
        if not len(self._catalog):
            raise UserError(
                f"data.shards {', '.join(config.shards)} has no sample with what {', '.join(tasks)} needs (texts, "
                "questions, statements, or a second image)"
            )
        self._firsts = self._catalog.firsts([0, *accumulate(map(len, shards.values()))][:-1])
        contrast = plan.micro_batch * plan.world_size
        chunks = self._catalog.chunks()
        parts = np.searchsorted(chunks.first, [*self._firsts, len(self._catalog)])
        self.order = Order(
            [
                Source(Chunks(chunks.first[low:high], chunks.size[low:high]), source.weight)
                for source, low, high in zip(self._sources.values(), parts, parts[1:], strict=False)
            ],
            contrast, plan.seed, config.shuffle_buffer,
        )  # fmt: skip
        if endless:
            self._require_all((np.diff(parts) > 0).tolist())
        self.num_samples = self.order.num_samples if endless else len(self._catalog)

    def _require_all(self, filled: Sequence[bool]) -> None:
        """Raise UserError for a source that would never be seen."""
        for (name, source), some, quota in zip(self._sources.items(), filled, self.order.quotas, strict=True):
            if not quota:
                key = f"data.sources.{name}" if name else "data.shards"
                raise UserError(
                    f"{key}: with a weight of {source.weight:g} an epoch visits none of its samples; raise the weight"
                    if some
                    else f"{key} has no sample with what {', '.join(self._tasks)} needs; leave it out"
                )

    def starting_at(self, start: int) -> "Stream":
        """The same stream from micro-step `start` on."""
        later = copy(self)
        later._start = start
        return later

    def __iter__(self) -> Iterator[Loaded]:
        worker = get_worker_info()
        mine, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        contrast = self._plan.micro_batch * self._plan.world_size
        low = self._plan.rank * self._plan.micro_batch
        slots = range(low, low + self._plan.micro_batch)
        reader = Reader()
        windows = Windows(self.order, self._catalog, reader, slots, self._start, mine, workers)
        # As they lie, the last batch may be short, or empty: every rank takes the same number of steps.
        steps = count(self._start) if self._endless else range(self._start, -(-len(self._catalog) // contrast))
        for step in steps:
            if (step - self._start) % workers == mine:
                if self._endless:
                    yield self._load([windows.visit(step, slot) for slot in slots], windows.read, windows.others)
                else:
                    first = min(step * contrast + low, len(self._catalog))
                    last = min(first + len(slots), len(self._catalog))
                    run = Run(self._catalog, reader, first, last - first)
                    yield self._load(
                        [Visit(number, number) for number in range(first, last)], run.read, lambda visit: []
                    )

    def _load(
        self,
        visits: Sequence[Visit],
        read: Callable[[int], tuple[str, bytes]],
        others: Callable[[Visit], Sequence[int]],
    ) -> Loaded:
        """The pair batch of some places of the stream."""
        samples: list[Sample] = []
        damages: list[Damage] = []
        sources = dict.fromkeys(self._sources, 0)
        for visit in visits:
            found = self._tried(visit, visit.number, read, damages)
            for other in others(visit) if found is None else ():
                found = self._tried(visit, other, read, damages)
                if found is not None:
                    break
            if found is not None:
                samples.append(found[0])
                sources[found[1]] += 1
        batch = PairBatch(
            self._tokenizer.vocabulary, self._image_size, self._tokenizer.max_length, self._config.pad_multiple
        )
        for task in self._tasks.values():
            task.lay(batch, samples)
        return Loaded(batch.build(), tuple(damages), sources)

    def _tried(
        self, visit: Visit, number: int, read: Callable[[int], tuple[str, bytes]], damages: list[Damage]
    ) -> tuple[Sample, str] | None:
        """A sample at a place, and its source; None, and a line in `damages`, if it cannot be had."""
        source = list(self._sources)[int(np.searchsorted(self._firsts, number, side="right")) - 1]
        try:
            return self._sample(visit.position, parse(*read(number)), source), source
        except (Unusable, UnreadableImage, OSError) as error:
            damages.append(self._damage(number, error))
            return None

    def _pixels(self, data: bytes, seed: str) -> Tensor:
        """A picture as both models see it; those that are scored are seen as they are."""
        kind = self._config.augment if self._endless else "none"
        return pixels(augment(read(data, self._image_size), kind, seed), self._image_size)

    def _damage(self, number: int, error: Exception) -> Damage:
        reason = error.reason if isinstance(error, Unusable) else REASONS[type(error) is UnreadableImage]
        return Damage(self._catalog.part(number).shard, self._catalog.key(number), reason, str(error))

    def _sample(self, position: int, record: Record, source: str) -> Sample:
        visit = f"{self._plan.seed}/{position}"
        own = self._sources[source].texts_per_image
        tokens = {text: self._tokenizer(text) for text in record.texts}
        texts = drawn(record.texts, self._config.texts_per_image if own is None else own, f"{visit}/texts")
        return Sample(
            images=tuple(self._pixels(image, f"{visit}/image{n}") for n, image in enumerate(record.images)),
            image_ids=tuple(content_id(f"image {name}") for name in record.image_ids),
            texts=tuple(tokens[text] for text in texts),
            captions=frozenset(text.content for text in tokens.values()),
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

    A loader draws a seed when it starts; from the default generator that would shift the dropout of a resumed run.
    With `pin` batches lie in pinned memory, from which a GPU takes them while it works.
    """
    return iter(
        DataLoader(
            stream,
            batch_size=None,
            num_workers=num_workers,
            worker_init_fn=_ignore_signals,
            generator=torch.Generator(),
            pin_memory=pin,
        )
    )


def _ignore_signals(worker: int) -> None:
    """SLURM signals every process of a step; a worker that dies or saves would break its rank."""
    for name in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(name, signal.SIG_IGN)


def _check_damage(config: DataConfig, catalog: Catalog) -> None:
    """Raises UserError if more samples, or shards, than the recipe allows are unusable."""
    samples = [damage for damage in catalog.damages if damage.key]
    shards = {damage.shard for damage in catalog.damages if not damage.key}
    most = config.most_damaged
    for count_bad, of, what in (
        (len(samples), catalog.indexed + len(samples), "samples"), (len(shards), len(catalog.shards), "shards"),
    ):  # fmt: skip
        if count_bad > most * of:
            first = catalog.damages[0]
            raise UserError(
                f"{count_bad} of {of} {what} are unusable, more than data.most_damaged ({most:.2%}): "
                f"{reasons(catalog.damages)}; the first: {first.told()}"
            )
