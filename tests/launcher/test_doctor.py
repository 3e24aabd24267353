"""The doctor through submitit, without SLURM; on nodes of a real one see tests/slurm."""

from pathlib import Path

import pytest

from launcher.__main__ import main

pytestmark = pytest.mark.launch


def test_the_doctor_examines_all_ranks_of_a_job_and_prints_one_report(shards, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    assert main(["doctor", "--cluster", "local", "--shards", str(shards)]) == 0
    said = capsys.readouterr().out
    assert "ranks           2 on 1 hosts" in said and "exchange" in said and "3 shards, the first can be read" in said
    assert "submitit" not in said.partition("\n")[2], "the report alone, after the job's line"
    assert main(["doctor", "--cluster", "local", "--shards", "/nowhere"]) == 1
    assert "FAIL  shards" in capsys.readouterr().out
