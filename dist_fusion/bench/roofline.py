"""What one step of pre-training must cost on the device at hand, part by part, and how near to that it comes.

The floor of a part is the longer of two times: its bytes at the best measured rate of a copy or of a change in place
(a CPU's copy also reads what it overwrites, so it is the slower of the two), and its multiply-adds at the best rate of
a matrix product. Bytes are what every operation reads and writes, as if nothing stayed in a cache; so a part of small
tensors can be faster than its floor.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dist_fusion.bench import pretraining
from dist_fusion.bench.captions import VOCABULARY
from dist_fusion.bench.pretraining import Pretraining
from dist_fusion.bench.step import FULL as FULL_STEP
from dist_fusion.bench.step import QUICK as QUICK_STEP
from dist_fusion.bench.step import Size
from dist_fusion.bench.timing import interleaved, quantiles, spread
from dist_fusion.distill import objective, row_weights
from dist_fusion.facts import flop_counter
from dist_fusion.models.teachers import teach
from dist_fusion.models.vilt import Vilt

TEACHER = {
    "text_embedding": "teacher: embeddings",
    "image_embedding": "teacher: embeddings",
    "encoder": "teacher: encoder",
    "pool": "teacher: heads",
    "heads": "teacher: heads",
}
"""What the teacher's children count to."""
STUDENT = {
    "text_embedding": "student: text tower",
    "text_tower": "student: text tower",
    "image_embedding": "student: image tower",
    "image_tower": "student: image tower",
    "fusion": "student: fusion",
    "heads": "student: heads",
}
"""What the student's children count to."""
GATHERS = {torch.ops.aten.embedding.default, torch.ops.aten.index.Tensor, torch.ops.aten.index_select.default}
"""Operations that read of their first input only the rows that they return."""
OVERWRITES = {torch.ops.aten.copy_.default, torch.ops.aten.fill_.Scalar, torch.ops.aten.zero_.default}
"""Operations that do not read what they change."""
UNCHANGED = {torch.ops.aten._fused_adamw_.default: ("grads",)}
"""What operations say they change, and do not (unless they undo a scaling of the loss)."""


class Rate(NamedTuple):
    """What the device can do, measured."""

    case: str
    sizes: Mapping[str, object]
    ms: list[float]  # 20th, 50th and 80th percentile
    per_second: float  # bytes, or multiply-adds, at the least time

    def line(self) -> str:
        """The row for people."""
        unit = "GB" if "bytes" in self.sizes else "G multiply-adds"
        return f"{self.case:<32} {self.per_second / 1e9:10,.1f} {unit} a second   {spread(self.ms)} ms"


class Part(NamedTuple):
    """What a part of the step costs, must cost, and takes."""

    case: str
    multiply_adds: int
    bytes: int
    floor_ms: float
    bound: str  # what the floor comes of
    ms: list[float]  # 20th, 50th and 80th percentile
    least_ms: float
    share: float  # of the floor in the least time
    utilisation: float  # of the matrix rate in the least time (MFU)

    def line(self) -> str:
        """The row for people."""
        return (
            f"{self.case:<32} {self.multiply_adds / 1e9:10,.1f} G multiply-adds {self.bytes / 1e9:8,.2f} GB   floor "
            f"{self.floor_ms:9,.1f} ms ({self.bound})   takes {spread(self.ms)} ms   share {100 * self.share:3.0f} %   "
            f"MFU {100 * self.utilisation:3.0f} %"
        )


@dataclass(frozen=True)
class Probe:
    """How large the tensors are whose copies and products are measured."""

    copied: int  # bytes
    square: int  # rows of a square matrix


FULL = {"cpu": Probe(2**28, 2048), "cuda": Probe(2**31, 8192)}
QUICK = Probe(2**20, 64)
PRECISIONS = {"cpu": torch.float32, "cuda": torch.float16}
"""Of the step, by kind of device."""
ROUNDS = 5


class ByteCounter(TorchDispatchMode):
    """Counts what operations read and write: their inputs once, and what is new or changed. Views cost nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        known = {x.untyped_storage().data_ptr() for x in given}
        returned = (x for x in tree_leaves(out) if isinstance(x, Tensor))
        new = sum(_bytes(x) for x in returned if x.untyped_storage().data_ptr() not in known)
        names = [argument.name for argument in func._schema.arguments]
        changed = [
            a.name
            for a in func._schema.arguments
            if a.alias_info is not None and a.alias_info.is_write and a.name not in UNCHANGED.get(func, ())
        ]
        by_name = {**dict(zip(names, args, strict=False)), **kwargs}
        written = new + sum(
            _bytes(x) for name in changed for x in tree_leaves(by_name.get(name)) if isinstance(x, Tensor)
        )
        if written:
            read = new if func in GATHERS else sum(map(_bytes, given[1:] if func in OVERWRITES else given))
            self.total += written + read
        return out


def _bytes(tensor: Tensor) -> int:
    """Of memory, which an expanded tensor has less of than elements."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


class Tape:
    """Readings of something that grows, at each edge of the parts of a step. Parts lie inside one another."""

    def __init__(self, read: Callable[[], Any]):
        self.read = read
        self.marks: list[tuple[Any, str]] = []  # a reading, and the part that begins there
        self.inside = ["else"]

    def enter(self, part: str) -> None:
        self.inside.append(part)
        self.marks.append((self.read(), part))

    def leave(self) -> None:
        self.inside.pop()
        self.marks.append((self.read(), self.inside[-1]))

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self.enter(name)
        yield
        self.leave()

    @contextmanager
    def children(self, model: nn.Module, parts: Mapping[str, str]) -> Iterator[None]:
        """Whatever child of `model` is called inside is its part."""
        hooks = []
        for name, child in model.named_children():
            for called in child.values() if isinstance(child, nn.ModuleDict) else (child,):
                hooks += [
                    called.register_forward_pre_hook(lambda _, given, part=parts[name]: self.enter(part)),
                    called.register_forward_hook(lambda _, given, out: self.leave()),
                ]
        yield
        for hook in hooks:
            hook.remove()


def rows(device: torch.device, quick: bool) -> Iterator[Rate | Part]:
    """The rates of the device, then one row a part of the step, and the whole."""
    size, probe = (QUICK_STEP, QUICK) if quick else (FULL_STEP[device.type], FULL[device.type])
    step = build(size, device)
    rates = list(measure_rates(step, probe, device))
    yield from rates
    copying, multiplying = (
        max(rate.per_second for rate in rates if ("bytes" in rate.sizes) is of_memory) for of_memory in (True, False)
    )
    step.step()  # the first step makes the optimizer's state
    costs = counted(step)
    times = [timed(step, device) for _ in range(ROUNDS + 1)][1:]  # the first warms up
    whole = {"whole step": tuple(map(sum, zip(*costs.values(), strict=True)))}
    for name, (flops, moved) in (costs | whole).items():
        taken = [one[name] if name in one else sum(one.values()) for one in times]
        floors = {"products": 1e3 * flops / 2 / multiplying, "memory": 1e3 * moved / copying}
        bound = max(floors, key=lambda of: floors[of])
        floor = floors[bound]
        if name == "whole step":  # its parts cannot be done at once
            floor = 1e3 * sum(max(f / 2 / multiplying, m / copying) for f, m in costs.values())
        yield Part(
            case=name,
            multiply_adds=flops // 2,
            bytes=moved,
            floor_ms=round(floor, 3),
            bound=bound,
            ms=quantiles(taken),
            least_ms=round(min(taken), 3),
            share=round(floor / min(taken), 3),
            utilisation=round(floors["products"] / min(taken), 3),
        )


def build(size: Size, device: torch.device) -> Pretraining:
    """The step of `dist-fusion bench step`, ours."""
    torch.manual_seed(0)
    config = pretraining.recipe(size.samples, size.overrides)
    specs = pretraining.heads(config)
    soft = config.soft_tasks(config.teachers[0])
    teacher = Vilt(replace(config.model, kind="fusion-encoder"), {task: specs[task] for task in soft}, VOCABULARY.size)
    dtype = PRECISIONS[device.type]
    return pretraining.build(config, teacher, dtype, dtype, device)


def measure_rates(step: Pretraining, probe: Probe, device: torch.device) -> Iterator[Rate]:
    """A copy and a change in place, then products of squares and of the model's own shapes in the step's precision."""
    dtype, width = next(step.student.parameters()).dtype, step.config.model.width
    source = torch.ones(probe.copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    for name, move in {"copy": lambda: target.copy_(source), "change in place": lambda: target.bitwise_not_()}.items():
        taken = interleaved({name: move}, device, seconds=0, rounds=ROUNDS)[name]
        yield Rate(name, {"bytes": 2 * probe.copied}, quantiles(taken), 2e3 * probe.copied / min(taken))
    pairs, (images, *_) = len(step.batch.pairs), step.batch.images.shape
    patches = (step.config.model.image_size // step.config.model.patch_size) ** 2 + 1
    tokens = step.batch.text_ids.shape[1] + patches
    shapes = {
        "product of squares": (probe.square, probe.square, probe.square),
        "product, teacher, wider": (pairs * tokens, width, 4 * width),
        "product, teacher, narrower": (pairs * tokens, 4 * width, width),
        "product, teacher, projection": (pairs * tokens, width, 3 * width),
        "product, image tower, wider": (images * patches, width, 4 * width),
    }
    for name, (m, k, n) in shapes.items():
        a, b = torch.randn(m, k, device=device, dtype=dtype), torch.randn(n, k, device=device, dtype=dtype).T
        out = torch.empty(m, n, device=device, dtype=dtype)
        run = {name: lambda a=a, b=b, out=out: torch.matmul(a, b, out=out)}
        taken = interleaved(run, device, seconds=0, rounds=2 * ROUNDS)[name]
        yield Rate(name, {"m": m, "k": k, "n": n, "dtype": str(dtype)}, quantiles(taken), 1e3 * m * k * n / min(taken))


def trace(step: Pretraining, read: Callable[[], Any]) -> list[tuple[Any, str]]:
    """One step: a reading at each edge, and the part that begins there."""
    tape, (teacher,), config = Tape(read), step.teachers, step.config.distill
    rows = row_weights([step.batch], step.tasks).to(step.device)
    with tape.part("batch to the device"):
        batch = step.moved()
    with tape.part("teacher: else"), tape.children(teacher.model, TEACHER):
        lessons = teach(step.teachers, batch)
    with tape.part("student: else"), tape.children(step.student, STUDENT):
        said = step.student(batch)
    with tape.part("losses of the tasks"):
        learned = objective(replace(config, attention=0.0), step.tasks, batch, said, lessons, rows).total
    # The gradients of the taps are taken by themselves, so that the backward of the divergence stands apart.
    cut = {
        site: tap._replace(query=tap.query.detach().requires_grad_(), key=tap.key.detach().requires_grad_())
        for site, tap in said.taps.items()
    }
    taps, leaves = ([x for tap in some.values() for x in (tap.query, tap.key)] for some in (said.taps, cut))
    with tape.part("attention KL, forward"):
        attention_alone = replace(config, hard=0.0, soft=0.0)
        attended = objective(attention_alone, step.tasks, batch, said._replace(taps=cut), lessons, rows).total
    with tape.part("attention KL, backward"):
        gradients = torch.autograd.grad(attended, leaves)
    with tape.part("backward of all else"):
        torch.autograd.backward([learned, *taps], [torch.ones_like(learned), *gradients])
    with tape.part("clip and AdamW"):
        step.optimizer.step()
    return tape.marks


def counted(step: Pretraining) -> dict[str, tuple[int, int]]:
    """Operations (two a multiply-add) and bytes of each part of a step."""
    with flop_counter() as flops, ByteCounter() as moved:
        marks = trace(step, lambda: (flops.get_total_flops(), moved.total))
    costs: dict[str, tuple[int, int]] = {}
    for (before, part), (after, _) in pairwise(marks):
        so_far = costs.get(part, (0, 0))
        costs[part] = (so_far[0] + after[0] - before[0], so_far[1] + after[1] - before[1])
    return costs


def timed(step: Pretraining, device: torch.device) -> dict[str, float]:
    """Milliseconds of each part of a step."""
    read, elapsed = CLOCKS[device.type]
    times: dict[str, float] = {}
    for (before, part), (after, _) in pairwise(trace(step, read)):
        times[part] = times.get(part, 0.0) + elapsed(before, after)
    return times


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(before: torch.cuda.Event, after: torch.cuda.Event) -> float:
    after.synchronize()
    return before.elapsed_time(after)


CLOCKS: dict[str, tuple[Callable[[], Any], Callable[[Any, Any], float]]] = {
    "cpu": (time.perf_counter, lambda before, after: 1e3 * (after - before)),
    "cuda": (_event, _between),
}
"""By kind of device: what is read at an edge, and the milliseconds between two."""
