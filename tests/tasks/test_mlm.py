from collections import Counter
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_fusion.batch import PairBatch, Text
from dist_fusion.tasks import TASKS
from dist_fusion.tasks.mlm import mask_words
from dist_fusion.types import Vocabulary

VOCABULARY = Vocabulary(size=60, pad=0, cls=2, sep=3, mask=4)
WORDS = st.lists(st.integers(1, 4), max_size=8)  # how many tokens each word has


@st.composite
def texts(draw):
    lengths = draw(WORDS)
    words = [word for word, length in enumerate(lengths) for _ in range(length)]
    ids = draw(st.lists(st.integers(5, 59), min_size=len(words), max_size=len(words)))
    return Text((2, *ids, 3), (None, *words, None))


PROBABILITY = st.floats(0, 1)
SEEDS = st.integers(0, 10**6)


@settings(max_examples=200, deadline=None)
@given(texts(), PROBABILITY, SEEDS)
def test_whole_words_are_masked_and_specials_never(text, probability, seed):
    masked, hidden = mask_words(text, probability, VOCABULARY, Random(seed))
    words = {text.words[place] for place in hidden}
    assert None not in words
    assert hidden == [place for place, word in enumerate(text.words) if word in words]
    assert words or set(text.words) == {None}
    assert all(masked.ids[place] == text.ids[place] for place in set(range(len(text.ids))) - set(hidden))
    assert masked.words == text.words


@settings(max_examples=50, deadline=None)
@given(texts(), PROBABILITY, SEEDS)
def test_the_same_seed_gives_the_same_mask(text, probability, seed):
    first, again = (mask_words(text, probability, VOCABULARY, Random(seed)) for _ in range(2))
    assert first == again


def test_masked_tokens_are_hidden_swapped_and_kept_at_80_10_10():
    ids = tuple(5 + i % 55 for i in range(200))
    text = Text((2, *ids, 3), (None, *range(200), None))
    fates = Counter()
    for seed in range(100):
        masked, hidden = mask_words(text, 1.0, VOCABULARY, Random(seed))
        assert len(hidden) == 200
        for place in hidden:
            fate = masked.ids[place]
            fates["mask" if fate == VOCABULARY.mask else "kept" if fate == text.ids[place] else "swapped"] += 1
    assert fates["mask"] / 20000 == pytest.approx(0.8, abs=0.015)
    assert fates["swapped"] / 20000 == pytest.approx(0.1, abs=0.01)
    assert fates["kept"] / 20000 == pytest.approx(0.1, abs=0.01)


def test_words_are_masked_at_the_given_probability():
    text = Text((2, *range(5, 45), 3), (None, *range(40), None))
    share = sum(len(mask_words(text, 0.15, VOCABULARY, Random(seed))[1]) for seed in range(500)) / (500 * 40)
    assert share == pytest.approx(0.15, abs=0.01)


def laid(task, samples, vocabulary):
    batch = PairBatch(vocabulary, 4, 40, 8)
    task.lay(batch, samples)
    return batch.build()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=9).map(tuple), max_size=3), max_size=5))
def test_labels_are_the_original_ids_at_the_masked_places(vocabulary, make_sample, captions):
    samples = [make_sample(position, texts) for position, texts in enumerate(captions)]
    made = laid(TASKS["mlm"](probability=0.4), samples, vocabulary)
    target = made.targets["mlm"]
    assert (target.weight == 1).all()
    originals = [(sample.position, text) for sample in samples for text in sample.texts]
    seen = set()
    for (pair, place), label in zip(target.rows.tolist(), target.labels.tolist(), strict=True):
        image, text = made.pairs[pair].tolist()
        assert made.text_mask[text, place] and label not in (vocabulary.cls, vocabulary.sep, vocabulary.pad)
        position = made.image_id[image].item()
        length = int(made.text_mask[text].sum())
        assert any(
            own == position and len(original.ids) == length and original.ids[place] == label
            for own, original in originals
        )
        seen.add(position)
    assert seen == {position for position, _ in originals}
    assert len(target.labels) >= len(originals)


def test_a_text_is_masked_anew_at_every_visit(vocabulary, make_sample):
    sample = make_sample(0, [tuple(range(20))])
    first, again, other = (
        laid(TASKS["mlm"](), [sample._replace(visit=visit)], vocabulary) for visit in ("7/0", "7/0", "7/41")
    )
    assert torch.equal(first.text_ids, again.text_ids)
    assert torch.equal(first.targets["mlm"].rows, again.targets["mlm"].rows)
    assert not torch.equal(first.targets["mlm"].labels, other.targets["mlm"].labels)


def test_a_batch_without_texts_still_answers_with_no_rows(vocabulary):
    target = laid(TASKS["mlm"](), [], vocabulary).targets["mlm"]
    assert target.rows.shape == (0, 2) and target.labels.shape == (0,)
