import hashlib
import io
import json
import re
from collections import Counter, defaultdict

import numpy as np
import pytest
from PIL import Image

from dist_fusion.data.prepare.easy_forms import (
    COVER_GREY,
    COVER_SIDE,
    DRAWS,
    Counts,
    hypotheses,
    prepare_nlvr2,
    sentences,
)
from dist_fusion.data.prepare.easy_vqa import COLOURS, SHAPES, facts, read_splits
from dist_fusion.data.shards import find_shards, read_records
from dist_fusion.data.text import Tokenizer

SPLITS = ("train", "dev", "test")


@pytest.fixture(scope="module")
def known():
    """sha256 of an image -> (split, colour, shape), as its questions tell."""
    table = {}
    for name, split in read_splits().items():
        for image, asked in split.questions.items():
            caption = facts(asked).caption()
            if caption:
                table[digest(split.paths[image].read_bytes())] = (name, *caption.split()[1:])
    return table


def digest(data):
    return hashlib.sha256(data).hexdigest()


def records_of(folder):
    return {split: list(read_records(find_shards([str(folder / split)]))) for split in SPLITS}


@pytest.fixture(scope="module")
def pairs(easy_nlvr2):
    return records_of(easy_nlvr2)


@pytest.fixture(scope="module")
def judged(easy_snli_ve):
    return records_of(easy_snli_ve)


def told(text, left, right):
    """Whether a sentence about two (colour, shape)s is true, read from its words alone."""
    shows = [set(left), set(right)]
    sides = re.fullmatch(r"the left image contains a (\w+) and the right image contains a (\w+)", text)
    if sides:
        return all(word in shown for word, shown in zip(sides.groups(), shows, strict=True))
    if text.startswith("the two shapes"):
        place = 0 if text == "the two shapes have the same color" else 1
        return left[place] == right[place]
    (word,) = set(re.findall(r"\w+", text)) & {*COLOURS, *SHAPES}
    one = re.fullmatch(r"the (left|right) image contains .*", text)
    if one:
        return word in shows[("left", "right").index(one[1])]
    how_many = sum(word in shown for shown in shows)
    return how_many == {"both": 2, "exactly": 1, "neither": 0}[text.split()[0]]


def test_every_sentence_is_true_of_its_pair_as_labelled_by_the_facts(pairs, known):
    for split in SPLITS:
        for record in pairs[split]:
            (_, *left), (_, *right) = (known[digest(image)] for image in record.images)
            (statement,) = record.statements
            assert statement["label"] == str(told(statement["text"], left, right))


def test_the_text_alone_tells_exactly_half_of_the_labels(pairs):
    for split in SPLITS:
        seen = defaultdict(Counter)
        for record in pairs[split]:
            seen[record.statements[0]["text"]][record.statements[0]["label"]] += 1
        assert sum(max(labels.values()) for labels in seen.values()) * 2 == len(pairs[split]) == 2 * DRAWS[split]
        assert set(seen) == {sentence.text for sentence in sentences()}


def test_a_group_is_one_sentence_with_a_true_and_a_false_pair(pairs):
    groups = defaultdict(list)
    for record in pairs["dev"]:
        (statement,) = record.statements
        groups[statement["group"]].append((statement["text"], statement["label"]))
    for (one, label), (other, opposite) in groups.values():
        assert one == other and {label, opposite} == {"True", "False"}


def test_one_image_does_not_tell_whether_exactly_one_or_both_alike(pairs, known):
    """Over the whole of train, the best guess from the left image and the sentence is hardly better than a coin."""
    seen = defaultdict(Counter)
    for record in pairs["train"]:
        (statement,) = record.statements
        text = statement["text"]
        if text.startswith(("exactly", "the two")):
            _, colour, shape = known[digest(record.images[0])]
            words = {colour, shape} & set(text.split()) if text.startswith("exactly") else {colour, shape}
            seen[text, frozenset(words)][statement["label"]] += 1
    rows, right = (sum(f(labels.values()) for labels in seen.values()) for f in (sum, max))
    assert right / rows < 0.56


@pytest.mark.parametrize("form", ["pairs", "judged"])
def test_a_picture_is_in_one_split_only_and_test_has_only_test_pictures(request, form, known):
    for split, records in request.getfixturevalue(form).items():
        plain = [image for record in records for image in record.images if "/covered" not in record.image_ids[0]]
        assert {known[digest(image)][0] for image in plain} == {split}
    if form == "judged":
        names = [
            {record.image_ids[0].removesuffix("/covered") for record in records}
            for records in request.getfixturevalue(form).values()
        ]
        assert not names[0] & names[1] and not names[0] & names[2] and not names[1] & names[2]


def test_hypotheses_are_labelled_by_the_facts_and_neutral_where_the_shape_is_covered(judged, known):
    for split in SPLITS:
        for record in judged[split]:
            covered = record.image_ids[0].endswith("/covered")
            scene = None if covered else known[digest(record.images[0])][1:]
            assert record.texts == (() if covered else ("a {} {}".format(*scene),))
            assert record.statements or not covered
            for statement in record.statements:
                words = set(re.findall(r"\w+", statement["text"])) & {*COLOURS, *SHAPES}
                label = "neutral" if covered else "entailment" if words <= set(scene) else "contradiction"
                assert statement["label"] == label


def test_the_hypothesis_alone_tells_exactly_a_third_of_the_labels(judged):
    for split in SPLITS:
        seen = defaultdict(Counter)
        for statement in (statement for record in judged[split] for statement in record.statements):
            seen[statement["text"]][statement["label"]] += 1
        assert sum(max(labels.values()) for labels in seen.values()) == DRAWS[split]
        assert sum(sum(labels.values()) for labels in seen.values()) == 3 * DRAWS[split]
        assert set(seen) == set(hypotheses()) or (split == "dev" and set(seen) < set(hypotheses()))


def test_a_cover_leaves_a_grey_square_and_the_ground_alone(judged):
    for record in judged["dev"]:
        if record.image_ids[0].endswith("/covered"):
            pixels = np.asarray(Image.open(io.BytesIO(record.images[0])).convert("RGB")).astype(int)
            grey = (pixels == COVER_GREY).all(-1)
            assert grey.sum() == COVER_SIDE**2
            assert np.ptp(pixels[~grey], axis=0).max() <= 12


def test_the_vocabulary_knows_every_word_and_the_counts_are_kept(easy_nlvr2, easy_snli_ve, pairs, judged):
    for folder, records in ((easy_nlvr2, pairs), (easy_snli_ve, judged)):
        tokenizer = Tokenizer(str(folder / "vocab.txt"), 64)
        unknown = tokenizer.entries.index("[UNK]")
        texts = {s["text"] for of in records.values() for record in of for s in record.statements}
        texts |= {text for of in records.values() for record in of for text in record.texts}
        assert not any(unknown in tokenizer(text).ids for text in texts)
        for split, counts in json.loads((folder / "prepare.json").read_text()).items():
            statements = sum(len(record.statements) for record in records[split])
            assert Counts(**counts) == (len(records[split]), statements)


def test_preparing_twice_gives_the_same_bytes(easy_nlvr2, tmp_path):
    prepare_nlvr2(tmp_path)
    for path in sorted(path for path in easy_nlvr2.rglob("*") if path.is_file() and path.suffix != ".index"):
        assert path.read_bytes() == (tmp_path / path.relative_to(easy_nlvr2)).read_bytes(), path.name
