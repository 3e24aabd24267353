"""What a micro-step does between the loader and the backward pass: teachers, student and objective together."""

import json

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from dist_fusion.distill import DistillConfig, objective, row_weights
from dist_fusion.models.fusion import FUSIONS
from dist_fusion.models.teachers import Teacher, teach
from dist_fusion.models.weights import build_model
from dist_fusion.tasks import TASKS
from tests import tiny

GPU = torch.device("cuda", 0)


class Aboard(TorchDispatchMode):
    """Refuses whatever would make the host wait for a GPU's queue: a read of it, or a copy from the host's own memory.

    Reads of a value or of a shape are refused by tensors without data themselves. A number (a tensor without
    dimensions) may come from the host: it travels as an argument of the operation.
    """

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        result = operation(*arguments, **(options or {}))
        for tensor in tree_leaves((arguments, options, result)):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu" and tensor.ndim:
                raise AssertionError(f"{operation} has a tensor of the host: {tuple(tensor.shape)}")
        return result


@pytest.fixture(scope="module")
def task_sets(tmp_path_factory):
    answers = tmp_path_factory.mktemp("answers") / "answers.json"
    answers.write_text(json.dumps({"answers": ["yes", "no"]}))
    return {"pre-training": tiny.PRETRAINING, "fine-tuning": {**tiny.FINETUNING, "vqa": TASKS["vqa"](str(answers))}}


def empty(kind, tasks, **changes):
    """A model in fp16 without data."""
    with torch.device("meta"):
        return build_model(tiny.card(tiny.model_config(kind, num_slots=2, **changes), tasks)).half()


@pytest.mark.parametrize(
    ("which", "fusion", "match"),
    [
        *(("pre-training", fusion, "kl") for fusion in FUSIONS),
        ("fine-tuning", "bridge-pre", "kl"),
        ("fine-tuning", "bridge-pre", "l2"),
    ],
)
def test_teachers_student_and_objective_ask_a_gpu_for_nothing(task_sets, which, fusion, match):
    """On tensors without data, in fp16, for every task, fusion and way to match."""
    tasks = task_sets[which]
    laid = tiny.batch(tasks, tiny.samples(8, paired=which == "fine-tuning"))
    taught = {name: task for name, task in tasks.items() if task.teachable}
    distill = DistillConfig(targets="both" if fusion.startswith("bridge") else "towers", match=match, soft=1.0)
    rows = row_weights([laid], tasks)
    student, teacher = empty("dual-encoder", tasks, fusion=fusion), empty("fusion-encoder", taught)
    with FakeTensorMode(allow_non_fake_inputs=True):
        student, teacher = student.to_empty(device=GPU), teacher.to_empty(device=GPU)
        batch, rows = tree_map_only(
            torch.Tensor, lambda t: torch.empty(t.shape, dtype=t.dtype, device=GPU), (laid, rows)
        )
        teachers = [Teacher(teacher.requires_grad_(False).eval(), weight, frozenset(taught), None) for weight in (1, 2)]
        with Aboard():
            lessons = teach(teachers, batch)
            loss = objective(distill, tasks, batch, student(batch), lessons, rows)
    assert {f"{kind}/{name}" for kind in ("hard", "soft") for name in taught} <= loss.terms.keys()
    assert {value.device for value in (loss.total, *loss.terms.values())} == {GPU}


@pytest.mark.parametrize(
    "ask",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).all()),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.cpu(),
        lambda x: x[:, [1, 0]],
        lambda x: x + torch.ones(2, device="cpu").to(x.device),
    ],
)
def test_asking_a_gpu_would_be_seen(ask):
    with FakeTensorMode(), pytest.raises((RuntimeError, AssertionError)), Aboard():
        ask(torch.empty(2, 2, device=GPU))
