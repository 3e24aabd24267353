"""How long answering takes: the teacher, the student, and the student with images and texts encoded beforehand."""

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from random import Random
from typing import NamedTuple

import torch
from torch import nn

from dist_fusion.batch import PairBatch, Question, Sample, Text, answers_to
from dist_fusion.bench.timing import interleaved
from dist_fusion.demo.split import read_test
from dist_fusion.models.config import ModelConfig
from dist_fusion.models.student import Student
from dist_fusion.models.vilt import Vilt
from dist_fusion.models.weights import restore_model
from dist_fusion.types import Batch, HeadSpec, Vocabulary

REPEATS = 3
TIMED_BATCHES = 4  # of 50 images with all their questions


class Timing(NamedTuple):
    """Seconds to answer all of `pairs` questions, the least of some interleaved repeats."""

    what: str
    pairs: int
    teacher: float
    student: float  # with nothing encoded beforehand, and then with the texts, the images, and both
    texts: float
    images: float
    cached: float

    def line(self) -> str:
        """One row of the table, with ratios to the teacher."""
        times = (self.student, self.texts, self.images, self.cached)
        cells = " | ".join(f"{time:.2f} ({self.teacher / time:.2f}x)" for time in times)
        return f"| {self.what} | {self.pairs:,} | {self.teacher:.2f} | {cells} |"


HEADER = (
    "| models | questions | teacher s | student s | texts encoded beforehand | images | both |",
    "|---|---|---|---|---|---|---|",
)


@torch.inference_mode()
def trained(folder: Path, seed: int) -> Timing:
    """The demo's own models on the first test images."""
    runs = folder / f"seed-{seed}"
    (_, teacher), (card, student) = (
        restore_model(runs / name, "the demo's run") for name in ("teacher-vqa", "student-vqa")
    )
    _, stream = read_test(folder, card)
    return _measure(
        "the demo's, trained (3 layers, 96 wide)",
        teacher,
        student,
        [one.batch for one in islice(stream, TIMED_BATCHES)],
    )


@torch.inference_mode()
def full_size(num_images: int, questions_per_image: int) -> Timing:
    """ViT-B/32-sized models with random weights: 12 layers, 768 wide, 224 pixels, questions of 12 tokens."""
    vocabulary = Vocabulary(30522, 0, 101, 102, 103)
    heads = {"vqa": HeadSpec("classifier", 3129)}
    teacher = Vilt(ModelConfig(kind="fusion-encoder"), heads, vocabulary.size).eval()
    student = Student(ModelConfig(), heads, vocabulary.size).eval()
    draw = Random(0)
    batch = PairBatch(vocabulary, 224, 40, 8)
    rows = []
    for n in range(num_images):
        asked = [tuple(draw.randrange(1000, 30000) for _ in range(12)) for _ in range(questions_per_image)]
        texts = [Text(ids, tuple(range(12))) for ids in asked]
        questions = tuple(Question(str(i), text, {}, "") for i, text in enumerate(texts))
        sample = Sample((torch.randn(3, 224, 224),), (n,), (), frozenset(), questions, (), n, str(n))
        rows += [batch.pair(sample, batch.image(sample), batch.text(text), attention=0.0) for text in texts]
    batch.ask("vqa", answers_to([(row,) for row in rows], 1, torch.zeros(len(rows), 3129)))
    built = batch.build()
    return _measure("12 layers, 768 wide (ViT-B/32), random weights", teacher, student, [built])


def _measure(what: str, teacher: nn.Module, student: nn.Module, batches: list[Batch]) -> Timing:
    assert isinstance(student, Student)
    encoded = [(batch, student.encode_texts(batch), student.encode_images(batch)) for batch in batches]
    cases: dict[str, Callable[[], object]] = {
        "teacher": lambda: [teacher(batch) for batch in batches],
        "student": lambda: [student(batch) for batch in batches],
        "texts": lambda: [student.fuse(batch, text, student.encode_images(batch)) for batch, text, _ in encoded],
        "images": lambda: [student.fuse(batch, student.encode_texts(batch), image) for batch, _, image in encoded],
        "cached": lambda: [student.fuse(*one) for one in encoded],
    }
    taken = interleaved(cases, torch.device("cpu"), seconds=0, rounds=REPEATS)
    least = {name: min(times) / 1e3 for name, times in taken.items()}
    return Timing(what, sum(len(batch.pairs) for batch in batches), **least)
