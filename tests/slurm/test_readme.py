"""The README's commands for people on a cluster, with a small recipe and this cluster's nodes in their places."""

import re
import sys
from pathlib import Path

import pytest

from tests.slurm.conftest import ON_TWO_NODES, ROOT, losses
from tests.slurm.test_submit import PROFILE

pytestmark = pytest.mark.slurm
README = (ROOT / "README.md").read_text()
BLOCK = re.search(r"## Train on a SLURM cluster\n\n```bash\n(.*?)```(.*?)\n## ", README, re.DOTALL)
ELSEWHERE = ("make ", "ssh ", "scancel ")
"""What other tests do, or needs a desk."""


def test_the_commands_of_the_readme_run_on_a_cluster(cluster, recipe, runs, tmp_path):
    profile = tmp_path / "private.yaml"
    profile.write_text(PROFILE)
    commands = [line.partition(" #")[0].split("#")[0].strip() for line in BLOCK[1].splitlines()]
    submit = re.search(r"`(python -m launcher submit .*?)`", BLOCK[2], re.DOTALL)[1]
    ran = []
    follow = "python -m launcher logs runs/second -f"
    for command in [*commands, submit.replace("pretrain", "pretrain name=second"), follow]:
        if command.startswith(ELSEWHERE):
            continue
        here = command.replace("slurm/v100.yaml", str(profile)).replace("python -m", f"{sys.executable} -m")
        here = here.replace("sbatch slurm/", f"sbatch {' '.join(ON_TWO_NODES)} {ROOT}/slurm/").replace(
            "--ranks 8", "--ranks 2"
        )
        here = re.sub(r"(?<= )pretrain (name=\w+)", rf"{recipe} \1 steps=6", here)
        path = f"{Path(sys.executable).parent}:{cluster.environment['PATH']}"
        ran.append(cluster.call("bash", "-c", f"PATH={path} && {here}", cwd=recipe.parent))
    assert len(ran) == 10
    assert len(losses(runs / "first")) == len(losses(runs / "second")) == 6
    assert sum("step 6/6" in said for said in ran) == 2, "logs -f shows a run"
    assert any("finished" in said for said in ran), "status tells how it is doing"
