"""A model out of a checkpoint: weights in fp32 that anything can start from, of a run that has ended or has not."""

from pathlib import Path

import torch

from dist_fusion.checkpoint.folder import owned_by_another
from dist_fusion.checkpoint.manifest import altered, list_whole
from dist_fusion.engine.state import full_weights
from dist_fusion.models.weights import ModelCard, build_model, save_model
from dist_fusion.monitor.console import log
from dist_fusion.schema import UserError


def export(run: Path, card: ModelCard, step: int | None = None, out: Path | None = None, trust: bool = False) -> Path:
    """Write `model.json` and `model.safetensors` of a checkpoint; returns their folder.

    The checkpoint is the newest of `run` that is as it was saved to the last byte, or that of `step`. The folder is
    `out`, or `RUN/exported/step-XXXXXXXX`. Its shards are unpickled on this one process, so a run of another user is
    read only with `trust`.

    Raises:
        UserError: if there is no such checkpoint, it is damaged, another user's, or of another model than `card`, or
            the folder holds a model already.
    """
    whole = {saved.step: saved.folder for saved in list_whole(run)}
    if not whole:
        raise UserError(f"{run} has no whole checkpoint yet; a run leaves one every save_every steps")
    if step is not None and step not in whole:
        raise UserError(f"{run} has no whole checkpoint of step {step}; there are {', '.join(map(str, whole))}")
    stranger = owned_by_another(run)
    if stranger and not trust:
        raise UserError(f"{stranger}, or give --trust")
    folder = _sound([whole[each] for each in (sorted(whole) if step is None else [step])])
    out = out or run / "exported" / folder.name
    if (out / "model.safetensors").exists():
        raise UserError(f"{out} holds a model already; name another folder by --out, or remove that one")
    weights = full_weights(folder)
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in build_model(card).state_dict().items()}
    if shapes != {name: value.shape for name, value in weights.items()}:
        raise UserError(
            f"the checkpoint {folder} is not of the model that {run}/config.yaml describes; the vocabulary or the "
            "answers that it names are no longer those of the training"
        )
    out.mkdir(parents=True, exist_ok=True)
    save_model(out, card, weights)
    return out


def _sound(folders: list[Path]) -> Path:
    """The last of the checkpoints whose every byte is as it was saved; the others are told. Raises UserError."""
    told = []
    for folder in reversed(folders):
        wrong = altered(folder, 0, 1)
        if not wrong:
            return folder
        told.append(f"the checkpoint {folder} is damaged: {'; '.join(wrong)}")
        log.warning("%s", told[-1])
    raise UserError(". ".join(told))
