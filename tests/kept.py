"""A student beside all that DeepSpeed's optimizer does not own, and what an engine holds of it, by name."""

import hashlib

import torch
from deepspeed.runtime.zero import GatheredParameters
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from torch import Tensor, nn

from dist_fusion.types import Batch, Output
from tests import tiny


class Anchored(nn.Module):
    """A student whose logits a frozen parameter and a tied weight scale, with a count and a mean as buffers."""

    def __init__(self, seed: int):
        super().__init__()
        self.student = tiny.model(tiny.model_config(num_layers=1, num_fusion_layers=1), tiny.PRETRAINING, seed)
        self.anchor = nn.Parameter(torch.rand(7) + 0.5, requires_grad=False)
        self.first, self.second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("level", torch.rand(3))

    def forward(self, batch: Batch) -> Output:
        self.calls += 1
        self.level += 1 / 3
        output = self.student(batch)
        factor = self.anchor.mean() + self.second(self.first(self.level.to(self.anchor.dtype))).mean()
        return output._replace(logits={name: logits * factor for name, logits in output.logits.items()})


def of_engine(engine) -> dict[str, str]:
    """Digests of all that must survive, by name: the same on every rank. Collective."""
    found: dict[str, Tensor] = dict(engine.module.named_buffers())
    if engine.zero_optimization_stage() < 3:
        # DeepSpeed links the moments in the first group's first step, when the other groups have none yet.
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    for name, parameter in engine.module.named_parameters():
        with GatheredParameters([parameter]):
            found[f"{name} weights"] = parameter.detach().clone()
        if parameter.requires_grad:
            found[f"{name} master"] = safe_get_full_fp32_param(parameter)
            for moment in ("exp_avg", "exp_avg_sq") if engine.global_steps else ():
                found[f"{name} {moment}"] = safe_get_full_optimizer_state(parameter, moment)
    steps = {int(state.get("step", 0)) for state in engine.optimizer.optimizer.state.values()}
    rates = [[group["lr"], group["multiplier"], group["weight_decay"]] for group in engine.optimizer.param_groups]
    scaler = engine.optimizer.loss_scaler
    plain = {
        "steps": sorted(steps), "rates": rates, "schedule": engine.lr_scheduler.last_epoch,
        "scaler": [type(scaler).__name__, sorted(vars(scaler).items())],
        "counts": [engine.global_steps, engine.skipped_steps, engine.global_samples],
    }  # fmt: skip
    return {name: digest(value) for name, value in found.items()} | {key: str(value) for key, value in plain.items()}


def digest(value: Tensor) -> str:
    """Of a tensor's precision, shape and bytes."""
    value = value.detach().cpu().contiguous()
    kind = f"{value.dtype} {list(value.shape)} "
    return kind + hashlib.sha256(value.flatten().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]
