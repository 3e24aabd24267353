"""The demo's own parts; its stages are run by CI (`make demo SIZE=smoke`)."""

import json

import pytest

from dist_fusion.config import load
from dist_fusion.demo import answers
from dist_fusion.demo.run import SIZES, demo
from dist_fusion.demo.stages import STAGES, WITHOUT, choose_folder
from dist_fusion.demo.timing import Timing, full_size


def test_the_question_only_floor_is_the_known_one(easy_vqa, tmp_path):
    """67.0 % of all and 82.5 % of the yes/no questions can be had without looking; 23 % of the open ones."""
    (tmp_path / "shards").symlink_to(easy_vqa)
    scores = answers.question_only(tmp_path)
    percent = {
        column: sum((scores[kind] for kind in kinds), answers.Score(0, 0)).percent
        for column, kinds in answers.COLUMNS.items()
    }
    assert percent["all"] == pytest.approx(67.0, abs=0.3)
    assert percent["yes_no"] == pytest.approx(82.5, abs=0.3)
    assert percent["open"] == pytest.approx(23.3, abs=0.5)


def test_the_undistilled_student_differs_from_the_distilled_in_nothing_but_the_teacher():
    for recipe in {stage.recipe for stage in STAGES if stage.part == "undistilled"}:
        distilled, undistilled = load(recipe), load(recipe, WITHOUT)
        changed = {key for key in vars(distilled) if getattr(distilled, key) != getattr(undistilled, key)}
        assert changed == {"teachers", "distill"}
        assert not undistilled.distill.needs_teacher
    steps = {part: [load(s.recipe).steps for s in STAGES if s.part == part] for part in ("student", "undistilled")}
    assert steps["student"] == steps["undistilled"]


def test_the_next_demo_goes_on_in_the_newest_folder_and_a_fresh_one_lies_beside_it(tmp_path):
    first = choose_folder(tmp_path, "full", fresh=False)
    assert first == tmp_path / "demo"
    first.mkdir()
    assert choose_folder(tmp_path, "full", fresh=False) == first
    second = choose_folder(tmp_path, "full", fresh=True)
    assert second not in (first, choose_folder(tmp_path, "smoke", fresh=False))
    second.mkdir()
    assert choose_folder(tmp_path, "full", fresh=False) == second


def test_a_finished_demo_shows_its_table_and_trains_nothing(tmp_path, capsys):
    row = dict.fromkeys(answers.COLUMNS, 50.0)
    table = dict.fromkeys((*answers.ROWS, "question_only"), row)
    results = {"accuracy": table, "by_seed": [table], "timing_lines": [], "seconds": {"total": 1.0}}
    (tmp_path / "demo").mkdir()
    answers.write(tmp_path / "demo", results)
    assert demo("full", 1, fresh=False, runs=tmp_path) == 0
    shown = capsys.readouterr().out
    assert "FRESH=1" in shown
    assert "student, distilled | **50.0**" in shown
    assert "tensorboard --logdir" in shown
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["demo", "results.json", "results.md"]
    assert json.loads((tmp_path / "demo" / "results.json").read_text()) == results


def test_a_teacher_that_knows_nothing_still_gives_a_table():
    row = dict.fromkeys(answers.COLUMNS, 0.0)
    table = dict.fromkeys((*answers.ROWS, "question_only"), row)
    shown = answers.as_markdown({"accuracy": table, "by_seed": [table], "timing_lines": [], "seconds": {}})
    assert "keeps nan %" in shown


def test_the_mean_of_seeds_is_taken_cell_by_cell():
    one, two = ({row: {"open": x} for row in answers.ROWS} for x in (10.0, 20.0))
    assert answers.mean([one, two])["student"] == {"open": 15.0}


def test_timing_at_full_size_answers_every_question_with_every_thing_encoded_beforehand_or_not():
    timing = full_size(num_images=1, questions_per_image=2)
    assert timing.pairs == 2
    assert min(timing[2:]) > 0
    assert "12 layers" in timing.what
    line = Timing("x", 1, teacher=2.0, student=4.0, texts=2.5, images=1.0, cached=0.5).line()
    assert line == "| x | 1 | 2.00 | 4.00 (0.50x) | 2.50 (0.80x) | 1.00 (2.00x) | 0.50 (4.00x) |"


def test_the_smoke_demo_runs_the_same_stages_in_a_few_steps():
    assert SIZES["full"].steps is None
    assert SIZES["smoke"].steps < min(load(stage.recipe).steps for stage in STAGES)
