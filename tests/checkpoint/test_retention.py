from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from dist_fusion.checkpoint.manifest import Saved
from dist_fusion.checkpoint.retention import superseded


def saved(steps) -> list[Saved]:
    return [Saved(Path(f"step-{step:08d}"), step) for step in sorted(steps)]


@given(
    steps=st.sets(st.integers(1, 400), max_size=40),
    keep=st.integers(2, 5),
    best=st.none() | st.integers(1, 400),
    epochs=st.integers(0, 3),
    steps_per_epoch=st.floats(0.5, 100),
)
def test_the_newest_the_best_and_the_first_of_every_period_stay_however_often_one_looks(
    steps, keep, best, epochs, steps_per_epoch
):
    left: list[int] = []
    for step in sorted(steps):  # as a run goes
        whole = saved([*left, step])
        gone = {one.step for one in superseded(whole, keep, best, epochs, steps_per_epoch)}
        left = [one.step for one in whole if one.step not in gone]
    stay = set(sorted(steps)[-keep:]) | ({best} & steps)
    period = epochs * steps_per_epoch
    if period:
        numbers = {int(step // period) for step in steps} - {0}
        stay |= {min(step for step in steps if int(step // period) == number) for number in numbers}
    assert set(left) == stay


def test_the_first_checkpoint_of_every_second_epoch_is_kept():
    gone = superseded(saved(range(50, 1001, 50)), 2, None, epochs=2, steps_per_epoch=130)
    kept = sorted(set(range(50, 1001, 50)) - {one.step for one in gone})
    assert kept == [300, 550, 800, 950, 1000]  # at or after 260, 520, 780
