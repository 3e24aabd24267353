"""Continuing a run on another number of ranks: the shards that so many ranks would have written, made in memory.

DeepSpeed refuses shards of another number of ranks, and its universal checkpoint restores neither frozen parameters nor
buffers. So each rank puts its own shard together from the old ones by the names of parameters, bit by bit, and hands
it to DeepSpeed's own loading. All else (rates, schedule, counters, loss scale) is the old first rank's.
"""

import tempfile
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.checkpoint.constants import (
    FROZEN_PARAM_FRAGMENTS,
    FROZEN_PARAM_SHAPES,
    OPTIMIZER_STATE_DICT,
    PARAM_SLICE_MAPPINGS,
)
from torch import Tensor

from dist_fusion import distributed
from dist_fusion.engine.partitions import Piece, laid_by_group, laid_by_parameter, share
from dist_fusion.engine.sharding import Sharding, sharding
from dist_fusion.engine.state import KEPT, MASTER, SavedState
from dist_fusion.schema import UserError

CARRIED = ("loss_scaler", "dynamic_loss_scale", "overflow", "clip_grad")
"""Of a shard, what is not about its partition."""
WORDS = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def load_elastic(engine: deepspeed.DeepSpeedEngine, folder: Path) -> None:
    """Put a checkpoint folder, written by any number of ranks, into a new engine. Collective.

    Everything DeepSpeed keeps: weights in their precision, fp32 weights, moments and counters of the optimizer, rates,
    schedule, loss scale, counts of steps, frozen parameters, buffers. On the number of ranks that wrote it this is
    `engine.load_checkpoint`. Random states are not in these files. A rank's memory beyond the engine's: its own share
    of fp32 weights and moments. Shards are unpickled: load those of one's own runs only.

    Raises:
        UserError: if the folder is no whole checkpoint, or of another ZeRO stage, precision or model than the engine.
    """
    state = SavedState(folder)
    _check(state, engine)
    if state.ranks == distributed.world_size():
        found, _ = engine.load_checkpoint(str(folder.parent), tag=folder.name)
    else:
        found = load_recut(engine, state)
    assert found, f"DeepSpeed found nothing to load in {folder}"


def load_recut(engine: deepspeed.DeepSpeedEngine, state: SavedState) -> str | None:
    """Let DeepSpeed load what this rank would find in the folder, had this number of ranks written it. Collective.

    Returns the path that DeepSpeed believes it has read.
    """
    ranks, rank = distributed.world_size(), distributed.rank()
    given = Given(_model(state, ranks, rank), {OPTIMIZER_STATE_DICT: _shard(engine, state, ranks, rank)})
    usual, engine.checkpoint_engine = engine.checkpoint_engine, given
    try:
        with tempfile.TemporaryDirectory() as folder:
            # DeepSpeed looks for the file before it asks for it: with more ranks than before there may be none.
            name = f"zero_pp_rank_{rank}_mp_rank_00" if state.sharding.stage == 3 else "mp_rank_00"
            (Path(folder) / "recut").mkdir()
            (Path(folder) / "recut" / f"{name}_model_states.pt").touch()
            found, _ = engine.load_checkpoint(folder, tag="recut")
    finally:
        engine.checkpoint_engine = usual
    path: str | None = found
    return path


class Given:
    """What DeepSpeed loads by, which gives out what is in memory whatever the folder."""

    def __init__(self, model: dict[str, Any], shard: dict[str, Any]):
        self._model, self._shard = model, shard

    def load(self, path: str, map_location: object = None) -> dict[str, Any]:
        """The file of the model, or the shard of the optimizer, by the end of its name."""
        return self._shard if path.endswith("optim_states.pt") else self._model


def _check(state: SavedState, engine: deepspeed.DeepSpeedEngine) -> None:
    """Raises UserError if `engine` cannot take `state`; the same on every rank."""
    now = sharding(engine.config)
    if (state.sharding.stage, state.sharding.dtype) != (now.stage, now.dtype):
        raise UserError(
            f"the checkpoint {state.folder} is of {_spoken(state.sharding)}, and this run is of {_spoken(now)}; "
            "continue it with the deepspeed=… that it was made with"
        )
    theirs, ours = (
        {name: tuple(shape) for group in shapes for name, shape in group.items()}
        for shapes in (state.shapes, engine._get_zero_param_shapes())
    )
    if theirs != ours:
        differing = [name for name in {**theirs, **ours} if theirs.get(name) != ours.get(name)]
        one = differing[0]
        raise UserError(
            f"the checkpoint {state.folder} is of another model: {len(differing)} trained parameters differ, such as "
            f"{one}, {theirs.get(one, 'not there')} then, {ours.get(one, 'not there')} now"
        )
    then, now_groups = (len(rates) for rates in (_optimizer(state)["param_groups"], engine.optimizer.param_groups))
    if then != now_groups:
        raise UserError(
            f"the checkpoint {state.folder} has {then} groups of parameters, and this run {now_groups}; "
            "optimizer.multipliers must be as they were"
        )


def _spoken(sharding: Sharding) -> str:
    return f"ZeRO-{sharding.stage} in {WORDS[sharding.dtype]}"


def _optimizer(state: SavedState) -> dict[str, Any]:
    """The state of torch's optimizer, of the first rank."""
    kept: dict[str, Any] = state.shards[0][KEPT[state.sharding.stage][1]]
    return kept


def _model(state: SavedState, ranks: int, rank: int) -> dict[str, Any]:
    """The file of the model that this rank of `ranks` reads."""
    model = {**state.models[0], "dp_world_size": ranks}
    if state.sharding.stage == 3:
        names = model[FROZEN_PARAM_SHAPES] or {}
        model[FROZEN_PARAM_FRAGMENTS] = {name: _part(state.frozen(name), ranks, rank) for name in names}
    return model


def _part(whole: Tensor | None, ranks: int, rank: int) -> Tensor:
    """A rank's part of a parameter at stage 3, [K], zeros behind its end."""
    assert whole is not None
    room = share(whole.numel(), ranks)
    mine = whole.flatten()[rank * room : (rank + 1) * room]
    return torch.cat([mine, mine.new_zeros(room - len(mine))])


def _shard(engine: deepspeed.DeepSpeedEngine, state: SavedState, ranks: int, rank: int) -> dict[str, Any]:
    """The optimizer's shard of this rank of `ranks`: the form is the engine's own, the values are the old ones."""
    form = engine.optimizer.state_dict()
    masters, optimizer = KEPT[state.sharding.stage]
    shapes = engine._get_zero_param_shapes()
    if state.sharding.stage == 3:
        pieces = laid_by_parameter(shapes, ranks)
        lengths = [len(flat) for flat in form[masters]]
    else:
        pieces = laid_by_group(distributed.gathered(form[PARAM_SLICE_MAPPINGS]))
        lengths = [len(group["params"][0]) for group in engine.optimizer.param_groups]
    group_then = {name: number for number, group in enumerate(state.shapes) for name in group}
    weights, kept = [], {}
    for number, (group, length) in enumerate(zip(shapes, lengths, strict=True)):
        then = group_then[next(iter(group))]
        mine = [one for name in group for one in pieces[name] if (one.rank, one.group) == (rank, number)]
        flats = {kind: _filled(state, kind, mine, like, length) for kind, like in state.flats(0, then).items()}
        weights.append(flats.pop(MASTER))
        kept[number] = {**state.counters(then), **flats}
    rates = [
        {**old, "params": new["params"]}
        for old, new in zip(_optimizer(state)["param_groups"], form[optimizer]["param_groups"], strict=True)
    ]
    carried = {key: state.shards[0][key] for key in CARRIED if key in form}
    return {**form, **carried, masters: weights, optimizer: {"state": kept, "param_groups": rates}}


def _filled(state: SavedState, kind: str, mine: list[Piece], like: Tensor, length: int) -> Tensor:
    """A flat partition, [length], in the precision of `like`, with zeros where no parameter is."""
    flat = torch.zeros(length, dtype=like.dtype)
    for piece in mine:
        state.copy(kind, piece.name, piece.offset, flat[piece.start : piece.start + piece.length])
    return flat
