import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_fusion.batch import PairBatch, answers_to, integers
from dist_fusion.models.heads import Features, RankHead
from dist_fusion.tasks import TASKS
from dist_fusion.types import HeadSpec

SAMPLES = st.lists(
    st.tuples(st.lists(st.integers(0, 4).map(lambda word: (word,)), max_size=2), st.integers(0, 12)),
    min_size=1, max_size=14,
)  # fmt: skip


def laid(task, samples, vocabulary):
    batch = PairBatch(vocabulary, 4, 40, 1)
    task.lay(batch, samples)
    made = batch.build()
    return made, made.targets["retrieval"]


@settings(max_examples=100, deadline=None)
@given(SAMPLES, st.integers(2, 6), st.integers(1, 5))
def test_a_text_ranks_its_own_image_among_others_that_it_cannot_describe(vocabulary, make_sample, drawn, block, most):
    most = min(most, block - 1)
    samples = [make_sample(i, texts, image=100 + image) for i, (texts, image) in enumerate(drawn)]
    marked = [s._replace(images=(torch.full((3, 4, 4), float(s.position)),)) for s in samples]
    made, target = laid(TASKS["retrieval"](block=block, negatives=most), marked, vocabulary)
    texts = [(sample, text) for sample in samples for text in sample.texts]
    assert len(target.rows) == len(texts)
    for row, weight, (own, text) in zip(target.rows, target.weight.tolist(), texts, strict=True):
        pairs = made.pairs[row[row >= 0]]
        first, *others = [samples[int(made.images[image][0, 0, 0])] for image in pairs[:, 0]]
        assert {tuple(made.text_ids[t][made.text_mask[t]].tolist()) for t in pairs[:, 1]} == {text.ids}
        assert first is own
        legal = [
            other for other in samples
            if other.position // block == own.position // block and other.image_ids != own.image_ids
            and not other.captions & own.captions
        ]  # fmt: skip
        assert all(any(other is one for one in legal) for other in others)
        assert len({other.position for other in others}) == len(others) == min(most, len(legal))
        assert weight == bool(others)


def test_the_cut_into_micro_batches_changes_nothing(vocabulary, make_sample):
    samples = [make_sample(i, [(i,)]) for i in range(12)]
    task = TASKS["retrieval"](block=4, negatives=2)
    shown = [
        made.image_id[made.pairs[target.rows][..., 0]].tolist()
        for made, target in (laid(task, part, vocabulary) for part in (samples, samples[:4], samples[4:]))
    ]
    assert shown[0] == shown[1] + shown[2]


def test_a_batch_without_texts_still_answers_with_no_rows(vocabulary, make_sample):
    _, target = laid(TASKS["retrieval"](), [make_sample(0)], vocabulary)
    assert target.rows.shape == (0, 16) and target.labels.shape == (0,)


@pytest.mark.parametrize(("block", "negatives"), [(16, 16), (4, 0), (1, 1)])
def test_there_must_be_room_for_the_negatives(block, negatives):
    with pytest.raises(ValueError, match="there can be 1 to block - 1 negatives"):
        TASKS["retrieval"](block=block, negatives=negatives)


@pytest.fixture(scope="module")
def head():
    torch.manual_seed(0)
    return RankHead(8, 8, HeadSpec("rank", 1))


def test_a_place_without_a_pair_takes_no_part_in_a_loss(head):
    task, target = TASKS["retrieval"](block=8, negatives=3), answers_to([(0, 1, 2, 3)], 4, integers([0]))
    features = Features(torch.randn(4, 8), torch.zeros(0))
    full, cut = (head(features, torch.tensor([row])) for row in ([0, 1, 2, -1], [0, 1, 2]))
    torch.testing.assert_close(full[:, :3], cut)
    torch.testing.assert_close(task.hard_loss(full, target), task.hard_loss(cut, target))
    theirs = torch.randn(1, 3)
    padded = torch.cat([theirs, full[:, 3:]], 1)
    torch.testing.assert_close(task.soft_loss(full, padded), task.soft_loss(cut, theirs))
    assert task.soft_loss(full.half(), padded.half()).isfinite().all()
    assert task.judge(full, target).score.tolist() == task.judge(cut, target).score.tolist()


def test_each_pair_is_scored_by_itself(head):
    features = Features(torch.randn(4, 8), torch.zeros(0))
    one, other = (head(features, torch.tensor([row])) for row in ([0, 1, 2], [3, 1, 0]))
    assert one[0, 0] == other[0, 2] and one[0, 1] == other[0, 1]
    assert head(Features(torch.zeros(0, 8), torch.zeros(0)), torch.zeros(0, 3, dtype=torch.int64)).shape == (0, 3)


def test_the_loss_of_knowing_nothing_is_that_of_guessing_and_a_tie_is_no_recall():
    task, target = TASKS["retrieval"](), answers_to([(0,) * 16, (0,) * 16], 16, integers([0, 0]))
    logits = torch.zeros(2, 16)
    assert task.hard_loss(logits, target).tolist() == pytest.approx([math.log(16)] * 2)
    logits[1, 0] = 0.1
    assert task.judge(logits, target).score.tolist() == [0.0, 1.0]
