"""The doctor through submitit, without SLURM; on nodes of a real one see tests/slurm."""

import os
import threading
from pathlib import Path

import pytest
from submitit.local.local import LocalJob

from launcher import doctor, slurm
from launcher.__main__ import main

pytestmark = pytest.mark.launch
COMMANDS = {
    "srun": "exit 1",
    "sbatch": """
log=$(sed -n 's/^#SBATCH --output=//p' "$1" | sed 's/%j/7/g; s/%t/0/g')
mkdir -p "$(dirname "$log")"
echo "srun: error: node3: task 0: python: No such file or directory" >"$log"
echo "Submitted batch job 7"
""",
    "squeue": """
echo looked >>looks
[[ $(wc -l <looks) -eq 2 ]] && { echo "squeue: error: Socket timed out" >&2; exit 1; }
[[ $(wc -l <looks) -le 3 ]] && echo "7|RUNNING|0:01|node3"
exit 0
""",
    "sacct": "echo Slurm accounting storage is disabled >&2; exit 1",
}
"""Those of a SLURM without accounting whose job 7 ends before its Python has started."""


@pytest.fixture
def without_accounting(tmp_path, monkeypatch):
    for name, script in COMMANDS.items():
        command = tmp_path / "bin" / name
        command.parent.mkdir(exist_ok=True)
        command.write_text(f"#!/usr/bin/env bash\n{script}\n")
        command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    for name in ("POLL", "LATE"):
        monkeypatch.setattr(doctor, name, 0.1)


def test_a_job_whose_python_does_not_start_is_a_red_line_where_slurm_keeps_no_accounts(without_accounting, capsys):
    Path("nodes.yaml").write_text("cluster: slurm\nnodes: 2\ntasks_per_node: 2\ntimeout_min: 10\n")
    assert main(["doctor", "--cluster", "nodes.yaml"]) == 1
    said = capsys.readouterr().out
    assert "FAIL  job             the job has ended without a report" in said
    assert f"{Path.cwd()}/runs/doctor/7/7_0_log.out" in said and "node3: task 0: python: No such file" in said
    assert len(Path("looks").read_text().split()) == 4, "an answer that is left out is no end of the job"


def test_an_answer_that_shows_after_the_job_is_over_is_awaited(without_accounting, tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "LATE", 30.0)
    answer = tmp_path / "shows" / "answer.pkl"
    late = threading.Timer(1.0, lambda: (answer.parent.mkdir(), answer.touch()))
    late.start()
    assert doctor.answered("8", answer)
    late.join()


def test_a_slurm_that_never_answers_is_not_asked_for_ever(without_accounting, tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "SILENCE", 0.5)
    (tmp_path / "bin" / "squeue").write_text("#!/bin/sh\nexit 1\n")
    with pytest.raises(slurm.SlurmError, match="squeue"):
        doctor.answered("7", tmp_path / "answer.pkl")


def test_a_local_job_whose_python_does_not_start_is_a_red_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(LocalJob, "_results_timeout_s", 1)
    assert main(["doctor", "--cluster", "local", "--with", "local_python=/bin/false"]) == 1
    said = capsys.readouterr().out
    assert "FAIL  job " in said and f"nothing is in its log, {tmp_path}/runs/doctor/" in said


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
