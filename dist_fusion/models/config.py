"""The sizes and axes of a model: the recipe's `model` section."""

from dataclasses import dataclass
from typing import Annotated, Literal

from dist_fusion.models.embeddings import STEMS
from dist_fusion.models.fusion import FUSIONS
from dist_fusion.models.layers import BLOCKS
from dist_fusion.models.mapping import MAPPINGS
from dist_fusion.schema import one_of, section


@section
@dataclass(frozen=True)
class ModelConfig:
    """A dual encoder (two towers and a fusion), or a fusion encoder (one joint encoder, ViLT); ViT-B/32 by default."""

    kind: Literal["dual-encoder", "fusion-encoder"] = "dual-encoder"
    width: int = 768
    num_heads: int = 12
    num_layers: int = 12  # of each tower, or of the joint encoder
    image_size: int = 224  # pixels
    patch_size: int = 32  # pixels
    stem: Annotated[str, one_of(STEMS)] = "patch"
    max_text_length: int = 40  # tokens, [CLS] and [SEP] included
    num_slots: int = 1  # images a sample
    dropout: float = 0.1
    text_norm: Annotated[str, one_of(BLOCKS)] = "pre"  # of the text tower's blocks: "post" is BERT's
    fusion: Annotated[str, one_of(FUSIONS)] = "bridge-pre"
    mapping: Annotated[str, one_of(MAPPINGS)] = "top"
    num_fusion_layers: int = 3

    def __post_init__(self) -> None:
        for key in ("width", "num_heads", "num_layers", "image_size", "patch_size", "num_slots"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} is {getattr(self, key)}; it must be at least 1")
        if self.width % self.num_heads:
            raise ValueError(f"width {self.width} is not a multiple of num_heads {self.num_heads}")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        if self.stem == "convolution" and (self.patch_size < 4 or self.patch_size & (self.patch_size - 1)):
            raise ValueError(f"patch_size is {self.patch_size}; a convolution stem halves, so it must be 4, 8, 16, …")
        if self.kind == "fusion-encoder" and self.text_norm != "pre":
            raise ValueError("text_norm is of a dual-encoder's text tower; leave it out for a fusion-encoder")
        if self.kind == "dual-encoder" and not 1 <= self.num_fusion_layers <= self.num_layers:
            raise ValueError(
                f"num_fusion_layers is {self.num_fusion_layers}; it must be 1 to num_layers = {self.num_layers}, "
                "since every fusion layer is fed by tower layers of its own"
            )
