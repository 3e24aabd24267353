import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_fusion.batch import PairBatch, Question, answers_to
from dist_fusion.schema import UserError
from dist_fusion.tasks import TASKS


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    path = tmp_path_factory.mktemp("answers") / "answers.json"
    path.write_text(json.dumps({"answers": ["no", "red", "yes"], "kinds": ["colour", "yes/no"]}))
    return str(path)


def laid(task, samples, vocabulary):
    batch = PairBatch(vocabulary, 4, 40, 1)
    task.lay(batch, samples)
    return batch.build()


def question(number, answers, kind="colour"):
    return Question(str(number), (number,), answers, kind)


def test_answers_become_scores_and_one_outside_the_list_scores_nothing(vocabulary, make_sample, answers):
    questions = [
        question(1, {"red": 1.0, "green": 0.6}),
        question(2, {"yes": 0.3, "no": 0.9}, "yes/no"),
        question(3, {"green": 1.0}, "unheard of"),
    ]
    made = laid(TASKS["vqa"](answers=answers), [make_sample(0, questions=questions)], vocabulary)
    target = made.targets["vqa"]
    expected = [[0, 1, 0], [0.9, 0, 0.3], [0, 0, 0]]
    torch.testing.assert_close(target.labels, torch.tensor(expected, dtype=torch.float32))
    assert target.kind.tolist() == [0, 1, 2]  # the last is "other"
    assert target.weight.tolist() == [1, 1, 1]


def test_an_image_with_several_questions_is_encoded_once(vocabulary, make_sample, answers):
    samples = [make_sample(i, questions=[question(n, {"yes": 1.0}) for n in range(4)]) for i in range(3)]
    made = laid(TASKS["vqa"](answers=answers), samples, vocabulary)
    assert len(made.images) == 3
    assert len(made.text_ids) == 4  # all three are asked the same
    assert made.pairs[made.targets["vqa"].rows[:, 0]].tolist() == [[i, n] for i in range(3) for n in range(4)]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 6), st.lists(st.integers(0, 6), min_size=1, max_size=4))
def test_questions_per_image_limits_each_image(vocabulary, make_sample, answers, limit, counts):
    samples = [
        make_sample(i, questions=[question(n, {"yes": 1.0}) for n in range(count)]) for i, count in enumerate(counts)
    ]
    made = laid(TASKS["vqa"](answers=answers, questions_per_image=limit), samples, vocabulary)
    rows = made.pairs[made.targets["vqa"].rows[:, 0]]
    asked = [made.image_id[image].item() for image, _ in rows.tolist()]
    for i, count in enumerate(counts):
        assert asked.count(i) == (min(limit, count) if limit else count)
    assert len(rows.unique(dim=0)) == len(rows)


def test_the_questions_are_drawn_anew_at_every_visit(vocabulary, make_sample, answers):
    task = TASKS["vqa"](answers=answers, questions_per_image=5)
    sample = make_sample(0, questions=[question(n, {"yes": 1.0}) for n in range(20)])
    first, again, other = (laid(task, [sample._replace(visit=v)], vocabulary) for v in ("7/0", "7/0", "7/41"))
    assert torch.equal(first.text_ids, again.text_ids)
    assert not torch.equal(first.text_ids, other.text_ids)


def test_a_batch_without_questions_still_answers_with_no_rows(vocabulary, make_sample, answers):
    target = laid(TASKS["vqa"](answers=answers), [make_sample(0, [(1,)])], vocabulary).targets["vqa"]
    assert target.rows.shape == (0, 1) and target.labels.shape == (0, 3)


def rows_of(labels):
    return answers_to([(i,) for i in range(len(labels))], 1, labels)


SCORES = st.lists(st.lists(st.floats(0, 1, width=32), min_size=4, max_size=4), min_size=1, max_size=5)


@settings(max_examples=50, deadline=None)
@given(SCORES, st.integers(0, 1000))
def test_the_score_is_that_of_the_answer_given(scores, seed):
    labels = torch.tensor(scores)
    logits = torch.rand(labels.shape, generator=torch.Generator().manual_seed(seed))
    expected = [row[max(range(4), key=answer.__getitem__)] for row, answer in zip(scores, logits.tolist(), strict=True)]
    assert TASKS["vqa"]().judge(logits, rows_of(labels)).score.tolist() == pytest.approx(expected)


def test_the_loss_of_knowing_nothing_is_ln_2_an_answer():
    zeros = torch.zeros(3, 7)
    assert TASKS["vqa"]().hard_loss(zeros, rows_of(zeros)).tolist() == pytest.approx([7 * math.log(2)] * 3)


def test_the_soft_loss_is_lowest_where_the_student_is_the_teacher():
    task, teacher = TASKS["vqa"](), torch.tensor([[2.0, -1.0, 0.0]])
    lowest = task.soft_loss(teacher, teacher)
    probability = teacher.sigmoid()
    entropy = -(probability * probability.log() + (1 - probability) * (1 - probability).log()).sum(-1)
    torch.testing.assert_close(lowest, entropy)
    for step in (-0.1, 0.1):
        assert task.soft_loss(teacher + step, teacher) > lowest


def test_the_head_has_one_output_an_answer(vocabulary, answers):
    task = TASKS["vqa"](answers=answers)
    assert task.head(vocabulary).num_outputs == 3
    assert task.kinds() == ("colour", "yes/no", "other")


@pytest.mark.parametrize("content", [None, "", "[1, 2]", '{"kinds": ["yes"]}', '{"answers": 3, "kinds": []}', "\udcff"])
def test_a_missing_or_wrong_answer_list_is_told(tmp_path, vocabulary, content):
    path = tmp_path / "answers.json"
    if content is not None:
        path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(UserError) as error:
        TASKS["vqa"](answers=str(path)).head(vocabulary)
    assert f"tasks.vqa.answers is {str(path)!r}" in str(error.value)
    assert 'it must be a JSON file {"answers": [...], "kinds": [...]}' in str(error.value)
