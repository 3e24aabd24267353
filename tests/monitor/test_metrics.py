import json
from math import inf, nan

import torch

from dist_fusion.data.stream import Loaded
from dist_fusion.monitor.metrics import Interval, Monitor
from tests import tiny


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_resumed_run_goes_on_where_it_resumed_and_drops_what_an_earlier_life_logged_later(tmp_path):
    first = Monitor(tmp_path, 0, 10)
    for step in range(1, 6):
        first.scalars(step, {"loss/total": float(step)})
    first.close()
    second = Monitor(tmp_path, 3, 10)
    second.scalars(4, {"loss/total": 40.0})
    second.close()
    assert [(line["step"], line["loss/total"]) for line in lines(tmp_path)] == [(1, 1), (2, 2), (3, 3), (4, 40)]


def test_a_line_torn_by_a_kill_is_dropped(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss/total": 1.0}\n{"step": 2, "loss/to')
    monitor = Monitor(tmp_path, 2, 10)
    monitor.scalars(3, {"loss/total": 3.0})
    monitor.close()
    assert [line["step"] for line in lines(tmp_path)] == [1, 3]


def test_tensorboard_shows_one_curve_over_two_lives(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start, stop in ((0, 5), (3, 8)):
        monitor = Monitor(tmp_path, start, 8)
        for step in range(start + 1, stop + 1):
            monitor.scalars(step, {"loss/total": 10.0 * start + step})
        monitor.close()
    curve = EventAccumulator(str(tmp_path / "tb")).Reload().Scalars("loss/total")
    assert [(point.step, point.value) for point in curve] == [
        (1, 1),
        (2, 2),
        (3, 3),
        *((s, 30 + s) for s in range(4, 9)),
    ]


def test_an_interval_tells_means_the_last_norm_and_how_many_losses_were_no_number():
    interval = Interval()
    batches = iter([Loaded(tiny.batch(tiny.PRETRAINING, tiny.samples(4)), ())] * 4)
    for total in (1.0, nan, inf, 3.0):
        interval.fetch(batches, 1)
        interval.add(torch.tensor(total), {"hard/itm": torch.tensor(2.0)})
    values = interval.read(4, torch.tensor(0.5))
    assert values["health/nonfinite"] == 2
    assert values["loss/hard/itm"] == 2
    assert values["optimizer/gradient_norm"] == 0.5
    interval.begin()
    interval.fetch(iter([Loaded(tiny.batch(tiny.PRETRAINING, tiny.samples(4)), ())]), 1)
    interval.add(torch.tensor(1.0), {})
    values = interval.read(4, torch.tensor(inf))
    assert values["health/nonfinite"] == 0
    assert values["loss/total"] == 1
    assert "optimizer/gradient_norm" not in values
