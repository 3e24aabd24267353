"""How other projects name the weights of the same models, as tables that read both ways.

A Layout lists, for each of our names, theirs and the Form between them; `{i}` is a layer, `{p}` is weight and bias.
A new one is a table here and a line in LAYOUTS. Layouts: algorithm facts of ViLT (arXiv:2102.03334, the authors' files
and transformers'), BERT (transformers) and ViT (timm).
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]


class Form(NamedTuple):
    """How their tensors of one entry become ours, and back."""

    read: Callable[[Sequence[Tensor]], Sequence[Tensor]]
    write: Callable[[Sequence[Tensor]], Sequence[Tensor]]


SAME = Form(lambda theirs: theirs, lambda ours: ours)
JOINED = Form(lambda theirs: [torch.cat(list(theirs))], lambda ours: ours[0].chunk(3))
"""Queries, keys and values as one projection, in this order, each head's rows contiguous."""
TOKEN = Form(lambda theirs: [theirs[0].flatten()], lambda ours: [ours[0][None, None]])
TABLE = Form(lambda theirs: [theirs[0][0]], lambda ours: [ours[0][None]])
FIRST = Form(lambda theirs: [theirs[0][0]], lambda ours: [torch.stack([ours[0], torch.zeros_like(ours[0])])])
"""BERT's sentence types, of which a single text uses the first."""
TYPES = Form(lambda theirs: [theirs[0][0], theirs[0][1:]], lambda ours: [torch.cat([ours[0][None], ours[1]])])
"""ViLT's modality types: row 0 is text, each later row an image slot."""


class Entry(NamedTuple):
    """Names that stand for the same numbers."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    form: Form = SAME


class Layout(NamedTuple):
    """One way to name a model's weights."""

    kind: str  # what it is: a model of ours, or one tower of it
    prefix: str  # before every name of the body, in files of a model with a head
    sign: str  # a name of the body that no other layout has
    body: tuple[Entry, ...]
    heads: dict[str, tuple[Entry, ...]]  # task -> its head
    unread: tuple[str, ...]  # beginnings of names that hold nothing we use
    renamed: tuple[tuple[str, str], ...] = ()  # endings that older files have, and today's


class Weights(NamedTuple):
    """A file's weights under our names."""

    body: dict[str, Tensor]
    heads: dict[str, dict[str, Tensor]]  # task -> names after `heads.<task>.`


def _same(ours: str, theirs: str) -> Entry:
    return Entry((ours,), (theirs,))


def _vit(block: str, tower: str) -> tuple[Entry, ...]:
    """timm's names of a pre-norm block."""
    return (
        _same(f"{tower}.blocks.{{i}}.norm_attention.{{p}}", f"{block}.norm1.{{p}}"),
        _same(f"{tower}.blocks.{{i}}.norm_feed.{{p}}", f"{block}.norm2.{{p}}"),
        _same(f"{tower}.blocks.{{i}}.attention.qkv.{{p}}", f"{block}.attn.qkv.{{p}}"),
        _same(f"{tower}.blocks.{{i}}.attention.out.{{p}}", f"{block}.attn.proj.{{p}}"),
        _same(f"{tower}.blocks.{{i}}.feed.0.{{p}}", f"{block}.mlp.fc1.{{p}}"),
        _same(f"{tower}.blocks.{{i}}.feed.2.{{p}}", f"{block}.mlp.fc2.{{p}}"),
    )


def _transformers(attention: str, tower: str, norms: tuple[str, str]) -> tuple[Entry, ...]:
    """transformers' names of a block, its queries, keys and values apart."""
    layer = "encoder.layer.{i}"
    split = tuple(f"{layer}.attention.{attention}.{part}.{{p}}" for part in ("query", "key", "value"))
    return (
        _same(f"{tower}.blocks.{{i}}.norm_attention.{{p}}", f"{layer}.{norms[0]}.{{p}}"),
        _same(f"{tower}.blocks.{{i}}.norm_feed.{{p}}", f"{layer}.{norms[1]}.{{p}}"),
        Entry((f"{tower}.blocks.{{i}}.attention.qkv.{{p}}",), split, JOINED),
        _same(f"{tower}.blocks.{{i}}.attention.out.{{p}}", f"{layer}.attention.output.dense.{{p}}"),
        _same(f"{tower}.blocks.{{i}}.feed.0.{{p}}", f"{layer}.intermediate.dense.{{p}}"),
        _same(f"{tower}.blocks.{{i}}.feed.2.{{p}}", f"{layer}.output.dense.{{p}}"),
    )


def _text(embeddings: str) -> tuple[Entry, ...]:
    """BERT's names of its embeddings."""
    return (
        _same("text_embedding.word.weight", f"{embeddings}.word_embeddings.weight"),
        _same("text_embedding.position.weight", f"{embeddings}.position_embeddings.weight"),
        Entry(("text_embedding.sentence",), (f"{embeddings}.token_type_embeddings.weight",), FIRST),
        _same("text_embedding.norm.{p}", f"{embeddings}.LayerNorm.{{p}}"),
    )


def _image(class_token: str, position: str, patches: str) -> tuple[Entry, ...]:
    return (
        Entry(("image_embedding.class_token",), (class_token,), TOKEN),
        Entry(("image_embedding.position",), (position,), TABLE),
        _same("image_embedding.stem.{p}", f"{patches}.{{p}}"),
    )


def _types(theirs: str) -> Entry:
    return Entry(("text_embedding.modality", "image_embedding.modality.weight"), (theirs,), TYPES)


def _classifier(theirs: str) -> tuple[Entry, ...]:
    return tuple(_same(f"{i}.{{p}}", f"{theirs}.{i}.{{p}}") for i in (0, 1, 3))


def _mlm(bias: str) -> tuple[Entry, ...]:
    return (
        _same("dense.{p}", "mlm_score.transform.dense.{p}"),
        _same("norm.{p}", "mlm_score.transform.LayerNorm.{p}"),
        _same("decoder.weight", "mlm_score.decoder.weight"),
        _same("decoder.bias", bias),
    )


LAYOUTS: dict[str, Layout] = {
    "ViLT's own": Layout(
        kind="fusion-encoder",
        prefix="",
        sign="transformer.blocks.0.norm1.weight",
        body=(
            *_text("text_embeddings"),
            *_image("transformer.cls_token", "transformer.pos_embed", "transformer.patch_embed.proj"),
            _types("token_type_embeddings.weight"),
            *_vit("transformer.blocks.{i}", "encoder"),
            _same("encoder.norm.{p}", "transformer.norm.{p}"),
            _same("pool.{p}", "pooler.dense.{p}"),
        ),
        heads={
            "mlm": _mlm("mlm_score.bias"),
            "itm": (_same("{p}", "itm_score.fc.{p}"),),
            "vqa": _classifier("vqa_classifier"),
            "nlvr2": _classifier("nlvr2_classifier"),
            "retrieval": (_same("{p}", "rank_output.{p}"),),
        },
        unread=("text_embeddings.position_ids", "transformer.head.", "transformer.head_dist."),
    ),
    "transformers' ViLT": Layout(
        kind="fusion-encoder",
        prefix="vilt.",
        sign="encoder.layer.0.layernorm_before.weight",
        body=(
            *_text("embeddings.text_embeddings"),
            *_image("embeddings.cls_token", "embeddings.position_embeddings", "embeddings.patch_embeddings.projection"),
            _types("embeddings.token_type_embeddings.weight"),
            *_transformers("attention", "encoder", ("layernorm_before", "layernorm_after")),
            _same("encoder.norm.{p}", "layernorm.{p}"),
            _same("pool.{p}", "pooler.dense.{p}"),
        ),
        heads={
            "mlm": _mlm("mlm_score.decoder.bias"),
            "vqa": _classifier("classifier"),
            "nlvr2": _classifier("classifier"),
            "retrieval": (_same("{p}", "rank_output.{p}"),),
        },
        unread=("embeddings.text_embeddings.position_ids",),
        renamed=(("mlm_score.bias", "mlm_score.decoder.bias"),),
    ),
    "transformers' BERT": Layout(
        kind="text-tower",
        prefix="bert.",
        sign="encoder.layer.0.attention.self.query.weight",
        body=(
            *_text("embeddings"),
            *_transformers("self", "text_tower", ("attention.output.LayerNorm", "output.LayerNorm")),
        ),
        heads={},
        unread=("embeddings.position_ids", "pooler.", "cls."),
        renamed=((".gamma", ".weight"), (".beta", ".bias")),
    ),
    "timm's ViT": Layout(
        kind="image-tower",
        prefix="",
        sign="blocks.0.norm1.weight",
        body=(
            *_image("cls_token", "pos_embed", "patch_embed.proj"),
            *_vit("blocks.{i}", "image_tower"),
            _same("image_tower.norm.{p}", "norm.{p}"),
        ),
        heads={},
        unread=("head.", "pre_logits."),
    ),
}


def read(layout: Layout, tensors: Tensors, heads: Iterable[str]) -> tuple[Weights, list[str]]:
    """Their tensors under our names, and what does not fit: names that are missing or that nobody reads.

    A head of `heads` is read if any of its names is there, and then it must be there whole.
    """
    named: dict[str, Tensor] = {}
    twice = []
    for name, tensor in tensors.items():
        today = _today(layout, name)
        if today in named and not torch.equal(named[today], tensor):
            twice.append(f"{name} (twice, and not equal)")
        named[today] = tensor
    body, used, lacking = _read(_expand(layout.body, named), named)
    found: dict[str, dict[str, Tensor]] = {}
    for task in heads:
        entries = _expand(layout.heads[task], named)
        if any(name in named for entry in entries for name in entry.theirs):
            found[task], more, missing = _read(entries, named)
            used, lacking = used | more, lacking + missing
    unread = [n for n in named if n not in used and not n.startswith(layout.unread)]
    return Weights(body, found), [f"{n} (missing)" for n in lacking] + [f"{n} (unknown)" for n in unread] + twice


def write(layout: Layout, weights: Weights) -> dict[str, Tensor]:
    """Our weights under their names, without the prefix: the inverse of `read`."""
    theirs: dict[str, Tensor] = {}
    parts = [(layout.body, weights.body), *((layout.heads[task], head) for task, head in weights.heads.items())]
    for entries, ours in parts:
        for entry in _expand(entries, ours, side="ours"):
            theirs |= zip(entry.theirs, entry.form.write([ours[name] for name in entry.ours]), strict=True)
    return theirs


def num_layers(names: Iterable[str], stem: str) -> int:
    """How many layers there are among `names`, each of which begins with `stem` and a number from 0 on."""
    found = (re.match(rf"{re.escape(stem)}(\d+)\.", name) for name in names)
    return max((int(match[1]) + 1 for match in found if match), default=0)


def _today(layout: Layout, name: str) -> str:
    name = name.removeprefix(layout.prefix)
    for old, new in layout.renamed:
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name


def _expand(entries: Iterable[Entry], tensors: Tensors, side: str = "theirs") -> list[Entry]:
    """Every entry once for each layer that is there, and for weight and bias."""
    expanded = []
    for entry in entries:
        first = getattr(entry, side)[0]
        layers = range(num_layers(tensors, first.split("{i}")[0])) if "{i}" in first else range(1)
        params = ("weight", "bias") if "{p}" in first else ("",)
        for i in layers:
            for p in params:
                ours, theirs = (
                    tuple(name.replace("{i}", str(i)).replace("{p}", p) for name in names)
                    for names in (entry.ours, entry.theirs)
                )
                expanded.append(Entry(ours, theirs, entry.form))
    return expanded


def _read(entries: Iterable[Entry], tensors: Tensors) -> tuple[dict[str, Tensor], set[str], list[str]]:
    """What the entries give, the names they used, and those they lack."""
    ours: dict[str, Tensor] = {}
    used: set[str] = set()
    lacking: list[str] = []
    for entry in entries:
        missing = [name for name in entry.theirs if name not in tensors]
        lacking += missing
        if not missing:
            ours |= zip(entry.ours, entry.form.read([tensors[name] for name in entry.theirs]), strict=True)
            used.update(entry.theirs)
    return ours, used, lacking
