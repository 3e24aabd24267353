"""The same small models as other projects build them, with random weights, and the inputs they share with ours."""

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    ViltConfig,
    ViltForImageAndTextRetrieval,
    ViltForImagesAndTextClassification,
    ViltForMaskedLM,
    ViltForQuestionAnswering,
    ViltModel,
)

from dist_fusion.batch import answers_to
from dist_fusion.types import Batch
from tests import tiny

CLASSES: dict[str, type[nn.Module]] = {
    "mlm": ViltForMaskedLM,
    "vqa": ViltForQuestionAnswering,
    "nlvr2": ViltForImagesAndTextClassification,
    "retrieval": ViltForImageAndTextRetrieval,
    "none": ViltModel,
}
WIDTH, HEADS, LAYERS, PATCH, TABLE_SIZE = 128, 2, 3, 8, 48
"""Two heads of 64, as ViLT's own files imply; a position table of 6 x 6 cells."""
NUM_ANSWERS = 7


def vilt(head: str, seed: int = 0, untied: bool = True) -> nn.Module:
    """A transformers ViLT in eval mode, its weights large enough that attention is not flat and biases not zero."""
    torch.manual_seed(seed)
    config = ViltConfig(
        vocab_size=tiny.VOCABULARY.size, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        intermediate_size=4 * WIDTH, max_position_embeddings=12, image_size=TABLE_SIZE, patch_size=PATCH,
        modality_type_vocab_size=3 if head == "nlvr2" else 2, num_images=2 if head == "nlvr2" else -1,
        num_labels=NUM_ANSWERS if head == "vqa" else 2,
    )  # fmt: skip
    model = CLASSES[head](config).eval()
    if head == "mlm" and untied:  # as in the authors' files; transformers ties whatever its configuration says
        model.mlm_score.decoder.weight = nn.Parameter(torch.empty(tiny.VOCABULARY.size, WIDTH))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name.lower():
                parameter.normal_(std=0.08)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def as_original(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a transformers ViLT named and joined as ViLT's authors do, told apart from our own tables."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        name = name.removeprefix("vilt.")
        for old, new in (
            ("embeddings.text_embeddings.", "text_embeddings."),
            ("embeddings.token_type_embeddings", "token_type_embeddings"),
            ("embeddings.cls_token", "transformer.cls_token"),
            ("embeddings.position_embeddings", "transformer.pos_embed"),
            ("embeddings.patch_embeddings.projection", "transformer.patch_embed.proj"),
            ("encoder.layer.", "transformer.blocks."),
            ("layernorm_before", "norm1"),
            ("layernorm_after", "norm2"),
            ("attention.output.dense", "attn.proj"),
            ("intermediate.dense", "mlp.fc1"),
            ("output.dense", "mlp.fc2"),
            ("mlm_score.decoder.bias", "mlm_score.bias"),
        ):
            if name.startswith(old) or (old in name and not old.startswith("embeddings.")):
                name = name.replace(old, new)
        if name.startswith("layernorm."):
            name = f"transformer.{name.replace('layernorm', 'norm')}"
        if name.startswith("classifier."):
            name = f"{'nlvr2' if state['classifier.0.weight'].shape[1] > WIDTH else 'vqa'}_{name}"
        renamed[name] = tensor
    for layer in range(LAYERS):
        for part in ("weight", "bias"):
            split = [
                renamed.pop(f"transformer.blocks.{layer}.attention.attention.{x}.{part}")
                for x in ("query", "key", "value")
            ]
            renamed[f"transformer.blocks.{layer}.attn.qkv.{part}"] = torch.cat(split)
    renamed["text_embeddings.position_ids"] = torch.arange(12)[None]
    return renamed


def save_original(state: dict[str, Tensor], path: Path) -> Path:
    """A file as Lightning writes it."""
    torch.save({"epoch": 3, "state_dict": as_original(state), "hparams": {"image_size": 384}}, path)
    return path


def batch(image_size: int, pairs: int, slots: int = 1) -> Batch:
    """Random pixels and tokens, texts of unequal length; `slots` images a text, one pair each."""
    torch.manual_seed(7)
    lengths = torch.tensor([9, 4, 12, 6])[:pairs]
    mask = torch.arange(12)[None] < lengths[:, None]
    ids = torch.randint(5, tiny.VOCABULARY.size, (pairs, 12)).masked_fill(~mask, tiny.VOCABULARY.pad)
    images, text = torch.arange(pairs * slots), torch.arange(pairs).repeat_interleave(slots)
    return Batch(
        images=torch.rand(pairs * slots, 3, image_size, image_size) * 2 - 1,
        image_slot=images % slots,
        image_id=images,
        text_ids=ids,
        text_mask=mask,
        caption_id=torch.arange(pairs),
        pairs=torch.stack([images, text], 1),
        pair_sample=text,
        weights={"attention": torch.ones(pairs * slots)},
        targets={
            "mlm": answers_to([(p, t) for p in range(pairs) for t in range(4)], 2, torch.zeros(pairs * 4).long()),
            "vqa": answers_to([(p,) for p in range(pairs)], 1, torch.zeros(pairs, NUM_ANSWERS)),
            "nlvr2": answers_to([(2 * p, 2 * p + 1) for p in range(pairs)], 2, torch.zeros(pairs).long()),
            "retrieval": answers_to([(p,) for p in range(pairs)], 1, torch.zeros(pairs).long()),
        },
    )


def raster(model: nn.Module, images: Tensor) -> Tensor:
    """A transformers ViLT's image embeddings in raster order: its own forward would shuffle them."""
    embeddings = getattr(model, "vilt", model).embeddings
    patches = embeddings.patch_embeddings.projection(images)
    side = patches.shape[-1]
    table = embeddings.position_embeddings
    grid = table[:, 1:].transpose(1, 2).unflatten(2, (TABLE_SIZE // PATCH,) * 2)
    grid = nn.functional.interpolate(grid, size=(side, side), mode="bilinear", align_corners=True)
    cells = patches.flatten(2).transpose(1, 2) + grid.flatten(2).transpose(1, 2)
    start = (embeddings.cls_token + table[:, :1]).expand(len(images), -1, -1)
    return torch.cat([start, cells], 1)


def bert(seed: int = 0) -> nn.Module:
    """A transformers BERT in eval mode."""
    torch.manual_seed(seed)
    model = BertModel(
        BertConfig(
            vocab_size=tiny.VOCABULARY.size, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
            intermediate_size=4 * WIDTH, max_position_embeddings=20,
        )
    ).eval()  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model
