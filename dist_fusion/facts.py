"""What a recipe costs, before anything runs: parameters, multiply-adds, and the memory of a rank.

The student and its teacher run as they are, on tensors without data, over one micro-batch with the longest texts that
the recipe allows. So a new task, head, fusion or teacher is counted without a word here.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from random import Random
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from dist_fusion.batch import PairBatch, Question, Sample, Statement, Text
from dist_fusion.config import Config
from dist_fusion.distill import objective, row_weights
from dist_fusion.engine.sharding import Sharding, ds_config, sharding
from dist_fusion.models.execution import set_execution
from dist_fusion.models.teachers import PRECISIONS, Lesson, Teacher, TeacherConfig
from dist_fusion.models.weights import ModelCard, build_model
from dist_fusion.tasks import Task
from dist_fusion.types import Batch, Vocabulary

ASSUMED = 5
"""Texts, or questions, of an image where the recipe takes all that there are."""


class Part(NamedTuple):
    """What a part of a model costs."""

    parameters: int
    multiply_adds: float  # of its forward, a sample


class Memory(NamedTuple):
    """Bytes of one rank when its forward has ended, an estimate."""

    weights: float
    gradients: float
    optimizer: float  # fp32 copies of half-precision weights, and two moments of each
    buffers: float  # in which gradients, and at stage 3 weights, travel between ranks
    teacher: float  # never sharded
    activations: float  # of one micro-batch: what is kept for its backward pass
    on_host: float = 0.0  # of the optimizer, where it is offloaded

    @property
    def on_device(self) -> float:
        """All but what is on the host."""
        return sum(self) - self.on_host


class Facts(NamedTuple):
    """What a recipe costs on some number of ranks."""

    student: dict[str, Part]
    teacher: dict[str, Part]  # of all teachers together; empty without one
    memory: Memory
    sharding: Sharding
    shape: str  # of the sample that was counted, in words


def measure(config: Config, card: ModelCard, ranks: int, teachers: Sequence[Teacher]) -> Facts:
    """The facts of what `config` trains on so many ranks, with its teachers or others of their sizes.

    Raises UserError like `ds_config`.
    """
    tasks, size, samples = config.active_tasks(), config.model.image_size, config.micro_batch(ranks)
    shards = sharding(ds_config(config, ranks))
    laid = longest_batch(config, card, samples)
    rows = row_weights([laid], tasks)
    with torch.device("meta"):
        student = build_model(card).to(shards.dtype)
    set_execution(student, activation_checkpointing=config.activation_checkpointing, compile=False)
    with FakeTensorMode(allow_non_fake_inputs=True):
        batch = laid._replace(images=torch.empty(len(laid.images), 3, size, size))
        student.to_empty(device="cpu")
        lessons: list[Lesson] = []
        taught: dict[str, Part] = {}
        for teacher in teachers:
            with flop_counter() as counts, torch.no_grad():
                output = teacher.model(batch)
            lessons.append(Lesson(output, teacher.weight, teacher.soft, teacher.head_map))
            for name, part in _parts(teacher.model, counts, samples).items():
                known = taught.get(name, Part(0, 0.0))
                taught[name] = Part(known.parameters + part.parameters, known.multiply_adds + part.multiply_adds)
        with flop_counter() as counts, kept_for_backward() as kept:
            objective(config.distill, tasks, batch, student(batch), lessons, rows)
    own = _parts(student, counts, samples)
    rows_of = {"images": laid.images, "texts": laid.text_ids, "pairs": laid.pairs}
    counted = ", ".join(f"{name} {len(part) / samples:.3g}" for name, part in rows_of.items())
    return Facts(
        student=own,
        teacher=taught,
        memory=static_memory(shards, sum(part.parameters for part in own.values()), ranks)._replace(
            teacher=float(sum(_bytes(*both, shards.dtype) for both in zip(teachers, config.teachers, strict=True))),
            activations=float(kept_bytes(kept, student)),
        ),
        sharding=shards,
        shape=f"{counted}, {laid.text_ids.shape[1]} tokens a text",
    )


def _bytes(teacher: Teacher, config: TeacherConfig, half: torch.dtype) -> int:
    """Of a teacher's weights; where the student trains in half precision there is a GPU, and `auto` is fp16."""
    dtype = PRECISIONS[config.precision] or half
    return dtype.itemsize * sum(parameter.numel() for parameter in teacher.model.parameters())


def static_memory(sharding: Sharding, parameters: int, ranks: int) -> Memory:
    """What a rank holds of `parameters` whatever the batch, without a teacher (ZeRO, arXiv:1910.02054).

    Stage 1 shards the optimizer, 2 the gradients too, 3 the weights too, of which some are gathered again when needed.
    """
    size, share = sharding.dtype.itemsize, parameters / (ranks if sharding.stage else 1)
    copied = sharding.stage > 0 or sharding.dtype != torch.float32  # ZeRO steps on fp32 weights of its own
    optimizer = share * (12 if copied else 8)
    gathered = min(parameters, sharding.live) if sharding.stage == 3 else 0
    return Memory(
        weights=size * (share if sharding.stage == 3 else parameters),
        gradients=0.0 if sharding.offload else size * (share if sharding.stage >= 2 else parameters),
        optimizer=0.0 if sharding.offload else optimizer,
        buffers=float(size * (sharding.bucket + gathered)),
        teacher=0.0,
        activations=0.0,
        on_host=optimizer + 4 * share if sharding.offload else 0.0,  # with the gradients in fp32
    )


def saved_size(facts: Facts) -> float:
    """Bytes of a checkpoint: the weights as they are, and in fp32 what the optimizer keeps of each."""
    return sum(part.parameters for part in facts.student.values()) * (facts.sharding.dtype.itemsize + 12.0)


def saved_share(facts: Facts, ranks: int) -> float:
    """Bytes of it that rank 0 writes, which has the most: the weights, and its share of what the optimizer keeps."""
    parameters = sum(part.parameters for part in facts.student.values())
    return parameters * (facts.sharding.dtype.itemsize + 12.0 / (ranks if facts.sharding.stage else 1))


def longest_batch(config: Config, card: ModelCard, count: int) -> Batch:
    """What the tasks lay out of `count` samples with the longest texts, one pixel an image."""
    vocabulary = Vocabulary(len(card.vocabulary), 0, 0, 0, 0)
    pairs = PairBatch(vocabulary, 1, config.model.max_text_length, 1)
    for task in config.active_tasks().values():
        task.lay(pairs, [_longest_sample(config, task, vocabulary.size, position) for position in range(count)])
    return pairs.build()


def _longest_sample(config: Config, task: Task, words: int, position: int) -> Sample:
    """A sample with all that a task can ask for, the same at a position for every task but for what it looks at."""
    draw, visit, images = Random(position), f"longest/{position}", range(task.num_images)
    texts = [_longest_text(config, words, draw) for _ in range(config.data.texts_per_image or ASSUMED)]
    asked = range(getattr(task, task.limit) or ASSUMED) if task.limit else range(1)
    questions = [_longest_text(config, words, draw) for _ in asked]
    label = next(iter(task.classes()), "")
    return Sample(
        images=tuple(torch.zeros(3, 1, 1) for _ in images),
        image_ids=tuple(2 * position + slot for slot in images),
        texts=tuple(texts),
        captions=frozenset(text.content for text in texts),
        questions=tuple(Question(f"{visit}/{n}", text, {}, "") for n, text in enumerate(questions)),
        statements=tuple(Statement(f"{visit}/{n}", text, label, "") for n, text in enumerate(questions)),
        position=position,
        visit=visit,
    )


def _longest_text(config: Config, words: int, draw: Random) -> Text:
    inner = range(config.model.max_text_length - 2)
    return Text((0, *(draw.randrange(words) for _ in inner), 0), (None, *inner, None))


@contextmanager
def kept_for_backward() -> Iterator[dict[StorageWeakRef, int]]:
    """The memory that autograd keeps of what is computed inside, parameters included: bytes by storage."""
    kept: dict[StorageWeakRef, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[StorageWeakRef(storage)] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept


def kept_bytes(kept: Mapping[StorageWeakRef, int], model: nn.Module) -> int:
    """Of what `kept_for_backward` saw, without the parameters of `model`."""
    parameters = {StorageWeakRef(parameter.untyped_storage()) for parameter in model.parameters()}
    return sum(size for storage, size in kept.items() if storage not in parameters)


def flop_counter() -> FlopCounterMode:
    """Counts every operation, and the attention of CPUs, by which tensors without data attend, and its backward."""
    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    return FlopCounterMode(display=False, custom_mapping={forward: _attention, backward: _attention_backward})


def _attention(query: torch.Size, key: torch.Size, value: torch.Size, *_: object, **__: object) -> int:
    operations: int = sdpa_flop_count(query, key, value)
    return operations


def _attention_backward(
    gradient: torch.Size, query: torch.Size, key: torch.Size, value: torch.Size, *_: object, **__: object
) -> int:
    operations: int = sdpa_backward_flop_count(gradient, query, key, value)
    return operations


def _parts(model: nn.Module, counter: FlopCounterMode, samples: int) -> dict[str, Part]:
    counts, whole = counter.get_flop_counts(), type(model).__name__

    def multiply_adds(part: nn.Module, path: str) -> float:
        """Of a part that is called, or else of its parts: a dictionary of modules is not called itself."""
        if path in counts:
            return sum(counts[path].values()) / 2 / samples
        return sum(multiply_adds(child, f"{path}.{name}") for name, child in part.named_children())

    return {
        name: Part(sum(p.numel() for p in part.parameters()), multiply_adds(part, f"{whole}.{name}"))
        for name, part in model.named_children()
    }


def flops(card: ModelCard, teachers: Sequence[Teacher], laid: Batch) -> float:
    """Floating-point operations that training on a micro-batch takes, its losses left out.

    The student's way back counts as two forwards, whatever is computed again to save memory; a teacher has none. The
    weights may be anywhere, and no random numbers are drawn.
    """
    with torch.device("meta"):
        student = build_model(card)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        batch = laid._replace(images=torch.empty(laid.images.shape))

        def forward(model: nn.Module) -> int:
            weights = {name: torch.empty(tensor.shape) for name, tensor in model.state_dict().items()}
            with flop_counter() as counts:
                torch.func.functional_call(model, weights, (batch,))
            return counts.get_total_flops()

        return 3 * forward(student) + sum(forward(teacher.model) for teacher in teachers)


def table(facts: Facts) -> str:
    """The facts as text: a row a part, the teacher's beside the student's, then the memory."""
    models = [model for model in (facts.student, facts.teacher) if model]
    names = dict.fromkeys(name for model in models for name in model)
    totals = (Part(*map(sum, zip(*model.values(), strict=True))) for model in models)
    memory = facts.memory
    held = [f"{name.replace('_', ' ')} {_gib(size)}" for name, size in zip(memory._fields, memory, strict=True) if size]
    return "\n".join(
        [
            "Parameters, and multiply-adds of the forward of a sample at its longest",
            f"({facts.shape}):",
            _row("", *(f"{who:>14} {'x 10^9':>10}" for who in ("student", "teacher")[: len(models)])),
            *(_row(name, *(_cells(model.get(name)) for model in models)) for name in names),
            _row("total", *map(_cells, totals)),
            f"Memory of a rank, an estimate: {_gib(memory.on_device)} GiB",
            f"  {', '.join(held)}",
        ]
    )


def _row(name: str, *cells: str) -> str:
    return f"  {name:<16}{'  '.join(cells)}".rstrip()


def _cells(part: Part | None) -> str:
    return f"{part.parameters:>14,} {part.multiply_adds / 1e9:>10.3f}" if part else " " * 25


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f}"
