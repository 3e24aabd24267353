"""What the student is trained on: the tasks' own losses, the teacher's soft labels, and the teacher's attention.

This is the one place that knows the taps of both models. Every term is a weighted sum over rows, divided by the weight
of all rows of the optimizer step on all ranks, so that one process and many give the same gradient.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from dist_fusion.kernels import MATCHES
from dist_fusion.kernels.reference import DIRECTIONS
from dist_fusion.models.teachers import Lesson
from dist_fusion.schema import one_of, section
from dist_fusion.tasks import Task
from dist_fusion.types import Batch, Output, Tap

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
    match: Annotated[str, one_of(MATCHES)] = "kl"  # how two attention rows are compared
    direction: Annotated[str, one_of(DIRECTIONS)] = "teacher-student"  # of "kl"
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
    lessons: Sequence[Lesson],
    row_totals: Tensor,
) -> Loss:
    """The weighted sum of all terms over this rank's rows.

    With several teachers a term is their mean by weight. Since a divergence from the teacher's side is linear in what
    the teacher says, up to a constant that is the divergence from their mixture.
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
        heard = [lesson for lesson in lessons if name in lesson.soft]
        if config.soft and heard:
            each = (task.soft_loss(student.logits[name], lesson.output.logits[name]) for lesson in heard)
            terms[f"soft/{name}"] = (_mean(each, heard) * weight).sum()
            total = total + config.soft * task.weight * terms[f"soft/{name}"]
    for site in TARGETS[config.targets] if config.attention else ():
        ours, pair_weight = student.taps[site], batch.weights["attention"] * shares[-1]
        each = (_attention(config, ours, site.split(".")[1], lesson, pair_weight) for lesson in lessons)
        terms[f"attention/{site}"] = _mean(each, lessons)
        total = total + config.attention * terms[f"attention/{site}"]
    return Loss(total, terms)


def _attention(config: DistillConfig, ours: Tap, site: str, lesson: Lesson, pair_weight: Tensor) -> Tensor:
    """One site of the student against a teacher's: a scalar."""
    theirs = lesson.output.taps[site]
    return MATCHES[config.match](
        ours.query, ours.key, theirs.query, theirs.key,
        query_mask=ours.query_mask, key_mask=ours.key_mask, pair_weight=pair_weight,
        direction=config.direction, temperature=config.temperature, head_map=lesson.head_map,
    )  # fmt: skip


def _mean(losses: Iterable[Tensor], lessons: Sequence[Lesson]) -> Tensor:
    """The mean of the teachers' losses by their weights."""
    assert lessons, "a term that needs a teacher has none"
    weight = sum(lesson.weight for lesson in lessons)
    first, *others = (loss * (lesson.weight / weight) for loss, lesson in zip(losses, lessons, strict=True))
    return sum(others, first)
