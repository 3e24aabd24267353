"""transformers' ViltModel beside ours: the same sizes and weights, and a check that both say the same."""

from collections.abc import Mapping
from copy import deepcopy
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import ViltConfig, ViltModel

from dist_fusion.models.config import ModelConfig
from dist_fusion.models.heads import Features
from dist_fusion.models.layouts import LAYOUTS, read
from dist_fusion.models.vilt import Vilt
from dist_fusion.types import Batch, HeadSpec, Output


class Raster(NamedTuple):
    """What the peer says of P pairs, text tokens first and then image tokens in raster order."""

    pooled: Tensor  # [P, D]
    tokens: Tensor  # [P, L + N, D]
    maps: tuple[Tensor, ...]  # of every block, [P, H, L + N, L + N]


class Peer(nn.Module):
    """transformers' model as its users call it, on pixels, with heads of ours on its features."""

    def __init__(self, config: ModelConfig, vocabulary_size: int):
        super().__init__()
        self.model = ViltModel(
            ViltConfig(
                vocab_size=vocabulary_size,
                max_position_embeddings=config.max_text_length,
                hidden_size=config.width,
                intermediate_size=4 * config.width,
                num_hidden_layers=config.num_layers,
                num_attention_heads=config.num_heads,
                image_size=config.image_size,
                patch_size=config.patch_size,
            )
        )
        self.heads = nn.ModuleDict()
        with torch.no_grad():
            for parameter in self.parameters():  # away from the zeros and ones that would hide a mistake in copying
                parameter.add_(0.02 * torch.randn_like(parameter))

    @torch.inference_mode()
    def forward(self, batch: Batch, maps: bool = True) -> dict[str, Tensor]:
        """Logits of every head; with `maps` the attention of all blocks, which distillation would read, is kept."""
        images = batch.images
        said = self.model(
            input_ids=batch.text_ids,
            attention_mask=batch.text_mask.long(),
            pixel_values=images,
            pixel_mask=batch.text_ids.new_ones(()).expand(len(images), *images.shape[2:]),
            output_attentions=maps,
        )
        features = Features(said.pooler_output, said.last_hidden_state[:, : batch.text_ids.shape[1]])
        return {task: head(features, batch.targets[task].rows) for task, head in self.heads.items()}

    def on_raster(self, images: Tensor, text_ids: Tensor, text_mask: Tensor, *, maps: bool = False) -> Raster:
        """What the model makes of images [P, 3, h, w] and texts [P, L]; attention maps only if asked for.

        On pixels the model shuffles the patches at every call, which changes no logit, and every attention map; so it
        is given image embeddings.
        """
        embed = self.model.embeddings
        patches = embed.patch_embeddings(images).flatten(2).transpose(1, 2)
        image = torch.cat([embed.cls_token.expand(len(patches), -1, -1), patches], 1) + embed.position_embeddings
        said = self.model(
            input_ids=text_ids,
            attention_mask=text_mask.long(),
            image_embeds=image,
            pixel_mask=text_ids.new_ones(image.shape[:2]),
            output_attentions=maps,
        )
        return Raster(said.pooler_output, said.last_hidden_state, said.attentions or ())

    @torch.inference_mode()
    def last_queries_and_keys(self, batch: Batch) -> dict[str, Tensor]:
        """`query` and `key` of the last block, [P, L + N, D] each, image tokens in raster order."""
        attention = self.model.get_submodule(
            f"encoder.layer.{self.model.config.num_hidden_layers - 1}.attention.attention"
        )
        taken: dict[str, Tensor] = {}
        hooks = [
            getattr(attention, name).register_forward_hook(lambda _, given, out, name=name: taken.update({name: out}))
            for name in ("query", "key")
        ]
        self.on_raster(batch.images, batch.text_ids, batch.text_mask)
        for hook in hooks:
            hook.remove()
        return taken


def build_pair(config: ModelConfig, heads: Mapping[str, HeadSpec], vocabulary_size: int) -> tuple[Vilt, Peer]:
    """Our model and its peer, with the same random weights."""
    ours, peer = Vilt(config, heads, vocabulary_size), Peer(config, vocabulary_size)
    weights, misfits = read(LAYOUTS["transformers' ViLT"], peer.model.state_dict(), heads=())
    missing, unexpected = ours.load_state_dict(weights.body, strict=False)
    assert not (misfits or unexpected) and all(name.startswith("heads.") for name in missing), (misfits, missing)
    peer.heads = deepcopy(ours.heads)
    return ours.eval(), peer.eval()


def check_agreement(said: Output, peer: Peer, batch: Batch, tolerance: float) -> None:
    """Raises AssertionError if what ours `said` is farther than `tolerance` from the peer's logits, queries or keys."""
    heads, words = said.taps["t2i"].query.shape[1], batch.text_ids.shape[1]
    pairs = [(said.logits[task], logits) for task, logits in peer(batch).items()]
    for name, rows in peer.last_queries_and_keys(batch).items():
        text, image = rows.unflatten(-1, (heads, -1)).transpose(1, 2).tensor_split([words], 2)
        of_text, of_image = ("t2i", "i2t") if name == "query" else ("i2t", "t2i")
        pairs += [(getattr(said.taps[of_text], name), text), (getattr(said.taps[of_image], name), image)]
    for our, their in pairs:
        torch.testing.assert_close(our, their, atol=tolerance, rtol=tolerance, check_dtype=False)
