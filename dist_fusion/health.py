"""Steps that went wrong, and runs that stand still: dropped, counted, told, and ended before they cost a night."""

import faulthandler
import logging
import os
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from dist_fusion import distributed
from dist_fusion.engine.steps import NAMED, Steps

T = TypeVar("T")
log = logging.getLogger("dist_fusion")
LOWER = 16.0
"""By what the loss scale is divided when a run goes back."""
RECENT = 50
"""Losses that a spike is measured against."""
GRACE = 10.0
"""Seconds between the writing of a rank's stack and its end, so that all ranks write theirs."""
FLIGHT_RECORDER = {"TORCH_FR_BUFFER_SIZE": "2000", "TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}
"""What makes NCCL keep its last operations, and write them down when one never ends. Unless the user says otherwise."""
FLIGHT_RECORD = ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")
"""Where it writes them: the name of the variable now, and until torch 2.8."""


class Unhealthy(RuntimeError):
    """A run that is of no use to continue as it is; the message says why and what may help."""


class Health:
    """Judges each step of a run, on all ranks alike."""

    def __init__(self, streak: int, spike: float, steps: Steps, recent: Iterable[float] = ()):
        self._most, self._spike, self._steps = streak, spike, steps
        self._streak = 0
        self._terms: dict[str, Tensor] = {}
        self._spiked = ""
        self.recent = deque(recent, RECENT)  # losses of the last steps that were made
        self.dropped = 0  # steps of this life

    def watched(self, total: Tensor, terms: Mapping[str, Tensor], *, last: bool) -> Tensor:
        """`total`, a micro-step's share of the loss, or what drops the step if its loss is a spike.

        A spike is more than `health.spike` times the median of the last losses. The rule reads the loss from the
        device at every step; without it nothing is read here. Collective at the last micro-step.
        """
        for name, value in {"total": total, **terms}.items():
            self._terms[name] = value.detach() + self._terms.get(name, 0.0)
        if not (self._spike and last):
            return total
        loss = float(distributed.summed(self._terms["total"]))
        usual = statistics.median(self.recent) if len(self.recent) >= RECENT // 2 else float("inf")
        if loss > self._spike * usual:
            self._spiked = f"its loss {loss:.4g} is more than {self._spike:g} times {usual:.4g}, the median of the last"
            return self._steps.drop(total)
        if loss == loss:
            self.recent.append(loss)
        return total

    def of_step(self) -> str:
        """What was wrong with the step that was just made; empty if nothing was. Collective."""
        terms, self._terms = self._terms, {}
        spiked, self._spiked = self._spiked, ""
        if self._steps.applied:
            self._streak = 0
            return ""
        self._streak += 1
        self.dropped += 1
        if spiked:
            return spiked
        losses = [name for name, value in terms.items() if not value.isfinite()]
        told = [
            f"rank {rank}: {', '.join([*(f'loss {name}' for name in bad), *weights])}"
            for rank, (bad, weights) in enumerate(distributed.gathered((losses, self._steps.at_fault)))
            if bad or weights
        ]
        return f"not finite: {'; '.join(told) or 'the norm of the gradients'} (the first {NAMED} of each rank)"

    @property
    def hopeless(self) -> bool:
        """Whether so many steps in a row were dropped, or the loss scale is so low, that more of the same is no use."""
        return self._streak >= self._most or (self._streak > 0 and self._steps.at_floor)

    def back(self, recent: Iterable[float]) -> None:
        """Begin again from a checkpoint, with a lower loss scale."""
        self._streak = 0
        self.recent = deque(recent, RECENT)
        self._steps.lower_scale(LOWER)


class Watch:
    """Ends a rank that has stood still for too long, and writes down where: all ranks, since all wait for one.

    A thread does it with words; where it does not come to run, since the standstill holds the interpreter, faulthandler
    does it without.
    """

    def __init__(self, minutes: float, stacks: Path):
        self._limit, self._path = 60 * minutes, stacks
        self._file = stacks.open("a")
        self._ended = threading.Event()
        self.beat()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def beat(self) -> None:
        """Say that the run goes on."""
        self._last = time.monotonic()
        faulthandler.dump_traceback_later(self._limit + 2 * GRACE, exit=True, file=self._file)

    def over(self, items: Iterable[T]) -> Iterator[T]:
        """`items`, each of which says that the run goes on."""
        for item in items:
            self.beat()
            yield item

    def close(self) -> None:
        """Stop watching."""
        self._ended.set()
        faulthandler.cancel_dump_traceback_later()
        self._thread.join()
        self._file.close()

    def _look(self) -> None:
        while not self._ended.wait(max(0.05, self._last + self._limit - time.monotonic())):
            if time.monotonic() - self._last < self._limit:
                continue
            sys.stderr.write(
                f"dist-fusion: rank {distributed.rank()} has made no progress for {self._limit / 60:g} minutes "
                f"(health.hang_minutes) and ends; where it stood is in {self._path}\n"
            )
            sys.stderr.flush()
            self._file.write(f"no progress for {self._limit:g} s, {time.ctime()}\n")
            self._file.flush()
            faulthandler.dump_traceback(self._file, all_threads=True)
            time.sleep(min(GRACE, self._limit))
            os._exit(1)


def record_flights(environment: Any, logs: Path | None = None) -> None:
    """Have NCCL keep a record of its last operations; `logs` is where it goes when one never ends."""
    for name, value in FLIGHT_RECORDER.items():
        environment.setdefault(name, value)
    if logs:
        for name in FLIGHT_RECORD:
            environment.setdefault(name, str(logs / "nccl-rank-"))
