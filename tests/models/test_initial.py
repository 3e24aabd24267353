"""What a new model starts from, and what is refused."""

import pytest
import timm
import torch

from dist_fusion.models.initial import BERT_UNCASED, Towers, digest, initialise_from, resized_positions
from dist_fusion.models.weights import ModelCard, build_model, save_model
from dist_fusion.schema import UserError
from tests import tiny
from tests.models import foreign


def student(heads=("mlm", "itm"), **changes):
    """A card and a model with the widths of the foreign ones."""
    sizes = {"width": 128, "num_heads": 2, "patch_size": 8, "image_size": 32, **changes}
    tasks = {name: tiny.PRETRAINING[name] for name in heads}
    card = tiny.card(tiny.model_config(**sizes), tasks)
    torch.manual_seed(11)
    return card, build_model(card).eval()


def with_vocabulary(folder):
    (folder / "vocab.txt").write_text("".join(f"{entry}\n" for entry in tiny.ENTRIES))
    return str(folder)


@pytest.fixture
def vilt_folder(tmp_path):
    foreign.vilt("mlm").save_pretrained(tmp_path)
    return with_vocabulary(tmp_path)


def test_both_towers_start_as_the_vilt_and_with_its_masked_language_head(vilt_folder):
    card, model = student()
    new = {name: x.clone() for name, x in model.state_dict().items()}
    assert initialise_from(model, card, vilt_folder, "initialise_from") == ["itm"]
    theirs = foreign.vilt("mlm")
    batch = foreign.batch(32, 3)
    for name, tensor in model.state_dict().items():
        told = name.startswith(("fusion.", "heads.itm."))
        assert torch.equal(tensor, new[name]) == told, name
    words = model.encode_texts(batch)
    embedded = theirs.vilt.embeddings.text_embeddings(input_ids=batch.text_ids)
    embedded = embedded + theirs.vilt.embeddings.token_type_embeddings.weight[0]
    mask = torch.zeros(batch.text_mask.shape).masked_fill(~batch.text_mask, torch.finfo(torch.float32).min)
    with torch.no_grad():
        for layer in theirs.vilt.encoder.layer:
            embedded = layer(embedded, attention_mask=mask[:, None, None])[0]
        told = theirs.vilt.layernorm(embedded)
    assert (words.hidden[-1] - told)[batch.text_mask].abs().max() < 1e-4


def test_a_bert_text_tower_gives_transformers_hidden_states(tmp_path):
    theirs = foreign.bert()
    theirs.save_pretrained(tmp_path)
    image = tmp_path / "vit.pth"
    torch.save(vit().state_dict(), image)
    card, model = student(text_norm="post")
    origin = Towers(text=with_vocabulary(tmp_path), image=str(image))
    assert initialise_from(model, card, origin, "initialise_from") == ["mlm", "itm"]
    batch = foreign.batch(32, 4)
    with torch.no_grad():
        ours = model.encode_texts(batch)
        told = theirs(input_ids=batch.text_ids, attention_mask=batch.text_mask.long(), output_hidden_states=True)
    for layer in range(3):  # a post-norm tower shows its layers as they are
        assert (ours.hidden[layer] - told.hidden_states[layer + 1])[batch.text_mask].abs().max() < 1e-4


def vit():
    """timm's ViT, whose table has the model's own grid."""
    torch.manual_seed(2)
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=128, depth=3, num_heads=2, num_classes=5
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def test_a_timm_image_tower_gives_timms_hidden_states(tmp_path):
    foreign.bert().save_pretrained(tmp_path)
    theirs = vit()
    torch.save(theirs.state_dict(), tmp_path / "vit.pth")
    card, model = student(text_norm="post")
    origin = Towers(text=with_vocabulary(tmp_path), image=str(tmp_path / "vit.pth"))
    initialise_from(model, card, origin, "initialise_from")
    batch = foreign.batch(32, 4)
    with torch.no_grad():
        difference = model.encode_images(batch).hidden[-1] - theirs.forward_features(batch.images)
    assert difference.abs().max() < 1e-4


def test_the_layout_of_the_vit_people_have_is_timms_own():
    model = timm.create_model("vit_base_patch32_224.augreg_in21k", pretrained=False, depth=2)
    from dist_fusion.models.layouts import LAYOUTS, read

    weights, misfits = read(LAYOUTS["timm's ViT"], model.state_dict(), ())
    assert not misfits
    assert weights.body["image_embedding.position"].shape == (50, 768)


def test_old_berts_call_their_norms_gamma_and_beta(tmp_path):
    state = foreign.bert().state_dict()
    old = {n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): x
           for n, x in state.items()}  # fmt: skip
    torch.save({f"bert.{n}": x for n, x in old.items()} | {"cls.seq_relationship.bias": torch.zeros(2)},
               tmp_path / "bert.bin")  # fmt: skip
    torch.save(vit().state_dict(), tmp_path / "vit.pth")
    card, model = student(text_norm="post")
    with_vocabulary(tmp_path)
    initialise_from(model, card, Towers(str(tmp_path / "bert.bin"), str(tmp_path / "vit.pth")), "initialise_from")
    assert torch.equal(model.text_embedding.norm.weight, state["embeddings.LayerNorm.weight"])


@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("head", ["mlm", "nlvr2"])
def test_image_slots_the_origin_lacks_start_as_its_last(head, slots, tmp_path):
    theirs = foreign.vilt(head)
    theirs.save_pretrained(tmp_path)
    card, model = student(num_slots=slots)
    initialise_from(model, card, with_vocabulary(tmp_path), "initialise_from")
    rows = theirs.vilt.embeddings.token_type_embeddings.weight[1:]
    for slot in range(slots):
        assert torch.equal(model.image_embedding.modality.weight[slot], rows[min(slot, len(rows) - 1)])


def test_a_run_with_one_image_starts_one_with_two_at_another_size(tmp_path):
    card, before = student()
    save_model(tmp_path, card, before.state_dict())
    wider, model = student(num_slots=2, image_size=48)
    assert initialise_from(model, wider, str(tmp_path), "initialise_from") == []
    for table in (model.image_embedding.modality.weight, model.fusion.image.modality.weight):
        assert torch.equal(table[0], table[1])
    assert torch.equal(model.image_embedding.position[0], before.image_embedding.position[0])
    assert torch.equal(model.image_embedding.position[1], before.image_embedding.position[1])  # corners stay corners
    assert torch.equal(model.image_embedding.position[-1], before.image_embedding.position[-1])


def test_positions_between_cells_are_between_their_numbers():
    table = torch.cat([torch.tensor([[9.0]]), torch.tensor([[0.0], [1.0], [2.0], [3.0]])])
    assert resized_positions(table, 3).flatten().tolist() == [9, 0, 0.5, 1, 1, 1.5, 2, 2, 2.5, 3]
    assert resized_positions(table, 2) is table


def test_weights_of_a_run_fill_a_model_and_leave_only_heads_that_ask_something_else_new(tmp_path):
    config = tiny.model_config()
    before = tiny.model(config, tiny.PRETRAINING, seed=3)
    save_model(tmp_path, tiny.card(config, tiny.PRETRAINING), before.state_dict())
    tasks = {"itm": tiny.PRETRAINING["itm"], "itc": tiny.TASKS["itc"](dimensions=4)}
    model = tiny.model(config, tasks, seed=4)
    assert initialise_from(model, tiny.card(config, tasks), str(tmp_path), "initialise_from") == ["itc"]
    filled, source = model.state_dict(), before.state_dict()
    assert all(torch.equal(filled[name], source[name]) for name in filled if not name.startswith("heads.itc"))


@pytest.mark.parametrize(
    "changes",
    [{"num_layers": 4}, {"width": 64}, {"num_heads": 4}, {"fusion": "shallow"}, {"fusion": "bridge-post"},
     {"mapping": "cross-layer", "num_fusion_layers": 2}, {"stem": "convolution"}, {"patch_size": 16}],
)  # fmt: skip
def test_another_architecture_is_refused_also_where_the_shapes_agree(changes, tmp_path):
    card, before = student()
    save_model(tmp_path, card, before.state_dict())
    other, model = student(**changes)
    with pytest.raises(UserError, match="another architecture than `model`"):
        initialise_from(model, other, str(tmp_path), "initialise_from")


@pytest.mark.parametrize("changes", [{"num_layers": 4}, {"width": 64}, {"num_heads": 4}, {"text_norm": "post"}])
def test_a_vilt_of_another_size_is_refused(changes, vilt_folder):
    card, model = student(**changes)
    with pytest.raises(UserError, match=f"its {next(iter(changes))} is"):
        initialise_from(model, card, vilt_folder, "initialise_from")


def test_longer_texts_than_the_origin_has_positions_for_are_refused(vilt_folder):
    card, model = student(max_text_length=13)
    with pytest.raises(UserError, match="it can be 12 at most"):
        initialise_from(model, card, vilt_folder, "initialise_from")


def test_other_words_are_refused(tmp_path):
    foreign.vilt("mlm").save_pretrained(tmp_path)
    card, model = student()
    with pytest.raises(UserError, match="so it must read bert-base-uncased"):
        initialise_from(model, card, str(tmp_path), "initialise_from")
    (tmp_path / "vocab.txt").write_text("a\nb\n")
    with pytest.raises(UserError, match="another vocabulary"):
        initialise_from(model, card, str(tmp_path), "initialise_from")


def test_the_shipped_vocabulary_is_the_one_that_vilt_and_bert_read():
    from dist_fusion.data.text import Tokenizer

    assert digest((*Tokenizer("bert-base-uncased", 40).entries,)) == BERT_UNCASED


def test_one_tower_alone_does_not_fill_a_dual_encoder(tmp_path):
    torch.save(vit().state_dict(), tmp_path / "vit.pth")
    card, model = student()
    with pytest.raises(UserError, match="it does not fit in text_embedding"):
        initialise_from(model, card, str(tmp_path / "vit.pth"), "initialise_from")
    assert isinstance(card, ModelCard)


def test_two_towers_do_not_start_a_fusion_encoder(tmp_path):
    card, before = student()
    save_model(tmp_path, card, before.state_dict())
    other, model = student(kind="fusion-encoder")
    with pytest.raises(UserError, match="is of kind dual-encoder, which a fusion-encoder cannot start from"):
        initialise_from(model, other, str(tmp_path), "initialise_from")


def test_a_shallow_fusion_pools_as_the_vilt_it_starts_from(vilt_folder):
    card, model = student(fusion="shallow")
    initialise_from(model, card, vilt_folder, "initialise_from")
    for pool in (model.fusion.pool_text, model.fusion.pool_image):
        assert torch.equal(pool.weight, foreign.vilt("mlm").vilt.pooler.dense.weight)


def test_a_fusion_encoder_can_start_as_vilt_did_from_a_vit(tmp_path):
    torch.save(vit().state_dict(), tmp_path / "vit.pth")
    card, model = student(kind="fusion-encoder")
    new = model.text_embedding.word.weight.clone()
    assert initialise_from(model, card, str(tmp_path / "vit.pth"), "initialise_from") == ["mlm", "itm"]
    assert torch.equal(model.encoder.blocks[2].attention.qkv.weight, vit().blocks[2].attn.qkv.weight)
    assert torch.equal(model.text_embedding.word.weight, new)


def test_each_tower_must_be_given_weights_of_its_kind(tmp_path, vilt_folder):
    torch.save(vit().state_dict(), tmp_path / "vit.pth")
    card, model = student()
    with pytest.raises(UserError, match="is of kind fusion-encoder, where a text-tower is asked for"):
        initialise_from(model, card, Towers(vilt_folder, str(tmp_path / "vit.pth")), "initialise_from")
