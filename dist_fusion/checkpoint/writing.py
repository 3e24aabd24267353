"""Files that survive a crash: on disk before anybody is told of them."""

import hashlib
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch


class Written(NamedTuple):
    """A file of a checkpoint, as it was read back."""

    name: str
    size: int
    sha256: str


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all, and wait until it is on disk."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    sync_folder(path.parent)


def write_state(path: Path, state: Any) -> Written:
    """Write one rank's part of a checkpoint, wait until it is on disk, and read it back.

    Raises OSError, or torch's RuntimeError, where it cannot be written.
    """
    with path.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(path.parent)
    return Written(path.name, path.stat().st_size, digest(path))


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def digest(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
