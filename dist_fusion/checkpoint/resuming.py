"""Resuming: the newest checkpoint that is whole to the last byte, chosen by rank 0 for all."""

import socket
from collections.abc import Callable
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
        UserError: if there were checkpoints, and none of them is whole, or one cannot be read now.
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
        wrong = _looked(problems if distributed.rank() == 0 else _nothing, folder) or _looked(_my_share, folder)
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


def _looked(look: Callable[[Path], list[str]], folder: Path) -> list[str]:
    """What all ranks find wrong with a checkpoint. Collective.

    Raises:
        UserError: if a rank cannot read it: that is no damage, and another day it may be read.
    """
    wrong: list[str] = []
    unread = ""
    try:
        wrong = look(folder)
    except OSError as error:
        unread = f"rank {distributed.rank()} on {socket.gethostname()}: {error}"
    told = distributed.gathered((wrong, unread))
    unreads = [unread for _, unread in told if unread]
    if unreads:
        raise UserError(
            f"the checkpoint {folder} cannot be read now: {'; '.join(unreads)}. Nothing is lost; start the same "
            "command again when the file system is well"
        )
    return [line for wrong, _ in told for line in wrong]


def _nothing(folder: Path) -> list[str]:
    return []


def _my_share(folder: Path) -> list[str]:
    return altered(folder, distributed.rank(), distributed.world_size())
