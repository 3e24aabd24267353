"""What must hold on several ranks, run on two real ones (gloo, DeepSpeed) that all these tests share."""

import json

import pytest
import torch

from tests import checks, tiny

UNEVEN = [[8, 4], [4, 8], [12, 0], [0, 12], [4, 4]]
UNEVEN_AND_ACCUMULATED = [[8, 4, 4, 8], [0, 8, 12, 0], [4, 4, 0, 4]]


@pytest.mark.parametrize(("accumulation", "counts"), [(1, UNEVEN), (2, UNEVEN_AND_ACCUMULATED)])
def test_every_zero_stage_gives_the_losses_of_one_process(two_ranks, one_rank, tiny_recipe, accumulation, counts):
    """With unequal rows a rank, some ranks without any, and accumulation."""
    arguments = {"recipe": str(tiny_recipe), "overrides": [], "accumulation": accumulation, "counts": counts}
    alone = one_rank.run("losses", stage=1, **arguments)[0]["losses"]
    assert alone[-1] < alone[0]
    untouched = checks.digest(tiny.model(tiny.model_config("fusion-encoder"), tiny.TEACHING, seed=1))
    for stage in (1, 2, 3):
        for reply in two_ranks.run("losses", stage=stage, **arguments):
            assert reply["losses"] == pytest.approx(alone, rel=2e-5), f"ZeRO-{stage}"
            assert reply["teacher"] == untouched
            assert not reply["teacher in training"]
            assert not reply["teacher in optimizer"]
            assert not reply["teacher has gradients"]


def test_tasks_of_statements_and_ranks_have_the_losses_of_one_process_too(two_ranks, one_rank, tiny_recipe):
    """With pairs of images, candidates, their soft labels and attention, and ranks without a row of some task."""
    arguments = {"recipe": str(tiny_recipe), "overrides": [], "stage": 2, "accumulation": 1, "finetuning": True}
    alone = one_rank.run("losses", counts=UNEVEN, **arguments)[0]["losses"]
    for reply in two_ranks.run("losses", counts=UNEVEN, **arguments):
        assert reply["losses"] == pytest.approx(alone, rel=2e-5)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_checkpointed_layers_train_alike_under_every_zero_stage_with_dropout(two_ranks, tiny_recipe, stage):
    arguments = {"recipe": str(tiny_recipe), "stage": stage, "accumulation": 1, "counts": UNEVEN, "dropout": 0.3}
    plain, again = (
        two_ranks.run("losses", overrides=[f"activation_checkpointing={word}"], **arguments)
        for word in ("false", "true")
    )
    assert again == plain


@pytest.mark.parametrize("sizes", [[4, 4], [5, 3], [7, 0]])
@pytest.mark.parametrize("captions", [10**9, 3])
def test_contrast_on_two_ranks_equals_one_process_with_the_whole_batch(two_ranks, sizes, captions):
    whole = checks.contrast(sizes, captions)
    parts = two_ranks.run("contrast", sizes=sizes, captions=captions)
    for part in parts:
        assert part["loss"] == pytest.approx(whole["loss"], rel=1e-5, abs=1e-6)
        for ours, theirs in zip(part["weights"], whole["weights"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)
    inputs = [row for part in parts for row in part["inputs"]]
    torch.testing.assert_close(torch.tensor(inputs), torch.tensor(whole["inputs"]))


@pytest.mark.parametrize("count", [7, 8, 9, 1])
def test_scores_on_uneven_ranks_are_those_of_one_process(two_ranks, count):
    alone = json.loads(json.dumps(checks.scores(count, 2)))
    assert alone["scores"]["mlm"]["masked tokens"]["rows"] >= count
    assert alone["scores"]["snli_ve"]["statements"]["rows"] == 2 * -(-count // 2)
    for reply in two_ranks.run("scores", count=count, micro_batch=2):
        assert reply == alone


@pytest.mark.parametrize("told", [0, 1, None])
def test_a_stop_told_to_one_rank_reaches_all(two_ranks, tmp_path, told):
    for before, after in two_ranks.run("stop_flag", folder=str(tmp_path), told=told):
        assert not before
        assert after
