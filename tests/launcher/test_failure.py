"""The one file that says why a run has failed."""

import subprocess
import sys

import pytest
import torch

from launcher import failure
from launcher.place import Place

PLACE = Place(3, 4, 1, 2, "node1", "7.0.0")
OUTLAST = """
import sys
from pathlib import Path
from launcher import failure
from launcher.place import Place
failure.outlast(Path(sys.argv[1]), Place(0, 2, 0, 1, "node1", "7.0.0"), "Connection closed by peer")
"""


def test_the_first_rank_that_fails_gives_the_reason(tmp_path):
    failure.write(tmp_path, PLACE, "the disk is full")
    failure.write(tmp_path, PLACE._replace(rank=0), "another rank has gone")
    text = failure.file_of(tmp_path).read_text()
    assert "rank 3 of 4" in text and "job 7.0.0" in text
    assert failure.read(tmp_path) == "the disk is full"
    failure.forget(tmp_path)
    assert failure.read(tmp_path) == ""


@pytest.mark.parametrize(
    ("error", "others"),
    [
        (torch.distributed.DistBackendError("NCCL error: remote process exited or there was a network error"), True),
        (RuntimeError("[pair.cc:547] Connection closed by peer [127.0.0.2]:3"), True),
        (ConnectionResetError(), True),
        (torch.OutOfMemoryError("CUDA out of memory"), False),
        (ValueError("shapes"), False),
    ],
)
def test_a_rank_that_lost_the_others_is_told_from_one_that_failed(error, others):
    assert failure.of_others(error) == others


def test_what_a_rank_suspects_gives_way_to_what_another_knows(tmp_path):
    """It is left at once, since this rank may be killed any moment, and waits then."""
    command = [sys.executable, "-c", OUTLAST, str(tmp_path)]
    waiting = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert "waits for SLURM" in waiting.stderr.readline()
    assert "Another rank was killed without a word" in failure.read(tmp_path)
    assert "Connection closed by peer" in failure.read(tmp_path)
    waiting.kill()
    waiting.wait()
    failure.write(tmp_path, PLACE, "the disk is full")
    failure.write(tmp_path, PLACE._replace(rank=1), "a rank was killed", suspected=True)
    failure.write(tmp_path, PLACE._replace(rank=2), "the disk is full here, too")
    assert failure.read(tmp_path) == "the disk is full"
    assert [path.name for path in failure.file_of(tmp_path).parent.iterdir()] == ["failure.txt"]
