"""Where weights come from: a run of ours, a Hugging Face folder or id, or a file of another project.

Nothing in a file can run code: safetensors, or `torch.load(weights_only=True)`. Every key is accounted for.
"""

import hashlib
import json
import pickle
import re
from math import isqrt
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dist_fusion.models.config import ModelConfig
from dist_fusion.models.layouts import LAYOUTS, Layout, num_layers, read
from dist_fusion.models.weights import load_model
from dist_fusion.schema import UserError, build
from dist_fusion.types import HeadSpec, meaning_of

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
FILES = {".ckpt", ".safetensors", ".bin", ".pt", ".pth"}
"""Endings of files of weights: such a name is never looked for on the hub."""
ARCHITECTURES: dict[str, tuple[str, ...]] = {
    "ViltModel": (),
    "ViltForMaskedLM": ("mlm",),
    "ViltForQuestionAnswering": ("vqa",),
    "ViltForImagesAndTextClassification": ("nlvr2",),
    "ViltForImageAndTextRetrieval": ("retrieval",),
}
"""transformers' classes with ViLT's layout, and the head in their files."""
HEAD_WIDTH = 64
"""Of every model whose file has no config.json: ViLT, BERT and ViT of all sizes."""


class Source(NamedTuple):
    """Weights under our names, and what they are the weights of."""

    name: str  # as the user gave it
    kind: str  # "dual-encoder", "fusion-encoder", "text-tower" or "image-tower"
    config: ModelConfig
    heads: dict[str, HeadSpec]
    vocabulary: tuple[str, ...] | None  # None where the files do not tell
    weights: dict[str, Tensor]


class Files(NamedTuple):
    """What belongs to one set of weights on disk."""

    weights: Path
    config: dict[str, Any] | None  # Hugging Face's config.json
    vocabulary: Path | None


def read_source(name: str, wanted_by: str) -> Source:
    """The weights that `name` stands for; raises UserError, naming the key `wanted_by`, if it holds none that we know.

    `name` is the folder of a finished run, a Hugging Face folder or id (`dandelin/vilt-b32-mlm`), or a file
    (`vilt_200k_mlm_itm.ckpt`, a BERT's, a timm ViT's).
    """
    if (Path(name) / "model.json").exists():
        card, weights = load_model(name, wanted_by)
        return Source(name, card.config.kind, card.config, card.heads, card.vocabulary, weights)
    files = _find(name, wanted_by)
    tensors = _tensors(files.weights, wanted_by)
    layout = _layout_of(tensors)
    if layout is None:
        raise UserError(
            f"{wanted_by} is {name!r}, whose weights are named as in none of: ours, {', '.join(LAYOUTS)}; "
            f"the first name is {next(iter(tensors), 'none')!r}"
        )
    wanted = _heads_told(layout, files, wanted_by)
    if wanted == ("mlm",) and (files.config or {}).get("tie_word_embeddings", True):
        tensors = {**_tied_decoder(tensors), **tensors}
    found, misfits = read(layout, tensors, wanted)
    if layout is LAYOUTS["ViLT's own"] and "retrieval" in found.heads:
        found.heads.pop("itm", None)  # a retrieval file still has it, as it was before the body was fine-tuned
    if misfits:
        shown = ", ".join(misfits[:8]) + (f" and {len(misfits) - 8} more" if len(misfits) > 8 else "")
        raise UserError(f"{wanted_by} is {name!r}, which is not whole or holds more than a model: {shown}")
    specs = {task: _spec(task, head, files.config) for task, head in found.heads.items()}
    weights = {**found.body, **{f"heads.{t}.{n}": x for t, head in found.heads.items() for n, x in head.items()}}
    vocabulary = None
    if files.vocabulary is not None:
        vocabulary = (*files.vocabulary.read_text(encoding="utf-8").splitlines(),)
    config = build(ModelConfig, _sizes(layout, found.body, files.config), f"{wanted_by} {name!r}")
    return Source(name, layout.kind, config, specs, vocabulary, {n: x.float() for n, x in weights.items()})


def source_digest(name: str, wanted_by: str) -> str:
    """SHA-256 of a source's weights."""
    with _find(name, wanted_by).weights.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _find(name: str, wanted_by: str) -> Files:
    path = Path(name)
    if path.is_file():
        return _beside(path.parent, path)
    if path.is_dir():
        for file in WEIGHT_FILES:
            if (path / file).is_file():
                return _beside(path, path / file)
        raise _no_model(name, wanted_by, f"there is no {' or '.join(WEIGHT_FILES)}")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or path.parent.is_dir() or path.suffix in FILES:
        raise _no_model(name, wanted_by, "it does not exist")
    return _beside(*_fetched(name, wanted_by))


def _beside(folder: Path, weights: Path) -> Files:
    """A file of weights with what lies beside it."""
    config, vocabulary = folder / "config.json", folder / "vocab.txt"
    try:
        tree = json.loads(config.read_text()) if config.is_file() else None
    except ValueError as error:
        raise UserError(f"{config} is not JSON: {error}") from None
    return Files(weights, tree, vocabulary if vocabulary.is_file() else None)


def _fetched(name: str, wanted_by: str) -> tuple[Path, Path]:
    """The folder and weights of a Hugging Face id, from its cache or the hub."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    for file in WEIGHT_FILES:
        try:
            folder = Path(snapshot_download(name, allow_patterns=["config.json", "vocab.txt", file]))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            reason = str(error).strip().splitlines()[0]
            raise _no_model(name, wanted_by, f"no such folder, and not to be had from the hub: {reason}") from None
        if (folder / file).is_file():
            return folder, folder / file
    raise _no_model(name, wanted_by, f"the hub has no {' or '.join(WEIGHT_FILES)} for it")


def _no_model(name: str, wanted_by: str, reason: str) -> UserError:
    return UserError(
        f"{wanted_by} is {name!r}, which holds no finished model ({reason}); it must be the folder of a run that has "
        "ended, with model.json and model.safetensors, a Hugging Face folder or id (owner/name), or a file of weights"
    )


def _tensors(path: Path, wanted_by: str) -> dict[str, Tensor]:
    """The tensors of a file by name, none of its code run."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        tree = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        with path.open("rb") as file:
            if not file.read(2).startswith((b"PK", b"\x80")):
                raise UserError(f"{wanted_by} is {str(path)!r}, which is no file of weights at all") from None
        raise UserError(
            f"{wanted_by} is {str(path)!r}, a pickle with more than tensors, which could run code and is not opened "
            f"({str(error).strip().splitlines()[0]}). If you trust it, convert it once: "
            f"python -c \"import torch; f = torch.load('{path}', map_location='cpu', weights_only=False); "
            f"torch.save(f.get('state_dict', f), '{path.with_suffix('.weights.pt')}')\""
        ) from None
    except (OSError, RuntimeError, EOFError, ValueError, SafetensorError) as error:
        raise UserError(f"{wanted_by} is {str(path)!r}, which cannot be read: {error}") from None
    tree = tree.get("state_dict", tree) if isinstance(tree, dict) else tree
    if not isinstance(tree, dict) or not all(isinstance(value, Tensor) for value in tree.values()):
        raise UserError(f"{wanted_by} is {str(path)!r}, which is no dictionary of tensors by name")
    return dict(tree)


def _layout_of(tensors: dict[str, Tensor]) -> Layout | None:
    for layout in LAYOUTS.values():
        if layout.sign in tensors or layout.prefix + layout.sign in tensors:
            return layout
    return None


def _heads_told(layout: Layout, files: Files, wanted_by: str) -> tuple[str, ...]:
    """The heads a file can have. Those of transformers share their names, so its config.json must tell."""
    if layout is not LAYOUTS["transformers' ViLT"]:
        return (*layout.heads,)
    named = (files.config or {}).get("architectures") or []
    if len(named) != 1 or named[0] not in ARCHITECTURES:
        raise UserError(
            f"{wanted_by}: {files.weights} has transformers' names, so a config.json beside it must say in "
            f"`architectures` which of {', '.join(ARCHITECTURES)} it is; it says {named}"
        )
    return ARCHITECTURES[named[0]]


def _tied_decoder(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The decoder that transformers leaves out of its files where it is the word embeddings."""
    words = "vilt.embeddings.text_embeddings.word_embeddings.weight"
    return {"mlm_score.decoder.weight": tensors[words]} if words in tensors else {}


def _spec(task: str, head: dict[str, Tensor], config: dict[str, Any] | None) -> HeadSpec:
    """What a head of another project would be among ours."""
    if task == "vqa":
        count = len(head["3.weight"])
        labels = (config or {}).get("id2label") or {}
        names = [labels.get(str(i), "") for i in range(count)]
        told = len(labels) == count and not any(re.fullmatch(r"LABEL_\d+|", name) for name in names)
        return HeadSpec("classifier", count, meaning=meaning_of(names) if told else "")
    return {
        "mlm": lambda: HeadSpec("token", len(head["decoder.weight"])),
        "itm": lambda: HeadSpec("linear", len(head["weight"])),
        "nlvr2": lambda: HeadSpec("classifier", len(head["3.weight"]), num_pairs=2),
        "retrieval": lambda: HeadSpec("rank", len(head["weight"])),
    }[task]()


def _sizes(layout: Layout, body: dict[str, Tensor], config: dict[str, Any] | None) -> dict[str, Any]:
    """The keys of a ModelConfig that shapes and config.json tell."""
    stack = {"fusion-encoder": "encoder", "text-tower": "text_tower", "image-tower": "image_tower"}[layout.kind]
    width = len(body[f"{stack}.blocks.0.norm_feed.weight"])
    sizes: dict[str, Any] = {
        "kind": "fusion-encoder" if layout.kind == "fusion-encoder" else "dual-encoder",
        "width": width,
        "num_heads": (config or {}).get("num_attention_heads") or max(1, width // HEAD_WIDTH),
        "num_layers": num_layers(body, f"{stack}.blocks."),
        "num_fusion_layers": 1,
    }
    if "text_embedding.position.weight" in body:
        sizes["max_text_length"] = len(body["text_embedding.position.weight"])
    if "image_embedding.position" in body:
        patch = body["image_embedding.stem.weight"].shape[-1]
        sizes |= {"patch_size": patch, "image_size": patch * isqrt(len(body["image_embedding.position"]) - 1)}
    if "image_embedding.modality.weight" in body:
        sizes["num_slots"] = len(body["image_embedding.modality.weight"])
    if layout.kind == "text-tower":
        sizes["text_norm"] = "post"
    return sizes
