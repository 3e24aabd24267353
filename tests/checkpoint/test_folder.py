import os

import pytest

from dist_fusion.checkpoint.folder import owned_by_another


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("given", ["", "checkpoints", "checkpoints/step-00000005/rank-0.pt"])
def test_checkpoints_that_another_user_could_write_are_not_opened(two_ranks, small_recipe, tmp_path, given):
    arguments = {"recipe": str(small_recipe), "overrides": [f"runs={tmp_path}", "steps=20", "log_every=1"]}
    run = tmp_path / "small"
    assert two_ranks.run("run", **arguments, stop_at=1) == [{"code": 75}] * 2 if not given else True
    if given:
        (run / given).parent.mkdir(parents=True)
        (run / given).touch() if given.endswith(".pt") else (run / given).mkdir()
    assert owned_by_another(run) is None
    os.chown(run / given, 12345, 0)
    for reply in two_ranks.run("run", **arguments):
        assert f"{run / given if given else run} belongs to another user (number 12345)" in reply["mistake"]
        assert "trust_run=true" in reply["mistake"]
    if not given:
        arguments["overrides"].append("trust_run=true")
        assert two_ranks.run("run", **arguments) == [{"code": 0}] * 2
