"""Small models and batches that tests share: a few thousand parameters, one thread, no files."""

from collections.abc import Sequence
from dataclasses import replace
from random import Random

import torch
from torch import nn

from dist_fusion.batch import PairBatch, Question, Sample, Statement, Text
from dist_fusion.models.config import ModelConfig
from dist_fusion.models.teachers import Lesson, Teacher, teach
from dist_fusion.models.weights import ModelCard, build_model
from dist_fusion.tasks import TASKS, Task
from dist_fusion.types import Batch, Vocabulary

LABELS = {"nlvr2": ("True", "False"), "snli_ve": ("contradiction", "entailment", "neutral")}
VOCABULARY = Vocabulary(size=40, pad=0, cls=2, sep=3, mask=4)
ENTRIES = tuple(f"word{i}" for i in range(VOCABULARY.size))
PRETRAINING: dict[str, Task] = {"mlm": TASKS["mlm"](), "itm": TASKS["itm"](block=4), "itc": TASKS["itc"](dimensions=8)}
FINETUNING: dict[str, Task] = {
    "nlvr2": TASKS["nlvr2"](),
    "snli_ve": TASKS["snli_ve"](),
    "retrieval": TASKS["retrieval"](block=4, negatives=3),
}
TEACHING = {name: task for name, task in PRETRAINING.items() if name != "itc"}


def model_config(kind: str = "dual-encoder", **changes: object) -> ModelConfig:
    """Three layers, 16 wide, images of 4 patches."""
    small = ModelConfig(
        kind=kind, width=16, num_heads=2, num_layers=3, image_size=16, patch_size=8, max_text_length=12, dropout=0.0
    )
    return replace(small, **changes)


def model(config: ModelConfig, tasks: dict[str, Task], seed: int = 0) -> nn.Module:
    """A new model with heads for `tasks`, its weights large enough that attention is not flat."""
    torch.manual_seed(seed)
    built = build_model(card(config, tasks))
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)
    return built


def card(config: ModelConfig, tasks: dict[str, Task]) -> ModelCard:
    return ModelCard(config, {name: task.head(VOCABULARY) for name, task in tasks.items()}, ENTRIES)


def samples(count: int, seed: int = 0, start: int = 0, captions: int = 10**9, paired: bool = False) -> list[Sample]:
    """Random samples at consecutive positions, one caption of 3 to 8 words and two questions each.

    With `paired` every other sample has two images; then all have two statements.
    """
    made = []
    for position in range(start, start + count):
        draw = Random(f"{seed}/{position}")
        caption = _text(Random(f"caption {seed}/{draw.randrange(captions)}"))
        slots = range(1 + (paired and position % 2))
        names = LABELS["nlvr2" if len(slots) == 2 else "snli_ve"]
        pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(draw.randrange(2**31)))
        questions = tuple(Question(f"{position}/{n}", _text(draw), {}, "") for n in range(2))
        made.append(
            Sample(
                images=tuple(pixels[slot] for slot in slots),
                image_ids=tuple(2 * position + slot for slot in slots),
                texts=(caption,),
                captions=frozenset({caption.content}),
                questions=questions,
                statements=tuple(
                    Statement(f"{position}/{n}", _text(draw), draw.choice(names), str(position)) for n in range(2)
                )
                if paired
                else (),
                position=position,
                visit=f"{seed}/{position}",
            )
        )
    return made


def lessons(teacher: nn.Module, batch: Batch, tasks: Sequence[str] = ("mlm", "itm")) -> tuple[Lesson, ...]:
    """What one teacher of this weight alone says of a batch."""
    return teach([Teacher(teacher, 1.0, frozenset(tasks), None)], batch)


def _text(draw: Random) -> Text:
    words = tuple(draw.randrange(5, VOCABULARY.size) for _ in range(draw.randint(3, 8)))
    return Text((VOCABULARY.cls, *words, VOCABULARY.sep), (None, *range(len(words)), None))


def batch(tasks: dict[str, Task], of: list[Sample], pad_multiple: int = 1) -> Batch:
    """The pair batch that `tasks` lay out of some samples."""
    pairs = PairBatch(VOCABULARY, 16, 12, pad_multiple)
    for task in tasks.values():
        task.lay(pairs, of)
    return pairs.build()
