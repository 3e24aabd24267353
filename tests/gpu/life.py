"""Runs of the real command, each in processes of its own."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
SECONDS = 120
RANK_VARIABLES = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}


def start(recipe: Path, overrides: Sequence[str], ranks: int = 1) -> subprocess.Popen:
    """`dist_fusion.train` on so many GPUs, as if nobody had started ranks here."""
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    environment = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    command = [sys.executable, *several, "-m", "dist_fusion.train", str(recipe), *overrides]
    return subprocess.Popen(command, cwd=ROOT, env={**environment, "PYTHONPATH": str(ROOT)})


def finish(*lives: subprocess.Popen) -> list[int]:
    """The exit codes, once all have ended; whoever takes too long is killed."""
    end = time.monotonic() + SECONDS
    try:
        return [life.wait(max(0, end - time.monotonic())) for life in lives]
    finally:
        for life in lives:
            life.kill()


def stop_at(life: subprocess.Popen, run: Path, step: int) -> int:
    """Signal the first rank of a run once it has logged `step`; returns the exit code."""
    end = time.monotonic() + SECONDS
    while not (run / "metrics.jsonl").exists() or len(lines(run)) < step:
        assert life.poll() is None, "the run ended early"
        assert time.monotonic() < end, f"the run did not come to step {step} in {SECONDS} seconds"
        time.sleep(0.01)
    os.kill(int((run / "logs" / "rank-0.pid").read_text()), signal.SIGUSR2)
    return finish(life)[0]


def lines(run: Path) -> list[dict[str, float]]:
    """What a run has logged so far, whole lines only."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines(True) if line.endswith("}\n")]


def column(run: Path, key: str) -> list[float]:
    """One figure of every step."""
    return [line[key] for line in lines(run)]
