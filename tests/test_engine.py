import json
from math import prod
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_fusion.config import OptimizerConfig, load
from dist_fusion.engine.optimizer import check_multipliers, parameter_groups
from dist_fusion.engine.sharding import DS_CONFIGS, check_precision, ds_config, sharding
from dist_fusion.schema import UserError
from tests import tiny

FILES = {path.stem: json.loads(path.read_text()) for folder in DS_CONFIGS for path in folder.glob("*.json")}
MODEL = tiny.model(tiny.model_config(), tiny.PRETRAINING)
NAMES = [name for name, _ in MODEL.named_parameters()]
MULTIPLIERS = {"heads": 10, "fusion": 5, "text_tower.blocks.0": 0.5}


@pytest.mark.parametrize("name", FILES)
def test_deepspeed_reads_each_file_with_the_batches_of_the_recipe(one_rank, tiny_recipe, name):
    overrides = [f"deepspeed={name}", "global_batch=1024", "accumulation=2"]
    for ranks in (1, 8, 64):
        (read,) = one_rank.run("parsed", recipe=str(tiny_recipe), overrides=overrides, ranks=ranks)
        assert read == {"global": 1024, "accumulation": 2, "micro": 512 // ranks, "clip": 1.0}
        assert prod(read[key] for key in ("micro", "accumulation")) * ranks == 1024


@pytest.mark.parametrize("name", FILES)
def test_the_name_of_a_file_says_what_is_in_it(tiny_recipe, name):
    stage, _, rest = name.partition("-")
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(name[-4:], torch.float32)
    read = sharding(FILES[name])
    assert (f"zero{read.stage}", read.dtype, read.offload) == (stage, dtype, rest.startswith("offload"))
    assert set(FILES[name]) <= {"zero_optimization", "fp16", "bf16", "zero_allow_untested_optimizer"}
    adam = ds_config(load(tiny_recipe, [f"deepspeed={name}"]), 1)["optimizer"]["params"]["torch_adam"]
    assert adam is not read.offload


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"zero_optimization": {"stge": 2}}', "stge"),
        ('{"zero_optimization": {"stage": 4}}', "stage"),
        ('{"fp16": {"enabled": true}, "bf16": {"enabled": true}}', "both enabled"),
        ('{"optimizer": {}}', "belongs in the recipe"),
        ("{", "is not JSON"),
    ],
)
def test_a_wrong_file_is_refused_by_name(tiny_recipe, tmp_path, text, message):
    path = tmp_path / "own.json"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        ds_config(load(tiny_recipe, [f"deepspeed={path}"]), 1)
    assert str(path) in str(error.value)


def test_zero_3_and_compile_do_not_go_together(tiny_recipe):
    with pytest.raises(UserError, match="use zero1 or zero2"):
        ds_config(load(tiny_recipe, ["deepspeed=zero3-fp16", "compile=true"]), 1)
    assert ds_config(load(tiny_recipe, ["deepspeed=zero2-fp16", "compile=true"]), 1)


@pytest.mark.parametrize(
    ("name", "device", "capability", "message"),
    [
        ("zero1", "cpu", (0, 0), None),
        ("zero1", "cuda", (7, 0), None),
        ("zero1-fp16", "cuda", (7, 0), None),
        ("zero1-fp16", "cpu", (0, 0), "deepspeed is fp16, which needs a GPU"),
        ("zero1-bf16", "cpu", (0, 0), None),
        ("zero1-bf16", "cuda", (8, 0), None),
        ("zero1-bf16", "cuda", (9, 0), None),
        ("zero1-bf16", "cuda", (7, 5), "compute capability 8.0 or more, and this rank's has 7.5"),
        ("zero3-bf16", "cuda", (7, 0), "zero1-fp16"),
    ],
)
def test_a_precision_that_the_device_cannot_do_is_refused(name, device, capability, message):
    if message is None:
        check_precision(sharding(FILES[name]).dtype, device, capability, "deepspeed")
        return
    with pytest.raises(UserError) as error:
        check_precision(sharding(FILES[name]).dtype, device, capability, "deepspeed")
    assert message in str(error.value)


def prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts) + 1)]


@settings(max_examples=50, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(sorted({prefix for name in NAMES for prefix in prefixes(name)})),
        st.one_of(st.integers(1, 50), st.floats(0.01, 50)),
        max_size=8,
    )
)
def test_every_parameter_is_in_one_group_with_the_rate_of_its_longest_prefix(multipliers):
    check_multipliers(MODEL, multipliers)
    config = OptimizerConfig(multipliers=multipliers)
    groups = parameter_groups(MODEL, config)
    placed = {id(parameter): group for group in groups for parameter in group["params"]}
    assert len(placed) == sum(len(group["params"]) for group in groups) == len(NAMES)
    for name, parameter in MODEL.named_parameters():
        group, given = placed[id(parameter)], [prefix for prefix in prefixes(name) if prefix in multipliers]
        assert group["lr"] == pytest.approx(config.learning_rate * (multipliers[given[-1]] if given else 1))
        plain = parameter.ndim <= 1 or name.split(".")[-1] in ("modality", "sentence") or ".modality." in name
        assert group["weight_decay"] == (0 if plain else config.weight_decay)


def test_a_frozen_parameter_is_in_no_group():
    model = tiny.model(tiny.model_config(), tiny.PRETRAINING)
    model.text_tower.requires_grad_(False)
    trained = {id(p) for group in parameter_groups(model, OptimizerConfig()) for p in group["params"]}
    assert trained == {id(p) for p in model.parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("prefix", "message"),
    [
        ("head", "did you mean 'heads'?"),
        ("quark", "there are text_embedding, text_tower, image_embedding, image_tower, fusion, heads"),
        ("text_tower.blocks.7", "there are text_tower.blocks.0, text_tower.blocks.1, text_tower.blocks.2"),
        ("heads.vqa", "there are heads.mlm, heads.itm, heads.itc"),
        ("heads.itc.temperature.x", "there are heads.itc.temperature"),
    ],
)
def test_a_prefix_without_parameters_is_refused_with_the_known_ones(prefix, message):
    with pytest.raises(UserError) as error:
        check_multipliers(MODEL, {"heads": 2.0, prefix: 3.0})
    assert f"optimizer.multipliers names {prefix!r}" in str(error.value)
    assert message in str(error.value)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_schedule_scales_every_group_and_each_is_told_by_its_multiplier(two_ranks, tiny_recipe, stage):
    overrides = [f"deepspeed=zero{stage}", f"optimizer.multipliers={json.dumps(MULTIPLIERS)}"]
    for reply in two_ranks.run("rates", recipe=str(tiny_recipe), overrides=overrides):
        for step, (told, rates) in enumerate(reply):
            expected = 1e-3 * min(1, (10 - step) / 9)  # one step of warm-up, then down to 0 at step 10
            groups = {"base": 1, "x0.5": 0.5, "x5": 5, "x10": 10}
            named = {f"/{name}{end}": of * expected for name, of in groups.items() for end in ("", ".no_decay")}
            paths = {f"optimizer/learning_rate{name}": rate for name, rate in {"": expected, **named}.items()}
            assert told == pytest.approx(paths)
            assert sorted(rates) == pytest.approx(sorted(m * expected for m in (0.5, 0.5, 1, 1, 5, 5, 10, 10)))


def test_shipped_files_are_found_by_name_and_others_by_path():
    assert {f"zero{way}-{precision}" for way in ("1", "2", "2-offload", "3") for precision in ("fp16", "bf16")} | {
        "zero1", "zero2", "zero3"
    } == set(FILES)  # fmt: skip
    assert all(Path(folder).is_dir() for folder in DS_CONFIGS)


def test_no_group_of_ranks_gives_up_before_its_limit(two_ranks, tiny_recipe):
    """DeepSpeed's own groups too: a run's watch must have the first word."""
    for waits in two_ranks.run("patience", recipe=str(tiny_recipe), minutes=47.0):
        assert len(waits) > 1 and set(waits) == {47.0}
