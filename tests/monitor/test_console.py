import pytest

from dist_fusion.monitor.console import Pace, progress_line

VALUES = {
    "loss/total": 1.25, "loss/hard/itm": 0.5, "loss_max/total": 9.0, "speed/samples_per_s": 99.6, "time/left_s": 3661.0,
}  # fmt: skip


def test_a_line_tells_step_losses_rate_and_time_left():
    assert progress_line(30, 600, VALUES) == "step 30/600 | total 1.250 hard/itm 0.500 | 100 samples/s | 1:01:01 left"


@pytest.mark.parametrize(("skipped", "end"), [(0.0, "1:01:01 left"), (3.0, "1:01:01 left | 3 steps skipped")])
def test_skipped_steps_are_told_if_there_are_any(skipped, end):
    assert progress_line(30, 600, {**VALUES, "optimizer/skipped_steps": skipped}).endswith(end)


def test_the_time_left_follows_the_pace_of_now_and_shares_pauses_out():
    pace = Pace()
    pace.add(10, 100.0)
    for _ in range(40):
        pace.add(10, 10.0)
    assert pace.left(100) == pytest.approx(100, rel=1e-3), "a slow start is forgotten"
    pace.paused_s = 410.0
    assert pace.left(100) == pytest.approx(200, rel=1e-3), "a second of each step so far was a pause"


def test_before_the_first_interval_nothing_is_known():
    assert Pace().left(100) == 0
