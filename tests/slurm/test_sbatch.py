"""`sbatch slurm/pretrain.sh` on a real SLURM: it starts, is told to stop, loses a node, fails."""

import os
import shutil
import signal
from pathlib import Path

import pytest

from launcher import failure, records
from launcher.__main__ import main
from tests.slurm.cluster import Cluster, wait_for
from tests.slurm.conftest import ROOT, STEPS, losses, reaches, sbatch

pytestmark = pytest.mark.slurm


def outcome(cluster: Cluster, job: str, recipe: Path) -> tuple[tuple[str, str], str]:
    """The state of a job when it is over with how often it was started again, and its log."""
    done = cluster.wait(job)
    return (done["JobState"], done["Restarts"]), (recipe.parent / f"pretrain-{job}.log").read_text()


def test_two_nodes_train_a_recipe_from_its_beginning_to_its_end(undisturbed):
    assert [step for step, _ in undisturbed] == list(range(1, STEPS + 1))


def test_a_job_that_is_warned_saves_requeues_itself_and_ends_like_an_undisturbed_one(
    cluster, recipe, runs, undisturbed
):
    job = sbatch(cluster, recipe, "name=warned")
    reaches(runs / "warned", 40)
    cluster.call("scancel", "--signal=USR2", job)
    wait_for(lambda: cluster.job(job)["Restarts"] == "1", 60)
    stopped = len(losses(runs / "warned"))
    assert 40 <= stopped < STEPS
    state, log = outcome(cluster, job, recipe)
    assert state == ("COMPLETED", "1"), log
    assert losses(runs / "warned") == undisturbed
    assert f"step {stopped} of {STEPS}" in log  # nothing was repeated


def test_a_job_that_loses_a_node_goes_on_from_its_last_checkpoint_when_there_is_one_again(
    cluster, recipe, runs, undisturbed
):
    job = sbatch(cluster, recipe, "name=struck")
    reaches(runs / "struck", 40)
    cluster.power_off("node2")
    wait_for(lambda: cluster.job(job)["JobState"] == "PENDING", 60)
    cluster.power_on("node2")
    state, log = outcome(cluster, job, recipe)
    assert state == ("COMPLETED", "1"), log
    assert losses(runs / "struck") == undisturbed
    assert not failure.read(runs / "struck")


def test_a_job_whose_data_is_bad_ends_for_good_and_leaves_the_reason(cluster, recipe, runs, shards, tmp_path):
    bad = tmp_path / "shards"
    shutil.copytree(shards, bad)
    for tar in bad.glob("*.tar"):
        tar.write_bytes(tar.read_bytes().replace(b"IDAT", b"TADI"))  # no picture has its pixels any more
    state, log = outcome(cluster, sbatch(cluster, recipe, "name=bad", f"data.shards=[{bad}]"), recipe)
    assert state == ("FAILED", "0"), log
    assert "samples were unusable" in failure.read(runs / "bad"), log
    assert failure.read(runs / "bad") in log


def test_a_job_whose_rank_is_killed_ends_for_good_and_says_so(cluster, recipe, runs):
    job = sbatch(cluster, recipe, "name=killed")
    reaches(runs / "killed", 10)
    os.kill(task(1), signal.SIGKILL)
    state, log = outcome(cluster, job, recipe)
    assert state == ("FAILED", "0"), log
    assert "Another rank was killed" in failure.read(runs / "killed"), log
    assert "task 1: Killed" in log


def task(rank: int) -> int:
    """The process of a rank, as seen from this machine; of its forks the first."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command, environment = (folder / "cmdline").read_bytes(), (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"launcher\0worker" in command and f"SLURM_PROCID={rank}".encode() in environment:
            found.append(int(folder.name))
    return min(found)


def test_a_run_that_is_cancelled_saves_and_stays_where_it_is(cluster, recipe, runs, monkeypatch, capsys):
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, cluster.environment[name])
    job = sbatch(cluster, recipe, "name=cancelled")
    reaches(runs / "cancelled", 10)
    assert main(["jobs", str(runs)]) == 0
    assert f"{job}" in capsys.readouterr().out
    assert main(["cancel", str(runs / "cancelled")]) == 0
    state, log = outcome(cluster, job, recipe)
    assert state == ("FAILED", "0"), log
    assert cluster.job(job)["ExitCode"] == "75:0"
    saved = sorted((runs / "cancelled" / "checkpoints").glob("step-*"))[-1].name
    assert int(saved.removeprefix("step-")) == len(losses(runs / "cancelled"))


def test_a_run_that_is_cancelled_before_it_trains_ends_too(cluster, recipe, runs, monkeypatch, capsys):
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, cluster.environment[name])
    job = sbatch(cluster, recipe, "name=early")
    wait_for(lambda: (runs / "early" / "logs" / "jobs.jsonl").exists(), 60)
    assert main(["cancel", str(runs / "early")]) == 0
    assert f"job {job} is cancelled" in capsys.readouterr().out
    state, log = outcome(cluster, job, recipe)
    assert state == ("CANCELLED", "0"), log


def test_where_no_job_may_be_requeued_those_of_a_chain_go_on_from_one_another(cluster, recipe, runs, undisturbed):
    """The second goes on, and the third finds that all is done: it is the one whose id is its array's."""
    array = sbatch(cluster, recipe, "name=chain", options=("--no-requeue", "--array=1-3%1"))
    reaches(runs / "chain", 40)
    os.kill(task(0), signal.SIGUSR2)
    ended = [cluster.wait(f"{array}_{place}") for place in (1, 2, 3)]
    assert [(job["JobState"], job["ExitCode"], job["Restarts"]) for job in ended] == [
        ("FAILED", "75:0", "0"), ("COMPLETED", "0:0", "0"), ("COMPLETED", "0:0", "0"),
    ]  # fmt: skip
    assert losses(runs / "chain") == undisturbed
    noted = records.jobs_of(runs / "chain")
    assert [job.job for job in noted] == [f"{array}_{place}" for place in (1, 2, 3)]
    assert [job.log for job in noted] == [job["StdOut"] for job in ended]


def test_a_chain_that_is_cancelled_saves_and_goes_on_no_more(cluster, recipe, runs, monkeypatch, capsys):
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, cluster.environment[name])
    array = sbatch(cluster, recipe, "name=ended", options=("--no-requeue", "--array=1-3%1"))
    reaches(runs / "ended", 10)
    assert main(["cancel", str(runs / "ended")]) == 0
    assert f"those of array {array} that wait are cancelled" in capsys.readouterr().out
    first = cluster.wait(f"{array}_1")
    assert (first["JobState"], first["ExitCode"]) == ("FAILED", "75:0")
    wait_for(lambda: not cluster.call("squeue", "--noheader"), 30)
    assert [job.job for job in records.jobs_of(runs / "ended")] == [f"{array}_1"]
    assert records.state(runs / "ended", records.jobs_of(runs / "ended")[0], {}).where == "saved, to be continued"
    assert 10 <= len(losses(runs / "ended")) < STEPS


def test_a_job_that_hears_sigterm_before_it_trains_goes_back_into_the_queue(cluster, recipe, runs):
    job = sbatch(cluster, recipe, "name=termed")
    wait_for(lambda: (runs / "termed" / "logs" / "jobs.jsonl").exists(), 60)
    cluster.call("scancel", "--signal=TERM", job)
    state, log = outcome(cluster, job, recipe)
    assert state == ("COMPLETED", "1"), log
    assert log.count("nothing was trained yet") == log.count("; back into the queue") == 1, log


@pytest.mark.parametrize("script", ["pretrain", "finetune", "evaluate"])
def test_tasks_have_the_environment_of_their_script_where_sbatch_takes_none_over(cluster, tmp_path, script):
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\ncase "$*" in *check*) ;; *) echo "a task has $SLURM_EXPORT_ENV";; esac\n')
    python.chmod(0o755)
    options = ["--export=NONE", "--wait", "--gpus-per-node=1", "--ntasks-per-node=1", "--cpus-per-task=1", "--mem=1G"]
    path = str(ROOT / "slurm" / f"{script}.sh")
    job = cluster.call("sbatch", "--parsable", *options, path, "one", "two", cwd=tmp_path)
    assert (tmp_path / f"{script}-{job}.log").read_text() == "a task has ALL\n"


def test_a_recipe_that_cannot_work_is_refused_before_any_rank_starts(cluster, recipe, runs):
    state, log = outcome(cluster, sbatch(cluster, recipe, "name=wrong", "global_batch=9"), recipe)
    assert state == ("FAILED", "0")
    assert "global_batch 9 does not divide" in log
    assert not (runs / "wrong").exists()


def test_a_finished_run_is_scored_by_a_job(cluster, recipe, runs, shards, undisturbed):
    script = str(ROOT / "slurm" / "evaluate.sh")
    job = cluster.call(
        "sbatch", "--parsable", "--mem=2G", "--cpus-per-task=1", script, str(runs / "undisturbed"), str(shards),
        cwd=recipe.parent,
    )  # fmt: skip
    done = cluster.wait(job)
    assert done["JobState"] == "COMPLETED", (recipe.parent / f"evaluate-{job}.log").read_text()
    assert (runs / "undisturbed" / "evaluate.json").is_file()


def test_fine_tuning_is_started_as_pre_training_is():
    """A batch script is copied where it runs, so it cannot read what both have in common."""
    pretrain, finetune = ((ROOT / "slurm" / f"{name}.sh").read_text() for name in ("pretrain", "finetune"))
    for words in (("pretrain.sh", "finetune.sh"), ("-pretrain}", "-vqa}")):
        pretrain = pretrain.replace(*words)
    body = pretrain.index("#SBATCH --ntasks-per-node")
    assert pretrain[body:] == finetune[finetune.index("#SBATCH --ntasks-per-node") :]
