"""How long answering takes: the teacher, the student, and the student with images and texts encoded beforehand."""

from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from dist_fusion.bench.captions import VOCABULARY
from dist_fusion.bench.inference import HEADS, questions, ways
from dist_fusion.bench.timing import interleaved
from dist_fusion.demo.split import read_test
from dist_fusion.models.config import ModelConfig
from dist_fusion.models.student import Student
from dist_fusion.models.vilt import Vilt
from dist_fusion.models.weights import restore_model
from dist_fusion.types import Batch

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


def full_size(num_images: int, questions_per_image: int) -> Timing:
    """ViT-B/32-sized models with random weights: 12 layers, 768 wide, 224 pixels, questions of 10 to 15 tokens."""
    teacher = Vilt(ModelConfig(kind="fusion-encoder"), HEADS, VOCABULARY.size).eval()
    student = Student(ModelConfig(), HEADS, VOCABULARY.size).eval()
    batch = questions(ModelConfig(), num_images, questions_per_image)
    return _measure("12 layers, 768 wide (ViT-B/32), random weights", teacher, student, [batch])


def _measure(what: str, teacher: nn.Module, student: nn.Module, batches: list[Batch]) -> Timing:
    assert isinstance(student, Student)
    taken = interleaved(ways(teacher, student, batches), torch.device("cpu"), seconds=0, rounds=REPEATS)
    return Timing(what, sum(len(batch.pairs) for batch in batches), *(min(times) / 1e3 for times in taken.values()))
