"""All samples of some shards that some tasks can use: what an epoch is planned from, twenty bytes a sample."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dist_fusion.batch import Lays
from dist_fusion.data.index import Damage, Outline, keys
from dist_fusion.data.order import CHUNK_BYTES, CHUNKS_A_LANE, MOST_LANES, Chunks, cut
from dist_fusion.schema import UserError


class Part(NamedTuple):
    """Samples one behind another in a shard, which one read gets."""

    shard: str
    begin: int  # bytes
    end: int


class Catalog:
    """The usable samples of shards, numbered as they lie."""

    def __init__(self, outlines: Sequence[Outline], tasks: Mapping[str, Lays]):
        """Raises UserError if a sample says what a task does not know."""
        self.shards = [outline.shard for outline in outlines]
        self.damages: tuple[Damage, ...] = tuple(damage for outline in outlines for damage in outline.damages)
        self.indexed = sum(len(outline.begin) for outline in outlines)  # whether the tasks can use them or not
        chosen = [_usable(outline, tasks) for outline in outlines]
        self._shard = np.repeat(np.arange(len(outlines), dtype=np.int32), [len(one) for one in chosen])
        self._place = np.concatenate([np.zeros(0, np.int32), *(one.astype(np.int32) for one in chosen)])
        self._begin, self._end = (
            np.concatenate([getattr(outline, name)[kept] for outline, kept in zip(outlines, chosen, strict=True)])
            if outlines
            else np.zeros(0, np.int64)
            for name in ("begin", "end")
        )

    def __len__(self) -> int:
        return len(self._begin)

    def chunks(self) -> Chunks:
        """Runs to be read in one go; smaller ones where there is so little that it does not matter."""
        size = self._end - self._begin
        least = int(size.sum()) // (MOST_LANES * CHUNKS_A_LANE)
        return cut(self._shard.astype(np.int64), size, min(CHUNK_BYTES, max(least, 1)))

    def firsts(self, shards: Sequence[int]) -> list[int]:
        """The number of the first sample at or behind the beginning of each of these shards, by their numbers."""
        found: list[int] = np.searchsorted(self._shard, shards).tolist()
        return found

    def runs(self, first: int, count: int) -> list[tuple[int, int]]:
        """(first sample, number) of so many samples, shard by shard."""
        shard = self._shard[first : first + count]
        begins = [0, *(np.flatnonzero(np.diff(shard)) + 1).tolist(), count] if count else []
        return [(first + low, high - low) for low, high in pairwise(begins)]

    def part(self, first: int, count: int = 1) -> Part:
        """Where samples `first` and so many that follow in its shard are."""
        last = first + count - 1
        assert self._shard[first] == self._shard[last], "a run ends where its shard does"
        return Part(self.shards[self._shard[first]], int(self._begin[first]), int(self._end[last]))

    def key(self, number: int) -> str:
        """A sample's key, or its place in its shard if that is no longer the one that was indexed."""
        place = int(self._place[number])
        try:
            known = keys(self.shards[self._shard[number]])
        except OSError:
            known = np.zeros(0, np.str_)
        return str(known[place]) if place < len(known) else f"sample {place}"

    def span(self, number: int, within: Part) -> slice:
        """Where a sample's bytes are in those of a part."""
        return slice(int(self._begin[number]) - within.begin, int(self._end[number]) - within.begin)


def _usable(outline: Outline, tasks: Mapping[str, Lays]) -> NDArray[np.int64]:
    """Places in its shard of the samples that any of the tasks can use; their supplies are few, and asked once each."""
    kept = np.zeros(len(outline.supplies), bool)
    for number, supply in enumerate(outline.supplies):
        try:
            kept[number] = any([task.eligible(supply) for task in tasks.values()])
        except UserError as error:
            place = int(np.flatnonzero(outline.supply == number)[0])
            raise UserError(f"sample {outline.shard}/{keys(outline.shard)[place]}: {error}") from None
    found: NDArray[np.int64] = np.flatnonzero(kept[outline.supply]) if len(outline.supply) else np.zeros(0, np.int64)
    return found
