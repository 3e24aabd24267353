import json

import pytest
import torch

from dist_fusion.bench import kernels
from dist_fusion.bench.kernels import QUICK, error, gradients, in_double, inputs, kept, ours, ways
from dist_fusion.cli import main
from dist_fusion.kernels.reference import DIRECTIONS


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_every_way_computes_the_same_gradients(direction):
    """In fp32 and without autocast; what rounds its scores is only near."""
    given = inputs(QUICK, torch.float32, torch.device("cpu"))
    exact = gradients(ours, in_double(given), direction)
    for name, way in ways(given).items():
        assert error(gradients(way, given, direction), exact) < (0.6 if "autocast" in name else 1e-4), name


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_every_way_but_the_identity_has_the_same_loss(direction):
    given = inputs(QUICK, torch.float32, torch.device("cpu"))
    right = ours(in_double(given), direction)
    for name in ("ours (chunked)", "reference", "eager fp32"):
        torch.testing.assert_close(ways(given)[name](given, direction).double(), right.double(), rtol=1e-3, atol=0)


def test_what_is_kept_is_counted_without_the_inputs():
    given = inputs(QUICK, torch.bfloat16, torch.device("cpu"))
    gradients_alone = 2 * (given.student_query.numel() + given.student_key.numel())
    assert kept(ours, given, "teacher-student") == gradients_alone
    one_map = 4 * QUICK.pairs * kernels.HEADS * QUICK.queries * QUICK.keys
    assert kept(kernels.eager, given, "teacher-student") > 2 * one_map


def test_the_quick_bench_writes_a_row_a_way(tmp_path, capsys):
    assert main(["bench", "kernels", "--quick", "--json", str(tmp_path / "kernels.json")]) == 0
    rows = json.loads((tmp_path / "kernels.json").read_text())["rows"]
    assert {row["peer"] for row in rows} >= {"reference", "eager fp32", "eager autocast", "attention identity"}
    assert len(capsys.readouterr().out.splitlines()) == len(rows)
    for row in rows:
        assert row["ours"] == "ours (chunked)"
        assert row["ours_gradient_error"] < 0.01 and row["ratio"] > 0
        assert row["ours_ms"] == sorted(row["ours_ms"]) and row["peer_ms"] == sorted(row["peer_ms"])
