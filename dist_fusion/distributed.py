"""Ranks: who I am, and the few collectives the method needs. Everything works alone, without a process group.

What hosts know (counts, flags, sums of weights) are CPU tensors and travel between the hosts, by gloo. Only what is on
the GPUs travels between them, by NCCL: so no host waits for its GPU to learn what another host knew all along.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def rank() -> int:
    """This process's rank, 0 when alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many ranks there are, 1 when alone."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Wait for every rank."""
    if world_size() > 1:
        dist.barrier()


def summed(values: Tensor) -> Tensor:
    """The sum of `values` over all ranks, on every rank, by the way of the device they are on. Collective."""
    if world_size() > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values


def by_rank(values: Tensor) -> Tensor:
    """Every rank's `values` [n], as [ranks, n], on every rank. Collective."""
    if world_size() == 1:
        return values[None]
    everyone = values.new_empty(world_size(), *values.shape)
    dist.all_gather(list(everyone.unbind(0)), values)
    return everyone


def on_any_rank(*flags: bool) -> list[bool]:
    """For each flag, whether it is set on at least one rank. Collective."""
    if world_size() == 1:
        return list(flags)
    values = torch.tensor(flags, dtype=torch.int64)
    dist.all_reduce(values, dist.ReduceOp.MAX)
    return [bool(value) for value in values.tolist()]


def from_first(value: Any) -> Any:
    """Rank 0's `value`, on every rank. Collective."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gathered(value: Any) -> list[Any]:
    """Every rank's `value`, in the order of ranks. Collective."""
    found = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(found, value)
    return found


def gather_rows(x: Tensor) -> Tensor:
    """Every rank's rows of `x` [R, ...] in the order of ranks, with gradient; R may differ. Collective.

    The gradient of a row is summed over all ranks that used it. Ranks exchange counts, then padded rows: an
    all-gather of unequal shapes aborts. The counts travel between the hosts, the rows wherever they are. Rows without
    data, of which operations are only counted, are nobody else's.
    """
    if world_size() == 1 or isinstance(x, FakeTensor):
        return x
    mine = torch.zeros(world_size(), dtype=torch.int64)
    mine[rank()] = len(x)
    counts = summed(mine).tolist()
    padded: Tensor = _AllGather.apply(x, max(counts))  # [ranks, most rows, ...]
    return torch.cat([rows[:count] for rows, count in zip(padded, counts, strict=True)])


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, capacity: int) -> Tensor:
        ctx.num_rows = len(x)
        padded = x.new_zeros(capacity, *x.shape[1:])
        padded[: len(x)] = x
        everyone = x.new_empty(world_size(), *padded.shape)
        dist.all_gather(list(everyone.unbind(0)), padded)
        return everyone

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient = gradients[0].contiguous()
        dist.all_reduce(gradient)
        return gradient[rank()][: ctx.num_rows], None
