from dataclasses import replace

import numpy as np
import pytest
import torch

from dist_fusion.agreement import attention
from dist_fusion.data.stream import DataConfig
from dist_fusion.data.text import Tokenizer
from dist_fusion.models.teachers import Teacher
from dist_fusion.monitor.pictures import FEW, draw, fixed_scenes, heats, scene
from tests import tiny

CPU = torch.device("cpu")
TASKS = {name: tiny.PRETRAINING[name] for name in ("mlm", "itm")}


def scenes(entries=tiny.ENTRIES):
    return [scene(tiny.batch(tiny.PRETRAINING, tiny.samples(1, start=n)), entries) for n in range(FEW)]


def models():
    student = tiny.model(tiny.model_config(dropout=0.5), tiny.PRETRAINING)
    teacher = tiny.model(tiny.model_config("fusion-encoder", dropout=0.5), tiny.TEACHING, seed=1)
    return student.train(), [Teacher(teacher.requires_grad_(False).eval(), 1.0, frozenset(tiny.TEACHING), None)]


def test_the_same_samples_are_shown_in_every_life_and_others_with_another_seed(shards):
    config = DataConfig(shards=(str(shards),), vocabulary=f"{shards}/vocab.txt", shuffle_buffer=10)
    config = replace(config, augment="randaugment")
    tokenizer = Tokenizer(config.vocabulary, 12)
    first, again, other = (fixed_scenes(config, TASKS, tokenizer, 32, seed) for seed in (1, 1, 2))
    assert len(first) == FEW
    for one, same in zip(first, again, strict=True):
        assert torch.equal(one.batch.images, same.batch.images)
        assert one[1:] == same[1:]
    assert {int(one.batch.image_id) for one in first} != {int(one.batch.image_id) for one in other}


def test_held_out_samples_are_shown_where_there_are_some(shards, easy_vqa):
    both = DataConfig(shards=(str(shards),), dev=(str(easy_vqa / "dev"),), vocabulary=f"{shards}/vocab.txt")
    tasks = {"vqa": tiny.TASKS["vqa"](answers=str(easy_vqa / "answers.json"))}
    tokenizer = Tokenizer(both.vocabulary, 12)
    alone = replace(both, shards=both.dev, dev=())
    shown, expected = (fixed_scenes(config, tasks, tokenizer, 32, 0) for config in (both, alone))
    assert [int(one.batch.image_id) for one in shown] == [int(one.batch.image_id) for one in expected]


def test_of_each_picture_the_class_token_and_the_longest_word_of_its_own_text_are_asked():
    plain = scenes()[0]
    text = plain.batch.text_ids[plain.batch.pairs[plain.pair, 1]]
    entries = [f"w{i}" for i in range(tiny.VOCABULARY.size)]
    entries[2:5] = ["[CLS]", "[SEP]", "[MASK]"]
    entries[int(text[2])] = "##a-long-word"
    found = scenes(entries)
    assert found[0].words == ("[CLS]", "a-long-word")
    assert found[0].places == (0, 2)
    for one in found:
        assert one.batch.weights["attention"][one.pair] > 0
        assert len(one.batch.images) == 1


def test_heats_are_the_shares_of_the_patches_by_teacher_and_student():
    student, teachers = models()
    shown = scenes()
    found = {heat.title: heat.shares for heat in heats(student, teachers, shown, CPU)}
    assert list(found) == ["teacher", "tower.t2i", "bridge.t2i"]
    for number, one in enumerate(shown):
        with torch.no_grad():
            taps = student.eval()(one.batch).taps
        for token, place in enumerate(one.places):
            rows = attention(taps["bridge.t2i"])[one.pair, :, place].mean(0)
            torch.testing.assert_close(found["bridge.t2i"][2 * number + token].flatten(), rows[1:])


def test_looking_draws_no_random_numbers_and_the_model_goes_on_in_its_mode():
    student, teachers = models()
    before = torch.get_rng_state()
    heats(student, teachers, scenes(), CPU)
    assert torch.equal(torch.get_rng_state(), before)
    assert student.training and all(part.training for part in student.modules())
    assert all(parameter.grad is None for parameter in student.parameters())


@pytest.mark.parametrize("with_teacher", [True, False])
def test_the_picture_has_a_panel_for_each_whose_heat_lies_where_the_attention_does(with_teacher):
    student, teachers = models()
    shown = [one._replace(places=one.places[:1], words=one.words[:1]) for one in scenes()[:1]]
    seen = heats(student, teachers if with_teacher else [], shown, CPU)
    ends = []
    for place in ((0, 0), (1, 1)):
        shares = torch.zeros(1, 2, 2)
        shares[0, *place] = 1
        ends.append(draw(shown, [heat._replace(shares=shares) for heat in seen], tiny.ENTRIES).astype(int))
    assert ends[0].shape[2] == 3 and ends[0].shape == ends[1].shape
    above, below = (np.argwhere((ends[i] - ends[1 - i]).sum(-1) > 60) for i in range(2))
    assert above[:, 0].mean() < below[:, 0].mean()
    width = ends[0].shape[1] / (1 + len(seen))
    assert set((above[:, 1] // width).astype(int)) == set(range(1, 1 + len(seen))), "all but the picture itself"
