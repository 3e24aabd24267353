"""A checkpoint as it is at this moment, while the run goes on.

Weights and moments change in the optimizer's step alone. So they are copied beside the next forward and backward, and
the run waits only if it comes to its next update before the last of them is copied.
"""

import copy
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

Frozen = tuple[list[Any], Any]
"""The leaves of a state, and its form."""


class Copies:
    """Copies of some states' tensors in the host's memory, in the same places at every save."""

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._places: dict[tuple[object, ...], list[Tensor]] = {}
        self._free = threading.Event()  # set when the originals may change
        self._free.set()

    def freeze(self, states: Sequence[Any]) -> list[Frozen]:
        """Everything of `states` but the tensors as it is now, with the tensors themselves. At once."""
        frozen = []
        for state in states:
            # torch.Size would come back as a plain tuple, which DeepSpeed does not take.
            leaves, form = tree_flatten(state, is_leaf=lambda part: isinstance(part, torch.Size))
            frozen.append(([leaf if isinstance(leaf, Tensor) else copy.deepcopy(leaf) for leaf in leaves], form))
        self._now = torch.cuda.current_stream(self._device).record_event() if self._stream else None
        self._free.clear()
        return frozen

    def take(self, frozen: Sequence[Frozen]) -> list[Any]:
        """The states with copies of their tensors. In another thread than the run's; lets the run go on when done."""
        try:
            with torch.cuda.stream(self._stream):  # without one it does nothing
                if self._stream and self._now:
                    self._stream.wait_event(self._now)
                return self._copied(frozen)
        finally:
            self._free.set()

    def hold(self) -> None:
        """Wait until tensors that are being copied may change."""
        self._free.wait()

    def _copied(self, frozen: Sequence[Frozen]) -> list[Any]:
        found: dict[tuple[object, ...], Tensor] = {}  # what is stored once stays so
        used: dict[tuple[object, ...], int] = {}
        states = []
        for leaves, form in frozen:
            copied = []
            for leaf in leaves:
                if not isinstance(leaf, Tensor):
                    copied.append(leaf)
                    continue
                place = (leaf.data_ptr(), leaf.dtype, leaf.shape, leaf.stride())
                if place not in found:
                    found[place] = self._place(leaf, used).copy_(leaf.detach())
                copied.append(found[place])
            states.append(tree_unflatten(copied, form))
        return states

    def _place(self, like: Tensor, used: dict[tuple[object, ...], int]) -> Tensor:
        """Memory for a copy: that of an earlier save if there is some, since new pages take longer than the copying."""
        kind = (like.dtype, like.shape)
        places, number = self._places.setdefault(kind, []), used.get(kind, 0)
        used[kind] = number + 1
        if number == len(places):
            places.append(torch.empty(like.shape, dtype=like.dtype))
        return places[number]
