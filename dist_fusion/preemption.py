"""Stop when told to, at a step's end, on all ranks.

SLURM warns every process, a person signals one worker or touches a file, but a ZeRO checkpoint needs every rank at the
same step. So a handler only raises a flag; the loop asks all ranks at the end of each step.
"""

import signal
from pathlib import Path
from types import FrameType

from dist_fusion.distributed import any_rank, barrier, rank

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class StopRequest:
    """A flag raised by SIGTERM, SIGUSR1, SIGUSR2 or by the file `STOP` in the run's folder."""

    def __init__(self, stop_file: Path):
        self._stop_file = stop_file
        self._raised = False
        if rank() == 0:
            stop_file.unlink(missing_ok=True)  # what stopped the last life does not stop this one
        barrier()
        self._before = {name: signal.signal(name, self._raise) for name in SIGNALS}

    def _raise(self, number: int, frame: FrameType | None) -> None:
        self._raised = True

    def anywhere(self) -> bool:
        """Whether any rank was told to stop. Collective."""
        return any_rank(self._raised or self._stop_file.exists())

    def close(self) -> None:
        """Give the signals back to whoever had them before."""
        for name, handler in self._before.items():
            signal.signal(name, handler)
