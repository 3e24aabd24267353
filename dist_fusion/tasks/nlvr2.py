"""Reasoning over two images (NLVR2, arXiv:1811.00491): is this sentence true of the left and the right one?"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dist_fusion.batch import PairBatch, Sample, Supply, answers_to, content_id, integers
from dist_fusion.schema import UserError, section
from dist_fusion.tasks.losses import hard_cross_entropy, soft_cross_entropy
from dist_fusion.tasks.measures import Judged, Score, Verdict, consistency, pick_class
from dist_fusion.types import HeadSpec, Target, Vocabulary

LABELS = ("false", "true")
"""In the order of the head's outputs. The data has words, of any case."""


@section
@dataclass(frozen=True)
class Nlvr2:
    """Two pairs a row: the sentence with each image in its own slot, judged by one head over both (ViLT)."""

    weight: float = 1.0
    attention: float = 1.0  # weight of each of its pairs in attention distillation

    teachable: ClassVar[bool] = True
    num_images: ClassVar[int] = 2
    limit: ClassVar[str] = ""

    def head(self, vocabulary: Vocabulary) -> HeadSpec:
        return HeadSpec("classifier", len(LABELS), num_pairs=2)

    def eligible(self, supply: Supply) -> bool:
        if supply.images != 2 or not supply.labels:
            return False
        unknown = [label for label in supply.labels if label.lower() not in LABELS]
        if unknown:
            raise UserError(f"tasks.nlvr2 cannot read the label {unknown[0]!r}; it must be True or False, as a string")
        return True

    def lay(self, batch: PairBatch, samples: Sequence[Sample]) -> None:
        """The pairs of a statement with the left and the right image."""
        rows, labels, groups = [], [], []
        for sample in samples:
            if len(sample.images) != 2:
                continue
            for statement in sample.statements:
                text = batch.text(statement.text)
                images = (batch.image(sample, slot) for slot in range(2))
                rows.append([batch.pair(sample, image, text, attention=self.attention) for image in images])
                labels.append(LABELS.index(statement.label.lower()))
                groups.append(content_id(statement.group))
        batch.ask("nlvr2", answers_to(rows, 2, integers(labels), group=groups))

    def hard_loss(self, logits: Tensor, target: Target) -> Tensor:
        return hard_cross_entropy(logits, target.labels)

    def soft_loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        return soft_cross_entropy(student, teacher)

    def judge(self, logits: Tensor, target: Target) -> Verdict:
        return pick_class(logits, target.labels)

    def kinds(self) -> tuple[str, ...]:
        return ("statements",)

    def classes(self) -> tuple[str, ...]:
        return LABELS

    def measures(self, judged: Judged) -> dict[str, Score]:
        return {"consistency": consistency(judged)}
