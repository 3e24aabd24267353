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
    """On tensors without data, in fp16, for every task, fusion and way to match, with a head map."""
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
        teacher.requires_grad_(False).eval()
        teachers = [Teacher(teacher, 1.0, frozenset(taught), head_map) for head_map in (None, (1, 0))]
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


@pytest.mark.parametrize("match", ["kl", "l2"])
def test_texts_cut_to_the_longest_give_the_losses_and_gradients_of_texts_padded_to_the_full_length(match):
    """Logits of both models, every term of the objective, the attention ones too, and every gradient."""
    student = tiny.model(tiny.model_config(), tiny.PRETRAINING).double()
    teacher = tiny.model(tiny.model_config("fusion-encoder"), tiny.TEACHING, seed=1).double()
    distill = DistillConfig(targets="both", match=match, soft=1.0)
    found = []
    for pad_multiple in (1, 12):
        batch = tiny.batch(tiny.PRETRAINING, tiny.samples(8), pad_multiple)
        lessons = tiny.lessons(teacher.requires_grad_(False).eval(), batch)
        output = student(batch)
        loss = objective(distill, tiny.PRETRAINING, batch, output, lessons, row_weights([batch], tiny.PRETRAINING))
        gradients = torch.autograd.grad(loss.total, [*student.parameters()])
        found.append((batch.text_ids.shape[1], output.logits, lessons[0].output.logits, loss, gradients))
    (short, *cut), (full, *padded) = found
    assert short < full == 12
    sites = {f"attention/{model}.{way}" for model in ("tower", "bridge") for way in ("t2i", "i2t")}
    assert cut[2].terms.keys() == {"hard/mlm", "hard/itm", "hard/itc", "soft/mlm", "soft/itm"} | sites
    torch.testing.assert_close(cut, padded, rtol=1e-5, atol=1e-6)
