"""What DeepSpeed keeps of a model on disk, read by the names of parameters: at ZeRO stages 1, 2 and 3, of any number
of ranks, without an engine and without a process group.

Shards are unpickled, so a stranger's could run code: read those of one's own runs only.
"""

import re
from copy import deepcopy
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from deepspeed.checkpoint.constants import (
    BASE_OPTIMIZER_STATE,
    FP32_FLAT_GROUPS,
    FROZEN_PARAM_FRAGMENTS,
    FROZEN_PARAM_SHAPES,
    OPTIMIZER_STATE_DICT,
    PARAM_SHAPES,
    PARAM_SLICE_MAPPINGS,
    SINGLE_PARTITION_OF_FP32_GROUPS,
)
from torch import Tensor

from dist_fusion.engine.partitions import Piece, laid_by_group, laid_by_parameter
from dist_fusion.engine.sharding import sharding
from dist_fusion.schema import UserError

KEPT = {
    1: (SINGLE_PARTITION_OF_FP32_GROUPS, BASE_OPTIMIZER_STATE),
    2: (SINGLE_PARTITION_OF_FP32_GROUPS, BASE_OPTIMIZER_STATE),
    3: (FP32_FLAT_GROUPS, OPTIMIZER_STATE_DICT),
}
"""By ZeRO stage, where a shard has its fp32 weights and where the state of torch's optimizer."""
MASTER = "master"
"""The kind of a parameter's elements that are its fp32 weights; the others are named by torch's optimizer."""


class SavedState:
    """The shards of a checkpoint folder, mapped into memory: only what is asked for is read.

    Raises:
        UserError: if the folder has no shards, not those of all ranks, or was written without ZeRO.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.models = _load_by_rank(folder, r"(?:zero_pp_rank_(\d+)_)?mp_rank_00_model_states\.pt")
        if not self.models:
            raise UserError(f"{folder} is no checkpoint: it has no file *_model_states.pt")
        self.sharding = sharding(self.models[0]["ds_config"])
        if self.sharding.stage not in KEPT:
            raise UserError(
                f"the checkpoint {folder} was written without ZeRO; stages {', '.join(map(str, KEPT))} are read"
            )
        shards = _load_by_rank(folder, r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt")
        self.ranks: int = self.models[0]["dp_world_size"]
        if len(shards) != self.ranks or len(self.models) not in (1, self.ranks):
            raise UserError(
                f"the checkpoint {folder} is of {self.ranks} ranks, and has {len(shards)} files *_optim_states.pt and "
                f"{len(self.models)} files *_model_states.pt"
            )
        self.shards = [shard[OPTIMIZER_STATE_DICT] for shard in shards]

    @property
    def shapes(self) -> list[dict[str, torch.Size]]:
        """The trained parameters by group (ZeRO-3: by sub-group), with their shapes."""
        groups: list[dict[str, torch.Size]] = self.models[0][PARAM_SHAPES]
        return groups

    @cached_property
    def pieces(self) -> dict[str, list[Piece]]:
        """Where the elements of each trained parameter are, in their order."""
        if self.sharding.stage == 3:
            return laid_by_parameter(self.shapes, self.ranks)
        return laid_by_group([shard[PARAM_SLICE_MAPPINGS] for shard in self.shards])

    def flats(self, rank: int, group: int) -> dict[str, Tensor]:
        """By kind, the flat partitions of a rank: the fp32 weights, and what the optimizer keeps of each element."""
        masters, optimizer = KEPT[self.sharding.stage]
        state = self.shards[rank][optimizer]["state"].get(group, {})
        moments = {kind: value for kind, value in state.items() if torch.is_tensor(value) and value.ndim}
        return {MASTER: self.shards[rank][masters][group].detach(), **moments}

    def counters(self, group: int) -> dict[str, Any]:
        """What the optimizer keeps of a group as a whole, which is the same on every rank; free of the files."""
        state = self.shards[0][KEPT[self.sharding.stage][1]]["state"].get(group, {})
        return deepcopy({key: value for key, value in state.items() if not (torch.is_tensor(value) and value.ndim)})

    def copy(self, kind: str, name: str, offset: int, target: Tensor) -> None:
        """Copy elements of a trained parameter, from `offset` of its flattened form on, into all of `target`, [K]."""
        copied = 0
        for piece in self.pieces[name]:
            first, last = max(offset, piece.offset), min(offset + len(target), piece.offset + piece.length)
            if first < last:
                begin = piece.start + first - piece.offset
                flat = self.flats(piece.rank, piece.group)[kind]
                target[first - offset : last - offset] = flat[begin : begin + last - first]
                copied += last - first
        assert copied == len(target), f"{self.folder} has {copied} of {len(target)} elements of {name}"

    def frozen(self, name: str) -> Tensor | None:
        """A parameter that is in no optimizer, whole, if the ranks keep it in parts (ZeRO-3)."""
        shapes = self.models[0].get(FROZEN_PARAM_SHAPES) or {}
        if self.sharding.stage < 3 or name not in shapes:
            return None
        parts = torch.cat([model[FROZEN_PARAM_FRAGMENTS][name] for model in self.models])
        return parts[: prod(shapes[name])].view(shapes[name])


def _load_by_rank(folder: Path, pattern: str) -> list[dict[str, Any]]:
    """The files of a folder whose names match, mapped into memory, in the order of the number in the name."""
    found = [(match, path) for path in folder.glob("*.pt") if (match := re.fullmatch(pattern, path.name))]
    found.sort(key=lambda one: int(one[0][1] or 0))
    return [torch.load(path, map_location="cpu", mmap=True, weights_only=False) for _, path in found]


def full_weights(folder: Path) -> dict[str, Tensor]:
    """The weights of a checkpoint folder in fp32: all of the model's state_dict, each in memory of its own.

    Trained parameters are the optimizer's own fp32 copies, put together from all ranks' shards. Frozen ones and buffers
    are as the model had them, integers as they are; tied weights are there under each of their names.

    Raises UserError if the folder is no whole checkpoint of DeepSpeed, or was written without ZeRO.
    """
    state = SavedState(folder)
    shapes = {name: shape for group in state.shapes for name, shape in group.items()}
    tied = state.models[0]["shared_params"]
    weights = {}
    for name, value in state.models[0]["module"].items():
        first = tied.get(name, name)
        if first in shapes:
            flat = torch.empty(prod(shapes[first]))
            state.copy(MASTER, first, 0, flat)
            weights[name] = flat.view(shapes[first])
        else:
            whole = state.frozen(first)
            kept = (value if whole is None else whole).detach()
            weights[name] = kept.to(torch.float32 if kept.is_floating_point() else kept.dtype, copy=True)
    return weights
