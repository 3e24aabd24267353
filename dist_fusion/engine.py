"""The model inside DeepSpeed. The only file that imports deepspeed."""

import json
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.constants import default_pg_timeout
from deepspeed.runtime.precision_config import get_bfloat16_config, get_float16_config
from deepspeed.runtime.zero.config import get_zero_config
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from dist_fusion.config import Config, OptimizerConfig
from dist_fusion.models.teachers import PRECISIONS
from dist_fusion.schema import UserError, nearest

DS_CONFIGS = [
    path for parent in (Path(__file__).parent, Path(__file__).parents[1]) if (path := parent / "ds_configs").is_dir()
]
OURS = (
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
    "optimizer", "scheduler",
)  # fmt: skip
"""DeepSpeed's keys that the recipe owns."""
GROUPS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}
"""By kind of device, what carries tensors between ranks."""
UNDECAYED = ("modality", "sentence")
"""Type embeddings, which take no weight decay whatever their shape."""
BF16_CAPABILITY = (8, 0)
"""The first compute capability with bf16 arithmetic (Ampere). On older GPUs torch emulates it and says it is there."""


class Sharding(NamedTuple):
    """What a file of `ds_configs/` means, defaults included."""

    stage: int  # of ZeRO
    dtype: torch.dtype  # of weights, gradients and activations; the optimizer's own copies are fp32
    offload: bool  # the optimizer works on the host and keeps its state there
    bucket: int  # elements of gradient buffers
    live: int  # elements of weights gathered at a time at most (stage 3)


def on_gpu() -> bool:
    """Whether ranks run on GPUs: not if DS_ACCELERATOR=cpu says so, whatever the machine has."""
    name: str = get_accelerator().device_name()
    return name.startswith("cuda")


def start_ranks() -> torch.device:
    """Join the process group that the launcher's five rank variables describe; returns this rank's device.

    Without them this process is the only rank. The group has two ways: CPU tensors travel between the hosts by gloo,
    and those of GPUs by NCCL. Gloo finds the other nodes by their hosts' names; where a name leads nowhere,
    GLOO_SOCKET_IFNAME says which interface does.

    On a CPU DeepSpeed's shared-memory all-reduce is left out: its build takes a minute or two at first use, and a
    killed build leaves a lock that would hang the next start in silence.
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
    # DeepSpeed adopts a group that is there; its own would be NCCL's alone. No `device_id`: with one, barriers go by
    # NCCL and wait for all that the GPU still has to do.
    torch.distributed.init_process_group(GROUPS[device.type], timeout=default_pg_timeout)
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    return device


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def gradient_norm(engine: deepspeed.DeepSpeedEngine) -> torch.Tensor:
    """That of all ranks' last step, before it was clipped: a scalar, where DeepSpeed left it; inf if it overflowed."""
    norm = engine.get_global_grad_norm()
    return torch.as_tensor(0.0 if norm is None else norm)


def skipped(engine: deepspeed.DeepSpeedEngine) -> dict[str, float]:
    """Of a run in fp16: the scale of its loss, and how many steps it skipped since their gradients overflowed."""
    if not engine.fp16_enabled():
        return {}
    return {
        "optimizer/loss_scale": float(engine.optimizer.loss_scale),
        "optimizer/skipped_steps": float(engine.skipped_steps),
    }


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
    try:
        shards = sharding(tree)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
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


def build_engine(model: nn.Module, config: Config, world_size: int) -> deepspeed.DeepSpeedEngine:
    """The model and its optimizer, sharded. Collective. The teacher never comes here."""
    schedule = config.optimizer

    def scheduler(optimizer: torch.optim.Optimizer) -> LambdaLR:
        return LambdaLR(optimizer, lambda step: learning_rate_factor(schedule, config.steps, step))

    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=parameter_groups(model, schedule),
        lr_scheduler=scheduler,
        config=ds_config(config, world_size),
    )
    return engine


def learning_rate_factor(config: OptimizerConfig, steps: int, step: int) -> float:
    """Linear warm-up to 1 over the first share of the steps, then linear decay to 0."""
    warmup = max(1, round(config.warmup * steps))
    return min((step + 1) / warmup, max(0.0, (steps - step) / max(1, steps - warmup)))


def base_learning_rate(engine: deepspeed.DeepSpeedEngine) -> float:
    """The rate of the coming step that the multipliers multiply."""
    group = engine.optimizer.param_groups[0]
    rate: float = group["lr"] / group["multiplier"]
    return rate


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Every trainable parameter in one group, by what its rate is multiplied with and whether it decays.

    Vectors (biases, norms, the temperature) and type embeddings do not. The schedule scales the rate of every group.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {(1.0, True): [], (1.0, False): []}  # the plain ones first
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim > 1 and not any(part in UNDECAYED for part in name.split("."))
            groups.setdefault((_multiplier(name, config.multipliers), decays), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": config.learning_rate * multiplier,
            "multiplier": multiplier,
            "weight_decay": config.weight_decay if decays else 0.0,
        }
        for (multiplier, decays), parameters in groups.items()
        if parameters
    ]


def _multiplier(name: str, multipliers: Mapping[str, float]) -> float:
    """That of the longest dotted prefix of a parameter's name."""
    parts = name.split(".")
    prefixes = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((multipliers[prefix] for prefix in prefixes if prefix in multipliers), 1.0)


def check_multipliers(model: nn.Module, multipliers: Mapping[str, float]) -> None:
    """Raises UserError for a prefix that no parameter of `model` has, with those that are nearest to it."""
    names = [name.split(".") for name, _ in model.named_parameters()]
    for prefix in multipliers:
        parts = prefix.split(".")
        right = next(n for n in range(len(parts), -1, -1) if any(name[:n] == parts[:n] for name in names))
        if right < len(parts):
            known = {".".join(name[: right + 1]): None for name in names if name[:right] == parts[:right]}
            raise UserError(
                f"optimizer.multipliers names {prefix!r}, and no parameter's name begins so"
                f"{nearest(prefix, known)}; there are {', '.join(known)}"
            )


def full_weights(checkpoints: Path, tag: str) -> dict[str, torch.Tensor]:
    """The fp32 weights of a saved checkpoint, put together from all ranks' shards, at any ZeRO stage."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    weights: dict[str, torch.Tensor] = get_fp32_state_dict_from_zero_checkpoint(str(checkpoints), tag)
    return {name: value.clone() for name, value in weights.items()}
