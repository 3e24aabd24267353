"""Flickr30k for retrieval, in Karpathy's splits (29,000, 1,014 and 1,000 images with five captions each)."""

from collections.abc import Iterator
from pathlib import Path

from dist_fusion.data.prepare.plan import Options, Picture, Plan, Planned, Skip, captioned
from dist_fusion.data.prepare.sources import find, in_form, read_json

FORM = "Karpathy's dataset_flickr30k.json"
SPLITS = {"train": "train", "val": "dev", "test": "test"}
FOLDERS = ("flickr30k-images", "flickr30k_images", "images", ".")


def plan(source: Path, options: Options) -> Plan:
    """One sample an image with its captions."""
    names = ("dataset_flickr30k.json", "karpathy/dataset_flickr30k.json")
    path = find(source, names, "Karpathy's splits (caption_datasets.zip)")
    tree = read_json(path, FORM)

    def items() -> Iterator[Planned | Skip]:
        with in_form(path, FORM):
            for entry in tree["images"]:
                captions = [sentence["raw"] for sentence in entry["sentences"]]
                name = f"flickr30k/{entry['filename'].removesuffix('.jpg')}"
                where = picture(entry["filename"])
                yield from captioned(SPLITS[entry["split"]], (where,), name, "flickr30k", captions)

    return Plan(items, (path,))


def picture(name: str) -> Picture:
    """An image of Flickr30k by the name of its file."""
    return Picture(tuple(f"{folder}/{name}" for folder in FOLDERS))
