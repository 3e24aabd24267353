"""The contract of `attention_kl` in plain PyTorch: what every faster implementation is tested against."""

from collections.abc import Callable

import torch
from torch import Tensor


def _teacher_student(student: Tensor, teacher: Tensor) -> Tensor:
    return teacher.exp() * (teacher - student)


def _student_teacher(student: Tensor, teacher: Tensor) -> Tensor:
    return student.exp() * (student - teacher)


def _squared(student: Tensor, teacher: Tensor) -> Tensor:
    return (student.exp() - teacher.exp()) ** 2


DIRECTIONS = {"teacher-student": _teacher_student, "student-teacher": _student_teacher}
"""Element of a KL divergence from two log-probabilities, by direction."""


def reference_attention_kl(
    student_query: Tensor,
    student_key: Tensor,
    teacher_query: Tensor,
    teacher_key: Tensor,
    *,
    query_mask: Tensor | None,
    key_mask: Tensor | None,
    pair_weight: Tensor | None,
    direction: str,
    temperature: float,
) -> Tensor:
    """`attention_kl` with materialised maps, in fp32 (fp64 if the inputs are)."""
    return _over_rows(
        DIRECTIONS[direction], student_query, student_key, teacher_query, teacher_key, query_mask, key_mask,
        pair_weight, temperature,
    )  # fmt: skip


def reference_attention_l2(
    student_query: Tensor,
    student_key: Tensor,
    teacher_query: Tensor,
    teacher_key: Tensor,
    *,
    query_mask: Tensor | None,
    key_mask: Tensor | None,
    pair_weight: Tensor | None,
    temperature: float,
) -> Tensor:
    """`attention_l2` with materialised maps, in fp32 (fp64 if the inputs are)."""
    return _over_rows(
        _squared, student_query, student_key, teacher_query, teacher_key, query_mask, key_mask, pair_weight, temperature
    )


def _over_rows(
    element: Callable[[Tensor, Tensor], Tensor],
    student_query: Tensor,
    student_key: Tensor,
    teacher_query: Tensor,
    teacher_key: Tensor,
    query_mask: Tensor | None,
    key_mask: Tensor | None,
    pair_weight: Tensor | None,
    temperature: float,
) -> Tensor:
    """`element` of two log-rows summed over keys, averaged over heads and valid queries, and summed over pairs."""
    pairs, _, num_queries, _ = student_query.shape
    if query_mask is None:
        query_mask = student_query.new_ones(pairs, num_queries, dtype=torch.bool)
    if key_mask is None:
        key_mask = student_query.new_ones(pairs, student_key.shape[2], dtype=torch.bool)
    with torch.autocast(student_query.device.type, enabled=False):
        student = _log_attention(student_query, student_key, query_mask, key_mask, temperature)
        teacher = _log_attention(teacher_query.detach(), teacher_key.detach(), query_mask, key_mask, temperature)
        # Masked keys are 0 in both, where every element is 0 as well.
        rows = element(student, teacher).sum(-1)  # [P, H, M]
        valid = (query_mask & key_mask.any(-1, keepdim=True)).to(rows.dtype)  # [P, M]
        by_pair = (rows.mean(1) * valid).sum(-1) / valid.sum(-1).clamp(min=1)
        if pair_weight is None:
            pair_weight = by_pair.new_full((pairs,), 1 / max(pairs, 1))
        return (by_pair * pair_weight.to(by_pair.dtype)).sum()


def _log_attention(query: Tensor, key: Tensor, query_mask: Tensor, key_mask: Tensor, temperature: float) -> Tensor:
    """Log of the attention rows [P, H, M, N]; 0 at masked keys, so that they add nothing to either direction."""
    kind = torch.float64 if query.dtype == torch.float64 else torch.float32
    # Padding is emptied before the product: a NaN there times a gradient of 0 would still be NaN.
    query = query.to(kind).masked_fill(~query_mask[:, None, :, None], 0)
    key = key.to(kind).masked_fill(~key_mask[:, None, :, None], 0)
    scores = query @ key.transpose(-2, -1) / (temperature * query.shape[-1] ** 0.5)
    outside = ~key_mask[:, None, None, :]
    # A finite floor: with -inf the masked element of the divergence is 0 * inf (DiDE's expression gives NaN).
    return scores.masked_fill(outside, torch.finfo(kind).min / 2).log_softmax(-1).masked_fill(outside, 0)
