"""How long the parts of a step take. Nothing waits for a GPU: events are put into its stream, and read much later."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

PHASES = ("teacher", "student", "backward", "optimizer")
"""The parts of a step, in the order in which they run."""


class Clock:
    """Times the phases of many steps: by the clock on a CPU, by events of the stream they run in on a GPU.

    Where a phase waits for other ranks, or for a teacher on its own stream, the wait is in its time.
    """

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"
        self._begin()

    def _begin(self) -> None:
        self._timed: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        self._marked: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What is done, or asked of a GPU, inside is of this phase."""
        if self._on_gpu:
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            yield
            last.record()
            self._marked.append((name, first, last))
        else:
            before = time.perf_counter()
            yield
            self._timed[name] += time.perf_counter() - before

    def read(self) -> dict[str, float]:
        """Seconds of each phase since the last reading. The GPU must have done all of it: read a result first."""
        timed = self._timed
        for name, first, last in self._marked:
            timed[name] += first.elapsed_time(last) / 1000
        self._begin()
        return timed
