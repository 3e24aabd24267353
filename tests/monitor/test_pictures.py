from dataclasses import replace

import numpy as np
import pytest
import torch

from dist_fusion.agreement import attention
from dist_fusion.data.stream import DataConfig
from dist_fusion.data.text import Tokenizer
from dist_fusion.models.teachers import Teacher
from dist_fusion.monitor.pictures import FEW, chosen_queries, draw, fixed_batch, heats
from tests import tiny

CPU = torch.device("cpu")
TASKS = {name: tiny.PRETRAINING[name] for name in ("mlm", "itm")}


def batch():
    return tiny.batch(tiny.PRETRAINING, tiny.samples(4))


def models():
    student = tiny.model(tiny.model_config(dropout=0.5), tiny.PRETRAINING)
    teacher = tiny.model(tiny.model_config("fusion-encoder", dropout=0.5), tiny.TEACHING, seed=1)
    return student.train(), [Teacher(teacher.requires_grad_(False).eval(), 1.0, frozenset(tiny.TEACHING), None)]


def test_the_same_samples_are_shown_in_every_life_and_others_with_another_seed(shards):
    config = DataConfig(shards=(str(shards),), vocabulary=f"{shards}/vocab.txt", shuffle_buffer=10)
    config = replace(config, augment="randaugment")
    tokenizer = Tokenizer(config.vocabulary, 12)
    first, again, other = (fixed_batch(config, TASKS, tokenizer, 32, seed) for seed in (1, 1, 2))
    assert len(first.images) == FEW
    assert torch.equal(first.images, again.images) and torch.equal(first.text_ids, again.text_ids)
    assert set(first.image_id.tolist()) != set(other.image_id.tolist())


def test_held_out_samples_are_shown_where_there_are_some(shards, easy_vqa):
    both = DataConfig(shards=(str(shards),), dev=(str(easy_vqa / "dev"),), vocabulary=f"{shards}/vocab.txt")
    tasks = {"vqa": tiny.TASKS["vqa"](answers=str(easy_vqa / "answers.json"))}
    tokenizer = Tokenizer(both.vocabulary, 12)
    alone = replace(both, shards=both.dev, dev=())
    shown, expected = (fixed_batch(config, tasks, tokenizer, 32, 0) for config in (both, alone))
    assert torch.equal(shown.images, expected.images)


def test_of_each_picture_the_class_token_and_its_longest_word_are_asked():
    shown = batch()
    entries = [f"w{i}" for i in range(tiny.VOCABULARY.size)]
    entries[2:5] = ["[CLS]", "[SEP]", "[MASK]"]
    text = shown.text_ids[shown.pairs[0, 1]]
    entries[int(text[2])] = "a-long-word"
    queries = chosen_queries(shown, entries)
    assert [query.title for query in queries[:2]] == ["[CLS]", "a-long-word"]
    assert queries[1].place == 2
    assert len(queries) == 2 * FEW
    assert all(shown.weights["attention"][query.pair] > 0 for query in queries)
    assert len({int(shown.pairs[query.pair, 0]) for query in queries}) == FEW


def test_heats_are_the_shares_of_the_patches_by_teacher_and_student():
    student, teachers = models()
    shown = batch()
    queries = chosen_queries(shown, tiny.ENTRIES)
    found = {heat.title: heat.shares for heat in heats(student, teachers, shown, queries, CPU)}
    assert list(found) == ["teacher", "tower.t2i", "bridge.t2i"]
    with torch.no_grad():
        taps = student.eval()(shown).taps
    for number, query in enumerate(queries):
        rows = attention(taps["bridge.t2i"])[query.pair, :, query.place].mean(0)
        torch.testing.assert_close(found["bridge.t2i"][number].flatten(), rows[1:])


def test_looking_draws_no_random_numbers_and_the_model_goes_on_in_its_mode():
    student, teachers = models()
    before = torch.get_rng_state()
    heats(student, teachers, batch(), chosen_queries(batch(), tiny.ENTRIES), CPU)
    assert torch.equal(torch.get_rng_state(), before)
    assert student.training and all(part.training for part in student.modules())
    assert all(parameter.grad is None for parameter in student.parameters())


@pytest.mark.parametrize("with_teacher", [True, False])
def test_the_picture_has_a_panel_for_each_whose_heat_lies_where_the_attention_does(with_teacher):
    student, teachers = models()
    shown = batch()
    queries = chosen_queries(shown, tiny.ENTRIES)[:1]
    seen = heats(student, teachers if with_teacher else [], shown, queries, CPU)
    ends = []
    for place in ((0, 0), (1, 1)):
        shares = torch.zeros(1, 2, 2)
        shares[0, *place] = 1
        ends.append(draw(shown, queries, [heat._replace(shares=shares) for heat in seen], tiny.ENTRIES).astype(int))
    assert ends[0].shape[2] == 3 and ends[0].shape == ends[1].shape
    above, below = (np.argwhere((ends[i] - ends[1 - i]).sum(-1) > 60) for i in range(2))
    assert above[:, 0].mean() < below[:, 0].mean()
    width = ends[0].shape[1] / (1 + len(seen))
    assert set((above[:, 1] // width).astype(int)) == set(range(1, 1 + len(seen))), "all but the picture itself"
