import os
import subprocess
import sys
from pathlib import Path

import pytest

from dist_fusion import cli, train
from dist_fusion.config import load
from dist_fusion.doctor.examination import CHECKS, COLLECTIVE, recipe_lines
from dist_fusion.doctor.lines import FAIL, OK
from dist_fusion.engine.ranks import free_port

ROOT = Path(__file__).parents[2]


def start(*words: str, first: str = "", cwd: Path | None = None, **environment: str) -> subprocess.Popen:
    """A process of its own, whose modules come from the folder `first`, if from anywhere else."""
    alone = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    paths = os.pathsep.join(filter(None, [first, str(ROOT)]))
    shared = {**alone, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, **environment}
    return subprocess.Popen(
        [sys.executable, "-m", *words], env=shared, cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def ended(process: subprocess.Popen) -> tuple[int, str]:
    """A process's exit code, and what it has said."""
    said, _ = process.communicate(timeout=120)
    return process.returncode, said


def checks_in(text: str) -> list[str]:
    """The names of the checks that have a line."""
    lines = [line for line in text.splitlines() if line[:4] in ("ok  ", "warn", "FAIL")]
    return list(dict.fromkeys(line[6:22].strip() for line in lines))


@pytest.mark.launch
def test_ranks_of_a_sound_machine_agree_and_print_one_line_a_check(small_recipe):
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        start("dist_fusion.doctor", "--recipe", str(small_recipe), RANK=str(rank), LOCAL_RANK=str(rank), **meeting)
        for rank in range(2)
    ]
    (code, text), (other, silence) = map(ended, ranks)
    assert code == other == 0, text
    assert checks_in(text) == ["recipe", *CHECKS, *COLLECTIVE] and checks_in(silence) == []
    assert "(rank" not in text, "no rank differs"
    (exchange,) = [line for line in text.splitlines() if " exchange " in line]
    assert "GB/s a link" in exchange and "the gradients of a step take" in exchange
    assert "small: 4 samples a rank and micro-step on 2 ranks" in text


@pytest.mark.launch
def test_one_process_examines_itself_from_any_folder(tmp_path):
    code, text = ended(start("dist_fusion", "doctor", cwd=tmp_path))
    assert code == 0 and checks_in(text) == ["recipe", *CHECKS], text


@pytest.mark.launch
def test_ranks_that_do_not_meet_in_time_are_a_red_line_beside_what_each_finds_alone():
    away = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    code, text = ended(start("dist_fusion.doctor", "--patience", "2", **away, MASTER_PORT=str(free_port())))
    assert code == 1 and checks_in(text) == [*CHECKS, "meeting"], text
    assert "it has not ended in 2 s (rank 0 on " in text and "do not reach one another" in text


def test_an_installation_that_cannot_be_loaded_is_a_red_line(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.12: cannot open shared object file')\n")
    code, text = ended(start("dist_fusion", "doctor", first=str(tmp_path)))
    assert code == 1 and "libcudart.so.12" in text and "requirements.lock" in text and "Traceback" not in text


def test_a_recipe_that_could_start_is_counted_and_its_shards_are_left_to_another_check(small_recipe):
    (line,), known = recipe_lines(load(small_recipe, ["data.shards=[/nowhere]"]), 2)
    assert line.grade == OK and known and known.facts.memory.on_device > 0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("initialise_from=/nowhere", "initialise_from is '/nowhere'"),
        ("global_batch=9", "global_batch 9 does not divide"),
    ],
)
def test_what_a_recipe_lacks_is_red(small_recipe, override, message):
    (line,), _ = recipe_lines(load(small_recipe, [override]), 2)
    assert line.grade == FAIL and message in line.said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--recipe", "pretrian"], "did you mean"),
        (["--run", "/nowhere"], "is no run"),
        (["steps=3"], "name one with --recipe"),
        (["--ranks", "0"], "at least 1"),
    ],
)
def test_a_mistake_is_told_in_one_message(capsys, words, message):
    assert cli.main(["doctor", *words]) == train.MISTAKE
    assert message in capsys.readouterr().err
