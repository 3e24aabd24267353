"""What a new model starts from: a run of ours, a ViLT (a dual encoder's towers both get it), or a BERT and a ViT."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_fusion.models.config import ModelConfig
from dist_fusion.models.sources import Source, read_source
from dist_fusion.models.weights import ModelCard
from dist_fusion.schema import UserError, section

BERT_UNCASED = "0f052197aac305fe"
"""Digest of bert-base-uncased's entries: what a ViLT or BERT without a vocab.txt reads."""


@section
@dataclass(frozen=True)
class Towers:
    """A text tower and an image tower of different origin."""

    text: str  # a BERT, with model.text_norm=post
    image: str  # a ViT


Weights = dict[str, Tensor]


def both_towers(weights: Weights) -> Weights:
    """A ViLT's encoder as both towers (DiDE, arXiv:2112.08723): their queries and keys start in one space.

    Its pooling is that of a shallow fusion, on both sides; another fusion has no place for it.
    """
    kept = {name: x for name, x in weights.items() if not name.startswith(("encoder.", "pool."))}
    for tower in ("text_tower", "image_tower"):
        kept |= {f"{tower}.{n.removeprefix('encoder.')}": x for n, x in weights.items() if n.startswith("encoder.")}
    for side in ("text", "image"):
        kept |= {
            f"fusion.pool_{side}.{n.removeprefix('pool.')}": x for n, x in weights.items() if n.startswith("pool.")
        }
    return kept


def text_tower(weights: Weights) -> Weights:
    """A BERT as the text tower; it knows no modality, so that type starts as nothing."""
    return {**weights, "text_embedding.modality": torch.zeros_like(weights["text_embedding.sentence"])}


def image_tower(weights: Weights) -> Weights:
    """A ViT as the image tower; it knows no modality, so that type starts as nothing."""
    return {**weights, "image_embedding.modality.weight": torch.zeros_like(weights["image_embedding.position"][:1])}


def joint_encoder(weights: Weights) -> Weights:
    """A ViT as a ViLT's encoder, ViLT's own start (arXiv:2102.03334)."""
    return {n.replace("image_tower.", "encoder."): x for n, x in image_tower(weights).items()}


ROUTES: dict[tuple[str, str], Callable[[Weights], Weights]] = {
    ("dual-encoder", "dual-encoder"): dict,
    ("fusion-encoder", "fusion-encoder"): dict,
    ("fusion-encoder", "dual-encoder"): both_towers,
    ("text-tower", "dual-encoder"): text_tower,
    ("image-tower", "dual-encoder"): image_tower,
    ("image-tower", "fusion-encoder"): joint_encoder,
}
"""From what a source is and what the model is: how the source's names become the model's."""
NEW: dict[tuple[str, str], tuple[str, ...]] = {
    ("fusion-encoder", "dual-encoder"): ("fusion.",),
    ("text-tower", "dual-encoder"): ("fusion.",),
    ("image-tower", "dual-encoder"): ("fusion.",),
    ("image-tower", "fusion-encoder"): ("text_embedding.", "pool."),
}
"""By the same: beginnings of names that the source cannot fill, and that may stay new."""
ALIKE = {
    "dual-encoder": ("width", "num_heads", "num_layers", "patch_size", "stem", "text_norm", "fusion", "mapping",
                     "num_fusion_layers"),
    "fusion-encoder": ("width", "num_heads", "num_layers", "patch_size", "stem", "text_norm"),
    "text-tower": ("width", "num_heads", "num_layers", "text_norm"),
    "image-tower": ("width", "num_heads", "num_layers", "patch_size"),
}  # fmt: skip
"""What a source of each kind and the model must agree on: weights of one shape can still compute two things."""


def initialise_from(model: nn.Module, card: ModelCard, origin: str | Towers, wanted_by: str) -> list[str]:
    """Copy the weights of `origin` into `model`; returns the names of the heads that stay new.

    Image positions are interpolated to the model's grid, text positions cut to its length, and image slots that the
    origin lacks start as its last. Heads are taken where the origin has the same one.

    Raises:
        UserError: if the origin is of another architecture or reads other tokens; all weights are accounted for.
    """
    names = [origin] if isinstance(origin, str) else [origin.text, origin.image]
    wanted = [None] if isinstance(origin, str) else ["text-tower", "image-tower"]
    weights: Weights = {}
    heads: set[str] = set()
    new: tuple[str, ...] = ("heads.",)
    for name, kind in zip(names, wanted, strict=True):
        source = read_source(name, wanted_by)
        if kind and source.kind != kind:
            raise UserError(f"{wanted_by} {name!r} is of kind {source.kind}, where a {kind} is asked for")
        require_same_vocabulary(source, card.vocabulary, wanted_by)
        weights |= _routed(source, card.config, wanted_by)
        heads |= {task for task, spec in card.heads.items() if source.heads.get(task) == spec}
        new += NEW.get((source.kind, card.config.kind), ())
    own = model.state_dict()
    taken = {n: x for n, x in weights.items() if n in own or not n.startswith(new)}
    taken = {n: x for n, x in taken.items() if not n.startswith("heads.")}
    foreign = [n for n in taken if n not in own] + [n for n in own if n not in taken and not n.startswith(new)]
    foreign += [n for n, x in taken.items() if n in own and own[n].shape != x.shape]
    if foreign:
        shown = ", ".join(sorted(foreign)[:6]) + (f" and {len(foreign) - 6} more" if len(foreign) > 6 else "")
        raise UserError(
            f"{wanted_by} {' and '.join(names)!r} is of another architecture than `model`: it does not fit in {shown}"
        )
    fresh = []
    for task in card.heads:
        mine = {n: x.shape for n, x in own.items() if n.startswith(f"heads.{task}.")}
        theirs = {n: x.shape for n, x in weights.items() if n.startswith(f"heads.{task}.")}
        if task in heads and mine == theirs:
            taken |= {n: weights[n] for n in mine}
        else:
            fresh.append(task)
    model.load_state_dict({**own, **taken})
    return fresh


def adapted(weights: Mapping[str, Tensor], config: ModelConfig) -> Weights:
    """Weights whose position tables and slots are of the sizes of `config`.

    Raises:
        UserError: if the text positions are fewer than `config` asks for; they cannot be made up.
    """
    changed = dict(weights)
    for name, tensor in weights.items():
        if name == "image_embedding.position":
            changed[name] = resized_positions(tensor, config.image_size // config.patch_size)
        elif name == "text_embedding.position.weight":
            if len(tensor) < config.max_text_length:
                raise UserError(
                    f"model.max_text_length is {config.max_text_length}, and the weights to start from have "
                    f"{len(tensor)} text positions; it can be {len(tensor)} at most"
                )
            changed[name] = tensor[: config.max_text_length]
        elif name in ("image_embedding.modality.weight", "fusion.image.modality.weight"):
            # ViLT's rule for NLVR2: the second image's type starts as the first's.
            last = tensor[-1:].expand(max(0, config.num_slots - len(tensor)), -1)
            changed[name] = torch.cat([tensor[: config.num_slots], last])
    return changed


def resized_positions(table: Tensor, cells: int) -> Tensor:
    """Position table [1 + n*n, D] of a class token and a grid, as [1 + cells*cells, D].

    Bilinear with aligned corners, as ViLT does at every forward (arXiv:2102.03334).
    """
    side = isqrt(len(table) - 1)
    if side == cells:
        return table
    grid = table[1:].T.reshape(1, -1, side, side)
    resized = F.interpolate(grid, size=(cells, cells), mode="bilinear", align_corners=True)
    return torch.cat([table[:1], resized.flatten(2)[0].T])


def require_same_vocabulary(source: Source, entries: tuple[str, ...], wanted_by: str) -> None:
    """Raises UserError if a source does not read the same token ids: its embeddings would be of other words."""
    if source.kind == "image-tower":
        return
    if source.vocabulary is not None and source.vocabulary != entries:
        raise UserError(
            f"{wanted_by} {source.name!r} reads another vocabulary ({len(source.vocabulary)} entries) than "
            f"data.vocabulary ({len(entries)}); both must be the same"
        )
    rows = len(source.weights["text_embedding.word.weight"])
    if source.vocabulary is None and (digest(entries) != BERT_UNCASED or rows != len(entries)):
        raise UserError(
            f"{wanted_by} {source.name!r} has {rows} word embeddings and no vocab.txt beside it, so it must read "
            f"bert-base-uncased; data.vocabulary must be bert-base-uncased then, and has {len(entries)} other entries"
        )


def digest(entries: tuple[str, ...]) -> str:
    """Of a vocabulary's entries, in their order."""
    return sha256("\n".join(entries).encode()).hexdigest()[:16]


def _routed(source: Source, config: ModelConfig, wanted_by: str) -> Weights:
    if (source.kind, config.kind) not in ROUTES:
        raise UserError(
            f"{wanted_by} {source.name!r} is of kind {source.kind}, which a {config.kind} cannot start from"
        )
    for key in ALIKE[source.kind]:
        ours, theirs = getattr(config, key), getattr(source.config, key)
        if ours != theirs:
            raise UserError(
                f"{wanted_by} {source.name!r} is of another architecture than `model`: its {key} is {theirs} and "
                f"model.{key} is {ours}"
            )
    return ROUTES[source.kind, config.kind](adapted(source.weights, config))
