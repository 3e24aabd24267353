import pytest

from dist_fusion.monitor.events import record

OFFLOAD = pytest.param("zero2-offload-bf16", marks=pytest.mark.faults)  # builds DeepSpeed's Adam for the host


@pytest.mark.parametrize("deepspeed", ["zero1", "zero2", "zero2-bf16", "zero3", OFFLOAD])
def test_a_step_that_one_rank_cannot_learn_from_is_dropped_on_all_and_told_with_names(
    two_ranks, tiny_recipe, tmp_path, deepspeed
):
    overrides = [f"deepspeed={deepspeed}", "steps=5", "health.streak=2", "global_batch=8"]
    found = two_ranks.run(
        "unhealthy", recipe=str(tiny_recipe), overrides=overrides, folder=str(tmp_path),
        spoiled={"pictures": [2, 4, 5]}, ranks=[1],
    )  # fmt: skip
    for rank in found:
        assert rank["made"] == rank["changed"] == [True, False, True, False, False]
        assert rank["hopeless"] == [False, False, False, False, True]
        assert rank["finite"]
        assert len(rank["told"]) == 3
        assert ".weight" in rank["told"][0] or ".bias" in rank["told"][0], "whose gradients it was"
        # Contrast sees all ranks' rows, so its loss is none on either; the other losses of rank 0 are sound.
        theirs, its = rank["told"][0].split("; rank 1: ")
        assert "rank 0: loss total, loss hard/itc, " in theirs and "hard/itm" not in theirs
        assert its.startswith("loss total, loss hard/mlm, loss hard/itm, loss hard/itc, ")


@pytest.mark.parametrize(
    ("deepspeed", "rule", "dropped"),
    [("zero1", "health.spike=0", []), ("zero1", "health.spike=5", [28, 30]), ("zero3", "health.spike=5", [28, 30])],
)
def test_a_step_whose_loss_is_a_spike_is_dropped_if_the_recipe_says_so(
    two_ranks, tiny_recipe, tmp_path, deepspeed, rule, dropped
):
    steps, spikes = 32, [10, 28, 30]
    overrides = [f"deepspeed={deepspeed}", f"steps={steps}", "global_batch=8", rule]
    found = two_ranks.run(
        "unhealthy", recipe=str(tiny_recipe), overrides=overrides, folder=str(tmp_path),
        spoiled={"loss": spikes}, ranks=[0],
    )  # fmt: skip
    for rank in found:
        assert [step for step, made in enumerate(rank["made"], 1) if not made] == dropped, "too few losses before 10"
        assert rank["changed"] == rank["made"]
        assert len(rank["told"]) == len(dropped)
        assert all("is more than 5 times" in said for said in rank["told"])


@pytest.mark.parametrize("deepspeed", ["zero2", "zero3"])
def test_a_loss_scale_that_comes_down_is_left_in_peace_and_one_at_its_floor_is_not(
    two_ranks, tiny_recipe, tmp_path, deepspeed
):
    overrides = [f"deepspeed={deepspeed}", "steps=9", "health.streak=2", "global_batch=8", "health.spike=5"]
    found = two_ranks.run(
        "unhealthy", recipe=str(tiny_recipe), overrides=overrides, folder=str(tmp_path),
        spoiled={"pictures": [1, 2, 3, 4, 6, 8, 9]}, ranks=[1], scale=8.0,
    )  # fmt: skip
    for rank in found:
        assert rank["scales"] == [4, 2, 1, 1, 1, 1, 1, 1, 1]
        assert rank["made"] == rank["changed"] == [step in (5, 7) for step in range(1, 10)]
        assert rank["hopeless"] == [False] * 8 + [True], "one step at the floor is no streak yet"
        assert rank["finite"]


def test_a_run_that_once_went_back_begins_there_with_the_lower_loss_scale_in_each_life(
    two_ranks, tiny_recipe, tmp_path
):
    (tmp_path / "other").mkdir()
    for folder, gone_back_to, scale in ((tmp_path, 0, 4.0), (tmp_path / "other", 5, 64.0)):
        record(folder, "rolled back", 9, {"to": gone_back_to, "why": "the weather"})
        found = two_ranks.run(
            "unhealthy", recipe=str(tiny_recipe), overrides=["steps=1", "global_batch=8"], folder=str(folder),
            spoiled={}, ranks=[], scale=64.0,
        )  # fmt: skip
        assert [rank["scales"] for rank in found] == [[scale]] * 2
