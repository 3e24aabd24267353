"""How well rows are judged: scores, and what only all rows together can tell."""

from collections import Counter
from collections.abc import Sequence
from math import fsum
from typing import NamedTuple

from torch import Tensor


class Verdict(NamedTuple):
    """What a task's head said of each row of a batch."""

    label: Tensor  # [R] int64: what was right, as a number; -1 if nothing was
    answer: Tensor  # [R] int64: what was said
    score: Tensor  # [R] float, 0 to 1


class Judged(NamedTuple):
    """The rows of a whole pass that count, those of all ranks."""

    kind: Tensor  # [R] int64
    group: Tensor  # [R] int64 content id
    label: Tensor  # [R] int64
    answer: Tensor  # [R] int64
    score: Tensor  # [R] float64


class Score(NamedTuple):
    """The sum of the scores of some rows, and how many rows."""

    total: float
    rows: int

    @property
    def percent(self) -> float:
        """The mean in percent, nan without rows."""
        return 100 * self.total / self.rows if self.rows else float("nan")

    def __add__(self, other: "Score") -> "Score":  # type: ignore[override]
        return Score(self.total + other.total, self.rows + other.rows)


class Confusion(NamedTuple):
    """How often each label got each answer."""

    classes: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]  # [label][answer]


def pick_class(logits: Tensor, labels: Tensor) -> Verdict:
    """logits [R, C], labels [R]: the likeliest class is right or wrong."""
    answer = logits.argmax(-1)
    return Verdict(labels, answer, (answer == labels).float())


def score_by_kind(judged: Judged, kinds: Sequence[str]) -> dict[str, Score]:
    """The score of each kind that has rows; the same to the last bit in any order of the rows."""
    scores = {}
    for number, name in enumerate(kinds):
        values = judged.score[judged.kind == number].tolist()
        if values:
            scores[name] = Score(fsum(values), len(values))
    return scores


def consistency(judged: Judged) -> Score:
    """How many groups have all of their rows right (NLVR2, arXiv:1811.00491)."""
    groups, failed = len(judged.group.unique()), len(judged.group[judged.score < 1].unique())
    return Score(groups - failed, groups)


def confusion(judged: Judged, classes: Sequence[str]) -> Confusion:
    """The counts of every label and answer among `classes`."""
    seen = Counter(zip(judged.label.tolist(), judged.answer.tolist(), strict=True))
    each = range(len(classes))
    return Confusion(tuple(classes), tuple(tuple(seen[label, answer] for answer in each) for label in each))
