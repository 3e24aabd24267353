"""What the jobs of a run say."""

import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from dist_fusion.schema import UserError
from launcher import failure, records, slurm

TAIL = 40
"""Lines of a log that are shown of what was said before."""


def newest(run: Path) -> records.Job:
    """The run's last job. Raises UserError if it has had none."""
    jobs = records.jobs_of(run)
    if not jobs:
        near = ", ".join(str(path) for path in records.runs_in(run.parent)) if run.parent.is_dir() else ""
        raise UserError(f"{run} has had no job{f'; there are {near}' if near else ''}")
    return jobs[-1]


def show(run: Path, follow: bool, say: Callable[[str], None], seconds: float = 5.0) -> None:
    """Say the end of the log of the run's newest job; with `follow` also what comes, until no job of the run is left.

    SLURM is asked every so many `seconds`. Raises UserError if the run has no job, and with `follow` will have none.
    """
    shown, awaited = 0, False
    while True:
        jobs = records.jobs_of(run)
        if len(jobs) > shown:
            shown, awaited = len(jobs), False
            _tell(run, jobs[-1], follow, say, seconds)
            continue
        others = _may_come(run, jobs, awaited) if follow else []
        if not others:
            break
        if not awaited:
            say(
                f"{run} has no job that runs. If its next is among those of yours that were not seen here yet "
                f"({', '.join(others)}; squeue --me shows them), its log follows; Ctrl-C ends this\n"
            )
        awaited = True
        time.sleep(seconds)
    newest(run)


def _may_come(run: Path, jobs: list[records.Job], awaited: bool) -> list[str]:
    """Jobs that may be the run's next: sbatch tells nobody which run it is called for, until the job begins."""
    if (run / "model.safetensors").exists() or (jobs and not jobs[-1].by_hand):
        return []
    try:
        return records.unknown(run)
    except slurm.SlurmError:
        return ["…"] if awaited else []


def _tell(run: Path, job: records.Job, follow: bool, say: Callable[[str], None], seconds: float) -> None:
    """Say the end of a job's log, with `follow` what comes until it is over, and why the run has failed, if it has."""
    path = Path(job.log)
    said, told_to_wait, live, looked = 0, False, follow, 0.0
    if not job.log:
        say(
            f"the log of job {job.job} is not known here, since SLURM's commands were not there. It is the file that "
            "sbatch's --output names: NAME-NUMBER.log in the folder where sbatch was called, by the scripts in slurm/\n"
        )
    while True:
        if live and time.monotonic() - looked >= seconds:
            try:
                live = job in records.lives(run, records.queue_of([run]))
            except slurm.SlurmError:
                if not looked:
                    raise
            looked = time.monotonic()
        if path.is_file():
            with path.open(errors="replace") as log:
                say("".join(deque(log, TAIL)) if said == 0 else log.read() if log.seek(said) else "")
                said = log.tell() or said
        elif live and job.log and not told_to_wait:
            say(f"job {job.job} waits\n")
            told_to_wait = True
        if not live:
            break
        time.sleep(min(1.0, seconds))
    reason = failure.read(run)
    if reason:
        say(f"\n{failure.file_of(run)}:\n{reason}\n")
