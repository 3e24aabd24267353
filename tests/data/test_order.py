import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_fusion.data.order import Order, Source, cut, lanes_of

SIZES = st.lists(st.lists(st.integers(1, 50), min_size=1, max_size=30), min_size=1, max_size=6)


def chunks_of(shards, chunk_bytes):
    shard = np.repeat(np.arange(len(shards)), [len(one) for one in shards])
    return cut(shard, np.array([size for one in shards for size in one]), chunk_bytes)


def visited(order, batches):
    """Numbers of samples by batch and slot, through windows as a reader goes."""
    found = []
    for step in range(batches):
        row = []
        for slot in range(order.slots):
            epoch, lane, place = order.place(step, slot)
            line = order.epoch(epoch)
            first, count = line.window(lane, place)
            assert first <= place < first + count
            row.append(int(line.span(lane, first, count).visits[place - first]))
        found.append(row)
    return found


@given(SIZES, st.integers(1, 200))
@settings(max_examples=60, deadline=None)
def test_chunks_cover_every_sample_once_and_never_two_shards(shards, chunk_bytes):
    chunks = chunks_of(shards, chunk_bytes)
    covered = [n for first, count in zip(*chunks, strict=True) for n in range(first, first + count)]
    assert covered == list(range(sum(map(len, shards))))
    shard = np.repeat(np.arange(len(shards)), [len(one) for one in shards])
    assert all(len(set(shard[first : first + count])) == 1 for first, count in zip(*chunks, strict=True))


@given(SIZES, st.integers(1, 200), st.integers(1, 24), st.integers(0, 99), st.integers(1, 60))
@settings(max_examples=60, deadline=None)
def test_every_lane_visits_each_of_its_samples_once_an_epoch(shards, chunk_bytes, slots, seed, window):
    order = Order([Source(chunks_of(shards, chunk_bytes), 1.0)], slots, seed, window)
    samples = sum(map(len, shards))
    assert order.num_samples == samples
    epochs: dict[int, list[int]] = {}
    for step in range(-(-2 * samples // slots) + 1):
        for slot in range(slots):
            epoch, lane, place = order.place(step, slot)
            line = order.epoch(epoch)
            first, count = line.window(lane, place)
            epochs.setdefault(epoch, []).append(int(line.span(lane, first, count).visits[place - first]))
    assert sorted(epochs[0]) == list(range(samples))
    assert len(set(epochs.get(1, []))) == len(epochs.get(1, []))


def test_a_place_does_not_depend_on_how_the_stream_got_there():
    order = Order([Source(chunks_of([[3] * 40] * 5, 12), 1.0)], 12, 7, 30)
    whole = visited(order, 40)
    again = Order([Source(chunks_of([[3] * 40] * 5, 12), 1.0)], 12, 7, 30)
    assert visited(again, 40)[17:23] == whole[17:23]
    assert whole != visited(Order([Source(chunks_of([[3] * 40] * 5, 12), 1.0)], 12, 8, 30), 40)


@pytest.mark.parametrize(("slots", "samples", "lanes"), [(256, 10**6, 64), (96, 10**6, 48), (7, 10**6, 7), (256, 5, 4)])
def test_lanes_divide_the_batch(slots, samples, lanes):
    assert lanes_of(slots, samples) == lanes


@pytest.mark.parametrize(("weight", "visits"), [(0.25, 50), (1.0, 200), (2.5, 500)])
def test_a_weight_is_how_often_an_epoch_visits_a_sample(weight, visits):
    light = Source(chunks_of([[1] * 100] * 2, 10), weight)
    heavy = Source(chunks_of([[1] * 30], 10)._replace(first=np.array([200, 210, 220])), 1.0)
    order = Order([light, heavy], 10, 0, 20)
    assert order.num_samples == visits + 30
    first = np.array(visited(order, order.num_samples // 10)).ravel()
    by_sample = np.bincount(first, minlength=230)
    assert (by_sample[200:] == 1).all()
    assert by_sample[:200].sum() == visits
    assert by_sample[:200].max() - by_sample[:200].min() <= 1


def test_neighbours_on_disk_are_far_apart_in_the_stream():
    """Of 40,000 samples in 40 shards, with 2,000 mixed at a time: places and numbers hardly know of each other."""
    order = Order([Source(chunks_of([[20_000] * 1000] * 40, 1_310_720), 1.0)], 64, 0, 8192)
    batches = np.array(visited(order, 40_000 // 64 // 4))
    shards_a_batch = np.array([len(set(batch // 1000)) for batch in batches])
    assert shards_a_batch.mean() > 0.8 * 40 * (1 - (1 - 1 / 40) ** 64)  # what drawing at random would give
    places = np.full(40_000, -1)
    places[batches.ravel()] = np.arange(batches.size)
    both = (places[:-1] >= 0) & (places[1:] >= 0)
    apart = np.abs(places[1:] - places[:-1])[both]
    # Neighbours share a window, of 8192 places: as far apart as chance puts them there.
    assert np.median(apart) > 64
    assert np.mean(apart < 64) < 0.05
