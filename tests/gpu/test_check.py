import json
import time

import pytest
import torch

from tests.gpu import check


def only_json(folder):
    (file,) = folder.iterdir()
    return file, json.loads(file.read_text())


@pytest.mark.launch
def test_the_check_leaves_one_json_of_tests_and_benches_on_a_cpu_too(tmp_path, capsys):
    """Where the tests are skipped, and quick benches show that they run."""
    words = ["--device", "cpu", "--quick", "--results", str(tmp_path), "--tests", "tests/gpu/test_ranks.py"]
    assert check.main([*words, "--benches", "teacher"]) == 0
    file, found = only_json(tmp_path)
    assert file.name == f"cpu-{found['date']}.json"
    assert str(file) in capsys.readouterr().out
    assert found["versions"]["torch"] == torch.__version__.partition("+")[0]
    tests, teacher = (found["parts"][name] for name in ("tests", "teacher"))
    assert (tests["fate"], tests["skipped"], tests["passed"], tests["failure"]) == ("passed", 3, 0, 0)
    assert teacher["fate"] == "passed" and len(teacher["rows"]) == 4


def test_parts_without_time_are_told_and_the_next_ones_go_on(tmp_path):
    words = ["--device", "cpu", "--results", str(tmp_path), "--seconds", "0"]
    assert check.main([*words, "--benches", "teacher"]) == 1
    _, found = only_json(tmp_path)
    assert [part["fate"] for part in found["parts"].values()] == ["stopped: out of time"] * 2


def test_a_failing_part_is_told_with_its_last_words():
    told = check.run(["json.tool", "/nowhere"], "cpu", 60).told()
    assert told["fate"].startswith("failed with exit code")
    assert "/nowhere" in told["said"]


def test_a_part_that_takes_too_long_is_stopped_with_all_that_it_started():
    began = time.monotonic()
    sleeper = "import subprocess; subprocess.run(['sleep', '60'])"
    assert check.run(["timeit", "-n1", "-r1", sleeper], "cpu", 0.5).code is None
    assert time.monotonic() - began < 30


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_the_check_says_so_and_leaves_nothing(tmp_path, capsys):
    assert check.main(["--results", str(tmp_path)]) == 2
    assert "sees no GPU" in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]
