import hashlib
import json
import re

import pytest
from easy_vqa import get_train_questions
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_fusion.data.prepare.easy_vqa import COLOURS, KINDS, SHAPES, Counts, Facts, facts, kind_of, prepare
from dist_fusion.data.shards import find_shards, read_records
from dist_fusion.data.text import Tokenizer

IMAGES = {"train": 3600, "dev": 400, "test": 1000}
QUESTIONS = {"train": 34683, "dev": 3892, "test": 9673}
TEMPLATES = sorted(
    {
        re.sub(rf"\b({'|'.join(SHAPES)})\b", "SHAPE", re.sub(rf"\b({'|'.join(COLOURS)})\b", "COLOUR", question))
        for question in get_train_questions()[0]
    }
)


def test_the_questions_have_24_templates():
    assert len(TEMPLATES) == 24


def ask(template, colour, shape, named_colour, named_shape):
    """A question of the template about an image of that colour and shape, and its true answer."""
    if template.startswith("what"):
        question = template.replace("COLOUR", colour).replace("SHAPE", shape)
        return question, colour if template.startswith("what color") or "the color of" in template else shape
    question = template.replace("COLOUR", named_colour).replace("SHAPE", named_shape)
    holds = named_colour == colour if "COLOUR" in template else named_shape == shape
    denied = " not " in template or template.startswith("is no ")
    return question, "yes" if holds != denied else "no"


COLOUR, SHAPE = st.sampled_from(COLOURS), st.sampled_from(SHAPES)


@settings(max_examples=300, deadline=None)
@given(COLOUR, SHAPE, st.lists(st.tuples(st.sampled_from(TEMPLATES), COLOUR, SHAPE), max_size=14))
def test_facts_never_rule_out_what_is_true_and_rule_out_all_that_was_denied(colour, shape, asked):
    questions = [ask(template, colour, shape, *named) for template, *named in asked]
    known = facts(questions)
    assert colour in known.colours and shape in known.shapes
    assert known.caption() in (None, f"a {colour} {shape}")
    for (template, named_colour, named_shape), (question, answer) in zip(asked, questions, strict=True):
        if template.startswith("what"):
            if answer == colour or colour in question:
                assert known.colours == {colour}
            if answer == shape or shape in question:
                assert known.shapes == {shape}
        elif "COLOUR" in template:
            assert named_colour == colour or named_colour not in known.colours
        else:
            assert named_shape == shape or named_shape not in known.shapes


@pytest.mark.parametrize(
    ("asked", "caption"),
    [
        ([], None),
        ([("what color is the shape?", "teal")], None),
        ([("what color is the rectangle?", "teal")], "a teal rectangle"),
        ([("what is the teal shape?", "rectangle")], "a teal rectangle"),
        ([("is there a teal shape?", "yes"), ("what shape is present?", "circle")], "a teal circle"),
        ([("is no red shape present?", "no"), ("is there not a circle?", "no")], "a red circle"),
        (
            [("is there a circle?", "no"), ("is a triangle present?", "no"), ("is there a red shape?", "yes")],
            "a red rectangle",
        ),
    ],
)
def test_a_caption_follows_where_colour_and_shape_are_known(asked, caption):
    assert facts(asked).caption() == caption


def test_all_colours_but_one_denied_leave_that_one():
    denied = [(f"is there a {colour} shape?", "no") for colour in COLOURS if colour != "teal"]
    assert facts(denied) == Facts(frozenset({"teal"}), frozenset(SHAPES))


@pytest.mark.parametrize("truth", [("teal", "colour"), ("circle", "shape"), ("yes", "yes/no"), ("no", "yes/no")])
def test_the_kind_of_a_question_is_that_of_its_answer(truth):
    assert kind_of(truth[0]) == truth[1]


@pytest.fixture(scope="module")
def records(easy_vqa):
    folder = easy_vqa
    return {split: list(read_records(find_shards([str(folder / split)]))) for split in IMAGES}


def test_every_image_and_question_is_written(easy_vqa, records):
    counts = {split: Counts(**n) for split, n in json.loads((easy_vqa / "prepare.json").read_text()).items()}
    for split in IMAGES:
        assert counts[split].images == len(records[split]) == IMAGES[split]
        assert counts[split].questions == sum(len(r.questions) for r in records[split]) == QUESTIONS[split]
        assert counts[split].captions == sum(len(r.texts) for r in records[split]) > IMAGES[split] / 2


def test_no_image_is_in_two_splits(records):
    names = [record.image_ids[0] for split in IMAGES for record in records[split]]
    assert len(names) == len(set(names)) == sum(IMAGES.values())
    bytes_of = {split: {hashlib.sha256(r.images[0]).digest() for r in records[split]} for split in IMAGES}
    assert not bytes_of["train"] & bytes_of["dev"]
    assert not bytes_of["train"] & bytes_of["test"]
    assert not bytes_of["dev"] & bytes_of["test"]


def test_captions_agree_with_all_answers_of_their_image(records):
    for record in (record for split in IMAGES for record in records[split] if record.texts):
        _, colour, shape = record.texts[0].split()
        for question in record.questions:
            (answer,) = question["answers"]
            assert question["kind"] == kind_of(answer)
            assert question["kind"] == "yes/no" or answer in (colour, shape)


def test_the_answers_are_all_that_are_ever_given(easy_vqa, records):
    tree = json.loads((easy_vqa / "answers.json").read_text())
    given_answers = {a for split in IMAGES for r in records[split] for q in r.questions for a in q["answers"]}
    assert set(tree["answers"]) == given_answers == {*COLOURS, *SHAPES, "yes", "no"}
    assert tree["answers"] == sorted(tree["answers"]) and tree["kinds"] == list(KINDS)


def test_the_vocabulary_knows_every_word(easy_vqa, records):
    tokenizer = Tokenizer(str(easy_vqa / "vocab.txt"), 64)
    unknown = tokenizer.entries.index("[UNK]")
    questions = {q["question"] for split in IMAGES for r in records[split] for q in r.questions}
    captions = {text for split in IMAGES for r in records[split] for text in r.texts}
    assert not any(unknown in tokenizer(text).ids for text in questions | captions)


def test_preparing_twice_gives_the_same_bytes(easy_vqa, tmp_path):
    prepare(tmp_path)
    for path in sorted(path for path in easy_vqa.rglob("*") if path.is_file() and path.suffix != ".index"):
        assert path.read_bytes() == (tmp_path / path.relative_to(easy_vqa)).read_bytes(), path.name
