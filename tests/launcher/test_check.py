"""What is refused before anything waits in a queue."""

import pytest

from dist_fusion.config import load
from dist_fusion.schema import UserError
from launcher import sweep
from launcher.__main__ import main
from launcher.check import check
from launcher.profile import PROFILES
from launcher.slurm import Queued


@pytest.fixture
def recipe(shards, tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(
        f"name: small\nruns: {tmp_path}/runs\nsteps: 4\nglobal_batch: 8\ntasks: {{itm: {{block: 4}}}}\n"
        "model: {width: 16, num_heads: 2, num_layers: 2, num_fusion_layers: 2, image_size: 32, patch_size: 16}\n"
        f"data: {{shards: [{shards}], vocabulary: {shards}/vocab.txt}}\n"
    )
    return path


def test_a_recipe_that_can_start_is_said_to_and_leaves_nothing_behind(recipe, tmp_path, capsys):
    assert main(["check", str(recipe), "--ranks", "2", "steps=9"]) == 0
    assert "9 steps of 8 samples on 2 ranks, 4 a rank" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()


def test_all_that_a_run_lacks_is_told_at_once(recipe, tmp_path):
    (tmp_path / "runs").touch()  # a file where a folder should be
    with pytest.raises(UserError) as refused:
        check(str(recipe), ["data.shards=[/nowhere]", f"runs={tmp_path}/runs"], 2)
    assert "'/nowhere', which does not exist" in str(refused.value)
    assert "cannot be written" in str(refused.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ranks", "3"], "does not divide"),
        (["--ranks", "4"], "no multiple of tasks.itm.block"),
        (["stepz=3"], "did you mean 'steps'?"),
        (["--rank=2", "--foo"], None),
    ],
)
def test_a_mistake_is_one_message(recipe, capsys, words, message):
    if message is None:
        with pytest.raises(SystemExit):
            main(["check", str(recipe), *words])
        assert "--foo" in capsys.readouterr().err
        return
    assert main(["check", str(recipe), *words]) == 2
    assert message in capsys.readouterr().err


def test_a_run_that_another_recipe_made_is_refused(recipe, tmp_path):
    run = tmp_path / "runs" / "small"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(recipe.read_text())
    with pytest.raises(UserError, match="made by another recipe"):
        check(str(recipe), ["model.width=32"], 1)


def test_a_sweep_says_what_is_wrong_with_each_of_its_cells(recipe, tmp_path):
    path = tmp_path / "sweep.yaml"
    path.write_text(f"name: wide\nrecipe: {recipe}\ncells: {{a: [model.widht=3], b: [steps=2], c: [global_batch=7]}}\n")
    with pytest.raises(UserError) as refused:
        sweep.check_cells(sweep.read_sweep(path), 2)
    assert "a: " in str(refused.value) and "c: " in str(refused.value) and "b: " not in str(refused.value)
    path.write_text("name: wide\nrecipe: small\ncell: {}\n")
    with pytest.raises(UserError, match="did you mean 'cells'"):
        sweep.read_sweep(path)


@pytest.mark.parametrize("path", sorted(PROFILES[0].glob("sweeps/*.yaml")), ids=lambda path: path.stem)
def test_every_cell_of_a_shipped_sweep_is_a_recipe(path):
    cells = sweep.read_sweep(path)
    assert len(cells.cells) > 2
    for overrides in cells.cells.values():
        load(cells.recipe, [*cells.overrides, *overrides])


def test_a_summary_has_a_row_for_each_cell_and_a_column_for_each_value():
    rows = [
        sweep.Row("shallow", Queued("finished", "", ""), 9, {"loss/total": 1.25, "dev/vqa": 50.0}),
        sweep.Row("pre", Queued("failed", "", "the disk is full"), 4, {"loss/total": 2.5}),
        sweep.Row("post", Queued("new", "", ""), 0, {}),
    ]
    head, first, second, third = (line.split() for line in sweep.as_text(rows).splitlines())
    assert head == ["cell", "step", "loss/total", "dev/vqa", "state"]
    assert first == ["shallow", "9", "1.2500", "50.0000", "finished"]
    assert second == ["pre", "4", "2.5000", "failed", "the", "disk", "is", "full"]
    assert third == ["post", "0", "new"]
