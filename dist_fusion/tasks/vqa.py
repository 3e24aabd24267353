"""Visual question answering as classification over a fixed list of answers (VQAv2, easy-VQA)."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from dist_fusion.batch import PairBatch, Sample, Supply, answers_to, drawn
from dist_fusion.schema import UserError, section
from dist_fusion.tasks.losses import binary_cross_entropy, soft_binary_cross_entropy
from dist_fusion.tasks.measures import Judged, Score, Verdict
from dist_fusion.types import HeadSpec, Target, Vocabulary, meaning_of


class Answers(NamedTuple):
    """The answers a head can give, in the order of its outputs, and the kinds of questions."""

    number: dict[str, int]
    kinds: tuple[str, ...]  # the last is "other"


@section
@dataclass(frozen=True)
class Vqa:
    """Several questions to one image, which is encoded once."""

    answers: str = ""  # JSON file {"answers": [...], "kinds": [...]}, written beside the shards
    weight: float = 1.0
    questions_per_image: int = 0  # drawn anew at every visit; 0 is all of them
    attention: float = 1.0

    teachable: ClassVar[bool] = True
    num_images: ClassVar[int] = 1
    limit: ClassVar[str] = "questions_per_image"

    def head(self, vocabulary: Vocabulary) -> HeadSpec:
        answers = list(read_answers(self.answers).number)
        return HeadSpec("classifier", len(answers), meaning=meaning_of(answers))

    def eligible(self, supply: Supply) -> bool:
        return supply.questions > 0

    def lay(self, batch: PairBatch, samples: Sequence[Sample]) -> None:
        """One pair a question. An answer outside the list cannot be given and scores nothing."""
        known = read_answers(self.answers)
        rows: list[tuple[int]] = []
        scores, kinds = [], []
        for sample in samples:
            for question in drawn(sample.questions, self.questions_per_image, f"{sample.visit}/vqa"):
                image, text = batch.image(sample), batch.text(question.text)
                rows.append((batch.pair(sample, image, text, attention=self.attention),))
                row = torch.zeros(len(known.number))
                for answer, score in question.answers.items():
                    if answer in known.number:
                        row[known.number[answer]] = score
                scores.append(row)
                kinds.append(known.kinds.index(question.kind if question.kind in known.kinds else "other"))
        labels = torch.stack(scores) if scores else torch.zeros(0, len(known.number))
        batch.ask("vqa", answers_to(rows, 1, labels, kind=kinds))

    def hard_loss(self, logits: Tensor, target: Target) -> Tensor:
        return binary_cross_entropy(logits, target.labels)

    def soft_loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        return soft_binary_cross_entropy(student, teacher)

    def judge(self, logits: Tensor, target: Target) -> Verdict:
        """The score of the answer given (VQA's soft accuracy); a question that no answer fits scores 0, and counts."""
        answer = logits.argmax(-1)
        best, label = target.labels.max(-1)
        score = target.labels.gather(1, answer[:, None]).squeeze(1)
        return Verdict(label.masked_fill(best <= 0, -1), answer, score)

    def kinds(self) -> tuple[str, ...]:
        return read_answers(self.answers).kinds

    def classes(self) -> tuple[str, ...]:
        return ()

    def measures(self, judged: Judged) -> dict[str, Score]:
        return {}


@cache
def read_answers(path: str, wanted_by: str = "tasks.vqa.answers") -> Answers:
    """The answer list of a data set; raises UserError, naming the key `wanted_by`, if the file is missing or wrong."""
    try:
        tree = json.loads(Path(path).read_text())
        return Answers({answer: i for i, answer in enumerate(tree["answers"])}, (*tree.get("kinds", ()), "other"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{wanted_by} is {path!r}: {type(error).__name__}: {error}; "
            'it must be a JSON file {"answers": [...], "kinds": [...]}, as `dist-fusion prepare` writes'
        ) from None
