"""NLVR2 (arXiv:1811.00491): sentences about two images. One sample is a pair with all its sentences.

An identifier is `split-set-pair-sentence`. A sentence is one group over the pairs of its set: consistency is the
share of sentences that are judged rightly of every pair.
"""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from dist_fusion.data.prepare.plan import Options, Picture, Plan, Planned, Skip, record_of
from dist_fusion.data.prepare.sources import find, read_lines
from dist_fusion.schema import UserError

FILES = {"train": "train", "dev": "dev", "test": "test1"}
LABELS = ("True", "False")
FORM = "NLVR2's data/*.json"


def plan(source: Path, options: Options) -> Plan:
    """One sample a pair of images, named left and right."""
    paths = {
        split: find(
            source, (f"nlvr2/data/{name}.json", f"data/{name}.json", f"{name}.json"), "NLVR2's repository (and the "
            "images on request); --only names the splits to make"
        )
        for split, name in FILES.items() if options.wants(split)
    }  # fmt: skip

    def items() -> Iterator[Planned | Skip]:
        for split, path in paths.items():
            statements, folders = defaultdict(list), {}
            for number, row in read_lines(path, FORM):
                where = f"{path}, line {number}"
                parts = str(row.get("identifier", "")).split("-")
                if len(parts) != 4 or "sentence" not in row:
                    raise UserError(
                        f"{where} is not in the form of {FORM}: it must have an identifier such as dev-5-0-1"
                    )
                if row.get("label") not in LABELS:
                    raise UserError(f"{where} has the label {row.get('label')!r}; it must be the word True or False")
                name, set_number, pair, sentence = parts
                pair_name = f"{name}-{set_number}-{pair}"
                folders[pair_name] = row.get("directory", "")
                statements[pair_name].append(
                    {
                        "id": row["identifier"],
                        "text": " ".join(row["sentence"].split()),
                        "label": row["label"],
                        "group": f"nlvr2/{name}-{set_number}-{sentence}",
                    }
                )
            for pair_name, told in statements.items():
                images = [_picture(FILES[split], f"{pair_name}-img{side}.png", folders[pair_name]) for side in (0, 1)]
                yield Planned(split, tuple(images), record_of(f"nlvr2/{pair_name}", "nlvr2", statements=told))

    return Plan(items, tuple(paths.values()))


def _picture(folder: str, name: str, number: object) -> Picture:
    """An image where the archives put it: train's lie in numbered folders."""
    places = [f"{folder}/{number}/{name}", f"{folder}/{name}"] if number != "" else [f"{folder}/{name}"]
    return Picture(tuple(place for path in places for place in (f"images/{path}", path)))
