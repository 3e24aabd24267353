"""`attention_kl` in Triton: one launch for loss and gradients where one side is short, three where both are long.

For GPUs whose tensor cores Triton can use (compute capability 8.0 and later); on a CPU it runs in Triton's interpreter.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dist_fusion.kernels.launch import arguments, capability_of, start, strides, tile_side
from dist_fusion.kernels.problem import Problem, Solution, empty_as

SHORT_KEYS = 64
"""So many keys stay on chip beside a block of queries, without spilling registers."""
SHORT_QUERIES = 128
"""So many queries stay on chip through both passes over the keys, without spilling registers."""
HOPPER = (9, 0)
"""From here on four warps multiply tiles of 64 by 64 without spilling; before, it takes eight."""
BLOCK = 4096
"""Numbers that one program scales."""


class Launch(NamedTuple):
    """The first kernel, and the sizes of its tiles."""

    kernel: str
    queries: int
    keys: int
    warps: int


def launch(queries: int, keys: int, capability: tuple[int, int]) -> Launch:
    """How so many queries are compared with so many keys on a GPU of a compute capability."""
    warps = 4 if capability >= HOPPER else 8
    if keys <= SHORT_KEYS:
        height, width = min(64, tile_side(queries)), tile_side(keys)
        return Launch("short_keys", height, width, warps if height * width > 2048 else 4)
    if queries <= SHORT_QUERIES:
        return Launch("short_queries", tile_side(queries), 64, 8 if queries > 64 else warps)
    return Launch("row_sums", 64, 64, 4)


def solve(problem: Problem, gradients: bool) -> Solution:
    """The loss and, if asked for, both gradients."""
    from dist_fusion.kernels import device  # not before it is needed: Triton reads its environment there

    pairs, heads, queries, _ = problem.student_query.shape
    keys = problem.student_key.shape[2]
    plan = launch(queries, keys, capability_of(problem.student_query.device))
    dq = empty_as(problem.student_query) if gradients else problem.student_query
    dk = empty_as(problem.student_key) if gradients else problem.student_key
    blocks = -(-queries // plan.queries) if plan.kernel == "row_sums" else 1
    losses = problem.coefficient.new_empty(pairs * heads * blocks)
    given = {
        **arguments(problem), **strides("dq", dq), **strides("dk", dk), "DQ": dq, "DK": dk, "LOSS": losses,
        "QUERIES": plan.queries, "KEYS": plan.keys, "GRADIENTS": gradients,
    }  # fmt: skip
    if plan.kernel == "row_sums":
        given["S_LOG"], given["OTHER"] = problem.coefficient.new_empty(2, pairs * heads, queries)
        start(device.row_sums, (pairs * heads, blocks), given, plan.warps)
        if gradients:
            start(device.query_gradients, (pairs * heads, blocks), given, plan.warps)
            start(device.key_gradients, (pairs * heads, -(-keys // plan.keys)), given, plan.warps)
    else:
        start(getattr(device, plan.kernel), (pairs * heads,), given, plan.warps)
    return Solution(losses.sum(), dq if gradients else None, dk if gradients else None)


def rescale(kept: Tensor, factor: Tensor, may_change: bool) -> Tensor:
    """`kept` [P, H, L, K] times `factor`, a scalar or [P, 1, 1, 1] in fp32, rounded once; read by the device alone."""
    if not may_change or factor.numel() > 1:
        return torch.mul(kept, factor, out=kept if may_change else torch.empty_like(kept))
    from dist_fusion.kernels import device

    start(
        device.scaled,
        (-(-kept.numel() // BLOCK),),
        {"X": kept, "FACTOR": factor, "size": kept.numel(), "BLOCK": BLOCK},
        warps=4,
    )
    return kept
