"""The dual encoder: two towers that never see each other, then a fusion of the pairs."""

from collections.abc import Mapping
from itertools import chain

from torch import nn

from dist_fusion.models.config import ModelConfig
from dist_fusion.models.embeddings import ImageEmbedding, TextEmbedding
from dist_fusion.models.fusion import FUSIONS
from dist_fusion.models.heads import READ_TOKENS, Features, build_heads
from dist_fusion.models.layers import EVERY, FIRST, Encoder, Stream, initialise
from dist_fusion.models.mapping import MAPPINGS
from dist_fusion.types import Batch, HeadSpec, Output, Tap


class Student(nn.Module):
    """Encodes each distinct image and text once and fuses the pairs (Huang and Guo, 2024, figure 2)."""

    def __init__(self, config: ModelConfig, heads: Mapping[str, HeadSpec], vocabulary_size: int):
        super().__init__()
        c = config
        groups = MAPPINGS[c.mapping](c.num_layers, c.num_fusion_layers)
        self.shown = frozenset(chain.from_iterable(groups))
        self.text_embedding = TextEmbedding(c.width, vocabulary_size, c.max_text_length, c.dropout)
        self.text_tower = Encoder(c.width, c.num_heads, c.num_layers, c.dropout, c.text_norm)
        self.image_embedding = ImageEmbedding(c.width, c.image_size, c.patch_size, c.stem, c.num_slots, c.dropout)
        self.image_tower = Encoder(c.width, c.num_heads, c.num_layers, c.dropout)
        self.fusion = FUSIONS[c.fusion](c.width, c.num_heads, groups, c.num_slots, c.dropout)
        self.heads = build_heads(heads, self.fusion.feature_width, c.width)
        self.read = EVERY if any(spec.kind in READ_TOKENS for spec in heads.values()) else FIRST
        initialise(self, c.width)

    def forward(self, batch: Batch) -> Output:
        """Logits of every head and the taps of every site, for the P pairs of `batch`."""
        return self.fuse(batch, self.encode_texts(batch), self.encode_images(batch))

    def encode_texts(self, batch: Batch) -> Stream:
        """The text tower over `batch.text_ids` alone: what can be computed beforehand."""
        return self.text_tower(self.text_embedding(batch.text_ids), batch.text_mask, self.shown)

    def encode_images(self, batch: Batch) -> Stream:
        """The image tower over `batch.images` alone: what can be computed beforehand."""
        x, mask = self.image_embedding(batch.images, batch.image_slot)
        return self.image_tower(x, mask, self.shown)

    def fuse(self, batch: Batch, text: Stream, image: Stream) -> Output:
        """The pairs of `batch`, from streams encoded here or beforehand."""
        fused = self.fusion(text, image, batch.image_slot, batch.pairs, self.read)
        features = Features(fused.feature, fused.tokens, image.hidden[-1][:, 0], text.hidden[-1][:, 0])
        logits = {task: head(features, batch.targets[task].rows) for task, head in self.heads.items()}
        return Output(logits, {**_tower_taps(batch, text, image), **fused.taps})


def _tower_taps(batch: Batch, text: Stream, image: Stream) -> dict[str, Tap]:
    """The cross-modal attention the towers would have: one's last queries, the other's keys (equations 7-8)."""
    image_row, text_row = batch.pairs.unbind(1)
    text_mask, image_mask = text.mask[text_row], image.mask[image_row]
    return {
        "tower.t2i": Tap(text.query[text_row], image.key[image_row], text_mask, image_mask),
        "tower.i2t": Tap(image.query[image_row], text.key[text_row], image_mask, text_mask),
    }
