"""The model and its optimizer inside DeepSpeed: groups of parameters, the schedule, and what a step tells."""

from collections.abc import Mapping
from typing import Any

import deepspeed
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from dist_fusion.config import Config, OptimizerConfig
from dist_fusion.engine.sharding import ds_config
from dist_fusion.schema import UserError, nearest

UNDECAYED = ("modality", "sentence")
"""Type embeddings, which take no weight decay whatever their shape."""


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


def learning_rates(engine: deepspeed.DeepSpeedEngine) -> dict[str, float]:
    """The rates of the coming step, by path: of each group by its multiplier (`base`, `x10`, `x10.no_decay`)."""
    rates = {"optimizer/learning_rate": base_learning_rate(engine)}
    for group in engine.optimizer.param_groups:
        name = "base" if group["multiplier"] == 1 else f"x{group['multiplier']:g}"
        rates[f"optimizer/learning_rate/{name}{'' if group['weight_decay'] else '.no_decay'}"] = group["lr"]
    return rates


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
