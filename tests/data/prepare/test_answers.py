import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_fusion.data.prepare.answers import LEAST, RESPELLED, in_order_of, normalised, scores, vocabulary
from dist_fusion.schema import UserError


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("Yes", "yes"),
        ("a Dog", "dog"),
        ("the two dogs", "2 dogs"),
        ("none", "0"),
        ("TEN", "10"),
        ("dont know", "don't know"),
        ("couldnt've", "couldn't've"),
        ("oclock", "o'clock"),
        ("somebody'd", "somebodyd"),
        ("im", "im"),  # VQA's table has only the capital form, which lower case never meets
        ("1,000", "1000"),  # a comma in a number: nothing is torn apart
        ("black-and-white", "black and white"),
        ("black - white", "black white"),  # beside a space a mark goes without a trace
        ("red/blue", "red blue"),
        ("3.5", "3.5"),
        ("st. john.", "st john"),
        ("what?!", "what"),
        ("", ""),
    ],
)
def test_an_answer_is_normalised_as_vilt_does_it(written, meant):
    assert normalised(written) == meant


def test_every_respelled_word_has_its_apostrophe_back():
    assert len(RESPELLED) == 114
    for wrong, right in RESPELLED.items():
        assert wrong.replace("'", "") == right.replace("'", "") and wrong != right


def test_an_answer_enters_the_vocabulary_with_nine_questions_in_the_order_of_first_appearance():
    asked = ["net"] + ["Yes"] * (LEAST - 2) + ["rare"] * (LEAST - 1) + ["yes", "yes."] + ["Net"] * LEAST
    assert vocabulary(asked) == ["net", "yes"]


def test_scores_are_by_how_many_of_ten_gave_the_answer_as_they_wrote_it():
    given_answers = ["yes"] * 4 + ["no"] * 3 + ["maybe"] * 2 + ["Maybe"]
    assert scores(given_answers, frozenset({"yes", "no", "maybe"})) == {"yes": 1.0, "no": 0.9, "maybe": 0.6}
    assert scores(["a"], frozenset({"a"})) == {"a": 0.3}
    assert scores(["a"] * 10, frozenset({"a"})) == {"a": 1.0}
    assert scores(["the net"] * 10, frozenset({"net"})) == {}  # not normalised here: ViLT's odd corner


@given(st.lists(st.sampled_from("abcde"), max_size=10))
def test_a_score_never_falls_when_more_annotators_agree(answers):
    before, after = (scores(of, frozenset("a")).get("a", 0.0) for of in (answers, [*answers, "a"]))
    assert before <= after


@pytest.mark.parametrize(
    "tree",
    [["b", "a", "c"], {"answers": ["b", "a", "c"], "kinds": []}, {"0": "b", "1": "a", "2": "c"},
     {"model_type": "vilt", "id2label": {"0": "b", "2": "c", "1": "a"}}],
)  # fmt: skip
def test_the_order_of_a_teachers_list_is_taken_in_every_form_it_has(tmp_path, tree):
    (tmp_path / "list.json").write_text(json.dumps(tree))
    assert in_order_of(tmp_path / "list.json", ["a", "b", "c"]) == ["b", "a", "c"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('["a", "b", "d"]', r"3 answers and the annotations give 3: 1 are not in the list \(c\), 1 only there \(d\)"),
        ('["a", "b", "c", "c"]', "4 answers and the annotations give 3: 0 are not in the list"),
        ('{"0": "a", "2": "b"}', "KeyError"),
        ("{", "it must be a JSON list of answers"),
        ("3", "it must be a JSON list of answers"),
    ],
)
def test_a_list_of_other_answers_is_told(tmp_path, content, message):
    (tmp_path / "list.json").write_text(content)
    with pytest.raises(UserError, match=message):
        in_order_of(tmp_path / "list.json", ["a", "b", "c"])
