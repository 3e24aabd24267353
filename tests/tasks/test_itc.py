import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_fusion.batch import PairBatch, answers_to
from dist_fusion.tasks import TASKS

ITC = TASKS["itc"]()


def by_hand(logits, labels):
    """Multi-positive InfoNCE, one row and one direction after the other."""
    losses = []
    for row, mine in enumerate(labels):
        positives = [i for i, other in enumerate(labels) if mine[0] == other[0] or mine[1] == other[1]]
        total = 0.0
        for direction in range(2):
            scores = logits[row, direction]
            denominator = torch.log(sum(torch.exp(score) for score in scores))
            total += sum(denominator - scores[i] for i in positives) / len(positives)
        losses.append(total / 2)
    return torch.stack(losses)


LABELS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=9)


def target_of(labels):
    return answers_to([(i, i) for i in range(len(labels))], 2, torch.tensor(labels))


@settings(max_examples=80, deadline=None)
@given(LABELS, st.integers(0, 1000))
def test_the_loss_is_infonce_with_equal_captions_and_equal_images_as_positives(labels, seed):
    logits = torch.randn(
        len(labels), 2, len(labels), dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    torch.testing.assert_close(ITC.hard_loss(logits, target_of(labels)), by_hand(logits, labels))


def test_without_repeats_the_loss_is_plain_cross_entropy_both_ways():
    labels = [(i, 10 + i) for i in range(6)]
    logits = torch.randn(6, 2, 6, generator=torch.Generator().manual_seed(0))
    own = torch.arange(6)
    plain = sum(torch.nn.functional.cross_entropy(logits[:, way], own, reduction="none") for way in range(2)) / 2
    torch.testing.assert_close(ITC.hard_loss(logits, target_of(labels)), plain)


def test_an_equal_caption_or_an_equal_image_is_a_right_answer():
    labels = [(1, 5), (2, 5), (1, 6), (3, 7)]  # the first shares its caption with the second, its image with the third
    for answer, score in enumerate([1.0, 1.0, 1.0, 0.0]):
        logits = torch.zeros(4, 2, 4)
        logits[0, :, answer] = 1
        assert ITC.judge(logits, target_of(labels)).score[0] == score
    logits = torch.zeros(4, 2, 4)
    logits[0, 0, 1] = logits[0, 1, 3] = 1
    assert ITC.judge(logits, target_of(labels)).score[0] == 0.5


def test_a_right_answer_lowers_the_loss_as_much_by_caption_as_by_image():
    labels = [(1, 5), (2, 5), (1, 6), (3, 7)]
    losses = []
    for answer in range(4):
        logits = torch.zeros(4, 2, 4)
        logits[0, :, answer] = 1
        losses.append(ITC.hard_loss(logits, target_of(labels))[0].item())
    assert losses[0] == pytest.approx(losses[1]) == pytest.approx(losses[2])
    assert losses[0] < losses[3]


def test_every_text_is_asked_for_with_its_own_image(vocabulary, make_sample):
    samples = [make_sample(0, [(1,), (2,)], image=30), make_sample(1, [(1,)], image=31), make_sample(2, image=32)]
    batch = PairBatch(vocabulary, 4, 40, 1)
    ITC.lay(batch, samples)
    made = batch.build()
    target = made.targets["itc"]
    images, texts = target.rows.unbind(1)
    assert torch.equal(target.labels, torch.stack([made.image_id[images], made.caption_id[texts]], 1))
    assert made.image_id[images].tolist() == [30, 30, 31]
    assert [made.text_ids[text, 1].item() for text in texts] == [11, 12, 11]
    assert len(made.text_ids) == 2


def test_a_batch_without_texts_still_answers_with_no_rows(vocabulary):
    batch = PairBatch(vocabulary, 4, 40, 1)
    ITC.lay(batch, [])
    target = batch.build().targets["itc"]
    assert target.rows.shape == target.labels.shape == (0, 2)
    assert ITC.hard_loss(torch.zeros(0, 2, 0), target).shape == (0,)
