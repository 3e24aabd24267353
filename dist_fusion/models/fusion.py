"""Ways to bring the two towers together, pair by pair (table 4).

A fusion is a module with one method: two Streams and the pairs in, Fused out. A new fusion is one class and one line
in FUSIONS; the rest of the package knows only the names. Each distinct image and text is projected once, then paired.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_fusion.models.layers import EVERY, FIRST, CrossLayer, Stream, run
from dist_fusion.models.mapping import Groups
from dist_fusion.types import Tap


class Fused(NamedTuple):
    """What a fusion makes of the pairs."""

    feature: Tensor  # [P, F] for the heads that judge a pair
    tokens: Tensor  # [P, R, D] the text tokens in `read`, that have seen the image
    taps: dict[str, Tap]  # the fusion's own attention, if it has any


class Fusion(nn.Module):
    """What the student needs of a fusion."""

    feature_width: int

    def forward(self, text: Stream, image: Stream, slot: Tensor, pairs: Tensor, read: slice) -> Fused:
        """The pairs [P, 2]; `read` says which text tokens the heads read, [CLS] among them."""
        raise NotImplementedError


class Dot(Fusion):
    """Nothing between the towers: the two class tokens and the terms of their dot product (CLIP, arXiv:2103.00020).

    CLIP has no head that judges a pair; this feature under a shallow one is our reading.
    """

    def __init__(self, width: int, num_heads: int, groups: Groups, num_slots: int, dropout: float):
        super().__init__()
        self.feature_width = 3 * width

    def forward(self, text: Stream, image: Stream, slot: Tensor, pairs: Tensor, read: slice) -> Fused:
        image_row, text_row = pairs.unbind(1)
        words, picture = text.hidden[-1][text_row][:, read], image.hidden[-1][image_row, 0]
        return Fused(torch.cat([words[:, 0], picture, words[:, 0] * picture], -1), words, {})


class Shallow(Fusion):
    """An MLP over one pooled vector of each tower (the fusion of DiDE, arXiv:2112.08723); no attention of its own.

    Text tokens meet the image through the same MLP, each token in the place of [CLS] (our reading).
    """

    def __init__(self, width: int, num_heads: int, groups: Groups, num_slots: int, dropout: float):
        super().__init__()
        self.feature_width = width
        self.pool_text, self.pool_image = nn.Linear(width, width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(2 * width, 2 * width), nn.LayerNorm(2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, text: Stream, image: Stream, slot: Tensor, pairs: Tensor, read: slice) -> Fused:
        words = torch.tanh(self.pool_text(text.hidden[-1][:, read]))[pairs[:, 1]]
        picture = torch.tanh(self.pool_image(image.hidden[-1][:, :1]))[pairs[:, 0]].expand_as(words)
        tokens = self.mlp(torch.cat([words, picture], -1))
        return Fused(tokens[:, 0], tokens, {})


class Virt(Fusion):
    """The towers' own last queries and keys, across, without new attention weights (VIRT, arXiv:2112.04195).

    Each side is rewritten by the other's tokens and averaged to u and v; the feature is an MLP over
    [u, v, |u - v|, max(u, v)] (our reading of the pooling).
    """

    def __init__(self, width: int, num_heads: int, groups: Groups, num_slots: int, dropout: float):
        super().__init__()
        self.feature_width = width
        self.mlp = nn.Sequential(
            nn.Linear(4 * width, 2 * width), nn.LayerNorm(2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, text: Stream, image: Stream, slot: Tensor, pairs: Tensor, read: slice) -> Fused:
        heard, seen = _paired(text, pairs[:, 1]), _paired(image, pairs[:, 0])
        words, patches = self._rewritten(heard, seen), self._rewritten(seen, heard)
        u, v = _mean(words, heard.mask), _mean(patches, seen.mask)
        feature = self.mlp(torch.cat([u, v, (u - v).abs(), torch.maximum(u, v)], -1))
        return Fused(feature, (heard.hidden[0] + words)[:, read], {})

    @staticmethod
    def _rewritten(asks: Stream, tells: Stream) -> Tensor:
        value = tells.hidden[0].unflatten(-1, (tells.key.shape[1], -1)).transpose(1, 2)
        told = F.scaled_dot_product_attention(asks.query, tells.key, value, attn_mask=tells.mask[:, None, None, :])
        return told.transpose(1, 2).flatten(2)


class BridgeTower(Fusion):
    """Cross-modal layers, each fed by a bridge from the towers (equations 3-6; BridgeTower, arXiv:2206.08657).

    bridge(z, x) = LayerNorm(z + x), where x is the sum of the mapping's tower layers through one projection a modality
    plus a modality type; the first bridge has nothing from below. Both streams of a layer read the bridged inputs, so
    neither comes first. `order` is what a layer does after its bridge, see CrossLayer.
    """

    def __init__(
        self, width: int, num_heads: int, groups: Groups, num_slots: int, dropout: float, order: tuple[str, str]
    ):
        super().__init__()
        self.feature_width = 2 * width
        self.text = _Side(width, num_heads, groups, 1, order, dropout)
        self.image = _Side(width, num_heads, groups, num_slots, order, dropout)
        self.recompute = False

    def forward(self, text: Stream, image: Stream, slot: Tensor, pairs: Tensor, read: slice) -> Fused:
        image_row, text_row = pairs.unbind(1)
        text_mask, image_mask = text.mask[text_row], image.mask[image_row]
        words = [tap[text_row] for tap in self.text.projected(text, pairs.new_zeros(1))]
        patches = [tap[image_row] for tap in self.image.projected(image, slot)]
        x, y = torch.zeros_like(words[0]), torch.zeros_like(patches[0])
        last = len(words) - 1
        for i, (word, patch) in enumerate(zip(words, patches, strict=True)):
            x_in, y_in = self.text.bridges[i](x + word), self.image.bridges[i](y + patch)
            x, text_query, image_key = run(
                self.text.layers[i],
                x_in,
                text_mask,
                y_in,
                image_mask,
                read if i == last else EVERY,
                recompute=self.recompute,
            )
            y, image_query, text_key = run(
                self.image.layers[i],
                y_in,
                image_mask,
                x_in,
                text_mask,
                FIRST if i == last else EVERY,
                recompute=self.recompute,
            )
        feature = torch.cat([self.text.pooled(x), self.image.pooled(y)], -1)
        taps = {
            "bridge.t2i": Tap(text_query, image_key, text_mask, image_mask),
            "bridge.i2t": Tap(image_query, text_key, image_mask, text_mask),
        }
        return Fused(feature, x, taps)


class _Side(nn.Module):
    """One modality's half of a bridge tower."""

    def __init__(
        self, width: int, num_heads: int, groups: Groups, num_slots: int, order: tuple[str, str], dropout: float
    ):
        super().__init__()
        self.groups = groups
        self.project = nn.Linear(width, width)
        self.modality = nn.Embedding(num_slots, width)
        self.bridges = nn.ModuleList(nn.LayerNorm(width, eps=1e-5) for _ in groups)
        self.layers = nn.ModuleList(CrossLayer(width, num_heads, order, dropout) for _ in groups)
        self.pool = nn.Linear(width, width)

    def projected(self, tower: Stream, slot: Tensor) -> list[Tensor]:
        """What each bridge gets from the tower: [B, L, D] a fusion layer."""
        modality = self.modality(slot)[:, None]
        return [self.project(torch.stack([tower.hidden[i] for i in group]).sum(0)) + modality for group in self.groups]

    def pooled(self, x: Tensor) -> Tensor:
        return torch.tanh(self.pool(x[:, 0]))


def _paired(stream: Stream, row: Tensor) -> Stream:
    """The last layer of a stream, one row a pair."""
    return Stream([stream.hidden[-1][row]], stream.query[row], stream.key[row], stream.mask[row])


def _mean(x: Tensor, mask: Tensor) -> Tensor:
    weight = mask.to(x.dtype)[:, :, None]
    return (x * weight).sum(1) / weight.sum(1)


FUSIONS: dict[str, Callable[..., Fusion]] = {
    "dot": Dot,
    "shallow": Shallow,
    "virt": Virt,
    "bridge-post": partial(BridgeTower, order=("self", "cross")),
    "bridge-pre": partial(BridgeTower, order=("cross", "self")),
}
