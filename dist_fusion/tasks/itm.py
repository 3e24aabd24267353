"""Image-text matching: does this text describe this image? Half of the texts get another image."""

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
class Itm:
    """Negatives are drawn inside blocks of consecutive samples, so that they do not depend on the ranks."""

    weight: float = 1.0
    block: int = 16  # samples; a micro-batch must be a multiple
    attention: float = 1.0  # weight of its pairs in attention distillation

    teachable: ClassVar[bool] = True
    num_images: ClassVar[int] = 1
    limit: ClassVar[str] = ""

    def __post_init__(self) -> None:
        if self.block < 1:
            raise ValueError(f"block is {self.block}; it must be at least 1")

    def head(self, vocabulary: Vocabulary) -> HeadSpec:
        return HeadSpec("linear", 2)

    def eligible(self, supply: Supply) -> bool:
        return supply.texts > 0

    def lay(self, batch: PairBatch, samples: Sequence[Sample]) -> None:
        """In each block half of the texts keep their image (label 1), the others get another's (label 0).

        A text without a legal partner keeps its row with weight 0, so that it is counted and not trained on.
        """
        rows: list[tuple[int]] = []
        labels, weight = [], []
        for block in in_blocks(samples, self.block):
            draw = Random(f"{block[0].visit}/itm")
            texts = [(i, text) for i, sample in enumerate(block) for text in sample.texts]
            asked = sorted(draw.sample(range(len(texts)), len(texts) // 2))
            partner = other_images(block, [texts[t] for t in asked], draw)
            for t, (i, text) in enumerate(texts):
                image = partner.get(asked.index(t)) if t in asked else i
                weight.append(0.0 if image is None else 1.0)
                shown = block[i if image is None else image]
                attention = self.attention if image is not None else 0.0
                rows.append((batch.pair(block[i], batch.image(shown), batch.text(text), attention=attention),))
                labels.append(int(t not in asked))
        batch.ask("itm", answers_to(rows, 1, integers(labels), weight=weight))

    def hard_loss(self, logits: Tensor, target: Target) -> Tensor:
        return hard_cross_entropy(logits, target.labels)

    def soft_loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        return soft_cross_entropy(student, teacher)

    def judge(self, logits: Tensor, target: Target) -> Verdict:
        return pick_class(logits, target.labels)

    def kinds(self) -> tuple[str, ...]:
        return ("pairs",)

    def classes(self) -> tuple[str, ...]:
        return ()

    def measures(self, judged: Judged) -> dict[str, Score]:
        return {}


def other_images(block: Sequence[Sample], texts: Sequence[tuple[int, object]], draw: Random) -> dict[int, int]:
    """For each of `texts` (its sample in the block, itself) the sample whose image it gets, where there is one.

    No image is given twice, and never one that a text may truly describe (`legal_images`). As many texts as possible
    get one (augmenting paths), among them by the draw.
    """
    legal = []
    for i, _ in texts:
        fits = legal_images(block, i)
        legal.append(draw.sample(fits, len(fits)))
    owner: dict[int, int] = {}

    def give(text: int, tried: set[int]) -> bool:
        for image in legal[text]:
            if image not in tried:
                tried.add(image)
                if image not in owner or give(owner[image], tried):
                    owner[image] = text
                    return True
        return False

    for text in draw.sample(range(len(texts)), len(texts)):
        give(text, set())
    return {text: image for image, text in owner.items()}
