"""Where a task stands, by what SLURM and submitit say."""

from hypothesis import given
from hypothesis import strategies as st

from launcher.place import Place, first_host, of_task, tasks_of_node
from launcher.slurm import this_job

TASK = {
    "SLURM_PROCID": "9",
    "SLURM_NTASKS": "16",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
    "SLURM_STEP_NODELIST": "gpu[03-04]",
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
}


def test_a_task_of_srun_knows_its_rank_its_node_and_where_rank_0_is():
    place = of_task(TASK)
    assert place == Place(9, 16, 1, 8, "gpu03", "7.0.0")
    assert place.variables(4321) == {
        "RANK": "9",
        "WORLD_SIZE": "16",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "8",
        "MASTER_ADDR": "gpu03",
        "MASTER_PORT": "4321",
    }


def test_another_life_of_a_job_and_another_step_have_other_names():
    lives = {of_task({**TASK, "SLURM_RESTART_COUNT": "2"}).life, of_task({**TASK, "SLURM_STEP_ID": "3"}).life}
    assert lives == {"7.0.2", "7.3.0"}


def test_a_batch_shell_and_any_other_process_have_no_place():
    shell = {name: value for name, value in TASK.items() if "STEP" not in name}
    assert of_task(shell) is None
    assert of_task({}) is None


def test_a_local_job_of_submitit_has_a_place_too():
    local = {"SUBMITIT_LOCAL_JOB_ID": "5", "SUBMITIT_LOCAL_GLOBALID": "1", "SUBMITIT_LOCAL_NTASKS": "2"}
    assert of_task(local) == Place(1, 2, 1, 2, "127.0.0.1", "local.5")


def test_a_local_job_from_a_shell_within_a_job_of_slurm_is_no_task_of_that():
    local = {"SUBMITIT_LOCAL_JOB_ID": "5", "SUBMITIT_LOCAL_GLOBALID": "1", "SUBMITIT_LOCAL_NTASKS": "2"}
    within = {**TASK, **local, "SUBMITIT_EXECUTOR": "local"}
    assert of_task(within) == Place(1, 2, 1, 2, "127.0.0.1", "local.5")
    assert this_job(within) == ""
    assert of_task({**within, "SUBMITIT_EXECUTOR": "slurm"}) == of_task(TASK), (
        "a job of SLURM that a local one submitted"
    )


@given(st.integers(0, 20), st.integers(1, 30), st.sampled_from(["", "n", "rack1-", "a.b"]), st.booleans())
def test_the_first_host_of_a_list_is_found(low, count, prefix, more):
    first, last = f"{prefix}x{low:03d}", low + count
    nodes = f"{prefix}x[{low:03d}-{last:03d},999]" + (",other[1-2]" if more else "")
    assert first_host(nodes) == first


def test_lists_with_several_brackets_or_none_begin_with_their_first_host():
    assert first_host("rack[1-2]n[04,07-09],login") == "rack1n04"
    assert first_host("node1,node2") == "node1"
    assert first_host("127.0.0.1") == "127.0.0.1"


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 5)), min_size=1))
def test_the_tasks_of_each_node_are_read(groups):
    text = ",".join(f"{count}(x{times})" if times > 1 else str(count) for count, times in groups)
    expected = [count for count, times in groups for _ in range(times)]
    assert [tasks_of_node(text, node) for node in range(len(expected))] == expected
