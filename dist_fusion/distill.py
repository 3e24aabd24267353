"""What the student is trained on: the tasks' own losses, the teacher's soft labels, and the teacher's attention.

This is the one place that knows the taps of both models. Every term is a weighted sum over rows, divided by the weight
of all rows of the optimizer step on all ranks, so that one process and many give the same gradient.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from dist_fusion.kernels import attention_kl
from dist_fusion.kernels.reference import DIRECTIONS
from dist_fusion.schema import one_of, section
from dist_fusion.tasks import TEACHABLE, Task
from dist_fusion.types import Batch, Output

TARGETS: dict[str, tuple[str, ...]] = {
    "none": (),
    "towers": ("tower.t2i", "tower.i2t"),
    "bridge": ("bridge.t2i", "bridge.i2t"),
    "both": ("tower.t2i", "tower.i2t", "bridge.t2i", "bridge.i2t"),
}
"""Which student sites are matched (table 6); the word after the dot is the teacher's site."""


@section
@dataclass(frozen=True)
class DistillConfig:
    """Weights of the three kinds of terms; a weight of 0 means not computed and not logged."""

    targets: Annotated[str, one_of(TARGETS)] = "none"
    direction: Annotated[str, one_of(DIRECTIONS)] = "teacher-student"
    temperature: float = 1.0  # of the attention rows
    hard: float = 1.0  # the tasks' own labels
    soft: float = 0.0  # the teacher's logits (equation 10)
    attention: float = 1.0  # each site (equation 9)

    @property
    def needs_teacher(self) -> bool:
        """Whether any term looks at the teacher."""
        return self.soft > 0 or bool(self.targets != "none" and self.attention)


class Loss(NamedTuple):
    """What to minimise, and each term's share of this rank before its weight: sums over ranks are global means."""

    total: Tensor  # scalar
    terms: dict[str, Tensor]  # "hard/itm", "soft/mlm", "attention/bridge.t2i", … scalars


def row_weights(batches: Sequence[Batch], tasks: Mapping[str, Task]) -> Tensor:
    """The weight of all rows of some micro-batches: one number a task, then that of the attention rows."""
    totals = [sum(float(batch.targets[task].weight.sum()) for batch in batches) for task in tasks]
    return torch.tensor([*totals, sum(float(batch.weights["attention"].sum()) for batch in batches)])


def objective(
    config: DistillConfig,
    tasks: Mapping[str, Task],
    batch: Batch,
    student: Output,
    teacher: Output | None,
    row_totals: Tensor,
) -> Loss:
    """The weighted sum of all terms over this rank's rows.

    `row_totals` is `row_weights` of the optimizer step, summed over ranks.
    """
    shares = 1 / row_totals.clamp(min=1e-9)
    terms: dict[str, Tensor] = {}
    total = shares.new_zeros(())
    for (name, task), share in zip(tasks.items(), shares[:-1], strict=True):
        target = batch.targets[name]
        weight = target.weight * share
        if config.hard:
            terms[f"hard/{name}"] = (task.hard_loss(student.logits[name], target) * weight).sum()
            total = total + config.hard * task.weight * terms[f"hard/{name}"]
        if config.soft and name in TEACHABLE:
            assert teacher is not None
            terms[f"soft/{name}"] = (task.soft_loss(student.logits[name], teacher.logits[name]) * weight).sum()
            total = total + config.soft * task.weight * terms[f"soft/{name}"]
    for site in TARGETS[config.targets] if config.attention else ():
        assert teacher is not None
        ours, theirs = student.taps[site], teacher.taps[site.split(".")[1]]
        terms[f"attention/{site}"] = attention_kl(
            ours.query, ours.key, theirs.query, theirs.key,
            query_mask=ours.query_mask, key_mask=ours.key_mask, pair_weight=batch.weights["attention"] * shares[-1],
            direction=config.direction, temperature=config.temperature,
        )  # fmt: skip
        total = total + config.attention * terms[f"attention/{site}"]
    return Loss(total, terms)
