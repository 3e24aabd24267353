"""Profiles are submitit's own parameters, and what is none of them is refused."""

import pytest

from dist_fusion.schema import UserError
from launcher.profile import PROFILES, load_profile, valid_keys


@pytest.mark.parametrize("name", sorted(path.stem for path in PROFILES[0].glob("*.yaml")))
def test_every_shipped_profile_is_accepted_by_submitit(name, tmp_path, monkeypatch):
    srun = tmp_path / "bin" / "srun"
    srun.parent.mkdir()
    srun.touch(mode=0o755)
    monkeypatch.setenv("PATH", f"{srun.parent}:/usr/bin:/bin")  # submitit only looks whether it is there
    profile = load_profile(name)
    assert (
        profile.executor(tmp_path / "logs").cluster
        == profile.cluster
        == {"v100": "slurm", "h100": "slurm"}.get(name, name)
    )


def test_the_v100_profile_is_eight_ranks_and_a_key_may_be_changed_for_a_job():
    assert load_profile("v100").ranks == 8
    profile = load_profile("v100", ["nodes=4", "slurm_partition=gpu"])
    assert profile.ranks == 32
    assert profile.parameters["slurm_partition"] == "gpu"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cluster: slurm\nslurm_partitoin: gpu\n", "did you mean 'slurm_partition'"),
        ("cluster: slurm\nthreads: 4\n", "valid keys: cluster, cpus_per_task"),
        ("cluster: cloud\n", "it can be slurm, local, debug"),
        ("nodes: 2\n", "it can be slurm, local, debug"),
        ("cluster: slurm\ngpus_per_node: 8\ntasks_per_node: 4\n", "make them equal"),
        ("- cluster\n", "must be a mapping"),
        ("cluster: [slurm\n", "is not YAML"),
    ],
)
def test_a_wrong_profile_is_refused_with_what_would_be_right(tmp_path, text, message):
    path = tmp_path / "profile.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_profile(path)


def test_a_profile_that_is_not_there_is_refused_with_those_that_are():
    with pytest.raises(UserError, match=r"did you mean 'v100'\?.*shipped: debug, h100, local, v100"):
        load_profile("v10")


def test_submitit_knows_the_keys_that_are_valid():
    assert {"timeout_min", "slurm_account", "slurm_srun_args", "slurm_max_num_timeout"} <= valid_keys()
