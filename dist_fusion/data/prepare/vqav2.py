"""VQAv2 (arXiv:1612.00837): one sample an image with all its questions, and `answers.json` for the head.

`train` is train2014; of val2014 `dev` has 1,000 images and `restval` the others, so that train and restval are what
ViLT trains on (it drew its 1,000 without a seed). `test` is test2015, if its questions are there, without answers.
A question that no answer of the vocabulary fits is left out of train and restval, and kept in dev, where it scores 0.
"""

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from random import Random
from typing import Any

from dist_fusion.data.prepare.answers import in_order_of, scores, vocabulary
from dist_fusion.data.prepare.coco import picture
from dist_fusion.data.prepare.plan import UNANSWERABLE, Options, Plan, Planned, Skip, record_of
from dist_fusion.data.prepare.sources import find, in_form, read_json
from dist_fusion.schema import UserError
from dist_fusion.types import meaning_of

YEARS = {"train": "train2014", "val": "val2014"}
TEST = ("v2_OpenEnded_mscoco_test2015_questions.json", "questions/v2_OpenEnded_mscoco_test2015_questions.json")
KINDS = ("yes/no", "number")
"""The answer types, beside "other"."""
DEV_IMAGES = 1000
QUESTIONS_FORM = "VQAv2's v2_OpenEnded_*_questions.json"
ANSWERS_FORM = "VQAv2's v2_mscoco_*_annotations.json"


def plan(source: Path, options: Options) -> Plan:
    """Questions with soft scores; the vocabulary is of train and val together, as ViLT's."""
    question_files = {
        name: find(source, _places(f"v2_OpenEnded_mscoco_{year}_questions.json"), f"VQAv2's questions ({name})")
        for name, year in YEARS.items()
    }
    answer_files = {
        name: find(source, _places(f"v2_mscoco_{year}_annotations.json"), f"VQAv2's annotations ({name})")
        for name, year in YEARS.items()
    }
    questions = {name: _by_image(path) for name, path in question_files.items()}
    notes = {name: _by_question(path) for name, path in answer_files.items()}
    found = vocabulary(note["common"] for name in YEARS for note in notes[name].values())
    if not found:
        raise UserError(f"no answer is that of nine questions of {answer_files['train']} and val; is it VQAv2's whole?")
    ordered = in_order_of(Path(options.answers), found) if options.answers else found
    known = frozenset(found)
    test = next((source / name for name in TEST if (source / name).is_file()), None)
    test_questions = _by_image(test) if test else {}
    held_out = sorted(questions["val"])
    dev = set(Random("vqav2 dev").sample(held_out, min(DEV_IMAGES, len(held_out))))

    def items() -> Iterator[Planned | Skip]:
        for name, year in YEARS.items():
            for image, asked in questions[name].items():
                split = "train" if name == "train" else "dev" if image in dev else "restval"
                yield from _image(split, image, year, asked, notes[name], known)
        for image, asked in test_questions.items():
            yield from _image("test", image, "test2015", asked, {}, known)

    inputs = [*question_files.values(), *answer_files.values(), *([test] if test else [])]
    inputs += [Path(options.answers)] if options.answers else []
    return Plan(
        items,
        tuple(inputs),
        {"answers.json": (json.dumps({"answers": ordered, "kinds": KINDS}) + "\n").encode()},
        {
            "answers": len(ordered),
            "answers_meaning": meaning_of(ordered),
            "answers_order": "of the annotations" if ordered == found else f"of {options.answers}",
        },
    )


def _image(
    split: str,
    image: int,
    year: str,
    asked: Mapping[int, str],
    notes: Mapping[int, Mapping[str, Any]],
    known: frozenset[str],
) -> Iterator[Planned | Skip]:
    told = []
    for number, question in asked.items():
        name = f"vqav2/{number}"
        note = notes.get(number, {"given": (), "kind": ""})
        worth = scores(note["given"], known)
        if not worth and split in ("train", "restval"):
            yield Skip(split, UNANSWERABLE, name)
            continue
        kind = {"kind": note["kind"]} if note["kind"] else {}
        told.append({"id": str(number), "question": " ".join(question.split()), "answers": worth, **kind})
    if told:
        yield Planned(split, (picture(image, year),), record_of(f"coco/{image}", "vqav2", questions=told))


def _places(name: str) -> tuple[str, ...]:
    return name, f"annotations/{name}", f"questions/{name}"


def _by_image(path: Path) -> dict[int, dict[int, str]]:
    """Image number -> question number -> question."""
    asked: dict[int, dict[int, str]] = defaultdict(dict)
    with in_form(path, QUESTIONS_FORM):
        for row in read_json(path, QUESTIONS_FORM)["questions"]:
            asked[row["image_id"]][row["question_id"]] = row["question"]
    return dict(asked)


def _by_question(path: Path) -> dict[int, dict[str, Any]]:
    """Question number -> its most common answer, all ten, and its type."""
    with in_form(path, ANSWERS_FORM):
        return {
            row["question_id"]: {
                "common": row["multiple_choice_answer"],
                "given": [answer["answer"] for answer in row["answers"]],
                "kind": row["answer_type"],
            }
            for row in read_json(path, ANSWERS_FORM)["annotations"]
        }
