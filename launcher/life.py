"""One life of one rank: from its start on a node to the moment when the job may be started again."""

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from io import TextIOBase
from itertools import takewhile
from pathlib import Path
from types import FrameType
from typing import TextIO

from dist_fusion.monitor.events import read_events, record
from dist_fusion.schema import UserError
from launcher import caches, failure, records, slurm
from launcher.meeting import LIMIT, meet
from launcher.place import Place, of_task

DONE, FAILED, MISTAKE, CONTINUE = 0, 1, 2, 75
"""Exit codes, as train.main returns them: what is here must not wait until that is loaded."""
WARNINGS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""A job that is preempted hears SIGTERM at once, and again when its grace is over."""
NO_TEAR_DOWN = ("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
"""By default NCCL's watchdog in torch takes a rank down a minute after another one's node has died. SLURM notices that
only after SlurmdTimeout (300 s), and until then a rank that goes ends the job for good, where SLURM would start it
again. So no rank is taken down but by torch's monitor of that watchdog, eight minutes after, and by the run's own watch
(health.hang_minutes). By torch's sources: it was not tried with NCCL on several nodes."""
TRIES = 3
"""Lives in a row that are warned before they train: a job whose time is too short would start itself for ever."""
RETURNING = 120.0
"""Seconds that rank 0 gives the others to return, once all have saved."""


def work(recipe: str, overrides: Sequence[str], requeue: bool) -> int:
    """The task that srun starts on every rank; returns its exit code.

    When all ranks have saved and returned, rank 0 starts the job again, unless it must not: then its code is 75. The
    others end with 0 before, since srun ends a step with the first task that does not. Raises UserError if this is no
    such task.
    """
    place = of_task()
    if place is None:
        raise UserError("worker is a task of srun, see slurm/pretrain.sh; without SLURM it is dist-fusion train")

    run: Path | None = None

    def warned_early(number: int, frame: FrameType | None) -> None:
        _hear_nothing()  # SLURM says it again, and by SIGTERM when the job is put back into the queue
        # SIGTERM is no sign of a time that is too short: SLURM preempts or cancels.
        vain = "" if number == signal.SIGTERM else in_vain(run)
        os._exit(give_up(run, place, vain) if run and vain else start_again(run, requeue, "nothing was trained yet"))

    # Until the training listens there is nothing to save, and so nobody to wait for.
    for number in WARNINGS:
        signal.signal(number, signal.SIG_IGN if place.rank else warned_early)
    try:
        run = folder(recipe, overrides)
        code = live(recipe, overrides, place, returned=_hear_nothing)
    except UserError:
        raise
    except Exception:
        traceback.print_exc()
        return FAILED
    if code != CONTINUE:
        return code
    return DONE if place.rank else start_again(run, requeue)


def _hear_nothing() -> None:
    """Warnings are over: what they ask for is being done."""
    for number in WARNINGS:
        signal.signal(number, signal.SIG_IGN)


def folder(recipe: str, overrides: Sequence[str]) -> Path:
    """The run's. Raises UserError for a recipe that cannot be."""
    from dist_fusion.config import load

    config = load(recipe, overrides)
    return Path(config.runs) / config.name


def live(recipe: str, overrides: Sequence[str], place: Place, returned: Callable[[], None] = lambda: None) -> int:
    """Train as one of the ranks; returns `train.main`'s exit code.

    With code 75 every rank has returned by then, as far as rank 0 is concerned: all is on disk, and the job may be
    ended and started again. A failure is written down, and raised. `returned` is called as soon as this rank's training
    hears no signals any more.
    """
    from dist_fusion import train

    run = folder(recipe, overrides)
    if slurm.this_job():
        os.environ.setdefault(*NO_TEAR_DOWN)
    os.environ.update(caches.folders())
    with caches.hold_builds(Path(os.environ["TORCH_EXTENSIONS_DIR"])):
        meeting = meet(place)
        os.environ.update(place.variables(meeting.port))
        if place.rank == 0:
            failure.forget(run)
            records.note_this_job(run)
        meeting.tell("here")
        if not meeting.all_told("here", LIMIT):
            raise TimeoutError(f"not all of the {place.ranks} ranks of job {place.life} came in {LIMIT:.0f} s")
        said = Heard(sys.stderr)
        try:
            with redirect_stderr(said):
                try:
                    code = train.main([recipe, *overrides])
                finally:
                    returned()
        except Exception as error:
            if place.ranks > 1 and failure.of_others(error):
                failure.outlast(run, place, str(error))
            failure.write(run, place, traceback.format_exc())
            raise
        ended = code in (FAILED, MISTAKE)
        if ended and place.local_rank == 0:
            failure.write(run, place, said.last)
        meeting.tell("returned")
        if ended or (code == CONTINUE and place.rank == 0):
            meeting.all_told("returned", RETURNING)
        return code


class Heard(TextIOBase):
    """A stream that passes on what is said and keeps the last of it."""

    def __init__(self, stream: TextIO):
        self._stream, self.last = stream, ""

    def write(self, text: str) -> int:
        """Pass `text` on."""
        self.last = text.strip() or self.last
        return self._stream.write(text)

    def flush(self) -> None:
        """Flush what is behind."""
        self._stream.flush()

    def fileno(self) -> int:
        """Of what is behind: a crash is written there."""
        return self._stream.fileno()


def start_again(run: Path | None, requeue: bool, so_far: str = "all is saved") -> int:
    """Put the job back into the queue, by which it ends here; returns 75, "start me again", if that cannot be."""
    why = once_more(run) if requeue else "told not to (--no-requeue)"
    if not why:
        try:
            say(f"{so_far}; back into the queue")
            slurm.patiently(slurm.requeue, slurm.this_job())
            time.sleep(60)  # SLURM ends this task at any moment
        except slurm.SlurmError as error:
            why = str(error)
    if why:
        say(f"{so_far}; the job does not start itself again: {why}")
    return CONTINUE


def give_up(run: Path, place: Place, why: str) -> int:
    """Leave the reason why the job is not to start again; returns 1."""
    say(f"nothing was trained yet; the job is given up: {why}")
    failure.write(run, place, why)
    return FAILED


def in_vain(run: Path | None) -> str:
    """Why a job that is warned before it trains should be given up; nothing if it may try again."""
    if run is None:
        return ""
    events = read_events(run)
    before = [*takewhile(lambda event: event.kind == "warned early", reversed(events))]
    run.mkdir(parents=True, exist_ok=True)
    record(run, "warned early", events[-1].step if events else 0, {"job": slurm.this_job()})
    if len(before) < TRIES - 1:
        return ""
    return f"it was warned {TRIES} times before it could train; --time must be much more than what --signal says"


def once_more(run: Path | None) -> str:
    """Why a job that was told to stop should not go on by itself; nothing if it should."""
    if run and (run / "STOP").exists():
        return f"{run / 'STOP'} stopped it"
    job = slurm.this_job()
    try:
        return slurm.may_requeue(slurm.patiently(slurm.job, job)) if job else ""
    except slurm.SlurmError as error:
        return str(error)


def say(text: str) -> None:
    """One line in the job's log, there at once."""
    sys.stdout.write(f"launcher: {text}\n")
    sys.stdout.flush()
