"""The fusion encoder: one transformer over text and image together (ViLT, arXiv:2102.03334). It teaches the student."""

from collections.abc import Mapping

import torch
from torch import nn

from dist_fusion.models.config import ModelConfig
from dist_fusion.models.embeddings import ImageEmbedding, TextEmbedding
from dist_fusion.models.heads import READ_TOKENS, Features, build_heads
from dist_fusion.models.layers import FIRST, Encoder, initialise
from dist_fusion.types import Batch, HeadSpec, Output, Tap


class Vilt(nn.Module):
    """Runs once a pair: that is a fusion encoder's nature, and why a dual encoder is faster."""

    def __init__(self, config: ModelConfig, heads: Mapping[str, HeadSpec], vocabulary_size: int):
        super().__init__()
        c = config
        self.text_embedding = TextEmbedding(c.width, vocabulary_size, c.max_text_length, c.dropout)
        self.image_embedding = ImageEmbedding(c.width, c.image_size, c.patch_size, c.stem, c.num_slots, c.dropout)
        self.encoder = Encoder(c.width, c.num_heads, c.num_layers, c.dropout)
        self.pool = nn.Linear(c.width, c.width)
        self.heads = build_heads(heads, c.width, c.width)
        self.reads_tokens = any(spec.kind in READ_TOKENS for spec in heads.values())
        initialise(self, c.width)

    def forward(self, batch: Batch) -> Output:
        """Logits of every head, and the last block's cross-modal queries and keys as taps `t2i` and `i2t`."""
        image_row, text_row = batch.pairs.unbind(1)
        text, text_mask = self.text_embedding(batch.text_ids)[text_row], batch.text_mask[text_row]
        image, image_mask = (x[image_row] for x in self.image_embedding(batch.images, batch.image_slot))
        words, patches = slice(None, text.shape[1]), slice(text.shape[1], None)
        read = words if self.reads_tokens else FIRST
        joint = self.encoder(torch.cat([text, image], 1), torch.cat([text_mask, image_mask], 1), read=read)
        top = joint.hidden[-1]
        features = Features(torch.tanh(self.pool(top[:, 0])), top)
        return Output(
            {task: head(features, batch.targets[task].rows) for task, head in self.heads.items()},
            {
                "t2i": Tap(joint.query[:, :, words], joint.key[:, :, patches], text_mask, image_mask),
                "i2t": Tap(joint.query[:, :, patches], joint.key[:, :, words], image_mask, text_mask),
            },
        )
