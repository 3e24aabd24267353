import pytest
import torch

from dist_fusion.batch import PairBatch, Statement, Supply, answers_to
from dist_fusion.schema import UserError
from dist_fusion.tasks import TASKS

TASK = TASKS["snli_ve"]()
CLASSES = ("contradiction", "entailment", "neutral")


def laid(task, samples, vocabulary):
    batch = PairBatch(vocabulary, 4, 40, 1)
    task.lay(batch, samples)
    made = batch.build()
    return made, made.targets["snli_ve"]


def said(*statements):
    return [Statement(str(n), words, label, "") for n, (words, label) in enumerate(statements)]


def test_labels_are_numbered_in_the_order_that_the_recipe_gives(vocabulary, make_sample):
    sample = make_sample(0, statements=said(*(((n,), label) for n, label in enumerate(CLASSES))))
    other = TASKS["snli_ve"](labels=("contradiction", "neutral", "entailment"))
    assert laid(TASK, [sample], vocabulary)[1].labels.tolist() == [0, 1, 2]
    assert laid(other, [sample], vocabulary)[1].labels.tolist() == [0, 2, 1]


def test_another_order_of_classes_is_another_head(vocabulary):
    other = TASKS["snli_ve"](labels=("contradiction", "neutral", "entailment"))
    assert TASK.head(vocabulary) == TASKS["snli_ve"](labels=CLASSES).head(vocabulary) != other.head(vocabulary)


@pytest.mark.parametrize("labels", [("yes", "no"), ("yes", "no", "no"), (*CLASSES, "-")])
def test_the_classes_are_three(labels):
    with pytest.raises(ValueError, match="it must be three different names"):
        TASKS["snli_ve"](labels=labels)


def test_the_hypothesis_is_the_only_text(vocabulary, make_sample):
    """A caption beside it, SNLI's premise, would tell the label without the image."""
    made, target = laid(TASK, [make_sample(0, [(7, 8, 9)], statements=said(((1, 2), "neutral")))], vocabulary)
    assert made.text_ids.tolist() == [[2, 11, 12, 3]]
    assert made.pairs[target.rows[:, 0]].tolist() == [[0, 0]]


def test_equal_hypotheses_share_a_text_and_an_image_is_encoded_once(vocabulary, make_sample):
    samples = [make_sample(i, statements=said(((1,), "neutral"), ((2,), "entailment"))) for i in range(2)]
    made, target = laid(TASK, samples, vocabulary)
    assert len(made.images) == len(made.text_ids) == 2
    assert made.pairs[target.rows[:, 0]].tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]


def test_an_unknown_label_is_refused_and_pairs_of_images_are_passed_over(vocabulary, make_sample):
    with pytest.raises(UserError, match=r"the label '-' is not in tasks\.snli_ve\.labels, which has contradiction, "):
        TASK.eligible(Supply(images=1, texts=0, questions=0, labels=("neutral", "-")))
    assert TASK.eligible(Supply(images=1, texts=0, questions=0, labels=("neutral",)))
    assert not TASK.eligible(Supply(images=2, texts=0, questions=0, labels=("True",)))
    pair = make_sample(0, statements=said(((1,), "True")))._replace(images=(torch.zeros(3, 4, 4),) * 2)
    assert laid(TASK, [pair], vocabulary)[1].rows.shape == (0, 1)


def test_the_likeliest_class_is_right_or_wrong():
    target = answers_to([(0,), (1,), (2,)], 1, torch.tensor([0, 1, 2]))
    verdict = TASK.judge(torch.tensor([[2.0, 1, 0], [2, 1, 0], [0, 1, 2]]), target)
    assert verdict.answer.tolist() == [0, 0, 2] and verdict.score.tolist() == [1, 0, 1]
    assert TASK.classes() == CLASSES
