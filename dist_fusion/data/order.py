"""Which sample is at which place of the stream: arithmetic on (seed, epoch, place), and nothing else.

The shards are cut into chunks, runs of samples that lie one after another and are read in one go. An epoch lines all
chunks up in a seeded order and cuts the line into lanes of equal length. Every batch takes the same slots from every
lane: so a rank, whose slots are some of a batch's, reads only its lanes, however many ranks there are. Within a lane
samples are mixed among some chunks at a time, a window.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

MOST_LANES = 64
CHUNK_BYTES = 1_310_720
"""Of a chunk, at least: what a cluster's file system reads well."""
CHUNKS_A_LANE = 8
"""At least, so that small sets are mixed too: their chunks are smaller, and the whole of them is in memory anyway."""

Numbers = NDArray[np.int64]


class Chunks(NamedTuple):
    """Runs of samples, in the order of the shards."""

    first: Numbers  # [chunks] number of the first sample
    size: Numbers  # [chunks] how many samples


class Source(NamedTuple):
    """Some chunks, and how often an epoch visits each of their samples: a part of them if below 1."""

    chunks: Chunks
    weight: float


class Span(NamedTuple):
    """Consecutive places of an epoch's line that are one window: its samples in the order they are read and visited."""

    runs: Numbers  # [runs, 2] first sample and number, in the order of the line
    visits: Numbers  # [samples] numbers of samples, mixed


def cut(shard: Numbers, size: Numbers, chunk_bytes: int) -> Chunks:
    """Chunks of at least `chunk_bytes` (but for a shard's last) from each sample's shard and size in bytes."""
    if not len(shard):
        return Chunks(np.zeros(0, np.int64), np.zeros(0, np.int64))
    begins = np.flatnonzero(np.diff(shard, prepend=shard[0] - 1))
    before = np.cumsum(size) - size  # bytes before each sample
    within = before - np.repeat(before[begins], np.diff(begins, append=len(shard)))
    number = within // chunk_bytes
    fresh = np.ones(len(shard), bool)
    fresh[1:] = (number[1:] != number[:-1]) | (shard[1:] != shard[:-1])
    first = np.flatnonzero(fresh).astype(np.int64)
    return Chunks(first, np.diff(first, append=len(shard)).astype(np.int64))


def lanes_of(slots: int, samples: int) -> int:
    """How many lanes a batch of so many slots is fed from: a divisor of them, the largest that is allowed."""
    return next(n for n in range(min(MOST_LANES, slots, max(samples, 1)), 0, -1) if slots % n == 0)


class Order:
    """The endless order of the samples of some sources, for batches of `slots` samples."""

    def __init__(self, sources: Sequence[Source], slots: int, seed: int, window: int):
        """`window` is how many samples are mixed at a time, over all lanes; at least a chunk a lane."""
        self._sources, self._seed = list(sources), seed
        # Samples an epoch, by source.
        self.quotas = [round(one.weight * int(one.chunks.size.sum())) for one in self._sources]
        self.num_samples = sum(self.quotas)
        self.slots, self.lanes = slots, lanes_of(slots, self.num_samples)
        chunks = sum(len(one.chunks.size) for one in self._sources)
        mean = self.num_samples / max(chunks, 1)
        self._chunks_a_window = max(1, round(window / self.lanes / max(mean, 1)))
        self._ends = np.array([self.num_samples * lane // self.lanes for lane in range(self.lanes + 1)])

    def lane(self, slot: int) -> int:
        """The lane that feeds a slot of every batch."""
        return slot * self.lanes // self.slots

    def place(self, step: int, slot: int) -> tuple[int, int, int]:
        """(epoch, lane, place in the lane's part of that epoch) of a slot of a batch."""
        lane, deep = self.lane(slot), self.slots // self.lanes
        epoch, place = divmod(step * deep + slot % deep, int(self._ends[lane + 1] - self._ends[lane]))
        return epoch, lane, place

    def taken(self, epoch: int, lane: int, places: Numbers) -> tuple[Numbers, Numbers]:
        """(steps, slots) of places in a lane's part of an epoch: `place` the other way round."""
        deep = self.slots // self.lanes
        at = epoch * int(self._ends[lane + 1] - self._ends[lane]) + places
        return at // deep, lane * deep + at % deep

    def epoch(self, number: int) -> "Epoch":
        """The line of an epoch."""
        return Epoch(self._lined_up(number), self._ends, self._chunks_a_window, (self._seed, number))

    def _lined_up(self, epoch: int) -> Chunks:
        """All chunks of an epoch in their order; of a source with a part of a visit, other ones in each epoch."""
        firsts, counts = [], []
        for number, (source, quota) in enumerate(zip(self._sources, self.quotas, strict=True)):
            draw = np.random.default_rng((self._seed, epoch, number, 0))
            left = quota
            while left > 0:
                order = draw.permutation(len(source.chunks.size))
                size = source.chunks.size[order]
                kept = np.clip(left - (np.cumsum(size) - size), 0, size)  # the last chunk may be cut
                taken = kept > 0
                firsts.append(source.chunks.first[order][taken])
                counts.append(kept[taken])
                left -= int(kept.sum())
        line = np.random.default_rng((self._seed, epoch, len(self._sources), 1)).permutation(sum(map(len, counts)))
        return Chunks(np.concatenate(firsts)[line], np.concatenate(counts)[line])


class Epoch:
    """One epoch's line, cut into lanes and windows."""

    def __init__(self, line: Chunks, ends: Numbers, chunks_a_window: int, seed: tuple[int, int]):
        self._line, self._ends, self._chunks, self._seed = line, ends, chunks_a_window, seed

    @cached_property
    def _chunk_ends(self) -> Numbers:
        return np.cumsum(self._line.size)

    def window(self, lane: int, place: int) -> tuple[int, int]:
        """(first place, number of places) of the window of a lane's place."""
        begin, end = int(self._ends[lane]), int(self._ends[lane + 1])
        first = int(np.searchsorted(self._chunk_ends, begin, side="right"))
        chunk = int(np.searchsorted(self._chunk_ends, begin + place, side="right"))
        number = (chunk - first) // self._chunks
        low = first + number * self._chunks
        high = min(low + self._chunks, len(self._chunk_ends))
        start = max(begin, int(self._chunk_ends[low - 1]) if low else 0)
        return start - begin, min(end, int(self._chunk_ends[high - 1])) - start

    def span(self, lane: int, first: int, count: int) -> Span:
        """What is at `count` places of a lane from `first` on, which must be a window."""
        begin = int(self._ends[lane]) + first
        chunk = np.arange(
            np.searchsorted(self._chunk_ends, begin, side="right"),
            np.searchsorted(self._chunk_ends, begin + count, side="left") + 1,
        )
        chunk_begin = self._chunk_ends[chunk] - self._line.size[chunk]
        low, high = np.maximum(chunk_begin, begin), np.minimum(self._chunk_ends[chunk], begin + count)
        runs = np.stack([self._line.first[chunk] + low - chunk_begin, high - low], 1)
        numbers = np.concatenate([np.arange(start, start + size) for start, size in runs])
        mixed = np.random.default_rng((*self._seed, lane, first, 2)).permutation(len(numbers))
        return Span(runs, numbers[mixed])
