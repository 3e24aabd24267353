"""The jobs of runs, from their folders."""

import os
import subprocess
import sys
import threading
import time

import pytest

from dist_fusion.config import load
from dist_fusion.monitor.lines import append_line
from dist_fusion.schema import UserError
from launcher import failure, logs, records, sweep
from launcher.place import Place
from launcher.slurm import Queued


def test_a_job_stands_as_slurm_says_and_then_by_what_it_left(tmp_path):
    records.note(tmp_path, "7", "slurm", "log")
    (job,) = records.jobs_of(tmp_path)
    running = {"7": Queued("RUNNING", "1:00", "node1")}
    assert records.state(tmp_path, job, running).state == "RUNNING"
    assert records.lives(tmp_path, running) == [job]
    assert records.lives(tmp_path, {}) == []
    assert records.state(tmp_path, job, {}) == ("failed", "", "ended before it trained; see log")
    failure.write(tmp_path, Place(0, 1, 0, 1, "node1", "7.0.0"), "Traceback\nValueError: why")
    assert records.state(tmp_path, job, {})[::2] == ("failed", "ValueError: why")
    (tmp_path / "model.safetensors").touch()
    assert records.state(tmp_path, job, {}).state == "finished"


@pytest.mark.parametrize(
    ("turn", "details", "state"),
    [
        ("stopped", {"by": "SIGUSR2"}, ("ended", "", "saved, to be continued")),
        ("failed", {"error": "rank 1: no step\nfor 30 minutes"}, ("failed", "", "for 30 minutes")),
        ("started", {}, ("failed", "", "ended without a word; see log")),
    ],
)
def test_a_job_that_vanished_is_saved_only_where_the_run_says_so(tmp_path, turn, details, state):
    records.note(tmp_path, "7", "slurm", "log")
    for kind, told in (("started", {}), (turn, details)):
        append_line(tmp_path / "events.jsonl", {"time": time.time(), "kind": kind, "step": 4, "details": told})
    assert records.state(tmp_path, records.jobs_of(tmp_path)[0], {}) == state


def test_what_ended_an_earlier_job_is_no_word_on_one_that_never_trained(tmp_path):
    line = {"time": time.time() - 60, "kind": "failed", "step": 4, "details": {"error": "the disk is full"}}
    append_line(tmp_path / "events.jsonl", line)
    records.note(tmp_path, "8", "slurm", "")
    assert records.state(tmp_path, records.jobs_of(tmp_path)[0], {}).where == "ended before it trained"


def test_a_job_submitted_by_hand_is_noted_once_also_where_slurm_has_no_commands(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    of_array = {"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "8", "SLURM_ARRAY_TASK_ID": "1"}
    for environment in ({}, {"SLURM_JOB_ID": "7"}, of_array, of_array):
        records.note_this_job(tmp_path, environment)
    assert [job.job for job in records.jobs_of(tmp_path)] == ["7", "8_1"]


def test_a_local_job_lives_as_long_as_its_process(tmp_path):
    command = [sys.executable, "-c", "import sys; print('up', flush=True); sys.stdin.read()", "submitit"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"up\n"
    records.note(tmp_path, str(process.pid), "local", "log")
    records.note(tmp_path, str(os.getpid()), "local", "log")  # the number is another process's by now
    assert [job.job for job in records.lives(tmp_path, {})] == [str(process.pid)]
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, but not yet buried
    assert records.lives(tmp_path, {}) == []
    process.wait()


def test_runs_are_found_also_in_folders_of_folders(tmp_path):
    for name in ("one", "two/three"):
        records.note(tmp_path / name, "7", "local", "log")
    assert [run.relative_to(tmp_path).as_posix() for run in records.runs_in(tmp_path)] == ["one", "two/three"]


def test_a_log_is_shown_from_its_end_with_the_reason_of_a_failure(tmp_path):
    with pytest.raises(UserError, match="has had no job"):
        logs.show(tmp_path, False, print)
    log, said = tmp_path / "log", []
    log.write_text("".join(f"line {n}\n" for n in range(100)))
    records.note(tmp_path, "1", "local", str(log))
    failure.write(tmp_path, Place(0, 1, 0, 1, "node1", "7.0.0"), "the disk is full")
    logs.show(tmp_path, True, said.append)
    shown = "".join(said)
    said.clear()
    assert "line 60\n" in shown and "line 59\n" not in shown and "line 99\n" in shown
    assert "the disk is full" in shown
    records.note(tmp_path, "7", "slurm", "", by_hand=True)
    logs.show(tmp_path, False, said.append)
    assert "the log of job 7 is not known here" in said[0] and "sbatch's --output names" in said[0]


@pytest.fixture
def squeue(tmp_path, monkeypatch):
    """SLURM's answer, which a test writes; without one it does not answer."""
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    answer, script = tmp_path / "answer", tmp_path / "bin" / "squeue"
    script.parent.mkdir()
    script.write_text(f"#!/bin/sh\ncat {answer}\n")
    script.chmod(0o755)
    return answer


def test_a_log_is_waited_for_until_its_job_begins_whether_slurm_answers_each_time_or_not(tmp_path, squeue):
    """A job that sbatch has just taken is in the queue alone; in the run's folder it is once it begins."""
    run, log, said = tmp_path / "run", tmp_path / "log", []
    squeue.write_text("9|PENDING|0:00|(Priority)\n")

    def hear(text: str) -> None:
        said.append(text)
        if "has no job that runs" in text:
            squeue.write_text("9|RUNNING|0:01|node1\n")
            log.write_text("it begins\n")
            records.note(run, "9", "slurm", str(log), by_hand=True)
        elif "it begins" in text:
            squeue.unlink()
            threading.Timer(0.5, goes_on).start()

    def goes_on() -> None:
        with log.open("a") as file:
            file.write("it ends\n")
        squeue.with_name("new").write_text("")
        squeue.with_name("new").replace(squeue)

    logs.show(run, True, hear, seconds=0.1)
    assert "among those of yours that were not seen here yet (9; squeue --me" in said[0]
    assert "".join(said[1:]) == "it begins\nit ends\n"


def test_nothing_is_waited_for_where_no_job_can_come(tmp_path, squeue):
    squeue.write_text("")
    with pytest.raises(UserError, match="has had no job"):
        logs.show(tmp_path / "run", True, print, seconds=0.1)


def test_a_sweep_is_followed_past_a_look_that_failed(tmp_path, squeue):
    config, said = load("demo-teacher-pretrain", [f"runs={tmp_path}", "name=cell"]), []
    records.note(tmp_path / "cell", "9", "slurm", "")

    def hear(text: str) -> None:
        said.append(text)
        squeue.write_text("")

    (row,) = sweep.follow({"cell": config}, hear, seconds=0.1)
    assert "SLURM is asked again" in said[0] and said[1:] == ["cell: failed"]
    assert row.now.where == "ended before it trained"


@pytest.mark.parametrize(
    ("turns", "state", "elapsed", "trains"),
    [
        ((), "RUNNING", "1:00", False),
        (("started",), "RUNNING", "1:00", True),
        (("started",), "RUNNING", "1-01:00:00", True),
        (("started",), "PENDING", "0:00", False),
        (("started", "stopped"), "RUNNING", "1:00", False),
        (("started", "stopped", "started"), "RUNNING", "1:00", True),
        (("long ago",), "RUNNING", "1:00", False),  # its node died, and it was put back into the queue
    ],
)
def test_a_job_hears_of_its_end_once_it_trains_in_this_life(tmp_path, turns, state, elapsed, trains):
    for kind in turns:
        line = {"time": time.time() - (3600 if kind == "long ago" else 30), "step": 0, "details": {}}
        append_line(tmp_path / "events.jsonl", {**line, "kind": "started" if kind == "long ago" else kind})
    records.note(tmp_path, "7", "slurm", "log")
    (job,) = records.jobs_of(tmp_path)
    assert records.trains(tmp_path, job, {"7": Queued(state, elapsed, "node1")}) == trains
