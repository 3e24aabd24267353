"""CC3M (ACL 2018, P18-1238) and SBU (NeurIPS 2011): captions of addresses, whose images somebody downloaded.

img2dataset's shards need no preparing and are refused with that word. Images are found by their names: the number of
their row, or a digest of their address. A caption beside another row's image would be a silent disaster, so a folder
whose names fit no rule, or a numbering that starts at 1, is refused.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from hashlib import md5, sha1, sha256
from itertools import islice, zip_longest
from pathlib import Path
from typing import NamedTuple

from dist_fusion.data.images import EXTENSIONS
from dist_fusion.data.prepare.plan import DUPLICATE, MISSING, Options, Picture, Plan, Planned, Skip, captioned
from dist_fusion.data.prepare.sources import find, in_form, listed_files
from dist_fusion.schema import UserError, nearest

Row = tuple[str, str]
"""Caption and address."""
NAMED: dict[str, Callable[[int, str], str]] = {
    "row": lambda row, address: str(row),
    "row-from-1": lambda row, address: str(row + 1),
    "md5": lambda row, address: md5(address.encode()).hexdigest(),
    "sha1": lambda row, address: sha1(address.encode()).hexdigest(),
    "sha256": lambda row, address: sha256(address.encode()).hexdigest(),
}
"""How an image's file is named, without its extension and leading zeros. `row` counts from 0."""
PROBED = 10_000
"""Rows that are looked at to find out how images are named."""


class Part(NamedTuple):
    """One split: its rows and the folders that its images may lie in."""

    split: str
    inputs: tuple[Path, ...]
    rows: Callable[[], Iterator[Row]]
    images: Path


def plan_cc3m(source: Path, options: Options) -> Plan:
    """Google's Train_GCC-training.tsv as train and Validation_GCC-1.1.0-Validation.tsv as dev."""
    _refuse_shards(source)
    parts = []
    for split, names, folders in (
        ("train", ("Train_GCC-training.tsv", "train.tsv", "cc3m.tsv"), ("images_train", "train", "training", "images")),
        ("dev", ("Validation_GCC-1.1.0-Validation.tsv", "val.tsv"), ("images_val", "val", "validation")),
    ):
        if options.wants(split):
            what = f"Google's Conceptual Captions ({names[0]}); --only names the splits to make"
            path = find(source, names, what)
            images = find(source, folders, "your download of its images, named by row or by digest of the address")
            parts.append(Part(split, (path,), _reader(path), images))
    return _plan("cc3m", source, parts, options)


def plan_sbu(source: Path, options: Options) -> Plan:
    """SBU's JSON, its two text files, or a TSV of captions and addresses; all of it is train."""
    _refuse_shards(source)
    names = ("sbu-captions-all.json", "SBU_captioned_photo_dataset_urls.txt", "sbu.tsv")
    path = find(source, names, "the SBU Captioned Photo Dataset")
    captions = source / "SBU_captioned_photo_dataset_captions.txt"
    folders = ("images_train", "train", "images", "dataset")
    images = find(source, folders, "your download of its images, named by row or by digest of the address")
    if path.suffix == ".txt" and not captions.is_file():
        raise UserError(f"{source} has {path.name} and no {captions.name}; SBU ships both")
    inputs = (path, captions) if path.suffix == ".txt" else (path,)
    readers = {".json": _sbu_json, ".txt": lambda path: lambda: _lines(captions, path), ".tsv": _reader}
    return _plan("sbu", source, [Part("train", inputs, readers[path.suffix](path), images)], options)


def _plan(name: str, source: Path, parts: list[Part], options: Options) -> Plan:
    if options.named and options.named not in NAMED:
        raise UserError(f"--named is {options.named!r}{nearest(options.named, NAMED)}; it can be {', '.join(NAMED)}")
    files = {part.split: _files(source, part.images) for part in parts}
    named = {part.split: options.named or _find_naming(part, files[part.split]) for part in parts}

    def items() -> Iterator[Planned | Skip]:
        for part in parts:
            seen = set()
            for number, (caption, address) in enumerate(part.rows()):
                place = files[part.split].get(NAMED[named[part.split]](number, address))
                digest = md5(f"{caption}\t{address}".encode()).digest()
                if place is None or digest in seen:
                    yield Skip(part.split, MISSING if place is None else DUPLICATE, f"row {number}: {address}")
                    continue
                seen.add(digest)
                yield from captioned(part.split, (Picture((place,)),), address, name, [caption])

    return Plan(items, tuple(path for part in parts for path in part.inputs), notes={"named": named})


def _find_naming(part: Part, files: Mapping[str, str]) -> str:
    rows = list(islice(part.rows(), PROBED))
    fits = {name: sum(rule(n, row[1]) in files for n, row in enumerate(rows)) for name, rule in NAMED.items()}
    del fits["row-from-1"]  # looks like `row`, one caption off
    best = max(fits, key=fits.__getitem__)
    if not fits[best]:
        raise UserError(
            f"no file of {part.images} is named after one of the first {len(rows)} rows of {part.inputs[0].name}; "
            "names can be the row's number from 0, or md5, sha1 or sha256 of the address in hexadecimal"
        )
    beyond = files.get(str(sum(1 for _ in part.rows())))
    if best == "row" and beyond:
        raise UserError(
            f"{part.images} has {beyond}, whose number is one more than the last row's counted from 0; say --named "
            "row-from-1 if images are numbered from 1, or --named row if not"
        )
    return best


def _files(source: Path, folder: Path) -> dict[str, str]:
    """Name without extension and leading zeros -> path under `source`, of all images of a folder."""
    found = {}
    for path in listed_files(folder):
        if path.suffix.lower().removeprefix(".") in (*EXTENSIONS, ""):
            found[path.stem.lstrip("0") or "0" if path.stem.isdecimal() else path.stem] = str(path.relative_to(source))
    return found


def _reader(path: Path) -> Callable[[], Iterator[Row]]:
    """Captions and addresses of a TSV, in whichever order; a first line without an address is its heading."""

    def rows() -> Iterator[Row]:
        with in_form(path, "captions and addresses with tabs between"), path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                cells = line.rstrip("\r\n").split("\t")
                place = next((i for i in (1, 0) if len(cells) > 1 and cells[i].startswith(("http:", "https:"))), None)
                if place is not None:
                    yield cells[1 - place], cells[place]
                elif number > 1:
                    raise UserError(
                        f"{path}, line {number} is no caption and address with a tab between: {line[:80]!r}"
                    )

    return rows


def _lines(captions: Path, addresses: Path) -> Iterator[Row]:
    form = "SBU's text files"
    with in_form(captions, form), captions.open(encoding="utf-8") as said, addresses.open(encoding="utf-8") as where:
        for caption, address in zip_longest(said, where):
            if caption is None or address is None:
                raise UserError(f"{captions} and {addresses} have not the same number of lines; copy them again")
            yield caption.rstrip("\r\n"), address.strip()


def _sbu_json(path: Path) -> Callable[[], Iterator[Row]]:
    form = "SBU's sbu-captions-all.json"
    with in_form(path, form):
        tree = json.loads(path.read_text(encoding="utf-8"))
        rows = list(zip(tree["captions"], tree["image_urls"], strict=True))
    return lambda: iter(rows)


def _refuse_shards(source: Path) -> None:
    """img2dataset's output is streamed as it is."""
    for folder in (source, *sorted(path for path in source.iterdir() if path.is_dir())):
        if next(folder.glob("*.tar"), None) is not None:
            raise UserError(
                f"{folder} has tars: img2dataset's output needs no preparing; name the folder in data.shards as it is"
            )
