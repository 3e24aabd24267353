"""Small data sets in the forms in which they really ship, and reading back what was made of them."""

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from dist_fusion.data.prepare.plan import Options
from dist_fusion.data.prepare.run import prepare
from dist_fusion.data.shards import find_shards, read_records


def picture(number=0, size=(40, 30), form="JPEG"):
    """The bytes of an image that is like no other."""
    pixels = np.random.default_rng(number).integers(0, 256, (size[1] // 10, size[0] // 10, 3), np.uint8)
    written = io.BytesIO()
    Image.fromarray(pixels).resize(size).save(written, form)
    return written.getvalue()


def put(path: Path, content):
    """Write bytes, text, or anything else as JSON, with the folders on the way."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(content, bytes):
        content = (content if isinstance(content, str) else json.dumps(content)).encode()
    path.write_bytes(content)


def put_lines(path: Path, rows):
    put(path, "".join(json.dumps(row) + "\n" for row in rows))


def make(name, source, target, workers=1, **options):
    """Prepare a data set; returns what prepare.json says."""
    prepare(name, [source, target], Options(**options), workers)
    return json.loads((target / "prepare.json").read_text())


def read(target, split):
    """The records of a split, by the image's name (the pair's)."""
    records = read_records(find_shards([str(target / split)]))
    return {record.image_ids[0].removesuffix("/0"): record for record in records}


def skipped(target):
    """What was left out, as (split, reason, item)."""
    return [tuple(json.loads(line).values()) for line in (target / "skipped.jsonl").read_text().splitlines()]


def everything(folder):
    """Every file under a folder with its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
