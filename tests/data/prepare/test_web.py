from hashlib import md5, sha256

import pytest

from dist_fusion.schema import UserError
from tests.data.prepare.sets import make, picture, put, read

ROWS = [(f"a caption of {n}", f"https://host.org/{n}.jpg?s={n}") for n in range(6)]
NAMES = {
    "row": lambda n, address: f"{n:07d}",
    "md5": lambda n, address: f"{md5(address.encode()).hexdigest()}.jpg",
    "sha256": lambda n, address: f"{sha256(address.encode()).hexdigest()}.png",
}


def tsv(rows):
    return "".join(f"{caption}\t{address}\n" for caption, address in rows)


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "cc3m"
    put(folder / "Train_GCC-training.tsv", tsv(ROWS))
    put(folder / "Validation_GCC-1.1.0-Validation.tsv", tsv(ROWS[:1]))
    put(folder / "images_val" / "0", picture(0))
    return folder


@pytest.mark.parametrize("named", NAMES)
def test_images_are_found_by_row_or_by_digest_whatever_is_missing(source, tmp_path, named):
    for n in (0, 2, 5):
        put(source / "images_train" / "0000" / NAMES[named](n, ROWS[n][1]), picture(n))
    told = make("cc3m", source, tmp_path / "shards")
    train = read(tmp_path / "shards", "train")
    assert {name: (record.texts, record.images) for name, record in train.items()} == {
        ROWS[n][1]: ((ROWS[n][0],), (picture(n),)) for n in (0, 2, 5)
    }
    assert told["named"]["train"] == named and told["skipped"] == {"missing image": 3}


def test_images_numbered_from_one_are_not_taken_for_their_neighbours(source, tmp_path):
    for n in range(6):
        put(source / "images_train" / f"{n + 1}.jpg", picture(n))
    with pytest.raises(
        UserError, match=r"has images_train/6\.jpg, whose number is one more .*; say --named row-from-1"
    ):
        make("cc3m", source, tmp_path / "shards")
    make("cc3m", source, tmp_path / "shards", named="row-from-1", only="train")
    assert read(tmp_path / "shards", "train")[ROWS[3][1]].images == (picture(3),)


def test_names_that_fit_no_rule_are_told(source, tmp_path):
    put(source / "images_train" / "holiday.jpg", picture(0))
    with pytest.raises(UserError, match=r"no file of .*images_train is named after one of the first 6 rows"):
        make("cc3m", source, tmp_path / "shards")
    with pytest.raises(UserError, match="--named is 'rows'; did you mean 'row'"):
        make("cc3m", source, tmp_path / "shards", named="rows")


def test_a_row_that_is_repeated_is_skipped_and_a_heading_is_no_row(source, tmp_path):
    put(source / "Train_GCC-training.tsv", "caption\turl\n" + tsv([ROWS[0], ROWS[1], ROWS[0]]))
    for n in range(3):
        put(source / "images_train" / str(n), picture(n))
    assert make("cc3m", source, tmp_path / "shards")["skipped"] == {"duplicate": 1}
    assert read(tmp_path / "shards", "train")[ROWS[1][1]].images == (picture(1),)


def test_a_row_without_an_address_is_told_with_its_line(source, tmp_path):
    put(source / "images_train" / "0", picture(0))
    put(source / "Train_GCC-training.tsv", tsv(ROWS[:2]) + "a caption alone\n")
    with pytest.raises(UserError, match="line 3 is no caption and address with a tab between: 'a caption alone"):
        make("cc3m", source, tmp_path / "shards")


@pytest.mark.parametrize("place", ["00000.tar", "cc3m/00000.tar"])
def test_img2datasets_shards_need_no_preparing(source, tmp_path, place):
    put(source / place, b"x")
    with pytest.raises(UserError, match=r"img2dataset's output needs no preparing; name the folder in data\.shards"):
        make("cc3m", source, tmp_path / "shards")


SBU = {
    "json": {"sbu-captions-all.json": {"image_urls": [a for _, a in ROWS], "user_ids": ["u"] * 6,
                                       "captions": [c for c, _ in ROWS]}},
    "txt": {"SBU_captioned_photo_dataset_urls.txt": "".join(f"{a}\n" for _, a in ROWS),
            "SBU_captioned_photo_dataset_captions.txt": "".join(f"{c}\n" for c, _ in ROWS)},
    "tsv": {"sbu.tsv": "url\tcaption\n" + tsv([row[::-1] for row in ROWS])},
}  # fmt: skip


@pytest.mark.parametrize("form", SBU)
def test_sbu_is_read_in_each_form_it_ships_in(tmp_path, form):
    source = tmp_path / "sbu"
    for name, content in SBU[form].items():
        put(source / name, content)
    for n in (1, 4):
        put(source / "images" / f"{n}.jpg", picture(n))
    told = make("sbu", source, tmp_path / "shards")
    train = read(tmp_path / "shards", "train")
    assert {name: record.images for name, record in train.items()} == {ROWS[n][1]: (picture(n),) for n in (1, 4)}
    assert told["counts"] == {"train": {"sbu": {"samples": 2, "texts": 2}}}


def test_sbus_two_files_must_go_together(tmp_path):
    source = tmp_path / "sbu"
    put(source / "SBU_captioned_photo_dataset_urls.txt", SBU["txt"]["SBU_captioned_photo_dataset_urls.txt"])
    put(source / "images" / "0.jpg", picture(0))
    with pytest.raises(UserError, match="SBU ships both"):
        make("sbu", source, tmp_path / "shards")
    put(source / "SBU_captioned_photo_dataset_captions.txt", "one\n")
    with pytest.raises(UserError, match="have not the same number of lines"):
        make("sbu", source, tmp_path / "shards")
