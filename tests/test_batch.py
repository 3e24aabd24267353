import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_fusion.batch import PairBatch, answers_to, integers


def built(batch, samples):
    return batch.build()


def test_a_text_is_kept_once_however_often_it_is_asked_for(vocabulary, make_sample):
    samples = [make_sample(0, [(1, 2)]), make_sample(1, [(1, 2), (3,)])]
    batch = PairBatch(vocabulary, 4, 40, 1)
    assert [batch.text(text) for sample in samples for text in sample.texts] == [0, 0, 1]
    made = built(batch, samples)
    assert made.text_ids.tolist() == [[2, 11, 12, 3], [2, 13, 3, 0]]
    assert made.text_mask.tolist() == [[True] * 4, [True, True, True, False]]
    assert made.caption_id.tolist() == [samples[0].texts[0].content, samples[1].texts[1].content]


def test_a_pair_is_kept_once_and_its_attention_weights_are_added(vocabulary, make_sample):
    sample = make_sample(0, [(1,), (2,)])
    batch = PairBatch(vocabulary, 4, 40, 1)
    image, (one, two) = batch.image(sample), map(batch.text, sample.texts)
    rows = [batch.pair(sample, image, text, attention=w) for text, w in ((one, 1.0), (two, 0.25), (one, 0.5))]
    assert rows == [0, 1, 0]
    made = built(batch, [sample])
    assert made.pairs.tolist() == [[0, 0], [0, 1]]
    assert made.weights["attention"].tolist() == [1.5, 0.25]


def test_a_pair_answers_for_the_sample_that_asked_first(vocabulary, make_sample):
    samples = [make_sample(position, [(position,)]) for position in (40, 41)]
    batch = PairBatch(vocabulary, 4, 40, 1)
    rows = [(batch.image(sample), batch.text(sample.texts[0])) for sample in samples]
    batch.pair(samples[1], rows[0][0], rows[1][1], attention=1.0)
    batch.pair(samples[0], rows[0][0], rows[0][1], attention=1.0)
    batch.pair(samples[1], rows[1][0], rows[1][1], attention=1.0)
    assert built(batch, samples).pair_sample.tolist() == [0, 1, 0]


def test_an_image_is_kept_once_with_its_content_id_and_slot(vocabulary, make_sample):
    samples = [make_sample(5, image=9), make_sample(6, image=8)]
    samples[1] = samples[1]._replace(images=(*samples[1].images, torch.ones(3, 4, 4)), image_ids=(8, 7))
    batch = PairBatch(vocabulary, 4, 40, 1)
    asked = [batch.image(samples[0]), batch.image(samples[1], 1), batch.image(samples[0]), batch.image(samples[1])]
    assert asked == [0, 1, 0, 2]
    made = built(batch, samples)
    assert made.image_id.tolist() == [9, 7, 8]
    assert made.image_slot.tolist() == [0, 1, 0]
    assert made.images[:, 0, 0, 0].tolist() == [9, 1, 8]


@pytest.mark.parametrize(("multiple", "length"), [(1, 5), (4, 8), (5, 5), (8, 8)])
def test_texts_are_padded_to_the_longest_rounded_up(vocabulary, make_sample, multiple, length):
    sample = make_sample(0, [(1, 2, 3), (1,)])
    batch = PairBatch(vocabulary, 4, 40, multiple)
    for text in sample.texts:
        batch.text(text)
    made = built(batch, [sample])
    assert made.text_ids.shape == made.text_mask.shape == (2, length)
    assert made.text_mask.sum(1).tolist() == [5, 3]
    assert (made.text_ids[~made.text_mask] == vocabulary.pad).all()


def test_an_empty_batch_has_the_shapes_of_a_full_one(vocabulary):
    made = PairBatch(vocabulary, 4, 40, 8).build()
    assert made.images.shape == (0, 3, 4, 4)
    assert made.text_ids.shape == made.text_mask.shape == (0, 8)
    assert made.pairs.shape == (0, 2) and made.pairs.dtype == torch.int64
    for ids in (made.image_slot, made.image_id, made.caption_id, made.pair_sample):
        assert ids.shape == (0,) and ids.dtype == torch.int64
    assert made.weights["attention"].shape == (0,)


def test_an_answer_without_rows_has_the_shapes_of_one_with():
    target = answers_to([], 2, integers([], 2))
    assert target.rows.shape == target.labels.shape == (0, 2)
    assert target.weight.shape == target.kind.shape == (0,)


ASKED = st.lists(st.tuples(st.integers(0, 3), st.lists(st.integers(0, 2), max_size=3).map(tuple)), max_size=20)


@settings(max_examples=60, deadline=None)
@given(ASKED)
def test_every_row_leads_back_to_what_was_asked(vocabulary, make_sample, asked):
    samples = {position: make_sample(position, [words]) for position, words in asked}
    batch = PairBatch(vocabulary, 4, 40, 1)
    rows = []
    for position, words in asked:
        sample = make_sample(position, [words])
        rows.append(batch.pair(sample, batch.image(sample), batch.text(sample.texts[0]), attention=1.0))
    made = built(batch, samples.values())
    assert len(made.pairs) == len(set(asked)) == len(made.pairs.unique(dim=0))
    assert made.weights["attention"].sum() == len(asked)
    for (position, words), row in zip(asked, rows, strict=True):
        image, text = made.pairs[row]
        assert made.image_id[image] == position
        assert made.text_ids[text][made.text_mask[text]].tolist() == [2, *(10 + w for w in words), 3]


@pytest.mark.parametrize("multiple", [8, 64])
def test_padding_never_goes_beyond_the_longest_text_that_is_allowed(vocabulary, make_sample, multiple):
    batch = PairBatch(vocabulary, 4, 7, multiple)
    batch.text(make_sample(0, [(1, 2, 3)]).texts[0])
    assert batch.build().text_ids.shape == (1, 7)
