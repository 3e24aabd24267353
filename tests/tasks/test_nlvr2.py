import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_fusion.batch import PairBatch, Statement, Supply, answers_to, content_id
from dist_fusion.distill import DistillConfig, objective, row_weights
from dist_fusion.schema import UserError
from dist_fusion.tasks import TASKS
from tests import tiny

TASK = TASKS["nlvr2"]()


@pytest.fixture(scope="module")
def pair_of(make_sample):
    """Builds a sample of two images from (words, label, group)s."""

    def build(position, *statements):
        said = [Statement(str(n), words, label, group) for n, (words, label, group) in enumerate(statements)]
        sample = make_sample(position, statements=said)
        images = tuple(torch.full((3, 4, 4), 2.0 * position + slot) for slot in range(2))
        return sample._replace(images=images, image_ids=(2 * position, 2 * position + 1))

    return build


def laid(samples, vocabulary):
    batch = PairBatch(vocabulary, 4, 40, 1)
    TASK.lay(batch, samples)
    made = batch.build()
    return made, made.targets["nlvr2"]


def test_a_row_is_a_sentence_with_the_left_and_the_right_image_each_in_its_slot(vocabulary, pair_of):
    samples = [pair_of(0, ((1, 2), "True", "a"), ((3,), "False", "b")), pair_of(1, ((1, 2), "False", "a"))]
    made, target = laid(samples, vocabulary)
    image, text = made.pairs[target.rows].unbind(-1)  # [R, 2] each
    assert made.image_slot[image].tolist() == [[0, 1]] * 3
    assert made.images[image][..., 0, 0, 0].tolist() == [[0, 1], [0, 1], [2, 3]]
    assert (text[:, 0] == text[:, 1]).all()
    assert len(made.text_ids) == 2 and len(made.images) == 4  # each once
    assert made.weights["attention"].tolist() == [1.0] * 6
    assert target.group.tolist() == [content_id(group) for group in ("a", "b", "a")]


@pytest.mark.parametrize(("label", "number"), [("False", 0), ("false", 0), ("FALSE", 0), ("True", 1), ("true", 1)])
def test_labels_are_words_of_any_case(vocabulary, pair_of, label, number):
    """bool("False") is true: taking that for the label would make all statements true."""
    assert laid([pair_of(0, ((1,), label, ""))], vocabulary)[1].labels.tolist() == [number]


def test_another_label_is_refused_and_samples_of_one_image_or_no_statement_are_passed_over(vocabulary, make_sample):
    with pytest.raises(UserError, match=r"tasks\.nlvr2 cannot read the label '1'; it must be True or False"):
        TASK.eligible(Supply(images=2, texts=0, questions=0, labels=("True", "1")))
    assert not TASK.eligible(Supply(images=1, texts=0, questions=0, labels=("entailment",)))
    assert not TASK.eligible(Supply(images=2, texts=3, questions=3, labels=()))
    made, target = laid([make_sample(0, statements=[Statement("0", (1,), "entailment", "")])], vocabulary)
    assert target.rows.shape == (0, 2) and target.labels.shape == target.group.shape == (0,)


ROWS = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1), st.integers(0, 5)), min_size=1, max_size=20)


@settings(max_examples=60, deadline=None)
@given(ROWS)
def test_consistency_counts_the_sentences_that_are_right_on_all_their_pairs(rows):
    from dist_fusion.evaluate import _counted

    labels, answers, groups = (torch.tensor(column) for column in zip(*rows, strict=True))
    target = answers_to([(0, 0)] * len(rows), 2, labels, group=groups.tolist())
    judged = _counted(target, TASK.judge(torch.nn.functional.one_hot(answers, 2).float(), target))
    right = [all(label == answer for label, answer, g in rows if g == group) for group in {g for *_, g in rows}]
    assert tuple(TASK.measures(judged)["consistency"]) == (sum(right), len(right))


def attention_loss(student, taught, batch):
    tasks = {"nlvr2": TASK}
    config = DistillConfig(targets="both", hard=0)
    return objective(config, tasks, batch, student(batch), taught, row_weights([batch], tasks)).total.item()


@pytest.fixture(scope="module")
def models():
    tasks = {"nlvr2": TASK}
    kinds = [("dual-encoder", 0), ("fusion-encoder", 1)]
    return [tiny.model(tiny.model_config(kind, num_slots=2), tasks, seed).eval() for kind, seed in kinds]


def test_each_image_is_matched_with_the_teachers_view_of_that_image(models):
    """A student that attends like the teacher is only told so while both look at the same image of the pair."""
    _, teacher = models
    batch = tiny.batch({"nlvr2": TASK}, [sample for sample in tiny.samples(8, paired=True) if len(sample.images) == 2])
    taps = teacher(batch).taps
    rows = batch.targets["nlvr2"].rows
    swapped = torch.empty(len(batch.pairs), dtype=torch.int64)
    swapped[rows[:, 0]], swapped[rows[:, 1]] = rows[:, 1], rows[:, 0]
    from dist_fusion.kernels import attention_kl

    for tap in taps.values():
        same, other = (
            attention_kl(tap.query, tap.key, tap.query[order], tap.key[order], query_mask=tap.query_mask,
                         key_mask=tap.key_mask, pair_weight=batch.weights["attention"])
            for order in (torch.arange(len(swapped)), swapped)
        )  # fmt: skip
        assert abs(same.item()) < 1e-5 < other.item()


def test_the_right_image_has_a_modality_row_of_its_own_in_both_models(models):
    batch = tiny.batch({"nlvr2": TASK}, [sample for sample in tiny.samples(4, paired=True) if len(sample.images) == 2])
    for model in models:
        before = model(batch).logits["nlvr2"]
        with torch.no_grad():
            model.image_embedding.modality.weight[1] += 1
        after = model(batch)
        assert not torch.equal(after.logits["nlvr2"], before)
        left = batch._replace(image_slot=torch.zeros_like(batch.image_slot))
        with torch.no_grad():
            model.image_embedding.modality.weight[1] -= 1
        assert torch.equal(model(left).logits["nlvr2"], model(left).logits["nlvr2"])


def test_both_pairs_of_a_statement_weigh_as_much_in_attention_distillation(models):
    student, teacher = models
    (sample,) = [sample for sample in tiny.samples(2, paired=True) if len(sample.images) == 2]
    twins = sample._replace(images=(sample.images[0],) * 2)
    for model in models:
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, torch.nn.Embedding) and module.num_embeddings == 2:
                    module.weight[1] = module.weight[0]
    batch = tiny.batch({"nlvr2": TASK}, [twins])
    with torch.no_grad():
        taught = teacher(batch)
    left, right = batch.targets["nlvr2"].rows.unbind(1)
    losses = []
    for rows in (left, right):
        weights = torch.zeros(len(batch.pairs)).index_fill(0, rows, 1.0)
        losses.append(attention_loss(student, taught, batch._replace(weights={"attention": weights})))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert attention_loss(student, taught, batch) == pytest.approx(losses[0], rel=1e-5)  # the mean of equal ones
