"""The real command on GPUs: precisions, overflow, kill and resume, the teacher aside, several GPUs."""

import json
import math
from pathlib import Path
from statistics import fmean

import pytest
import torch

from dist_fusion import train
from dist_fusion.engine.sharding import BF16_CAPABILITY
from tests.gpu.life import column, finish, start, stop_at

pytestmark = pytest.mark.gpu
STEPS, STOP = 100, 30
SAME = slice(60)
"""Steps over which two runs stay together, though a GPU adds in no fixed order."""


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory) -> Path:
    """ZeRO-2 in fp16 whose first gradients overflow, since the scale of the loss starts far too high."""
    path = tmp_path_factory.mktemp("deepspeed") / "overflowing.json"
    fp16 = {"enabled": True, "loss_scale": 0, "initial_scale_power": 32, "hysteresis": 1, "loss_scale_window": 1000}
    path.write_text(
        json.dumps({"fp16": fp16, "zero_optimization": {"stage": 2}, "zero_allow_untested_optimizer": False})
    )
    return path


def test_fp16_survives_overflow_kill_and_resume(recipe, overflowing, tmp_path):
    """Overflowed steps are skipped, counted, and halve the scale; a stopped run goes on with both."""
    common = [f"runs={tmp_path}", f"steps={STEPS}", f"deepspeed={overflowing}"]
    whole, parts = (start(recipe, [*common, f"name={name}"]) for name in ("whole", "parts"))
    assert stop_at(parts, tmp_path / "parts", STOP) == train.CONTINUE
    stopped = column(tmp_path / "parts", "step")[-1]
    assert finish(whole, start(recipe, [*common, "name=parts"])) == [train.DONE, train.DONE]
    assert STOP <= stopped < STEPS
    scales, skips = (column(tmp_path / "whole", f"optimizer/{key}") for key in ("loss_scale", "skipped_steps"))
    assert 1 <= skips[-1] < STOP
    assert scales[-1] == 2.0 ** (32 - skips[-1])
    for key in ("loss_scale", "skipped_steps", "learning_rate"):
        parts, whole = (column(tmp_path / name, f"optimizer/{key}")[SAME] for name in ("parts", "whole"))
        assert parts == whole
    losses = column(tmp_path / "parts", "loss/total")
    assert len(losses) == STEPS and all(map(math.isfinite, losses))
    assert losses[SAME] == pytest.approx(column(tmp_path / "whole", "loss/total")[SAME], rel=0.1)
    assert fmean(losses[-10:]) < fmean(losses[:10])
    assert not any(column(tmp_path / "parts", "health/nonfinite"))


def test_a_deterministic_run_that_was_stopped_ends_as_if_it_had_not_been_to_the_last_bit(recipe, tmp_path):
    common = [f"runs={tmp_path}", f"steps={STEPS}", "deepspeed=zero2-fp16", "deterministic=true"]
    whole, parts = (start(recipe, [*common, f"name={name}"]) for name in ("whole", "parts"))
    assert stop_at(parts, tmp_path / "parts", STOP) == train.CONTINUE
    assert finish(whole, start(recipe, [*common, "name=parts"])) == [train.DONE, train.DONE]
    assert column(tmp_path / "parts", "loss/total") == column(tmp_path / "whole", "loss/total")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("parts", "whole")]
    assert weights[0] == weights[1]


def test_a_teacher_on_its_own_stream_gives_the_same_losses(recipe, tmp_path):
    """In bf16 under ZeRO-1, where the GPU can; else in fp16."""
    half = "bf16" if torch.cuda.get_device_capability() >= BF16_CAPABILITY else "fp16"
    common = [f"runs={tmp_path}", "steps=12", f"deepspeed=zero1-{half}"]
    teacher = ["name=teacher", "model.kind=fusion-encoder", "tasks.itc=false"]
    assert finish(start(recipe, [*common, *teacher])) == [train.DONE]
    taught = [f"teachers.0.source={tmp_path}/teacher", "distill.targets=both", "distill.soft=1"]
    names = {"true": "beside", "false": "after"}
    lives = [
        start(recipe, [*common, *taught, f"name={name}", f"teacher_stream={word}"]) for word, name in names.items()
    ]
    assert finish(*lives) == [train.DONE] * 2
    beside, after = (column(tmp_path / name, "loss/total") for name in names.values())
    assert beside == pytest.approx(after, rel=2e-2)
    assert all(map(math.isfinite, beside))


def test_two_gpus_give_the_losses_of_one(recipe, tmp_path):
    """By NCCL, with unequal rows in the contrast, and a stop told to one rank."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs: NCCL refuses two ranks on one")
    common = [f"runs={tmp_path}", "steps=20", "deepspeed=zero2"]
    assert finish(start(recipe, [*common, "name=one"])) == [train.DONE]
    assert stop_at(start(recipe, [*common, "name=two"], ranks=2), tmp_path / "two", 5) != train.DONE
    assert finish(start(recipe, [*common, "name=two"], ranks=2)) == [train.DONE]
    one, two = (column(tmp_path / name, "loss/total") for name in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-2)
