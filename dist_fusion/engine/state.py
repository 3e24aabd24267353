"""What DeepSpeed keeps of a model on disk."""

from pathlib import Path

import torch


def full_weights(checkpoints: Path, tag: str) -> dict[str, torch.Tensor]:
    """The fp32 weights of a saved checkpoint, put together from all ranks' shards, at any ZeRO stage."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    weights: dict[str, torch.Tensor] = get_fp32_state_dict_from_zero_checkpoint(str(checkpoints), tag)
    return {name: value.clone() for name, value in weights.items()}
