"""The models that can be trained, and the fusion encoder that teaches. MODELS is the list of them."""

from collections.abc import Callable, Mapping

from torch import nn

from dist_fusion.models.config import ModelConfig
from dist_fusion.models.student import Student
from dist_fusion.models.vilt import Vilt
from dist_fusion.types import HeadSpec

MODELS: dict[str, Callable[[ModelConfig, Mapping[str, HeadSpec], int], nn.Module]] = {
    "dual-encoder": Student,
    "fusion-encoder": Vilt,
}
CONTRASTIVE = {"dual-encoder"}
"""Models with a vector of its own for each image and text, which contrastive tasks need."""
