"""Stop when told to, at a step's end, on all ranks.

SLURM warns every process, a person signals one worker or touches a file, but a ZeRO checkpoint needs every rank at the
same step. So a handler only raises a flag; the loop asks all ranks at the end of each step. A second signal raises a
flag that is up already.
"""

import signal
import time
from pathlib import Path
from types import FrameType

from dist_fusion.distributed import barrier, rank

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class StopRequest:
    """A flag raised by SIGTERM, SIGUSR1, SIGUSR2, by the file `STOP` in the run's folder, or when time is over."""

    def __init__(self, stop_file: Path, minutes: float = 0.0):
        """Collective. `minutes` is the time budget from now on; 0 is none."""
        self._stop_file, self._signal = stop_file, ""
        self._end = time.monotonic() + 60 * minutes if minutes else float("inf")
        self._minutes = minutes
        if rank() == 0:
            stop_file.unlink(missing_ok=True)  # what stopped the last life does not stop this one
        barrier()
        self._before = {name: signal.signal(name, self._raise) for name in SIGNALS}

    def _raise(self, number: int, frame: FrameType | None) -> None:
        self._signal = signal.Signals(number).name

    def reason(self) -> str:
        """By what this rank was told to stop; empty if it was not. The file and the time are rank 0's to look at."""
        if self._signal or rank():
            return self._signal
        if time.monotonic() > self._end:
            return f"time_budget of {self._minutes:g} minutes"
        return str(self._stop_file) if self._stop_file.exists() else ""

    def close(self) -> None:
        """Give the signals back to whoever had them before."""
        for name, handler in self._before.items():
            signal.signal(name, handler)
