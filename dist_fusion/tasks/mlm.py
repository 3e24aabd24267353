"""Masked language modelling: recover masked words of a caption beside its image."""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import ClassVar

from torch import Tensor

from dist_fusion.batch import PairBatch, Sample, Supply, Text, answers_to, integers
from dist_fusion.schema import section
from dist_fusion.tasks.losses import hard_cross_entropy, soft_cross_entropy
from dist_fusion.tasks.measures import Judged, Score, Verdict, pick_class
from dist_fusion.types import HeadSpec, Target, Vocabulary


@section
@dataclass(frozen=True)
class Mlm:
    """Whole words are masked anew at every visit, at least one a text; 80 % become [MASK], 10 % random, 10 % stay."""

    weight: float = 1.0
    probability: float = 0.15
    attention: float = 0.0  # weight of the masked pairs in attention distillation

    teachable: ClassVar[bool] = True
    num_images: ClassVar[int] = 1
    limit: ClassVar[str] = ""

    def head(self, vocabulary: Vocabulary) -> HeadSpec:
        return HeadSpec("token", vocabulary.size)

    def eligible(self, supply: Supply) -> bool:
        return supply.texts > 0

    def lay(self, batch: PairBatch, samples: Sequence[Sample]) -> None:
        """One masked text and one pair for each text; the teacher gets the same masked ids."""
        rows, labels = [], []
        for sample in samples:
            for number, text in enumerate(sample.texts):
                masked, hidden = mask_words(
                    text, self.probability, batch.vocabulary, Random(f"{sample.visit}/mlm/{number}")
                )
                pair = batch.pair(sample, batch.image(sample), batch.text(masked), attention=self.attention)
                rows += [(pair, place) for place in hidden]
                labels += [text.ids[place] for place in hidden]
        batch.ask("mlm", answers_to(rows, 2, integers(labels)))

    def hard_loss(self, logits: Tensor, target: Target) -> Tensor:
        return hard_cross_entropy(logits, target.labels)

    def soft_loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        return soft_cross_entropy(student, teacher)

    def judge(self, logits: Tensor, target: Target) -> Verdict:
        return pick_class(logits, target.labels)

    def kinds(self) -> tuple[str, ...]:
        return ("masked tokens",)

    def classes(self) -> tuple[str, ...]:
        return ()

    def measures(self, judged: Judged) -> dict[str, Score]:
        return {}


def mask_words(text: Text, probability: float, vocabulary: Vocabulary, draw: Random) -> tuple[Text, list[int]]:
    """`text` with whole words masked, and the positions to recover; specials are never masked (BERT's rule)."""
    words = sorted({word for word in text.words if word is not None})
    chosen = {word for word in words if draw.random() < probability}
    if words and not chosen:
        chosen = {draw.choice(words)}
    ids = list(text.ids)
    hidden = [place for place, word in enumerate(text.words) if word in chosen]
    for place in hidden:
        fate = draw.random()
        if fate < 0.8:
            ids[place] = vocabulary.mask
        elif fate < 0.9:
            ids[place] = draw.randrange(vocabulary.size)
    return text._replace(ids=tuple(ids)), hidden
