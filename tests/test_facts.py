"""Costs told beforehand, against arithmetic and against what real models and real ranks hold."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd.graph import saved_tensors_hooks

from dist_fusion.config import load
from dist_fusion.distill import objective, row_weights
from dist_fusion.engine.sharding import Sharding, ds_config, sharding
from dist_fusion.facts import Facts, flop_counter, flops, longest_batch, measure, static_memory, table
from dist_fusion.models.execution import set_execution
from dist_fusion.models.fusion import FUSIONS
from dist_fusion.models.layers import Block, CrossLayer
from dist_fusion.models.teachers import Teacher, teach
from dist_fusion.models.weights import ModelCard
from tests import tiny
from tests.checks import storage_bytes

TAUGHT = ["teachers.0.source=x", "distill.targets=both", "distill.soft=1"]


def small(recipe, *overrides: str, **changes):
    """A recipe of 8 samples a micro-batch on two ranks, with the tests' small model, and its card."""
    config = load(recipe, ["global_batch=16", *overrides])
    config = replace(config, model=tiny.model_config(**changes))
    return config, tiny.card(config.model, config.active_tasks())


def teachers():
    model = tiny.model(tiny.model_config("fusion-encoder"), tiny.TEACHING, seed=1).requires_grad_(False).eval()
    return (Teacher(model, 1.0, frozenset({"mlm", "itm"}), None),)


@pytest.fixture(scope="module")
def one_pair(tmp_path_factory):
    """A recipe of full size whose sample is one image, one text of 40 tokens, and their pair."""
    path = tmp_path_factory.mktemp("recipe") / "pair.yaml"
    path.write_text("name: pair\nsteps: 1\nglobal_batch: 1\ntasks: {itm: {block: 1}}\n")

    def facts(kind: str) -> Facts:
        config = load(path, [f"model.kind={kind}"])
        heads = {"itm": config.tasks.itm.head(tiny.VOCABULARY)}
        return measure(config, ModelCard(config.model, heads, ("word",) * 30522), 1, ())

    return facts


def test_a_pair_of_40_and_50_tokens_takes_the_multiply_adds_of_arithmetic(one_pair):
    width, layers = 768, 12

    def block(tokens):  # 12 width^2 weights a token, then scores and sums of values
        return 12 * width**2 * tokens + 2 * tokens**2 * width

    def cross(mine, other, read):  # across: two projections of its own and two of the other's; then three to itself,
        # and of the rows that are read one more and feed-forward
        return (5 * mine + 2 * other + 9 * read) * width**2 + 2 * mine * (other + read) * width

    patches = 49 * 3 * 32**2 * width
    student, joint = one_pair("dual-encoder").student, one_pair("fusion-encoder").student
    whole, last = (cross(40, 50, x) + cross(50, 40, y) for x, y in ((40, 50), (1, 1)))
    fusion = 2 * whole + last + 3 * 90 * width**2 + 2 * width**2  # bridges' projections, two pools
    assert 3 * whole + 3 * 90 * width**2 == pytest.approx(2.74e9, rel=3e-3)
    assert student["text_tower"].multiply_adds == layers * block(40) == pytest.approx(3.43e9, rel=2e-3)
    image = student["image_embedding"].multiply_adds + student["image_tower"].multiply_adds
    assert image == layers * block(50) + patches == pytest.approx(4.41e9, rel=2e-3)
    assert student["fusion"].multiply_adds == fusion
    assert student["heads"].multiply_adds == 2 * width * 2
    encoder = joint["encoder"].multiply_adds + joint["image_embedding"].multiply_adds
    last = 3 * width**2 * 90 + 9 * width**2 + 2 * 90 * width  # of the last block only [CLS] is finished
    assert layers * block(90) + patches == pytest.approx(7.91e9, rel=2e-3)
    assert encoder == (layers - 1) * block(90) + last + patches


def test_parts_have_the_parameters_of_arithmetic(one_pair):
    with torch.device("meta"):
        block, cross = (
            sum(p.numel() for p in layer.parameters())
            for layer in (Block(768, 12, 0.0), CrossLayer(768, 12, ("cross", "self"), 0.0))
        )
    assert (block, cross) == (7_087_872, 9_451_776)
    facts = one_pair("dual-encoder")
    assert facts.student["text_tower"].parameters == 12 * block + 2 * 768
    assert facts.student["fusion"].parameters == 6 * cross + 2 * (2 * 590_592 + 768 + 3 * 2 * 768)


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("recompute", ["false", "true"])
def test_activations_are_what_a_real_forward_keeps(tiny_recipe, fusion, recompute):
    axes = [f"model.fusion={fusion}", f"distill.targets={'both' if fusion.startswith('bridge') else 'towers'}"]
    config, card = small(tiny_recipe, *TAUGHT, f"activation_checkpointing={recompute}", *axes, fusion=fusion)
    told = measure(config, card, 2, teachers()).memory
    tasks = config.active_tasks()
    batch = longest_batch(config, card, 8)
    batch = batch._replace(images=torch.zeros(len(batch.images), 3, 16, 16))
    student = tiny.model(config.model, tasks)
    set_execution(student, activation_checkpointing=recompute == "true", compile=False)
    kept = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        objective(config.distill, tasks, batch, student(batch), teach(teachers(), batch), row_weights([batch], tasks))
    own = {parameter.untyped_storage().data_ptr() for parameter in student.parameters()}
    real = storage_bytes([tensor for tensor in kept if tensor.untyped_storage().data_ptr() not in own])
    assert told.activations == pytest.approx(real, rel=0.02)


def test_checkpointed_layers_keep_less_and_half_precision_about_half(tiny_recipe):
    plain, again, half = (
        measure(*small(tiny_recipe, override, dropout=0.1), 2, ()).memory
        for override in ("seed=0", "activation_checkpointing=true", "deepspeed=zero1-bf16")
    )
    assert again.activations < 0.6 * plain.activations
    assert 0.4 * plain.activations < half.activations < 0.8 * plain.activations
    assert again[:4] == plain[:4]


@pytest.mark.parametrize("name", ["zero1", "zero2-bf16", "zero3-bf16"])
def test_two_real_ranks_hold_what_is_told(two_ranks, tiny_recipe, name):
    overrides = [f"deepspeed={name}"]
    told = sharding(ds_config(load(tiny_recipe, overrides), 2))
    for reply in two_ranks.run("held", recipe=str(tiny_recipe), overrides=overrides):
        expected = static_memory(told, reply["parameters"], 2)
        assert reply["weights"] == pytest.approx(expected.weights, rel=0.01)
        assert reply["optimizer"] == pytest.approx(expected.optimizer, rel=0.01)
        if told.stage > 1:
            assert reply["gradients"] == pytest.approx(expected.gradients, rel=0.01)
        assert reply["gradients"] <= expected.gradients * 1.01  # at stage 1 they are whole until they are averaged


@given(st.sampled_from([torch.float32, torch.float16]), st.booleans(), st.integers(1, 10**9), st.integers(1, 64))
def test_more_sharding_never_holds_more_and_offload_moves_the_optimizer(dtype, offload, parameters, ranks):
    memory = [static_memory(Sharding(stage, dtype, offload, 0, 0), parameters, ranks) for stage in range(4)]
    devices = [one.on_device for one in memory[1:]]
    assert devices == sorted(devices, reverse=True)
    assert all((one.optimizer == 0) == offload == (one.on_host > 0) for one in memory)
    alone = static_memory(Sharding(1, dtype, offload, 0, 0), parameters, 1)
    assert memory[1].optimizer * ranks == pytest.approx(alone.optimizer)


def test_the_texts_that_are_counted_are_as_long_as_the_recipe_allows_and_as_many(tiny_recipe):
    config, card = small(tiny_recipe, "data.texts_per_image=2", "tasks.mlm=false")
    batch = longest_batch(config, card, 8)
    assert batch.text_mask.all()
    assert batch.text_ids.shape == (8 * 2, 12)
    assert len(batch.images) == 8


def test_the_table_names_every_part_of_both_models_on_one_screen(tiny_recipe):
    config, card = small(tiny_recipe, *TAUGHT)
    facts = measure(config, card, 2, teachers())
    lines = table(facts).splitlines()
    assert len(lines) < 16
    assert max(map(len, lines)) <= 120
    for name in ("text_tower", "image_tower", "fusion", "heads", "encoder", "total"):
        assert any(line.split()[:1] == [name] for line in lines)
    assert f"{sum(part.parameters for part in facts.teacher.values()):,}" in table(facts)
    assert "an estimate" in table(facts)
    assert "images 1, texts 2, pairs 2.5, 12 tokens a text" in table(facts)


def test_the_operations_of_a_micro_batch_are_those_of_three_forwards_and_the_teachers_one():
    student, taught = tiny.model(tiny.model_config(), tiny.PRETRAINING), teachers()
    laid = tiny.batch(tiny.PRETRAINING, tiny.samples(4))
    with torch.no_grad():
        with flop_counter() as own:
            student(laid)
        with flop_counter() as theirs:
            taught[0].model(laid)
    before = torch.get_rng_state()
    told = flops(tiny.card(tiny.model_config(), tiny.PRETRAINING), taught, laid)
    assert told == 3 * own.get_total_flops() + theirs.get_total_flops() > 0
    assert torch.equal(torch.get_rng_state(), before), "counting must not change a run"


def test_operations_are_counted_beside_other_ranks_as_alone(two_ranks):
    """With ITC, which asks all ranks for their rows when it computes."""
    alone = flops(tiny.card(tiny.model_config(), tiny.PRETRAINING), (), tiny.batch(tiny.PRETRAINING, tiny.samples(4)))
    assert two_ranks.run("operations", size=4) == [alone, alone]
