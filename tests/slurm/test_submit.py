"""`python -m launcher submit` and `sweep` on a real SLURM, through submitit."""

import subprocess
import sys
from pathlib import Path

import pytest
import submitit

from launcher import records
from tests.slurm.cluster import wait_for
from tests.slurm.conftest import STEPS, losses, reaches

pytestmark = pytest.mark.launch

PROFILE = """
cluster: slurm
nodes: 2
tasks_per_node: 1
cpus_per_task: 1
mem_gb: 2
timeout_min: 30
slurm_signal_delay_s: 60
slurm_max_num_timeout: 100
stderr_to_stdout: true
slurm_srun_args: [--kill-on-bad-exit=1]
"""


@pytest.fixture
def profile(tmp_path) -> Path:
    path = tmp_path / "private.yaml"
    path.write_text(PROFILE)
    return path


@pytest.fixture
def launcher(cluster, recipe):
    def call(*words: object) -> str:
        command = [sys.executable, "-m", "launcher", *map(str, words)]
        return cluster.call(*command, cwd=recipe.parent)

    return call


def test_a_submitted_job_saves_before_its_time_is_up_and_ends_like_an_undisturbed_one(
    cluster, launcher, recipe, runs, profile, undisturbed
):
    """The tasks stand still until SLURM's own warning wakes them, so that it never comes too late."""
    told = launcher("submit", recipe, "name=submitted", "--cluster", profile)
    run = runs / "submitted"
    (job,) = records.jobs_of(run)
    assert job.job in told and job.log in told and f"launcher logs {run} -f" in told
    reaches(run, 40)
    cluster.call("scancel", "--signal=STOP", job.job)
    cluster.call("scontrol", "update", f"JobId={job.job}", "EndTime=now+85")
    wait_for(lambda: cluster.job(job.job)["Restarts"] == "1", 120, lambda: Path(job.log).read_text())
    cluster.call("scontrol", "update", f"JobId={job.job}", "TimeLimit=30")
    stopped = len(losses(run))
    assert 40 <= stopped < STEPS
    followed = launcher("logs", run, "-f")
    assert f"saved {run}/checkpoints/step-{STEPS:08d}" in followed
    assert f"step {stopped} of {STEPS}" in Path(job.log).read_text()
    done = submitit.SlurmJob(folder=Path(job.log).parent, job_id=job.job, tasks=[0, 1])
    assert done.results() == [0, 0]
    assert cluster.wait(job.job)["JobState"] == "COMPLETED"
    assert losses(run) == undisturbed


def test_a_sweep_is_an_array_of_jobs_with_a_summary_at_its_end(cluster, launcher, recipe, runs, profile, tmp_path):
    sweep = tmp_path / "fusions.yaml"
    sweep.write_text(
        f"name: fusions\nrecipe: {recipe}\noverrides: [steps=6]\n"
        "cells: {shallow: [model.fusion=shallow], post: [model.fusion=bridge-post], pre: [model.fusion=bridge-pre]}\n"
    )
    command = ("sweep", sweep, "--cluster", profile, "--with", "nodes=1")
    head, *rows = launcher(*command).splitlines()[-4:]
    assert head.split() == ["cell", "step", "loss/total", "state"]
    assert [(row.split()[0], row.split()[1], row.split()[3]) for row in rows] == [
        (cell, "6", "finished") for cell in ("shallow", "post", "pre")
    ]
    arrays = {records.jobs_of(runs / "fusions" / cell)[0].job for cell in ("shallow", "post", "pre")}
    assert {job.split("_")[1] for job in arrays} == {"0", "1", "2"}
    assert launcher(*command).splitlines()[-3:] == rows  # all have ended: nothing is submitted again


def test_what_cannot_work_is_refused_before_it_is_submitted(cluster, recipe, profile):
    command = [sys.executable, "-m", "launcher", "submit", str(recipe), "--cluster", str(profile)]
    for change, right in (("global_batch=9", "does not divide"), ("data.shards=[/nowhere]", "does not exist")):
        done = subprocess.run([*command, change], env=cluster.environment, capture_output=True, text=True)
        assert done.returncode == 2 and right in done.stderr, done.stderr
    assert not cluster.call("squeue", "--noheader")
