import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_fusion.batch import PairBatch, answers_to
from dist_fusion.tasks import TASKS

CAPTIONS = st.integers(0, 4).map(lambda word: (word,))
SAMPLES = st.lists(
    st.tuples(
        st.lists(CAPTIONS, min_size=1, max_size=3),  # drawn
        st.lists(CAPTIONS, max_size=1),  # not drawn
        st.integers(0, 12),  # image
    ),
    min_size=1,
    max_size=24,
)


def shown(task, samples, vocabulary):
    """One (position of the image's sample, text, label, weight) a row; images are told apart by pixels."""
    batch = PairBatch(vocabulary, 4, 40, 1)
    marked = [s._replace(images=(torch.full((3, 4, 4), float(s.position)),)) for s in samples]
    task.lay(batch, marked)
    made = batch.build()
    target = made.targets["itm"]
    image, text = made.pairs[target.rows[:, 0]].unbind(1)
    words = [tuple(made.text_ids[t][made.text_mask[t]].tolist()) for t in text]
    positions = made.images[image][:, 0, 0, 0].int().tolist()
    return list(zip(positions, words, target.labels.tolist(), target.weight.tolist(), strict=True)), made


@pytest.fixture(scope="module")
def samples_of(make_sample):
    def build(drawn):
        return [
            make_sample(i, texts, captions=others, image=image + 100) for i, (texts, others, image) in enumerate(drawn)
        ]

    return build


@settings(max_examples=120, deadline=None)
@given(SAMPLES, st.integers(1, 8))
def test_no_negative_shows_what_its_text_may_describe(vocabulary, samples_of, drawn, block):
    samples = samples_of(drawn)
    rows, _ = shown(TASKS["itm"](block=block), samples, vocabulary)
    texts = [(sample, text) for sample in samples for text in sample.texts]
    for (position, words, label, weight), (own, text) in zip(rows, texts, strict=True):
        image = samples[position]
        assert words == text.ids
        if label or not weight:
            assert image is own
        else:
            assert image.position // block == own.position // block
            assert image.image_ids != own.image_ids
            assert not image.captions & own.captions


@settings(max_examples=120, deadline=None)
@given(SAMPLES, st.integers(1, 8))
def test_half_of_a_blocks_texts_ask_for_another_image_and_none_is_given_twice(vocabulary, samples_of, drawn, block):
    samples = samples_of(drawn)
    rows, _ = shown(TASKS["itm"](block=block), samples, vocabulary)
    owners = [sample.position // block for sample in samples for _ in sample.texts]
    for number in set(owners):
        inside = [row for row, owner in zip(rows, owners, strict=True) if owner == number]
        assert sum(label == 0 for _, _, label, _ in inside) == len(inside) // 2
        given_away = [position for position, _, label, weight in inside if label == 0 and weight]
        assert len(given_away) == len(set(given_away))
        assert all(weight == 1 for _, _, label, weight in inside if label == 1)


@settings(max_examples=60, deadline=None)
@given(SAMPLES, st.integers(1, 4), st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_the_cut_into_micro_batches_changes_nothing(vocabulary, samples_of, drawn, block, cuts):
    samples = samples_of(drawn)
    whole, _ = shown(TASKS["itm"](block=block), samples, vocabulary)
    parts, start = [], 0
    for cut in [*cuts, len(samples)]:
        part = samples[start : start + cut * block]
        parts += shown(TASKS["itm"](block=block), part, vocabulary)[0] if part else []
        start += cut * block
    assert parts == whole == shown(TASKS["itm"](block=block), samples, vocabulary)[0]


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(1, 3), min_size=2, max_size=8), st.integers(0, 1000))
def test_as_many_texts_as_possible_get_another_image(vocabulary, make_sample, counts, seed):
    samples = [
        make_sample(i, [(i, n) for n in range(count)])._replace(visit=f"{seed}/{i}") for i, count in enumerate(counts)
    ]
    rows, _ = shown(TASKS["itm"](block=8), samples, vocabulary)
    owners = [sample.position for sample in samples for _ in sample.texts]
    asking = [owner for owner, (_, _, label, _) in zip(owners, rows, strict=True) if label == 0]
    # Hall's theorem: all images are there for all texts together, all but one for those of one sample.
    most = max((asking.count(owner) for owner in asking), default=0)
    without = max(0, len(asking) - len(samples), most - (len(samples) - 1))
    assert sum(weight for _, _, label, weight in rows if label == 0) == len(asking) - without


def test_a_block_with_one_caption_has_no_negative_that_counts(vocabulary, make_sample):
    samples = [make_sample(i, [(1, 2)]) for i in range(8)]
    rows, made = shown(TASKS["itm"](block=8), samples, vocabulary)
    assert [weight for _, _, label, weight in rows if label == 0] == [0.0] * 4
    assert [weight for _, _, label, weight in rows if label == 1] == [1.0] * 4
    assert made.weights["attention"].sum() == 4


def test_a_block_with_one_picture_has_no_negative_that_counts(vocabulary, make_sample):
    rows, _ = shown(TASKS["itm"](block=8), [make_sample(i, [(i,)], image=1) for i in range(8)], vocabulary)
    assert [weight for _, _, label, weight in rows if label == 0] == [0.0] * 4


def test_the_negatives_differ_from_visit_to_visit(vocabulary, make_sample):
    samples = [make_sample(i, [(i,)]) for i in range(16)]
    again = [sample._replace(visit=f"7/{sample.position + 16}") for sample in samples]
    task = TASKS["itm"](block=16)
    assert shown(task, samples, vocabulary)[0] != shown(task, again, vocabulary)[0]


def test_both_halves_are_judged_by_cross_entropy():
    task, target = TASKS["itm"](), answers_to([(0,), (1,)], 1, torch.tensor([0, 1]))
    logits = torch.tensor([[0.0, 2.0], [0.0, 2.0]])
    wrong, right = task.hard_loss(logits, target).tolist()
    assert wrong == pytest.approx(math.log(1 + math.exp(2)), rel=1e-6)
    assert right == pytest.approx(math.log(1 + math.exp(-2)), rel=1e-6)
    assert task.judge(logits, target).score.tolist() == [0.0, 1.0]


def test_the_soft_loss_is_zero_only_where_student_and_teacher_agree():
    task, teacher = TASKS["itm"](), torch.tensor([[1.0, -1.0], [0.5, 0.0]])
    assert task.soft_loss(teacher + 3, teacher).tolist() == pytest.approx([0, 0], abs=1e-6)
    probability = teacher.softmax(-1)
    by_hand = (probability * (probability / 0.5).log()).sum(-1)
    torch.testing.assert_close(task.soft_loss(torch.zeros(2, 2), teacher), by_hand)
