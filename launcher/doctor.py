"""The doctor on every node of a job: what it finds there, in one report."""

import io
import os
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from submitit.core.utils import FailedJobError, UncompletedJobError

from dist_fusion import doctor
from launcher import caches
from launcher.life import FAILED
from launcher.meeting import meet
from launcher.place import of_task
from launcher.profile import Profile

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
    try:
        code, said = job.results()[0]
    except (FailedJobError, UncompletedJobError):
        log = job.paths.stdout
        ending = log.read_text(errors="replace")[-TAIL:] if log.exists() else "there is no log"
        say(f"the job has ended without a report. The end of its log:\n{ending}\n")
        return FAILED
    say(said)
    return int(code)
