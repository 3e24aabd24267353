"""Resuming: the newest checkpoint that is whole to the last byte, chosen by rank 0 for all."""

from pathlib import Path
from typing import Any

import torch

from dist_fusion import distributed
from dist_fusion.checkpoint.manifest import (
    DAMAGED,
    MANIFEST,
    Position,
    altered,
    list_committed,
    list_damaged,
    problems,
    read_manifest,
)
from dist_fusion.checkpoint.randomness import derived_seed, restore_random_state, seed_everything
from dist_fusion.engine import elastic
from dist_fusion.monitor.console import log
from dist_fusion.monitor.events import record
from dist_fusion.schema import UserError


def resume(engine: Any, run: Path, seed: int) -> Position:
    """Load the newest whole checkpoint and return where it stands; the start if there was none yet. Collective.

    A checkpoint of another number of ranks is dealt anew; ranks that it does not know draw new random numbers.

    Raises:
        UserError: if there were checkpoints, and none of them is whole.
    """
    found = _newest_whole(run)
    if found is None:
        return Position()
    manifest = distributed.from_first(read_manifest(found) if distributed.rank() == 0 else None)
    if manifest["world_size"] != distributed.world_size():
        log.info("%s was saved by %d ranks; it is dealt anew", found, manifest["world_size"])
    elastic.load_elastic(engine, found)
    position = Position(**manifest["position"])
    mine = found / f"rank-{distributed.rank()}.pt"
    if distributed.rank() < manifest["world_size"]:
        restore_random_state(torch.load(mine, weights_only=True))
    else:
        seed_everything(derived_seed(seed, distributed.rank(), position.step))
    return position


def _newest_whole(run: Path) -> Path | None:
    """The folder of the newest checkpoint whose every byte is as it was saved; the ranks share the reading."""
    refused: list[str] = distributed.from_first([folder.name for folder in list_damaged(run)])
    committed: list[Path] = distributed.from_first(list_committed(run) if distributed.rank() == 0 else None)
    for folder in reversed(committed):
        wrong: list[str] = distributed.from_first(problems(folder) if distributed.rank() == 0 else None)
        if not wrong:
            mine = altered(folder, distributed.rank(), distributed.world_size())
            wrong = [line for theirs in distributed.gathered(mine) for line in theirs]
        if not wrong:
            return folder
        refused.append(f"{folder.name} ({'; '.join(wrong[:3])})")
        if distributed.rank() == 0:
            log.warning("DAMAGED checkpoint %s: %s; taking the one before it", folder, "; ".join(wrong))
            step = int(folder.name.removeprefix("step-"))
            record(run, "refused checkpoint", step, {"folder": folder.name, "why": wrong})
            (folder / MANIFEST).replace(folder / DAMAGED)  # so that it does not count as one that is kept
    if refused:
        raise UserError(
            f"no checkpoint of {run} is whole any more: {', '.join(refused)}. Put back what is missing and rename "
            f"{DAMAGED} to {MANIFEST} there; or move the folder {run / 'checkpoints'} away to start anew"
        )
    return None
