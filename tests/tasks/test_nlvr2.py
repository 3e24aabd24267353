import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_fusion.batch import PairBatch, Statement, Supply, answers_to, content_id
from dist_fusion.distill import DistillConfig, objective, row_weights
from dist_fusion.kernels import attention_kl
from dist_fusion.schema import UserError
from dist_fusion.tasks import TASKS
from dist_fusion.tasks.measures import Judged
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
    one_image = make_sample(0, statements=[Statement("0", (1,), "entailment", "")])
    _, target = laid([one_image], vocabulary)
    assert target.rows.shape == (0, 2) and target.labels.shape == target.group.shape == (0,)


ROWS = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1), st.integers(0, 5)), min_size=1, max_size=20)


@settings(max_examples=60, deadline=None)
@given(ROWS)
def test_consistency_counts_the_sentences_that_are_right_on_all_their_pairs(rows):
    labels, answers, groups = (torch.tensor(column) for column in zip(*rows, strict=True))
    target = answers_to([(0, 0)] * len(rows), 2, labels, group=groups.tolist())
    verdict = TASK.judge(torch.nn.functional.one_hot(answers, 2).float(), target)
    judged = Judged(target.kind, target.group, *verdict)
    right = [all(label == answer for label, answer, g in rows if g == group) for group in {g for *_, g in rows}]
    assert tuple(TASK.measures(judged)["consistency"]) == (sum(right), len(right))


def attention_loss(student, lessons, batch):
    tasks = {"nlvr2": TASK}
    config = DistillConfig(targets="both", hard=0)
    return objective(config, tasks, batch, student(batch), lessons, row_weights([batch], tasks)).total.item()


def two_images(count):
    return [sample for sample in tiny.samples(2 * count, paired=True) if len(sample.images) == 2]


@pytest.fixture(scope="module")
def models():
    tasks = {"nlvr2": TASK}
    kinds = [("dual-encoder", 0), ("fusion-encoder", 1)]
    return [tiny.model(tiny.model_config(kind, num_slots=2), tasks, seed).eval() for kind, seed in kinds]


def test_each_image_is_matched_with_the_teachers_view_of_that_image(models):
    """A student that attends like the teacher has no loss, and one that is shown the other image of the pair has."""
    _, teacher = models
    batch = tiny.batch({"nlvr2": TASK}, two_images(4))
    taps = teacher(batch).taps
    rows = batch.targets["nlvr2"].rows
    swapped = torch.empty(len(batch.pairs), dtype=torch.int64)
    swapped[rows[:, 0]], swapped[rows[:, 1]] = rows[:, 1], rows[:, 0]
    for tap in taps.values():
        same, other = (
            attention_kl(tap.query, tap.key, tap.query[order], tap.key[order], query_mask=tap.query_mask,
                         key_mask=tap.key_mask, pair_weight=batch.weights["attention"])
            for order in (torch.arange(len(swapped)), swapped)
        )  # fmt: skip
        assert abs(same.item()) < 1e-5 < other.item()


def test_the_right_image_has_a_modality_row_of_its_own_in_both_models(models):
    batch = tiny.batch({"nlvr2": TASK}, two_images(2))
    for model in models:
        tables = [m for m in model.modules() if isinstance(m, torch.nn.Embedding) and m.num_embeddings == 2]
        taps = model(batch).taps
        assert tables
        for table in tables:
            with torch.no_grad():
                table.weight[1] += torch.randn(16, generator=torch.Generator().manual_seed(0))
        rows = batch.targets["nlvr2"].rows
        for site, tap in model(batch).taps.items():
            left, right = (torch.equal(tap.key[rows[:, slot]], taps[site].key[rows[:, slot]]) for slot in range(2))
            assert (left and not right) or site == "tower.i2t"  # there the keys are the text's, which saw no image


def test_both_pairs_of_a_statement_weigh_as_much_in_attention_distillation(models):
    student, teacher = models
    (sample,) = two_images(1)
    twins = sample._replace(images=(sample.images[0],) * 2)
    for model in models:
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, torch.nn.Embedding) and module.num_embeddings == 2:
                    module.weight[1] = module.weight[0]
    batch = tiny.batch({"nlvr2": TASK}, [twins])
    lessons = tiny.lessons(teacher, batch, ("nlvr2",))
    left, right = batch.targets["nlvr2"].rows.unbind(1)
    losses = []
    for rows in (left, right):
        weights = torch.zeros(len(batch.pairs)).index_fill(0, rows, 1.0)
        losses.append(attention_loss(student, lessons, batch._replace(weights={"attention": weights})))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert attention_loss(student, lessons, batch) == pytest.approx(losses[0], rel=1e-5)  # the mean of equal ones
