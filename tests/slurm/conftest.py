"""One cluster and one undisturbed run, shared by all that is tried on SLURM."""

import json
import os
import sys
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, lacking, wait_for

ROOT = Path(__file__).parents[2]
STEPS = 120
ON_TWO_NODES = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1", "--mem=2G", "--time=30")


@pytest.fixture(scope="session")
def cluster():
    reason = lacking()
    if reason:
        pytest.skip(reason)
    cluster = Cluster()
    shared = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
    cluster.environment = {**cluster.environment, **shared}
    yield cluster
    cluster.stop()


@pytest.fixture(autouse=True)
def no_job_is_left(cluster):
    yield
    cluster.call("scancel", f"--user={os.getuid()}")
    wait_for(lambda: not cluster.call("squeue", "--noheader"), 30)


@pytest.fixture(scope="session")
def recipe(shards, tmp_path_factory) -> Path:
    """A small student without a teacher, with dropout and a loader's worker, that saves now and then."""
    path = tmp_path_factory.mktemp("slurm") / "small.yaml"
    path.write_text(
        f"""
name: small
runs: {path.parent}/runs
steps: {STEPS}
global_batch: 8
tasks: {{mlm: , itm: {{block: 4}}, itc: {{dimensions: 8}}}}
model: {{width: 16, num_heads: 2, num_layers: 2, num_fusion_layers: 2, image_size: 32, patch_size: 16, dropout: 0.3}}
data: {{shards: [{shards}], vocabulary: {shards}/vocab.txt, shuffle_buffer: 10, num_workers: 1}}
optimizer: {{learning_rate: 1e-3}}
log_every: 1
save_every: 20
"""
    )
    return path


@pytest.fixture
def runs(recipe) -> Path:
    return recipe.parent / "runs"


@pytest.fixture(scope="session")
def undisturbed(cluster, recipe) -> list[tuple[int, float]]:
    """The losses of `sbatch slurm/pretrain.sh` on two nodes, from its beginning to its end."""
    job = sbatch(cluster, recipe, "name=undisturbed")
    done = cluster.wait(job)
    log = (recipe.parent / f"pretrain-{job}.log").read_text()
    assert (done["JobState"], done["Restarts"]) == ("COMPLETED", "0"), log
    return losses(recipe.parent / "runs" / "undisturbed")


def sbatch(cluster: Cluster, recipe: Path, *overrides: str, options: tuple[str, ...] = ()) -> str:
    """Submit slurm/pretrain.sh in the recipe's folder; returns the job's number."""
    command = ["sbatch", "--parsable", *ON_TWO_NODES, *options, str(ROOT / "slurm" / "pretrain.sh"), str(recipe)]
    return cluster.call(*command, *overrides, cwd=recipe.parent)


def losses(run: Path) -> list[tuple[int, float]]:
    """Step and loss of every line that a run has logged."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [(line["step"], line["loss/total"]) for line in map(json.loads, lines)]


def reaches(run: Path, step: int) -> None:
    """Wait until a run has logged `step`."""
    wait_for(lambda: len(losses(run)) >= step, 300)
