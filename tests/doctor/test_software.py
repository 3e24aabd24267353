import os
import time

from dist_fusion.config import load
from dist_fusion.doctor.lines import FAIL, OK, WARN
from dist_fusion.doctor.software import builds, deepspeed_ops, packages, python
from tests.doctor.cases import case, grades


def test_a_lock_that_a_killed_build_left_is_red_and_a_fresh_one_yellow(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert grades(builds(case(tmp_path))) == [OK]
    lock = tmp_path / "py311" / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    assert grades(builds(case(tmp_path))) == [WARN]
    long_ago = time.time() - 3600
    os.utime(lock, (long_ago, long_ago))
    (line,) = builds(case(tmp_path))
    assert line.grade == FAIL and line.remedy == f"rm {lock}"


def test_only_offload_asks_for_an_operation_of_deepspeed(small_recipe, tmp_path):
    plain, offload = (load(small_recipe, [f"deepspeed={name}"]) for name in ("zero2", "zero2-offload-bf16"))
    assert "needs none" in deepspeed_ops(case(tmp_path, plain))[0].said
    assert "cpu_adam" in deepspeed_ops(case(tmp_path, offload))[0].said


def test_this_environment_is_the_one_that_the_project_asks_for(tmp_path):
    assert grades([*python(case(tmp_path)), *packages(case(tmp_path))]) == [OK, OK]
