"""What every implementation of `attention_kl` is given, and what it gives back."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Problem(NamedTuple):
    """Two models' queries and keys of the same pairs, and how their attention rows are to be compared."""

    student_query: Tensor  # [P, H, M, K]
    student_key: Tensor  # [P, H, N, K]
    teacher_query: Tensor  # [P, H', M, K']
    teacher_key: Tensor  # [P, H', N, K']
    query_mask: Tensor | None  # [P, M] bool
    key_mask: Tensor | None  # [P, N] bool
    coefficient: Tensor  # [P] fp32: what one row's KL counts in the loss
    slope: Tensor  # [P] fp32: what it counts in the gradients that are kept
    direction: str
    temperature: float
    head_map: tuple[int, ...] | None  # for each student head its teacher head

    @property
    def student_scale(self) -> float:
        """Of the student's scores."""
        return 1 / (self.temperature * self.student_query.shape[-1] ** 0.5)

    @property
    def teacher_scale(self) -> float:
        """Of the teacher's scores, by its own head width."""
        return 1 / (self.temperature * self.teacher_query.shape[-1] ** 0.5)


class Solution(NamedTuple):
    """The loss, and its gradients as if each row counted `slope`; None where they were not asked for."""

    loss: Tensor  # scalar, fp32
    query_gradient: Tensor | None  # as student_query, in its dtype and order of strides
    key_gradient: Tensor | None  # as student_key


Solve = Callable[[Problem, bool], Solution]
"""An implementation: of a problem, with gradients or without."""


def coefficients(
    query_mask: Tensor | None, key_mask: Tensor | None, pair_weight: Tensor | None, student_query: Tensor
) -> Tensor:
    """What one row's KL counts, [P] in fp32: the pair's weight over its heads and valid queries; 0 without a key."""
    pairs, heads, queries, _ = student_query.shape
    if pair_weight is None:
        weight = student_query.new_full((pairs,), 1 / max(pairs, 1), dtype=torch.float32)
    else:
        weight = pair_weight.detach().float()
    if key_mask is not None:
        weight = weight * key_mask.any(-1)
    rows = queries if query_mask is None else query_mask.sum(-1).clamp(min=1)
    return weight / (heads * rows)


def of_student_heads(tensor: Tensor, head_map: Sequence[int] | None) -> Tensor:
    """A teacher's [P, H', L, K] as [P, H, L, K], for each student head its own."""
    return tensor if head_map is None else tensor[:, list(head_map)]


def empty_as(x: Tensor) -> Tensor:
    """New memory for the shape and type of `x`, without gaps and with its dimensions in the same order."""
    order = sorted(range(x.ndim), key=x.stride().__getitem__, reverse=True)
    return torch.empty_permuted(x.shape, order, dtype=x.dtype, device=x.device)
