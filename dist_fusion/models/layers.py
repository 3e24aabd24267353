"""Transformer layers. Attention runs through SDPA and returns the queries and keys it used, never the map."""

from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

EVERY = slice(None)
"""All rows of a sequence."""
FIRST = slice(None, 1)
"""The class token alone."""


class Stream(NamedTuple):
    """One modality on its way up through its tower."""

    hidden: list[Tensor]  # a layer each, lowest first, after the tower's final norm: [B, L, D]
    query: Tensor  # of the last layer: [B, H, L, K]
    key: Tensor  # of the last layer: [B, H, L, K]
    mask: Tensor  # [B, L] bool


class SelfAttention(nn.Module):
    """Multi-head self-attention with one projection for queries, keys and values (ViT's layout)."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor, read: slice = EVERY) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, L, D], mask [B, L] bool -> the rows in `read` [B, R, D], all queries and keys [B, H, L, K]."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(_attend(q[:, :, read], k, v, mask)), q, k


class CrossAttention(nn.Module):
    """Multi-head attention of one sequence over another."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(
        self, x: Tensor, other: Tensor, other_mask: Tensor, read: slice = EVERY
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, M, D] over other [B, N, D] -> the rows in `read` [B, R, D], all queries and keys [B, H, M or N, K]."""
        q, k, v = (
            project(y).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for project, y in ((self.query, x), (self.key, other), (self.value, other))
        )
        return self.out(_attend(q[:, :, read], k, v, other_mask)), q, k


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])
    return attended.transpose(1, 2).flatten(2)


class FeedForward(nn.Sequential):
    """Two linear layers, four times as wide between."""

    def __init__(self, width: int):
        super().__init__(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


class Block(nn.Module):
    """Pre-norm transformer block (ViT, arXiv:2010.11929)."""

    def __init__(self, width: int, num_heads: int, dropout: float):
        super().__init__()
        self.norm_attention, self.norm_feed = (nn.LayerNorm(width, eps=1e-6) for _ in range(2))
        self.attention = SelfAttention(width, num_heads)
        self.feed = FeedForward(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor, read: slice = EVERY) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, L, D] -> the rows in `read` [B, R, D], all queries and keys [B, H, L, K]."""
        attended, q, k = self.attention(self.norm_attention(x), mask, read)
        x = x[:, read] + self.dropout(attended)
        return x + self.dropout(self.feed(self.norm_feed(x))), q, k


class PostBlock(Block):
    """Post-norm transformer block (BERT, arXiv:1810.04805), with the parameters of a Block."""

    def __init__(self, width: int, num_heads: int, dropout: float):
        super().__init__(width, num_heads, dropout)
        self.norm_attention, self.norm_feed = (nn.LayerNorm(width, eps=1e-12) for _ in range(2))

    def forward(self, x: Tensor, mask: Tensor, read: slice = EVERY) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, L, D] -> the rows in `read` [B, R, D], queries and keys of all rows [B, H, L, K]."""
        attended, q, k = self.attention(x, mask, read)
        x = self.norm_attention(x[:, read] + self.dropout(attended))
        return self.norm_feed(x + self.dropout(self.feed(x))), q, k


BLOCKS: dict[str, type[Block]] = {"pre": Block, "post": PostBlock}
"""Transformer blocks by the place of their norms: ViT's and BERT's."""


class Encoder(nn.Module):
    """A stack of blocks over embeddings that are already there, with one final norm for every layer it shows.

    Post-norm blocks have normalised their outputs already, and get no final norm.
    """

    def __init__(self, width: int, num_heads: int, num_layers: int, dropout: float, norm: str = "pre"):
        super().__init__()
        self.blocks = nn.ModuleList(BLOCKS[norm](width, num_heads, dropout) for _ in range(num_layers))
        self.norm = nn.LayerNorm(width, eps=1e-6) if norm == "pre" else nn.Identity()
        self.recompute = False

    def forward(self, x: Tensor, mask: Tensor, shown: frozenset[int] = frozenset(), read: slice = EVERY) -> Stream:
        """x [B, L, D] -> its Stream; hidden layers not in `shown`, and not the last, stay below as they are.

        Of the last layer only the rows in `read` are finished, [B, R, D]; its queries and keys are of all rows.
        """
        hidden, last = [], len(self.blocks) - 1
        for i, block in enumerate(self.blocks):
            x, q, k = run(block, x, mask, read if i == last else EVERY, recompute=self.recompute)
            hidden.append(self.norm(x) if i in shown or i == last else x)
        return Stream(hidden, q, k, mask)


class CrossLayer(nn.Module):
    """Cross-attention and self-attention in the given order, then feed-forward; each sub-block post-norm.

    `order` is the paper's contribution: ("cross", "self") interacts first ("pre"), ("self", "cross") is BridgeTower's
    ("post", arXiv:2206.08657). The parameters are the same.
    """

    def __init__(self, width: int, num_heads: int, order: tuple[str, str], dropout: float):
        super().__init__()
        self.order = order
        self.self_attention = SelfAttention(width, num_heads)
        self.cross_attention = CrossAttention(width, num_heads)
        self.feed = FeedForward(width)
        self.norms = nn.ModuleDict({name: nn.LayerNorm(width, eps=1e-5) for name in ("self", "cross", "feed")})
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, mask: Tensor, other: Tensor, other_mask: Tensor, read: slice = EVERY
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x [P, M, D] beside other [P, N, D] -> the rows in `read` [P, R, D], all cross-attention queries and keys."""
        query = key = x
        for name in self.order:
            rows = read if name == self.order[-1] else EVERY
            if name == "cross":
                attended, query, key = self.cross_attention(x, other, other_mask, rows)
            else:
                attended, _, _ = self.self_attention(x, mask, rows)
            x = self.norms[name](x[:, rows] + self.dropout(attended))
        return self.norms["feed"](x + self.dropout(self.feed(x))), query, key


def run(layer: nn.Module, *inputs: Any, recompute: bool) -> Any:
    """`layer(*inputs)`; with `recompute` only the inputs are kept for the backward pass (arXiv:1604.06174)."""
    return checkpoint(_kept_at_the_end, layer, *inputs, use_reentrant=False) if recompute else layer(*inputs)


def _kept_at_the_end(layer: nn.Module, *inputs: Tensor) -> tuple[Tensor, ...]:
    """The layer, and then a number kept for the backward pass, so that computing again always starts and ends there.

    Else it would start and end with the last thing kept, which for zero rows is another (dropout keeps no mask of
    them), and the ranks would gather the weights of ZeRO-3 in different orders, and hang.
    """
    x, *others = layer(*inputs)
    return x * x.new_ones(()), *others


def deviation(width: int) -> float:
    """Of initial weights: 0.02 at a width of 768 (ViLT's and BERT's rule), and with 1 / sqrt(width) at others.

    At 0.02 a narrow model starts with flat attention and needs hundreds of steps to leave it.
    """
    return 0.02 * (768 / width) ** 0.5


def initialise(module: nn.Module, width: int) -> None:
    """Normal weights, zero biases, identity norms, for every linear layer and embedding of `module`."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            nn.init.normal_(part.weight, std=deviation(width))
        if isinstance(part, nn.Linear) and part.bias is not None:
            nn.init.zeros_(part.bias)
