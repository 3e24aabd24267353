import json

import pytest
import torch

from dist_fusion import cli, train
from dist_fusion.bench.roofline import ByteCounter, build, counted, timed, trace
from dist_fusion.bench.step import QUICK
from dist_fusion.facts import flop_counter

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def step():
    return build(QUICK, CPU)


def test_bytes_are_those_read_and_those_written():
    x, weight = torch.ones(4, 8), torch.ones(8, 16)
    cases = {
        lambda: x @ weight: 4 * (32 + 128 + 64),
        lambda: x + x: 4 * (32 + 32 + 32),
        lambda: x.add_(1): 4 * (32 + 32),
        lambda: x.zero_(): 4 * 32,
        lambda: x.T.view(8, 2, 2)[1]: 0,
        lambda: x[:1].expand(4, 8) * 1: 4 * (32 + 32),
        lambda: x[torch.tensor([1, 2])]: 4 * (16 + 16) + 2 * 8 + 16,
    }
    for run, expected in cases.items():
        with ByteCounter() as counter:
            run()
        assert counter.total == pytest.approx(expected, abs=32), expected


def test_the_parts_are_the_whole_step(step):
    step.step()  # the first step makes the optimizer's state
    parts = counted(step)
    with flop_counter() as whole:
        step.step()
    assert sum(flops for flops, _ in parts.values()) == whole.get_total_flops()
    assert {"teacher: encoder", "student: fusion", "attention KL, backward", "clip and AdamW"} <= parts.keys()
    assert parts.keys() == timed(step, CPU).keys()
    weights = 4 * sum(parameter.numel() for parameter in step.student.parameters())
    # The norm reads one number a weight, clipping reads and writes one, AdamW reads four and writes three.
    assert parts["clip and AdamW"][1] == pytest.approx(10 * weights, rel=0.01)


def test_a_traced_step_changes_the_weights_as_a_step_does():
    found = []
    for run in (lambda step: trace(step, int), lambda step: step.step()):
        step = build(QUICK, CPU)
        step.student.eval()
        run(step)
        found.append(dict(step.student.named_parameters()))
    for name, weight in found[0].items():
        torch.testing.assert_close(weight, found[1][name], rtol=0, atol=2e-5)


def test_a_quick_bench_gives_the_rates_and_then_every_part(tmp_path, capsys):
    file = tmp_path / "rows.json"
    assert cli.main(["bench", "roofline", "--quick", "--json", str(file)]) == train.DONE
    rows = json.loads(file.read_text())["rows"]
    assert len(capsys.readouterr().out.splitlines()) == len(rows)
    rates, parts = ([row for row in rows if ("share" in row) is part] for part in (False, True))
    assert rates[0]["case"] == "copy"
    assert all(rate["per_second"] > 0 for rate in rates)
    whole = parts[-1]
    assert whole["case"] == "whole step"
    assert whole["multiply_adds"] == sum(part["multiply_adds"] for part in parts[:-1]) > 0
    assert whole["bytes"] == sum(part["bytes"] for part in parts[:-1])
    assert whole["floor_ms"] == pytest.approx(sum(part["floor_ms"] for part in parts[:-1]), abs=0.1)
    assert 0 < whole["utilisation"] <= whole["share"]
    for part in parts:
        assert part["ms"] == sorted(part["ms"])
