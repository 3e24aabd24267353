"""The same pre-training step written from transformers' parts: what it is where nothing of ours is used.

One pass of teacher and student for each objective, attention maps computed and kept where they are compared, the
teacher's cross-modal maps sliced from its joint map and normalised again. The student has our architecture and, copied,
our weights; so both steps have the same losses.
"""

from collections.abc import Iterator
from copy import deepcopy
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, ViTConfig
from transformers.models.bert.modeling_bert import (
    BertAttention,
    BertEmbeddings,
    BertIntermediate,
    BertOutput,
    BertPooler,
)
from transformers.models.vit.modeling_vit import ViTEmbeddings, ViTLayer

from dist_fusion.bench.hugging_face import Peer
from dist_fusion.bench.pretraining import AdamW
from dist_fusion.config import Config
from dist_fusion.models.config import ModelConfig
from dist_fusion.models.heads import Features
from dist_fusion.models.layouts import JOINED, SAME, TABLE, TOKEN, Entry, Form, Layout, Weights, write
from dist_fusion.models.student import Student
from dist_fusion.types import Batch, to_device

MASKED_OUT = -100
"""Label of text tokens that nobody asks for, by convention."""


class Pass(NamedTuple):
    """What one objective runs on: B pairs, every image and text of its own."""

    images: Tensor  # [B, 3, h, w]
    text_ids: Tensor  # [B, L]
    text_mask: Tensor  # [B, L] bool
    labels: Tensor  # [B] of matching, or [B, L] of masked words; [0] of contrast


class Said(NamedTuple):
    """What the dual encoder says of a pass."""

    features: Features
    log_maps: dict[str, Tensor]  # site -> log of its attention rows [B, H, M, N]


def passes(batch: Batch) -> dict[str, Pass]:
    """The objectives of a pair batch, each with its own images and texts."""
    masked, asked = batch.targets["mlm"].rows[:, 0].unique(return_inverse=True)
    places = batch.targets["mlm"].rows[:, 1]
    words = batch.text_ids.new_full((len(masked), batch.text_ids.shape[1]), MASKED_OUT)
    words[asked, places] = batch.targets["mlm"].labels
    pairs = {
        "mlm": (batch.pairs[masked], words),
        "itm": (batch.pairs[batch.targets["itm"].rows[:, 0]], batch.targets["itm"].labels),
        "itc": (batch.targets["itc"].rows, words.new_zeros(0)),
    }
    return {
        name: Pass(batch.images[rows[:, 0]], batch.text_ids[rows[:, 1]], batch.text_mask[rows[:, 1]], labels)
        for name, (rows, labels) in pairs.items()
    }


class CrossLayer(nn.Module):
    """Cross-attention, self-attention and feed-forward from BERT's parts."""

    def __init__(self, config: BertConfig, cross: BertConfig):
        super().__init__()
        self.cross = BertAttention(cross, is_cross_attention=True)
        self.own = BertAttention(config)
        self.intermediate, self.output = BertIntermediate(config), BertOutput(config)

    def forward(
        self, x: Tensor, mask: Tensor | None, other: Tensor, other_mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """x [B, M, D] beside other [B, N, D] -> [B, M, D], and the cross-attention map if it is shown."""
        x, attention = self.cross(x, encoder_hidden_states=other, encoder_attention_mask=other_mask)
        x, _ = self.own(x, mask)
        return self.output(self.intermediate(x), x), attention


class Side(nn.Module):
    """One modality: its tower's layers, and its half of the bridge tower."""

    def __init__(self, config: ModelConfig, attention: str):
        super().__init__()
        sizes: dict[str, Any] = {
            "hidden_size": config.width,
            "intermediate_size": 4 * config.width,
            "num_attention_heads": config.num_heads,
            "hidden_dropout_prob": config.dropout,
            "attention_probs_dropout_prob": 0.0,
        }
        vit = ViTConfig(**sizes, layer_norm_eps=1e-6)
        bert, shown = (BertConfig(**sizes, layer_norm_eps=1e-5) for _ in range(2))
        vit._attn_implementation = bert._attn_implementation = attention
        shown._attn_implementation = "eager"
        self.layers = nn.ModuleList(ViTLayer(vit) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.width, eps=1e-6)
        self.modality = nn.Parameter(torch.zeros(config.width))
        self.project = nn.Linear(config.width, config.width)
        self.fused_modality = nn.Parameter(torch.zeros(config.width))
        depth = config.num_fusion_layers
        self.bridges = nn.ModuleList(nn.LayerNorm(config.width, eps=1e-5) for _ in range(depth))
        self.cross_layers = nn.ModuleList(CrossLayer(bert, shown if i == depth - 1 else bert) for i in range(depth))
        self.pooler = BertPooler(bert)
        self.taken: dict[str, Tensor] = {}
        attention_of_top = self.layers[-1].get_submodule("attention")
        for name in ("q_proj", "k_proj"):
            attention_of_top.get_submodule(name).register_forward_hook(
                lambda _, given, out, name=name: self.taken.update({name: out})
            )

    def tower(self, x: Tensor, mask: Tensor | None) -> tuple[list[Tensor], Tensor, Tensor]:
        """The last layers' outputs, one a bridge, and the top layer's queries and keys [B, H, L, K]."""
        hidden = []
        for layer in self.layers:
            x = layer(x, mask)
            hidden.append(x)
        heads = self.layers[0].get_submodule("attention").num_attention_heads
        query, key = (self.taken.pop(name).unflatten(-1, (heads, -1)).transpose(1, 2) for name in ("q_proj", "k_proj"))
        return [self.norm(x) for x in hidden[-len(self.bridges) :]], query, key


class Dual(nn.Module):
    """The dual encoder with the pre-interaction bridge tower on the top layers (`ModelConfig`'s defaults)."""

    def __init__(self, config: ModelConfig, heads: nn.ModuleDict, vocabulary_size: int, attention: str):
        super().__init__()
        self.text_embeddings = BertEmbeddings(
            BertConfig(
                vocab_size=vocabulary_size,
                hidden_size=config.width,
                max_position_embeddings=config.max_text_length,
                type_vocab_size=1,
                layer_norm_eps=1e-12,
                hidden_dropout_prob=config.dropout,
            )
        )
        self.image_embeddings = ViTEmbeddings(
            ViTConfig(
                hidden_size=config.width,
                image_size=config.image_size,
                patch_size=config.patch_size,
                hidden_dropout_prob=config.dropout,
            )
        )
        self.text, self.image = Side(config, attention), Side(config, attention)
        self.heads = heads

    def forward(self, given: Pass, mapped: bool) -> Said:
        """The features of a pass, and its cross-modal maps if they are to be compared."""
        x = self.text_embeddings(given.text_ids) + self.text.modality
        y = self.image_embeddings(given.images.to(x.dtype)) + self.image.modality
        mask = additive(given.text_mask, x.dtype)
        words, text_query, text_key = self.text.tower(x, mask)
        patches, image_query, image_key = self.image.tower(y, None)
        x, y = torch.zeros_like(words[0]), torch.zeros_like(patches[0])
        for i, (word, patch) in enumerate(zip(words, patches, strict=True)):
            x_in = self.text.bridges[i](x + self.text.project(word) + self.text.fused_modality)
            y_in = self.image.bridges[i](y + self.image.project(patch) + self.image.fused_modality)
            x, text_map = self.text.cross_layers[i](x_in, mask, y_in, None)
            y, image_map = self.image.cross_layers[i](y_in, None, x_in, mask)
        features = Features(
            torch.cat([self.text.pooler(x), self.image.pooler(y)], -1), x, patches[-1][:, 0], words[-1][:, 0]
        )
        if not mapped:
            return Said(features, {})
        maps = {
            "tower.t2i": log_map(text_query, image_key, None),
            "tower.i2t": log_map(image_query, text_key, given.text_mask),
            "bridge.t2i": log_of(text_map),
            "bridge.i2t": log_of(image_map),
        }
        return Said(features, maps)


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask [B, L] as what is added to scores, [B, 1, 1, L]."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)[:, None, None, :]


def log_map(query: Tensor, key: Tensor, key_mask: Tensor | None) -> Tensor:
    """Log of the attention rows of queries over keys, finite at masked keys (with -inf `kl_div` is NaN there)."""
    scores = query.float() @ key.float().transpose(-2, -1) * query.shape[-1] ** -0.5
    if key_mask is not None:
        scores = scores + additive(key_mask, torch.float32)
    return scores.log_softmax(-1).clamp(min=torch.finfo(torch.float32).min)


def log_of(attention: Tensor) -> Tensor:
    """Log of attention rows, finite where they are 0 (with -inf `kl_div` is NaN there)."""
    return attention.float().clamp(min=torch.finfo(torch.float32).tiny).log()


def divergence(log_map: Tensor, taught: Tensor, query_mask: Tensor | None) -> Tensor:
    """KL(teacher || student) of rows [B, H, M, N], a mean over heads and valid queries, summed over pairs."""
    rows = F.kl_div(log_map, taught, reduction="none").sum(-1).mean(1)
    if query_mask is None:
        return rows.mean(-1).sum()
    return ((rows * query_mask).sum(-1) / query_mask.sum(-1)).sum()


class Composed(NamedTuple):
    """A student on its way, and what it is given at every step."""

    config: Config
    student: Dual
    teacher: Peer
    passes: dict[str, Pass]  # as a loader gives them
    every_word: bool  # the word head reads all tokens, as published code does; else the masked ones alone
    optimizer: AdamW
    device: torch.device

    def terms(self) -> Iterator[tuple[str, Tensor]]:
        """The losses by name: a task's hard and soft labels, and each site's attention pass by pass."""
        tasks, distill = self.config.active_tasks(), self.config.distill
        attended = {name: getattr(task, "attention", 0.0) for name, task in tasks.items()}
        total = sum(attended[name] * len(one.images) for name, one in self.passes.items())
        for name, cpu in self.passes.items():
            given: Pass = to_device(cpu, self.device)
            mapped = attended[name] > 0
            with torch.no_grad():
                taught = self.teacher.on_raster(
                    given.images, given.text_ids, given.text_mask, maps=mapped or self.every_word
                )
            length = given.text_ids.shape[1]
            heard = Features(taught.pooled, taught.tokens[:, :length])
            said = self.student(given, mapped)
            for kind, loss in LOSSES[name](self, given, said.features, heard):
                yield f"{kind}/{name}", loss * getattr(distill, kind) * tasks[name].weight
            if mapped:
                joint = taught.maps[-1].float()
                blocks = {"t2i": joint[:, :, :length, length:], "i2t": joint[:, :, length:, :length]}
                again = {site: block / block.sum(-1, keepdim=True) for site, block in blocks.items()}
                for site, log in said.log_maps.items():
                    way = site.split(".")[1]
                    loss = divergence(log, again[way], given.text_mask if way == "t2i" else None)
                    yield f"attention/{site}", loss * distill.attention * attended[name] / total

    def loss(self) -> dict[str, Tensor]:
        """All of a step's forward; a term of several passes is their sum."""
        summed: dict[str, Tensor] = {}
        for name, loss in self.terms():
            summed[name] = summed[name] + loss if name in summed else loss
        return summed

    def step(self) -> None:
        """One optimizer step."""
        sum(self.loss().values(), torch.zeros((), device=self.device)).backward()
        self.optimizer.step()


def _contrast(step: Composed, given: Pass, said: Features, heard: Features) -> Iterator[tuple[str, Tensor]]:
    own = torch.arange(len(given.images), device=step.device)
    logits = step.student.heads["itc"](said, own[:, None].expand(-1, 2))
    yield "hard", (F.cross_entropy(logits[:, 0], own) + F.cross_entropy(logits[:, 1], own)) / 2


def _matching(step: Composed, given: Pass, said: Features, heard: Features) -> Iterator[tuple[str, Tensor]]:
    own = torch.arange(len(given.images), device=step.device)[:, None]
    logits, taught = step.student.heads["itm"](said, own).float(), step.teacher.heads["itm"](heard, own).float()
    yield "hard", F.cross_entropy(logits, given.labels)
    yield "soft", F.kl_div(logits.log_softmax(-1), taught.softmax(-1), reduction="batchmean")


def _words(step: Composed, given: Pass, said: Features, heard: Features) -> Iterator[tuple[str, Tensor]]:
    masked = given.labels != MASKED_OUT
    rows = (torch.ones_like(masked) if step.every_word else masked).nonzero()
    asked = masked[rows[:, 0], rows[:, 1]]
    logits = step.student.heads["mlm"](said, rows)
    with torch.no_grad():
        taught = step.teacher.heads["mlm"](heard, rows)
    yield "hard", F.cross_entropy(logits.float(), given.labels[rows[:, 0], rows[:, 1]], ignore_index=MASKED_OUT)
    guess, target = logits[asked].float().log_softmax(-1), taught[asked].float().softmax(-1)
    yield "soft", F.kl_div(guess, target, reduction="batchmean")


LOSSES = {"mlm": _words, "itm": _matching, "itc": _contrast}
"""Losses of an objective by kind, from the student's and the teacher's features."""


ROW = Form(lambda theirs: [theirs[0][None]], lambda ours: [ours[0][0]])
"""The one row of a table of types."""


def _named(ours: str, theirs: str, form: Form = SAME) -> Entry:
    return Entry((ours,), (theirs,), form)


def _side(side: str) -> tuple[Entry, ...]:
    block, layer = f"{side}_tower.blocks.{{i}}", f"{side}.layers.{{i}}"
    cross, theirs = f"fusion.{side}.layers.{{i}}", f"{side}.cross_layers.{{i}}"
    split = tuple(f"{layer}.attention.{part}_proj.{{p}}" for part in "qkv")
    joined = tuple(f"{theirs}.own.self.{part}.{{p}}" for part in ("query", "key", "value"))
    return (
        _named(f"{block}.norm_attention.{{p}}", f"{layer}.layernorm_before.{{p}}"),
        _named(f"{block}.norm_feed.{{p}}", f"{layer}.layernorm_after.{{p}}"),
        Entry((f"{block}.attention.qkv.{{p}}",), split, JOINED),
        _named(f"{block}.attention.out.{{p}}", f"{layer}.attention.o_proj.{{p}}"),
        _named(f"{block}.feed.0.{{p}}", f"{layer}.mlp.fc1.{{p}}"),
        _named(f"{block}.feed.2.{{p}}", f"{layer}.mlp.fc2.{{p}}"),
        _named(f"{side}_tower.norm.{{p}}", f"{side}.norm.{{p}}"),
        _named(f"fusion.{side}.project.{{p}}", f"{side}.project.{{p}}"),
        _named(f"fusion.{side}.pool.{{p}}", f"{side}.pooler.dense.{{p}}"),
        _named(f"fusion.{side}.bridges.{{i}}.{{p}}", f"{side}.bridges.{{i}}.{{p}}"),
        *(
            _named(f"{cross}.cross_attention.{part}.{{p}}", f"{theirs}.cross.self.{part}.{{p}}")
            for part in ("query", "key", "value")
        ),
        _named(f"{cross}.cross_attention.out.{{p}}", f"{theirs}.cross.output.dense.{{p}}"),
        _named(f"{cross}.norms.cross.{{p}}", f"{theirs}.cross.output.LayerNorm.{{p}}"),
        Entry((f"{cross}.self_attention.qkv.{{p}}",), joined, JOINED),
        _named(f"{cross}.self_attention.out.{{p}}", f"{theirs}.own.output.dense.{{p}}"),
        _named(f"{cross}.norms.self.{{p}}", f"{theirs}.own.output.LayerNorm.{{p}}"),
        _named(f"{cross}.feed.0.{{p}}", f"{theirs}.intermediate.dense.{{p}}"),
        _named(f"{cross}.feed.2.{{p}}", f"{theirs}.output.dense.{{p}}"),
        _named(f"{cross}.norms.feed.{{p}}", f"{theirs}.output.LayerNorm.{{p}}"),
    )


NAMES = Layout(
    kind="dual-encoder",
    prefix="",
    sign="text.layers.0.layernorm_before.weight",
    body=(
        _named("text_embedding.word.weight", "text_embeddings.word_embeddings.weight"),
        _named("text_embedding.position.weight", "text_embeddings.position_embeddings.weight"),
        _named("text_embedding.sentence", "text_embeddings.token_type_embeddings.weight", TABLE),
        _named("text_embedding.norm.{p}", "text_embeddings.LayerNorm.{p}"),
        _named("text_embedding.modality", "text.modality"),
        _named("image_embedding.class_token", "image_embeddings.cls_token", TOKEN),
        _named("image_embedding.position", "image_embeddings.position_embeddings", TABLE),
        _named("image_embedding.stem.{p}", "image_embeddings.patch_embeddings.projection.{p}"),
        _named("image_embedding.modality.weight", "image.modality", ROW),
        _named("fusion.text.modality.weight", "text.fused_modality", ROW),
        _named("fusion.image.modality.weight", "image.fused_modality", ROW),
        *_side("text"),
        *_side("image"),
    ),
    heads={},
    unread=(),
)
"""Our names of the student's weights, and those of `Dual`."""


def build(
    config: Config,
    ours: Student,
    teacher: Peer,
    batch: Batch,
    *,
    attention: str,
    every_word: bool,
    device: torch.device,
) -> Composed:
    """A student with the weights of `ours`; `attention` is how layers attend whose maps nobody reads."""
    weights = {name: tensor for name, tensor in ours.state_dict().items() if not name.startswith("heads.")}
    vocabulary_size = len(weights["text_embedding.word.weight"])
    student = Dual(config.model, deepcopy(ours.heads), vocabulary_size, attention).to(
        device, next(ours.parameters()).dtype
    )
    named = write(NAMES, Weights(weights, {}))
    missing, unexpected = student.load_state_dict(named, strict=False)
    assert not unexpected and all(name.startswith("heads.") for name in missing), (missing, unexpected)
    return Composed(
        config=config,
        student=student,
        teacher=teacher.requires_grad_(False).eval(),
        passes=passes(batch),
        every_word=every_word,
        optimizer=AdamW(student, config.optimizer),
        device=device,
    )
