"""Stop when told to, at a step's end, on all ranks.

SLURM warns every process, a person signals one worker or touches a file, but a ZeRO checkpoint needs every rank at the
same step. So a handler only raises a flag; the loop asks all ranks at the end of each step. A second signal raises a
flag that is up already.
"""

import signal
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import TypeVar

from dist_fusion.distributed import barrier, on_any_rank, rank

T = TypeVar("T")

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class Stopped(Exception):
    """Something that takes long was left, on all ranks at the same place, since one of them was told to stop."""


class StopRequest:
    """A flag raised by SIGTERM, SIGUSR1, SIGUSR2, by a file `STOP` in the run's folder, or when time is over.

    Signals count from the moment it is made: one that comes while models are loaded is heard at the first step.
    """

    def __init__(self) -> None:
        self._signal, self._file, self._minutes, self._end = "", Path(), 0.0, float("inf")
        self._before = {name: signal.signal(name, self._raise) for name in SIGNALS}

    def _raise(self, number: int, frame: FrameType | None) -> None:
        self._signal = signal.Signals(number).name

    def look_for(self, file: Path, minutes: float) -> None:
        """From now on `file` and the end of so many minutes (0 is never) raise it, too. Collective."""
        self._file, self._minutes = file, minutes
        self._end = time.monotonic() + 60 * minutes if minutes else float("inf")
        if rank() == 0:
            file.unlink(missing_ok=True)  # what stopped the last life does not stop this one
        barrier()

    def reason(self) -> str:
        """By what this rank was told to stop; empty if it was not. The file and the time are rank 0's to look at."""
        if self._signal or rank():
            return self._signal
        if time.monotonic() > self._end:
            return f"time_budget of {self._minutes:g} minutes"
        return str(self._file) if self._file.is_file() else ""

    def heard_over(self, items: Iterable[T]) -> Iterator[T]:
        """`items`, as many on every rank. Raises Stopped where one was told to stop. Collective at each."""
        for item in items:
            if any(on_any_rank(bool(self.reason()))):
                raise Stopped
            yield item

    def close(self) -> None:
        """Give the signals back to whoever had them before."""
        for name, handler in self._before.items():
            signal.signal(name, handler)
