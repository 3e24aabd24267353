"""Weights that others made, read under our names, compute what theirs compute."""

import json
import os
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from dist_fusion.models.initial import adapted
from dist_fusion.models.layouts import LAYOUTS, Weights, read, write
from dist_fusion.models.sources import read_source
from dist_fusion.models.weights import ModelCard, build_model
from dist_fusion.schema import UserError
from dist_fusion.types import meaning_of
from tests import tiny
from tests.models import foreign

ORIGINAL, TRANSFORMERS = LAYOUTS["ViLT's own"], LAYOUTS["transformers' ViLT"]


def saved(model, form, folder):
    """A transformers model on disk: `form` is its own, with a pickle in place of safetensors, or the authors'."""
    if form == "original":
        return str(foreign.save_original(model.state_dict(), folder / "model.ckpt"))
    model.save_pretrained(folder)
    if form == "pickle":
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    return str(folder)


def ours(source, size):
    """A source as a model of ours, its position table of the images' size."""
    from dataclasses import replace

    config = replace(source.config, image_size=size, dropout=0.0)
    model = build_model(ModelCard(config, source.heads, tiny.ENTRIES)).eval()
    model.load_state_dict(adapted(source.weights, config))
    return model


@pytest.mark.parametrize("size", [48, 32])  # the table's own grid, and one it is interpolated to
@pytest.mark.parametrize("form", ["safetensors", "pickle", "original"])
@pytest.mark.parametrize("head", ["mlm", "vqa"])
def test_a_vilt_read_from_any_of_its_files_gives_transformers_hidden_states_logits_and_attention(
    head, form, size, tmp_path
):
    theirs = foreign.vilt(head)
    batch = foreign.batch(size, 4)
    source = read_source(saved(theirs, form, tmp_path), "x")
    assert list(source.heads) == [head]
    model = ours(source, size)
    embedded = foreign.raster(theirs, batch.images)
    with torch.no_grad():
        told = theirs(
            input_ids=batch.text_ids, attention_mask=batch.text_mask.long(), image_embeds=embedded,
            pixel_mask=torch.ones(embedded.shape[:2], dtype=torch.long), output_attentions=True,
            output_hidden_states=True,
        )  # fmt: skip
        state = torch.get_rng_state()
        output = model(batch)
        assert torch.equal(torch.get_rng_state(), state)
        joint = model.encoder(
            torch.cat(
                [model.text_embedding(batch.text_ids), model.image_embedding(batch.images, batch.image_slot)[0]], 1
            ),
            torch.cat([batch.text_mask, torch.ones(embedded.shape[:2], dtype=torch.bool)], 1),
            frozenset(),
        )
    logits = told.logits if head == "vqa" else told.logits[batch.targets["mlm"].rows.unbind(1)]
    assert (output.logits[head] - logits).abs().max() < 1e-4
    last = theirs.vilt.layernorm(told.hidden_states[-1])
    valid = torch.cat([batch.text_mask, torch.ones(embedded.shape[:2], dtype=torch.bool)], 1)
    assert (joint.hidden[-1] - last)[valid].abs().max() < 1e-4
    words = batch.text_ids.shape[1]
    for site, block in (
        ("t2i", told.attentions[-1][:, :, :words, words:]), ("i2t", told.attentions[-1][:, :, words:, :words])
    ):  # fmt: skip
        tap = output.taps[site]
        scores = tap.query @ tap.key.transpose(-2, -1) * 64**-0.5
        rows = scores.masked_fill(~tap.key_mask[:, None, None], float("-inf")).softmax(-1)
        sure = tap.query_mask[:, None, :, None]
        difference = (rows - block / block.sum(-1, keepdim=True)) * sure
        assert difference.abs().max() < 1e-5


def test_transformers_own_forward_differs_only_by_its_shuffle_of_the_patches(tmp_path):
    """Fed pixels, it permutes them; its pooled logits do not know, and equal ours."""
    theirs = foreign.vilt("vqa")
    batch = foreign.batch(48, 3)
    model = ours(read_source(saved(theirs, "safetensors", tmp_path), "x"), 48)
    with torch.no_grad():
        told = theirs(input_ids=batch.text_ids, attention_mask=batch.text_mask.long(), pixel_values=batch.images)
        assert (model(batch).logits["vqa"] - told.logits).abs().max() < 1e-4


@pytest.mark.parametrize("form", ["safetensors", "original"])
def test_two_image_classification_gives_transformers_logits(form, tmp_path):
    theirs = foreign.vilt("nlvr2")
    batch = foreign.batch(48, 3, slots=2)
    source = read_source(saved(theirs, form, tmp_path), "x")
    assert source.config.num_slots == 2
    with torch.no_grad():
        told = theirs(
            input_ids=batch.text_ids,
            attention_mask=batch.text_mask.long(),
            pixel_values=batch.images.unflatten(0, (3, 2)),
        )
        assert (ours(source, 48)(batch).logits["nlvr2"] - told.logits).abs().max() < 1e-4


@pytest.mark.parametrize("head", ["mlm", "vqa", "nlvr2", "retrieval", "none"])
def test_both_layouts_read_and_write_each_other(head):
    """transformers -> ours -> the authors' -> ours -> transformers gives the weights it began with."""
    state = foreign.vilt(head).state_dict()
    if head == "none":
        state = {f"vilt.{name}": tensor for name, tensor in state.items()}
    heads = () if head == "none" else (head,)
    weights, misfits = read(TRANSFORMERS, state, heads)
    assert not misfits
    original = write(ORIGINAL, weights)
    expected = foreign.as_original(state)
    del expected["text_embeddings.position_ids"]
    assert expected.keys() == original.keys()
    for name, tensor in expected.items():
        if name != "text_embeddings.token_type_embeddings.weight":  # its second row is never read
            assert torch.equal(original[name], tensor), name
    again, misfits = read(ORIGINAL, original, ORIGINAL.heads)
    assert not misfits
    back = write(TRANSFORMERS, again)
    model = foreign.vilt(head, seed=5)
    inner = {n.removeprefix("vilt."): n for n in model.state_dict()}
    missing, unexpected = model.load_state_dict({inner[n]: x for n, x in back.items()}, strict=False)
    assert not missing
    assert not unexpected
    for name, tensor in model.state_dict().items():
        if "token_type_embeddings" not in name:
            assert torch.equal(tensor, state[name if name in state else f"vilt.{name}"]), name


def test_an_untied_decoder_and_its_bias_are_read_not_made_up(tmp_path):
    """transformers 5 ties by default and knows no `mlm_score.bias`; older files have both."""
    theirs = foreign.vilt("mlm")
    theirs.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["mlm_score.bias"] = state.pop("mlm_score.decoder.bias")
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    weights = read_source(str(tmp_path), "x").weights
    assert torch.equal(weights["heads.mlm.decoder.bias"], state["mlm_score.bias"])
    assert not torch.equal(weights["heads.mlm.decoder.weight"], weights["text_embedding.word.weight"])


def test_a_tied_decoder_is_the_word_embeddings(tmp_path):
    foreign.vilt("mlm", untied=False).save_pretrained(tmp_path)
    assert "mlm_score.decoder.weight" not in load_file(tmp_path / "model.safetensors")
    weights = read_source(str(tmp_path), "x").weights
    assert torch.equal(weights["heads.mlm.decoder.weight"], weights["text_embedding.word.weight"])


def test_the_authors_files_show_the_heads_that_fit_their_body(tmp_path):
    state = foreign.as_original(foreign.vilt("mlm").state_dict())
    state |= {"itm_score.fc.weight": torch.randn(2, 128), "itm_score.fc.bias": torch.randn(2)}
    state |= {"rank_output.weight": torch.randn(1, 128), "rank_output.bias": torch.randn(1)}
    torch.save({"state_dict": state}, tmp_path / "all.ckpt")
    source = read_source(str(tmp_path / "all.ckpt"), "x")
    assert list(source.heads) == ["mlm", "retrieval"]  # the body has moved on from its matching head
    del state["rank_output.weight"], state["rank_output.bias"]
    torch.save({"state_dict": state}, tmp_path / "all.ckpt")
    source = read_source(str(tmp_path / "all.ckpt"), "x")
    assert list(source.heads) == ["mlm", "itm"]
    assert torch.equal(source.weights["heads.itm.weight"], state["itm_score.fc.weight"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("transformer.norm.weight"), r"transformer\.norm\.weight \(missing\)"),
        (lambda s: s.pop("transformer.blocks.1.attn.qkv.bias"), r"transformer\.blocks\.1\.attn\.qkv\.bias \(missing\)"),
        (lambda s: s.pop("mlm_score.transform.dense.bias"), r"mlm_score\.transform\.dense\.bias \(missing\)"),
        (lambda s: s.update(surprise=torch.zeros(1)), r"surprise \(unknown\)"),
    ],
)
def test_a_key_that_is_missing_or_unknown_is_listed(change, message, tmp_path):
    state = foreign.as_original(foreign.vilt("mlm").state_dict())
    change(state)
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(UserError, match=message):
        read_source(str(tmp_path / "x.pt"), "teachers.0.source")


class Planted:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pickle_that_needs_more_than_tensors_is_refused_unrun_with_the_way_to_convert_it(tmp_path):
    torch.save({"state_dict": {}, "callbacks": Planted(str(tmp_path / "planted"))}, tmp_path / "x.ckpt")
    with pytest.raises(UserError, match="which could run code and is not opened") as error:
        read_source(str(tmp_path / "x.ckpt"), "teachers.0.source")
    assert "weights_only=False" in str(error.value)
    assert not (tmp_path / "planted").exists()
    (tmp_path / "bare.bin").write_bytes(pickle.dumps(Planted(str(tmp_path / "planted"))))
    with pytest.raises(UserError, match=r"is not opened|cannot be read"):
        read_source(str(tmp_path / "bare.bin"), "teachers.0.source")
    assert not (tmp_path / "planted").exists()


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04"])
@pytest.mark.parametrize("name", ["x.safetensors", "x.ckpt"])
def test_a_broken_file_is_refused(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match="x is"):
        read_source(str(tmp_path / name), "x")


def test_a_page_or_a_pointer_in_place_of_a_file_is_called_what_it_is(tmp_path):
    (tmp_path / "x.ckpt").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match="is no file of weights at all"):
        read_source(str(tmp_path / "x.ckpt"), "x")


def test_a_broken_config_json_is_told(tmp_path):
    foreign.vilt("vqa").save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is not JSON"):
        read_source(str(tmp_path), "x")


def test_what_is_nowhere_is_told(tmp_path):
    for name in (str(tmp_path / "nothing"), str(tmp_path), "tests/nothing"):
        with pytest.raises(UserError, match="holds no finished model"):
            read_source(name, "x")


def test_answers_that_transformers_names_are_kept_in_their_order(tmp_path):
    theirs = foreign.vilt("vqa")
    theirs.save_pretrained(tmp_path)
    assert read_source(str(tmp_path), "x").heads["vqa"].meaning == ""
    config = json.loads((tmp_path / "config.json").read_text())
    answers = [f"answer {i}" for i in range(foreign.NUM_ANSWERS)]
    config["id2label"] = {str(i): answer for i, answer in enumerate(answers)}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_source(str(tmp_path), "x").heads["vqa"].meaning == meaning_of(answers)


def test_transformers_names_without_a_class_are_refused(tmp_path):
    foreign.vilt("vqa").save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match=r"a config\.json beside it must say in `architectures`"):
        read_source(str(tmp_path), "x")


def test_reading_a_head_that_is_not_there_gives_none():
    weights, misfits = read(TRANSFORMERS, foreign.vilt("none").state_dict(), ("vqa",))
    assert isinstance(weights, Weights)
    assert weights.heads == {}
    assert not misfits
