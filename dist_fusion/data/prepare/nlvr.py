"""NLVR (ACL 2017, P17-2034): sentences by people about a drawing of three boxes, cut at its two grey bars.

Two images (boxes 1 and 2, and box 3), as NLVR2 has, or three. The label is of the set of boxes, so that no order of
them changes it: dev and test take the first order, train all of the six that are there.
"""

import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from dist_fusion.data.prepare.plan import Options, Picture, Plan, Planned, Skip, record_of
from dist_fusion.data.prepare.sources import find, listed_files, read_lines
from dist_fusion.schema import UserError

CUTS = {2: ((0, 0, 250, 100), (300, 0, 400, 100)), 3: ((0, 0, 100, 100), (150, 0, 250, 100), (300, 0, 400, 100))}
"""By the number of images: what of the 400 x 100 pixels each shows."""
SPLITS = ("train", "dev", "test")
LABELS = ("true", "false")
FORM = "NLVR's *.json"
NAME = re.compile(r"(train|dev|test)-(\d+-\d+)-([0-5])\.png")


def plan(source: Path, options: Options) -> Plan:
    """One sample a drawing with its sentence; a group is a sentence with all its drawings."""
    if options.images not in CUTS:
        raise UserError(f"--images is {options.images}; three boxes can become 2 or 3 images")
    paths = {
        split: find(
            source, (f"{split}/{split}.json", f"nlvr/{split}/{split}.json"), "NLVR's repository (folder nlvr); --only "
            "names the splits to make"
        )
        for split in SPLITS if options.wants(split)
    }  # fmt: skip

    def items() -> Iterator[Planned | Skip]:
        for split, path in paths.items():
            drawings = _drawings(source, path.parent)
            for number, row in read_lines(path, FORM):
                where = f"{path}, line {number}"
                if not {"identifier", "sentence"} <= row.keys():
                    raise UserError(f"{where} is not in the form of {FORM}: it must have an identifier and a sentence")
                if row.get("label") not in LABELS:
                    raise UserError(f"{where} has the label {row.get('label')!r}; it must be the word true or false")
                name, text = row["identifier"], " ".join(row["sentence"].split())
                orders = sorted(drawings[split, name])
                for order in (orders if split == "train" else orders[:1]) or ["0"]:
                    place = drawings[split, name].get(order, f"{path.parent.name}/images/{split}-{name}-{order}.png")
                    image_id = f"nlvr/{split}-{name}-{order}"
                    group = f"nlvr/{split}-{name.split('-')[0]}/{text}"
                    told = {"id": image_id, "text": text, "label": row["label"], "group": group}
                    pictures = tuple(Picture((place,), box) for box in CUTS[options.images])
                    yield Planned(split, pictures, record_of(image_id, "nlvr", statements=[told]))

    return Plan(items, tuple(paths.values()))


def _drawings(source: Path, folder: Path) -> dict[tuple[str, str], dict[str, str]]:
    """(split, identifier) -> the files of its orders."""
    found: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    for path in listed_files(folder):
        match = NAME.fullmatch(path.name)
        if match:
            found[match[1], match[2]][match[3]] = str(path.relative_to(source))
    return found
