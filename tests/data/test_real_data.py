"""Real pictures with real words, from their zips through shards, a mixture of sources and a training step.

The zips lie beside a developer's checkout; elsewhere this is skipped.
"""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from dist_fusion.cli import main

DATA = Path(__file__).parents[3] / "shared" / "data"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"the real files are not at {DATA}")


def write_captions(folder, rows):
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Shards of COCO's photographs, emoji with their names, ShapeWorld's worlds, and NLVR's pairs."""
    root = tmp_path_factory.mktemp("real")
    for name in ("coco_train2017_cc", "emoji_noto64", "shapeworld_agreement", "nlvr1_train_dev"):
        zipfile.ZipFile(DATA / f"{name}.zip").extractall(root / name)
    emoji = root / "emoji_noto64"
    found = {path.name: str(path.relative_to(emoji)) for path in (emoji / "google").glob("*.png")}
    listed = json.loads((emoji / "emoji.json").read_text())
    write_captions(
        emoji,
        [
            {"image": found[one["image"]], "caption": one["name"].lower()}
            for one in (listed if isinstance(listed, list) else listed.values())
            if one["image"] in found
        ],
    )
    worlds = root / "shapeworld_agreement"
    rows = []
    for captions in sorted(worlds.rglob("caption.txt")):
        agree = (captions.parent / "agreement.txt").read_text().split()
        for number, (block, says) in enumerate(zip(captions.read_text().strip().split("\n\n"), agree, strict=True)):
            image = str((captions.parent / f"world-{number}.png").relative_to(worlds))
            true = [text for text, yes in zip(block.splitlines(), says.split(";"), strict=True) if float(yes) == 1]
            rows += [{"image": image, "caption": text} for text in true]
    write_captions(worlds, rows)
    coco = root / "coco_train2017_cc"
    (coco / "captions.json").rename(coco / "captions_train2017.json")
    (coco / "images").rename(coco / "train2017")
    for name, kind, options in (
        ("emoji_noto64", "folder", []), ("shapeworld_agreement", "folder", []),
        ("nlvr1_train_dev", "nlvr", ["--only", "dev"]), ("coco_train2017_cc", "coco", ["--only", "train"]),
    ):  # fmt: skip
        assert main(["prepare", kind, str(root / name), str(root / "shards" / name), *options]) == 0
    return root / "shards"


def steps_of(tmp_path, recipe):
    (tmp_path / "recipe.yaml").write_text(recipe)
    done = subprocess.run(
        [sys.executable, "-m", "dist_fusion.train", str(tmp_path / "recipe.yaml"), f"runs={tmp_path / 'runs'}"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "runs" / "real" / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss/total" in row]  # a step's; scores have rows of their own


MODEL = "{width: 32, num_heads: 2, num_layers: 2, num_fusion_layers: 2, image_size: 64, patch_size: 16, num_slots: 2}"


def test_a_mixture_of_real_captions_trains(prepared, tmp_path):
    rows = steps_of(
        tmp_path,
        f"""
name: real
steps: 3
global_batch: 16
log_every: 1
evaluate_every: 3
tasks: {{mlm: , itm: {{block: 4}}, itc: {{dimensions: 8}}}}
model: {MODEL}
data:
  dev: [{prepared}/coco_train2017_cc/train]
  augment: randaugment
  sources:
    photographs: {{shards: [{prepared}/coco_train2017_cc/train], weight: 5, texts_per_image: 2}}
    emoji: {{shards: [{prepared}/emoji_noto64/train]}}
    worlds: {{shards: [{prepared}/shapeworld_agreement/train], weight: 0.5}}
""",
    )
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows[-1]["data/skipped"] == 0
    assert sum(rows[-1][f"data/seen/{name}"] for name in ("photographs", "emoji", "worlds")) == 48


def test_real_sentences_about_two_pictures_train(prepared, tmp_path):
    rows = steps_of(
        tmp_path,
        f"""
name: real
steps: 2
global_batch: 8
log_every: 1
tasks: {{nlvr2: }}
model: {MODEL}
data: {{shards: [{prepared}/nlvr1_train_dev/dev]}}
""",
    )
    assert len(rows) == 2 and rows[-1]["data/skipped"] == 0
