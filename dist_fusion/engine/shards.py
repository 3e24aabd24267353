"""What DeepSpeed writes of a run, one or two files a rank.

They are pickles: open only your own.
"""

from pathlib import Path
from typing import Any, NamedTuple

import deepspeed
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointCommitInfo, CheckpointEngine


class Shard(NamedTuple):
    """A file that a rank has to write: its path, and what belongs in it, whose tensors are still those in use."""

    path: Path
    state: Any


class _Taking(CheckpointEngine):  # type: ignore[misc]
    """In the place of what writes DeepSpeed's files: takes what would be written."""

    def __init__(self) -> None:
        self.taken: list[Shard] = []

    def create(self, info: CheckpointCommitInfo) -> None: ...

    def save(self, state_dict: Any, path: str) -> None:
        self.taken.append(Shard(Path(path), state_dict))

    def load(self, path: str, map_location: Any = None) -> Any:
        raise AssertionError("nothing is loaded while a checkpoint is taken")

    def commit(self, info: CheckpointCommitInfo) -> bool:
        return True


def take_shards(engine: deepspeed.DeepSpeedEngine, folder: Path) -> list[Shard]:
    """What this rank has to write for a checkpoint in `folder`, which is there. Collective.

    Nothing is copied: it must be written, or copied, before the optimizer's next step.
    """
    usual, engine.checkpoint_engine = engine.checkpoint_engine, _Taking()
    # It would copy two scripts there, on rank 0 alone, and fail where the disk is full. `dist-fusion export` does what
    # they do.
    engine._copy_recovery_script = _nothing
    try:
        engine.save_checkpoint(str(folder.parent), tag=folder.name, save_latest=False)
        taken: list[Shard] = engine.checkpoint_engine.taken
    finally:
        engine.checkpoint_engine = usual
        del engine._copy_recovery_script
    return taken


def _nothing(folder: str) -> None: ...
