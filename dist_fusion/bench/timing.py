"""Ours beside a peer, by turns in one process, so that whatever slows the machine down slows both."""

import ctypes
import gc
import re
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

Run = Callable[[], object]
QUANTILES = (0.2, 0.5, 0.8)
PROCESS = Path("/proc/self")


class Contest(NamedTuple):
    """What one row of a bench compares: two ways to the same results, and perhaps the least that any way must do."""

    case: str
    sizes: Mapping[str, object]
    ours: Run
    peer: str  # who runs `theirs`
    theirs: Run
    floor: Run | None = None


class Row(NamedTuple):
    """One row of a bench's JSON. Times are 20th, 50th and 80th percentiles; with a ratio above 1 ours is faster."""

    case: str
    sizes: Mapping[str, object]
    ours_ms: list[float]
    peer: str
    peer_ms: list[float]
    floor_ms: list[float] | None
    ratio: float  # of the least times: what the machine can do when nothing else runs on it
    ratio_of_medians: float
    ours_least_ms: float
    floor_least_ms: float | None
    ours_peak_mb: float | None  # what one run needs above what was there before it; None where it cannot be known
    peer_peak_mb: float | None
    rounds: int

    def line(self) -> str:
        """The row for people."""
        floor = f"   floor {self.floor_least_ms:,.1f} ms" if self.floor_least_ms is not None else ""
        peaks = f"   peak {self.ours_peak_mb:,.0f} to {self.peer_peak_mb:,.0f} MB" if self.ours_peak_mb else ""
        return (
            f"{self.case:<40} {self.ratio:6.2f}x (medians {self.ratio_of_medians:.2f}x)   "
            f"ours {spread(self.ours_ms)} ms   {self.peer} {spread(self.peer_ms)} ms{floor}{peaks}"
        )


def compare(contest: Contest, device: torch.device, seconds: float) -> Row:
    """Run a contest for so many seconds, and once more each way to see what memory it needs."""
    runs = {"ours": contest.ours, "peer": contest.theirs}
    if contest.floor is not None:
        runs["floor"] = contest.floor
    taken = interleaved(runs, device, seconds)
    table = {name: quantiles(times) for name, times in taken.items()}
    least = {name: min(times) for name, times in taken.items()}
    return Row(
        case=contest.case,
        sizes=contest.sizes,
        ours_ms=table["ours"],
        peer=contest.peer,
        peer_ms=table["peer"],
        floor_ms=table.get("floor"),
        ratio=round(least["peer"] / least["ours"], 3),
        ratio_of_medians=round(table["peer"][1] / table["ours"][1], 3),
        ours_least_ms=round(least["ours"], 3),
        floor_least_ms=round(least["floor"], 3) if contest.floor else None,
        ours_peak_mb=PEAKS[device.type](contest.ours),
        peer_peak_mb=PEAKS[device.type](contest.theirs),
        rounds=len(taken["ours"]),
    )


def interleaved(
    runs: Mapping[str, Run], device: torch.device, seconds: float, rounds: int = 3
) -> dict[str, list[float]]:
    """Milliseconds of each of `runs`, taken in turns; another goes first in each round.

    One round warms up and is left out. At least `rounds` follow, and more until `seconds` are over. The garbage
    collector, which would stop one run for the litter of another, rests meanwhile.
    """
    taken: dict[str, list[float]] = {name: [] for name in runs}
    order = list(runs)
    clock, collecting = CLOCKS[device.type], gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for run in runs.values():
            clock(run)
        end = time.perf_counter() + seconds
        while len(taken[order[0]]) < rounds or time.perf_counter() < end:
            for name in order:
                taken[name].append(clock(runs[name]))
            order = [*order[1:], order[0]]
    finally:
        if collecting:
            gc.enable()
    return taken


def _cpu_clock(run: Run) -> float:
    began = time.perf_counter()
    kept = run()  # giving its memory back is no part of the run
    took = time.perf_counter() - began
    del kept
    return 1e3 * took


def _cuda_clock(run: Run) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    kept = run()
    end.record()
    torch.cuda.synchronize()
    del kept
    return start.elapsed_time(end)


CLOCKS: dict[str, Callable[[Run], float]] = {"cpu": _cpu_clock, "cuda": _cuda_clock}
"""Milliseconds of one run, by kind of device."""


def _resident_growth(run: Run) -> float | None:
    """By the kernel's high-water mark of resident memory, set back before the run; None where it cannot be."""
    ctypes.CDLL(None).malloc_trim(0)  # memory that earlier runs left free in the heap would be used again unseen
    try:
        (PROCESS / "clear_refs").write_text("5")
    except OSError:
        return None
    before = resident("VmRSS")
    run()
    return round((resident("VmHWM") - before) / 1e3, 1)


def resident(which: str) -> float:
    """Kilobytes of this process: "VmRSS" is now, "VmHWM" the most so far."""
    found = re.search(rf"{which}:\s+(\d+) kB", (PROCESS / "status").read_text())
    assert found
    return 1.024 * int(found[1])


def _allocated_growth(run: Run) -> float | None:
    """By torch's allocator: tensors, not the CUDA context."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / 1e6, 1)


PEAKS: dict[str, Callable[[Run], float | None]] = {"cpu": _resident_growth, "cuda": _allocated_growth}
"""Megabytes that one run needs at its peak, above what was there before it, by kind of device."""


def quantiles(times: Iterable[float]) -> list[float]:
    """The 20th, 50th and 80th percentile."""
    values = torch.tensor(list(times), dtype=torch.float64)
    return [round(value, 3) for value in values.quantile(torch.tensor(QUANTILES, dtype=torch.float64)).tolist()]


def spread(times: list[float]) -> str:
    """Quantiles for people."""
    low, middle, high = times
    return f"{middle:,.1f} ({low:,.1f} to {high:,.1f})"
