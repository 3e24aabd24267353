"""Real runs on real shards by real ranks: stopping, resuming, and what is refused."""

import fcntl
import json
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dist_fusion import train
from dist_fusion.checkpoint.manifest import folder_at, list_whole, read_manifest
from dist_fusion.config import load
from dist_fusion.engine.ranks import free_port
from dist_fusion.parts import prepare

LIFE = [
    "steps=24", "log_every=1", "save_every=100", "evaluate_every=15", "model.dropout=0.3",
    "optimizer.multipliers={heads: 10, fusion: 5, text_tower.blocks.0: 0.5}",
]  # fmt: skip


@pytest.fixture
def recipe(small_recipe) -> Path:
    return small_recipe


def metrics(run: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss/total"]) for line in lines if "loss/total" in line]


def same_weights(one: Path, other: Path) -> bool:
    ours, theirs = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("deepspeed", ["zero1", "zero2-bf16", "zero3"])
def test_a_resumed_run_equals_the_uninterrupted_one(two_ranks, recipe, tmp_path, deepspeed):
    """With dropout on, over two epochs, stopped by a file: the same losses and weights to the last bit.

    The second life saves memory by computing activations twice, which a run may do at any time.
    """
    common = [*LIFE, f"runs={tmp_path}", f"deepspeed={deepspeed}"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    arguments = {"recipe": str(recipe), "overrides": [*common, "name=whole"]}
    assert two_ranks.run("run", **arguments) == [{"code": train.DONE}] * 2
    arguments["overrides"][-1] = "name=parts"
    assert two_ranks.run("run", stop_at=7, **arguments) == [{"code": train.CONTINUE}] * 2
    stopped = metrics(parts)[-1][0]
    assert 7 <= stopped < 24
    arguments["overrides"].append("activation_checkpointing=true")
    assert two_ranks.run("run", **arguments) == [{"code": train.DONE}] * 2
    assert metrics(parts) == metrics(whole)
    assert [step for step, _ in metrics(parts)] == list(range(1, 25))
    assert same_weights(whole, parts)


def test_a_checkpoint_that_is_scored_only_when_resumed_is_not_written_again(two_ranks, recipe, tmp_path):
    """It is the best so far by then; a run that is killed in the middle of writing it again would have lost it."""
    overrides = [
        *LIFE[1:],
        f"runs={tmp_path}",
        "steps=8",
        "save_every=5",
        "evaluate_every=5",
        "keep_best=dev/mlm/masked tokens",
    ]
    arguments = {"recipe": str(recipe), "overrides": [*overrides, "save_async=false", "keep_checkpoints=9"]}
    assert two_ranks.run("run", stop_at=5, **arguments) == [{"code": train.CONTINUE}] * 2
    before, *later = list_whole(tmp_path / "small")
    assert before.step == 5 and read_manifest(before.folder)["position"]["scored"] == 0
    for saved in later:
        shutil.rmtree(saved.folder)
    made = (before.folder / "manifest.json").stat()
    assert two_ranks.run("run", **arguments) == [{"code": train.DONE}] * 2
    now = (before.folder / "manifest.json").stat()
    assert (now.st_ino, now.st_mtime_ns) == (made.st_ino, made.st_mtime_ns)
    last = list_whole(tmp_path / "small")[-1]
    assert last.step == 8 and read_manifest(last.folder)["position"]["best_step"] in (5, 8)


@pytest.mark.launch
def test_a_signal_to_one_worker_of_the_deepspeed_launcher_saves_all_and_the_same_command_continues(
    two_ranks, recipe, tmp_path
):
    overrides = ["steps=60", *LIFE[1:], f"runs={tmp_path}"]
    run, command = tmp_path / "small", [
        str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2", "--master_port", str(free_port()),
        "--module", "dist_fusion.train", str(recipe), *overrides,
    ]  # fmt: skip
    first = subprocess.Popen(command)
    try:
        _wait_for(lambda: (run / "metrics.jsonl").exists() and len(metrics(run)) > 5, first)
        pid = int((run / "logs" / "rank-1.pid").read_text())
        subprocess.run(["kill", f"-{signal.SIGUSR2.value}", str(pid)], check=True)
        assert first.wait(60) == train.CONTINUE
    finally:
        first.kill()
    assert not (run / "model.safetensors").exists()
    assert metrics(run)[-1][0] < 60
    assert subprocess.run(command, timeout=120).returncode == train.DONE
    two_ranks.run("run", recipe=str(recipe), overrides=[*overrides, "name=whole"])
    assert metrics(run) == metrics(tmp_path / "whole")
    assert same_weights(run, tmp_path / "whole")


@pytest.mark.launch
@pytest.mark.parametrize(
    "launcher",
    [["torchrun", "--nproc_per_node", "2", "--master_port", "{port}"], ["python"]],
    ids=["torchrun", "python"],
)
def test_torchrun_and_plain_python_start_the_same_loop(recipe, tmp_path, launcher):
    program, *options = (part.format(port=free_port()) for part in launcher)
    command = [str(Path(sys.executable).with_name(program)), *options, "-m", "dist_fusion.train", str(recipe)]
    done = subprocess.run([*command, f"runs={tmp_path}", "steps=2", "log_every=1"], timeout=120)
    assert done.returncode == train.DONE
    assert len(metrics(tmp_path / "small")) == 2


def _wait_for(condition, process: subprocess.Popen) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, "the launcher ended early"
        assert time.monotonic() < end, "nothing happened for two minutes"
        time.sleep(0.05)


def test_the_name_of_a_run_belongs_to_its_recipe(two_ranks, recipe, tmp_path):
    common = [f"runs={tmp_path}", "steps=2"]
    assert two_ranks.run("run", recipe=str(recipe), overrides=common) == [{"code": train.DONE}] * 2
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    changes = ["model.width=32", "seed=3", "optimizer.multipliers.heads=2"]
    for reply in two_ranks.run("run", recipe=str(recipe), overrides=[*common, *changes]):
        assert "made by another recipe" in reply["mistake"]
        assert "model.width was 16, now 32" in reply["mistake"]
        assert "optimizer.multipliers.heads was None, now 2.0" in reply["mistake"]
        assert "name=" in reply["mistake"]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_finished_run_started_again_does_nothing_and_says_done(two_ranks, recipe, tmp_path):
    arguments = {"recipe": str(recipe), "overrides": [f"runs={tmp_path}", "steps=2"]}
    two_ranks.run("run", **arguments)
    weights = (tmp_path / "small" / "model.safetensors").stat().st_mtime_ns
    assert two_ranks.run("run", **arguments) == [{"code": train.DONE}] * 2
    assert (tmp_path / "small" / "model.safetensors").stat().st_mtime_ns == weights


def test_a_checkpoint_of_another_architecture_is_refused(two_ranks, recipe, tmp_path):
    arguments = {"recipe": str(recipe), "overrides": [f"runs={tmp_path}", "steps=2"]}
    two_ranks.run("run", **arguments)
    manifest = next((tmp_path / "small" / "checkpoints").glob("*/manifest.json"))
    tree = json.loads(manifest.read_text())
    tree["model.width"] = 64
    manifest.write_text(json.dumps(tree))
    for reply in two_ranks.run("run", **arguments):
        assert "model.width: 64 then, 16 now" in reply["mistake"]


def test_a_checkpoint_that_is_not_whole_is_no_candidate(two_ranks, recipe, tmp_path):
    arguments = {"recipe": str(recipe), "overrides": [f"runs={tmp_path}", "steps=4", "save_every=2", "log_every=1"]}
    two_ranks.run("run", **arguments)
    run = tmp_path / "small"
    expected = metrics(run)
    torn = run / "checkpoints" / "step-00000004"
    shard = next(torn.glob("*optim_states.pt"))
    shard.write_bytes(shard.read_bytes()[:-10])
    (run / "model.safetensors").unlink()
    assert two_ranks.run("run", **arguments) == [{"code": train.DONE}] * 2
    assert metrics(run) == expected


def test_the_newest_the_best_and_one_of_every_third_epoch_are_kept(two_ranks, recipe, tmp_path):
    best = "dev/mlm/masked tokens"
    overrides = [f"runs={tmp_path}", "steps=40", "save_every=4", "evaluate_every=5", "keep_epochs=3"]
    wrong = two_ranks.run("run", recipe=str(recipe), overrides=[*overrides, "keep_best=dev/mlm/masked", "name=wrong"])
    assert "no score has this name; did you mean 'dev/mlm/masked tokens'?" in wrong[0]["mistake"]
    arguments = {"recipe": str(recipe), "overrides": [*overrides, f"keep_best={best}", "optimizer.learning_rate=3e-3"]}
    assert two_ranks.run("run", **arguments) == [{"code": train.DONE}] * 2
    run = tmp_path / "small"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    scores = {line["step"]: line[best] for line in lines if best in line}
    assert list(scores) == [5, 10, 15, 20, 25, 30, 35, 40]
    # An epoch is 41 samples, 5.125 steps: 16 and 32 are the first saves from 15.4 and from 30.8 steps on.
    assert {saved.step for saved in list_whole(run)} == {16, 32, 36, 40, max(scores, key=scores.__getitem__)}
    position = json.loads((folder_at(run, 40) / "manifest.json").read_text())["position"]
    del scores[40]  # which came after the save
    assert (position["best"], position["best_step"]) == (max(scores.values()), max(scores, key=scores.__getitem__))


def test_a_checkpoint_holds_no_teacher(two_ranks, recipe, tmp_path):
    common = [f"runs={tmp_path}", "steps=2"]
    teacher = ["name=teacher", "tasks.itc=false", "model.kind=fusion-encoder"]
    assert two_ranks.run("run", recipe=str(recipe), overrides=[*common, *teacher]) == [{"code": train.DONE}] * 2
    taught = [f"teachers.0.source={tmp_path}/teacher", "distill.targets=both", "distill.soft=1"]
    theirs = (tmp_path / "teacher" / "model.safetensors").read_bytes()
    assert two_ranks.run("run", recipe=str(recipe), overrides=[*common, *taught]) == [{"code": train.DONE}] * 2
    assert (tmp_path / "teacher" / "model.safetensors").read_bytes() == theirs
    state = torch.load(
        tmp_path / "small" / "checkpoints" / "step-00000002" / "mp_rank_00_model_states.pt", weights_only=False
    )
    assert set(state["module"]) == set(load_file(tmp_path / "small" / "model.safetensors"))
    assert not any("encoder." in name for name in state["module"])

    (tmp_path / "teacher" / "model.safetensors").write_bytes(theirs[:-4] + b"abcd")
    for reply in two_ranks.run("run", recipe=str(recipe), overrides=[*common, *taught]):
        assert "digest of the teachers' weights" in reply["mistake"]


def test_a_run_that_is_being_trained_cannot_be_started_a_second_time(two_ranks, recipe, tmp_path):
    run = tmp_path / "small"
    run.mkdir()
    with (run / "lock").open("w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        for reply in two_ranks.run("run", recipe=str(recipe), overrides=[f"runs={tmp_path}", "steps=2"]):
            assert "being trained by another job" in reply["mistake"]
    assert two_ranks.run("run", recipe=str(recipe), overrides=[f"runs={tmp_path}", "steps=2"])[0] == {"code": 0}


def test_an_undecodable_image_is_reported_and_training_goes_on(two_ranks, recipe, shards, tmp_path):
    broken = tmp_path / "shards"
    broken.mkdir()
    for tar in sorted(Path(shards).glob("*.tar")):
        (broken / tar.name).write_bytes(tar.read_bytes())
    with tarfile.open(next(broken.glob("*.tar"))) as tar:
        member = next(m for m in tar.getmembers() if m.name.endswith(".png"))
    victim = next(broken.glob("*.tar"))
    data = bytearray(victim.read_bytes())
    data[member.offset_data : member.offset_data + 40] = b"x" * 40
    victim.write_bytes(data)
    overrides = [f"runs={tmp_path}/runs", "steps=6", "log_every=1", f"data.shards=[{broken}]"]
    assert two_ranks.run("run", recipe=str(recipe), overrides=overrides) == [{"code": train.DONE}] * 2
    lines = [json.loads(line) for line in (tmp_path / "runs" / "small" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["data/skipped"] == 1.0
    assert len(lines) == 6


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.shards=[/nowhere]"], "'/nowhere', which does not exist"),
        (["data.vocabulary=/nowhere.txt"], "no such file"),
        (["global_batch=10"], "no multiple of tasks.itm.block"),
        (["deepspeed=zero9"], "zero1"),
        (["deepspeed=zero2-fp16"], "deepspeed=zero2-fp16 is fp16, which needs a GPU"),
        (["optimizer.multipliers.head=3"], "did you mean 'heads'?"),
        (["initialise_from=/nowhere"], "holds no finished model"),
        (["teachers.0.source=/nowhere", "distill.soft=1"], "holds no finished model"),
        (["model.widht=3"], "did you mean 'width'?"),
    ],
)
def test_a_mistake_is_told_in_one_message_and_leaves_nothing_behind(recipe, tmp_path, capsys, overrides, message):
    code = train.main([str(recipe), f"runs={tmp_path}/runs", *overrides])
    assert code == train.MISTAKE
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_shows_recipe_batches_and_parameters_and_starts_nothing(recipe, tmp_path, capsys):
    assert train.main([str(recipe), f"runs={tmp_path}/runs", "--dry-run"]) == train.DONE
    shown = capsys.readouterr().out
    assert "train_micro_batch_size_per_gpu" in shown
    assert "fusion: bridge-pre" in shown
    assert "total" in shown
    assert "Memory of a rank, an estimate" in shown
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_counts_what_is_not_at_hand_and_says_all_that_is_lacking(tmp_path, capsys, monkeypatch):
    """The recipe of the paper, on a laptop without its weights or its data."""
    monkeypatch.chdir(tmp_path)
    assert train.main(["pretrain", "--dry-run", "--ranks=8"]) == train.MISTAKE
    shown, told = capsys.readouterr()
    for line in ("student", "teacher", "Memory of a rank"):
        assert line in shown
    total = next(line.split() for line in shown.splitlines() if line.split()[:1] == ["total"])
    assert (total[1], total[3]) == ("279,530,813", "135,586,364")
    for key in ("initialise_from", "teachers.0.source", "shards/coco/train", "shards/coco/dev"):
        assert key in told


def test_only_held_out_shards_are_scored_also_beside_several_sources(recipe, shards):
    """Sources are trained on; scored with the held-out ones, they would flatter every dev score."""
    sources = f"data.sources={{one: {{shards: [{shards}]}}, two: {{shards: [{shards}], weight: 2}}}}"
    config = load(recipe, ["data.shards=[]", sources, "evaluate_every=2"])
    parts = prepare(config, torch.device("cpu"))
    assert parts.stream.num_samples == 3 * 41
    assert parts.dev is not None and parts.dev.num_samples == 41


def test_what_a_gpu_could_do_at_most_is_told_if_it_is_known(recipe, monkeypatch, caplog):
    config = load(recipe, [])
    parts, gpu = prepare(config, torch.device("cpu")), torch.device("cuda")
    assert train.samples_at_peak(config, parts, 1, torch.device("cpu")) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert train.samples_at_peak(config, parts, 1, gpu) > 1e6
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Abacus 3")
    with caplog.at_level("INFO", "dist_fusion"):
        assert train.samples_at_peak(config, parts, 1, gpu) is None
    assert "no speed/mfu: the peak of Abacus 3" in caplog.text
