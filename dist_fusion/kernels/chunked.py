"""`attention_kl` in plain PyTorch with the gradients found beside the loss, some pairs at a time.

No map outlives its chunk: four are laid out once and written again and again, small enough to stay in a core's cache.
This is the CPU's way, and that of a GPU without Triton. Scores are in base 2, in which powers cost a third.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from dist_fusion.kernels.problem import Problem, Solution, empty_as, of_student_heads

CHUNK_BYTES = {"cpu": 1 << 21, "cuda": 1 << 27}
"""Of one fp32 map of a chunk, by kind of device."""
FLOOR = -1e30
"""Added to the scores of masked keys. Finite: differences of infinities are not numbers."""
LOG2E, LN2 = math.log2(math.e), math.log(2)


class Rows(NamedTuple):
    """One model's scores less the largest of their row, their powers of 2, and the sums of these."""

    scores: Tensor  # [p, H, M, N]
    powers: Tensor  # [p, H, M, N]
    sums: Tensor  # [p, H, M, 1]


def solve(problem: Problem, gradients: bool) -> Solution:
    """The loss and, if asked for, both gradients."""
    p = problem._replace(query_mask=_telling(problem.query_mask), key_mask=_telling(problem.key_mask))
    pairs, heads, queries, _ = p.student_query.shape
    keys = p.student_key.shape[2]
    query_gradient = empty_as(p.student_query) if gradients else None
    key_gradient = empty_as(p.student_key) if gradients else None
    # A row that is none counts nothing.
    by_row = p.coefficient.new_ones(pairs, 1) if p.query_mask is None else p.query_mask.float()
    outside = None if p.key_mask is None else FLOOR * (~p.key_mask).float()
    loss = p.coefficient.new_zeros(())
    size = max(1, min(pairs, CHUNK_BYTES[p.student_query.device.type] // (4 * heads * queries * keys)))
    # One chunk's memory, for all of them: new memory must be fetched from the system, page by page, every time.
    maps = p.coefficient.new_empty(4, size, heads, queries, keys)
    inputs = ((p.student_query, p.query_mask), (p.student_key, p.key_mask),
              (p.teacher_query, p.query_mask), (p.teacher_key, p.key_mask))  # fmt: skip
    dense = [p.coefficient.new_empty(size, *x.shape[1:]) for x, _ in inputs]
    for start in range(0, pairs, size):
        part = slice(start, min(start + size, pairs))
        here = [memory[: part.stop - start] for memory in (*maps, *dense)]
        query, key, teacher_query, teacher_key = (
            _dense(x, mask, part, memory) for (x, mask), memory in zip(inputs, here[4:], strict=True)
        )
        teacher_query, teacher_key = (of_student_heads(x, p.head_map) for x in (teacher_query, teacher_key))
        floor = None if outside is None else outside[part, None, None, :]
        kl, slopes = DIVERGENCES[p.direction](
            _rows(query, key, p.student_scale, floor, here[0], here[1]),
            _rows(teacher_query, teacher_key, p.teacher_scale, floor, here[2], here[3]),
        )
        loss = loss + (kl.sum(1) * by_row[part] * p.coefficient[part, None]).sum()
        if query_gradient is not None and key_gradient is not None:
            slopes *= (by_row[part] * (p.slope[part, None] * p.student_scale))[:, None, :, None]
            # The teacher's memory has done its work, and takes the products before they go where they belong.
            query_gradient[part] = torch.matmul(slopes, key, out=_reused(here[6], query))
            key_gradient[part] = torch.matmul(slopes.mT, query, out=_reused(here[7], key))
    return Solution(loss, query_gradient, key_gradient)


def rescale(kept: Tensor, factor: Tensor, may_change: bool) -> Tensor:
    """`kept` [P, H, L, K] times `factor`, a scalar or [P, 1, 1, 1] in fp32, rounded once."""
    if kept.device.type == "cpu" and factor.numel() == 1 and factor.item() == 1:
        return kept
    return torch.mul(kept, factor, out=kept if may_change else torch.empty_like(kept))


def _telling(mask: Tensor | None) -> Tensor | None:
    """None where a mask tells nothing: on a CPU looking is free, and images have no padding."""
    return None if mask is not None and mask.device.type == "cpu" and not is_fake(mask) and mask.all() else mask


def _reused(memory: Tensor, like: Tensor) -> Tensor | None:
    """`memory` if it has the shape that is needed: a teacher may have other heads, and other widths."""
    return memory if memory.shape == like.shape else None


def _dense(x: Tensor, mask: Tensor | None, part: slice, memory: Tensor) -> Tensor:
    """Some pairs of [P, H, L, K] in fp32, without gaps (each product would make its own copy) and with zero padding.

    Padding may hold a NaN, which times 0 is a NaN again; its bits and no bits are no bits, and a good deal faster.
    """
    memory.copy_(x[part])
    if mask is not None:
        memory.view(torch.int32).bitwise_and_(-mask[part, None, :, None].to(torch.int32))
    return memory


def _rows(query: Tensor, key: Tensor, scale: float, floor: Tensor | None, scores: Tensor, powers: Tensor) -> Rows:
    """One model's rows, written into `scores` and `powers`."""
    torch.matmul(query, key.mT, out=scores)
    scores *= scale * LOG2E
    if floor is not None:
        scores += floor
    scores -= scores.amax(-1, keepdim=True)
    torch.exp2(scores, out=powers)
    return Rows(scores, powers, powers.sum(-1, keepdim=True))


def _teacher_student(student: Rows, teacher: Rows) -> tuple[Tensor, Tensor]:
    ratio, p, r = teacher.scores, student.powers, teacher.powers
    ratio -= student.scores
    p /= student.sums
    r /= teacher.sums
    kl = LN2 * (ratio.mul_(r).sum(-1) + _log_sums(student, teacher))
    return kl, p.sub_(r)


def _student_teacher(student: Rows, teacher: Rows) -> tuple[Tensor, Tensor]:
    ratio, p = student.scores, student.powers
    ratio -= teacher.scores
    p /= student.sums
    ratio *= p
    mean = ratio.sum(-1, keepdim=True)
    kl = LN2 * (mean[..., 0] - _log_sums(student, teacher))
    return kl, ratio.sub_(p.mul_(mean)).mul_(LN2)


def _log_sums(student: Rows, teacher: Rows) -> Tensor:
    return (student.sums.log2() - teacher.sums.log2())[..., 0]


DIVERGENCES: dict[str, Callable[[Rows, Rows], tuple[Tensor, Tensor]]] = {
    "teacher-student": _teacher_student,
    "student-teacher": _student_teacher,
}
"""By direction: both models' rows, which are used up -> KL [p, H, M], and its slope by the student's scores."""
