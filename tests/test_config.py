from dataclasses import fields, replace
from itertools import product

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dist_fusion.config import RECIPES, Config, OptimizerConfig, dump, load
from dist_fusion.distill import TARGETS
from dist_fusion.models.fusion import FUSIONS
from dist_fusion.schema import UserError
from dist_fusion.tasks import TASKS

STUDENT, TEACHER = "demo-student-pretrain", "demo-teacher-pretrain"
SHIPPED = [path.stem for path in sorted(RECIPES.glob("*.yaml"))]
SMALL = "name: small\nsteps: 3\nglobal_batch: 4\n"
NO_TEACHER = ["teachers=[]", "distill.targets=none", "distill.soft=0"]


@pytest.mark.parametrize("recipe", SHIPPED)
def test_a_shipped_recipe_loads_and_its_dump_loads_back(recipe, tmp_path):
    config, again = load(recipe), tmp_path / "again.yaml"
    again.write_text(dump(config))
    assert load(again) == config
    assert config.active_tasks()


@settings(max_examples=40, deadline=None)
@given(
    st.builds(
        OptimizerConfig,
        **{
            name: st.floats(0, allow_nan=False, allow_infinity=False)
            for name in ("learning_rate", "epsilon", "weight_decay", "clip")
        },
        warmup=st.floats(0, 1),
        betas=st.tuples(st.floats(0, 0.99), st.floats(0, 0.99)),
    ),
    st.integers(),
    st.text(),
    st.lists(st.text()).map(tuple),
)
@example(OptimizerConfig(), 0, "\x85 a line's end in YAML, and é", ())
def test_a_dump_keeps_any_number_and_any_string(tmp_path_factory, optimizer, seed, deepspeed, shards):
    config = load(STUDENT)
    config = replace(
        config, optimizer=optimizer, seed=seed, deepspeed=deepspeed, data=replace(config.data, shards=shards)
    )
    again = tmp_path_factory.mktemp("dump") / "again.yaml"
    again.write_text(dump(config))
    assert load(again) == config


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["stpes=3"], "unknown key 'stpes'; did you mean 'steps'?"),
        (["Steps=3"], "unknown key 'Steps'; did you mean 'steps'?"),
        (["quark=3"], "unknown key 'quark'; known keys: accumulation, activation_checkpointing, compile, data"),
        (["model.fuson=virt"], "unknown key 'model.fuson'; did you mean 'fusion'?"),
        (["tasks.itm.blok=3"], "unknown key 'tasks.itm.blok'; did you mean 'block'?"),
        (["tasks.imt.block=3"], "unknown key 'tasks.imt'; did you mean 'itm'?"),
        (["teachers.0.sorce=x"], "unknown key 'teachers.0.sorce'; did you mean 'source'?"),
        (["model.fusion=bridge"], f"model.fusion is 'bridge': it can be {', '.join(FUSIONS)}"),
        (["model.mapping=all"], "model.mapping is 'all': it can be top, cross-layer, cumulative"),
        (["model.kind=dual"], "model.kind is 'dual': Input should be 'dual-encoder' or 'fusion-encoder'"),
        (["distill.targets=bridges"], "it can be none, towers, bridge, both; did you mean 'bridge'?"),
        (["steps=many"], "steps is 'many': Input should be a valid integer"),
        (["steps=1.5"], "steps is 1.5: Input should be a valid integer"),
        (["data.shards=folder"], "data.shards is 'folder': Input should be a valid tuple"),
        (["optimizer.betas=[0.9]"], "optimizer.betas.1 is missing"),
        (["tasks.itm=[1]"], "tasks.itm is [1]"),
        (["tasks.itm=7"], "tasks.itm is 7"),
        (["teachers=[{}]"], "teachers.0.source is missing"),
        (["teachers.2.source=x"], "'teachers.2.source=x' counts from 0 to 1 where it says '2'"),
        (["initialise_from={text: x}"], "  initialise_from.image is missing"),
        (["initialise_from={text: x, imgae: y}"], "unknown key 'initialise_from.imgae'; did you mean 'image'?"),
        (["teachers.0.weight=0"], "teachers.0.weight is 0.0; it must be at least 1e-06"),
        (["teachers.0.weight=.nan"], "teachers.0.weight is nan"),
        (["tasks.mlm.weight=-1"], "tasks.mlm.weight is -1.0; it must be at least 0"),
        (["tasks.snli_ve.statements_per_image=-1"], "tasks.snli_ve.statements_per_image is -1"),
        (["optimizer.betas=[0.9, 1.5]"], "optimizer.betas.1 is 1.5"),
        (["steps.many=3"], "'steps.many=3' asks for a key of steps, which is 300 and has none"),
        (
            ["distill.hard=0"],
            "tasks.itc would learn nothing: distill.hard is 0, and no teacher gives soft labels for it",
        ),
        (["distill.hard=0", "tasks.itc=false", "teachers.0.tasks=[mlm]"], "tasks.itm would learn nothing"),
        (["distill.hard=0", "tasks.itc=false", "teachers.0.tasks=[]"], "tasks.mlm would learn nothing"),
        (["teachers.0.tasks=[itc]"], "teachers.0.tasks names 'itc', which it cannot teach here; it can be mlm, itm"),
        (["teachers.0.precision=fp8"], "it can be auto, fp32, bf16, fp16"),
        (["tasks.snli_ve={labels: [a, b]}"], "it must be three different names"),
        (["tasks.retrieval={block: 8}"], "negatives is 15 and block 8; there can be 1 to block - 1 negatives"),
        (["steps"], "'steps' is no override; write key.sub=value"),
        (["steps=[1"], "the value of 'steps=[1' is not YAML"),
        (["steps=0"], "steps is 0; it must be at least 1"),
        (["model.num_heads=0"], "num_heads is 0; it must be at least 1"),
        (["model.patch_size=0"], "patch_size is 0; it must be at least 1"),
        (["model.num_heads=5"], "width 96 is not a multiple of num_heads 5"),
        (["model.patch_size=48"], "image_size 64 is not a multiple of patch_size 48"),
        (["model.num_fusion_layers=4"], "num_fusion_layers is 4; it must be 1 to num_layers = 3"),
        (["tasks.itm.block=0"], "block is 0; it must be at least 1"),
        (["data.pad_multiple=0"], "pad_multiple is 0; it must be at least 1"),
        (["keep_checkpoints=1"], "keep_checkpoints must be at least 2"),
        (["name=../other"], "it must name a folder inside"),
        (["name=.."], "it must name a folder inside"),
        (["name=/other"], "it must name a folder inside"),
        (["name=''"], "it must name a folder inside"),
        (["data.dev=[]"], "evaluate_every is set but data.dev names no shards"),
        (["tasks={}"], "tasks is empty; name at least one of mlm, itm, itc, vqa"),
        (["model.fusion=shallow"], "distill.targets=towers"),
        (["teachers=[]"], "need a teacher; set teachers, or distill.targets=none distill.soft=0"),
        (["distill.targets=none", "distill.soft=0"], "a teacher is given but nothing is learned from it"),
        (["distill.attention=0", "distill.soft=0"], "a teacher is given but nothing is learned from it"),
        ([*NO_TEACHER, "distill.hard=0"], "tasks.mlm would learn nothing"),
        (["model.kind=fusion-encoder"], "tasks.itc needs a vector for each image and text"),
        (["model.kind=fusion-encoder", "tasks.itc=false"], "distill.targets must be none for a fusion-encoder"),
    ],
)
def test_a_wrong_recipe_gets_its_key_and_what_would_be_right(overrides, message):
    with pytest.raises(UserError) as error:
        load(STUDENT, overrides)
    assert message in str(error.value)


def test_multipliers_may_be_written_dotted_or_nested_and_the_last_one_wins(tmp_path):
    recipe = tmp_path / "small.yaml"
    recipe.write_text(SMALL + "tasks: {itm: }\noptimizer: {multipliers: {heads: 10, text_tower.blocks.0: 0.5}}\n")
    config = load(recipe, ["optimizer.multipliers.text_tower.blocks.0=2", "optimizer.multipliers.fusion=5.0"])
    assert config.optimizer.multipliers == {"heads": 10.0, "text_tower.blocks.0": 2.0, "fusion": 5.0}
    (tmp_path / "again.yaml").write_text(dump(config))
    assert load(tmp_path / "again.yaml") == config
    with pytest.raises(UserError, match=r"optimizer\.multipliers\.heads is 'x'"):
        load(recipe, ["optimizer.multipliers.heads=x"])


def test_a_missing_key_is_named(tmp_path):
    for key in ("name", "steps", "global_batch", "tasks"):
        tree = {name: value for name, value in (yaml.safe_load(SMALL) | {"tasks": {"itm": {}}}).items() if name != key}
        recipe = tmp_path / f"{key}.yaml"
        recipe.write_text(yaml.safe_dump(tree))
        with pytest.raises(UserError, match=rf"^{recipe}:\n  {key} is missing$"):
            load(recipe)


def test_all_wrong_keys_are_told_at_once():
    with pytest.raises(UserError) as error:
        load(STUDENT, ["steps=x", "model.fuson=y", "tasks.mlm.weight=z"])
    assert all(key in str(error.value) for key in ("steps", "model.fuson", "tasks.mlm.weight"))


@pytest.mark.parametrize("text", ["[1, 2]", "", "just words"])
def test_a_file_that_is_no_mapping_is_no_recipe(tmp_path, text):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(UserError, match="it must be a mapping of keys"):
        load(tmp_path / "x.yaml")


def test_a_file_that_is_not_yaml_is_told(tmp_path):
    (tmp_path / "x.yaml").write_text("a: [1\nb: 2")
    with pytest.raises(UserError, match=r"x\.yaml is not YAML"):
        load(tmp_path / "x.yaml")


def test_an_unknown_recipe_gets_the_nearest_and_all_shipped_names():
    with pytest.raises(UserError) as error:
        load("demo-student-pretran")
    assert "did you mean 'demo-student-pretrain'?" in str(error.value)
    assert all(name in str(error.value) for name in SHIPPED)


def test_a_bare_task_has_its_defaults_and_false_leaves_it_out(tmp_path):
    recipe = tmp_path / "small.yaml"
    recipe.write_text(SMALL + "tasks:\n  itc:\n  mlm: false\n  itm: {block: 2}\n")
    assert load(recipe).active_tasks() == {"itm": TASKS["itm"](block=2), "itc": TASKS["itc"]()}
    assert list(load(recipe, ["tasks.itc=false", "tasks.mlm="]).active_tasks()) == ["mlm", "itm"]
    with pytest.raises(UserError, match="tasks is empty"):
        load(recipe, ["tasks.itc=false", "tasks.itm=false"])


def test_the_last_override_wins_and_the_others_stay():
    plain, changed = load(STUDENT), load(STUDENT, ["steps=7", "model.width=48", "steps=9"])
    assert changed == replace(plain, steps=9, model=replace(plain.model, width=48))


@pytest.mark.parametrize(("fusion", "targets"), list(product(FUSIONS, TARGETS)))
def test_a_bridge_is_matched_only_where_there_is_one(fusion, targets):
    legal = targets in ("none", "towers") or fusion in ("bridge-pre", "bridge-post")
    overrides = [f"model.fusion={fusion}", f"distill.targets={targets}"]
    if legal:
        assert load(STUDENT, overrides).distill.targets == targets
        return
    with pytest.raises(UserError) as error:
        load(STUDENT, overrides)
    assert f"distill.targets is {targets!r}, but model.fusion {fusion!r} has no attention of its own" in str(
        error.value
    )


@pytest.mark.parametrize("targets", TARGETS)
def test_a_fusion_encoder_has_no_targets(targets):
    overrides = ["teachers.0.source=x", "distill.soft=1", f"distill.targets={targets}"]
    if targets == "none":
        assert load(TEACHER, overrides).teachers
        return
    with pytest.raises(UserError, match=r"distill\.targets must be none for a fusion-encoder"):
        load(TEACHER, overrides)


def test_a_global_batch_must_divide_by_ranks_and_accumulation():
    config = load(STUDENT, ["global_batch=32", "accumulation=2"])
    assert config.micro_batch(2) == 8
    with pytest.raises(UserError, match="global_batch 32 does not divide by accumulation 2 x 3 ranks = 6"):
        config.micro_batch(3)


@pytest.mark.parametrize(("slots", "legal"), [(1, False), (2, True), (3, True)])
def test_a_task_of_two_images_needs_a_model_with_two_slots(slots, legal):
    overrides = ["tasks={nlvr2: {}}", f"model.num_slots={slots}"]
    if legal:
        assert load(TEACHER, overrides).active_tasks() == {"nlvr2": TASKS["nlvr2"]()}
        return
    with pytest.raises(UserError, match=r"tasks\.nlvr2 looks at two images of a sample; set model\.num_slots=2"):
        load(TEACHER, overrides)


def test_a_micro_batch_must_be_a_multiple_of_every_block():
    tasks = "tasks={itm: {block: 4}, retrieval: {block: 8, negatives: 3}}"
    assert load(TEACHER, [tasks, "global_batch=32"]).micro_batch(4) == 8
    with pytest.raises(UserError, match=r"a micro-batch is 12 samples .* no multiple of tasks\.retrieval\.block 8"):
        load(TEACHER, [tasks, "global_batch=48"]).micro_batch(4)


def test_a_micro_batch_must_be_a_multiple_of_the_matching_block():
    with pytest.raises(UserError, match=r"a micro-batch is 4 samples .* no multiple of tasks\.itm\.block 8"):
        load(STUDENT, ["global_batch=32"]).micro_batch(8)
    assert load(STUDENT, ["global_batch=32", "tasks.itm=false"]).micro_batch(8) == 4


SIZES = st.integers(1, 64)


@settings(max_examples=60, deadline=None)
@given(SIZES, st.integers(1, 4), st.integers(1, 8), SIZES)
def test_a_micro_batch_is_an_equal_share_or_refused(global_batch, accumulation, ranks, block):
    config = replace(load(STUDENT), global_batch=global_batch, accumulation=accumulation)
    config = replace(config, tasks=replace(config.tasks, itm=TASKS["itm"](block=block)))
    if global_batch % (accumulation * ranks * block) == 0:
        assert config.micro_batch(ranks) * ranks * accumulation == global_batch
    else:
        with pytest.raises(UserError):
            config.micro_batch(ranks)


def test_every_key_of_a_shipped_dump_is_a_field():
    assert set(yaml.safe_load(dump(load(STUDENT)))) == {field.name for field in fields(Config)}


@pytest.mark.parametrize(
    "override",
    ["model.dropout=1.5", "model.max_text_length=1", "data.num_workers=-1", "tasks.itc.dimensions=0",
     "optimizer.learning_rate=-1", "optimizer.learning_rate=.nan", "data.shuffle_buffer=-3", "evaluate_every=-5",
     "optimizer.multipliers.heads=0",
     "distill.soft=-1", "distill.temperature=0", "optimizer.warmup=3", "tasks.mlm.probability=2", "steps=0"],
)  # fmt: skip
def test_a_number_out_of_its_range_is_refused_with_the_range(override):
    with pytest.raises(UserError, match=rf"{override.split('=')[0]} is .*; it must be"):
        load("demo-student-pretrain", [override])


def test_a_convolution_stem_needs_a_patch_that_halvings_reach():
    with pytest.raises(UserError, match="convolution stem halves"):
        load("demo-student-pretrain", ["model.image_size=48", "model.patch_size=12"])


def test_a_fusion_encoder_may_have_fewer_layers_than_a_bridge_would_need():
    assert load("demo-teacher-pretrain", ["model.num_layers=2"]).model.num_layers == 2


def test_attention_can_be_learned_alone_and_nothing_cannot():
    alone = ["tasks.mlm=false", "tasks.itm=false", "tasks.itc.weight=0", "distill.hard=0", "teachers.0.tasks=[]"]
    assert load("demo-student-pretrain", alone).tasks.itc.weight == 0
    with pytest.raises(UserError, match="nothing would be learned"):
        load("demo-student-pretrain", [*alone, "distill.targets=none"])


def test_a_recipe_says_only_what_it_changes_of_the_one_it_is_based_on(tmp_path):
    (tmp_path / "base.yaml").write_text(SMALL + "tasks: {itm: {block: 2}, itc: {dimensions: 8}}\nmodel: {width: 48}\n")
    (tmp_path / "middle.yaml").write_text("based_on: base\nname: middle\nmodel: {num_layers: 4}\n")
    (tmp_path / "top.yaml").write_text("based_on: middle\nname: top\ntasks: {itc: false}\n")
    config = load(tmp_path / "top.yaml", ["model.num_heads=6"])
    assert (config.name, config.steps, config.tasks.itm.block, config.tasks.itc) == ("top", 3, 2, None)
    assert (config.model.width, config.model.num_layers, config.model.num_heads) == (48, 4, 6)
    assert "based_on" not in dump(config)


def test_a_recipe_can_be_based_on_a_shipped_one(tmp_path):
    (tmp_path / "mine.yaml").write_text(f"based_on: {STUDENT}\nname: mine\n")
    assert replace(load(tmp_path / "mine.yaml"), name="student-pretrain") == load(STUDENT)


def test_a_recipe_based_on_itself_or_on_nothing_is_refused(tmp_path):
    (tmp_path / "a.yaml").write_text("based_on: b\n")
    (tmp_path / "b.yaml").write_text("based_on: a\n")
    with pytest.raises(UserError, match="a recipe cannot be based on itself"):
        load(tmp_path / "a.yaml")
    (tmp_path / "c.yaml").write_text("based_on: demo-student-pretrian\n")
    with pytest.raises(UserError, match="did you mean 'demo-student-pretrain'"):
        load(tmp_path / "c.yaml")


def test_a_recipe_may_have_the_name_of_the_shipped_one_it_is_based_on(tmp_path):
    (tmp_path / f"{STUDENT}.yaml").write_text(f"based_on: {STUDENT}\nsteps: 5\n")
    assert load(tmp_path / f"{STUDENT}.yaml").steps == 5
    (tmp_path / "x.yaml").write_text("based_on: [a]\n")
    with pytest.raises(UserError, match="it must be one recipe's name or path"):
        load(tmp_path / "x.yaml")
