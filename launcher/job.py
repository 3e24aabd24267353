"""What submitit runs on every rank, and how it hands a saved run back to submitit."""

import atexit
import os
import signal
import sys
from dataclasses import dataclass

from submitit import JobEnvironment
from submitit.helpers import DelayedSubmission

from launcher import failure
from launcher.life import CONTINUE, DONE, FAILED, folder, live, once_more, say
from launcher.place import of_task


@dataclass(frozen=True)
class Training:
    """A run as a job of submitit's; called on every rank, it returns the exit code (0, or 75: saved, to be continued).

    submitit's own hook for signals acts at once and on rank 0 alone, while all ranks are needed to save. So the
    training listens in its place; when all have saved and returned, rank 0 calls the hook, which requeues the job.
    """

    recipe: str
    overrides: tuple[str, ...] = ()

    def __call__(self) -> int:
        """Train; raises RuntimeError with the reason where that failed."""
        place = of_task()
        assert place, "submitit has told this task its place"
        try:
            code, run = live(self.recipe, self.overrides, place), folder(self.recipe, self.overrides)
            if code not in (DONE, CONTINUE):
                raise RuntimeError(failure.read(run))
        except Exception:
            atexit.register(_end_at_once, FAILED)
            raise
        if code == CONTINUE and place.rank == 0:
            self._hand_back(once_more(run))
        atexit.register(_end_at_once, DONE)
        return code

    def _hand_back(self, why_not: str) -> None:
        number = signal.Signals[f"SIG{JobEnvironment.USR_SIG}"]
        if why_not:
            say(f"all is saved; the job does not start itself again: {why_not}")
        elif signal.getsignal(number) is not signal.SIG_DFL:  # within this process submitit hears nothing
            say("all is saved; back to submitit")
            signal.raise_signal(number)

    def checkpoint(self) -> DelayedSubmission:
        """What goes on after this job: the same, since all it needs is in the run's folder."""
        return DelayedSubmission(self)


def _end_at_once(code: int) -> None:
    """Threads of libraries may abort a rank that has ended well, or keep one that has failed from its end."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
