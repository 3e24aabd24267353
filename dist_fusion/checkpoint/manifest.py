"""Which checkpoints are whole: those whose manifest names files that are all there, byte by byte.

The manifest is written last, when every file of every rank is on disk and was read back.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dist_fusion.checkpoint.writing import Written, digest
from dist_fusion.schema import UserError, nearest

MANIFEST = "manifest.json"
DAMAGED = "manifest.json.damaged"
"""What the manifest of a checkpoint becomes whose files are not what it says."""

NOT_THERE = (FileNotFoundError, NotADirectoryError)
"""Errors of a path that leads nowhere; others say nothing of what is on the disk."""


class Position(NamedTuple):
    """Where a run stands, beside what DeepSpeed and the generators of random numbers keep."""

    step: int = 0  # optimizer steps done
    scored: int = 0  # the step of the last scores on held-out data
    best: float | None = None  # of the score that keep_best names, in percent
    best_step: int = 0
    recent: Sequence[float] = ()  # losses, where a spike is looked for

    def owes_scores(self, every: int, steps: int) -> bool:
        """Whether held-out data must be scored before the next step."""
        return self.scored < self.step and (self.step % every == 0 or self.step == steps)

    def with_score(self, scores: Mapping[str, float], name: str) -> tuple["Position", bool]:
        """The position after these `scores`, and whether that of `name`, if one is named, is the best so far.

        Raises:
            UserError: if there is no score of this name.
        """
        here = self._replace(scored=self.step)
        if not name:
            return here, False
        if name not in scores:
            raise UserError(
                f"keep_best is {name!r}, and no score has this name{nearest(name, scores)}; there are "
                f"{', '.join(scores)}"
            )
        if self.best is not None and scores[name] <= self.best:
            return here, False
        return here._replace(best=scores[name], best_step=self.step), True


class Saved(NamedTuple):
    """A whole checkpoint."""

    folder: Path
    step: int


def folder_at(run: Path, step: int) -> Path:
    """Where the checkpoint of a step is, or will be."""
    return run / "checkpoints" / f"step-{step:08d}"


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint; raises OSError or ValueError if there is none that can be read."""
    tree: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
    return tree


def list_whole(run: Path) -> list[Saved]:
    """The run's whole checkpoints, oldest first, as far as the sizes of their files can tell."""
    return [
        Saved(folder, read_manifest(folder)["position"]["step"])
        for folder in sorted((run / "checkpoints").glob("step-*"))
        if not problems(folder)
    ]


def list_committed(run: Path) -> list[Path]:
    """The folders that were whole once: those with a manifest, oldest first."""
    return sorted(path.parent for path in (run / "checkpoints").glob(f"step-*/{MANIFEST}"))


def list_damaged(run: Path) -> list[Path]:
    """The folders that were found damaged, oldest first."""
    return sorted(path.parent for path in (run / "checkpoints").glob(f"step-*/{DAMAGED}"))


def problems(folder: Path) -> list[str]:
    """What is missing of a checkpoint, as far as the sizes of its files can tell.

    Raises OSError where that cannot be found out: a file system that does not answer has lost nothing.
    """
    try:
        files = read_manifest(folder)["files"]
        sizes = {name: file["bytes"] for name, file in files.items()}
    except (*NOT_THERE, ValueError, KeyError, TypeError) as error:
        return [f"{MANIFEST}: {type(error).__name__}: {error}"]
    found = []
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file():
            found.append(f"{name} is not there")
        elif path.stat().st_size != size:
            found.append(f"{name} has {path.stat().st_size} bytes in place of {size}")
    return found


def altered(folder: Path, part: int, parts: int) -> list[str]:
    """Which of the `part`-th of `parts` shares of a checkpoint's files are not what was saved. Raises OSError."""
    files = sorted(read_manifest(folder)["files"].items())[part::parts]
    return [f"{name} is not what was saved" for name, file in files if digest(folder / name) != file["sha256"]]


def as_files(written: Iterable[Written]) -> dict[str, dict[str, object]]:
    """The manifest's list of files."""
    return {one.name: {"bytes": one.size, "sha256": one.sha256} for one in sorted(written)}
