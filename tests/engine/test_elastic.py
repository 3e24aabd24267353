"""A checkpoint of some ranks, continued on others: every bit by name, and the same losses."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

from dist_fusion.engine.state import full_weights
from tests.kept import digest
from tests.ranks import Ranks

KINDS = ["zero1", "zero2-bf16", "zero3"]
CLOSE = {"zero1": 1e-5, "zero2-bf16": 5e-2, "zero3": 1e-5}
"""How near losses are on another number of ranks: in bf16 the gradients of each micro-batch are rounded to 2 ** -8."""
FOURS = {
    "plain": {"stage": 1},
    "in turns": {"stage": 2, "round_robin_gradients": True},
    "in sub-groups": {"stage": 3, "sub_group_size": 300},
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("elastic") / "tiny.yaml"
    path.write_text(
        "name: tiny\nsteps: 10\nglobal_batch: 16\ntasks: {mlm: , itm: {block: 4}, itc: {dimensions: 8}}\n"
        "optimizer: {learning_rate: 1e-3, warmup: 0.1, multipliers: {student.heads: 2}}\n"
    )
    return str(path)


@pytest.fixture(scope="module", params=KINDS)
def saved(request, two_ranks, recipe, tmp_path_factory):
    """Two steps of two ranks: the arguments of their life, its folder, and what they held at its end."""
    folder = tmp_path_factory.mktemp(request.param) / "step-2"
    asked = {"recipe": recipe, "overrides": [f"deepspeed={request.param}"]}
    ended = two_ranks.run("life", steps=2, save_to=str(folder), **asked)[0]["ended"]
    return request.param, asked, folder, ended


def test_all_that_deepspeed_keeps_goes_from_two_ranks_to_one_and_back(two_ranks, one_rank, saved, tmp_path):
    kind, asked, folder, ended = saved
    on_two = two_ranks.run("life", steps=2, load_from=str(folder), seed=1, **asked)
    (on_one,) = one_rank.run("life", steps=2, load_from=str(folder), seed=2, save_to=str(tmp_path / "one"), **asked)
    back = two_ranks.run("life", steps=0, load_from=str(tmp_path / "one"), seed=3, **asked)
    assert on_one["begun"] == ended
    assert [reply["begun"] for reply in back] == [on_one["ended"]] * 2
    assert on_one["losses"][0] == pytest.approx(on_two[0]["losses"][0], rel=1e-5)
    assert on_one["losses"] == pytest.approx(on_two[0]["losses"], rel=CLOSE[kind])


def test_shards_put_together_for_the_same_number_of_ranks_are_what_deepspeed_loads(two_ranks, saved):
    _, asked, folder, ended = saved
    theirs = two_ranks.run("life", steps=1, load_from=str(folder), seed=1, **asked)
    ours = two_ranks.run("life", steps=1, load_from=str(folder), seed=2, recut=True, **asked)
    assert ours == theirs
    assert [reply["begun"] for reply in ours] == [ended] * 2


def test_full_weights_are_the_masters_and_all_else_that_the_model_has(saved):
    _, _, folder, ended = saved
    weights = full_weights(folder)
    masters = {name.removesuffix(" master"): value for name, value in ended.items() if name.endswith(" master")}
    assert set(weights) == {*masters, "anchor", "second.weight", "calls", "level"}
    assert {name: digest(weights[name]) for name in masters} == masters
    assert {name: digest(weights[name]) for name in ("calls", "level")} == {n: ended[n] for n in ("calls", "level")}
    assert torch.equal(weights["second.weight"], weights["first.weight"])
    precision = torch.bfloat16 if "bfloat16" in ended["anchor weights"] else torch.float32
    assert weights["anchor"].dtype == torch.float32
    assert digest(weights["anchor"].to(precision)) == ended["anchor weights"]
    assert len({value.untyped_storage().data_ptr() for value in weights.values()}) == len(weights)


@pytest.mark.faults
def test_four_ranks_become_two_and_two_become_four(two_ranks, recipe, tmp_path):
    """Also where the order of parameters or the sub-groups are others on another number of ranks."""
    four_ranks = Ranks(4, tmp_path / "four.log")
    try:
        for name, zero in FOURS.items():
            own = tmp_path / f"{name}.json"
            own.write_text(json.dumps({"zero_optimization": zero}))
            asked = {"recipe": recipe, "overrides": [f"deepspeed={own}"]}
            first, second = (str(tmp_path / name / part) for part in ("first", "second"))
            ended = four_ranks.run("life", steps=1, save_to=first, **asked)[0]["ended"]
            on_two = two_ranks.run("life", steps=1, load_from=first, seed=1, save_to=second, **asked)
            assert [reply["begun"] for reply in on_two] == [ended] * 2
            on_four = four_ranks.run("life", steps=1, load_from=second, seed=2, **asked)
            assert [reply["begun"] for reply in on_four] == [on_two[0]["ended"]] * 4
            here = four_ranks.run("life", steps=1, load_from=first, seed=3, **asked)
            assert on_two[0]["losses"] == pytest.approx(here[0]["losses"], rel=1e-5)
    finally:
        four_ranks.close()


def test_the_loss_scaler_and_the_counts_of_skipped_steps_come_along(two_ranks, one_rank, recipe, tmp_path):
    """No CPU trains in fp16, so its scaler is laid into shards of fp32: it is shown to travel, not to work."""
    folder, asked = tmp_path / "step-1", {"recipe": recipe, "overrides": ["deepspeed=zero2"]}
    two_ranks.run("life", steps=1, save_to=str(folder), **asked)
    scaler = DynamicLossScaler(2.0**16, 2.0, 1000, 1, 2, False)
    scaler.cur_scale, scaler.cur_iter, scaler.last_overflow_iter, scaler.cur_hysteresis = 4096.0, 77, 70, 1
    for path in folder.glob("*_states.pt"):
        tree = torch.load(path, weights_only=False)
        if "module" in tree:
            tree["skipped_steps"] = 5
        else:
            tree["optimizer_state_dict"] |= {"loss_scaler": copy.copy(scaler), "dynamic_loss_scale": True}
        torch.save(tree, path)
    (reply,) = one_rank.run("life", steps=0, load_from=str(folder), **asked)
    expected = str(["DynamicLossScaler", sorted(vars(scaler).items())])
    assert reply["begun"]["scaler"] == expected and "('cur_scale', 4096.0)" in expected
    assert json.loads(reply["begun"]["counts"]) == [1, 5, 16]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["deepspeed=zero2"], "is of ZeRO-1 in fp32, and this run is of ZeRO-2 in fp32"),
        (["deepspeed=zero1-bf16"], "is of ZeRO-1 in fp32, and this run is of ZeRO-1 in bf16"),
        (["deepspeed=zero1", "optimizer.multipliers={}"], "has 4 groups of parameters, and this run 2"),
    ],
)
def test_a_checkpoint_of_another_kind_is_refused_with_both_named(two_ranks, one_rank, plain, overrides, message):
    recipe, folder = plain
    for ranks in (one_rank, two_ranks):
        for said in ranks.run("refusal", recipe=recipe, overrides=overrides, load_from=str(folder)):
            assert message in said


@pytest.fixture(scope="module")
def plain(two_ranks, recipe, tmp_path_factory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("plain") / "step-0"
    two_ranks.run("life", recipe=recipe, overrides=["deepspeed=zero1"], steps=0, save_to=str(folder))
    return recipe, folder


def test_a_checkpoint_from_before_the_first_step_is_loaded_without_moments(one_rank, plain):
    recipe, folder = plain
    asked = {"recipe": recipe, "overrides": ["deepspeed=zero1"]}
    (reply,) = one_rank.run("life", steps=1, load_from=str(folder), seed=1, **asked)
    (fresh,) = one_rank.run("life", steps=1, **asked)
    assert reply["losses"] == fresh["losses"]


@pytest.mark.parametrize("lost", ["zero_pp_rank_1_mp_rank_00_optim_states.pt", "mp_rank_00_model_states.pt"])
def test_a_folder_that_lacks_a_shard_is_refused(one_rank, plain, tmp_path, lost):
    recipe, folder = plain
    torn = shutil.copytree(folder, tmp_path / "torn")
    (torn / lost).unlink()
    (said,) = one_rank.run("refusal", recipe=recipe, overrides=["deepspeed=zero1"], load_from=str(torn))
    assert str(torn) in said and ("is of 2 ranks" in said or "is no checkpoint" in said)


def test_a_checkpoint_of_another_model_is_refused_with_a_parameter_that_differs(one_rank, plain, tmp_path):
    recipe, folder = plain
    other = shutil.copytree(folder, tmp_path / "other")
    path = other / "mp_rank_00_model_states.pt"
    tree = torch.load(path, weights_only=False)
    tree["param_shapes"][0]["first.weight"] = torch.Size([3, 4])
    torch.save(tree, path)
    (said,) = one_rank.run("refusal", recipe=recipe, overrides=["deepspeed=zero1"], load_from=str(other))
    assert "is of another model: 1 trained parameters differ, such as first.weight, (3, 4) then, (3, 3) now" in said
