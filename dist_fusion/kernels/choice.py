"""Which implementation of `attention_kl` runs where: one table, first row that fits."""

from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor

from dist_fusion.kernels.hybrid import MOST_KEYS
from dist_fusion.kernels.launch import capability_of

HALVES = frozenset({torch.float16, torch.bfloat16})
SINGLES = HALVES | {torch.float32}
HAS_TRITON = find_spec("triton") is not None


class Place(NamedTuple):
    """What a choice depends on."""

    device: str  # its kind
    capability: tuple[int, int]  # compute capability; (0, 0) for what has none
    dtypes: frozenset[torch.dtype]  # of all four inputs
    keys: int  # the longest row
    triton: bool  # is it there?


class Rule(NamedTuple):
    """An implementation and the least it needs."""

    impl: str
    device: str
    capability: tuple[int, int]
    dtypes: frozenset[torch.dtype]
    most_keys: float = float("inf")
    triton: bool = True


RULES = (
    Rule("triton", "cuda", (8, 0), HALVES),
    Rule("hybrid", "cuda", (7, 0), SINGLES, most_keys=MOST_KEYS),
    Rule("chunked", "cuda", (0, 0), SINGLES, triton=False),
    Rule("chunked", "cpu", (0, 0), SINGLES, triton=False),
)


def choose(place: Place) -> str:
    """The implementation for `place`; `reference` (fp64, other devices) where no rule fits."""
    fitting = (
        rule.impl
        for rule in RULES
        if rule.device == place.device
        and rule.capability <= place.capability
        and rule.dtypes >= place.dtypes
        and rule.most_keys >= place.keys
        and rule.triton <= place.triton
    )
    return next(fitting, "reference")


def place_of(tensors: tuple[torch.Tensor, ...]) -> Place:
    """Where a student's and a teacher's queries and keys are. Tensors without data are nowhere a kernel could run."""
    device, fake = tensors[0].device, isinstance(tensors[0], FakeTensor)
    capability = (0, 0) if fake else capability_of(device)
    kinds = frozenset(x.dtype for x in tensors)
    return Place(device.type, capability, kinds, tensors[1].shape[2], HAS_TRITON and not fake)
