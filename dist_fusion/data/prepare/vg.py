"""Visual Genome (arXiv:1602.07332): every phrase that describes a region is a text of its image.

About half of its images are COCO's too. Those in COCO's val or test are left out, so that what is scored on COCO
later was not seen: image_data.json tells their COCO numbers, Karpathy's dataset_coco.json (or captions_val*.json) the
splits. With `--held-out none` nothing is left out, as in most published mixtures (108 K images, 5.41 M phrases).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dist_fusion.data.prepare import coco
from dist_fusion.data.prepare import plan as planning
from dist_fusion.data.prepare.plan import Options, Picture, Plan, Planned, Skip, captioned
from dist_fusion.data.prepare.sources import find, in_form, read_json
from dist_fusion.schema import UserError

REGIONS = ("region_descriptions.json", "annotations/region_descriptions.json")
IMAGES = ("image_data.json", "annotations/image_data.json")
FORM = "Visual Genome's region_descriptions.json"
DATA_FORM = "Visual Genome's image_data.json"
FOLDERS = ("VG_100K", "VG_100K_2")


def plan(source: Path, options: Options) -> Plan:
    """One sample an image with its phrases, some fifty, all of them in train."""
    regions = find(source, REGIONS, "Visual Genome's region descriptions (region_descriptions.json.zip)")
    data = find(source, IMAGES, "Visual Genome's image meta-data (image_data.json.zip)")
    splits = _splits_file(source, options)
    with in_form(data, DATA_FORM):
        coco_ids = {_number(entry): entry["coco_id"] for entry in read_json(data, DATA_FORM)}
    held_out = _held_out(splits) if splits else frozenset()
    tree = read_json(regions, FORM, slim=_slim)

    def items() -> Iterator[Planned | Skip]:
        seen = set()
        with in_form(regions, FORM):
            for image, phrases in tree:
                name = f"vg/{image}"
                if image not in coco_ids or image in seen:
                    yield Skip("train", planning.DUPLICATE if image in seen else planning.UNKNOWN_IMAGE, name)
                    continue
                seen.add(image)
                if coco_ids[image] in held_out:
                    yield Skip("train", planning.HELD_OUT, f"{name} is coco/{coco_ids[image]}")
                    continue
                places = [f"{folder}/{image}.jpg" for folder in FOLDERS]
                where = Picture(tuple(place for name in places for place in (name, f"images/{name}")))
                yield from captioned("train", (where,), name, "vg", phrases)

    return Plan(items, (regions, data, *([splits] if splits else [])), notes={"held out": len(held_out)})


def _slim(entry: dict[str, Any]) -> Any:
    """Of 5.4 million regions the phrase alone: the whole tree takes gigabytes."""
    if "phrase" in entry:
        return entry["phrase"]
    return (entry["id"], entry["regions"]) if "regions" in entry else entry


def _number(entry: dict[str, Any]) -> int:
    return entry["image_id"] if "image_id" in entry else entry["id"]  # from version 1.2 on, and before


def _splits_file(source: Path, options: Options) -> Path | None:
    if options.held_out == "none":
        return None
    if options.held_out:
        if not Path(options.held_out).is_file():
            raise UserError(f"--held-out is {options.held_out!r}: no such file; it can be dataset_coco.json or none")
        return Path(options.held_out)
    return find(
        source, coco.KARPATHY, "Karpathy's splits (caption_datasets.zip); --held-out FILE names one elsewhere, and "
        "--held-out none keeps images of COCO's val and test"
    )  # fmt: skip


def _held_out(path: Path) -> frozenset[int]:
    if path.name.startswith("captions_"):
        with in_form(path, coco.FORM):
            return frozenset(entry["id"] for entry in read_json(path, coco.FORM)["images"])
    return frozenset(image for image, split in coco.read_karpathy_splits(path).items() if split in ("val", "test"))
