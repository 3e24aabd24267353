import json
from pathlib import Path

import pytest
import torch

from dist_fusion.distill import TARGETS, DistillConfig, objective, row_weights
from dist_fusion.kernels import attention_kl
from dist_fusion.models.fusion import FUSIONS
from dist_fusion.models.mapping import MAPPINGS
from dist_fusion.models.teachers import TEACHERS
from dist_fusion.models.weights import initialise_from, load_model, save_model
from dist_fusion.schema import UserError
from tests import tiny


@pytest.fixture
def teacher():
    return tiny.model(tiny.model_config("fusion-encoder", dropout=0.5), tiny.TEACHING, seed=1).eval()


@pytest.fixture
def batch():
    return tiny.batch(tiny.PRETRAINING, tiny.samples(8))


def test_two_teacher_calls_give_the_same_patch_order_and_draw_no_random_number(teacher, batch):
    state = torch.get_rng_state()
    first, second = teacher(batch), teacher(batch)
    assert torch.equal(torch.get_rng_state(), state)
    for site, tap in first.taps.items():
        assert torch.equal(tap.key, second.taps[site].key)
        assert torch.equal(tap.query, second.taps[site].query)


def test_patches_come_in_raster_order(teacher, batch):
    one = batch.images[:1].clone()
    changed = one.clone()
    changed[0, :, :8, 8:] += 1  # the upper right of four patches
    embed = teacher.image_embedding
    before, after = (embed(x, torch.zeros(1, dtype=torch.int64))[0] for x in (one, changed))
    assert [i for i in range(5) if not torch.equal(before[0, i], after[0, i])] == [2]


def test_the_teachers_recomputed_rows_equal_its_joint_attention_sliced_and_renormalised(teacher, batch):
    taken = {}
    attention = teacher.encoder.blocks[-1].attention

    def keep(module, inputs, output):
        _, taken["query"], taken["key"] = output
        taken["mask"] = inputs[1]

    attention.register_forward_hook(keep)
    taps = teacher(batch).taps
    scores = taken["query"] @ taken["key"].transpose(-2, -1) * taken["query"].shape[-1] ** -0.5
    joint = scores.masked_fill(~taken["mask"][:, None, None], float("-inf")).softmax(-1)
    words = batch.text_ids.shape[1]
    sliced = {"t2i": joint[:, :, :words, words:], "i2t": joint[:, :, words:, :words]}
    for site, tap in taps.items():
        rows = (tap.query @ tap.key.transpose(-2, -1) * tap.query.shape[-1] ** -0.5).masked_fill(
            ~tap.key_mask[:, None, None], float("-inf")
        )
        torch.testing.assert_close(rows.softmax(-1), sliced[site] / sliced[site].sum(-1, keepdim=True))
        assert (sliced[site].sum(-1) < 0.999).any()  # slicing alone is another thing


@pytest.mark.parametrize("fusion", FUSIONS)
def test_other_pairs_of_the_batch_never_change_a_pairs_output(fusion):
    student = tiny.model(tiny.model_config(fusion=fusion), tiny.PRETRAINING).eval()
    few, many = (tiny.batch({"itm": tiny.PRETRAINING["itm"]}, tiny.samples(n)) for n in (4, 8))
    student.heads = torch.nn.ModuleDict({"itm": student.heads["itm"]})
    torch.testing.assert_close(student(many).logits["itm"][:4], student(few).logits["itm"], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("stem", ["patch", "convolution"])
def test_the_rows_of_a_training_batch_do_not_depend_on_each_other(stem):
    student = tiny.model(tiny.model_config(stem=stem), tiny.PRETRAINING).train()
    images = tiny.batch(tiny.PRETRAINING, tiny.samples(8)).images
    slot = torch.zeros(8, dtype=torch.int64)
    torch.testing.assert_close(
        student.image_embedding(images, slot)[0][:2], student.image_embedding(images[:2], slot[:2])[0]
    )


def test_pre_and_post_have_the_same_parameters_and_differ(batch):
    pre, post = (tiny.model(tiny.model_config(fusion=f"bridge-{order}"), tiny.PRETRAINING) for order in ("pre", "post"))
    assert {k: v.shape for k, v in pre.state_dict().items()} == {k: v.shape for k, v in post.state_dict().items()}
    post.load_state_dict(pre.state_dict())
    assert (pre(batch).logits["itm"] - post(batch).logits["itm"]).abs().max() > 1e-3


def test_pre_and_post_coincide_where_cross_attention_adds_nothing(batch):
    pre, post = (tiny.model(tiny.model_config(fusion=f"bridge-{order}"), tiny.PRETRAINING) for order in ("pre", "post"))
    with torch.no_grad():
        for side in (pre.fusion.text, pre.fusion.image):
            for layer in side.layers:
                layer.cross_attention.out.weight.zero_()
    post.load_state_dict(pre.state_dict())
    torch.testing.assert_close(pre(batch).logits["itm"], post(batch).logits["itm"], atol=1e-3, rtol=1e-3)


def test_neither_stream_of_a_fusion_layer_comes_first(batch):
    """Swapping the modalities' weights and inputs of a bridge tower swaps its outputs."""
    from dist_fusion.models.fusion import BridgeTower
    from dist_fusion.models.layers import Stream

    torch.manual_seed(0)
    tower = BridgeTower(16, 2, [[0], [1]], 1, 0.0, ("cross", "self"))
    mask = torch.ones(2, 5, dtype=torch.bool)
    a, b = (Stream([torch.randn(2, 5, 16) for _ in range(2)], mask, mask, mask) for _ in range(2))
    pairs, slot = torch.tensor([[0, 0], [1, 1]]), torch.zeros(2, dtype=torch.int64)
    straight = tower(a, b, slot, pairs).feature
    tower.text, tower.image = tower.image, tower.text
    torch.testing.assert_close(tower(b, a, slot, pairs).feature, straight.roll(16, 1))


def test_padding_tokens_never_change_an_output(batch):
    for kind, tasks in (("dual-encoder", tiny.PRETRAINING), ("fusion-encoder", tiny.TEACHING)):
        model = tiny.model(tiny.model_config(kind), tasks).eval()
        filled = batch._replace(text_ids=batch.text_ids.masked_fill(~batch.text_mask, 9))
        wider = tiny.batch(tiny.PRETRAINING, tiny.samples(8), pad_multiple=12)
        assert wider.text_ids.shape[1] > batch.text_ids.shape[1]
        for other in (filled, wider):
            for task in tasks:
                torch.testing.assert_close(model(other).logits[task], model(batch).logits[task], atol=5e-5, rtol=1e-4)


def test_the_towers_never_see_each_other(batch):
    student = tiny.model(tiny.model_config(), tiny.PRETRAINING).eval()
    before = student.encode_images(batch)
    other = batch._replace(text_ids=batch.text_ids.flip(0), text_mask=batch.text_mask.flip(0))
    assert torch.equal(student.encode_images(other).hidden[-1], before.hidden[-1])


def test_what_is_encoded_beforehand_gives_the_same_answers(batch):
    student = tiny.model(tiny.model_config(), tiny.PRETRAINING).eval()
    cached = student.fuse(batch, student.encode_texts(batch), student.encode_images(batch))
    for task, logits in student(batch).logits.items():
        assert torch.equal(cached.logits[task], logits)


def test_a_student_given_the_teachers_own_queries_and_keys_has_no_attention_loss(teacher, batch):
    """The towers' taps are pairs of rows: with the teacher's last-layer input in both, the loss is zero."""
    taught = teacher(batch)
    for tap in taught.taps.values():
        loss = attention_kl(tap.query, tap.key, tap.query, tap.key, query_mask=tap.query_mask, key_mask=tap.key_mask)
        assert abs(loss.item()) < 1e-6
    student = tiny.model(tiny.model_config(), tiny.PRETRAINING).eval()
    block, theirs = student.text_tower.blocks[-1], teacher.encoder.blocks[-1]
    block.load_state_dict(theirs.state_dict())
    student.image_tower.blocks[-1].load_state_dict(theirs.state_dict())
    joint = {}
    theirs.register_forward_hook(lambda module, inputs, output: joint.update(x=inputs[0], mask=inputs[1]))
    teacher(batch)
    words = batch.text_ids.shape[1]
    _, text_query, text_key = block(joint["x"][:, :words], joint["mask"][:, :words])
    _, image_query, image_key = student.image_tower.blocks[-1](joint["x"][:, words:], joint["mask"][:, words:])
    for site, query, key in (("t2i", text_query, image_key), ("i2t", image_query, text_key)):
        tap = taught.taps[site]
        loss = attention_kl(query, key, tap.query, tap.key, query_mask=tap.query_mask, key_mask=tap.key_mask)
        assert abs(loss.item()) < 1e-6


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("mapping", MAPPINGS)
@pytest.mark.parametrize("fusion", FUSIONS)
def test_every_legal_cell_of_the_axes_takes_a_step(fusion, mapping, targets, teacher, batch):
    student = tiny.model(tiny.model_config(fusion=fusion, mapping=mapping, num_fusion_layers=2), tiny.PRETRAINING)
    config = DistillConfig(targets=targets, soft=1.0)
    with torch.no_grad():
        taught = teacher(batch)
    if any(site not in student(batch).taps for site in TARGETS[targets]):
        assert not fusion.startswith("bridge")  # config.check refuses these cells before anything starts
        return
    rows = row_weights([batch], tiny.PRETRAINING)
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-3)
    losses = []
    for _ in range(2):
        loss = objective(config, tiny.PRETRAINING, batch, student(batch), taught, rows)
        assert set(loss.terms) == {
            *(f"hard/{task}" for task in tiny.PRETRAINING), *(f"soft/{task}" for task in tiny.TEACHING),
            *(f"attention/{site}" for site in TARGETS[targets]),
        }  # fmt: skip
        optimizer.zero_grad()
        loss.total.backward()
        without = [name for name, p in student.named_parameters() if p.grad is None]
        assert not without
        optimizer.step()
        losses.append(loss.total.item())
    assert losses[1] < losses[0]


@pytest.mark.parametrize(
    ("kind", "tasks"),
    [
        ("dual-encoder", tiny.PRETRAINING),
        ("fusion-encoder", tiny.TEACHING),
        ("dual-encoder", tiny.FINETUNING),
        ("fusion-encoder", tiny.FINETUNING),
    ],
)
def test_a_batch_without_rows_runs_through_every_module_and_head(kind, tasks):
    model, nothing = tiny.model(tiny.model_config(kind, num_slots=2), tasks), tiny.batch(tasks, [])
    output = model(nothing)
    loss = objective(DistillConfig(), tasks, nothing, output, None, row_weights([nothing], tasks))
    loss.total.backward()
    assert loss.total.item() == 0
    assert all(parameter.grad is not None for parameter in model.heads.parameters())


@pytest.fixture
def saved_teacher(tmp_path):
    config = tiny.model_config("fusion-encoder", dropout=0.5)
    save_model(tmp_path, tiny.card(config, tiny.TEACHING), tiny.model(config, tiny.TEACHING).state_dict())
    return str(tmp_path)


def test_a_loaded_teacher_is_frozen_and_in_eval_mode_with_the_heads_it_must_teach_with(saved_teacher):
    student = tiny.card(tiny.model_config(), tiny.PRETRAINING)
    teacher = TEACHERS["vilt"](saved_teacher, student, ["itm"])
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert list(teacher.heads) == ["itm"]


def test_a_teacher_that_cannot_teach_this_student_is_refused_with_both_sides(saved_teacher):
    def refused(message, soft=("itm",), tasks=tiny.PRETRAINING, **changes):
        student = tiny.card(tiny.model_config(**changes), tasks)
        with pytest.raises(UserError, match=message):
            TEACHERS["vilt"](saved_teacher, student, list(soft))

    refused("num_heads 2 and the student 4", num_heads=4)
    refused("patch_size 8 and the student 4", patch_size=4)
    refused(r"no head for vqa \(it has mlm, itm\)", soft=["vqa"])
    other = tiny.card(tiny.model_config(), tiny.PRETRAINING)._replace(vocabulary=("a", "b"))
    with pytest.raises(UserError, match="another vocabulary"):
        TEACHERS["vilt"](saved_teacher, other, [])


def test_answers_in_another_order_are_not_taught(tmp_path):
    cards = []
    for name, answers in (("one", ["yes", "no"]), ("two", ["no", "yes"])):
        (tmp_path / f"{name}.json").write_text(json.dumps({"answers": answers, "kinds": []}))
        task = {"vqa": tiny.TASKS["vqa"](answers=str(tmp_path / f"{name}.json"))}
        cards.append((task, tiny.card(tiny.model_config("fusion-encoder"), task)))
    (task, card), (_, other) = cards
    save_model(tmp_path, card, tiny.model(card.config, task).state_dict())
    student = other._replace(config=tiny.model_config())
    with pytest.raises(UserError, match="another order"):
        TEACHERS["vilt"](str(tmp_path), student, ["vqa"])


def test_weights_of_a_run_fill_a_model_and_leave_only_heads_that_ask_something_else_new(tmp_path):
    config = tiny.model_config()
    before = tiny.model(config, tiny.PRETRAINING, seed=3)
    save_model(tmp_path, tiny.card(config, tiny.PRETRAINING), before.state_dict())
    tasks = {"itm": tiny.PRETRAINING["itm"], "itc": tiny.TASKS["itc"](dimensions=4)}
    model = tiny.model(config, tasks, seed=4)
    assert initialise_from(model, tiny.card(config, tasks), str(tmp_path), "initialise_from") == ["itc"]
    filled, source = model.state_dict(), before.state_dict()
    assert all(torch.equal(filled[name], source[name]) for name in filled if not name.startswith("heads.itc"))
    for changes in ({"num_layers": 4}, {"width": 32}, {"fusion": "shallow"}):
        other = tiny.model_config(**changes)
        with pytest.raises(UserError, match="another architecture than `model`"):
            initialise_from(tiny.model(other, tasks), tiny.card(other, tasks), str(tmp_path), "initialise_from")


@pytest.mark.parametrize(
    "broken", ["{", "{}", '{"config": {}, "heads": {}, "vocabulary": ["a"]}', '{"config": {"x": 1}}']
)
def test_a_broken_or_foreign_model_folder_is_refused_in_one_message(saved_teacher, broken):
    (Path(saved_teacher) / "model.json").write_text(broken)
    with pytest.raises(UserError, match=r"teacher\.folder|unknown key"):
        load_model(saved_teacher, "teacher.folder")
