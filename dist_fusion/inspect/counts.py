"""How much there is, exactly, from the indices alone: by folder, and what is damaged by reason."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dist_fusion.batch import Supply
from dist_fusion.data.index import Damage, Outline

COLUMNS = ("shards", "samples", "of two images", "texts", "questions", "statements", "damaged")


class Holding(NamedTuple):
    """What the shards of one folder hold that can be used."""

    shards: int
    samples: int
    pairs: int  # samples of two images
    texts: int
    questions: int
    labels: Counter[str]  # of its statements
    damaged: int  # samples, and parts of shards

    def numbers(self) -> tuple[int, ...]:
        """In the order of COLUMNS."""
        return (*self[:5], self.labels.total(), self.damaged)


def holdings(outlines: Sequence[Outline]) -> dict[str, Holding]:
    """What each folder holds, and if there are several, at last what all do."""
    folders: dict[str, list[Outline]] = defaultdict(list)
    for outline in outlines:
        folders[str(Path(outline.shard).parent)].append(outline)
    found = {folder: _holding(some) for folder, some in folders.items()}
    return found if len(found) == 1 else {**found, "all": _holding(outlines)}


def supplies(outlines: Iterable[Outline]) -> Counter[Supply]:
    """How many samples have how much."""
    found: Counter[Supply] = Counter()
    for outline in outlines:
        counts = np.bincount(outline.supply, minlength=len(outline.supplies)).tolist()
        for supply, count in zip(outline.supplies, counts, strict=True):
            found[supply] += count
    return found


def by_reason(damages: Iterable[Damage]) -> dict[str, list[Damage]]:
    """The damages of each reason, the most frequent reason first."""
    found: dict[str, list[Damage]] = defaultdict(list)
    for damage in damages:
        found[damage.reason].append(damage)
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))


def as_text(outlines: Sequence[Outline]) -> str:
    """The counts for a terminal, which nothing that a shard says can command."""
    held = holdings(outlines)
    wide = max(map(len, held))
    lines = [f"{'':<{wide}}" + "".join(f"{name:>15}" for name in COLUMNS)]
    lines += [f"{folder:<{wide}}" + "".join(f"{n:>15,}" for n in one.numbers()) for folder, one in held.items()]
    labels = [*held.values()][-1].labels
    if labels:
        lines.append("labels: " + ", ".join(f"{count:,} {label}" for label, count in labels.most_common()))
    for reason, some in by_reason(damage for outline in outlines for damage in outline.damages).items():
        lines.append(f"{len(some):,} x {reason}; the first: {some[0].told()}")
    return "".join(f"{_printable(line)}\n" for line in lines)


def _holding(outlines: Sequence[Outline]) -> Holding:
    found = supplies(outlines)
    labels: Counter[str] = Counter()
    for supply, count in found.items():
        for label in supply.labels:
            labels[label] += count
    return Holding(
        shards=len(outlines),
        samples=found.total(),
        pairs=sum(count for supply, count in found.items() if supply.images == 2),
        texts=sum(supply.texts * count for supply, count in found.items()),
        questions=sum(supply.questions * count for supply, count in found.items()),
        labels=labels,
        damaged=sum(len(outline.damages) for outline in outlines),
    )


def _printable(line: str) -> str:
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in line)
