"""What real ranks leave in the folder of a run, over several lives."""

import json
from pathlib import Path

import pytest

from dist_fusion import train
from dist_fusion.monitor.clock import PHASES
from dist_fusion.monitor.events import KINDS, read_events

SMALL = "model: {width: 16, num_heads: 2, num_layers: 2, num_fusion_layers: 2, image_size: 32, patch_size: 16}"


@pytest.fixture(scope="module")
def recipe(shards, tmp_path_factory) -> Path:
    """A small student on the shards that all tests share."""
    path = tmp_path_factory.mktemp("recipes") / "small.yaml"
    path.write_text(
        f"name: small\nsteps: 12\nglobal_batch: 8\nlog_every: 1\nsave_every: 100\nevaluate_every: 4\n{SMALL}\n"
        "tasks: {mlm: , itm: {block: 4}, itc: {dimensions: 8}}\n"
        f"data: {{shards: [{shards}], dev: [{shards}], vocabulary: {shards}/vocab.txt, shuffle_buffer: 10}}\n"
        "optimizer: {learning_rate: 1e-3, multipliers: {heads: 10}}\n"
    )
    return path


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def twice_resumed(two_ranks, recipe, tmp_path_factory) -> Path:
    """A student with a teacher, stopped twice and then finished."""
    folder = tmp_path_factory.mktemp("runs")
    common = [f"runs={folder}"]
    teacher = [*common, "name=teacher", "steps=2", "tasks.itc=false", "model.kind=fusion-encoder"]
    assert two_ranks.run("run", recipe=str(recipe), overrides=teacher) == [{"code": train.DONE}] * 2
    taught = [*common, f"teachers.0.source={folder}/teacher", "distill.targets=both", "distill.soft=1", "steps=40"]
    for stop_at, code in ((4, train.CONTINUE), (16, train.CONTINUE), (None, train.DONE)):
        done = two_ranks.run("run", recipe=str(recipe), overrides=taught, stop_at=stop_at)
        assert done == [{"code": code}] * 2
    return folder / "small"


def accumulated(run: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(run / "tb"), size_guidance={"scalars": 0, "images": 0}).Reload()


def test_every_curve_is_one_over_two_restarts_and_says_the_same_as_the_lines(twice_resumed):
    board, told = accumulated(twice_resumed), lines(twice_resumed)
    assert [line["step"] for line in told if "loss/total" in line] == list(range(1, 41))
    for key in {key for line in told for key in line} - {"step"}:
        expected = [(line["step"], pytest.approx(line[key], rel=1e-6)) for line in told if key in line]
        assert [(point.step, point.value) for point in board.Scalars(key)] == expected, key


def test_a_step_tells_losses_optimizer_speed_times_ranks_memory_and_attention(twice_resumed):
    line = next(line for line in reversed(lines(twice_resumed)) if "loss/total" in line)
    terms = ["total", *(f"{kind}/{task}" for kind in ("hard", "soft") for task in ("mlm", "itm")), "hard/itc"]
    sites = [f"{where}.{way}" for where in ("tower", "bridge") for way in ("t2i", "i2t")]
    terms += [f"attention/{site}" for site in sites]
    groups = ("base", "base.no_decay", "x10", "x10.no_decay")
    expected = {
        *(f"{kind}/{term}" for kind in ("loss", "loss_max") for term in terms),
        "optimizer/gradient_norm", "optimizer/learning_rate", *(f"optimizer/learning_rate/{name}" for name in groups),
        "speed/samples_per_s", "speed/samples_per_s_per_rank", "speed/step_s", "speed/data_wait_share",
        *(f"time/{name}_s" for name in PHASES), "time/left_s",
        *(f"ranks/{n}_{w}" for n in ("step_s", "data_wait_s", "forward_s") for w in ("min", "max", "max_rank")),
        "memory/peak_gib",
        *(f"attention/entropy/{site}" for site in (*sites, "teacher.t2i", "teacher.i2t")),
        *(f"attention/top_patch_match/{site}" for site in sites),
    }  # fmt: skip
    assert expected <= line.keys()
    assert all(line[f"loss_max/{term}"] >= line[f"loss/{term}"] - 1e-6 for term in terms)
    assert line["optimizer/learning_rate/x10"] == pytest.approx(10 * line["optimizer/learning_rate/base"])
    assert sum(line[f"time/{name}_s"] for name in PHASES) <= line["speed/step_s"]
    assert all(0 <= line[f"attention/top_patch_match/{site}"] <= 1 for site in sites)
    assert "speed/mfu" not in line


def test_pictures_recipe_and_table_of_runs_are_in_the_runs_own_folder(twice_resumed):
    board = accumulated(twice_resumed)
    assert [image.step for image in board.Images("attention")] == list(range(4, 41, 4))
    (recipe,) = board.Tensors("recipe/text_summary")
    assert "fusion: bridge-pre" in recipe.tensor_proto.string_val[0].decode()
    assert {path.is_file() for path in (twice_resumed / "tb").iterdir()} == {True}
    found = board.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    assert b"optimizer.learning_rate" in found and b"model.width" in found
    assert b"loss/total" in board.SummaryMetadata("_hparams_/experiment").plugin_data.content


def test_the_diary_tells_of_all_lives(twice_resumed):
    events = read_events(twice_resumed)
    started = [event for event in events if event.kind == "started"]
    assert [event.details["ranks"] for event in started] == [2, 2, 2]
    assert [event.details["resumed_from"] for event in started] == [None, started[1].step, started[2].step]
    assert started[0].step == 0 < started[1].step < started[2].step
    evaluated = [event for event in events if event.kind == "evaluated"]
    assert [event.step for event in evaluated] == list(range(4, 41, 4))
    assert set(evaluated[-1].details["scores"]) == {"dev/mlm/masked tokens", "dev/itm/pairs", "dev/itc/rows"}
    assert events[-1].kind == "finished"
    assert {event.kind for event in events} <= KINDS.keys()


@pytest.mark.parametrize("deepspeed", ["zero1", "zero3"])
def test_pictures_change_nothing_of_the_training(two_ranks, recipe, tmp_path, deepspeed):
    """With dropout, to the last digit."""
    curves = []
    for every in (0, 1):
        overrides = [f"runs={tmp_path}", f"name=every{every}", f"overlay_every={every}", "evaluate_every=0"]
        overrides += ["steps=6", "model.dropout=0.3", f"deepspeed={deepspeed}"]
        assert two_ranks.run("run", recipe=str(recipe), overrides=overrides) == [{"code": train.DONE}] * 2
        curves.append([line["loss/total"] for line in lines(tmp_path / f"every{every}")])
    assert curves[0] == curves[1]
    assert len(accumulated(tmp_path / "every1").Images("attention")) == 6
    assert "attention" not in accumulated(tmp_path / "every0").Tags()["images"]
