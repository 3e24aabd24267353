"""One optimizer step of the recipe `pretrain` as `train.fit` runs it, with plain AdamW in the place of DeepSpeed."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from dist_fusion.batch import PairBatch
from dist_fusion.bench.captions import VOCABULARY, captioned
from dist_fusion.config import Config, OptimizerConfig, load
from dist_fusion.distill import Loss, objective, row_weights
from dist_fusion.engine.optimizer import parameter_groups
from dist_fusion.models.student import Student
from dist_fusion.models.teachers import Lesson, Teacher, teach
from dist_fusion.models.vilt import Vilt
from dist_fusion.tasks import Task
from dist_fusion.types import Batch, HeadSpec, to_device


class AdamW:
    """torch's fused AdamW on fp32 copies of half-precision weights (on fp32 weights themselves), and a clipped norm.

    So does DeepSpeed, whose copies are one flat tensor a rank.
    """

    def __init__(self, model: nn.Module, config: OptimizerConfig):
        groups = parameter_groups(model, config)
        self.weights: list[Tensor] = [weight for group in groups for weight in group["params"]]
        self.copies = [nn.Parameter(w.detach().float()) if w.dtype != torch.float32 else w for w in self.weights]
        own = dict(zip(self.weights, self.copies, strict=True))
        self.clip = config.clip
        self.torch_adamw = torch.optim.AdamW(
            [{**group, "params": [own[weight] for weight in group["params"]]} for group in groups],
            betas=config.betas,
            eps=config.epsilon,
            fused=True,
        )

    def step(self) -> None:
        """One step on the gradients that are there, which are gone afterwards."""
        halves = [(w, copy) for w, copy in zip(self.weights, self.copies, strict=True) if w is not copy]
        for weight, copy in halves:
            if weight.grad is None or copy.grad is None:
                copy.grad = None if weight.grad is None else weight.grad.float()
            else:  # new memory at every step would take longer than AdamW
                copy.grad.copy_(weight.grad)
        if self.clip:
            clip_grad_norm_(self.copies, self.clip)
        self.torch_adamw.step()
        for weight in self.weights:
            weight.grad = None
        with torch.no_grad():
            for weight, copy in halves:
                weight.copy_(copy)


class Pretraining(NamedTuple):
    """A student on its way, and the batch it is given at every step."""

    config: Config
    tasks: dict[str, Task]
    student: Student
    teachers: tuple[Teacher, ...]
    batch: Batch  # as the loader gives it
    optimizer: AdamW
    device: torch.device

    def moved(self) -> Batch:
        """The batch on the device."""
        moved: Batch = to_device(self.batch, self.device)
        return moved

    def objective(self, batch: Batch, lessons: Iterable[Lesson]) -> Loss:
        """The student's forward and its loss."""
        rows = row_weights([self.batch], self.tasks).to(self.device)
        return objective(self.config.distill, self.tasks, batch, self.student(batch), tuple(lessons), rows)

    def loss(self) -> Loss:
        """All of a step's forward."""
        batch = self.moved()
        return self.objective(batch, teach(self.teachers, batch))

    def step(self) -> None:
        """One optimizer step."""
        self.loss().total.backward()
        self.optimizer.step()


def recipe(samples: int, overrides: Iterable[str]) -> Config:
    """The recipe `pretrain` with a batch of so many samples, all of them one block."""
    return load("pretrain", [f"global_batch={samples}", f"tasks.itm.block={samples}", *overrides])


def heads(config: Config) -> dict[str, HeadSpec]:
    """Those of the recipe's tasks."""
    return {name: task.head(VOCABULARY) for name, task in config.active_tasks().items()}


def lay(config: Config, pad_multiple: int) -> Batch:
    """What the recipe's tasks lay out of made-up samples."""
    size, samples = config.model.image_size, captioned(config.global_batch, config.model.image_size)
    pairs = PairBatch(VOCABULARY, size, config.model.max_text_length, pad_multiple)
    for task in config.active_tasks().values():
        task.lay(pairs, samples)
    return pairs.build()


def build(
    config: Config, teacher: Vilt, dtype: torch.dtype, teacher_dtype: torch.dtype, device: torch.device
) -> Pretraining:
    """A new student in `dtype`, with a teacher in its own."""
    student = Student(config.model, heads(config), VOCABULARY.size).to(device, dtype)
    frozen = teacher.requires_grad_(False).eval().to(device, teacher_dtype)
    return Pretraining(
        config=config,
        tasks=config.active_tasks(),
        student=student,
        teachers=(Teacher(frozen, 1.0, frozenset(config.soft_tasks(config.teachers[0])), None),),
        batch=lay(config, config.data.pad_multiple),
        optimizer=AdamW(student, config.optimizer),
        device=device,
    )
