"""The page for people on a cluster, against the commands that there are."""

import re
from pathlib import Path

import pytest
import yaml

from dist_fusion.cli import COMMANDS
from dist_fusion.config import load
from launcher.__main__ import COMMANDS as LAUNCHED

ROOT = Path(__file__).parents[2]
PAGE, README = (path.read_text() for path in (ROOT / "slurm/README.md", ROOT / "README.md"))


def test_the_readme_has_the_eleven_lines_of_the_page():
    first = PAGE.partition("```sh\n")[2].partition("```")[0]
    assert len(first.splitlines()) == 11 and f"```bash\n{first}```" in README


@pytest.mark.parametrize(("program", "commands"), [("dist-fusion", COMMANDS), ("python -m launcher", LAUNCHED)])
def test_the_page_names_only_commands_that_there_are(program, commands):
    named = set(re.findall(rf"{program} ([a-z]+)", PAGE))
    assert named and named <= commands.keys()


def test_the_files_and_keys_that_the_page_names_exist():
    files = set(re.findall(r"slurm/[\w/-]+\.(?:sh|yaml)", PAGE + README))
    assert {"slurm/pretrain.sh", "slurm/v100.yaml"} <= files and all((ROOT / file).is_file() for file in files)
    assert "slurm_setup" in yaml.safe_load((ROOT / "slurm/v100.yaml").read_text())
    load("pretrain", ["save_every=1", "save_minutes=1", "health.hang_minutes=1", "activation_checkpointing=true"])


def test_what_the_page_says_of_pretrain_on_sixteen_ranks_is_so():
    assert load("pretrain").micro_batch(8) == 16
    with pytest.raises(ValueError, match=r"no multiple of tasks\.itm\.block"):
        load("pretrain").micro_batch(16)
    assert load("pretrain", ["global_batch=256"]).micro_batch(16) == load("pretrain").micro_batch(8)
    assert load("pretrain", ["tasks.itm.block=8"]).micro_batch(16) == 8
