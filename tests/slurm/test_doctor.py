"""The doctor on two nodes of a real SLURM."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.slurm
ON_BOTH = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--mem=2G", "--time=10")


def test_the_doctor_of_a_submitted_job_sees_both_nodes_and_the_disk_that_they_share(cluster, recipe, tmp_path):
    profile = tmp_path / "private.yaml"
    profile.write_text("cluster: slurm\nnodes: 2\ntasks_per_node: 1\ncpus_per_task: 1\nmem_gb: 2\ntimeout_min: 10\n")
    command = [sys.executable, "-m", "launcher", "doctor", "--cluster", profile, "--recipe", recipe]
    said = cluster.call(*map(str, command), cwd=recipe.parent)
    assert "ranks           2 on 2 hosts: " in said, said
    assert f"shared folder   {recipe.parent}/runs: all see what any writes" in said and "GB/s a link" in said, said
    assert "FAIL" not in said, said


def test_the_doctor_in_srun_is_red_on_all_ranks_where_shards_are_missing(cluster, recipe):
    command = ["srun", *ON_BOTH, sys.executable, "-m", "launcher", "doctor", "--shards", "/nowhere"]
    done = subprocess.run(command, env=cluster.environment, cwd=recipe.parent, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout.count("FAIL  shards") == 1, done.stdout + done.stderr
