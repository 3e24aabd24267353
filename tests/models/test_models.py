from pathlib import Path

import pytest
import torch

from dist_fusion.distill import TARGETS, DistillConfig, objective, row_weights
from dist_fusion.kernels import attention_kl
from dist_fusion.models.fusion import FUSIONS
from dist_fusion.models.mapping import MAPPINGS
from dist_fusion.models.weights import load_model, save_model
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
    from dist_fusion.models.layers import EVERY, Stream

    torch.manual_seed(0)
    tower = BridgeTower(16, 2, [[0], [1]], 1, 0.0, ("cross", "self"))
    mask = torch.ones(2, 5, dtype=torch.bool)
    a, b = (Stream([torch.randn(2, 5, 16) for _ in range(2)], mask, mask, mask) for _ in range(2))
    pairs, slot = torch.tensor([[0, 0], [1, 1]]), torch.zeros(2, dtype=torch.int64)
    straight = tower(a, b, slot, pairs, EVERY).feature
    tower.text, tower.image = tower.image, tower.text
    torch.testing.assert_close(tower(b, a, slot, pairs, EVERY).feature, straight.roll(16, 1))


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_student_that_reads_no_words_says_what_it_says_otherwise(batch, fusion):
    """It finishes [CLS] alone in the last layer; where words are read, all of them."""
    config = tiny.model_config(fusion=fusion)
    whole = tiny.model(config, tiny.PRETRAINING).eval()
    brief = tiny.model(config, {name: task for name, task in tiny.PRETRAINING.items() if name != "mlm"}).eval()
    brief.load_state_dict({name: whole.state_dict()[name] for name in brief.state_dict()})
    for said, expected in ((brief(batch).logits, whole(batch).logits), (brief(batch).taps, whole(batch).taps)):
        for name, value in said.items():
            torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=1e-5)
    fused = [
        model.fusion(model.encode_texts(batch), model.encode_images(batch), batch.image_slot, batch.pairs, model.read)
        for model in (brief, whole)
    ]
    length = batch.text_ids.shape[1]
    assert [one.tokens.shape[1] for one in fused] == [1, length]


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
    lessons = tiny.lessons(teacher, batch)
    if any(site not in student(batch).taps for site in TARGETS[targets]):
        assert not fusion.startswith("bridge")  # config.check refuses these cells before anything starts
        return
    rows = row_weights([batch], tiny.PRETRAINING)
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-3)
    losses = []
    for _ in range(2):
        loss = objective(config, tiny.PRETRAINING, batch, student(batch), lessons, rows)
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
    loss = objective(DistillConfig(), tasks, nothing, output, (), row_weights([nothing], tasks))
    loss.total.backward()
    assert loss.total.item() == 0
    assert all(parameter.grad is not None for parameter in model.heads.parameters())


@pytest.fixture
def saved_teacher(tmp_path):
    config = tiny.model_config("fusion-encoder", dropout=0.5)
    save_model(tmp_path, tiny.card(config, tiny.TEACHING), tiny.model(config, tiny.TEACHING).state_dict())
    return str(tmp_path)


@pytest.mark.parametrize(
    "broken", ["{", "{}", '{"config": {}, "heads": {}, "vocabulary": ["a"]}', '{"config": {"x": 1}}']
)
def test_a_broken_or_foreign_model_folder_is_refused_in_one_message(saved_teacher, broken):
    (Path(saved_teacher) / "model.json").write_text(broken)
    with pytest.raises(UserError, match=r"teacher\.folder|unknown key"):
        load_model(saved_teacher, "teacher.folder")


@pytest.mark.parametrize("level", range(0, 256, 15))
def test_no_colour_makes_a_patch_padding_in_bf16(level):
    """ViLT reads padding off pixels that sum to 0, which happens to real colours in bf16; here the mask is explicit."""
    model = tiny.model(tiny.model_config("fusion-encoder"), tiny.TEACHING).to(torch.bfloat16).eval()
    colour = torch.tensor([level, 382 - level if level >= 127 else 255, max(0, 127 - level)]) / 127.5 - 1
    images = colour.view(1, 3, 1, 1).expand(2, 3, 16, 16).to(torch.bfloat16)
    _, mask = model.image_embedding(images, torch.zeros(2, dtype=torch.int64))
    assert mask.shape == (2, 5)
    assert mask.all()


def test_both_models_see_the_same_pixels_and_the_same_token_ids(teacher, batch):
    student, seen = tiny.model(tiny.model_config(), tiny.PRETRAINING), {}
    for name, model in (("student", student), ("teacher", teacher)):
        for part in ("image_embedding", "text_embedding"):
            getattr(model, part).register_forward_hook(
                lambda _, given, out, key=(name, part): seen.update({key: given[0].clone()})
            )
    student(batch)
    tiny.lessons(teacher, batch)
    for part in ("image_embedding", "text_embedding"):
        assert torch.equal(seen["student", part], seen["teacher", part])


def test_taps_come_before_any_dropout_of_the_attention():
    """In training, with half of everything dropped, a row over the valid keys still sums to one."""
    student = tiny.model(tiny.model_config(dropout=0.5), tiny.PRETRAINING).train()
    for tap in student(tiny.batch(tiny.PRETRAINING, tiny.samples(4))).taps.values():
        scores = (tap.query @ tap.key.transpose(-2, -1)).masked_fill(~tap.key_mask[:, None, None], float("-inf"))
        torch.testing.assert_close(scores.softmax(-1).sum(-1), torch.ones(scores.shape[:-1]))
        assert (tap.query != 0).float().mean() > 0.99


def test_norms_have_the_epsilons_of_the_models_they_copy():
    """1e-6 in ViT's blocks, 1e-12 in BERT's embeddings and word head, 1e-5 in bridges, cross layers and classifiers."""
    eps = {
        name: part.eps
        for kind in ("dual-encoder", "fusion-encoder")
        for name, part in tiny.model(tiny.model_config(kind), {"mlm": tiny.TASKS["mlm"]()}).named_modules()
        if isinstance(part, torch.nn.LayerNorm)
    }
    for name, value in eps.items():
        expected = 1e-6 if "blocks" in name or name.endswith(("tower.norm", "encoder.norm")) else 1e-5
        assert value == (1e-12 if name in ("text_embedding.norm", "heads.mlm.norm") else expected), name


@pytest.mark.parametrize("count", [1, 2])
def test_the_smallest_batches_give_finite_losses(count, teacher):
    tasks = tiny.PRETRAINING | {"itm": tiny.TASKS["itm"](block=1)}
    small = tiny.batch(tasks, tiny.samples(count))
    student = tiny.model(tiny.model_config(), tasks)
    config = DistillConfig(targets="both", soft=1.0)
    loss = objective(config, tasks, small, student(small), tiny.lessons(teacher, small), row_weights([small], tasks))
    loss.total.backward()
    assert all(torch.isfinite(term) for term in loss.terms.values())
    assert all(torch.isfinite(p.grad).all() for p in student.parameters() if p.grad is not None)


def test_the_word_loss_gives_no_gradient_at_words_that_are_not_masked(teacher, batch):
    student = tiny.model(tiny.model_config(fusion="shallow"), {"mlm": tiny.PRETRAINING["mlm"]})
    tokens = {}

    def keep(module, given, out):
        out.tokens.retain_grad()
        tokens["x"] = out.tokens

    student.fusion.register_forward_hook(keep)
    task, target = tiny.PRETRAINING["mlm"], batch.targets["mlm"]
    (lesson,) = tiny.lessons(teacher, batch)
    task.soft_loss(student(batch).logits["mlm"], lesson.output.logits["mlm"]).sum().backward()
    touched = tokens["x"].grad.abs().sum(-1) > 0
    masked = torch.zeros_like(touched)
    masked[target.rows.unbind(1)] = True
    assert torch.equal(touched, masked)
