"""`attention_kl` by the vendor's matrix products with one Triton kernel, of rows only, between them.

For fp32, and for GPUs before compute capability 8.0 (V100, T4), where Triton multiplies without tensor cores.
"""

import torch
from torch import Tensor

from dist_fusion.kernels.launch import arguments, start, tile_side
from dist_fusion.kernels.problem import Problem, Solution, empty_as, of_student_heads

TILE = 1024
"""Scores of a program: a row is whole, so long rows come few at a time."""
MOST_KEYS = 4096
"""Of a row in registers."""


def solve(problem: Problem, gradients: bool) -> Solution:
    """The loss and, if asked for, both gradients. Three maps at most live at a time, and none after it."""
    from dist_fusion.kernels import device  # not before it is needed: Triton reads its environment there

    p = problem
    pairs, heads, queries, _ = p.student_query.shape
    keys = p.student_key.shape[2]
    # The slopes of masked rows are 0, but 0 times the NaN that padding may hold is NaN.
    query, key = (
        _emptied(x, mask).flatten(0, 1) for x, mask in ((p.student_query, p.query_mask), (p.student_key, p.key_mask))
    )
    teacher_query, teacher_key = (
        of_student_heads(x, p.head_map).flatten(0, 1) for x in (p.teacher_query, p.teacher_key)
    )
    scores, side = _scores(query, key), tile_side(keys)
    slopes = torch.empty_like(scores, dtype=query.dtype) if gradients else scores
    given = {
        **arguments(p), "S": scores, "T": _scores(teacher_query, teacher_key), "G": slopes, "GRADIENTS": gradients,
        "QUERIES": max(1, TILE // side), "KEYS": side,
    }  # fmt: skip
    blocks = -(-queries // given["QUERIES"])
    losses = given["LOSS"] = p.coefficient.new_empty(pairs * heads * blocks)
    start(device.rows, (pairs * heads, blocks), given, warps=4)
    if not gradients:
        return Solution(losses.sum(), None, None)
    slope = (p.slope * p.student_scale)[:, None, None, None]
    query_gradient, key_gradient = (
        torch.mul((left @ right).unflatten(0, (pairs, heads)), slope, out=empty_as(like))
        for left, right, like in ((slopes, key, p.student_query), (slopes.mT, query, p.student_key))
    )
    return Solution(losses.sum(), query_gradient, key_gradient)


def _scores(query: Tensor, key: Tensor) -> Tensor:
    """Products [P * H, M, N] in fp32: rounded to half precision, two nearly equal models differ by rounding alone."""
    if query.dtype == torch.float32 or not query.is_cuda:
        return query.float() @ key.float().mT
    return torch.bmm(query, key.mT, out_dtype=torch.float32)


def _emptied(rows: Tensor, mask: Tensor | None) -> Tensor:
    return rows if mask is None else rows.masked_fill(~mask[:, None, :, None], 0)
