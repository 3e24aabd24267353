"""Images of one's own with their captions in a table: CSV, TSV or JSON lines.

Rows of one image are one sample. A column `split` may say train, dev or test; without it all is train.
"""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dist_fusion.data.prepare.plan import SPLITS, Options, Picture, Plan, Planned, Skip, captioned
from dist_fusion.data.prepare.sources import read_lines
from dist_fusion.schema import UserError, nearest

TABLES = (".csv", ".tsv", ".jsonl")
SPLIT_COLUMN = "split"


def plan(source: Path, options: Options) -> Plan:
    """One sample an image, named by its path under SRC, in the order of first appearance."""
    table = _table(source)

    def items() -> Iterator[Planned | Skip]:
        captions: dict[tuple[str, str], list[str]] = {}
        for number, row in _rows(table):
            where = f"{table}, line {number}"
            image, told = (_cell(row, column, where) for column in (options.image_column, options.text_column))
            split = row.get(SPLIT_COLUMN) or "train"
            if split not in SPLITS:
                raise UserError(f"{where} has the split {split!r}; it can be {', '.join(SPLITS)}")
            texts = told if isinstance(told, list) else [told]
            if not isinstance(image, str) or not all(isinstance(text, str) for text in texts):
                raise UserError(f"{where}: {options.image_column} and {options.text_column} must be text")
            captions.setdefault((split, image), []).extend(texts)
        for (split, image), texts in captions.items():
            yield from captioned(split, (Picture((image,)),), image, source.resolve().name, texts)

    return Plan(items, (table,))


def _table(source: Path) -> Path:
    tables = sorted(path for path in source.iterdir() if path.suffix in TABLES)
    named = [path for path in tables if path.stem == "captions"] or tables
    if len(named) != 1:
        found = ", ".join(path.name for path in named) or "none"
        raise UserError(
            f"{source} must have one table of captions, such as captions.csv or captions.jsonl; found {found}"
        )
    return named[0]


def _rows(table: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    if table.suffix == ".jsonl":
        yield from read_lines(table, "one caption a line")
        return
    with table.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t" if table.suffix == ".tsv" else ",", strict=True)
        try:
            for row in reader:
                if None in row:
                    where = f"{table}, line {reader.line_num}"
                    raise UserError(f"{where} has more cells than the heading; quote a caption that has a comma")
                yield reader.line_num, row
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{table}, line {reader.reader.line_num} cannot be read: {error}") from None


def _cell(row: dict[str, Any], column: str, where: str) -> Any:
    if row.get(column) is None:
        known = [key for key in row if key]
        hint = nearest(column, set(known)) if column not in row else "; the line has fewer cells than the heading"
        raise UserError(f"{where} has no {column!r}{hint}; it has {', '.join(known)} (--image-column, --text-column)")
    return row[column]
