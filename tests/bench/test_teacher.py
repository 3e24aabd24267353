import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dist_fusion import cli, train
from dist_fusion.bench.captions import VOCABULARY
from dist_fusion.bench.hugging_face import build_pair, check_agreement
from dist_fusion.bench.teacher import CASES, HEADS, QUICK, Case, bare_products, captions, taught


def test_a_quick_bench_prints_every_case_and_writes_the_agreed_json(tmp_path, capsys):
    file = tmp_path / "rows.json"
    assert cli.main(["bench", "teacher", "--quick", "--json", str(file)]) == train.DONE
    printed = capsys.readouterr().out.splitlines()
    result = json.loads(file.read_text())
    assert {"bench", "device", "versions", "date", "rows"} <= result.keys()
    assert result["bench"] == "teacher"
    assert len(printed) == len(result["rows"]) == len(CASES["cpu"])
    for case, line, row in zip(CASES["cpu"], printed, result["rows"], strict=True):
        assert row["case"] == case.name
        assert line.startswith(case.name)
        assert row["peer"].startswith("transformers 5.")
        for times in (row["ours_ms"], row["peer_ms"], row["floor_ms"]):
            assert times == sorted(times)
            assert len(times) == 3
        assert row["ratio"] > 0 and row["ratio_of_medians"] > 0
        assert row["sizes"]["ours"]["text_tokens"] == (16 if case.pad_multiple == 8 else 40)
        assert row["sizes"]["peer"]["text_tokens"] == 40
        assert {"ours_peak_mb", "peer_peak_mb"} <= row.keys()


@pytest.fixture
def built():
    torch.manual_seed(0)
    return (*build_pair(QUICK.model, HEADS, VOCABULARY.size), captions(QUICK, 40))


def test_both_sides_compute_the_same_function(built):
    ours, peer, batch = built
    check_agreement(taught(ours, batch), peer, batch, 1e-4)


@pytest.mark.parametrize(
    "name",
    ["text_embedding.sentence", "image_embedding.position", "encoder.blocks.1.attention.qkv.weight", "pool.weight"],
)
def test_a_weight_that_was_not_copied_is_noticed(built, name):
    ours, peer, batch = built
    with torch.no_grad():
        weight = ours.get_parameter(name)
        weight.copy_(weight.flip(0))
    with pytest.raises(AssertionError):
        check_agreement(taught(ours, batch), peer, batch, 1e-4)


@pytest.mark.parametrize("tasks", [("itm",), ("itm", "mlm")])
def test_the_bare_products_are_those_of_our_forward(tasks):
    case = Case("", torch.float32, torch.float32, heads=tasks)
    ours, _ = build_pair(QUICK.model, {task: HEADS[task] for task in tasks}, VOCABULARY.size)
    ours.heads, ours.pool = torch.nn.ModuleDict(), torch.nn.Identity()  # not counted in the floor
    floor = bare_products(case, QUICK, 40, torch.device("cpu"))
    with FlopCounterMode(display=False) as forward, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        taught(ours, captions(QUICK, 40))
    with FlopCounterMode(display=False) as products:
        floor()
    assert products.get_total_flops() == forward.get_total_flops() > 0


def test_captions_are_the_same_however_they_are_padded():
    padded, cut = captions(QUICK, 40), captions(QUICK, 8)
    assert (padded.text_ids.shape[1], cut.text_ids.shape[1]) == (40, 16)
    assert torch.equal(padded.text_ids[:, :16], cut.text_ids)
    assert torch.equal(padded.images, cut.images)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["teachre"], "did you mean 'teacher'?"),
        (["teacher", "--device", "gpu"], "it can be cpu, cuda"),
        (["teacher", "--json", "/nowhere/rows.json"], "a folder that does not exist"),
    ],
)
def test_a_mistake_is_told_before_anything_runs(capsys, arguments, message):
    assert cli.main(["bench", *arguments]) == train.MISTAKE
    assert message in capsys.readouterr().err
