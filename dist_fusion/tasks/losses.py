"""Losses row by row, [R], in fp32."""

import torch.nn.functional as F
from torch import Tensor


def hard_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """logits [R, C], labels [R] -> [R]."""
    return F.cross_entropy(logits.float(), labels, reduction="none")


def soft_cross_entropy(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) of two sets of logits [R, C] -> [R] (equation 10, in DiDE's direction)."""
    target, guess = teacher.float().log_softmax(-1), student.float().log_softmax(-1)
    return (target.exp() * (target - guess)).sum(-1)


def binary_cross_entropy(logits: Tensor, scores: Tensor) -> Tensor:
    """Sigmoid cross-entropy with answer scores [R, C], summed over answers -> [R] (ViLT's mean x classes)."""
    return F.binary_cross_entropy_with_logits(logits.float(), scores.float(), reduction="none").sum(-1)


def soft_binary_cross_entropy(student: Tensor, teacher: Tensor) -> Tensor:
    """Sigmoid cross-entropy with the teacher's probabilities, summed over answers [R, C] -> [R] (DiDE)."""
    return binary_cross_entropy(student, teacher.float().sigmoid())
