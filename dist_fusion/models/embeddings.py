"""From pixels and token ids to embeddings, in raster order, with no random numbers and no mask read off the pixels."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dist_fusion.models.layers import deviation


def patch_stem(width: int, patch_size: int) -> nn.Module:
    """One linear projection a patch (ViT, arXiv:2010.11929)."""
    return nn.Conv2d(3, width, patch_size, patch_size)


def convolution_stem(width: int, patch_size: int) -> nn.Module:
    """Halving 3x3 convolutions down to one cell a patch (arXiv:2106.14881): learns from little data in few steps.

    Normalised channel by channel inside each image, not over the batch: a row must not depend on the other rows.
    """
    layers: list[nn.Module] = []
    channels, stride = 3, 2
    while stride < patch_size:
        wider = max(16, width * stride // patch_size // 4 * 4)
        layers += [nn.Conv2d(channels, wider, 3, 2, 1, bias=False), nn.GroupNorm(wider, wider), nn.ReLU()]
        channels, stride = wider, 2 * stride
    return nn.Sequential(*layers, nn.Conv2d(channels, width, 3, 2, 1), CellNorm(width, eps=1e-6))


class CellNorm(nn.LayerNorm):
    """Layer norm over the channels of each cell of [B, C, h, w]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


STEMS: dict[str, Callable[[int, int], nn.Module]] = {"patch": patch_stem, "convolution": convolution_stem}


class ImageEmbedding(nn.Module):
    """Patches in raster order behind a class token, with positions and a modality type for each image slot."""

    def __init__(self, width: int, image_size: int, patch_size: int, stem: str, num_slots: int, dropout: float):
        super().__init__()
        self.stem = STEMS[stem](width, patch_size)
        self.class_token = nn.Parameter(torch.empty(width).normal_(std=deviation(width)))
        self.position = nn.Parameter(torch.empty((image_size // patch_size) ** 2 + 1, width))
        nn.init.normal_(self.position, std=deviation(width))
        self.modality = nn.Embedding(num_slots, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, images: Tensor, slot: Tensor) -> tuple[Tensor, Tensor]:
        """images [I, 3, h, w], slot [I] -> embeddings [I, N, D] and their mask [I, N]."""
        patches = self.stem(images.to(self.class_token.dtype)).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(len(images), 1, -1), patches], 1) + self.position
        x = self.dropout(x) + self.modality(slot)[:, None]
        return x, x.new_ones(x.shape[:2], dtype=torch.bool)


class TextEmbedding(nn.Module):
    """BERT's embeddings (word, position and sentence type, normalised) with a modality type."""

    def __init__(self, width: int, vocabulary_size: int, max_length: int, dropout: float):
        super().__init__()
        self.word = nn.Embedding(vocabulary_size, width)
        self.position = nn.Embedding(max_length, width)
        self.sentence = nn.Parameter(torch.zeros(width))
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.modality = nn.Parameter(torch.zeros(width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [T, L] -> [T, L, D]."""
        x = self.word(ids) + self.position(torch.arange(ids.shape[1], device=ids.device)) + self.sentence
        return self.dropout(self.norm(x)) + self.modality
