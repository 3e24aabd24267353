import io
import json
import re
from base64 import b64decode
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dist_fusion.cli import main
from dist_fusion.data.images import pixels, read
from dist_fusion.data.shards import write_shards
from dist_fusion.inspect import survey
from dist_fusion.inspect.page import Look, write_page
from dist_fusion.schema import UserError
from tests.inspect.test_markup import Seen


def png(colour=(200, 30, 30), size=(40, 20)):
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def look_at(folder, out, **asked):
    write_page([str(folder)], out, Look(size=32, **asked))
    return out.read_text()


@pytest.fixture(scope="module")
def strange(tmp_path_factory) -> Path:
    """Shards of a stranger: captions that are HTML, a picture that is none, files that lack something."""
    folder = tmp_path_factory.mktemp("strange")
    evil = "<script>alert(1)</script><img src=http://example.com/x onerror=alert(1)>"
    tree = {
        "texts": [evil, "word " * 90, "long " * 5000],
        "questions": [
            {"id": 1, "question": f"what? {evil}", "answers": {evil: 1, "cat": 0.3, "dog": 0.6}, "kind": evil},
            {"id": 2, "question": "why?", "answers": {}},
        ],
        "statements": [{"id": 1, "text": evil, "label": evil}],
    }
    many = {"texts": [f"text {n}" for n in range(40)]}
    samples = [
        ("evil", {"png": png(), "json": json.dumps(tree).encode()}),
        ("pair", {"left.png": png(), "right.png": png((0, 0, 255)), "txt": b"two pictures"}),
        ("many", {"png": png(), "json": json.dumps(many).encode()}),
        ("broken", {"jpg": b"<b>no picture</b>", "txt": b"a caption"}),
        ("imageless", {"json": json.dumps(many).encode()}),
        ("wrong", {"png": png(), "json": b"<i>{"}),
    ]
    write_shards(folder, samples, 9)
    return folder


@pytest.fixture(scope="module")
def page(strange, tmp_path_factory) -> str:
    return look_at(strange, tmp_path_factory.mktemp("page") / "page.html")


def test_a_page_shows_the_samples_that_are_asked_for(easy_vqa, tmp_path):
    seen = Seen(look_at(easy_vqa / "dev", tmp_path / "page.html", samples=5))
    assert [name for name, _ in seen.elements].count("article") == 5
    pictures = [attributes for name, attributes in seen.elements if name == "img"]
    assert len(pictures) == 5 * 4  # as it is, and augmented at three visits
    told = " ".join(seen.texts)
    assert "3,892" in told and "yes/no" in told and "triangle" in told


def test_a_page_fetches_and_runs_nothing_whatever_its_texts_say(page):
    seen = Seen(page)
    assert {name for name, _ in seen.elements}.isdisjoint({"script", "link", "iframe", "i", "object", "a"})
    for _, attributes in seen.elements:
        assert not any(name.startswith("on") for name in attributes)
        assert attributes.get("src", "data:image/jpeg;").startswith("data:image/jpeg;")
        assert "href" not in attributes and "url(" not in (attributes.get("style") or "")
    assert any("<script>alert(1)</script>" in text for text in seen.texts)  # as a text, it is there


def test_damage_is_shown_by_reason_be_it_found_in_the_index_or_by_reading(page):
    told = " ".join(Seen(page).texts)
    for reason in ("no image", "unreadable .json or .txt", "undecodable image"):
        assert reason in told
    assert "/broken: undecodable image" in told and "of the 4 read" in told


def test_a_damaged_sample_has_its_card_and_both_images_of_a_pair_are_shown(page):
    cards = page.split("<article")[1:]
    assert [re.findall(r"00000\.tar/(\w+)", card)[0] for card in cards] == ["evil", "pair", "many", "broken"]
    assert [card.count("<img") for card in cards] == [4, 8, 4, 0]
    assert "undecodable image" in cards[3] and "a caption" in cards[3]


def test_a_picture_is_what_the_model_sees(page):
    first = b64decode(re.findall(r'base64,([^"]+)"', page)[0])
    shown = np.asarray(Image.open(io.BytesIO(first)), float)
    levels = (pixels(read(png(), 32), 32).permute(1, 2, 0).numpy() + 1) * 127.5
    assert shown.shape == (32, 32, 3) and np.abs(shown - levels).max() < 4  # JPEG's loss


def test_augmented_pictures_differ_from_visit_to_visit(tmp_path):
    noise = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(noise, "PNG")
    write_shards(tmp_path, [("noise", {"png": noise.getvalue(), "txt": b"noise"})], 9)
    pictures = re.findall(r'base64,([^"]+)"', look_at(tmp_path, tmp_path / "page.html"))
    assert len(pictures) == len(set(pictures)) == 4


def test_masked_words_are_marked_with_what_they_become(shards, tmp_path):
    html = look_at(shards, tmp_path / "page.html", samples=41)
    assert html.count("<mark><s>") > 41 * 0.5 and "<s>[CLS]</s>" not in html
    assert re.search(r"<mark><s>[^<]+</s> \[MASK\]</mark>", html)


def test_how_many_texts_are_cut_is_told(page):
    told = " ".join(Seen(page).texts)
    assert "2 of 45 (4.44%) are longer than 40" in told and "cut at 40" in told  # 3 + 1 + 40 + 1 texts
    assert "and 24,000 more letters" in told and "and 34 more texts" in told


def test_answers_are_shown_best_first(page):
    assert re.search(r" 1, dog 0\.6, cat 0\.3<", page) and "(no answer)" in page


def test_the_same_seed_makes_the_same_page_and_another_shows_other_samples(shards, tmp_path):
    pages = [look_at(shards, tmp_path / "page.html", samples=4, seed=seed) for seed in (0, 0, 1)]
    assert pages[0] == pages[1]
    keys = [re.findall(r"\.tar/(\d+)", one) for one in pages]
    assert len(set(keys[0])) == 4 and keys[0] != keys[2]


def test_of_very_many_samples_some_are_read_and_the_page_says_so(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(survey, "SURVEYED", 7)
    html = look_at(shards, tmp_path / "page.html", samples=1)
    assert "of 7 drawn of 41 samples" in html and "all samples" not in html.split("Tokens, sizes")[1].split("</p>")[0]


def test_shards_without_a_usable_sample_still_show_why(tmp_path):
    write_shards(tmp_path, [("bad", {"png": png()})], 9)
    html = look_at(tmp_path, tmp_path / "page.html")
    assert "no text" in html and "<article" not in html


@pytest.mark.parametrize(
    ("asked", "message"), [({"samples": -1}, "--samples is -1"), ({"vocabulary": "brt"}, "'brt': no such file")]
)
def test_a_mistake_is_told_before_anything_is_read(shards, tmp_path, asked, message):
    with pytest.raises(UserError, match=message):
        look_at(shards, tmp_path / "page.html", **asked)
    with pytest.raises(UserError, match="--out is"):
        look_at(shards, tmp_path / "missing" / "page.html")


def test_preparing_with_a_preview_leaves_the_page(tmp_path):
    source = tmp_path / "own"
    source.mkdir()
    for name in ("one", "two"):
        Image.new("RGB", (40, 30), "red").save(source / f"{name}.png")
    (source / "captions.csv").write_text("image,caption\none.png,a red thing\ntwo.png,another thing\n")
    page = tmp_path / "page.html"
    assert main(["prepare", "folder", str(source), str(tmp_path / "shards"), "--preview", str(page)]) == 0
    assert "a red thing" in page.read_text() and "another thing" in page.read_text()
