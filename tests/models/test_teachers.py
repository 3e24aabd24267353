"""Who teaches, what leaves a teacher, and what is refused before anything starts."""

import json

import pytest
import torch

from dist_fusion.config import load
from dist_fusion.distill import DistillConfig, objective, row_weights
from dist_fusion.engine.sharding import check_device, ds_config
from dist_fusion.models.teachers import Lesson, TeacherConfig, build_teacher, teach
from dist_fusion.models.weights import save_model
from dist_fusion.schema import UserError
from tests import tiny
from tests.models import foreign

CPU = torch.device("cpu")


@pytest.fixture
def saved_teacher(tmp_path):
    config = tiny.model_config("fusion-encoder", dropout=0.5)
    save_model(tmp_path, tiny.card(config, tiny.TEACHING), tiny.model(config, tiny.TEACHING).state_dict())
    return str(tmp_path)


def built(source, soft=("itm",), tasks=tiny.PRETRAINING, answers="", card=None, **changes):
    """A teacher for a tiny student; `changes` are keys of its section or of the student's model."""
    own = {key: changes.pop(key) for key in ("head_map", "precision", "weight") if key in changes}
    card = card or tiny.card(tiny.model_config(**changes), tasks)
    return build_teacher(TeacherConfig(source, **own), card, soft, answers, CPU, "teachers.0")


@pytest.fixture
def batch():
    return tiny.batch(tiny.PRETRAINING, tiny.samples(8))


def test_a_teacher_is_frozen_and_in_eval_mode_with_the_heads_it_must_teach_with(saved_teacher):
    teacher = built(saved_teacher)
    assert not any(module.training for module in teacher.model.modules())
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    assert list(teacher.model.heads) == ["itm"]


def test_what_a_teacher_says_can_be_kept_for_the_way_back_and_draws_no_random_number(saved_teacher, batch):
    state = torch.get_rng_state()
    (lesson,) = teach([built(saved_teacher)], batch)
    assert torch.equal(torch.get_rng_state(), state)
    tensors = [*lesson.output.logits.values(), *(x for tap in lesson.output.taps.values() for x in tap)]
    assert not any(tensor.is_inference() or tensor.requires_grad for tensor in tensors)
    query = lesson.output.taps["t2i"].query
    weight = torch.ones((), requires_grad=True)
    (weight * query).sum().backward()
    assert weight.grad is not None


@pytest.mark.parametrize("precision", ["fp32", "bf16", "auto"])
def test_a_teacher_computes_in_its_precision(saved_teacher, batch, precision):
    teacher = built(saved_teacher, precision=precision)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    (lesson,) = teach([teacher], batch)
    assert lesson.output.logits["itm"].dtype == dtype
    (exact,) = teach([built(saved_teacher, precision="fp32")], batch)
    torch.testing.assert_close(lesson.output.logits["itm"].float(), exact.output.logits["itm"], atol=0.5, rtol=0.1)


def test_half_precision_is_refused_where_a_rank_has_no_gpu(saved_teacher, tiny_recipe):
    teacher = [f"teachers.0.source={saved_teacher}", "distill.soft=1", "teachers.0.precision=fp16"]
    config = load(tiny_recipe, teacher)
    with pytest.raises(UserError, match=r"teachers\.0\.precision is fp16, which needs a GPU"):
        check_device(config, ds_config(config, 1), CPU)


def test_a_teacher_that_cannot_teach_this_student_is_refused_with_both_sides(saved_teacher):
    def refused(message, **changes):
        with pytest.raises(UserError, match=message):
            built(saved_teacher, **changes)

    refused("has 2 attention heads and the student 4; set teachers.0.head_map to 4 numbers", num_heads=4)
    refused("patch_size 8 and the student 4", patch_size=4)
    refused(r"head_map is \[0\]; it must be 2 numbers", head_map=(0,))
    refused(r"head_map is \[0, 2\]; it must be 2 numbers", head_map=(0, 2))
    other = tiny.card(tiny.model_config(), tiny.PRETRAINING)._replace(vocabulary=("a", "b"))
    refused("another vocabulary", card=other)


def test_a_head_that_is_not_there_is_never_made_up_and_three_ways_out_are_told(saved_teacher, tmp_path):
    with pytest.raises(UserError) as error:
        built(saved_teacher, soft=("itm", "vqa"))
    told = str(error.value)
    assert "has no head for vqa (it has mlm, itm)" in told
    assert "recipe vilt-pretrain" in told
    assert "teachers.0.tasks=['itm']" in told
    assert "distill.soft=0 distill.hard=1" in told
    foreign.vilt("mlm").save_pretrained(tmp_path / "hub")
    with pytest.raises(UserError, match=r"has no head for itm \(it has mlm\)"):
        built(str(tmp_path / "hub"), width=128)


def test_a_run_of_a_student_cannot_teach(tmp_path):
    config = tiny.model_config()
    save_model(tmp_path, tiny.card(config, tiny.PRETRAINING), tiny.model(config, tiny.PRETRAINING).state_dict())
    with pytest.raises(UserError, match="a teacher must be a fusion-encoder"):
        built(str(tmp_path))


def vqa(folder, name, answers):
    (folder / f"{name}.json").write_text(json.dumps({"answers": answers, "kinds": []}))
    return {"vqa": tiny.TASKS["vqa"](answers=str(folder / f"{name}.json"))}


def test_answers_in_another_order_are_not_taught(tmp_path):
    theirs, ours = vqa(tmp_path, "one", ["yes", "no"]), vqa(tmp_path, "two", ["no", "yes"])
    config = tiny.model_config("fusion-encoder")
    save_model(tmp_path, tiny.card(config, theirs), tiny.model(config, theirs).state_dict())
    assert built(str(tmp_path), ("vqa",), theirs)
    with pytest.raises(UserError, match="another order"):
        built(str(tmp_path), ("vqa",), ours)


def test_a_file_that_does_not_tell_its_answers_needs_a_list_of_them(tmp_path):
    answers = [f"answer {i}" for i in range(foreign.NUM_ANSWERS)]
    tasks = vqa(tmp_path, "answers", answers)
    state = foreign.vilt("vqa").state_dict()
    source = str(foreign.save_original(state, tmp_path / "vilt_vqa.ckpt"))
    (tmp_path / "vocab.txt").write_text("".join(f"{entry}\n" for entry in tiny.ENTRIES))
    with pytest.raises(UserError, match=r"set teachers\.0\.answers to a file"):
        built(source, ("vqa",), tasks)
    with pytest.raises(UserError, match="another order"):
        built(source, ("vqa",), tasks, answers="another digest")
    meaning = tasks["vqa"].head(tiny.VOCABULARY).meaning
    assert list(built(source, ("vqa",), tasks, answers=meaning).model.heads) == ["vqa"]


def test_a_teacher_with_a_larger_position_table_is_interpolated_to_the_students_images(tmp_path, batch):
    foreign.vilt("mlm").save_pretrained(tmp_path)
    (tmp_path / "vocab.txt").write_text("".join(f"{entry}\n" for entry in tiny.ENTRIES))
    teacher = built(str(tmp_path), ("mlm",))
    (lesson,) = teach([teacher], batch)
    assert lesson.output.taps["t2i"].key.shape[2] == 5  # four patches and the class token


def heard(teachers, batch, **keys):
    """The terms of the objective with some teachers."""
    student = tiny.model(tiny.model_config(), tiny.PRETRAINING)
    config = DistillConfig(targets="both", soft=1.0, **keys)
    lessons = teach(teachers, batch)
    return objective(
        config, tiny.PRETRAINING, batch, student(batch), lessons, row_weights([batch], tiny.PRETRAINING)
    ).terms


def two(tmp_path):
    config = tiny.model_config("fusion-encoder")
    for seed in (1, 2):
        card = tiny.card(config, tiny.TEACHING)
        (tmp_path / str(seed)).mkdir()
        save_model(tmp_path / str(seed), card, tiny.model(config, tiny.TEACHING, seed=seed).state_dict())
    return [built(str(tmp_path / str(seed)), ("mlm", "itm"), weight=float(seed)) for seed in (1, 2)]


@pytest.mark.parametrize("match", ["kl", "l2"])
def test_several_teachers_are_heard_by_their_weights(tmp_path, batch, match):
    first, second = two(tmp_path)
    one, other, both = (heard(teachers, batch, match=match) for teachers in ([first], [second], [first, second]))
    for term in both:
        torch.testing.assert_close(both[term], (one[term] + 2 * other[term]) / 3)
        if not term.startswith("hard"):
            assert not torch.equal(one[term], other[term])


def test_two_teachers_pull_as_their_mixture_does(tmp_path, batch):
    """A divergence is linear in what the teacher says: the gradient is that of the mixed probabilities."""
    lessons: tuple[Lesson, ...] = teach(two(tmp_path), batch)
    logits = torch.randn(len(batch.targets["itm"].rows), 2, requires_grad=True)
    task = tiny.PRETRAINING["itm"]
    apart = sum(task.soft_loss(logits, lesson.output.logits["itm"]).sum() * lesson.weight / 3 for lesson in lessons)
    (gradient,) = torch.autograd.grad(apart, logits)
    mixed = sum(lesson.output.logits["itm"].softmax(-1) * lesson.weight / 3 for lesson in lessons).log()
    (expected,) = torch.autograd.grad(task.soft_loss(logits, mixed).sum(), logits)
    torch.testing.assert_close(gradient, expected)


def test_a_task_is_taught_by_those_who_have_it(tmp_path, batch):
    first, second = two(tmp_path)
    second = second._replace(soft=frozenset({"itm"}))
    both, one = heard([first, second], batch), heard([first], batch)
    torch.testing.assert_close(both["soft/mlm"], one["soft/mlm"])
    assert not torch.equal(both["soft/itm"], one["soft/itm"])
    silent = [teacher._replace(soft=frozenset()) for teacher in (first, second)]
    assert not any(term.startswith("soft") for term in heard(silent, batch))


def test_a_wider_teacher_with_more_heads_teaches_through_a_head_map(tmp_path, batch):
    config = tiny.model_config("fusion-encoder", width=32, num_heads=4)
    save_model(tmp_path, tiny.card(config, tiny.TEACHING), tiny.model(config, tiny.TEACHING).state_dict())
    teacher = built(str(tmp_path), head_map=(3, 1))
    terms = heard([teacher], batch)
    swapped = heard([teacher._replace(head_map=(1, 3))], batch)
    assert all(torch.isfinite(value) for value in terms.values())
    assert not torch.equal(terms["attention/bridge.t2i"], swapped["attention/bridge.t2i"])
