"""Scores over a whole pass; on several ranks: test_distributed.py."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_fusion.batch import Question
from dist_fusion.data.index import Damage
from dist_fusion.data.stream import Loaded
from dist_fusion.evaluate import Evaluation, evaluate
from dist_fusion.tasks import TASKS
from dist_fusion.tasks.measures import Confusion, Judged, Score, confusion, score_by_kind
from tests import tiny

CPU = torch.device("cpu")


def judged(rows):
    """From (kind, group, label, answer, score)s."""
    *numbers, score = zip(*rows, strict=True) if rows else [()] * 5
    return Judged(*map(torch.tensor, numbers), torch.tensor(score, dtype=torch.float64))


ROWS = st.lists(st.tuples(*[st.integers(0, 2)] * 4, st.sampled_from([0.0, 0.3, 0.6, 0.9, 1.0])), min_size=1)


@settings(max_examples=60, deadline=None)
@given(ROWS, st.randoms())
def test_scores_and_counts_do_not_depend_on_the_order_of_the_rows(rows, random):
    mixed = random.sample(rows, len(rows))
    scores, again = (score_by_kind(judged(order), ("a", "b", "c")) for order in (rows, mixed))
    assert scores == again
    assert sum(score.rows for score in scores.values()) == len(rows)
    for number, kind in enumerate("abc"):
        mine = [score for k, *_, score in rows if k == number]
        assert (kind in scores) == bool(mine)
        assert not mine or scores[kind].total == math.fsum(mine)
    counts = confusion(judged(rows), ("x", "y", "z")).counts
    assert counts == confusion(judged(mixed), ("x", "y", "z")).counts
    assert counts[1][2] == sum((label, answer) == (1, 2) for _, _, label, answer, _ in rows)


def test_a_question_that_no_known_answer_fits_counts_and_scores_nothing(tmp_path):
    (tmp_path / "answers.json").write_text(json.dumps({"answers": ["yes", "no"], "kinds": []}))
    task = TASKS["vqa"](answers=str(tmp_path / "answers.json"))
    (sample,) = tiny.samples(1)
    text = sample.texts[0]
    questions = [Question("0", text, {"yes": 1.0, "no": 1.0}, ""), Question("1", text, {"purple": 1.0}, "")]
    batch = tiny.batch({"vqa": task}, [sample._replace(questions=tuple(questions))])
    model = tiny.model(tiny.model_config(), {"vqa": task})
    found = evaluate(model, {"vqa": task}, [Loaded(batch, ())], CPU)
    assert found.scores == {"vqa": {"other": Score(1.0, 2)}}


def test_rows_that_do_not_count_are_not_judged(two_images_of_one_caption):
    found = evaluate(*two_images_of_one_caption, CPU)
    assert found == Evaluation({}, {}, 1)


@pytest.fixture
def two_images_of_one_caption():
    """Nothing to tell apart: every row of retrieval weighs 0."""
    tasks = {"retrieval": tiny.FINETUNING["retrieval"]}
    batch = tiny.batch(tasks, tiny.samples(4, captions=1))
    return (
        tiny.model(tiny.model_config(), tasks),
        tasks,
        [Loaded(batch, (Damage("0.tar", "7", "undecodable image", "no picture"),))],
    )


def test_a_pass_without_a_batch_gives_no_score():
    model = tiny.model(tiny.model_config(num_slots=2), tiny.FINETUNING)
    assert evaluate(model, tiny.FINETUNING, [], CPU) == Evaluation({}, {}, 0)


def test_measures_stand_beside_the_scores_and_classes_have_their_names():
    model = tiny.model(tiny.model_config(num_slots=2), tiny.FINETUNING)
    batch = tiny.batch(tiny.FINETUNING, tiny.samples(8, paired=True))
    found = evaluate(model, tiny.FINETUNING, [Loaded(batch, ())], CPU)
    assert set(found.percents("dev")) == {
        "dev/nlvr2/statements", "dev/nlvr2/consistency", "dev/snli_ve/statements", "dev/retrieval/recall@1"
    }  # fmt: skip
    assert found.scores["nlvr2"]["statements"].rows == 8 == 2 * found.scores["nlvr2"]["consistency"].rows
    assert sum(map(sum, found.confusions["snli_ve"].counts)) == 8
    assert found.confusions["nlvr2"].classes == ("false", "true")
    assert model.training


def test_a_matrix_is_printed_with_the_names_of_its_classes():
    scores = {"snli_ve": {"statements": Score(2.0, 3)}}
    matrix = Confusion(("no", "yes", "open"), ((1, 0, 0), (0, 1, 0), (20, 0, 0)))
    lines = Evaluation(scores, {"snli_ve": matrix}, 1).as_text().splitlines()
    assert lines[0].split() == ["snli_ve", "statements", "66.67", "%", "of", "3"]
    assert [line.split() for line in lines[3:7]] == [
        ["no", "yes", "open"], ["no", "1", "0", "0"], ["yes", "0", "1", "0"], ["open", "20", "0", "0"]
    ]  # fmt: skip
    assert len({len(line) for line in lines[3:7]}) == 1
    assert lines[7] == "1 samples could not be read and were not scored"
