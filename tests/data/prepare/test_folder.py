import pytest

from dist_fusion.schema import UserError
from tests.data.prepare.sets import make, picture, put, put_lines, read


@pytest.fixture
def source(tmp_path):
    for n in range(3):
        put(tmp_path / "mine" / "pictures" / f"{n}.jpg", picture(n))
    return tmp_path / "mine"


def test_rows_of_one_image_are_one_sample(source, tmp_path):
    put(
        source / "captions.csv",
        '\ufeffimage,caption,split\npictures/0.jpg,"one, and\nmore",train\n'  # as spreadsheets write it
        "pictures/1.jpg,two,dev\npictures/0.jpg,three,\n",
    )
    told = make("folder", source, tmp_path / "shards")
    assert read(tmp_path / "shards", "train")["pictures/0.jpg"].texts == ("one, and more", "three")
    assert read(tmp_path / "shards", "dev")["pictures/1.jpg"].images == (picture(1),)
    assert told["counts"]["train"] == {"mine": {"samples": 1, "texts": 2}}


def test_json_lines_may_have_many_captions_a_line_and_other_names_of_columns(source, tmp_path):
    put_lines(source / "all.jsonl", [{"file": "pictures/2.jpg", "said": ["one", "two"]}])
    make("folder", source, tmp_path / "shards", image_column="file", text_column="said")
    assert read(tmp_path / "shards", "train")["pictures/2.jpg"].texts == ("one", "two")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("captions.csv", "image,captoin\npictures/0.jpg,x\n", r"line 2 has no 'caption'; did you mean 'captoin'\?"),
        ("captions.csv", "image,caption\npictures/0.jpg,x\npictures/1.jpg\n", "line 3 has no 'caption'; the line has"),
        ("captions.csv", 'image,caption\n"pictures/0.jpg"x,x\n', "line 2 cannot be read"),
        ("captions.tsv", "image\tcaption\tsplit\n0.jpg\tx\tvalid\n", "line 2 has the split 'valid'; it can be"),
        ("captions.jsonl", '{"image": "a.jpg", "caption": "x"}\n{"image"\n', "line 2 is no JSON object"),
        ("captions.jsonl", '{"image": "a.jpg", "caption": 3}\n', "line 1: image and caption must be text"),
        ("captions.jsonl", '{"image": "a.jpg", "caption": "x"}\n', "none of the first 1 images of train is under"),
        ("captions.txt", "x", r"must have one table of captions, .*found none"),
        ("captions.csv", "image,caption\n", "has no sample"),
        ("captions.csv", "image,caption\npictures/0.jpg,a dog, a cat\n", "line 2 has more cells than the heading"),
        ("captions.jsonl", b'{"image": "a.jpg", "caption": "\xff"}\n', "is not in the form of one caption a"),
    ],
)  # fmt: skip
def test_a_wrong_table_is_told_with_its_line_before_anything_is_made(source, tmp_path, name, content, message):
    put(source / name, content)
    with pytest.raises(UserError, match=message):
        make("folder", source, tmp_path / "shards")
    assert not (tmp_path / "shards").exists()


def test_two_tables_are_one_too_many_unless_one_is_called_captions(source, tmp_path):
    for name in ("a.csv", "b.csv"):
        put(source / name, "image,caption\npictures/0.jpg,x\n")
    with pytest.raises(UserError, match=r"found a\.csv, b\.csv"):
        make("folder", source, tmp_path / "shards")
    put(source / "captions.csv", "image,caption\npictures/1.jpg,x\n")
    make("folder", source, tmp_path / "shards")
    assert read(tmp_path / "shards", "train").keys() == {"pictures/1.jpg"}
