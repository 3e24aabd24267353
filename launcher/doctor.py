"""The doctor on every node of a job: what it finds there, in one report."""

import io
import os
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from submitit.core.utils import FailedJobError, UncompletedJobError

from dist_fusion import doctor
from dist_fusion.doctor import report
from dist_fusion.doctor.lines import FAIL, Line
from launcher import caches, slurm
from launcher.life import FAILED
from launcher.meeting import meet
from launcher.place import of_task
from launcher.profile import Profile

POLL = 5.0
"""Seconds between two looks into SLURM's queue."""
SILENCE = 600.0
"""Seconds that SLURM may leave without an answer while a job waits or runs."""
LATE = 15.0
"""Seconds by which a shared disk may show an answer after the job is over."""
TAIL = 4000
"""Characters of its log that are shown of a job that has ended without a report."""


def here(words: Sequence[str]) -> int:
    """Examine this host, or as a task of srun or submitit, with the other ranks of its job, all of theirs."""
    place = of_task()
    if place is None or place.ranks == 1:
        return doctor.main(words)
    os.environ.update(caches.folders())
    meeting = meet(place)
    os.environ.update(place.variables(meeting.port))
    return doctor.main(words)


@dataclass(frozen=True)
class Examination:
    """The doctor as a job of submitit's; called on every rank, it returns the exit code and what was said."""

    words: tuple[str, ...]

    def __call__(self) -> tuple[int, str]:
        """Examine with all ranks of the job."""
        said = io.StringIO()
        with redirect_stdout(said), redirect_stderr(said):
            code = here(self.words)
        return code, said.getvalue()


def on_nodes(words: Sequence[str], profile: Profile, folder: Path, say: Callable[[str], None]) -> int:
    """Examine the nodes that SLURM gives to a job of this profile, and say what is found; returns the exit code.

    Raises UserError if the profile is refused.
    """
    job = profile.executor(folder).submit(Examination(tuple(words)))
    say(f"job {job.job_id}, log {job.paths.stdout}; it may wait\n")
    first = job.task(0)  # it says what all ranks have found
    if profile.cluster == "slurm" and not answered(first.job_id, first.paths.result_pickle):
        return _silent(first.paths.stdout, say)
    try:
        code, said = first.result()
    except (FailedJobError, UncompletedJobError):
        return _silent(first.paths.stdout, say)
    say(said)
    return int(code)


def answered(job: str, answer: Path) -> bool:
    """Wait until the file `answer` is there, or SLURM no longer has the job; returns whether it is.

    submitit asks sacct alone, which knows nothing where SLURM keeps no accounts: it would wait for ever for a job whose
    Python has not started. Raises SlurmError if SLURM does not answer for long.
    """
    heard = time.monotonic()
    while not _listed(answer):
        try:
            if job not in slurm.queue():
                break
            heard = time.monotonic()
        except slurm.SlurmError:  # a busy controller lets a question go by now and then
            if time.monotonic() - heard > SILENCE:
                raise
        time.sleep(POLL)
    end = time.monotonic() + LATE
    while not (there := _listed(answer)) and time.monotonic() < end:
        time.sleep(0.1)
    return there


def _listed(path: Path) -> bool:
    """Whether a file of another node is there: a folder that is read is asked for anew, a path may be remembered."""
    return path.parent.is_dir() and path in path.parent.iterdir()


def _silent(log: Path, say: Callable[[str], None]) -> int:
    ending = log.read_text(errors="replace")[-TAIL:].strip() if log.exists() else ""
    said = f"the job has ended without a report; {'the end of' if ending else 'nothing is in'} its log, {log}"
    remedy = "see that this folder, its Python and the log's folder (--logs) are on all nodes, and what SLURM says"
    line = Line(FAIL, f"{said}:\n{ending}" if ending else said, remedy)
    say(report.as_text([{"job": [line]}], [report.Seat(0, "")], colours=False))
    return FAILED
