"""What DeepSpeed made of a step, and steps that must not be made.

A step whose gradients are not finite on one rank is dropped by DeepSpeed on all of them, at every ZeRO stage and in
every precision. It then forgets the gradients; here their names are noted before.
"""

from itertools import chain, islice
from typing import Any

import deepspeed
import torch
from torch import Tensor

NAMED = 5
"""How many of the tensors at fault are named."""


class Steps:
    """Watches the steps of an engine."""

    def __init__(self, engine: deepspeed.DeepSpeedEngine):
        self._engine, self._zero = engine, engine.optimizer
        self._names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
        self._dropping = False
        self.at_fault: list[str] = []  # weights of this rank's shard whose last gradients were not finite
        self.scale_at_fault = False  # whether a lower loss scale may be all that the last dropped step needed
        self._update_scale = self._zero._update_scale
        self._zero._update_scale = self._noting

    @property
    def applied(self) -> bool:
        """Whether the last step changed the weights; the same on all ranks."""
        applied: bool = self._engine.was_step_applied()
        return applied

    @property
    def scale_at_floor(self) -> bool:
        """Whether the loss scale changes and cannot come down any more."""
        scaler = self._zero.loss_scaler
        return scaler.dynamic and scaler.cur_scale <= scaler.min_scale

    def drop(self, loss: Tensor) -> Tensor:
        """What to learn from in place of `loss`, so that all ranks drop the step. The loss scale is left alone."""
        self._dropping = True
        return loss * torch.nan

    def lower_scale(self, factor: float) -> None:
        """Divide the loss scale, if it is a dynamic one."""
        scaler = self._zero.loss_scaler
        if scaler.dynamic:
            scaler.cur_scale = max(scaler.cur_scale / factor, scaler.min_scale)

    def _noting(self, overflow: bool = False) -> None:
        """Called by DeepSpeed between the finding of what is not finite and the forgetting of it."""
        self.at_fault = list(islice(self._not_finite(), NAMED)) if overflow and not self._dropping else []
        scaler = self._zero.loss_scaler
        # As it was in this step: one that comes down to its floor now has not been tried there.
        self.scale_at_fault = overflow and not self._dropping and scaler.dynamic and not self.scale_at_floor
        if scaler.dynamic:
            scaler.raise_error_at_min_scale = False  # what a floor means is decided elsewhere, on all ranks alike
        if not self._dropping:
            self._update_scale(overflow)
        self._dropping = False

    def _not_finite(self) -> Any:
        # Offloaded by stage 1 and 2, gradients are on their way to the host by then; of each there is a norm.
        if getattr(self._zero, "cpu_offload", False):
            norms = self._zero.norm_for_param_grads
            for parameter in chain.from_iterable(self._zero.params_in_partition):
                if not torch.as_tensor(norms.get(self._zero.get_param_id(parameter), 0.0)).isfinite():
                    yield self._names[id(parameter)]
            return
        groups = self._zero.fp16_groups if hasattr(self._zero, "fp16_groups") else self._zero.params_in_partition
        for number, gradients in self._zero.averaged_gradients.items():
            for parameter, gradient in zip(groups[number], gradients or (), strict=False):
                if not gradient.isfinite().all():
                    yield self._names[id(parameter)]
