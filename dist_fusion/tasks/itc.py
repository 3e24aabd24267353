"""Image-text contrast: which of all ranks' texts belongs to this image, and the reverse."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dist_fusion.batch import PairBatch, Sample, Supply, answers_to, integers
from dist_fusion.distributed import gather_rows
from dist_fusion.schema import section
from dist_fusion.tasks.measures import Judged, Score, Verdict
from dist_fusion.types import HeadSpec, Target, Vocabulary


@section
@dataclass(frozen=True)
class Itc:
    """InfoNCE over all ranks' micro-batches (the contrast batch); equal captions and equal images are positives."""

    weight: float = 1.0
    dimensions: int = 256
    attention: float = 1.0  # weight of the matched pairs in attention distillation

    teachable: ClassVar[bool] = False  # a fusion encoder has no vectors to compare
    num_images: ClassVar[int] = 1
    limit: ClassVar[str] = ""

    def head(self, vocabulary: Vocabulary) -> HeadSpec:
        return HeadSpec("contrast", self.dimensions)

    def eligible(self, supply: Supply) -> bool:
        return supply.texts > 0

    def lay(self, batch: PairBatch, samples: Sequence[Sample]) -> None:
        """One row a text with its own image; the labels are their content ids."""
        rows, labels = [], []
        for sample in samples:
            for text in sample.texts:
                image_row, text_row = batch.image(sample), batch.text(text)
                batch.pair(sample, image_row, text_row, attention=self.attention)
                rows.append((image_row, text_row))
                labels.append((sample.image_ids[0], text.content))
        batch.ask("itc", answers_to(rows, 2, integers(labels, 2)))

    def hard_loss(self, logits: Tensor, target: Target) -> Tensor:
        """Mean of both directions' cross-entropy with a target spread evenly over the positives. Collective."""
        everyone = gather_rows(target.labels)
        positive = (target.labels[:, None] == everyone[None]).any(-1).to(logits.dtype)  # [R, G]
        spread = positive / positive.sum(-1, keepdim=True)
        return -(spread[:, None] * logits.log_softmax(-1)).sum(-1).mean(-1)

    def soft_loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        raise AssertionError("contrast has no soft labels")

    def judge(self, logits: Tensor, target: Target) -> Verdict:
        """The score is the mean of both directions; label and answer are the image's caption. Collective."""
        best = gather_rows(target.labels)[logits.argmax(-1)]  # [R, 2, 2]
        score = (best == target.labels[:, None]).any(-1).float().mean(-1)
        return Verdict(target.labels[:, 1], best[:, 0, 1], score)

    def kinds(self) -> tuple[str, ...]:
        return ("rows",)

    def classes(self) -> tuple[str, ...]:
        return ()

    def measures(self, judged: Judged) -> dict[str, Score]:
        return {}
