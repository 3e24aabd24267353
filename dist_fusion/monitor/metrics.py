"""What a run shows of itself: one JSON line, TensorBoard and the console, from one place. Only rank 0 writes.

Keys are paths (`loss/total`, `loss/attention/bridge.t2i`, `speed/samples_per_s`, `memory/peak_gib`). A resumed run goes
on in the same files: what an earlier life logged after the step resumed from is dropped, in both.
"""

import json
import logging
import math
import os
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from dist_fusion.data.index import Damage, reasons
from dist_fusion.data.stream import Loaded
from dist_fusion.distributed import gathered, rank, summed
from dist_fusion.schema import UserError
from dist_fusion.types import to_device

log = logging.getLogger("dist_fusion")


def start_console() -> None:
    """Let rank 0 speak on stdout, and the others only when something is wrong."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO if rank() == 0 else logging.WARNING)
    log.propagate = False


class Monitor:
    """Writes the scalars of a run from `step` on."""

    def __init__(self, run: Path, step: int, steps: int):
        self._steps, self._first, self._since = steps, step, time.monotonic()
        self._active = rank() == 0
        if self._active:
            path = run / "metrics.jsonl"
            path.touch()
            os.truncate(path, _end_of(path, step))
            self._file = path.open("a")
            self._board = SummaryWriter(str(run / "tb"), purge_step=step + 1)
            self._quarantine = run / "quarantine.jsonl"
            listed = self._quarantine.read_text().splitlines() if self._quarantine.exists() else []
            self._listed = set(listed)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write `values` of `step` everywhere."""
        if self._active:
            print(json.dumps({"step": step, **values}), file=self._file, flush=True)
            for key, value in values.items():
                self._board.add_scalar(key, value, step)
            self._board.flush()

    def progress(self, step: int, values: Mapping[str, float]) -> None:
        """One console line: step, losses, rate and the time left."""
        pace = (time.monotonic() - self._since) / max(step - self._first, 1)
        left = timedelta(seconds=round(pace * (self._steps - step)))
        parts = " ".join(f"{k.removeprefix('loss/')} {v:.3f}" for k, v in values.items() if k.startswith("loss/"))
        log.info(
            "step %d/%d | %s | %.0f samples/s | %s left", step, self._steps, parts, values["speed/samples_per_s"], left
        )

    def quarantine(self, damages: Iterable[Damage]) -> None:
        """List what could not be used in `quarantine.jsonl`, each once."""
        if self._active:
            lines = dict.fromkeys(json.dumps(damage._asdict()) for damage in damages)
            fresh = [line for line in lines if line not in self._listed]
            if fresh:
                with self._quarantine.open("a") as file:
                    file.writelines(f"{line}\n" for line in fresh)
                self._listed.update(fresh)

    def close(self) -> None:
        """Flush and let go of the files."""
        if self._active:
            self._file.close()
            self._board.close()


def _end_of(metrics: Path, step: int) -> int:
    """Bytes of the whole lines up to `step`: a killed run leaves later ones, and may leave a torn one."""
    end = 0
    with metrics.open("rb") as file:
        for line in file:
            if not line.endswith(b"}\n") or json.loads(line)["step"] > step:
                break
            end += len(line)
    return end


class Interval:
    """What happened since the last log line."""

    def __init__(self) -> None:
        self._mine: list[Damage] = []
        self.damages: list[Damage] = []  # of all ranks, since the start
        self._samples = self._without_partner = 0
        self._sources: Counter[str] = Counter()
        self.begin()

    def begin(self) -> None:
        """Start anew, after what was logged is saved and evaluated: neither counts in the next interval's speed."""
        self._sums: dict[str, Tensor] = {}  # left on the device until they are read, like the next
        self._nonfinite = torch.zeros(())
        self._steps, self._wait, self._since = 0, 0.0, time.monotonic()

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
        self._steps += 1
        return loaded

    def add(self, total: Tensor, terms: dict[str, Tensor]) -> None:
        """Add one micro-step's shares."""
        for name, value in {"total": total, **terms}.items():
            self._sums[name] = value.detach() + self._sums.get(name, 0.0)
        self._nonfinite = self._nonfinite + ~total.detach().isfinite()

    def read(self, global_batch: int, norm: Tensor) -> dict[str, float]:
        """Means over the interval and all ranks, and `norm`, the last gradient's, if it is a finite number. Collective.

        `health/nonfinite` counts the micro-steps of ranks whose loss was none. Reading waits for all that the device
        still has to do; so the host reads it here alone, and once. (DeepSpeed's step reads the norm that it clips by.)
        """
        losses = torch.stack([*self._sums.values(), self._nonfinite])
        read = torch.cat([summed(losses), to_device(norm, losses.device).to(losses.dtype).view(1)])
        *sums, nonfinite, gradient_norm = read.tolist()
        counts = [self._without_partner, len(self._mine), *self._sources.values()]
        without_partner, damaged, *seen = summed(torch.tensor(counts)).tolist()
        if damaged:  # every rank knows, and so all of them ask
            self.damages += [damage for theirs in gathered(self._mine) for damage in theirs]
            self._mine = []
        self._samples += self._steps * global_batch
        elapsed = time.monotonic() - self._since
        values = {f"loss/{name}": value / self._steps for name, value in zip(self._sums, sums, strict=True)}
        values |= {"optimizer/gradient_norm": gradient_norm} if math.isfinite(gradient_norm) else {}
        values |= {
            "health/nonfinite": nonfinite,
            "speed/samples_per_s": self._steps * global_batch / elapsed,
            "speed/step_s": elapsed / self._steps,
            "speed/data_wait_share": self._wait / elapsed,
            "memory/peak_gib": peak_gib(),
            "data/skipped": float(len(self.damages)),
            "data/without_partner": without_partner,
        }
        if len(self._sources) > 1:
            values |= {f"data/seen/{name}": float(n) for name, n in zip(self._sources, seen, strict=True)}
        return values

    def require_sound(self, most_damaged: float) -> None:
        """Raises UserError, on every rank, if a larger share of the samples so far was unusable."""
        if len(self.damages) > max(1, most_damaged * self._samples):
            raise UserError(
                f"{len(self.damages)} of the last {self._samples} samples were unusable, more than data.most_damaged "
                f"({most_damaged:.2%}): {reasons(self.damages)}; they are listed in quarantine.jsonl, the first is "
                f"{self.damages[0].told()}. The last checkpoint is whole; mend the shards and start the same command "
                "again, or raise data.most_damaged"
            )


def peak_gib() -> float:
    """Peak memory of this rank: of its GPU, or of the process where there is none."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
