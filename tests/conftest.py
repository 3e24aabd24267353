"""What the whole set shares."""

import io
import json
import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():  # before any kernel is defined: Triton looks there when it is
    os.environ.setdefault("TRITON_INTERPRET", "1")

from PIL import Image

from dist_fusion.batch import Sample, Text
from dist_fusion.data.prepare.easy_forms import prepare_nlvr2, prepare_snli_ve
from dist_fusion.data.prepare.easy_vqa import prepare as prepare_easy_vqa
from dist_fusion.data.shards import write_shards
from dist_fusion.data.text import train_vocabulary
from dist_fusion.engine.ranks import on_gpu
from dist_fusion.types import Vocabulary
from tests.rank_fixtures import one_rank, small_recipe, tiny_recipe, two_ranks  # noqa: F401  fixtures


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is marked `gpu` is skipped where ranks would run on the CPU."""
    if on_gpu() and torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU that DS_ACCELERATOR does not hide; make gpu-check"))


COLOURS = {"red": (220, 30, 30), "green": (30, 200, 60), "blue": (40, 60, 210)}
NUM_SAMPLES = 41  # odd, so that no number of ranks divides it


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    """41 samples in 3 tars, with `answers.json` and `vocab.txt` beside them; captions repeat, images do not."""
    folder = tmp_path_factory.mktemp("shards")
    questions, samples = ["which colour is it?", "is it red?", "is it a small picture?"], []
    for i in range(NUM_SAMPLES):
        colour = list(COLOURS)[i % 3]
        buffer = io.BytesIO()
        Image.new("RGB", (64, 64), tuple(min(255, c + i) for c in COLOURS[colour])).save(buffer, "PNG")
        answers = [colour, "yes" if colour == "red" else "no", "yes"]
        tree = {
            "image_id": f"picture/{i}",
            "texts": [f"a {colour} picture", f"number {i % 7} is plain and {colour}"][: 1 + i % 2],
            "questions": [
                {"id": f"{i}/{n}", "question": q, "answers": {a: 1.0}, "kind": "colour" if n == 0 else "yes/no"}
                for n, (q, a) in enumerate(zip(questions, answers, strict=True))
            ],
        }
        samples.append((f"{i:04d}", {"png": buffer.getvalue(), "json": json.dumps(tree).encode()}))
    write_shards(folder, samples, 14)
    (folder / "answers.json").write_text(
        json.dumps({"answers": [*COLOURS, "yes", "no"], "kinds": ["colour", "yes/no"]})
    )
    texts = [*questions, *(f"a {colour} picture, number {i} is plain and" for i, colour in enumerate(COLOURS))]
    train_vocabulary([*texts, "0123456789"], 120, folder / "vocab.txt")
    return folder


@pytest.fixture(scope="session")
def easy_vqa(tmp_path_factory) -> Path:
    """The whole of easy-VQA as shards (three seconds)."""
    folder = tmp_path_factory.mktemp("easy-vqa")
    prepare_easy_vqa(folder)
    return folder


@pytest.fixture(scope="session")
def easy_nlvr2(tmp_path_factory) -> Path:
    """easy-VQA's pictures in pairs, with sentences about both."""
    folder = tmp_path_factory.mktemp("easy-nlvr2")
    prepare_nlvr2(folder)
    return folder


@pytest.fixture(scope="session")
def easy_snli_ve(tmp_path_factory) -> Path:
    """easy-VQA's pictures, plain and covered, with hypotheses."""
    folder = tmp_path_factory.mktemp("easy-snli-ve")
    prepare_snli_ve(folder)
    return folder


@pytest.fixture(scope="session")
def vocabulary() -> Vocabulary:
    return Vocabulary(size=60, pad=0, cls=2, sep=3, mask=4)


@pytest.fixture(scope="session")
def make_sample():
    """Builds samples by hand; a text is a tuple of word numbers, each one token."""

    def make(position, texts=(), *, image=None, captions=(), questions=(), statements=()) -> Sample:
        name = position if image is None else image
        return Sample(
            images=(torch.full((3, 4, 4), float(name)),),
            image_ids=(name,),
            texts=tuple(map(make_text, texts)),
            captions=frozenset(make_text(words).content for words in (*texts, *captions)),
            questions=tuple(question._replace(text=make_text(question.text)) for question in questions),
            statements=tuple(statement._replace(text=make_text(statement.text)) for statement in statements),
            position=position,
            visit=f"7/{position}",
        )

    return make


def make_text(words: tuple[int, ...]) -> Text:
    return Text((2, *(10 + w for w in words), 3), (None, *range(len(words)), None))
