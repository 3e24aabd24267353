import zipfile
from pathlib import Path

import pytest

from dist_fusion.schema import UserError
from tests.data.prepare.sets import make, picture, put, read, skipped

PHOTOS = Path(__file__).parents[4] / "shared" / "data" / "coco_train2017_cc.zip"


def entry(cocoid, split, filepath, captions):
    """One image of Karpathy's dataset_coco.json."""
    return {
        "filepath": filepath,
        "sentids": [10 * cocoid + n for n in range(len(captions))],
        "filename": f"COCO_{filepath}_{cocoid:012d}.jpg",
        "imgid": cocoid % 7,
        "split": split,
        "sentences": [
            {"tokens": text.lower().split(), "raw": text, "imgid": cocoid % 7, "sentid": 10 * cocoid + n}
            for n, text in enumerate(captions)
        ],
        "cocoid": cocoid,
    }


def annotations(images, captions, year=2017):
    """COCO's captions_*.json."""
    return {
        "info": {"description": f"COCO {year} Dataset", "url": "", "version": "1.0", "year": year},
        "licenses": [{"url": "", "id": 1, "name": "Attribution-NonCommercial-ShareAlike License"}],
        "images": [
            {"license": 1, "file_name": f"{n:012d}.jpg", "coco_url": "", "height": 30, "width": 40, "date_captured": "",
             "flickr_url": "", "id": n}
            for n in images
        ],
        "annotations": [{"image_id": n, "id": k, "caption": text} for k, (n, text) in enumerate(captions)],
    }  # fmt: skip


@pytest.fixture
def karpathy(tmp_path):
    source = tmp_path / "coco"
    entries = [
        entry(9, "train", "train2014", ["A desk.\n", "Two  tables near a desk"]),
        entry(42, "restval", "val2014", ["A shoe rack"]),
        entry(73, "val", "val2014", ["A motorcycle", "A motorcycle", " "]),
        entry(74, "test", "val2014", ["A dog"]),
        entry(75, "test", "val2014", ["A cat"]),
    ]
    put(source / "dataset_coco.json", {"images": entries, "dataset": "coco"})
    for one in entries[:-1]:
        put(source / one["filepath"] / one["filename"], picture(one["cocoid"]))
    return source


def test_karpathys_restval_is_trained_on_and_his_val_is_dev(karpathy, tmp_path):
    told = make("coco", karpathy, tmp_path / "shards")
    train, dev, test = (read(tmp_path / "shards", split) for split in ("train", "dev", "test"))
    assert train.keys() == {"coco/9", "coco/42"} and dev.keys() == {"coco/73"} and test.keys() == {"coco/74"}
    assert train["coco/9"].texts == ("A desk.", "Two tables near a desk")
    assert train["coco/9"].images == (picture(9),)
    assert told["counts"]["train"] == {"coco": {"samples": 2, "texts": 3}}
    assert told["splits"] == "karpathy"


def test_what_is_left_out_is_listed_with_its_reason(karpathy, tmp_path):
    put(karpathy / "val2014" / "COCO_val2014_000000000074.jpg", picture(74)[:400])
    told = make("coco", karpathy, tmp_path / "shards")
    assert told["skipped"] == {
        "duplicate": 1, "empty caption": 1, "missing image": 1, "undecodable image": 1,
    }  # fmt: skip
    reasons = {
        item.split(":")[0].split(",")[0]: (split, reason) for split, reason, item in skipped(tmp_path / "shards")
    }
    assert reasons["coco/74"] == ("test", "undecodable image") and reasons["coco/75"] == ("test", "missing image")
    assert reasons["coco/73"][0] == "dev"


def test_cocos_own_splits_are_read_with_2014s_or_2017s_names_of_the_same_images(tmp_path):
    source = tmp_path / "coco"
    captions = [(1, "one"), (2, "two"), (1, "another"), (99, "of nothing")]
    put(source / "annotations" / "captions_train2017.json", annotations([2, 1, 3], captions))
    put(source / "annotations" / "captions_val2017.json", annotations([5], [(5, "five")]))
    put(source / "train2017" / "000000000001.jpg", picture(1))
    put(source / "images" / "val2014" / "COCO_val2014_000000000002.jpg", picture(2))
    put(source / "val2017" / "000000000005.jpg", picture(5))
    told = make("coco", source, tmp_path / "shards")
    train = read(tmp_path / "shards", "train")
    assert {name: record.texts for name, record in train.items()} == {
        "coco/1": ("one", "another"), "coco/2": ("two",),
    }  # fmt: skip
    assert read(tmp_path / "shards", "dev")["coco/5"].images == (picture(5),)
    assert told["skipped"] == {"image without caption": 1, "unknown image id": 1}
    assert told["splits"] == "2017"


def test_splits_that_are_not_there_are_told_with_where_they_come_from(karpathy, tmp_path):
    with pytest.raises(
        UserError, match=r"has no annotations/captions_train2017.json .*it comes with COCO's annotations"
    ):
        make("coco", karpathy, tmp_path / "shards", splits="2017")
    with pytest.raises(UserError, match=r"--splits is 'karpaty'; did you mean 'karpathy'\?"):
        make("coco", karpathy, tmp_path / "shards", splits="karpaty")
    assert not (tmp_path / "shards").exists()


def test_a_file_of_another_form_is_told(karpathy, tmp_path):
    put(karpathy / "dataset_coco.json", {"images": [{"cocoid": 1, "split": "train"}]})
    with pytest.raises(
        UserError, match=r"dataset_coco.json is not in the form of Karpathy's .* 'sentences' is missing or unknown"
    ):
        make("coco", karpathy, tmp_path / "shards")
    put(karpathy / "dataset_coco.json", '{"images": [')
    with pytest.raises(UserError, match=r"dataset_coco.json is not in the form of Karpathy's"):
        make("coco", karpathy, tmp_path / "shards")


@pytest.mark.skipif(not PHOTOS.is_file(), reason=f"{PHOTOS.name} is not beside the project")
def test_real_photos_of_coco_become_samples_with_five_captions_each(tmp_path):
    source = tmp_path / "coco"
    with zipfile.ZipFile(PHOTOS) as file:
        file.extractall(source)
    (source / "captions.json").rename(source / "captions_train2017.json")
    (source / "images").rename(source / "train2017")
    told = make("coco", source, tmp_path / "shards", only="train")
    records = read(tmp_path / "shards", "train")
    assert told["counts"] == {"train": {"coco": {"samples": 39, "texts": 195}}} and told["skipped"] == {}
    assert len(records) == 39 and all(len(record.texts) == 5 for record in records.values())
