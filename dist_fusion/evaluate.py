"""Scores of a model on a task's shards, exact on any number of ranks: judged rows travel, never means.

Ranks get unequal shares of the samples, the last share may be empty, and yet each takes the same number of forwards.
No sample is given to two ranks, and none is repeated to fill a batch, so each row is judged once.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn

from dist_fusion import distributed
from dist_fusion.data.stream import Loaded
from dist_fusion.monitor.console import log
from dist_fusion.tasks import Task
from dist_fusion.tasks.measures import Confusion, Judged, Score, Verdict, confusion, score_by_kind
from dist_fusion.types import Target, to_device


class Evaluation(NamedTuple):
    """What one pass over some shards gave, of tasks that have rows there."""

    scores: dict[str, dict[str, Score]]  # task -> kind or measure -> Score
    confusions: dict[str, Confusion]  # of tasks that name their classes
    skipped: int  # samples that could not be read, and so were not scored

    def percents(self, where: str) -> dict[str, float]:
        """The percentages by path, for the log."""
        return {f"{where}/{task}/{name}": s.percent for task, found in self.scores.items() for name, s in found.items()}

    def as_json(self) -> dict[str, object]:
        """All of it, for a file."""
        return {
            "scores": {
                task: {name: {"percent": score.percent, "rows": score.rows} for name, score in found.items()}
                for task, found in self.scores.items()
            },
            "confusions": {task: matrix._asdict() for task, matrix in self.confusions.items()},
            "skipped_samples": self.skipped,
        }

    def as_text(self) -> str:
        """All of it, for people."""
        lines = [
            f"{task:<10} {name:<16} {score.percent:6.2f} % of {score.rows:,}"
            for task, found in self.scores.items()
            for name, score in found.items()
        ]
        for task, matrix in self.confusions.items():
            lines += [f"\n{task}: each label (down) and the answers it got (across)", *_table(matrix)]
        if self.skipped:
            lines.append(f"{self.skipped:,} samples could not be read and were not scored")
        return "".join(f"{line}\n" for line in lines)


def _table(matrix: Confusion) -> list[str]:
    width = max(len(name) for name in matrix.classes) + 2
    rows = zip(("", *matrix.classes), (matrix.classes, *matrix.counts), strict=True)
    return [f"{name:<{width}}" + "".join(f"{cell:>{width}}" for cell in row) for name, row in rows]


@torch.no_grad()
def evaluate(
    model: nn.Module, tasks: Mapping[str, Task], batches: Iterable[Loaded], device: torch.device
) -> Evaluation:
    """The scores of `model` over one pass of `batches`, the same on every rank. Collective.

    What `batches` raises, it raises; the model is left as it was found.
    """
    training = model.training
    model.eval()
    parts: dict[str, list[Judged]] = {name: [] for name in tasks}
    skipped = 0
    try:
        for loaded in batches:
            for damage in loaded.damages:
                log.warning("not scored: %s", damage.told())
                skipped += 1
            batch = to_device(loaded.batch, device)
            output = model(batch)
            for name, task in tasks.items():
                target = batch.targets[name]
                parts[name].append(_counted(target, task.judge(output.logits[name], target)))
    finally:
        model.train(training)
    judged = {name: _of_all_ranks(mine) for name, mine in parts.items()}
    found = {name: rows for name, rows in judged.items() if len(rows.score)}
    return Evaluation(
        {name: score_by_kind(rows, tasks[name].kinds()) | tasks[name].measures(rows) for name, rows in found.items()},
        {name: confusion(rows, tasks[name].classes()) for name, rows in found.items() if tasks[name].classes()},
        int(distributed.summed(torch.tensor(skipped))),
    )


def _counted(target: Target, verdict: Verdict) -> Judged:
    """The rows that count."""
    counts = target.weight > 0
    rows = Judged(target.kind, target.group, verdict.label, verdict.answer, verdict.score.double())
    return Judged(*(column[counts].cpu() for column in rows))


def _of_all_ranks(mine: Sequence[Judged]) -> Judged:
    """The rows of every rank, on every rank. Collective."""
    numbers = [torch.zeros(0, 4, dtype=torch.int64)]
    numbers += [torch.stack([rows.kind, rows.group, rows.label, rows.answer], 1) for rows in mine]
    scores = [torch.zeros(0, dtype=torch.float64), *(rows.score for rows in mine)]
    kind, group, label, answer = distributed.gather_rows(torch.cat(numbers)).unbind(1)
    return Judged(kind, group, label, answer, distributed.gather_rows(torch.cat(scores)))
