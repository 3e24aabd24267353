"""What the jobs of a run say."""

import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from dist_fusion.schema import UserError
from launcher import failure, records

TAIL = 40
"""Lines of a log that are shown of what was said before."""


def newest(run: Path) -> records.Job:
    """The run's last job. Raises UserError if it has had none."""
    jobs = records.jobs_of(run)
    if not jobs:
        near = ", ".join(str(path) for path in records.runs_in(run.parent)) if run.parent.is_dir() else ""
        raise UserError(f"{run} has had no job{f'; there are {near}' if near else ''}")
    return jobs[-1]


def show(run: Path, follow: bool, say: Callable[[str], None]) -> None:
    """Say the end of the log of the run's newest job, and what follows until the job is over."""
    job = newest(run)
    path = Path(job.log)
    said, told_to_wait = 0, False
    while True:
        live = job in records.lives(run, records.queue_of([run])) if follow else False
        if path.exists():
            with path.open(errors="replace") as log:
                say("".join(deque(log, TAIL)) if said == 0 else log.read() if log.seek(said) else "")
                said = log.tell() or said
        elif live and not told_to_wait:
            say(f"job {job.job} waits\n")
            told_to_wait = True
        if not live:
            break
        time.sleep(1)
    reason = failure.read(run)
    if reason:
        say(f"\n{failure.file_of(run)}:\n{reason}\n")
