import json
import subprocess
import sys

import pytest

from dist_fusion import cli, train
from dist_fusion.config import RECIPES
from dist_fusion.data.prepare.easy_forms import DRAWS


def test_recipes_lists_every_shipped_recipe_with_what_it_is(capsys):
    assert cli.main(["recipes"]) == train.DONE
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == sorted(path.stem for path in RECIPES.glob("*.yaml"))
    assert all(len(line.split()) > 5 for line in lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "demo-teacher-pretrian"], "did you mean 'demo-teacher-pretrain'?"),
        (["prepare", "easy-vaq", "/nowhere"], "did you mean 'easy-vqa'?"),
        (["evaluate", "/nowhere", "--shards", "/nowhere"], "is no run"),
        (["index", "/nowhere"], "does not exist"),
        (["inspect", "pipe:date"], "set data.trust_shards=true"),
        (["demo", "--size", "huge"], "it can be full, smoke"),
    ],
)
def test_a_mistake_is_told_in_one_message(capsys, arguments, message):
    assert cli.main(arguments) == train.MISTAKE
    assert message in capsys.readouterr().err


def test_index_counts_what_shards_hold(shards, capsys):
    assert cli.main(["index", str(shards)]) == train.DONE
    heads, counts = capsys.readouterr().out.splitlines()
    assert heads.split()[:2] == ["shards", "samples"] and counts.split() == [
        str(shards),
        "3",
        "41",
        "0",
        "61",
        "123",
        "0",
        "0",
    ]


def test_inspect_writes_a_page_and_says_where(shards, tmp_path, capsys):
    out = tmp_path / "page.html"
    asked = ["inspect", str(shards), "--out", str(out), "--samples", "2", "--size", "32"]
    assert cli.main([*asked, "--vocabulary", f"{shards}/vocab.txt"]) == train.DONE
    assert capsys.readouterr().out.splitlines()[-1] == str(out)
    assert out.read_text().count("<article") == 2


def test_a_finished_run_is_scored_by_kind(two_ranks, shards, tmp_path, capsys):
    recipe = tmp_path / "vqa.yaml"
    recipe.write_text(
        f"""
name: vqa
runs: {tmp_path}
steps: 3
global_batch: 4
tasks: {{vqa: {{answers: {shards}/answers.json}}}}
model: {{width: 16, num_heads: 2, num_layers: 2, num_fusion_layers: 1, image_size: 32, patch_size: 16}}
data: {{shards: [{shards}], dev: [{shards}], vocabulary: {shards}/vocab.txt}}
evaluate_every: 3
"""
    )
    assert two_ranks.run("run", recipe=str(recipe), overrides=[]) == [{"code": train.DONE}] * 2
    assert cli.main(["evaluate", str(tmp_path / "vqa"), "--shards", str(shards)]) == train.DONE
    printed = capsys.readouterr().out
    table = json.loads((tmp_path / "vqa" / "evaluate.json").read_text())["scores"]["vqa"]
    logged = [json.loads(line) for line in (tmp_path / "vqa" / "metrics.jsonl").read_text().splitlines()][-1]
    with_tasks = ["evaluate", str(tmp_path / "vqa"), "--shards", str(shards), "--task"]
    assert cli.main([*with_tasks, "vqa"]) == train.DONE
    assert capsys.readouterr().out == printed
    assert cli.main([*with_tasks, "vqa", "vaq"]) == train.MISTAKE
    assert "has no head for 'vaq'; did you mean 'vqa'?; it has vqa" in capsys.readouterr().err
    for kind, score in table.items():
        assert f"{score['percent']:6.2f}" in printed
        assert logged[f"dev/vqa/{kind}"] == pytest.approx(score["percent"], nan_ok=True)  # on two ranks, in training


def test_a_run_of_several_tasks_is_scored_on_those_that_are_named(two_ranks, easy_snli_ve, tmp_path, capsys):
    recipe = tmp_path / "both.yaml"
    recipe.write_text(
        f"""
name: both
runs: {tmp_path}
steps: 2
global_batch: 16
tasks: {{mlm: , retrieval: {{block: 8, negatives: 3}}, snli_ve: }}
model: {{width: 16, num_heads: 2, num_layers: 1, num_fusion_layers: 1, image_size: 32, patch_size: 16}}
data: {{shards: [{easy_snli_ve}/dev], vocabulary: {easy_snli_ve}/vocab.txt}}
"""
    )
    assert two_ranks.run("run", recipe=str(recipe), overrides=[]) == [{"code": train.DONE}] * 2
    shards = ["--shards", str(easy_snli_ve / "dev")]
    assert cli.main(["evaluate", str(tmp_path / "both"), *shards, "--task", "snli_ve", "retrieval"]) == train.DONE
    printed = capsys.readouterr().out
    tree = json.loads((tmp_path / "both" / "evaluate.json").read_text())
    assert set(tree["scores"]) == {"snli_ve", "retrieval"}
    assert tree["scores"]["snli_ve"]["statements"]["rows"] == 3 * DRAWS["dev"]
    matrix = tree["confusions"]["snli_ve"]
    assert matrix["classes"] == ["contradiction", "entailment", "neutral"]
    assert [sum(row) for row in matrix["counts"]] == [DRAWS["dev"]] * 3
    assert any(line.split()[0] == "neutral" for line in printed.splitlines() if line)


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--help"])
    said = capsys.readouterr().out
    assert ended.value.code == 0 and f"dist-fusion {command}" in said and len(said.splitlines()) > 4


def test_all_commands_are_listed_with_what_they_do(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert all(f"{name} {about}" in said for name, about in cli.COMMANDS.items())


@pytest.mark.parametrize(
    ("command", "spared"), [("inspect", "deepspeed transformers matplotlib"), ("train", "transformers matplotlib")]
)
def test_a_command_loads_only_what_it_needs(command, spared):
    told = (
        "import sys; from dist_fusion import cli\n"
        f"try: cli.main(['{command}', '--help'])\n"
        f"finally: print(sys.modules.keys() & set('{spared}'.split()), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == "set()"
