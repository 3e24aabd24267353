import pytest

from dist_fusion.data.prepare.snli_ve import LABELS
from dist_fusion.schema import UserError
from dist_fusion.tasks.snli_ve import SnliVe
from tests.data.prepare.sets import make, picture, put, put_lines, read


def row(image, number, label, key="Flikr30kID", ending=".jpg", hypothesis=None):
    """A line of snli_ve_*.jsonl, which has shipped with two names of the image."""
    return {
        "annotator_labels": [label if label != "-" else "neutral"], "captionID": f"{image}.jpg#4", "gold_label": label,
        "pairID": f"{image}.jpg#4r{number}", "sentence1": f"The caption of {image}", "sentence1_binary_parse": "( x )",
        "sentence1_parse": "(ROOT x)", "sentence2": f"Hypothesis {number}." if hypothesis is None else hypothesis,
        "sentence2_binary_parse": "( x )", "sentence2_parse": "(ROOT x)", key: f"{image}{ending}",
    }  # fmt: skip


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "snli"
    rows = [
        row(34, "1n", "neutral"), row(56, "1e", "entailment", "Flickr30K_ID", ""), row(34, "1c", "contradiction"),
        row(34, "2e", "-"), row(34, "3e", "entailment", hypothesis="  "),
    ]  # fmt: skip
    for split in ("train", "dev", "test"):
        put_lines(folder / f"snli_ve_{split}.jsonl", rows if split == "train" else rows[:1])
    for image in (34, 56):
        put(folder / "flickr30k-images" / f"{image}.jpg", picture(image))
    return folder


def test_hypotheses_of_an_image_are_one_sample_with_labels_in_words(source, tmp_path):
    told = make("snli-ve", source, tmp_path / "shards")
    records = read(tmp_path / "shards", "train")
    assert [(s["id"], s["text"], s["label"]) for s in records["flickr30k/34"].statements] == [
        ("34.jpg#4r1n", "Hypothesis 1n.", "neutral"), ("34.jpg#4r1c", "Hypothesis 1c.", "contradiction"),
    ]  # fmt: skip
    assert [s["label"] for s in records["flickr30k/56"].statements] == ["entailment"]
    assert told["skipped"] == {"empty caption": 1, "label -": 1}
    assert told["counts"]["train"] == {"snli-ve": {"samples": 2, "statements": 3}}
    assert set(SnliVe().labels) == set(LABELS)


def test_the_premise_in_words_is_nowhere_in_the_shards(source, tmp_path):
    make("snli-ve", source, tmp_path / "shards")
    for tar in (tmp_path / "shards").rglob("*.tar"):
        assert b"The caption of" not in tar.read_bytes() and b"Hypothesis" in tar.read_bytes()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (row(34, "9", 1), r"line 2 has the gold_label 1; it must be one of the words contradiction"),
        (row(34, "9", "entails"), r"line 2 has the gold_label 'entails'"),
        ({"gold_label": "neutral", "sentence2": "x", "pairID": "1"}, r"line 2 names no image"),
        ({"Flickr30K_ID": "34", "sentence": "x"}, r"line 2 is not in the form of SNLI-VE's"),
        ([1], r"line 2 is no JSON object of SNLI-VE's"),
    ],
)
def test_a_wrong_line_is_told_before_anything_is_made(source, tmp_path, wrong, message):
    put_lines(source / "snli_ve_dev.jsonl", [row(34, "1", "neutral"), wrong])
    with pytest.raises(UserError, match=message):
        make("snli-ve", source, tmp_path / "shards")
    assert not (tmp_path / "shards").exists()


def test_a_missing_split_is_told_unless_it_is_not_wanted(source, tmp_path):
    (source / "snli_ve_train.jsonl").unlink()
    with pytest.raises(UserError, match=r"has no snli_ve_train.jsonl .*--only names the splits"):
        make("snli-ve", source, tmp_path / "shards")
    assert set(make("snli-ve", source, tmp_path / "shards", only="dev,test")["counts"]) == {"dev", "test"}
