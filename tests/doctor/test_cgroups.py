from pathlib import Path

import pytest

from dist_fusion.doctor.cgroups import left
from dist_fusion.doctor.host import available

GB = 10**9
UNLIMITED = 0x7FFFFFFFFFFFF000
"""What the first version has where there is no limit."""


def lay(root: Path, listed: str, groups: dict[str, dict[str, object]]) -> Path:
    """A system of files below `root`, as far as memory is read from it, with 100 GB available on the host."""
    files = {"proc/self/cgroup": {"": listed}, "proc/meminfo": {"": f"MemAvailable: {100 * GB // 1024} kB\n"}}
    for folder, contents in (files | groups).items():
        for name, content in contents.items():
            path = root / "sys/fs/cgroup" / folder / name if name else root / folder
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{content}\n")
    return root


def first(limit: float, used: float = 0, stat: str = "cache 0") -> dict[str, object]:
    return {"memory.limit_in_bytes": int(limit), "memory.usage_in_bytes": int(used), "memory.stat": stat}


def second(limit: object, used: float = 0, stat: str = "anon 0") -> dict[str, object]:
    return {"memory.max": limit, "memory.current": int(used), "memory.stat": stat}


def test_a_task_of_slurm_has_what_its_job_has_left(tmp_path):
    of_step = "system.slice/slurmstepd.scope/job_7/step_0/user/task_0"
    groups = {
        "system.slice": second("max", 50 * GB),
        "system.slice/slurmstepd.scope/job_7": second(32 * GB, 2 * GB),
        "system.slice/slurmstepd.scope/job_7/step_0": second(40 * GB, 2 * GB),
        "system.slice/slurmstepd.scope/job_8": second(GB, 0),
        of_step: second("max", GB),
    }
    assert left(lay(tmp_path, f"0::/{of_step}", groups)) == 30 * GB
    assert available(tmp_path) == 30 * GB


def test_the_first_version_has_memory_in_a_tree_of_its_own(tmp_path):
    groups = {
        "memory": first(UNLIMITED, 60 * GB),
        "memory/slurm/uid_5/job_7": first(16 * GB, 4 * GB),
        "memory/slurm/uid_5/job_7/step_0": first(UNLIMITED, 4 * GB),
        "cpu/elsewhere": first(GB),
    }
    listed = "4:memory:/slurm/uid_5/job_7/step_0\n2:cpu,cpuacct:/elsewhere\n1:name=systemd:/\n0::/"
    assert left(lay(tmp_path, listed, groups)) == 12 * GB


@pytest.mark.parametrize(
    ("listed", "groups"),
    [
        ("0::/", {"": second(8 * GB, GB)}),
        ("0::/../elsewhere", {"": second(8 * GB, GB)}),
        ("4:memory:/docker/0123", {"memory": first(8 * GB, GB)}),
        ("4:memory:/\n0::/unified/scope", {"memory": first(8 * GB, GB), "unified/unified/scope": {"cgroup.procs": 1}}),
    ],
    ids=["second", "second, outside of its own names", "first, by the host's name", "both"],
)
def test_a_container_has_what_is_mounted_as_its_own_group(tmp_path, listed, groups):
    assert left(lay(tmp_path, listed, groups)) == 7 * GB


def test_files_that_are_cached_count_as_free(tmp_path):
    read_much = second(8 * GB, 7 * GB, f"anon {GB}\ninactive_file {4 * GB}\nactive_file {2 * GB}")
    assert left(lay(tmp_path / "2", "0::/job", {"job": read_much})) == 7 * GB
    read_much = first(8 * GB, 7 * GB, f"inactive_file 0\ntotal_inactive_file {6 * GB}\ntotal_active_file 0")
    assert left(lay(tmp_path / "1", "3:memory:/job", {"memory/job": read_much})) == 7 * GB


@pytest.mark.parametrize("listed", ["1:name=systemd:/", "0::/", "0::/user.slice\n1:name=systemd:/"])
def test_the_host_alone_counts_where_no_group_has_a_limit(tmp_path, listed):
    assert left(lay(tmp_path, listed, {"user.slice": second("max", GB)})) == float("inf")
    assert available(tmp_path) == 100 * GB // 1024 * 1024


def test_this_machines_own_groups_can_be_read():
    assert 0 < available() <= 10**15
