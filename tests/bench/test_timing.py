import gc
import time

import pytest
import torch

from dist_fusion.bench.timing import Contest, compare, interleaved

CPU = torch.device("cpu")


def test_runs_take_turns_and_another_goes_first_in_each_round():
    order = []
    runs = {name: lambda name=name: order.append(name) for name in "abc"}
    taken = interleaved(runs, CPU, seconds=0, rounds=3)
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"  # the first round warms up
    assert [len(times) for times in taken.values()] == [3, 3, 3]


def test_rounds_go_on_until_the_time_is_over():
    taken = interleaved({"a": lambda: time.sleep(0.002)}, CPU, seconds=0.1, rounds=1)
    assert 1 < len(taken["a"]) <= 50


def test_the_garbage_collector_rests_meanwhile_and_works_again_also_after_a_failure():
    seen = []
    interleaved({"a": lambda: seen.append(gc.isenabled())}, CPU, seconds=0)
    assert not any(seen)
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError):
        interleaved({"a": lambda: 1 / 0}, CPU, seconds=0)
    assert gc.isenabled()


def test_a_ratio_above_one_says_that_ours_is_faster():
    row = compare(_contest(ours=lambda: time.sleep(0.001), theirs=lambda: time.sleep(0.05)), CPU, seconds=0)
    assert row.ratio > 1
    assert row.ratio_of_medians > 1
    assert row.ours_least_ms >= 1
    assert row.ours_ms == sorted(row.ours_ms)
    assert row.peer_ms[0] >= 50
    assert row.floor_ms is None
    assert "a case" in row.line()
    assert f"{row.ratio:.2f}x" in row.line()


def test_the_least_that_must_be_done_is_timed_beside_both():
    contest = _contest(ours=lambda: time.sleep(0.004), theirs=lambda: time.sleep(0.004))
    row = compare(contest._replace(floor=lambda: time.sleep(0.001)), CPU, seconds=0)
    assert 1 <= row.floor_least_ms <= row.floor_ms[2] + 1e-3
    assert "floor" in row.line()


def test_the_peak_counts_what_a_run_frees_before_it_ends_and_nothing_from_before():
    held = torch.ones(50_000_000)
    row = compare(_contest(ours=lambda: _fill(100), theirs=lambda: held[:1].clone()), CPU, seconds=0)
    if row.ours_peak_mb is None:
        pytest.skip("this kernel does not let a process set its high-water mark back")
    assert 95 < row.ours_peak_mb < 150
    assert row.peer_peak_mb < 50


def _fill(megabytes: int) -> None:
    torch.ones(megabytes * 250_000)


def _contest(ours, theirs) -> Contest:
    return Contest("a case", {}, ours, "someone", theirs)
