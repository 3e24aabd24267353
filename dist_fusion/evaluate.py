"""Scores of a model on a task's shards, exact on any number of ranks: sums travel, never means.

Ranks get unequal shares of the samples, the last share may be empty, and yet each takes the same number of forwards.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import nn

from dist_fusion import distributed
from dist_fusion.data.stream import Loaded
from dist_fusion.monitor import log
from dist_fusion.tasks import Task
from dist_fusion.types import to_device


class Score(NamedTuple):
    """The sum of the scores of some rows, and how many rows."""

    total: float
    rows: int

    @property
    def percent(self) -> float:
        """The mean in percent, nan without rows."""
        return 100 * self.total / self.rows if self.rows else float("nan")

    def __add__(self, other: "Score") -> "Score":  # type: ignore[override]
        return Score(self.total + other.total, self.rows + other.rows)


class Evaluation(NamedTuple):
    """What one pass over some shards gave."""

    scores: dict[str, dict[str, Score]]  # task -> kind -> Score, without kinds that have no rows
    skipped: int  # samples that could not be read, and so were not scored

    def percents(self, where: str) -> dict[str, float]:
        """The percentages by path, for the log."""
        return {f"{where}/{t}/{k}": s.percent for t, kinds in self.scores.items() for k, s in kinds.items()}


@torch.no_grad()
def evaluate(
    model: nn.Module, tasks: Mapping[str, Task], batches: Iterable[Loaded], device: torch.device
) -> Evaluation:
    """The scores of `model` over one pass of `batches`, the same on every rank. Collective."""
    training = model.training
    model.eval()
    kinds = {name: task.kinds() for name, task in tasks.items()}
    sums = {name: torch.zeros(len(kinds[name]), 2, dtype=torch.float64) for name in tasks}
    skipped = 0
    for loaded in batches:
        for sample in loaded.skipped:
            log.warning("not scored: %s", sample)
            skipped += 1
        batch = to_device(loaded.batch, device)
        output = model(batch)
        for name, task in tasks.items():
            target = batch.targets[name]
            score = task.score(output.logits[name], target).double()
            counted = target.weight.double()
            sums[name].index_add_(0, target.kind.cpu(), torch.stack([score * counted, counted], 1).cpu())
    model.train(training)
    told = torch.tensor([[float(skipped), 0.0]], dtype=torch.float64)
    *table, (all_skipped, _) = distributed.summed(torch.cat([*sums.values(), told]).to(device)).tolist()
    each = iter(Score(total, round(rows)) for total, rows in table)
    scores = {name: {kind: next(each) for kind in kinds[name]} for name in tasks}
    seen = {name: {kind: score for kind, score in by_kind.items() if score.rows} for name, by_kind in scores.items()}
    return Evaluation(seen, round(all_skipped))
