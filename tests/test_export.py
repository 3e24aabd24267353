"""Models out of checkpoints of real runs by real ranks."""

import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from dist_fusion import cli, train
from dist_fusion.models.weights import load_model


@pytest.fixture(scope="module")
def run(two_ranks, shards, tmp_path_factory) -> Path:
    """A finished run of a fusion encoder in four steps of bf16, with checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("export")
    recipe = folder / "small.yaml"
    recipe.write_text(
        f"""
name: small
runs: {folder}
steps: 4
save_every: 2
global_batch: 8
tasks: {{mlm: , itm: {{block: 4}}}}
model: {{kind: fusion-encoder, width: 16, num_heads: 2, num_layers: 1, image_size: 32, patch_size: 16}}
data: {{shards: [{shards}], vocabulary: {shards}/vocab.txt, shuffle_buffer: 10}}
deepspeed: zero2-bf16
"""
    )
    assert two_ranks.run("run", recipe=str(recipe), overrides=[]) == [{"code": train.DONE}] * 2
    return folder / "small"


def copied(run: Path, to: Path) -> Path:
    return shutil.copytree(run, to, ignore=shutil.ignore_patterns("exported"))


def test_the_newest_checkpoint_gives_the_finished_model(run, capsys):
    assert cli.main(["export", str(run)]) == train.DONE
    made = run / "exported" / "step-00000004"
    assert capsys.readouterr().out == f"{made}\n"
    card, weights = load_model(made, "the model that was exported")
    finished_card, finished = load_model(run, "the finished run")
    assert card == finished_card and weights.keys() == finished.keys()
    assert all(torch.equal(weights[name], finished[name]) for name in weights)
    assert {value.dtype for value in weights.values()} == {torch.float32}
    assert cli.main(["export", str(run)]) == train.MISTAKE
    assert "holds a model already" in capsys.readouterr().err


def test_what_was_exported_can_be_started_from_and_taught_with(run, two_ranks, tmp_path, capsys):
    out = tmp_path / "made" / "here"
    assert cli.main(["export", str(run), "--step", "2", "--out", str(out)]) == train.DONE
    assert capsys.readouterr().out == f"{out}\n"
    earlier, finished = load_file(out / "model.safetensors"), load_file(run / "model.safetensors")
    assert any(not torch.equal(earlier[name], finished[name]) for name in finished)
    recipe = tmp_path / "next.yaml"
    tree = yaml.safe_load((run.parent / "small.yaml").read_text())
    tree["model"] |= {"kind": "dual-encoder", "num_fusion_layers": 1}
    tree |= {"name": "next", "runs": str(tmp_path), "steps": 1, "initialise_from": str(out)}
    recipe.write_text(yaml.safe_dump(tree))
    taught = {
        "recipe": str(recipe),
        "overrides": [f"teachers.0.source={out}", "distill.soft=1", "distill.targets=none"],
    }
    assert two_ranks.run("run", **taught) == [{"code": train.DONE}] * 2
    assert not (tmp_path / "next" / "exported").exists()


def test_a_step_without_a_whole_checkpoint_is_refused_with_those_there_are(run, tmp_path, capsys):
    torn = copied(run, tmp_path / "torn")
    next((torn / "checkpoints" / "step-00000004").glob("*optim_states.pt")).unlink()
    assert cli.main(["export", str(torn), "--step", "4"]) == train.MISTAKE
    assert "has no whole checkpoint of step 4; there are 2" in capsys.readouterr().err
    assert cli.main(["export", str(torn)]) == train.DONE
    assert capsys.readouterr().out.strip().endswith("exported/step-00000002")
    shutil.rmtree(torn / "checkpoints")
    assert cli.main(["export", str(torn)]) == train.MISTAKE
    assert "has no whole checkpoint yet" in capsys.readouterr().err
    assert cli.main(["export", str(tmp_path)]) == train.MISTAKE
    assert "is no run" in capsys.readouterr().err


def test_a_checkpoint_with_a_flipped_bit_is_no_model_but_the_one_before_it_is(run, tmp_path, capsys):
    flipped = copied(run, tmp_path / "flipped")
    shard = next((flipped / "checkpoints" / "step-00000004").glob("*optim_states.pt"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 4
    shard.write_bytes(data)
    assert cli.main(["export", str(flipped), "--step", "4"]) == train.MISTAKE
    assert f"is damaged: {shard.name} is not what was saved" in capsys.readouterr().err
    assert cli.main(["export", str(flipped)]) == train.DONE
    assert capsys.readouterr().out.strip().endswith("exported/step-00000002")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")
def test_a_run_of_another_user_is_read_only_if_trusted(run, tmp_path, capsys):
    theirs = copied(run, tmp_path / "theirs")
    os.chown(theirs / "checkpoints", 12345, 0)
    asked = ["export", str(theirs), "--out", str(tmp_path / "out")]
    assert cli.main(asked) == train.MISTAKE
    assert "belongs to another user (number 12345)" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert cli.main([*asked, "--trust"]) == train.DONE


def test_a_recipe_that_now_reads_another_vocabulary_is_refused(run, tmp_path, capsys):
    moved = copied(run, tmp_path / "moved")
    tree = yaml.safe_load((moved / "config.yaml").read_text())
    words = Path(tree["data"]["vocabulary"]).read_text().splitlines()
    (tmp_path / "vocab.txt").write_text("\n".join([*words, "newword"]) + "\n")
    tree["data"]["vocabulary"] = str(tmp_path / "vocab.txt")
    (moved / "config.yaml").write_text(yaml.safe_dump(tree))
    assert cli.main(["export", str(moved)]) == train.MISTAKE
    assert "is not of the model that" in capsys.readouterr().err
