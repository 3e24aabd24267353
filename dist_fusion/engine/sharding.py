"""How a run is sharded: DeepSpeed's own words from `ds_configs/`, and the keys that the recipe owns."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from deepspeed.runtime.precision_config import get_bfloat16_config, get_float16_config
from deepspeed.runtime.zero.config import get_zero_config

from dist_fusion.config import Config
from dist_fusion.models.teachers import PRECISIONS
from dist_fusion.schema import UserError, nearest

DS_CONFIGS = [
    path
    for parent in (Path(__file__).parents[1], Path(__file__).parents[2])
    if (path := parent / "ds_configs").is_dir()
]
OURS = (
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
    "optimizer", "scheduler",
)  # fmt: skip
"""DeepSpeed's keys that the recipe owns."""
BF16_CAPABILITY = (8, 0)
"""The first compute capability with bf16 arithmetic (Ampere). On older GPUs torch emulates it and says it is there."""


class Sharding(NamedTuple):
    """What a file of `ds_configs/` means, defaults included."""

    stage: int  # of ZeRO
    dtype: torch.dtype  # of weights, gradients and activations; the optimizer's own copies are fp32
    offload: bool  # the optimizer works on the host and keeps its state there
    bucket: int  # elements of gradient buffers
    live: int  # elements of weights gathered at a time at most (stage 3)


def ds_config(config: Config, world_size: int) -> dict[str, Any]:
    """DeepSpeed's configuration: how to shard from `ds_configs/`, how much and how fast from the recipe.

    Raises:
        UserError: if there is no such file, it sets a key that the recipe owns, or the global batch does not divide.
    """
    path = _find_ds_config(config.deepspeed)
    try:
        tree = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    for key in OURS:
        if key in tree:
            raise UserError(f"{path} sets {key!r}, which belongs in the recipe; take it out there")
    try:
        shards = sharding(tree)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    if shards.stage == 0:
        raise UserError(
            f"{path} does not shard (zero_optimization.stage is 0); stage 1 does the same on one rank, and is what "
            "checkpoints are made for: deepspeed=zero1"
        )
    if config.compile and shards.stage == 3:
        raise UserError(
            f"compile is on and deepspeed is {config.deepspeed!r}: the hooks of ZeRO-3 cut the towers into pieces too "
            "small to compile; use zero1 or zero2, or compile=false"
        )
    return {
        **tree,
        "train_batch_size": config.global_batch,
        "train_micro_batch_size_per_gpu": config.micro_batch(world_size),
        "gradient_accumulation_steps": config.accumulation,
        "gradient_clipping": config.optimizer.clip,
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": config.optimizer.learning_rate,
                "betas": list(config.optimizer.betas),
                "eps": config.optimizer.epsilon,
                # DeepSpeed's own needs a build at first use, and with it a compiler. On the host only its own is fast.
                "torch_adam": not shards.offload,
            },
        },
        "steps_per_print": 10**9,
    }


def sharding(tree: Mapping[str, Any]) -> Sharding:
    """DeepSpeed's reading of its own words; raises ValueError where it does not know them."""
    zero, half, brain = get_zero_config(tree), get_float16_config(tree), get_bfloat16_config(tree)
    if half.enabled and brain.enabled:
        raise ValueError("fp16 and bf16 are both enabled; take one out")
    return Sharding(
        stage=int(zero.stage),
        dtype=torch.float16 if half.enabled else torch.bfloat16 if brain.enabled else torch.float32,
        offload=zero.offload_optimizer is not None and zero.offload_optimizer.device != "none",
        bucket=zero.reduce_bucket_size * (2 if zero.overlap_comm and zero.stage < 3 else 1),
        live=zero.max_live_parameters,
    )


def check_precision(dtype: torch.dtype, device_type: str, capability: tuple[int, int], named_by: str) -> None:
    """Raises UserError, naming the key, if a device (its CUDA compute capability, if any) cannot compute in `dtype`."""
    if dtype == torch.float16 and device_type == "cpu":
        raise UserError(f"{named_by} is fp16, which needs a GPU, and this rank has none; use one without fp16")
    if dtype == torch.bfloat16 and device_type == "cuda" and capability < BF16_CAPABILITY:
        needed, has = (".".join(map(str, pair)) for pair in (BF16_CAPABILITY, capability))
        raise UserError(
            f"{named_by} is bf16, which needs a GPU of compute capability {needed} or more, and this rank's has {has}; "
            "use fp16 in its place (deepspeed=zero1-fp16, precision=fp16)"
        )


def check_device(config: Config, tree: Mapping[str, Any], device: torch.device) -> None:
    """Raises UserError if `device` cannot do the precision of `tree`, DeepSpeed's configuration, or of a teacher."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    check_precision(sharding(tree).dtype, device.type, capability, f"deepspeed={config.deepspeed}")
    for number, teacher in enumerate(config.teachers):
        dtype = PRECISIONS[teacher.precision]
        if dtype is not None:
            check_precision(dtype, device.type, capability, f"teachers.{number}.precision")


def _find_ds_config(name: str) -> Path:
    if Path(name).is_file():
        return Path(name)
    known = {path.stem: path for folder in DS_CONFIGS for path in sorted(folder.glob("*.json"))}
    if name not in known:
        raise UserError(
            f"deepspeed is {name!r}, no such file{nearest(name, known)}; it can be {', '.join(known)}, or a path"
        )
    return known[name]
