"""Saving: each rank's shards by its own thread, and when all of them are on disk, the manifest by rank 0.

A checkpoint that is being written is nobody's candidate, whatever happens meanwhile.
"""

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from dist_fusion import distributed
from dist_fusion.checkpoint.copies import Copies
from dist_fusion.checkpoint.folder import as_json, versions
from dist_fusion.checkpoint.manifest import (
    MANIFEST,
    Position,
    as_files,
    folder_at,
    list_committed,
    list_damaged,
    list_whole,
)
from dist_fusion.checkpoint.randomness import random_state
from dist_fusion.checkpoint.retention import superseded
from dist_fusion.checkpoint.writing import Written, write_state, write_text
from dist_fusion.config import Config
from dist_fusion.engine import shards
from dist_fusion.monitor.console import log
from dist_fusion.monitor.events import record
from dist_fusion.schema import UserError

NICE = 10
"""By how much a thread that writes gives way to the run (Linux has this for each thread)."""
PATIENCE = 30.0
"""Seconds that rank 0 waits for other nodes' files to show on a shared file system."""


class Part(NamedTuple):
    """What became of one rank's part of a checkpoint."""

    written: list[Written]
    problem: str = ""  # why it is not all there


class Saver:
    """Makes the checkpoints of a run, one at a time, and lets go of those that nobody needs any more."""

    def __init__(self, engine: Any, run: Path, config: Config, identity: Mapping[str, Any], num_samples: int):
        self._engine, self._run, self._config, self._identity = engine, run, config, as_json(identity)
        self._steps_per_epoch = num_samples / config.global_batch
        self._copies = Copies(engine.device)
        self._thread: threading.Thread | None = None
        self._deleting: threading.Thread | None = None
        self.last = -1  # the step of the last save that was begun
        self._since = time.monotonic()
        known = {*list_committed(run), *list_damaged(run)}
        self._delete([folder for folder in (run / "checkpoints").glob("step-*") if folder not in known])

    @property
    def busy(self) -> bool:
        """Whether this rank is still writing."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def due(self) -> bool:
        """Whether it is time for a save again; rank 0 has the clock."""
        minutes = (time.monotonic() - self._since) / 60
        return distributed.rank() == 0 and 0 < self._config.save_minutes < minutes

    def begin(self, position: Position) -> None:
        """Save the run as it is now: at once, or with `save_async` beside the next steps. Collective.

        Raises:
            UserError: where it cannot be written; the checkpoints before it are as they were.
        """
        self.finish()
        self._position, self._began = position, time.monotonic()
        self.last, self._since = position.step, self._began
        self._folder = folder_at(self._run, position.step)
        self._settle()
        self._all(self._make_room() if distributed.rank() == 0 else "")
        mine = shards.take_shards(self._engine, self._folder)
        mine.append(shards.Shard(self._folder / f"rank-{distributed.rank()}.pt", random_state()))
        self._require_space(mine)
        paths, states = [shard.path for shard in mine], [shard.state for shard in mine]
        if self._config.save_async:
            frozen = self._copies.freeze(states)
            self._thread = threading.Thread(target=self._write, args=(paths, lambda: self._copies.take(frozen)))
            self._thread.start()
        else:
            self._thread = threading.Thread(target=self._write, args=(paths, lambda: states))
            self._thread.start()
            self._thread.join()

    def hold(self) -> None:
        """Wait until weights may change. Before each of the optimizer's steps."""
        self._copies.hold()

    def finish(self) -> None:
        """Wait for the save that was begun, if any, and make it a checkpoint. Collective.

        Raises:
            UserError: if a rank could not write its part; then it is gone, and the checkpoints before it are whole.
        """
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        parts = distributed.gathered(self._part)
        told = [f"rank {rank}: {part.problem}" for rank, part in enumerate(parts) if part.problem]
        written = [one for part in parts for one in part.written]
        self._all("; ".join(told) or (self._commit(written) if distributed.rank() == 0 else ""))
        seconds, size = time.monotonic() - self._began, sum(one.size for one in written)
        if distributed.rank() == 0:
            details = {"folder": self._folder.name, "seconds": round(seconds, 3), "bytes": size}
            record(self._run, "saved", self._position.step, details)
            log.info("saved %s (%s in %.1f s)", self._folder, _gb(size), seconds)

    def close(self) -> None:
        """Wait for what is still being written or deleted; a save that was not finished is no checkpoint."""
        for thread in (self._thread, self._deleting):
            if thread:
                thread.join()

    def _write(self, paths: Sequence[Path], states: Callable[[], Sequence[Any]]) -> None:
        written: list[Written] = []
        self._part = Part(written, "the thread that writes has failed; its error is above")
        try:
            taken = states()  # for which the run may wait; for the rest it does not
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
            for path, one in zip(paths, taken, strict=True):
                written.append(write_state(path, one))
        except (OSError, RuntimeError) as error:  # torch's writer tells of a full disk by the latter
            self._part = Part(written, f"{type(error).__name__}: {error}")
        else:
            self._part = Part(written)

    def _all(self, problem: str) -> None:
        """Raises UserError on every rank if rank 0 has a problem. Collective."""
        problem = distributed.from_first(problem)
        if problem:
            if distributed.rank() == 0:
                shutil.rmtree(self._folder, ignore_errors=True)  # it may be why the disk is full
            whole = list_whole(self._run)
            last = f"the one of step {whole[-1].step} is whole" if whole else "there is none before it"
            raise UserError(
                f"the checkpoint of step {self._position.step} cannot be written in {self._run / 'checkpoints'}: "
                f"{problem}; {last}. Make room, and start the same command again to continue from there"
            )

    def _make_room(self) -> str:
        try:
            if self._folder.exists():
                (self._folder / MANIFEST).unlink(missing_ok=True)
                shutil.rmtree(self._folder)  # of an earlier life that fell behind it, or what a killed save left
            self._folder.mkdir(parents=True)
        except OSError as error:
            return f"{type(error).__name__}: {error}"
        return ""

    def _require_space(self, of_rank: Sequence[shards.Shard]) -> None:
        """Raises UserError on every rank if the disk has not the room. Collective."""
        mine = sum(_num_bytes(shard.state) for shard in of_rank)
        needed = int(distributed.summed(torch.tensor(mine, dtype=torch.int64)))
        free = shutil.disk_usage(self._folder).free if distributed.rank() == 0 else needed
        lacks = f"it needs {_gb(needed)}, and there are {_gb(free)} free" if free < needed else ""
        self._all(lacks)

    def _commit(self, written: Sequence[Written]) -> str:
        try:
            lacking = _not_seen(self._folder, written)
            if lacking:
                return (
                    f"rank 0 does not see {', '.join(lacking)}, which other ranks have written; the folder of a run "
                    "must be on a file system that all nodes share"
                )
            tree = {
                "step": self._position.step,
                "position": self._position._asdict(),
                "world_size": distributed.world_size(),
                **self._identity,
                "files": as_files(written),
                "versions": versions(),
                "time": time.time(),
            }
            write_text(self._folder / MANIFEST, json.dumps(tree, indent=2) + "\n")
            # For DeepSpeed's own tools; what is resumed is decided by the manifests alone.
            write_text(self._folder.parent / "latest", self._folder.name)
        except OSError as error:
            return f"{type(error).__name__}: {error}"
        try:
            self._let_go()
        except OSError as error:
            log.warning("old checkpoints are left where they are: %s", error)
        return ""

    def _let_go(self) -> None:
        best = self._position.best_step if self._config.keep_best else None
        gone = superseded(
            list_whole(self._run), self._config.keep_checkpoints, best, self._config.keep_epochs, self._steps_per_epoch
        )
        damaged = [folder for folder in list_damaged(self._run) if folder < self._folder]  # nobody needs them any more
        self._delete([*damaged, *(saved.folder for saved in gone)])

    def _delete(self, folders: Sequence[Path]) -> None:
        """Delete in a thread, on rank 0: on a shared file system it may take longer than a step."""
        if distributed.rank() == 0 and folders:
            self._settle()
            for folder in folders:
                (folder / MANIFEST).unlink(missing_ok=True)  # half a folder is no candidate
            self._deleting = threading.Thread(target=_remove, args=(folders,))
            self._deleting.start()

    def _settle(self) -> None:
        if self._deleting:
            self._deleting.join()
            self._deleting = None


def _remove(folders: Sequence[Path]) -> None:
    for folder in folders:
        # What cannot be deleted now (a file that is open elsewhere) has no manifest; it goes when the run starts again.
        shutil.rmtree(folder, ignore_errors=True)


def _not_seen(folder: Path, written: Sequence[Written]) -> list[str]:
    """The files that rank 0 does not see as they were written, after it has given the file system some time."""
    end = time.monotonic() + PATIENCE
    while True:
        lacking = [
            one.name
            for one in written
            if not (folder / one.name).is_file() or (folder / one.name).stat().st_size != one.size
        ]
        if not lacking or time.monotonic() > end:
            return lacking
        time.sleep(0.2)


def _num_bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
