"""When a job may start itself again."""

import time

import pytest

from dist_fusion.monitor.events import read_events, record
from launcher import failure, life, slurm
from launcher.place import Place


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
    before = time.monotonic()
    assert life.start_again(None, requeue=True) == life.CONTINUE
    assert time.monotonic() - before < slurm.PAUSE, "a command that is not there does not come by waiting"
    assert "does not start itself again: scontrol" in capsys.readouterr().out
    assert life.start_again(None, requeue=False) == life.CONTINUE
    assert "told not to" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("elapsed", "seconds"), [("0:07", 7), ("12:05", 725), ("3:00:01", 10801), ("2-01:00:00", 176400)]
)
def test_a_length_of_time_is_read_as_slurm_writes_it(elapsed, seconds):
    assert slurm.seconds(elapsed) == seconds


@pytest.fixture
def scontrol(tmp_path, monkeypatch):
    """A controller that does not answer the first two times, as under load, and writes down what it is told."""
    monkeypatch.setattr(slurm, "PAUSE", 0.01)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    told, script = tmp_path / "told", tmp_path / "bin" / "scontrol"
    script.parent.mkdir()
    script.write_text(
        f'#!/bin/sh\necho "$@" >> {told}\n'
        f"if [ $(wc -l < {told}) -lt 3 ]; then\n"
        "  echo 'slurm_load_jobs error: Socket timed out on send/recv operation' >&2; exit 1; fi\n"
        "echo JobId=7 JobState=RUNNING Requeue=1\n"
    )
    script.chmod(0o755)
    return told


def test_one_slow_answer_of_slurm_does_not_end_a_long_run(scontrol):
    assert life.once_more(None) == ""
    assert scontrol.read_text().count("show job 7") == 3


def test_slurm_is_not_asked_for_ever(scontrol):
    with pytest.raises(slurm.SlurmError, match="Socket timed out"):
        slurm.patiently(slurm.job, "7", patience=0)


def test_a_job_that_is_given_up_leaves_the_reason_and_has_failed(tmp_path, capsys):
    assert life.give_up(tmp_path, Place(0, 2, 0, 1, "node1", "7.0.2"), "its time is too short") == life.FAILED
    assert failure.read(tmp_path) == "its time is too short"
    assert "given up: its time is too short" in capsys.readouterr().out


def test_a_job_that_is_warned_again_and_again_before_it_trains_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    run = tmp_path / "new"
    assert not life.in_vain(None) and not run.exists()
    assert [bool(life.in_vain(run)) for _ in range(3)] == [False, False, True]
    record(run, "started", 4, dict.fromkeys(("ranks", "hosts", "job", "resumed_from", "versions")))
    assert [bool(life.in_vain(run)) for _ in range(2)] == [False, False], "it has trained meanwhile"
    assert "--time must be much more" in life.in_vain(run)
    assert {event.step for event in read_events(run)} == {0, 4}
