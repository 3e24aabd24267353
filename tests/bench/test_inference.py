import json
from dataclasses import replace

import torch

from dist_fusion import cli, train
from dist_fusion.bench.captions import VOCABULARY
from dist_fusion.bench.inference import HEADS, QUICK, questions, ways
from dist_fusion.models.config import ModelConfig
from dist_fusion.models.student import Student
from dist_fusion.models.vilt import Vilt


def test_the_student_answers_the_same_whatever_is_encoded_beforehand():
    torch.manual_seed(0)
    teacher = Vilt(replace(QUICK.model, kind="fusion-encoder"), HEADS, VOCABULARY.size).eval()
    student = Student(QUICK.model, HEADS, VOCABULARY.size).eval()
    runs = ways(teacher, student, [questions(QUICK.model, 3)])
    said = {way: run()[0].logits["vqa"] for way, run in runs.items()}
    assert len(said) == 5
    assert not torch.allclose(said["teacher"], said["student"])
    for way in said.keys() - {"teacher"}:
        torch.testing.assert_close(said[way], said["student"])
        assert said[way].is_inference()


def test_questions_have_images_of_their_own_unless_told_otherwise():
    config: ModelConfig = QUICK.model
    assert questions(config, 3).pairs.tolist() == [[0, 0], [1, 1], [2, 2]]
    assert questions(config, 2, per_image=2).pairs.tolist() == [[0, 0], [0, 1], [1, 2], [1, 3]]


def test_a_quick_bench_times_every_way_at_every_batch_size(tmp_path, capsys):
    file = tmp_path / "rows.json"
    assert cli.main(["bench", "inference", "--quick", "--json", str(file)]) == train.DONE
    rows, printed = json.loads(file.read_text())["rows"], capsys.readouterr().out
    assert [row["sizes"]["questions"] for row in rows] == list(QUICK.batches)
    for row in rows:
        assert len(row["ms"]) == 6
        assert row["times_as_fast"]["teacher"] == 1
        for way, times in row["ms"].items():
            assert way in printed
            assert times == sorted(times)
            assert row["least_ms"][way] > 0
            assert way in row["peak_mb"]
