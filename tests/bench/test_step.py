import json
from dataclasses import replace

import pytest
import torch

from dist_fusion import cli, train
from dist_fusion.bench import composed
from dist_fusion.bench.pretraining import AdamW
from dist_fusion.bench.step import CASES, QUICK, Case, build_pair, check_agreement
from dist_fusion.config import OptimizerConfig
from dist_fusion.models.layouts import Weights, read

CPU = torch.device("cpu")
LIKE = Case("", torch.float32, torch.float32, torch.float32)
PUBLISHED = replace(LIKE, as_published=True)


@pytest.fixture(scope="module", params=[LIKE, PUBLISHED], ids=["like for like", "as published"])
def pair(request):
    ours, theirs = build_pair(request.param, QUICK, CPU)
    for student in (ours.student, theirs.student):
        student.eval()
    return ours, theirs


def test_every_loss_of_the_composed_step_is_ours(pair):
    ours, theirs = pair
    said, heard = ours.loss().terms, theirs.loss()
    assert said.keys() == heard.keys()
    assert {name.split("/")[0] for name in said} == {"hard", "soft", "attention"}
    assert min(term.item() for term in said.values()) > 1e-4
    for name, term in said.items():
        torch.testing.assert_close(heard[name], term, rtol=1e-4, atol=1e-6)


def test_every_gradient_of_the_composed_step_is_ours(pair):
    ours, theirs = pair
    ours.loss().total.backward()
    torch.stack([*theirs.loss().values()]).sum().backward()
    gradients = {name: weight.grad for name, weight in theirs.student.named_parameters()}
    found, misfits = read(composed.NAMES, {n: g for n, g in gradients.items() if not n.startswith("heads.")}, heads=())
    assert not misfits
    found.body.update((name, gradient) for name, gradient in gradients.items() if name.startswith("heads."))
    mine = {name: weight.grad for name, weight in ours.student.named_parameters()}
    assert mine.keys() == found.body.keys()
    for name, gradient in mine.items():
        torch.testing.assert_close(found.body[name], gradient, rtol=1e-3, atol=1e-5, msg=lambda told, n=name: n + told)
    for student in (ours.student, theirs.student):
        student.zero_grad()


def test_every_weight_has_a_name_on_the_other_side(pair):
    ours, theirs = pair
    body = {name: weight for name, weight in ours.student.state_dict().items() if not name.startswith("heads.")}
    written = composed.write(composed.NAMES, Weights(body, {}))
    named = {name: weight for name, weight in theirs.student.state_dict().items() if not name.startswith("heads.")}
    assert written.keys() == named.keys()
    assert all(torch.equal(written[name], weight) for name, weight in named.items())


@pytest.mark.parametrize("name", ["text_tower.blocks.1.attention.qkv.weight", "fusion.image.layers.1.feed.0.weight"])
def test_a_weight_that_was_not_copied_is_noticed(name):
    ours, theirs = build_pair(LIKE, QUICK, CPU)
    check_agreement(ours, theirs, 1e-3)
    assert ours.student.training and theirs.student.training
    with torch.no_grad():
        weight = ours.student.get_parameter(name)
        weight.copy_(2 * weight.flip(0))
    with pytest.raises(AssertionError):
        check_agreement(ours, theirs, 1e-3)


def test_each_objective_of_the_composed_step_has_images_and_texts_of_its_own(pair):
    ours, theirs = pair
    batch, count = ours.batch, QUICK.samples
    assert [len(one.images) for one in theirs.passes.values()] == [count] * 3
    assert len(batch.images) == count  # ours sees an image once
    assert len(batch.pairs) < 3 * count
    words = theirs.passes["mlm"].labels
    assert sorted(words[words >= 0].tolist()) == sorted(batch.targets["mlm"].labels.tolist())


def test_steps_in_half_precision_add_up_in_full_precision():
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2).to(torch.bfloat16)
    optimizer = AdamW(model, OptimizerConfig(learning_rate=1e-4, weight_decay=0.0, clip=0.0))
    before = model.weight.detach().clone()
    weight = next(copy for copy in optimizer.copies if copy.shape == before.shape)
    kept = weight.detach().clone()
    for _ in range(3):
        model(torch.ones(1, 3, dtype=torch.bfloat16)).sum().backward()
        optimizer.step()
        assert model.weight.grad is None
    torch.testing.assert_close(kept - weight, torch.full_like(kept, 3e-4), rtol=1e-2, atol=0)
    assert torch.equal(model.weight, weight.to(torch.bfloat16))


def test_a_quick_bench_prints_every_case_with_what_it_costs(tmp_path, capsys):
    file = tmp_path / "rows.json"
    assert cli.main(["bench", "step", "--quick", "--json", str(file)]) == train.DONE
    printed, rows = capsys.readouterr().out.splitlines(), json.loads(file.read_text())["rows"]
    assert [row["case"] for row in rows] == [case.name for case in CASES["cpu"]]
    assert len(printed) == len(rows)
    for case, row in zip(CASES["cpu"], rows, strict=True):
        ours, peer = row["sizes"]["ours"], row["sizes"]["peer"]
        assert ours["parameters"] == peer["parameters"]
        assert ours["text_tokens"] == 16
        assert peer["text_tokens"] == (40 if case.as_published else 16)
        assert 0 < ours["multiply_adds"] < peer["multiply_adds"]
        assert 0 < ours["kept_for_backward_mb"] < peer["kept_for_backward_mb"]
        assert row["ratio"] > 0
