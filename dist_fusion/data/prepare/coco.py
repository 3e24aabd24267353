"""COCO captions (arXiv:1504.00325), in Karpathy's splits or in COCO's own of 2017 or 2014."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

from dist_fusion.data.prepare.plan import UNKNOWN_IMAGE, Options, Picture, Plan, Planned, Skip, captioned
from dist_fusion.data.prepare.sources import find, in_form, read_json
from dist_fusion.schema import UserError, nearest

KARPATHY = ("dataset_coco.json", "karpathy/dataset_coco.json", "annotations/dataset_coco.json")
KARPATHY_SPLITS = {"train": "train", "restval": "train", "val": "dev", "test": "test"}
"""The 113,287 images of train and restval are what COCO captions are usually trained on (arXiv:1412.2306)."""
OWN_SPLITS = {"train": "train", "val": "dev"}
FORM = "COCO's captions_*.json"
KARPATHY_FORM = "Karpathy's dataset_coco.json"


def plan(source: Path, options: Options) -> Plan:
    """One sample an image with its captions, usually five."""
    if options.splits and options.splits not in SPLITTINGS:
        raise UserError(
            f"--splits is {options.splits!r}{nearest(options.splits, SPLITTINGS)}; it can be {', '.join(SPLITTINGS)}"
        )
    names = {"karpathy": KARPATHY, **{year: _captions(year, "train") for year in ("2017", "2014")}}
    there = [splits for splits in SPLITTINGS if any((source / name).is_file() for name in names[splits])]
    splits = options.splits or (there[0] if there else "karpathy")
    return SPLITTINGS[splits](source, options)


def picture(image: int, year_folder: str = "train2014") -> Picture:
    """An image of COCO by its number: 2014's and 2017's are the same files under other names."""
    folders = [year_folder, *(name for name in ("train2014", "val2014", "test2015") if name != year_folder)]
    names = [f"{folder}/COCO_{folder}_{image:012d}.jpg" for folder in folders]
    names += [f"{folder}/{image:012d}.jpg" for folder in ("train2017", "val2017")]
    return Picture(tuple(place for name in names for place in (name, f"images/{name}")))


def read_karpathy_splits(path: Path) -> dict[int, str]:
    """Image number -> train, restval, val or test, of Karpathy's dataset_coco.json."""
    with in_form(path, KARPATHY_FORM):
        return {entry["cocoid"]: entry["split"] for entry in read_json(path, KARPATHY_FORM)["images"]}


def _karpathy(source: Path, options: Options) -> Plan:
    path = find(source, KARPATHY, "Karpathy's splits (caption_datasets.zip), or give --splits 2017 or 2014")

    def items() -> Iterator[Planned | Skip]:
        with in_form(path, KARPATHY_FORM):
            for entry in tree["images"]:
                split = KARPATHY_SPLITS[entry["split"]]
                image = entry["cocoid"]
                captions = [sentence["raw"] for sentence in entry["sentences"]]
                yield from captioned(split, (picture(image, entry["filepath"]),), f"coco/{image}", "coco", captions)

    tree = read_json(path, KARPATHY_FORM)
    return Plan(items, (path,), notes={"splits": "karpathy"})


def _own(year: str) -> Callable[[Path, Options], Plan]:
    def plan(source: Path, options: Options) -> Plan:
        wanted = {name: split for name, split in OWN_SPLITS.items() if options.wants(split)}
        what = f"COCO's annotations_trainval{year}.zip (captions), or Karpathy's dataset_coco.json"
        paths = {name: find(source, _captions(year, name), what) for name in wanted}
        trees = {name: read_json(path, FORM) for name, path in paths.items()}

        def items() -> Iterator[Planned | Skip]:
            for name, split in wanted.items():
                with in_form(paths[name], FORM):
                    images = {entry["id"] for entry in trees[name]["images"]}
                    captions = defaultdict(list)
                    for note in trees[name]["annotations"]:
                        if note["image_id"] in images:
                            captions[note["image_id"]].append(note["caption"])
                        else:
                            yield Skip(split, UNKNOWN_IMAGE, f"annotation {note['id']} of image {note['image_id']}")
                    for image in sorted(images):
                        where = picture(image, f"{name}2014")
                        yield from captioned(split, (where,), f"coco/{image}", "coco", captions[image])

        return Plan(items, tuple(paths.values()), notes={"splits": year})

    return plan


def _captions(year: str, name: str) -> tuple[str, ...]:
    return f"annotations/captions_{name}{year}.json", f"captions_{name}{year}.json"


SPLITTINGS: dict[str, Callable[[Path, Options], Plan]] = {
    "karpathy": _karpathy,
    "2017": _own("2017"),
    "2014": _own("2014"),
}
"""How COCO is split, the first one found being taken."""
