"""`attention_kl` in plain PyTorch with the gradients found beside the loss, some pairs at a time.

No map outlives its chunk, and a chunk's maps stay in the cache of the core that made them. This is the CPU's way, and
that of a GPU without Triton.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from dist_fusion.kernels.problem import Problem, Solution, of_student_heads

CHUNK_BYTES = {"cpu": 1 << 20, "cuda": 1 << 27}
"""Of one fp32 map of a chunk, by kind of device: on a CPU a few of them stay in the second-level cache."""


def solve(problem: Problem, gradients: bool) -> Solution:
    """The loss and, if asked for, both gradients."""
    pairs, heads, queries, _ = problem.student_query.shape
    keys = problem.student_key.shape[2]
    query_gradient = torch.empty_like(problem.student_query) if gradients else None
    key_gradient = torch.empty_like(problem.student_key) if gradients else None
    loss = problem.coefficient.new_zeros(())
    size = max(1, CHUNK_BYTES[problem.student_query.device.type] // max(4 * heads * queries * keys, 1))
    for start in range(0, pairs, size):
        part = slice(start, start + size)
        query, key = _clean(problem, part)
        teacher_query, teacher_key = (
            of_student_heads(x[part], problem.head_map).float() for x in (problem.teacher_query, problem.teacher_key)
        )
        rows, slopes = ROWS[problem.direction](
            _log_rows(query, key, problem.student_scale, problem, part),
            _log_rows(teacher_query, teacher_key, problem.teacher_scale, problem, part),
        )
        if problem.query_mask is not None:  # rows that are none may hold what their padding held
            outside = ~problem.query_mask[part, None, :, None]
            rows, slopes = rows.masked_fill_(outside, 0), slopes.masked_fill_(outside, 0)
        loss = loss + (rows.sum((1, 2, 3)) * problem.coefficient[part]).sum()
        if query_gradient is not None and key_gradient is not None:
            slopes *= (problem.slope[part] * problem.student_scale)[:, None, None, None]
            query_gradient[part] = slopes @ key
            key_gradient[part] = slopes.mT @ query
    return Solution(loss, query_gradient, key_gradient)


def rescale(kept: Tensor, factor: Tensor, may_change: bool) -> Tensor:
    """`kept` [P, H, L, K] times `factor`, a scalar or [P, 1, 1, 1] in fp32, rounded once."""
    if kept.device.type == "cpu" and factor.numel() == 1 and factor.item() == 1:
        return kept
    return torch.mul(kept, factor, out=kept if may_change else torch.empty_like(kept))


def _clean(problem: Problem, part: slice) -> tuple[Tensor, Tensor]:
    """The student's queries and keys in fp32, padding emptied: a NaN there times a slope of 0 would still be NaN."""
    query, key = problem.student_query[part].float(), problem.student_key[part].float()
    if problem.query_mask is not None:
        query = query.masked_fill(~problem.query_mask[part, None, :, None], 0)
    if problem.key_mask is not None:
        key = key.masked_fill(~problem.key_mask[part, None, :, None], 0)
    return query, key


def _log_rows(query: Tensor, key: Tensor, scale: float, problem: Problem, part: slice) -> Tensor:
    """Log of the attention rows, [P, H, M, N]; finite at masked keys."""
    scores = (query @ key.mT).mul_(scale)
    if problem.key_mask is not None:
        scores.masked_fill_(~problem.key_mask[part, None, None, :], torch.finfo(scores.dtype).min / 2)
    return scores.log_softmax(-1)


def _teacher_student(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    weight = teacher.exp()
    slopes = student.exp().sub_(weight)
    return teacher.sub_(student).mul_(weight), slopes


def _student_teacher(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    weight = student.exp()
    ratio = student.sub_(teacher)
    elements = weight * ratio
    return elements, elements - weight.mul_(elements.sum(-1, keepdim=True))


ROWS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "teacher-student": _teacher_student,
    "student-teacher": _student_teacher,
}
"""By direction: two log-rows -> elements of the KL, and its slope by the student's scores. The log-rows are used up."""
