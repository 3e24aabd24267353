import pytest

from dist_fusion.schema import UserError
from tests.data.prepare.sets import make, picture, put, read, skipped
from tests.data.prepare.test_coco import annotations, entry


def region(number, image, phrase):
    return {"region_id": number, "width": 82, "height": 139, "image_id": image, "phrase": phrase, "y": 57, "x": 421}


def meta(image, coco_id=None):
    return {
        "width": 800, "url": f"https://cs.stanford.edu/people/rak248/VG_100K_2/{image}.jpg", "height": 600,
        "image_id": image, "coco_id": coco_id, "flickr_id": None,
    }  # fmt: skip


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "vg"
    phrases = {
        1: ["the clock is green", "a tree", "a tree", ""],
        2: ["red shirt"],
        3: ["a bus"],
        4: ["a dog"],
        5: ["x"],
    }
    tree = [
        {"regions": [region(10 * image + n, image, text) for n, text in enumerate(texts)], "id": image}
        for image, texts in phrases.items()
    ]
    put(folder / "region_descriptions.json", tree)
    put(folder / "image_data.json", [meta(1), meta(2, 500), meta(3, 600), meta(4, 700)])
    put(
        folder / "dataset_coco.json",
        {"images": [entry(500, "restval", "val2014", ["x"]), entry(600, "val", "val2014", ["x"]),
                    entry(700, "test", "val2014", ["x"])], "dataset": "coco"},
    )  # fmt: skip
    for image, part in ((1, "VG_100K_2"), (2, "VG_100K"), (3, "VG_100K"), (4, "images/VG_100K")):
        put(folder / part / f"{image}.jpg", picture(image))
    return folder


def test_phrases_are_texts_and_what_coco_tests_on_is_left_out(source, tmp_path):
    told = make("vg", source, tmp_path / "shards")
    records = read(tmp_path / "shards", "train")
    assert {name: record.texts for name, record in records.items()} == {
        "vg/1": ("the clock is green", "a tree"), "vg/2": ("red shirt",),
    }  # fmt: skip
    assert told["skipped"] == {
        "duplicate": 1, "empty caption": 1, "in COCO's val or test": 2, "unknown image id": 1,
    }  # fmt: skip
    assert ("train", "in COCO's val or test", "vg/3 is coco/600") in skipped(tmp_path / "shards")


def test_another_file_of_splits_or_none_can_be_named(source, tmp_path):
    assert make("vg", source, tmp_path / "all", held_out="none")["counts"]["train"]["vg"]["samples"] == 4
    put(source / "captions_val2017.json", annotations([500], []))
    make("vg", source, tmp_path / "own", held_out=str(source / "captions_val2017.json"))
    assert read(tmp_path / "own", "train").keys() == {"vg/1", "vg/3", "vg/4"}


def test_without_cocos_splits_nothing_is_made(source, tmp_path):
    (source / "dataset_coco.json").unlink()
    with pytest.raises(UserError, match=r"has no dataset_coco.json.*--held-out none keeps"):
        make("vg", source, tmp_path / "shards")
    with pytest.raises(UserError, match=r"--held-out is 'nowhere': no such file"):
        make("vg", source, tmp_path / "shards", held_out="nowhere")
