"""The model inside DeepSpeed. The only file that imports deepspeed."""

import json
import os
import socket
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from dist_fusion.config import Config, OptimizerConfig
from dist_fusion.schema import UserError, nearest

DS_CONFIGS = [
    path for parent in (Path(__file__).parent, Path(__file__).parents[1]) if (path := parent / "ds_configs").is_dir()
]
OURS = (
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
    "optimizer", "scheduler",
)  # fmt: skip
"""DeepSpeed's keys that the recipe owns."""
UNDECAYED = ("modality", "sentence")
"""Type embeddings, which take no weight decay whatever their shape."""


def on_gpu() -> bool:
    """Whether ranks run on GPUs: not if DS_ACCELERATOR=cpu says so, whatever the machine has."""
    name: str = get_accelerator().device_name()
    return name.startswith("cuda")


def start_ranks() -> torch.device:
    """Join the process group that the launcher's five rank variables describe; returns this rank's device.

    Without them this process is the only rank. On a CPU DeepSpeed's shared-memory all-reduce is left out: its build
    takes a minute or two at first use, and a killed build leaves a lock that would hang the next start in silence.
    """
    if "RANK" not in os.environ:
        alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        os.environ.update(alone, MASTER_PORT=str(free_port()))
    cuda = on_gpu()
    if not cuda:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    device = torch.device("cpu")
    if not cuda and "OMP_NUM_THREADS" not in os.environ:
        # Ranks that each take all cores wait for one another: seconds a step where milliseconds do.
        here = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // here))
    if cuda:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    deepspeed.init_distributed("nccl" if cuda else "gloo", auto_mpi_discovery=False, verbose=False)
    return device


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def stop_ranks() -> None:
    """Leave the process group."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


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
                "torch_adam": True,  # DeepSpeed's own needs a build at first use, and with it a compiler
            },
        },
        "steps_per_print": 10**9,
    }


def _find_ds_config(name: str) -> Path:
    if Path(name).is_file():
        return Path(name)
    known = {path.stem: path for folder in DS_CONFIGS for path in sorted(folder.glob("*.json"))}
    if name not in known:
        raise UserError(
            f"deepspeed is {name!r}, no such file{nearest(name, known)}; it can be {', '.join(known)}, or a path"
        )
    return known[name]


def build_engine(model: nn.Module, config: Config, world_size: int) -> deepspeed.DeepSpeedEngine:
    """The model and its optimizer, sharded. Collective. The teacher never comes here."""
    schedule = config.optimizer

    def scheduler(optimizer: torch.optim.Optimizer) -> LambdaLR:
        return LambdaLR(optimizer, lambda step: learning_rate_factor(schedule, config.steps, step))

    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=parameter_groups(model, schedule.weight_decay),
        lr_scheduler=scheduler,
        config=ds_config(config, world_size),
    )
    return engine


def learning_rate_factor(config: OptimizerConfig, steps: int, step: int) -> float:
    """Linear warm-up to 1 over the first share of the steps, then linear decay to 0."""
    warmup = max(1, round(config.warmup * steps))
    return min((step + 1) / warmup, max(0.0, (steps - step) / max(1, steps - warmup)))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Every trainable parameter in one of two groups: with weight decay, and without (vectors and type embeddings)."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[parameter.ndim > 1 and not any(part in UNDECAYED for part in name.split("."))].append(parameter)
    return [{"params": groups[True], "weight_decay": weight_decay}, {"params": groups[False], "weight_decay": 0.0}]


def full_weights(checkpoints: Path, tag: str) -> dict[str, torch.Tensor]:
    """The fp32 weights of a saved checkpoint, put together from all ranks' shards, at any ZeRO stage."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    weights: dict[str, torch.Tensor] = get_fp32_state_dict_from_zero_checkpoint(str(checkpoints), tag)
    return {name: value.clone() for name, value in weights.items()}
