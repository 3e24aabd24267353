"""Visual entailment (SNLI-VE, arXiv:1901.06706): does the image entail the hypothesis, contradict it, or neither?"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dist_fusion.batch import PairBatch, Sample, Supply, answers_to, content_id, drawn, integers
from dist_fusion.schema import UserError, section
from dist_fusion.tasks.losses import hard_cross_entropy, soft_cross_entropy
from dist_fusion.tasks.measures import Judged, Score, Verdict, pick_class
from dist_fusion.types import HeadSpec, Target, Vocabulary, meaning_of


@section
@dataclass(frozen=True)
class SnliVe:
    """Three classes. The text is the hypothesis alone: a premise in words would give the image away."""

    labels: tuple[str, ...] = ("contradiction", "entailment", "neutral")  # DiDE's order; ALBEF's has neutral second
    weight: float = 1.0
    statements_per_image: int = 0  # drawn anew at every visit; 0 is all of them
    attention: float = 1.0  # weight of its pairs in attention distillation

    teachable: ClassVar[bool] = True
    num_images: ClassVar[int] = 1
    limit: ClassVar[str] = "statements_per_image"

    def __post_init__(self) -> None:
        if len(set(self.labels)) != 3 or len(self.labels) != 3:
            raise ValueError(f"labels is {list(self.labels)}; it must be three different names")

    def head(self, vocabulary: Vocabulary) -> HeadSpec:
        return HeadSpec("classifier", len(self.labels), meaning=meaning_of(self.labels))

    def eligible(self, supply: Supply) -> bool:
        if supply.images != 1 or not supply.labels:
            return False
        unknown = [label for label in supply.labels if label not in self.labels]
        if unknown:
            raise UserError(
                f"the label {unknown[0]!r} is not in tasks.snli_ve.labels, which has {', '.join(self.labels)}"
            )
        return True

    def lay(self, batch: PairBatch, samples: Sequence[Sample]) -> None:
        """One pair a hypothesis."""
        rows: list[tuple[int]] = []
        labels, groups = [], []
        for sample in samples:
            if len(sample.images) != 1:
                continue
            for statement in drawn(sample.statements, self.statements_per_image, f"{sample.visit}/snli_ve"):
                image, text = batch.image(sample), batch.text(statement.text)
                rows.append((batch.pair(sample, image, text, attention=self.attention),))
                labels.append(self.labels.index(statement.label))
                groups.append(content_id(statement.group))
        batch.ask("snli_ve", answers_to(rows, 1, integers(labels), group=groups))

    def hard_loss(self, logits: Tensor, target: Target) -> Tensor:
        return hard_cross_entropy(logits, target.labels)

    def soft_loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        return soft_cross_entropy(student, teacher)

    def judge(self, logits: Tensor, target: Target) -> Verdict:
        return pick_class(logits, target.labels)

    def kinds(self) -> tuple[str, ...]:
        return ("statements",)

    def classes(self) -> tuple[str, ...]:
        return self.labels

    def measures(self, judged: Judged) -> dict[str, Score]:
        return {}
