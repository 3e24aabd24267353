"""What SLURM is asked and told, by its own commands."""

import os
import re
import subprocess
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeVar

from launcher.place import without_slurm

T = TypeVar("T")

LASTING = ("RUNNING", "SUSPENDED")
"""States of a job in which it may start itself again. One that was cancelled, or whose time is up, is COMPLETING while
its tasks still save, and it is over; one that is preempted or has lost a node is started again by SLURM."""


PATIENCE, PAUSE = 120.0, 5.0
"""Seconds in which SLURM is asked again where it did not answer as it should, and between two times."""


class SlurmError(RuntimeError):
    """SLURM refused, or does not answer; the message has its words."""


class SlurmAbsentError(SlurmError):
    """There is no such command here; a container often has none."""


class Queued(NamedTuple):
    """A job that SLURM has not ended yet."""

    state: str
    elapsed: str
    where: str  # its nodes, or why it waits


def queue() -> dict[str, Queued]:
    """This user's jobs that wait or run, by id (`<array>_<task>` in an array)."""
    shown = _say("squeue", "--noheader", "--array", f"--user={os.getuid()}", "--format=%i|%T|%M|%R")
    lines = (line.split("|") for line in shown.splitlines())
    return {job: Queued(state, elapsed, where) for job, state, elapsed, where in lines}


def seconds(elapsed: str) -> int:
    """A length of time as SLURM writes it: [days-][[hours:]minutes:]seconds."""
    days, _, clock = elapsed.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    return int(days or 0) * 86400 + sum(part * 60**place for place, part in enumerate(reversed(parts)))


def this_job(environment: Mapping[str, str] = os.environ) -> str:
    """The number of the job that this process belongs to, `<array>_<task>` in an array; nothing outside of one.

    SLURM_JOB_ID is not it: that of an array's last task is the whole array's.
    """
    if without_slurm(environment):
        return ""
    if "SLURM_ARRAY_JOB_ID" in environment:
        return f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    return environment.get("SLURM_JOB_ID", "")


def job(number: str) -> dict[str, str]:
    """What the controller knows of one job, by its own words (JobState, Requeue, StdOut, …)."""
    return dict(re.findall(r"(\w+)=(\S*)", _say("scontrol", "--oneliner", "show", "job", number)))


def may_requeue(known: dict[str, str]) -> str:
    """Why a job must not start itself again; nothing if it may."""
    if known.get("Requeue") == "0":
        return "this job may not be requeued (sbatch --no-requeue, or the cluster's JobRequeue=0)"
    if known.get("JobState") not in LASTING:
        return f"its state is {known.get('JobState', 'unknown')}"
    return ""


def requeue(number: str) -> None:
    """Start the job again under its number. SLURM ends its tasks at once: this one, too."""
    _say("scontrol", "requeue", number)


def cancel(number: str) -> None:
    """End a job that waits or runs."""
    _say("scancel", number)


def cancel_waiting(array: str) -> None:
    """End those of an array that wait."""
    _say("scancel", "--state=PENDING", array)


def patiently(
    ask: Callable[[str], T], job: str, patience: float = PATIENCE, sleep: Callable[[float], None] = time.sleep
) -> T:
    """What `ask` says of a job, asked again for so many seconds: a controller under load answers nobody for a while.

    Raises SlurmError if it refuses to the end, at once where SLURM has no commands.
    """
    end = time.monotonic() + patience
    while True:
        try:
            return ask(job)
        except SlurmAbsentError:
            raise
        except SlurmError:
            if time.monotonic() + PAUSE > end:
                raise
        sleep(PAUSE)


def _say(*command: str) -> str:
    """The answer of a command. Raises SlurmError."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except FileNotFoundError as error:
        raise SlurmAbsentError(f"{' '.join(command)}: {error}") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SlurmError(f"{' '.join(command)}: {error}") from None
    if done.returncode:
        raise SlurmError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout
