import json

from dist_fusion.data.index import Damage, outlines
from dist_fusion.data.shards import find_shards, write_shards
from dist_fusion.inspect.counts import as_text, by_reason, holdings, supplies


def found(*folders):
    return outlines(find_shards([str(folder) for folder in folders]))


def test_folders_are_counted_one_by_one_and_together(shards, easy_snli_ve):
    held = holdings(found(shards, easy_snli_ve / "dev"))
    plain, dev, both = held.values()
    assert list(held) == [str(shards), str(easy_snli_ve / "dev"), "all"]
    assert plain[:5] == (3, 41, 0, 61, 123) and plain.labels.total() == 0
    assert dev.labels == {"contradiction": 400, "entailment": 400, "neutral": 400}
    assert both.numbers() == tuple(a + b for a, b in zip(plain.numbers(), dev.numbers(), strict=True))


def test_pairs_of_images_are_counted(easy_nlvr2):
    (dev,) = holdings(found(easy_nlvr2 / "dev")).values()
    assert dev.samples == dev.pairs == dev.labels.total() == 800


def test_samples_are_counted_by_what_they_have(shards):
    assert sorted((supply.texts, count) for supply, count in supplies(found(shards)).items()) == [(1, 21), (2, 20)]


def test_the_most_frequent_reason_comes_first():
    damages = [Damage("s", "1", "cut off", ""), Damage("s", "2", "no image", ""), Damage("s", "3", "no image", "")]
    assert list(by_reason(damages)) == ["no image", "cut off"]


def test_a_key_cannot_command_the_terminal(tmp_path):
    bad = {"jpg": b"x", "json": json.dumps({"texts": []}).encode()}
    write_shards(tmp_path, [("good", {"jpg": b"x", "txt": b"x"}), ("\x1b[31mred", bad)], 9)
    text = as_text(found(tmp_path))
    assert "1 x empty caption; the first: " in text and r"\x1b[31mred" in text and "\x1b" not in text
