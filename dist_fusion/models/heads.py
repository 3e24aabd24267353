"""From features to answers. A task names the kind of head it needs (HEADS); every model builds it the same way."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_fusion.distributed import gather_rows
from dist_fusion.types import HeadSpec


class Features(NamedTuple):
    """What a model offers its heads."""

    pair: Tensor  # [P, F]
    tokens: Tensor  # [P, L, D]; a model without a head of READ_TOKENS may leave out all but the first
    image: Tensor | None = None  # [I, D] class token of the image tower
    text: Tensor | None = None  # [T, D] class token of the text tower


NO_PAIR = -1e4
"""Score in place of a pair that is not there: its share of a softmax is 0, also in half precision."""


class LinearHead(nn.Linear):
    """One linear layer over the features of a row's pairs (ITM)."""

    def __init__(self, feature_width: int, width: int, spec: HeadSpec):
        super().__init__(feature_width * spec.num_pairs, spec.num_outputs)

    def forward(self, features: Features, rows: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(features.pair[rows].flatten(1))


class ClassifierHead(nn.Sequential):
    """Linear, norm, GELU, linear over the features of a row's pairs (ViLT's classifiers)."""

    def __init__(self, feature_width: int, width: int, spec: HeadSpec):
        super().__init__(
            nn.Linear(feature_width * spec.num_pairs, 2 * width),
            nn.LayerNorm(2 * width),
            nn.GELU(),
            nn.Linear(2 * width, spec.num_outputs),
        )

    def forward(self, features: Features, rows: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(features.pair[rows].flatten(1))


class TokenHead(nn.Module):
    """BERT's transform and an untied decoder over the text tokens that are asked for, not over all."""

    def __init__(self, feature_width: int, width: int, spec: HeadSpec):
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.decoder = nn.Linear(width, spec.num_outputs)

    def forward(self, features: Features, rows: Tensor) -> Tensor:
        """rows [R, 2] (pair, position) -> [R, C]."""
        asked = features.tokens[rows[:, 0], rows[:, 1]]
        return self.decoder(self.norm(F.gelu(self.dense(asked))))


class RankHead(nn.Linear):
    """One linear score for each of a row's pairs, which compete (ViLT's rank output); -1 in `rows` is no pair."""

    def __init__(self, feature_width: int, width: int, spec: HeadSpec):
        super().__init__(feature_width, spec.num_outputs)

    def forward(self, features: Features, rows: Tensor) -> Tensor:  # type: ignore[override]
        """rows [R, n] -> [R, n]; where there is no pair, a score that no pair can have."""
        scores = super().forward(features.pair).squeeze(-1)
        return scores[rows.clamp(min=0)].masked_fill(rows < 0, NO_PAIR)


class ContrastHead(nn.Module):
    """Similarity of each row's image and text with those of all ranks, over a learnable temperature.

    The temperature starts at 0.07 and is clamped where it is used: an in-place clamp is undone by an fp32 master copy,
    and a 0-dim parameter makes DeepSpeed raise, hence the shape [1].
    """

    def __init__(self, feature_width: int, width: int, spec: HeadSpec):
        super().__init__()
        self.image, self.text = nn.Linear(width, spec.num_outputs), nn.Linear(width, spec.num_outputs)
        self.temperature = nn.Parameter(torch.tensor([0.07]))

    def forward(self, features: Features, rows: Tensor) -> Tensor:
        """rows [R, 2] (image row, text row) -> [R, 2, G]: image to texts and text to images of all ranks' G rows."""
        assert features.image is not None and features.text is not None
        image = F.normalize(self.image(features.image[rows[:, 0]]).float(), dim=-1)
        text = F.normalize(self.text(features.text[rows[:, 1]]).float(), dim=-1)
        everyone = gather_rows(torch.stack([image, text], 1))
        similarity = torch.stack([image @ everyone[:, 1].T, text @ everyone[:, 0].T], 1)
        return similarity / self.temperature.float().clamp(0.001, 0.5)


HEADS: dict[str, Callable[[int, int, HeadSpec], nn.Module]] = {
    "linear": LinearHead,
    "classifier": ClassifierHead,
    "token": TokenHead,
    "rank": RankHead,
    "contrast": ContrastHead,
}
READ_TOKENS = {"token"}
"""Kinds of heads that read text tokens; to the others the first is enough, from which the pair's feature comes."""


def build_heads(specs: Mapping[str, HeadSpec], feature_width: int, width: int) -> nn.ModuleDict:
    """One head a task, in the order of `specs`."""
    return nn.ModuleDict({task: HEADS[spec.kind](feature_width, width, spec) for task, spec in specs.items()})
