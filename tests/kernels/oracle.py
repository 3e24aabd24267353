"""What the kernels are measured against: float64 autograd of the reference, on the very numbers they were given."""

from typing import NamedTuple

import torch
from torch import Tensor

from dist_fusion.kernels import attention_kl

MASKS = ("none", "key", "query", "both")
LAYOUTS = ("heads first", "tokens first", "packed")


class Case(NamedTuple):
    """Inputs of `attention_kl`."""

    student_query: Tensor
    student_key: Tensor
    teacher_query: Tensor
    teacher_key: Tensor
    query_mask: Tensor | None
    key_mask: Tensor | None
    pair_weight: Tensor


class Answer(NamedTuple):
    loss: Tensor
    query_gradient: Tensor
    key_gradient: Tensor


def make_case(
    *, pairs=2, heads=2, teacher_heads=2, queries=5, keys=7, width=16, teacher_width=16, dtype=torch.float32,
    masks="both", layout="heads first", size=1.0, near=None, seed=0,
) -> Case:  # fmt: skip
    """Random inputs whose padding is NaN and infinity; `near` makes the teacher the student plus so much noise."""
    draw = torch.Generator().manual_seed(seed)

    def rows(heads, length, width):
        if layout == "heads first":
            return torch.randn(pairs, heads, length, width, generator=draw).mul(size).to(dtype)
        if layout == "tokens first":
            return torch.randn(pairs, length, heads, width, generator=draw).mul(size).to(dtype).transpose(1, 2)
        packed = torch.randn(pairs, length, 3, heads, width, generator=draw).mul(size).to(dtype)
        return packed[:, :, 1].transpose(1, 2)

    student = [rows(heads, length, width) for length in (queries, keys)]
    teacher = [rows(teacher_heads, length, teacher_width) for length in (queries, keys)]
    if near is not None:
        teacher = [(s.float() + near * t.float()).to(dtype) for s, t in zip(student, teacher, strict=True)]
    query_mask = key_mask = None
    if masks in ("key", "both"):
        key_mask = torch.rand(pairs, keys, generator=draw) > 0.4
        key_mask[:, 0] = True
    if masks in ("query", "both"):
        query_mask = torch.rand(pairs, queries, generator=draw) > 0.4
        query_mask[:, -1] = True
    for (query, key), bad in zip((student, teacher), (float("nan"), float("inf")), strict=True):
        for x, mask in ((query, query_mask), (key, key_mask)):
            if mask is not None:
                x.transpose(1, 2)[~mask] = bad
    return Case(*student, *teacher, query_mask, key_mask, torch.rand(pairs, generator=draw) + 0.5)


def solve(case: Case, from_above: float = 1.0, **how) -> Answer:
    """Loss and gradients by `attention_kl`."""
    query, key = (x.detach().requires_grad_() for x in case[:2])
    loss = attention_kl(
        query, key, *case[2:4], query_mask=case.query_mask, key_mask=case.key_mask, pair_weight=case.pair_weight, **how
    )
    (from_above * loss).backward()
    return Answer(loss.detach(), query.grad, key.grad)


def truth(case: Case, from_above: float = 1.0, **how) -> Answer:
    """The same in float64 by autograd, with the padding emptied first."""

    def clean(x, mask):
        return x.double() if mask is None else x.double().masked_fill(~mask[:, None, :, None], 0)

    masks = (case.query_mask, case.key_mask) * 2
    exact = case._replace(**{
        name: clean(x, mask) for name, x, mask in zip(Case._fields[:4], case[:4], masks, strict=True)
    })  # fmt: skip
    return solve(exact, from_above, **how | {"impl": "reference"})


def distance(found: Tensor, wanted: Tensor) -> float:
    """How far off, by what it should be; as it is where that is 0. NaN is infinitely far."""
    assert torch.isfinite(found).all()
    size = wanted.double().norm()
    off = (found.double() - wanted.double()).norm()
    return (off / size if size else off).item()


def distances(found: Answer, wanted: Answer) -> tuple[float, float, float]:
    return tuple(distance(f, w) for f, w in zip(found, wanted, strict=True))
