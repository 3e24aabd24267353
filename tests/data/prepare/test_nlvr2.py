import pytest

from dist_fusion.schema import UserError
from tests.data.prepare.sets import make, picture, put, put_lines, read


def row(identifier, label, sentence, directory=None):
    """A line of NLVR2's JSON; train's also says in which folder its images are."""
    place = {} if directory is None else {"directory": directory}
    return {
        "validation": {"102": label}, "sentence": sentence, "left_url": "https://host/l.jpg", "writer": "80",
        "label": label, "right_url": "https://host/r.jpg", "synset": "acorn", "query": "acorns3",
        "identifier": identifier, "extra_validations": {"44": "False"}, **place,
    }  # fmt: skip


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "nlvr2"
    put_lines(
        folder / "nlvr2" / "data" / "train.json",
        [row("train-10171-0-0", "True", "Two dogs.", 31), row("train-10171-1-0", "False", "Two dogs.", 32),
         row("train-10171-0-1", "False", "No  dog.", 31)],
    )  # fmt: skip
    put_lines(folder / "nlvr2" / "data" / "dev.json", [row("dev-850-0-0", "False", "One dog.")])
    put_lines(folder / "nlvr2" / "data" / "test1.json", [row("test1-0-1-0", "True", "One dog.")])
    for n, name in enumerate(("images/train/31/train-10171-0", "images/train/32/train-10171-1", "dev/dev-850-0")):
        for side in (0, 1):
            put(folder / f"{name}-img{side}.png", picture(2 * n + side, form=("JPEG", "PNG")[side]))
    put(folder / "test1" / "test1-0-1-img0.png", picture(9))
    return folder


def test_a_pair_is_one_sample_with_all_its_sentences_grouped_over_the_pairs_of_a_set(source, tmp_path):
    told = make("nlvr2", source, tmp_path / "shards")
    records = read(tmp_path / "shards", "train")
    first, second = records["nlvr2/train-10171-0"], records["nlvr2/train-10171-1"]
    assert [(s["id"], s["text"], s["label"]) for s in first.statements] == [
        ("train-10171-0-0", "Two dogs.", "True"), ("train-10171-0-1", "No dog.", "False"),
    ]  # fmt: skip
    assert first.images == (picture(0), picture(1, form="PNG"))
    assert first.statements[0]["group"] == second.statements[0]["group"] != first.statements[1]["group"]
    assert second.statements[0]["label"] == "False"  # a word: bool("False") is True
    assert told["counts"]["dev"] == {"nlvr2": {"samples": 1, "statements": 1}}


def test_a_pair_that_lacks_one_image_is_left_out(source, tmp_path):
    told = make("nlvr2", source, tmp_path / "shards")
    assert told["skipped"] == {"missing image": 1} and told["counts"]["test"] == {} and told["shards"]["test"] == 0


def test_a_split_without_any_image_is_told(source, tmp_path):
    (source / "test1" / "test1-0-1-img0.png").unlink()
    with pytest.raises(
        UserError, match=r"none of the first 2 images of test is under .* at images/test1/test1-0-1-img0"
    ):
        make("nlvr2", source, tmp_path / "shards")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (row("dev-1-0-0", "true", "x"), "line 1 has the label 'true'; it must be the word True or False"),
        (row("dev-1-0-0", True, "x"), "line 1 has the label True"),
        (row("dev-1-0", "True", "x"), "line 1 is not in the form of NLVR2's"),
    ],
)
def test_a_wrong_line_is_told(source, tmp_path, wrong, message):
    put_lines(source / "nlvr2" / "data" / "dev.json", [wrong])
    with pytest.raises(UserError, match=message):
        make("nlvr2", source, tmp_path / "shards")
