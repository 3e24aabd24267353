"""The part of a stream that one loader process has in memory: of each lane it feeds from, the window it is in."""

from random import Random
from typing import NamedTuple

import numpy as np

from dist_fusion.data.catalog import Catalog
from dist_fusion.data.order import Epoch, Numbers, Order
from dist_fusion.data.shards import Reader

TRIES = 16
"""Others that may stand in for a sample that cannot be read, before its place stays empty."""


class Visit(NamedTuple):
    """One place of the stream, and the sample that is to be there."""

    position: int
    number: int  # of the sample in the catalog


class _Window(NamedTuple):
    epoch: int
    first: int  # place in the lane
    visits: Numbers  # numbers of samples at the places from there on
    raw: dict[int, bytes | OSError]  # of those that this process will visit


class Windows:
    """Reads windows as the stream comes to them, run by run, and keeps what this process will need."""

    def __init__(
        self, order: Order, catalog: Catalog, reader: Reader, slots: range, start: int, worker: int, workers: int
    ):
        """For `slots` of every batch from micro-step `start` on, of which this worker makes every `workers`-th."""
        self._order, self._catalog, self._reader = order, catalog, reader
        self._slots, self._start, self._worker, self._workers = slots, start, worker, workers
        self._lanes: dict[int, _Window] = {}
        self._epochs: dict[int, Epoch] = {}

    def visit(self, step: int, slot: int) -> Visit:
        """The sample at a slot of a batch; reads its window if it is the first of it here."""
        epoch, lane, place = self._order.place(step, slot)
        window = self._lanes.get(lane)
        if not window or window.epoch != epoch or not 0 <= place - window.first < len(window.visits):
            window = self._lanes[lane] = self._enter(step, epoch, lane, place)
        return Visit(step * self._order.slots + slot, int(window.visits[place - window.first]))

    def others(self, visit: Visit) -> list[int]:
        """Who stands in for a sample that cannot be read, in this order: the same on any number of ranks."""
        draw = Random(visit.position)
        return [draw.randrange(len(self._catalog)) for _ in range(TRIES)]

    def read(self, number: int) -> tuple[str, bytes]:
        """A sample's shard and bytes. Raises OSError if they cannot be read."""
        part = self._catalog.part(number)
        kept = next((window.raw[number] for window in self._lanes.values() if number in window.raw), None)
        if isinstance(kept, OSError):
            raise kept
        return part.shard, self._reader.read(*part) if kept is None else kept

    def _enter(self, step: int, epoch: int, lane: int, place: int) -> _Window:
        if epoch not in self._epochs:
            self._epochs = {
                n: line for n, line in self._epochs.items() if n >= epoch - 1
            }  # lanes end at their own time
            self._epochs[epoch] = self._order.epoch(epoch)
        line = self._epochs[epoch]
        first, count = line.window(lane, place)
        span = line.span(lane, first, count)
        steps, slots = self._order.taken(epoch, lane, first + np.arange(count))
        needed = (
            (steps >= step)
            & ((steps - self._start) % self._workers == self._worker)
            & (slots >= self._slots.start)
            & (slots < self._slots.stop)
        )
        wanted = set(span.visits[needed].tolist())
        raw: dict[int, bytes | OSError] = {}
        for start, size in span.runs.tolist():
            mine = [number for number in range(start, start + size) if number in wanted]
            if not mine:
                continue
            part = self._catalog.part(start, size)
            try:
                data = self._reader.read(*part)
                raw |= {number: data[self._catalog.span(number, part)] for number in mine}
            except OSError as error:
                raw |= dict.fromkeys(mine, error)
        return _Window(epoch, first, span.visits, raw)


class Run:
    """Some samples that lie one behind another, read shard by shard."""

    def __init__(self, catalog: Catalog, reader: Reader, first: int, count: int):
        self._catalog, self._reader, self._first, self._count = catalog, reader, first, count
        self._raw: dict[int, bytes | OSError] | None = None

    def read(self, number: int) -> tuple[str, bytes]:
        """A sample's shard and bytes. Raises OSError if they cannot be read."""
        if self._raw is None:
            self._raw = self._all()
        kept = self._raw[number]
        if isinstance(kept, OSError):
            raise kept
        return self._catalog.part(number).shard, kept

    def _all(self) -> dict[int, bytes | OSError]:
        raw: dict[int, bytes | OSError] = {}
        for first, count in self._catalog.runs(self._first, self._count):
            part = self._catalog.part(first, count)
            numbers = range(first, first + count)
            try:
                data = self._reader.read(*part)
                raw |= {number: data[self._catalog.span(number, part)] for number in numbers}
            except OSError as error:
                raw |= dict.fromkeys(numbers, error)
        return raw
