"""How a model runs: what it computes twice, and what is compiled. Weights, their names and results stay as they are."""

from torch import nn

from dist_fusion.models.fusion import BridgeTower, Fusion
from dist_fusion.models.layers import Encoder


def set_execution(
    model: nn.Module, *, activation_checkpointing: bool, compile: bool, backend: str = "inductor"
) -> None:
    """Set up the towers and the fusion of `model`, in place.

    With `activation_checkpointing` every block and fusion layer keeps its inputs alone, and computes the rest again,
    with the same random numbers, in the backward pass. With `compile` each tower and the fusion is compiled when it is
    first called, for any number of rows.
    """
    for part in model.modules():
        if isinstance(part, Encoder | BridgeTower):
            part.recompute = activation_checkpointing
        if compile and isinstance(part, Encoder | Fusion):
            part.compile(dynamic=True, backend=backend)
