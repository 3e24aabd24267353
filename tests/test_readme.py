"""The README's commands, run as they stand in an empty folder."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BY_CI = ("make ",)  # .ci/run calls these, and this test is inside one of them
BLOCKS = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
COMMANDS = [line.split("#")[0].strip() for block in BLOCKS for line in block.splitlines() if line.strip()]


@pytest.mark.launch
def test_the_commands_of_the_readme_run_one_after_the_other(tmp_path):
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    mine = [command for command in COMMANDS if not command.startswith((*BY_CI, ". .venv"))]
    assert len(mine) >= 5
    for command in mine:
        done = subprocess.run(
            command, shell=True, cwd=tmp_path, env=environment, text=True, timeout=300,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}"
    assert (tmp_path / "runs/easy-vqa/teacher-pretrain/evaluate.json").is_file()


def test_the_make_targets_of_the_readme_exist_and_ci_calls_them():
    makefile, gate = (ROOT / "Makefile").read_text(), (ROOT / ".ci" / "run").read_text()
    targets = {target for target in re.findall(r"(?:^|`)make ([\w-]+)", README, re.MULTILINE)}
    assert targets >= {"demo", "test", "check", "gpu-check"}
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
        # CI has no GPU, and of the faults a few are among the tests.
        assert f"make {target}" in gate or target in ("gpu-check", "faults"), target


def test_the_files_that_the_readme_names_exist():
    named = re.findall(r"`((?:dist_fusion|models|tasks|ds_configs)/[\w/.]*)`", README)
    assert named
    for name in named:
        assert (ROOT / name).exists() or (ROOT / "dist_fusion" / name).exists(), name
