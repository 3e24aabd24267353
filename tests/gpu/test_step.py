"""One micro-step on a GPU: what the host asks of it, in which order it works, and whether full size fits."""

import contextlib
import io
from dataclasses import replace
from itertools import islice

import pytest
import torch
from torch.utils._pytree import tree_leaves

from dist_fusion.agreement import attention_readings, few_pairs
from dist_fusion.config import load
from dist_fusion.data.stream import DataConfig, Loaded, Plan, Stream, load_batches
from dist_fusion.data.text import Tokenizer
from dist_fusion.distill import DistillConfig, objective, row_weights
from dist_fusion.engine.optimizer import build_engine, gradient_norm, skipped
from dist_fusion.facts import longest_batch
from dist_fusion.models.execution import Aside
from dist_fusion.models.teachers import Teacher, teach
from dist_fusion.models.weights import build_model
from dist_fusion.monitor.interval import Interval
from dist_fusion.parts import model_card
from dist_fusion.types import Batch, Target, to_device
from tests import tiny
from tests.gpu.waiting import counted_waits, no_waiting

pytestmark = pytest.mark.gpu
GIB = 2**30
SETS = {"pre-training": (tiny.PRETRAINING, tiny.TEACHING), "fine-tuning": (tiny.FINETUNING, tiny.FINETUNING)}


class Step:
    """Everything that a micro-step of a small student in fp16 needs, by one of SETS."""

    def __init__(self, which: str, device: torch.device, teacher_stream: bool = False):
        self.tasks, taught = SETS[which]
        self.device, self.aside, self.interval = device, Aside(device, teacher_stream), Interval(device, 8, 10)
        sizes = {"num_slots": 2, "width": 64}
        self.student = tiny.model(tiny.model_config(**sizes), self.tasks).half().to(device)
        teacher = tiny.model(tiny.model_config("fusion-encoder", **sizes), taught, seed=1).half().to(device)
        teacher.requires_grad_(False).eval()
        self.teachers = [Teacher(teacher, 1.0, frozenset(taught), head_map) for head_map in (None, (1, 0))]

    def __call__(self, start: int) -> torch.Tensor:
        laid = tiny.batch(self.tasks, tiny.samples(8, start=start, paired=self.tasks is tiny.FINETUNING))
        self.interval.fetch(iter([Loaded(laid, ())]), 1)
        rows, batch = to_device(row_weights([laid], self.tasks), self.device), to_device(laid, self.device)
        with self.aside, self.interval.phase("teacher"):
            lessons = teach(self.teachers, batch)
        output, distill = self.student(batch), DistillConfig(targets="both", soft=1.0)
        loss = objective(distill, self.tasks, batch, output, self.aside.joined(lessons), rows)
        self.readings = attention_readings(output.taps, lessons, few_pairs(laid.weights["attention"]))
        loss.total.backward()
        self.interval.add(loss.total, loss.terms)
        return loss.total.detach()


@pytest.mark.parametrize("teacher_stream", [False, True])
@pytest.mark.parametrize("which", SETS)
def test_a_step_reads_nothing_from_the_gpu_and_a_log_step_reads_once(device, which, teacher_stream):
    """Without DeepSpeed's own step, which reads the norm of the gradients."""
    step = Step(which, device, teacher_stream)
    step(0)  # what is done once: memory, kernels, plans of convolutions
    with no_waiting():
        loss = step(8)
    assert loss.isfinite()
    norm = torch.ones((), device=device)
    with counted_waits() as waits:
        values = step.interval.read(2, norm, step.readings)
    assert len(waits) == 1
    assert values["health/nonfinite"] == 0 and values["optimizer/gradient_norm"] == 1


def test_a_teacher_on_its_own_stream_says_the_same(device):
    """While both streams have so much to do that a missing wait would be seen."""
    alone, beside = (Step("pre-training", device, wanted) for wanted in (False, True))
    for start in range(0, 160, 8):
        expected = alone(start)
        torch.cuda._sleep(2_000_000)
        torch.testing.assert_close(beside(start), expected, rtol=1e-3, atol=1e-3)
    ours, theirs = (
        torch.cat([p.grad.float().flatten() for p in step.student.parameters()]) for step in (beside, alone)
    )
    assert (ours - theirs).norm() < 0.02 * theirs.norm()


def test_what_is_made_aside_waits_for_its_inputs_and_is_waited_for(device):
    """With the inputs late, then with the result late, and the same memory again and again."""
    aside = Aside(device, wanted=True)
    for number in range(20):
        torch.cuda._sleep(2_000_000)
        given = torch.full((1000,), float(number), device=device)
        with aside:
            doubled = given * 2
            torch.cuda._sleep(2_000_000)
            made = doubled + 1
        assert torch.equal(aside.joined(made) - 1, torch.full((1000,), 2.0 * number, device=device))


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_lie_in_pinned_memory_and_keep_their_form(shards, workers):
    data = DataConfig(shards=(str(shards),), vocabulary=str(shards / "vocab.txt"))
    stream = Stream(data, tiny.PRETRAINING, Tokenizer(data.vocabulary, 12), 16, Plan(8, 0, 1, 0))
    plain = list(islice(load_batches(stream, 0), 2))
    pinned = list(islice(load_batches(stream, workers, pin=True), 2))
    for ours, theirs in zip(pinned, plain, strict=True):
        assert isinstance(ours, Loaded) and isinstance(ours.batch, Batch)
        assert all(isinstance(target, Target) for target in ours.batch.targets.values())
        tensors = tree_leaves(ours.batch)
        assert all(tensor.is_pinned() for tensor in tensors)
        assert all(map(torch.equal, tensors, tree_leaves(theirs.batch)))


def test_a_step_at_full_size_in_fp16_fits_and_learns(device, record_property):
    """Student, teacher and ZeRO-2 of the paper's recipe with 32 samples of the longest texts."""
    ours = ["deepspeed=zero2-fp16", "global_batch=32", "optimizer.warmup=0.0"]
    config = load("pretrain", ours)
    tasks = config.active_tasks()
    card = model_card(config, Tokenizer(config.data.vocabulary, config.model.max_text_length))
    torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(0)
    taught = {task: card.heads[task] for task in config.soft_tasks(config.teachers[0])}
    with device:
        student = build_model(card)
        teacher = build_model(card._replace(config=replace(card.config, kind="fusion-encoder"), heads=taught)).half()
    teachers = [Teacher(teacher.requires_grad_(False).eval(), 1.0, frozenset(taught), None)]
    with contextlib.redirect_stdout(io.StringIO()):
        engine = build_engine(student, config, 1)
    laid = longest_batch(config, card, 32)
    size = config.model.image_size
    laid = laid._replace(images=torch.randn(len(laid.images), 3, size, size))
    batch, rows = to_device(laid, device), to_device(row_weights([laid], tasks), device)
    losses = []
    for _ in range(8):
        loss = objective(config.distill, tasks, batch, engine(batch), teach(teachers, batch), rows)
        engine.backward(loss.total)
        engine.step()
        losses.append(loss.total.item())
    record_property("peak_gib", round(torch.cuda.max_memory_allocated() / GIB, 2))
    record_property("losses", [round(loss, 3) for loss in losses])
    assert all(map(torch.isfinite, torch.tensor(losses)))
    assert skipped(engine)["optimizer/skipped_steps"] < 6
    assert gradient_norm(engine).isfinite()
    assert min(losses[4:]) < losses[0]
