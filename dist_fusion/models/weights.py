"""A model on disk: `model.safetensors` and the `model.json` that says what it is. Neither can run code."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dist_fusion.models import MODELS
from dist_fusion.models.config import ModelConfig
from dist_fusion.schema import UserError, build, nearest
from dist_fusion.types import HeadSpec


class ModelCard(NamedTuple):
    """What is needed to build a model again."""

    config: ModelConfig
    heads: dict[str, HeadSpec]
    vocabulary: tuple[str, ...]  # entries of its tokenizer, in the order of its word embeddings


def build_model(card: ModelCard) -> nn.Module:
    """A new model, its weights drawn from torch's generator."""
    return MODELS[card.config.kind](card.config, card.heads, len(card.vocabulary))


def save_model(folder: Path, card: ModelCard, weights: Mapping[str, Tensor]) -> None:
    """Write `model.json` and then `model.safetensors`, each whole or not at all; they are on disk when this returns."""
    tree = {"config": asdict(card.config), "heads": card.heads, "vocabulary": card.vocabulary}
    for name, write in (
        ("model.json", lambda path: path.write_text(json.dumps(tree) + "\n")),
        ("model.safetensors", lambda path: save_file({k: v.contiguous() for k, v in weights.items()}, path)),
    ):
        partial = folder / f"{name}.partial"
        write(partial)
        _sync(partial)  # before the name says that it is whole: a run that has its model is never trained again
        partial.replace(folder / name)
        _sync(folder)


def _sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def load_model(folder: str | Path, wanted_by: str) -> tuple[ModelCard, dict[str, Tensor]]:
    """The card and weights of a folder; raises UserError, naming the key `wanted_by`, if it holds no whole model."""
    folder = Path(folder)
    try:
        tree = json.loads((folder / "model.json").read_text())
        weights = load_file(folder / "model.safetensors")
        config = build(ModelConfig, tree["config"], f"{folder}/model.json")
        card = ModelCard(
            config, {task: HeadSpec(*spec) for task, spec in tree["heads"].items()}, (*tree["vocabulary"],)
        )
        with torch.device("meta"):
            shapes = {name: value.shape for name, value in build_model(card).state_dict().items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise UserError(
            f"{wanted_by} is {str(folder)!r}, which holds no finished model ({type(error).__name__}: {error}); "
            "it must be the folder of a run that has ended, with model.json and model.safetensors"
        ) from None
    if shapes != {name: value.shape for name, value in weights.items()}:
        raise UserError(
            f"{wanted_by} is {str(folder)!r}, whose model.safetensors is not of the model in its model.json"
        )
    return card, weights


def restore_model(folder: str | Path, wanted_by: str, tasks: Sequence[str] = ()) -> tuple[ModelCard, nn.Module]:
    """The card and the model of a folder, in eval mode, with the heads of `tasks` only if some are given.

    Raises:
        UserError: like `load_model`, and for a task that the model has no head for.
    """
    card, weights = load_model(folder, wanted_by)
    for task in tasks:
        if task not in card.heads:
            raise UserError(
                f"{wanted_by} {str(folder)!r} has no head for {task!r}{nearest(task, card.heads)}; it has "
                f"{', '.join(card.heads)}"
            )
    card = card._replace(heads={task: head for task, head in card.heads.items() if task in tasks or not tasks})
    model = build_model(card).eval()
    model.load_state_dict({name: weights[name] for name in model.state_dict()})
    return card, model


def require_same_reading(ours: ModelCard, theirs: ModelCard, folder: str | Path, wanted_by: str) -> None:
    """Raises UserError if a model's recipe now names another vocabulary or other answers than it was trained with."""
    if ours.vocabulary != theirs.vocabulary:
        raise UserError(
            f"{wanted_by} {str(folder)!r} reads another vocabulary ({len(theirs.vocabulary)} entries) than "
            f"data.vocabulary ({len(ours.vocabulary)}); both must be the same"
        )
    if ours.heads != theirs.heads:
        raise UserError(
            f"{wanted_by} {str(folder)!r} was trained with other tasks or answers than its recipe now names"
        )
