"""Every system of tables 3 and 4 trains, fine-tunes and is scored by its shipped recipes, at a tiny size."""

import io
import json

import pytest
from PIL import Image

from dist_fusion import train
from dist_fusion.config import RECIPES, load
from dist_fusion.data.shards import write_shards

SYSTEMS = {  # prefix of its recipes -> fusion, sites whose attention it learns, whether a teacher's labels replace ours
    "vilt-": (None, set(), False),
    "": ("bridge-pre", {"tower.t2i", "tower.i2t", "bridge.t2i", "bridge.i2t"}, True),
    "clip-": ("dot", set(), False),
    "bridgetower-": ("bridge-post", set(), False),
    "dide-": ("shallow", {"tower.t2i", "tower.i2t"}, True),
    "virt-": ("virt", {"tower.t2i", "tower.i2t"}, False),
    "pbts-": ("bridge-pre", set(), False),
    "shallow-": ("shallow", set(), False),
}
ABLATIONS = ("pbts-", "shallow-")  # of table 4, on VQAv2 alone
FINE = {"vqa": "vqa", "nlvr2": "nlvr2", "snli-ve": "snli_ve"}
STAGES = ("pretrain", *FINE)
CELLS = [(s, stage) for s in SYSTEMS for stage in STAGES if s not in ABLATIONS or stage in ("pretrain", "vqa")]
"""In an order in which everything a recipe starts from is there: ViLT first, and of a system its pre-training."""
SIZES = [
    "steps=2", "global_batch=4", "deepspeed=zero1", "evaluate_every=2", "save_every=2", "log_every=1",
    "model.width=16", "model.num_heads=2", "model.num_layers=3", "model.image_size=16", "model.patch_size=8",
    "model.max_text_length=16", "data.num_workers=0",
]  # fmt: skip


@pytest.fixture(scope="module")
def data(shards, tmp_path_factory):
    """The shards of each stage."""
    folder = tmp_path_factory.mktemp("statements")

    def picture(i):
        buffer = io.BytesIO()
        Image.new("RGB", (16, 16), (20 * i, 255 - 20 * i, 30)).save(buffer, "PNG")
        return buffer.getvalue()

    for name, images, labels in (
        ("nlvr2", ("left.png", "right.png"), ("True", "False")),
        ("snli-ve", ("png",), ("entailment", "neutral", "contradiction")),
    ):
        write_shards(
            folder / name,
            [
                (f"{i}", {
                    **{image: picture(i + n) for n, image in enumerate(images)},
                    "json": json.dumps({"statements": [
                        {"id": str(i), "text": f"number {i % 3} is red", "label": labels[i % len(labels)]}
                    ]}).encode(),
                })
                for i in range(9)
            ],
            9,
        )  # fmt: skip
    return {"pretrain": shards, "vqa": shards, "nlvr2": folder / "nlvr2", "snli-ve": folder / "snli-ve"}


@pytest.fixture(scope="module")
def trained(one_rank, data, shards, tmp_path_factory):
    """Each recipe's exit and what it logged, trained in turn."""
    runs, told = tmp_path_factory.mktemp("systems"), {}
    for system, stage in CELLS:
        name = f"{system}{stage}"
        recipe = load(name)
        overrides = [*SIZES, f"runs={runs}", f"data.shards=[{data[stage]}]", f"data.dev=[{data[stage]}]"]
        overrides.append(f"data.vocabulary={shards / 'vocab.txt'}")
        overrides += ["tasks.itm.block=2"] if recipe.tasks.itm else []
        overrides += [f"tasks.vqa.answers={shards / 'answers.json'}"] if recipe.tasks.vqa else []
        if recipe.initialise_from:
            origin = "vilt-pretrain" if str(recipe.initialise_from).endswith(".ckpt") else recipe.initialise_from
            overrides.append(f"initialise_from={runs / str(origin).removeprefix('runs/')}")
        if recipe.teachers:
            source = recipe.teachers[0].source
            teacher = "vilt-pretrain" if source.endswith(".ckpt") else source.removeprefix("runs/")
            overrides.append(f"teachers.0.source={runs / teacher}")
        (reply,) = one_rank.run("run", recipe=name, overrides=overrides)
        logged: dict[str, float] = {}
        if reply == {"code": train.DONE}:
            for line in (runs / name / "metrics.jsonl").read_text().splitlines():
                logged |= json.loads(line)
        told[name] = (reply, logged)
    return told


@pytest.mark.parametrize(("prefix", "stage"), CELLS)
def test_the_recipe_of_every_system_takes_steps_and_is_scored(trained, prefix, stage):
    name = f"{prefix}{stage}"
    reply, logged = trained[name]
    assert reply == {"code": train.DONE}
    fusion, sites, taught = SYSTEMS[prefix]
    assert load(name).model.kind == ("dual-encoder" if fusion else "fusion-encoder")
    assert fusion in (None, load(name).model.fusion)
    terms = {key.removeprefix("loss/") for key in logged if key.startswith("loss/")} - {"total"}
    assert {term.removeprefix("attention/") for term in terms if term.startswith("attention/")} == sites
    if stage == "pretrain":
        asked = {"clip-": {"itc"}, "vilt-": {"mlm", "itm"}, "bridgetower-": {"mlm", "itm"}}.get(
            prefix, {"mlm", "itm", "itc"}
        )
        assert {term for term in terms if term.startswith("hard/")} == {f"hard/{task}" for task in asked}
        assert {term for term in terms if term.startswith("soft/")} == ({"soft/mlm", "soft/itm"} if taught else set())
    else:
        kind = "soft" if taught else "hard"
        assert terms - {f"attention/{site}" for site in sites} == {f"{kind}/{FINE[stage]}"}
        assert any(key.startswith(f"dev/{FINE[stage]}/") for key in logged)


def test_every_system_recipe_is_tried_here():
    shipped = {path.stem for path in RECIPES.glob("*.yaml") if not path.stem.startswith(("demo-", "easy-"))}
    assert shipped == {f"{system}{stage}" for system, stage in CELLS}
