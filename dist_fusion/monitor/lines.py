"""Files of JSON lines that a kill may have torn. Nothing here needs torch: `dist-fusion status` answers at once."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file of JSON lines, in their order; none if there is no file.

    What is torn or no object is passed over: it was being written when its writer died.
    """
    if path.exists():
        with path.open("rb") as file:
            for line in file:
                tree = _parsed(line)
                if tree is not None:
                    yield tree


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        tree = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return tree if isinstance(tree, dict) and line.endswith(b"\n") else None


def append_line(path: Path, tree: Mapping[str, object]) -> None:
    """Add one object to a file of JSON lines, and wait until it is on the disk. Raises OSError.

    One write, so that no reader sees half of it; a torn line that a kill left at the end is ended first.
    """
    with path.open("ab+", buffering=0) as file:
        torn = False
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            torn = file.read(1) != b"\n"
        file.write((b"\n" if torn else b"") + json.dumps(tree, default=str).encode() + b"\n")
        os.fsync(file.fileno())
