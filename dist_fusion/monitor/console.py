"""What a run says while it runs, and how long it will take."""

import logging
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta

from dist_fusion.distributed import rank

log = logging.getLogger("dist_fusion")
MEMORY = 0.7
"""How much of the pace so far stays when an interval is added: about the last three count."""


def start_console() -> None:
    """Let rank 0 speak on stdout, and the others only when something is wrong."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO if rank() == 0 else logging.WARNING)
    log.propagate = False


def progress_line(step: int, steps: int, values: Mapping[str, float]) -> str:
    """One console line: step, losses, rate, the time left, and skipped steps if there are any."""
    losses = " ".join(f"{k.removeprefix('loss/')} {v:.3f}" for k, v in values.items() if k.startswith("loss/"))
    parts = [f"step {step}/{steps}", losses, f"{values['speed/samples_per_s']:.0f} samples/s"]
    parts += [f"{timedelta(seconds=round(values['time/left_s']))} left"]
    skipped = values.get("optimizer/skipped_steps", 0)
    return " | ".join([*parts, f"{skipped:.0f} steps skipped"] if skipped else parts)


class Pace:
    """How long the steps of this life take, apart from what is done between them: saving and scoring."""

    def __init__(self) -> None:
        self.paused_s = 0.0  # in all
        self._a_step = 0.0
        self._steps = 0

    def add(self, steps: int, seconds: float) -> None:
        """Some steps, and the time that they alone took."""
        kept = MEMORY if self._steps else 0.0
        self._a_step = kept * self._a_step + (1 - kept) * seconds / steps
        self._steps += steps

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is done inside is no step."""
        before = time.monotonic()
        yield
        self.paused_s += time.monotonic() - before

    def left(self, steps: int) -> float:
        """Seconds that so many more steps will take, with as many pauses as there were so far."""
        return steps * (self._a_step + self.paused_s / max(self._steps, 1))
