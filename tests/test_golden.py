"""The losses of a small distillation, kept: whoever changes them should know it.

DIST_FUSION_GOLDEN=write pytest tests/test_golden.py      keeps new ones, to be looked at before they are committed
"""

import json
import os
from pathlib import Path

import pytest

from dist_fusion.checkpoint.folder import versions

KEPT = Path(__file__).parent / "results" / "golden-losses.json"
STEPS = 12
TASKS = ["tasks.itc=false", "model.kind=fusion-encoder", "name=teacher", "steps=6"]
TAUGHT = ["distill.targets=both", "distill.soft=1", "name=student", f"steps={STEPS}", "model.dropout=0.1"]


def test_the_losses_of_a_small_distillation_are_those_that_were_kept(two_ranks, small_recipe, tmp_path):
    """All terms of all steps, by two ranks with ZeRO-2 and dropout; other processors add in another order."""
    common = [f"runs={tmp_path}", "log_every=1", "deepspeed=zero2"]
    for overrides in (TASKS, [*TAUGHT, f"teachers.0.source={tmp_path}/teacher"]):
        assert two_ranks.run("run", recipe=str(small_recipe), overrides=[*common, *overrides]) == [{"code": 0}] * 2
    lines = [json.loads(line) for line in (tmp_path / "student" / "metrics.jsonl").read_text().splitlines()]
    losses = [{key: value for key, value in line.items() if key.startswith("loss/")} for line in lines]
    if os.environ.get("DIST_FUSION_GOLDEN") == "write":
        KEPT.write_text(json.dumps({"versions": versions(), "losses": losses}, indent=1) + "\n")
    kept = json.loads(KEPT.read_text())["losses"]
    assert len(losses) == len(kept) == STEPS
    assert losses[0].keys() >= {
        "loss/attention/bridge.t2i",
        "loss/attention/tower.i2t",
        "loss/soft/itm",
        "loss/hard/mlm",
    }
    for mine, theirs in zip(losses, kept, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-3)
    assert losses[-1]["loss/total"] < losses[0]["loss/total"]
