"""How models run: what they compute twice, what is compiled, and what runs beside the rest.

Weights, their names and results stay as they are.
"""

from typing import TypeVar

import torch
from torch import nn

from dist_fusion.models.fusion import BridgeTower, Fusion
from dist_fusion.models.layers import Encoder

T = TypeVar("T")


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


class Aside:
    """A second stream of a GPU: what is asked for inside `with aside:` runs beside what follows, until it is joined.

    On a CPU, or if not wanted, it does nothing: all runs in the order in which it is asked for.

    Memory is safe without `record_stream`. What is made aside is given out again only aside, and there each `with`
    first waits for the main stream, so for all its reads. What the main stream made and is read aside must be let go
    after the join: from there on the main stream is behind those reads.
    """

    def __init__(self, device: torch.device, wanted: bool):
        self._stream = torch.cuda.Stream(device) if wanted and device.type == "cuda" else None
        self._chosen = torch.cuda.stream(self._stream)  # without a stream it does nothing

    def __enter__(self) -> None:
        if self._stream:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        self._chosen.__enter__()

    def __exit__(self, *raised: object) -> None:
        self._chosen.__exit__(*raised)

    def joined(self, result: T) -> T:
        """What was made aside, from now on safe to use: the main stream waits for all that was asked for aside."""
        if self._stream:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
        return result
