"""Answering questions about images: transformers' ViLT, our teacher, the student, and the student half done beforehand.

Images and texts that are encoded beforehand leave the student with the fusion of the pair and its head. That is what a
dual encoder is for, and where Huang and Guo measure 2.8 to 2.9 times their teacher's speed.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
import transformers
from torch import nn

from dist_fusion.batch import PairBatch, answers_to
from dist_fusion.bench.captions import VOCABULARY, captioned
from dist_fusion.bench.hugging_face import build_pair
from dist_fusion.bench.teacher import TOLERANCE
from dist_fusion.bench.timing import PEAKS, Run, interleaved, quantiles, spread
from dist_fusion.models.config import ModelConfig
from dist_fusion.models.student import Student
from dist_fusion.types import Batch, HeadSpec, to_device

HEADS = {"vqa": HeadSpec("classifier", 3129)}
PRECISIONS = {"cpu": torch.float32, "cuda": torch.float16}
"""Of all models, by kind of device."""


class Row(NamedTuple):
    """How long each way takes to answer a batch. Times are 20th, 50th and 80th percentiles."""

    case: str
    sizes: Mapping[str, object]
    ms: dict[str, list[float]]  # by way
    least_ms: dict[str, float]
    times_as_fast: dict[str, float]  # as our teacher, by the least times
    peak_mb: dict[str, float | None]  # above what was there before; None where it cannot be known
    rounds: int

    def line(self) -> str:
        """The row for people: a line a way."""
        return "\n".join(
            f"{self.case:<16} {way:<24} {self.times_as_fast[way]:6.2f}x   {spread(times)} ms"
            for way, times in self.ms.items()
        )


@dataclass(frozen=True)
class Size:
    """How large the comparison is."""

    model: ModelConfig
    batches: tuple[int, ...]  # questions, each to an image of its own
    seconds: float  # a batch size


FULL = {
    "cpu": Size(ModelConfig(dropout=0.0), (1, 8), seconds=25),
    "cuda": Size(ModelConfig(dropout=0.0), (1, 32), seconds=10),
}
QUICK = Size(
    ModelConfig(width=32, num_heads=2, num_layers=2, num_fusion_layers=2, image_size=64, dropout=0.0), (1, 3), seconds=0
)


def rows(device: torch.device, quick: bool) -> Iterator[Row]:
    """One row a batch size, each after a check that our teacher says what transformers' ViLT says."""
    size = QUICK if quick else FULL[device.type]
    dtype = PRECISIONS[device.type]
    torch.manual_seed(0)
    teacher, peer = build_pair(replace(size.model, kind="fusion-encoder"), HEADS, VOCABULARY.size)
    student = Student(size.model, HEADS, VOCABULARY.size).eval()
    for model in (teacher, peer, student):
        model.to(device, dtype)
    for count in size.batches:
        batch: Batch = to_device(questions(size.model, count), device)
        their = peer(batch, maps=False)["vqa"]
        with torch.inference_mode():
            our = teacher(batch).logits["vqa"]
        torch.testing.assert_close(our, their, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
        runs: dict[str, Run] = {f"transformers {transformers.__version__} ViLT": partial(peer, batch, maps=False)}
        runs |= ways(teacher, student, [batch])
        taken = interleaved(runs, device, size.seconds)
        least = {way: min(times) for way, times in taken.items()}
        yield Row(
            case=f"batch {count}",
            sizes={
                "questions": count,
                "text_tokens": batch.text_ids.shape[1],
                "dtype": str(dtype),
                "layers": size.model.num_layers,
                "width": size.model.width,
                "image": size.model.image_size,
            },
            ms={way: quantiles(times) for way, times in taken.items()},
            least_ms={way: round(time, 3) for way, time in least.items()},
            times_as_fast={way: round(least["teacher"] / time, 3) for way, time in least.items()},
            peak_mb={way: PEAKS[device.type](run) for way, run in runs.items()},
            rounds=len(taken["teacher"]),
        )


def ways(teacher: nn.Module, student: Student, batches: Sequence[Batch]) -> dict[str, Run]:
    """The teacher, and the student with nothing, the texts, the images, and both encoded beforehand."""
    with torch.inference_mode():
        encoded = [(batch, student.encode_texts(batch), student.encode_images(batch)) for batch in batches]
    runs: dict[str, Callable[[], object]] = {
        "teacher": lambda: [teacher(batch) for batch in batches],
        "student": lambda: [student(batch) for batch in batches],
        "texts beforehand": lambda: [
            student.fuse(batch, text, student.encode_images(batch)) for batch, text, _ in encoded
        ],
        "images beforehand": lambda: [
            student.fuse(batch, student.encode_texts(batch), image) for batch, _, image in encoded
        ],
        "both beforehand": lambda: [student.fuse(*one) for one in encoded],
    }
    return {way: torch.inference_mode()(run) for way, run in runs.items()}


def questions(config: ModelConfig, images: int, per_image: int = 1) -> Batch:
    """Made-up questions to made-up images."""
    batch = PairBatch(VOCABULARY, config.image_size, config.max_text_length, pad_multiple=8)
    samples = captioned(images * per_image, config.image_size)
    rows = [
        batch.pair(samples[n // per_image], batch.image(samples[n // per_image]), batch.text(one.texts[0]), attention=0)
        for n, one in enumerate(samples)
    ]
    batch.ask("vqa", answers_to([(row,) for row in rows], 1, torch.zeros(len(rows), HEADS["vqa"].num_outputs)))
    return batch.build()
