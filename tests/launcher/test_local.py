"""submitit without SLURM: two ranks of this machine, one of them told to stop."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from launcher import records
from launcher.__main__ import main

pytestmark = pytest.mark.launch


def test_a_local_job_that_is_warned_saves_on_all_ranks_and_goes_on_through_submitit(
    shards, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    recipe = tmp_path / "small.yaml"
    recipe.write_text(
        "name: small\nsteps: 150\nglobal_batch: 8\nlog_every: 1\ntasks: {itm: {block: 4}}\n"
        "model: {width: 16, num_heads: 2, num_layers: 2, num_fusion_layers: 2, image_size: 32, patch_size: 16}\n"
        f"data: {{shards: [{shards}], vocabulary: {shards}/vocab.txt}}\n"
    )
    run = tmp_path / "runs" / "small"
    assert main(["submit", str(recipe), "--cluster", "local"]) == 0
    (job,) = records.jobs_of(Path("runs/small"))
    try:
        wait_for(lambda: (run / "metrics.jsonl").exists() and len(steps(run)) > 20)
        assert main(["submit", str(recipe), "--cluster", "local"]) == 2
        assert f"has a job already: {job.job}" in capsys.readouterr().err
        os.kill(int((run / "logs" / "rank-1.pid").read_text()), signal.SIGUSR2)
        wait_for(lambda: (run / "model.safetensors").exists())
        assert steps(run) == list(range(1, 151))
        assert "back to submitit" in Path(job.log).read_text()
        wait_for(lambda: not records.lives(run, {}))
        assert main(["jobs"]) == 0
        assert "finished" in capsys.readouterr().out
    finally:
        if records.lives(run, {}):
            os.kill(int(job.job), signal.SIGTERM)


def steps(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def wait_for(condition) -> None:
    end = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < end, "nothing happened for four minutes"
        time.sleep(0.1)
