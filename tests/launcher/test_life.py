"""A task that is told to stop before it trains, as srun would start it, where SLURM has no commands."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dist_fusion.monitor.events import read_events, record
from launcher import failure, life

pytestmark = pytest.mark.launch
TASK = {
    "SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_JOB_ID": "7",
    "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_STEP_ID": "0",
}  # fmt: skip


@pytest.mark.parametrize(
    ("number", "code", "events"), [(signal.SIGTERM, life.CONTINUE, 2), (signal.SIGUSR2, life.FAILED, 3)]
)
def test_a_preemption_before_it_trains_ends_no_job_for_good_but_a_third_warning_does(
    tmp_path, shards, number, code, events
):
    recipe, run, data = tmp_path / "small.yaml", tmp_path / "runs" / "small", f"{{shards: [{shards}]}}"
    recipe.write_text(
        f"name: small\nruns: {tmp_path}/runs\nsteps: 2\nglobal_batch: 4\ntasks: {{itc: }}\ndata: {data}\n"
    )
    run.mkdir(parents=True)
    for _ in range(life.TRIES - 1):
        record(run, "warned early", 0, {"job": "7"})
    environment = {**os.environ, **TASK, "PATH": "/nowhere", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-m", "launcher", "worker", str(recipe)]
    rank = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    end = time.monotonic() + 120
    while not (run / "logs" / "jobs.jsonl").exists():  # it waits for the other rank, which never comes
        assert rank.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    rank.send_signal(number)
    said = rank.communicate(timeout=60)[0]
    assert rank.returncode == code, said
    assert len(read_events(run)) == events
    assert ("--time must be much more" in failure.read(run)) == (code == life.FAILED)
