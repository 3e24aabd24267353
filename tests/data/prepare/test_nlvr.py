import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dist_fusion.schema import UserError
from tests.data.prepare.sets import make, put, put_lines, read

REAL = Path(__file__).parents[4] / "shared" / "data" / "nlvr1_train_dev.zip"
COLOURS = [(250, 0, 0), (0, 250, 0), (0, 0, 250)]


def drawing(order=(0, 1, 2)):
    """Three boxes of one colour each between grey bars, 400 x 100 RGBA, as NLVR's."""
    pixels = np.full((100, 400, 4), 128, np.uint8)
    pixels[:, :, 3] = 255
    for place, colour in enumerate(order):
        pixels[:, 150 * place : 150 * place + 100, :3] = COLOURS[colour]
    written = io.BytesIO()
    Image.fromarray(pixels).save(written, "PNG")
    return written.getvalue()


def row(identifier, label, sentence="There is a tower", directory="2"):
    thing = {"y_loc": 80, "type": "triangle", "color": "#0099ff", "x_loc": 80, "size": 20}
    return {
        "sentence": sentence, "label": label, "identifier": identifier, "directory": directory,
        "evals": {"r1": label}, "structured_rep": [[thing], [thing], []],
    }  # fmt: skip


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "nlvr"
    for split in ("train", "dev", "test"):
        put_lines(folder / split / f"{split}.json", [row("72-0", "true"), row("72-1", "false")])
        for name, order in (("72-0-0", (0, 1, 2)), ("72-0-3", (2, 1, 0)), ("72-1-0", (0, 0, 1))):
            put(folder / split / "images" / "2" / f"{split}-{name}.png", drawing(order))
    return folder


def colours(data):
    """The distinct colours of an image from left to right, and its size."""
    pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    return list(dict.fromkeys(map(tuple, pixels[50].tolist()))), pixels.shape[1::-1]


def test_the_left_image_has_two_boxes_and_the_right_one_the_third(source, tmp_path):
    make("nlvr", source, tmp_path / "shards")
    left, right = read(tmp_path / "shards", "dev")["nlvr/dev-72-0-0"].images
    assert colours(left) == ([COLOURS[0], (128, 128, 128), COLOURS[1]], (250, 100))
    assert colours(right) == ([COLOURS[2]], (100, 100))


def test_three_boxes_can_be_three_images(source, tmp_path):
    make("nlvr", source, tmp_path / "shards", images=3)
    boxes = read(tmp_path / "shards", "dev")["nlvr/dev-72-0-0"].images
    assert [colours(box) for box in boxes] == [([colour], (100, 100)) for colour in COLOURS]
    with pytest.raises(UserError, match="--images is 4; three boxes can become 2 or 3 images"):
        make("nlvr", source, tmp_path / "other", images=4)


def test_train_has_every_order_that_is_there_and_dev_the_first(source, tmp_path):
    told = make("nlvr", source, tmp_path / "shards")
    train, dev = (read(tmp_path / "shards", split) for split in ("train", "dev"))
    assert train.keys() == {"nlvr/train-72-0-0", "nlvr/train-72-0-3", "nlvr/train-72-1-0"}
    assert dev.keys() == {"nlvr/dev-72-0-0", "nlvr/dev-72-1-0"}
    labels = {name: record.statements[0]["label"] for name, record in dev.items()}
    assert labels == {"nlvr/dev-72-0-0": "true", "nlvr/dev-72-1-0": "false"}
    assert len({record.statements[0]["group"] for record in dev.values()}) == 1
    assert told["counts"]["train"] == {"nlvr": {"samples": 3, "statements": 3}}


def test_an_example_without_its_drawing_is_listed(source, tmp_path):
    (source / "train" / "images" / "2" / "train-72-1-0.png").unlink()
    assert make("nlvr", source, tmp_path / "shards")["skipped"] == {"missing image": 1}


def test_a_label_that_is_no_word_is_told(source, tmp_path):
    put_lines(source / "test" / "test.json", [row("72-0", False)])
    with pytest.raises(UserError, match="line 1 has the label False; it must be the word true or false"):
        make("nlvr", source, tmp_path / "shards")


@pytest.mark.skipif(not REAL.is_file(), reason=f"{REAL.name} is not beside the project")
def test_the_real_dev_and_test_have_the_known_labels(tmp_path):
    with zipfile.ZipFile(REAL) as file:
        file.extractall(tmp_path / "nlvr")
    told = make("nlvr", tmp_path / "nlvr", tmp_path / "shards", workers=2, only="dev,test", samples_per_shard=500)
    assert told["skipped"] == {} and told["shards"] == {"dev": 2, "test": 2}
    for split, true, false in (("dev", 547, 442), ("test", 556, 434)):
        labels = [record.statements[0]["label"] for record in read(tmp_path / "shards", split).values()]
        assert (labels.count("true"), labels.count("false")) == (true, false)
