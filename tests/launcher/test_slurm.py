"""When a job may start itself again."""

import pytest

from launcher import life, slurm


@pytest.mark.parametrize(
    ("known", "why"),
    [
        ({"JobState": "RUNNING", "Requeue": "1"}, ""),
        ({"JobState": "RUNNING", "Requeue": "0"}, "may not be requeued"),
        ({"JobState": "COMPLETING", "Requeue": "1"}, "COMPLETING"),
        ({"JobState": "PREEMPTED", "Requeue": "1"}, "PREEMPTED"),
        ({"JobState": "NODE_FAIL", "Requeue": "1"}, "NODE_FAIL"),
        ({}, "unknown"),
    ],
)
def test_only_a_job_that_nobody_else_ended_or_restarts_starts_itself_again(known, why):
    assert why in slurm.may_requeue(known)
    assert bool(why) == bool(slurm.may_requeue(known))


def test_the_last_task_of_an_array_is_not_taken_for_the_whole_array():
    task = {"SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}
    assert slurm.this_job(task) == "7_3"
    assert slurm.this_job({"SLURM_JOB_ID": "7"}) == "7"
    assert slurm.this_job({}) == ""


def test_a_run_that_a_person_stopped_does_not_go_on_by_itself(tmp_path, monkeypatch):
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    assert life.once_more(tmp_path) == ""
    (tmp_path / "STOP").touch()
    assert "STOP stopped it" in life.once_more(tmp_path)


def test_where_slurm_has_no_commands_a_saved_job_says_so_and_leaves_with_75(monkeypatch, capsys):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("PATH", "/nowhere")
    assert life.start_again(None, requeue=True) == life.CONTINUE
    assert "does not start itself again: scontrol" in capsys.readouterr().out
    assert life.start_again(None, requeue=False) == life.CONTINUE
    assert "told not to" in capsys.readouterr().out
