import json

import pytest

from dist_fusion.data.prepare import vqav2
from dist_fusion.schema import UserError
from dist_fusion.tasks.vqa import read_answers
from dist_fusion.types import meaning_of
from tests.data.prepare.sets import make, picture, put, read, skipped

COMMON = {"train": ["net"] + ["yes"] * 9 + ["net"] * 9, "val": ["no"] * 9 + ["rare"]}
"""Of each question in turn, its most common answer: `net` appears first, `rare` too rarely."""


def questions(year, asked):
    return {
        "info": {"description": "VQA v2.0", "version": "2.0"}, "task_type": "Open-Ended", "data_type": "mscoco",
        "license": {"url": "", "name": ""}, "data_subtype": year,
        "questions": [{"image_id": i, "question": f"what  is {n}?", "question_id": n} for i, n in asked],
    }  # fmt: skip


def annotations(year, answered):
    return {
        "info": {"description": "VQA v2.0", "version": "2.0"}, "license": {"url": "", "name": ""},
        "data_subtype": year, "data_type": "mscoco",
        "annotations": [
            {"question_type": "what is", "multiple_choice_answer": common, "image_id": image, "answer_type": kind,
             "question_id": number, "answers": [
                 {"answer": answer, "answer_confidence": "yes", "answer_id": n + 1} for n, answer in enumerate(given)
             ]}
            for image, number, common, given, kind in answered
        ],
    }  # fmt: skip


@pytest.fixture
def source(tmp_path, monkeypatch):
    """Ten questions to image 1 and nine to image 2 of train, five to 3 and five to 4 of val, one to 9 of test."""
    folder = tmp_path / "vqa"
    for name, year, images in (("train", "train2014", (1, 2)), ("val", "val2014", (3, 4))):
        half = (len(COMMON[name]) + 1) // 2
        numbered = [(images[n >= half], 100 * images[0] + n, common) for n, common in enumerate(COMMON[name])]
        answered = [
            (image, number, common, [common] * 3 + ["Yes"] * 7, "yes/no" if common in ("yes", "no") else "other")
            for image, number, common in numbered
        ]
        put(folder / f"v2_OpenEnded_mscoco_{year}_questions.json", questions(year, [row[:2] for row in numbered]))
        put(folder / f"v2_mscoco_{year}_annotations.json", annotations(year, answered))
        for image in images:
            put(folder / year / f"COCO_{year}_{image:012d}.jpg", picture(image))
    put(folder / vqav2.TEST[0], questions("test2015", [(9, 900)]))
    put(folder / "test2015" / "COCO_test2015_000000000009.jpg", picture(9))
    monkeypatch.setattr(vqav2, "DEV_IMAGES", 1)
    return folder


def test_questions_of_an_image_are_one_sample_with_vilts_scores(source, tmp_path):
    told = make("vqav2", source, tmp_path / "shards")
    record = read(tmp_path / "shards", "train")["coco/1"]
    assert len(record.questions) == 10
    assert record.questions[0] == {"id": "100", "question": "what is 100?", "answers": {"net": 0.9}, "kind": "other"}
    assert record.questions[1]["kind"] == "yes/no" and record.images == (picture(1),)
    assert told["counts"]["train"] == {"vqav2": {"samples": 2, "questions": 19}}


def test_the_vocabulary_is_in_the_order_of_first_appearance_in_train_and_val(source, tmp_path):
    told = make("vqav2", source, tmp_path / "shards")
    known = read_answers(str(tmp_path / "shards" / "answers.json"))
    assert list(known.number) == ["net", "yes", "no"] and known.kinds == ("yes/no", "number", "other")
    assert told["answers"] == 3 and told["answers_meaning"] == meaning_of(["net", "yes", "no"])
    assert told["answers_order"] == "of the annotations"


def test_a_teachers_order_is_taken_and_its_other_answers_are_refused(source, tmp_path):
    put(tmp_path / "list.json", {"id2label": {"0": "no", "1": "yes", "2": "net"}})
    told = make("vqav2", source, tmp_path / "shards", answers=str(tmp_path / "list.json"))
    assert json.loads((tmp_path / "shards" / "answers.json").read_text())["answers"] == ["no", "yes", "net"]
    assert told["answers_order"].endswith("list.json")
    put(tmp_path / "list.json", ["no", "yes", "nets"])
    with pytest.raises(UserError, match=r"1 are not in the list \(net\), 1 only there \(nets\)"):
        make("vqav2", source, tmp_path / "other", answers=str(tmp_path / "list.json"))


def test_val_is_split_by_image_and_a_question_nobody_can_answer_counts_in_dev_alone(source, tmp_path):
    make("vqav2", source, tmp_path / "shards")
    dev, restval = (read(tmp_path / "shards", split) for split in ("dev", "restval"))
    assert len(dev) == len(restval) == 1 and dev.keys() | restval.keys() == {"coco/3", "coco/4"}
    asked = {q["id"]: q["answers"] for record in (*dev.values(), *restval.values()) for q in record.questions}
    unanswerable = ("restval", "no answer in the vocabulary", "vqav2/309")  # to image 4: "rare" and "Yes"
    if "coco/4" in dev:
        assert asked["309"] == {} and skipped(tmp_path / "shards") == []
    else:
        assert "309" not in asked and skipped(tmp_path / "shards") == [unanswerable]


def test_the_test_questions_have_no_answers(source, tmp_path):
    make("vqav2", source, tmp_path / "shards")
    (question,) = read(tmp_path / "shards", "test")["coco/9"].questions
    assert question == {"id": "900", "question": "what is 900?", "answers": {}}


def test_what_is_missing_is_told_by_the_name_of_its_download(source, tmp_path):
    (source / "v2_mscoco_val2014_annotations.json").unlink()
    with pytest.raises(UserError, match=r"has no v2_mscoco_val2014_annotations.json .* VQAv2's annotations \(val\)"):
        make("vqav2", source, tmp_path / "shards")


def test_too_little_for_a_vocabulary_is_told(source, tmp_path):
    for year in ("train2014", "val2014"):
        put(source / f"v2_mscoco_{year}_annotations.json", annotations(year, [(1, 1, "x", ["x"] * 10, "other")]))
    with pytest.raises(UserError, match="no answer is that of nine questions"):
        make("vqav2", source, tmp_path / "shards")
