"""Retrieval by a fusion: which of some images does this text describe? (ViLT's fine-tuning, arXiv:2102.03334)"""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import ClassVar

from torch import Tensor

from dist_fusion.batch import PairBatch, Sample, Supply, answers_to, integers
from dist_fusion.schema import section
from dist_fusion.tasks.losses import hard_cross_entropy, soft_cross_entropy
from dist_fusion.tasks.measures import Judged, Score, Verdict, pick_class
from dist_fusion.tasks.negatives import in_blocks, legal_images
from dist_fusion.types import HeadSpec, Target, Vocabulary


@section
@dataclass(frozen=True)
class Retrieval:
    """Each text ranks its own image, the first candidate, among others of its block. ViLT ranks texts of an image."""

    weight: float = 1.0
    block: int = 16  # samples; a micro-batch must be a multiple
    negatives: int = 15  # candidates beside the own image, where the block has so many
    attention: float = 1.0  # weight of each of its pairs in attention distillation

    teachable: ClassVar[bool] = True
    num_images: ClassVar[int] = 1
    limit: ClassVar[str] = ""

    def __post_init__(self) -> None:
        if not 1 <= self.negatives < self.block:
            raise ValueError(
                f"negatives is {self.negatives} and block {self.block}; there can be 1 to block - 1 negatives"
            )

    def head(self, vocabulary: Vocabulary) -> HeadSpec:
        return HeadSpec("rank", 1)

    def eligible(self, supply: Supply) -> bool:
        return supply.texts > 0

    def lay(self, batch: PairBatch, samples: Sequence[Sample]) -> None:
        """One row a text: its pairs with the candidates, -1 in places that no legal image fills.

        A text without any legal image weighs 0, so that it is counted and not trained on.
        """
        rows, weight = [], []
        for block in in_blocks(samples, self.block):
            draw = Random(f"{block[0].visit}/retrieval")
            for own, sample in enumerate(block):
                legal = legal_images(block, own)
                for text in sample.texts:
                    chosen = draw.sample(legal, min(self.negatives, len(legal)))
                    row = batch.text(text)
                    pairs = [
                        batch.pair(sample, batch.image(block[i]), row, attention=self.attention) for i in (own, *chosen)
                    ]
                    rows.append(pairs + [-1] * (1 + self.negatives - len(pairs)))
                    weight.append(float(bool(chosen)))
        labels = integers([0] * len(rows))
        batch.ask("retrieval", answers_to(rows, 1 + self.negatives, labels, weight=weight))

    def hard_loss(self, logits: Tensor, target: Target) -> Tensor:
        return hard_cross_entropy(logits, target.labels)

    def soft_loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        return soft_cross_entropy(student, teacher)

    def judge(self, logits: Tensor, target: Target) -> Verdict:
        """Right if no other candidate scores as high: a model that says the same of all knows nothing."""
        said = pick_class(logits, target.labels)
        return said._replace(score=(logits[:, :1] > logits[:, 1:]).all(-1).float())

    def kinds(self) -> tuple[str, ...]:
        return ("recall@1",)

    def classes(self) -> tuple[str, ...]:
        return ()

    def measures(self, judged: Judged) -> dict[str, Score]:
        return {}
