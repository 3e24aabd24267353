from math import inf, nan

import pytest
import torch

from dist_fusion.data.stream import Loaded
from dist_fusion.monitor.interval import Interval
from tests import tiny

CPU = torch.device("cpu")
BATCH = Loaded(tiny.batch(tiny.PRETRAINING, tiny.samples(4)), ())


def filled(interval, totals, micro_steps=1):
    """The interval after a step for every total, each made of equal micro-steps."""
    for total in totals:
        interval.fetch(iter([BATCH] * micro_steps), micro_steps)
        for _ in range(micro_steps):
            interval.add(torch.tensor(total / micro_steps), {"hard/itm": torch.tensor(2.0 / micro_steps)})
    return interval


def test_an_interval_tells_means_the_last_norm_and_how_many_losses_were_no_number():
    interval = filled(Interval(CPU, 4, 10), (1.0, nan, inf, 3.0))
    values = interval.read(4, torch.tensor(0.5), {})
    assert values["health/nonfinite"] == 2
    assert values["loss/hard/itm"] == 2
    assert values["optimizer/gradient_norm"] == 0.5
    values = filled(interval, (1.0,)).read(5, torch.tensor(inf), {})
    assert values["health/nonfinite"] == 0
    assert values["loss/total"] == 1
    assert "optimizer/gradient_norm" not in values


@pytest.mark.parametrize("micro_steps", [1, 2])
def test_the_largest_loss_is_that_of_a_whole_step(micro_steps):
    values = filled(Interval(CPU, 4, 10), (1.0, 5.0, 3.0), micro_steps).read(3, torch.tensor(0.5), {})
    assert (values["loss/total"], values["loss_max/total"]) == (3.0, 5.0)
    assert values["loss_max/hard/itm"] == 2.0


def test_a_reading_is_a_mean_and_left_out_where_nothing_was_read():
    readings = {"attention/entropy/t2i": torch.tensor([3.0, 2.0]), "attention/entropy/i2t": torch.tensor([0.0, 0.0])}
    values = filled(Interval(CPU, 4, 10), (1.0,)).read(1, torch.tensor(0.5), readings)
    assert values["attention/entropy/t2i"] == 1.5
    assert "attention/entropy/i2t" not in values


def test_pauses_count_in_no_speed_and_phases_are_told_of_a_step(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    interval = Interval(CPU, 4, 10, samples_at_peak=8.0)
    for _ in range(2):
        filled(interval, (1.0,))
        for name, seconds in (("teacher", 0.25), ("student", 0.5), ("backward", 1.0), ("optimizer", 0.25)):
            with interval.phase(name):
                now[0] += seconds
        with interval.paused():
            now[0] += 5
    values = interval.read(2, torch.tensor(0.5), {})
    assert [values[f"time/{name}_s"] for name in ("teacher", "student", "backward", "optimizer")] == [
        0.25,
        0.5,
        1,
        0.25,
    ]
    assert values["speed/step_s"] == 2.0
    assert values["speed/samples_per_s"] == values["speed/samples_per_s_per_rank"] == 2.0
    assert values["speed/mfu"] == 0.25
    assert values["time/left_s"] == 8 * (2.0 + 5.0)


def test_between_log_steps_nothing_is_read_from_the_device():
    """On the device without data every reading of a value raises."""
    interval = Interval(torch.device("meta"), 4, 10)
    for _ in range(3):
        interval.fetch(iter([BATCH]), 1)
        interval.add(torch.ones((), device="meta"), {"hard/itm": torch.ones((), device="meta")})
    with pytest.raises((RuntimeError, NotImplementedError)):
        interval.read(3, torch.ones((), device="meta"), {})


def test_ranks_are_told_together_with_the_largest_loss_and_the_slowest_rank(two_ranks):
    first, second = two_ranks.run("interval")
    assert first["loss/total"] == second["loss/total"] == ((1 + 2) + (2 + 3)) / 2
    assert first["loss_max/total"] == 2 * 3.0, "as if the other rank's share were as large"
    assert first["loss/hard/itm"] == 1.0
    assert first["optimizer/gradient_norm"] == 0.25
    assert first["attention/entropy/t2i"] == 2.0, "only the rank that had pairs counts"
    assert first["ranks/forward_s_max_rank"] == 1
    assert first["ranks/forward_s_max"] >= 0.02 > first["ranks/forward_s_min"]
    assert first["speed/samples_per_s_per_rank"] == first["speed/samples_per_s"] / 2
    assert first["memory/peak_gib"] == second["memory/peak_gib"] > 0
