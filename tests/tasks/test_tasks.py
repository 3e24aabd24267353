import pytest

from dist_fusion.tasks import LIMITS, TASKS, to_score


@pytest.mark.parametrize("name", LIMITS)
def test_a_score_is_of_all_an_image_is_asked_whatever_training_draws(name):
    training = {name: TASKS[name](**{LIMITS[name]: 4})}
    assert getattr(to_score(training)[name], LIMITS[name]) == 0


def test_only_limits_change_for_a_score():
    tasks = {name: kind() for name, kind in TASKS.items()}
    assert to_score(tasks) == tasks
