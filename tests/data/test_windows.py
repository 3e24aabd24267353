import time
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_fusion.batch import Supply
from dist_fusion.data.catalog import Catalog
from dist_fusion.data.index import Outline
from dist_fusion.data.order import Order, Source
from dist_fusion.data.shards import Reader
from dist_fusion.data.windows import Windows
from dist_fusion.tasks import TASKS

SAMPLE = 30_000
TASK = {"itm": TASKS["itm"]()}


class Counting(Reader):
    """Reads, and says how long its runs were."""

    def __init__(self):
        super().__init__(pauses=())
        self.runs = []

    def read(self, shard, begin, end):
        self.runs.append((shard, begin, end))
        return super().read(shard, begin, end)


def sparse(folder, shards, samples):
    """Shards without data, which take no room, of samples as large as photographs."""
    found = []
    for number in range(shards):
        path = folder / f"{number:04d}.tar"
        with path.open("wb") as file:
            file.truncate(samples * SAMPLE)
        begin = np.arange(samples) * SAMPLE
        supplies = (Supply(1, 1, 0, ()),)
        found.append(Outline(str(path), begin, begin + SAMPLE, np.zeros(samples, np.int64), supplies, ()))
    return Catalog(found, TASK)


@pytest.fixture(scope="module")
def catalog(tmp_path_factory):
    """60 shards of 3,000 samples: 5.4 GB, were they real."""
    return sparse(tmp_path_factory.mktemp("sparse"), 60, 3000)


def order_of(catalog, slots=256, window=8192):
    return Order([Source(catalog.chunks(), 1.0)], slots, 0, window)


@pytest.mark.parametrize(("ranks", "rank"), [(1, 0), (8, 3), (64, 17)])
def test_nearly_all_bytes_are_read_in_long_runs_and_each_once(catalog, ranks, rank):
    """Random reads die on a cluster's file system: at least 90 % of bytes in runs of a megabyte or more."""
    slots = range(256 * rank // ranks, 256 * (rank + 1) // ranks)
    order, reader = order_of(catalog), Counting()
    windows = Windows(order, catalog, reader, slots, 0, 0, 1)
    steps = min(len(catalog) // 256, 40 * ranks)
    for step in range(steps):
        for slot in slots:
            _, data = windows.read(windows.visit(step, slot).number)
            assert len(data) == SAMPLE
    lengths = np.array([end - begin for _, begin, end in reader.runs])
    assert lengths[lengths >= 1 << 20].sum() >= 0.9 * lengths.sum()
    assert len(set(reader.runs)) == len(reader.runs)
    used = steps * len(slots) * SAMPLE
    assert lengths.sum() <= 1.6 * used + len({order.lane(slot) for slot in slots}) * 8 * (1 << 20)  # windows under way


def test_a_stream_starts_anywhere_at_once_and_reads_its_windows_alone(catalog):
    order, reader = order_of(catalog), Counting()
    began = time.monotonic()
    windows = Windows(order, catalog, reader, range(32), 12_345, 0, 1)
    for slot in range(32):
        windows.visit(12_345, slot)
    assert time.monotonic() - began < 2
    assert len({order.lane(slot) for slot in range(32)}) == 8
    assert sum(end - begin for _, begin, end in reader.runs) < 8 * 8192 / 64 * SAMPLE * 2


def test_workers_share_a_window_without_keeping_each_others_samples(catalog):
    order = order_of(catalog)
    alone = Windows(order, catalog, Counting(), range(32), 0, 0, 1)
    expected = [[alone.visit(step, slot) for slot in range(32)] for step in range(6)]
    workers = [Windows(order, catalog, Counting(), range(32), 0, worker, 3) for worker in range(3)]
    for step in range(6):
        one = workers[step % 3]
        assert [one.visit(step, slot) for slot in range(32)] == expected[step]
        assert all(len(one.read(visit.number)[1]) == SAMPLE for visit in expected[step])
    kept = [sum(len(window.raw) for window in one._lanes.values()) for one in workers]
    whole = sum(len(window.raw) for window in alone._lanes.values())
    assert abs(sum(kept) - whole) < 0.1 * whole


def test_a_shard_that_vanishes_takes_no_other_with_it(tmp_path):
    catalog = sparse(tmp_path, 4, 200)
    order = order_of(catalog, slots=8, window=400)
    (tmp_path / "0002.tar").unlink()
    windows = Windows(order, catalog, Reader(pauses=()), range(8), 0, 0, 1)
    for step in range(60):
        for visit in [windows.visit(step, slot) for slot in range(8)]:
            gone = catalog.part(visit.number).shard.endswith("0002.tar")
            try:
                windows.read(visit.number)
                assert not gone
            except OSError:
                assert gone
            assert all(0 <= other < len(catalog) for other in windows.others(visit))


def test_a_read_is_tried_again(tmp_path):
    shard = tmp_path / "0.tar"
    tries = []

    class Late(Reader):
        def _tried(self, *place):
            tries.append(place)
            if len(tries) == 3:
                shard.write_bytes(b"0123456789")
            return super()._tried(*place)

    assert Late(pauses=(0, 0, 0)).read(str(shard), 2, 5) == b"234"
    assert len(tries) == 3
    with pytest.raises(OSError, match="it ends before byte 12"):
        Reader(pauses=(0,)).read(str(shard), 2, 12)


def test_a_shard_that_is_lost_costs_its_pauses_once_and_not_for_every_sample(tmp_path):
    tries = []

    class Gone(Reader):
        def _tried(self, shard, begin, end):
            tries.append(shard)
            return super()._tried(shard, begin, end)

    reader, shard = Gone(pauses=(0, 0, 0)), tmp_path / "gone.tar"
    for expected in (4, 5, 6):
        with pytest.raises(FileNotFoundError):
            reader.read(str(shard), 0, 1)
        assert len(tries) == expected
    shard.write_bytes(b"back")
    assert reader.read(str(shard), 0, 4) == b"back"


def test_a_sample_of_a_shard_that_is_no_longer_what_was_indexed_is_named_by_its_place(tmp_path):
    catalog = sparse(tmp_path, 1, 3)  # whose shard has nothing in it
    assert [catalog.key(number) for number in range(3)] == ["sample 0", "sample 1", "sample 2"]
    (tmp_path / "0000.tar").unlink()
    assert catalog.key(2) == "sample 2"


def test_more_shards_than_may_stay_open_are_read(tmp_path):
    reader = Reader()
    shards = [tmp_path / f"{n}.tar" for n in range(70)]
    for shard in shards:
        shard.write_bytes(b"x")
    for shard in islice([*shards, *shards], 140):
        assert reader.read(str(shard), 0, 1) == b"x"
    assert len(reader._open) <= 32


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """5 shards of 90 samples."""
    return sparse(tmp_path_factory.mktemp("small"), 5, 90)


@given(
    ranks=st.sampled_from([1, 2, 4, 8, 16, 64]),
    workers=st.integers(1, 5),
    start=st.integers(0, 40),
    slots=st.sampled_from([64, 128]),
    window=st.integers(1, 300),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_the_order_is_the_same_on_any_ranks_and_workers_from_any_start(
    small, ranks, workers, start, slots, window, seed
):
    def batch(step, ranks, workers, start):
        """What all ranks together have at a step, each from the worker whose turn it is."""
        order, found = Order([Source(small.chunks(), 1.0)], slots, seed, window), []
        for rank in range(ranks):
            mine = range(slots * rank // ranks, slots * (rank + 1) // ranks)
            windows = Windows(order, small, Reader(), mine, start, (step - start) % workers, workers)
            found += [windows.visit(step, slot) for slot in mine]
        return found

    step = start + workers  # a second turn
    assert batch(step, ranks, workers, start) == batch(step, 1, 1, 0)
