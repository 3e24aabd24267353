"""Files of JSON lines that a kill may have torn. Nothing here needs torch: `dist-fusion status` answers at once."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

TAIL = 1 << 17
"""Bytes at the end of a file: some hundred lines."""


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file of JSON lines, in their order; none if there is no file.

    What is torn or no object is passed over: it was being written when its writer died.
    """
    if path.exists():
        with path.open("rb") as file:
            for line in file:
                tree = parsed(line)
                if tree is not None:
                    yield tree


def last_lines(path: Path, size: int = TAIL) -> list[dict[str, Any]]:
    """The objects in about the last `size` bytes of a file of JSON lines, in their order; none if there is no file."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        begin = max(0, file.seek(0, os.SEEK_END) - size)
        file.seek(begin)
        lines = file.readlines()
    found = [parsed(line) for line in (lines[1:] if begin else lines)]  # where it begins a line may be cut
    return [tree for tree in found if tree is not None]


def parsed(line: bytes) -> dict[str, Any] | None:
    """The object of a line; None if it is torn or no object."""
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
