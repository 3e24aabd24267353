"""Steps that went wrong, and runs that stand still: dropped, counted, told, and ended before they cost a night."""

import faulthandler
import math
import os
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from dist_fusion import distributed
from dist_fusion.checkpoint.manifest import Position, list_whole
from dist_fusion.config import Config, HealthConfig
from dist_fusion.distill import Loss
from dist_fusion.engine.steps import Steps
from dist_fusion.monitor.console import log
from dist_fusion.monitor.events import FILE, read_events, record

T = TypeVar("T")
LOWER = 16.0
"""By what the loss scale is divided when a run goes back."""
RECENT = 50
"""Losses that a spike is measured against."""
GRACE = 10.0
"""Seconds between the writing of a rank's stack and its end, so that all ranks write theirs."""
MARGIN = timedelta(minutes=5)
"""By how much longer ranks wait for one another than a run may stand still: its watch has the first word."""
LONGEST = timedelta(days=365)
FLIGHT_RECORDER = {"TORCH_FR_BUFFER_SIZE": "2000", "TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}
"""What makes NCCL keep its last operations, and write them down when one fails. Unless the user says otherwise."""
FLIGHT_RECORD = ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")
"""Where it writes them: the name of the variable now, and until torch 2.8."""
FLIGHTS = "nccl-rank-"
"""The beginning of their files' names; torch's tools for reading them want the rank's number behind it."""


class Unhealthy(RuntimeError):
    """A run that is of no use to continue as it is; the message says why and what may help."""


class Health:
    """Judges each step of a run, on all ranks alike."""

    def __init__(self, config: HealthConfig, steps: Steps, run: Path):
        self._config, self._steps, self._run = config, steps, run
        self._streak = 0  # steps dropped in a row that no lower loss scale could have saved
        self._terms: dict[str, Tensor] = {}
        self._spiked = ""
        self.recent: deque[float] = deque(
            maxlen=RECENT
        )  # losses of the last steps that were made, if spikes are sought
        self.dropped = 0  # steps of this life

    def begin(self, position: Position) -> None:
        """Begin at a checkpoint: with a lower loss scale, if the run once went back to it. Collective."""
        self.recent = deque(position.recent, RECENT)
        self._streak = 0
        if distributed.from_first(distributed.rank() == 0 and position.step in _gone_back_to(self._run)):
            self._steps.lower_scale(LOWER)

    def watched(self, loss: Loss, *, last: bool) -> Tensor:
        """The total of `loss`, a micro-step's share, or what drops the step if its loss is a spike.

        A spike is more than `health.spike` times the median of the last losses. That rule reads the loss from the
        device at every step; without it nothing is read here. Collective at the last micro-step.
        """
        for name, value in {"total": loss.total, **loss.terms}.items():
            self._terms[name] = value.detach() + self._terms.get(name, 0.0)
        if not (self._config.spike and last):
            return loss.total
        total = float(distributed.summed(self._terms["total"]))
        usual = statistics.median(self.recent) if len(self.recent) >= RECENT // 2 else math.inf
        if total > self._config.spike * usual:
            self._spiked = (
                f"its loss {total:.4g} is more than {self._config.spike:g} times {usual:.4g}, the median of the last"
            )
            return self._steps.drop(loss.total)
        if math.isfinite(total):
            self.recent.append(total)
        return loss.total

    def look(self, step: int) -> bool:
        """Whether the step that was just made changed the weights; says what was wrong if not. Collective."""
        terms, self._terms = self._terms, {}
        spiked, self._spiked = self._spiked, ""
        if self._steps.applied:
            self._streak = 0
            return True
        self._streak += not self._steps.scale_at_fault
        self.dropped += 1
        what = spiked or self._not_finite(terms)
        if distributed.rank() == 0:
            log.warning("step %d is dropped on all ranks: %s", step, what)
            record(self._run, "skipped", step, {"what": what})
        return False

    def _not_finite(self, terms: Mapping[str, Tensor]) -> str:
        losses = [f"loss {name}" for name, value in terms.items() if not value.isfinite()]
        told = [
            f"rank {rank}: {', '.join(names)}"
            for rank, names in enumerate(distributed.gathered([*losses, *self._steps.at_fault]))
            if names
        ]
        return f"not finite: {'; '.join(told) or 'the norm of the gradients'}"

    @property
    def hopeless(self) -> bool:
        """Whether so many steps in a row were dropped that more of the same is no use.

        A loss scale that is still coming down is of use, however long that takes, so those steps do not count.
        """
        return self._streak >= self._config.streak

    def require_way_back(self, step: int) -> None:
        """Write down that the run goes back to its newest checkpoint. Collective.

        Raises:
            Unhealthy: if there is none, or the run went back there before.
        """
        problem = distributed.from_first(self._go_back(step) if distributed.rank() == 0 else "")
        if problem:
            raise Unhealthy(problem)

    def _go_back(self, step: int) -> str:
        whole = list_whole(self._run)
        before = _gone_back_to(self._run)
        why = f"{self._streak} steps in a row up to step {step} were dropped"
        if self._steps.scale_at_floor:
            why += ", with the loss scale at its least"
        advice = (
            f"{self._run / FILE} says what was not finite in each. A lower optimizer.learning_rate or another "
            "precision (deepspeed=…) in a new run may help, or other data"
        )
        if not whole:
            return f"{why}, and there is no checkpoint to go back to; {advice}"
        if whole[-1].step in before:
            return f"{why}, also after going back to step {whole[-1].step}; {advice}"
        log.warning("%s; going back to step %d", why, whole[-1].step)
        record(self._run, "rolled back", step, {"to": whole[-1].step, "why": why})
        return ""


def _gone_back_to(run: Path) -> set[object]:
    return {event.details.get("to") for event in read_events(run) if event.kind == "rolled back"}


def patience_of(config: Config) -> timedelta:
    """How long ranks wait for one another."""
    return min(timedelta(minutes=min(config.health.hang_minutes, 1e6)) + MARGIN, LONGEST)


class Watch:
    """Ends a rank that has stood still for too long, and writes down where: all ranks, since all wait for one.

    A thread does it with words; where it does not come to run, since the standstill holds the interpreter, faulthandler
    does it without.
    """

    def __init__(self, minutes: float, run: Path):
        self._limit, self._run = 60 * minutes, run
        self._path = run / "logs" / f"rank-{distributed.rank()}.stacks"
        self._file = self._path.open("a")
        self._ended = threading.Event()
        self._step = 0
        self.beat()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def beat(self, step: int | None = None) -> None:
        """Say that the run goes on; at which step, if it is another one."""
        self._step = self._step if step is None else step
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
            said = (
                f"rank {distributed.rank()} has made no progress for {self._limit / 60:g} minutes "
                f"(health.hang_minutes) and ends; where it stood is in {self._path}"
            )
            sys.stderr.write(f"dist-fusion: {said}\n")
            sys.stderr.flush()
            self._file.write(f"no progress for {self._limit:g} s, {time.ctime()}\n")
            self._file.flush()
            faulthandler.dump_traceback(self._file, all_threads=True)
            with suppress(OSError):  # the file system may be what stands still, and the error is told anyway
                if torch.cuda.is_initialized():
                    # NCCL itself would write it at its own limit, which is later.
                    flights = torch._C._distributed_c10d._dump_nccl_trace()  # type: ignore[attr-defined]
                    (self._run / "logs" / f"{FLIGHTS}{distributed.rank()}").write_bytes(flights)
                record(self._run, "failed", self._step, {"error": said})
            time.sleep(min(GRACE, self._limit))
            os._exit(1)


def record_flights(environment: Any, logs: Path | None = None) -> None:
    """Have NCCL keep a record of its last operations; `logs` is where it goes when one never ends."""
    for name, value in FLIGHT_RECORDER.items():
        environment.setdefault(name, value)
    if logs:
        for name in FLIGHT_RECORD:
            environment.setdefault(name, str(logs / FLIGHTS))
