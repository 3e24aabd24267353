"""Which jobs a run has had: a line each in its folder, beside what they log."""

import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from dist_fusion.monitor.events import Event, read_events
from dist_fusion.status import TURNS
from launcher import failure, slurm

OVER = ("new", "finished", "failed", "ended")
"""States of a run without a job; those of a job that waits or runs are SLURM's."""


class Job(NamedTuple):
    """A job of a run."""

    job: str  # its number at SLURM (`<array>_<task>` in an array), or of the process that holds it
    cluster: str  # slurm, local, debug
    log: str  # of rank 0
    time: str  # when it was submitted, or first seen
    by_hand: bool = False  # sbatch was called by hand: all of its array are of this run


def note(run: Path, job: str, cluster: str, log: str, by_hand: bool = False) -> None:
    """Write down a job of `run`."""
    entry = Job(job, cluster, log, datetime.now(UTC).isoformat(timespec="seconds"), by_hand)
    path = _file_of(run)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(f"{json.dumps(entry._asdict())}\n")


def note_this_job(run: Path, environment: Mapping[str, str] = os.environ) -> None:
    """Write down the job of SLURM that this task belongs to, if nobody has: it was submitted by hand."""
    number = slurm.this_job(environment)
    if not number or number in [job.job for job in jobs_of(run)]:
        return
    try:
        log = slurm.patiently(slurm.job, number)["StdOut"]
    except slurm.SlurmError:  # a container often has none of SLURM's commands; the training needs none
        log = ""
    note(run, number, "slurm", log, by_hand=True)


def jobs_of(run: Path) -> list[Job]:
    """The jobs of a run, oldest first."""
    path = _file_of(run)
    lines = path.read_text().splitlines() if path.exists() else []
    return [Job(**json.loads(line)) for line in lines]


def runs_in(runs: Path) -> Iterator[Path]:
    """The runs in a folder that have had a job."""
    for path in sorted(runs.rglob("jobs.jsonl")):
        yield path.parents[1]


def queue_of(runs: Iterable[Path]) -> dict[str, slurm.Queued]:
    """What SLURM still has of these runs' jobs, by id; it is not asked where none of them is one of its own."""
    ours = [job.job for run in runs for job in jobs_of(run) if job.cluster == "slurm"]
    queued = slurm.queue() if ours else {}
    return {job: queued[job] for job in ours if job in queued}


def state(run: Path, job: Job, queued: Mapping[str, slurm.Queued]) -> slurm.Queued:
    """How a job stands: as SLURM says while it waits or runs, then by what it left in the folder of its run."""
    if job.job in queued:
        return queued[job.job]
    if job.cluster == "local" and _alive(job.job):
        return slurm.Queued("RUNNING", "", "this host")
    if (run / "model.safetensors").exists():
        return slurm.Queued("finished", "", "")
    reason = failure.read(run).splitlines()
    if reason:
        return slurm.Queued("failed", "", reason[-1])
    see = f"; see {job.log}" if job.log else ""
    turn = last_turn(run)
    if turn and turn.kind == "stopped":
        return slurm.Queued("ended", "", "saved, to be continued")
    if turn is None or turn.time < datetime.fromisoformat(job.time).timestamp():
        return slurm.Queued("failed", "", f"ended before it trained{see}")
    error = str(turn.details.get("error", "")).splitlines() if turn.kind == "failed" else []
    return slurm.Queued("failed", "", error[-1] if error else f"ended without a word{see}")


def last_turn(run: Path) -> Event | None:
    """What a run's diary says last of whether it is alive."""
    return next((event for event in reversed(read_events(run)) if event.kind in TURNS), None)


def trains(run: Path, job: Job, queued: Mapping[str, slurm.Queued]) -> bool:
    """Whether a job's life has come so far that it hears when it is told to stop.

    What it left in its folder in an earlier life, before it was put back into the queue, says nothing of this one.
    """
    now = state(run, job, queued)
    turn = last_turn(run)
    if now.state == "PENDING" or turn is None or turn.kind != "started":
        return False
    return not now.elapsed or turn.time > time.time() - slurm.seconds(now.elapsed) - 1


def lives(run: Path, queued: Mapping[str, slurm.Queued]) -> list[Job]:
    """The jobs of a run that wait or run."""
    return [job for job in jobs_of(run) if job.job in queued or state(run, job, {}).state == "RUNNING"]


def chain_of(run: Path) -> str:
    """The array whose elements that wait go on from one another in this run; nothing if there is none.

    By sbatch --array=1-30%1: those of a sweep belong to other runs, and so may those of an array without %1. SLURM is
    asked. Raises SlurmError.
    """
    jobs = jobs_of(run)
    array, _, element = jobs[-1].job.partition("_") if jobs and jobs[-1].by_hand else ("", "", "")
    waiting = [job for job, now in slurm.queue().items() if job.startswith(f"{array}_") and now.state == "PENDING"]
    return array if element and waiting and slurm.job(waiting[0]).get("ArrayTaskThrottle") == "1" else ""


def unknown(run: Path) -> list[str]:
    """This user's jobs at SLURM of which no run beside `run` has heard yet. Raises SlurmError."""
    known = {job.job for other in {run, *runs_in(run.parent)} for job in jobs_of(other)}
    return [job for job in slurm.queue() if job not in known]


def _file_of(run: Path) -> Path:
    return run / "logs" / "jobs.jsonl"


def _alive(process: str) -> bool:
    """Whether a process is one of submitit's that holds a local job."""
    try:
        return b"submitit" in Path("/proc", process, "cmdline").read_bytes()
    except OSError:
        return False
