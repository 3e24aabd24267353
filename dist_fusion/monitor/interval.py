"""What happened since the last log line, on all ranks: losses, times, memory, and what of the data was unusable."""

import math
import resource
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from dist_fusion.data.index import Damage, reasons
from dist_fusion.data.stream import Loaded
from dist_fusion.distributed import by_rank, gathered, world_size
from dist_fusion.monitor.clock import PHASES, Clock
from dist_fusion.monitor.console import Pace, log
from dist_fusion.schema import UserError
from dist_fusion.types import to_device

SPREAD = ("step_s", "data_wait_s", "forward_s")
"""Seconds of a step that are told of the quickest and the slowest rank. All ranks wait for the slowest at each step, so
it shows in `forward_s`, where few wait."""
TROUBLE = {"alloc_retries": "num_alloc_retries", "out_of_memory": "num_ooms"}
"""Figures of torch's allocator, by the names they have here."""


class Interval:
    """Collects from step to step, and reads nothing from the device until it is read itself.

    `samples_at_peak` is how many samples a second a rank's device could train at its peak, if that is known.
    """

    def __init__(self, device: torch.device, global_batch: int, steps: int, samples_at_peak: float | None = None):
        self._global_batch, self._last, self._samples_at_peak = global_batch, steps, samples_at_peak
        self._mine: list[Damage] = []
        self.damages: list[Damage] = []  # of all ranks, since the start
        self._samples = self._without_partner = 0
        self._sources: Counter[str] = Counter()
        self._clock, self._pace = Clock(device), Pace()
        self._begin()

    def _begin(self) -> None:
        self._names: list[str] = []
        self._step = self._sum = self._most = torch.zeros(())  # [terms], left on the device until they are read
        self._nonfinite = torch.zeros(())
        self._made = 0  # steps that changed the weights
        self._steps, self._wait, self._since, self._paused = 0, 0.0, time.monotonic(), self._pace.paused_s

    def fetch(self, batches: Iterator[Loaded], count: int) -> list[Loaded]:
        """The micro-batches of the next step; waits for them, and says which samples could not be read."""
        before = time.monotonic()
        loaded = [next(batches) for _ in range(count)]
        self._wait += time.monotonic() - before
        for one in loaded:
            self._mine += one.damages
            self._sources.update(one.sources)
            for damage in one.damages:
                log.warning("unusable: %s", damage.told())
        for target in (target for one in loaded for target in one.batch.targets.values()):
            self._without_partner += int((target.weight == 0).sum())
        self._end_step()
        self._steps += 1
        return loaded

    def phase(self, name: str) -> AbstractContextManager[None]:
        """What is done inside is one of the phases of a step, by its name in PHASES."""
        return self._clock.phase(name)

    def paused(self) -> AbstractContextManager[None]:
        """What is done inside, such as saving and scoring, counts in no speed."""
        return self._pace.paused()

    def add(self, total: Tensor, terms: Mapping[str, Tensor]) -> None:
        """Add one micro-step's shares; the terms of an interval are the same in each."""
        shares = torch.stack([total.detach(), *(value.detach() for value in terms.values())])
        self._names = ["total", *terms]
        self._step = self._step + shares
        self._nonfinite = self._nonfinite + ~shares[0].isfinite()

    def leave_out(self) -> None:
        """The step that was just made was dropped: its losses, which may be no numbers, count in no mean."""
        self._step = torch.zeros(())

    def _end_step(self) -> None:
        if self._step.ndim:
            self._made += 1
            self._most = torch.maximum(self._most, self._step) if self._most.ndim else self._step
            self._sum, self._step = self._sum + self._step, torch.zeros(())

    def read(self, step: int, norm: Tensor, readings: Mapping[str, Tensor]) -> dict[str, float]:
        """What there is to say of all ranks at `step`, and begin anew. Collective.

        `loss/…` are means over the interval; `loss_max/…` the largest of any step and rank, where a rank's share counts
        as if all were like it. `norm` is the last gradient's, left out if it is no finite number. `readings` are pairs
        of a sum and a count, [2], whose mean over all ranks is told under their names.

        `health/nonfinite` counts the micro-steps of ranks whose loss was none. Reading waits for all that the device
        still has to do; so the host reads it here alone, and once. (DeepSpeed's step reads the norm that it clips by.)
        """
        self._end_step()
        ranks, steps, names = world_size(), self._steps, self._names if self._made else []
        mine = self._on_device(norm, readings) | self._on_host()
        rows = by_rank(torch.tensor([*mine.values()], dtype=torch.float64))
        of = dict(zip(mine, rows.T, strict=True))  # of each rank, [ranks]
        if of["damaged"].any():  # every rank knows, and so all of them ask
            self.damages += [damage for theirs in gathered(self._mine) for damage in theirs]
            self._mine = []
        elapsed = mine["step_s"] * steps
        rate = steps * self._global_batch / elapsed
        self._samples += steps * self._global_batch
        self._pace.add(steps, elapsed)
        values = {f"loss/{name}": float(of[f"sum/{name}"].sum()) / self._made for name in names}
        values |= {f"loss_max/{name}": float(of[f"most/{name}"].max()) * ranks for name in names}
        values |= {"optimizer/gradient_norm": mine["norm"]} if math.isfinite(mine["norm"]) else {}
        for name in readings:
            count = float(of[f"count/{name}"].sum())
            values |= {name: float(of[f"total/{name}"].sum()) / count} if count else {}
        values |= {
            "health/nonfinite": float(of["nonfinite"].sum()),
            "speed/samples_per_s": rate,
            "speed/samples_per_s_per_rank": rate / ranks,
            **({"speed/mfu": rate / ranks / self._samples_at_peak} if self._samples_at_peak else {}),
            "speed/step_s": mine["step_s"],
            "speed/data_wait_share": mine["data_wait_s"] / mine["step_s"],
            **{f"time/{name}_s": float(of[name].mean()) for name in PHASES},
            "time/left_s": self._pace.left(self._last - step),
            **{path: figure for name in SPREAD for path, figure in _spread(name, of[name]).items() if ranks > 1},
            "memory/peak_gib": float(of["peak_gib"].max()),
            **{f"memory/{name}": float(of[name].sum()) for name in TROUBLE if name in of},
            "data/skipped": float(len(self.damages)),
            "data/without_partner": float(of["without_partner"].sum()),
        }
        if len(self._sources) > 1:
            values |= {f"data/seen/{name}": float(of[f"seen/{name}"].sum()) for name in self._sources}
        self._begin()
        return values

    def _on_device(self, norm: Tensor, readings: Mapping[str, Tensor]) -> dict[str, float]:
        """What the device has: sums and largest shares of the terms, and the readings. Waits for it."""
        device = self._nonfinite.device
        parts = [self._nonfinite.view(1), to_device(norm, device).view(1), *readings.values()]
        if self._made:
            parts = [self._sum, self._most, *parts]
        names = [f"{kind}/{name}" for kind in ("sum", "most") for name in self._names if self._made]
        names += ["nonfinite", "norm", *(f"{kind}/{name}" for name in readings for kind in ("total", "count"))]
        return dict(zip(names, torch.cat([part.double() for part in parts]).tolist(), strict=True))

    def _on_host(self) -> dict[str, float]:
        """What the host knows of its own rank; seconds are of a step."""
        elapsed = time.monotonic() - self._since - (self._pace.paused_s - self._paused)
        phases = {name: seconds / self._steps for name, seconds in self._clock.read().items()}
        return {
            "step_s": elapsed / self._steps,
            "data_wait_s": self._wait / self._steps,
            "forward_s": phases["teacher"] + phases["student"],
            **phases,
            "peak_gib": peak_gib(),
            **_trouble(),
            "without_partner": self._without_partner,
            "damaged": len(self._mine),
            **{f"seen/{name}": count for name, count in self._sources.items()},
        }

    def require_sound(self, most_damaged: float) -> None:
        """Raises UserError, on every rank, if a larger share of the samples so far was unusable."""
        if len(self.damages) > max(1, most_damaged * self._samples):
            raise UserError(
                f"{len(self.damages)} of the last {self._samples} samples were unusable, more than data.most_damaged "
                f"({most_damaged:.2%}): {reasons(self.damages)}; they are listed in quarantine.jsonl, the first is "
                f"{self.damages[0].told()}. The last checkpoint is whole; mend the shards and start the same command "
                "again, or raise data.most_damaged"
            )


def _spread(name: str, of: Tensor) -> dict[str, float]:
    """The least and the most of all ranks [ranks], and which rank has the most."""
    return {
        f"ranks/{name}_min": float(of.min()),
        f"ranks/{name}_max": float(of.max()),
        f"ranks/{name}_max_rank": float(of.argmax()),
    }


def _trouble() -> dict[str, float]:
    """How often this rank's GPU had no room at first, and how often none at all. Asks no device."""
    if not torch.cuda.is_initialized():
        return {}
    stats = torch.cuda.memory_stats()
    return {name: float(stats[key]) for name, key in TROUBLE.items()}


def peak_gib() -> float:
    """Peak memory of this rank: of its GPU, or of the process where there is none."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
