"""Attention distillation between queries and keys, without ever keeping a map.

`attention_kl` is the one contract; IMPLS holds its implementations, `reference` being the contract itself in plain
PyTorch. A faster one is a file here, a line in IMPLS, a line in `choice.RULES` and the tests of the others.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dist_fusion.kernels import chunked, fused, hybrid
from dist_fusion.kernels.autograd import Impl, solved
from dist_fusion.kernels.choice import HAS_TRITON, choose, place_of
from dist_fusion.kernels.launch import interpreting
from dist_fusion.kernels.problem import Problem, coefficients, of_student_heads
from dist_fusion.kernels.reference import DIRECTIONS, reference_attention_kl, reference_attention_l2

IMPLS: dict[str, Impl | None] = {
    "reference": None,  # autograd's own gradients
    "chunked": Impl(chunked.solve, chunked.rescale, needs_triton=False),
    "triton": Impl(fused.solve, fused.rescale, needs_triton=True),
    "hybrid": Impl(hybrid.solve, fused.rescale, needs_triton=True),
}
"""Implementations by the word that forces one; `auto` chooses by `choice.RULES`."""


def attention_kl(
    student_query: Tensor,
    student_key: Tensor,
    teacher_query: Tensor,
    teacher_key: Tensor,
    *,
    query_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    pair_weight: Tensor | None = None,
    direction: str = "teacher-student",
    temperature: float = 1.0,
    head_map: Sequence[int] | None = None,
    impl: str = "auto",
) -> Tensor:
    """Weighted sum over pairs of the mean, over heads and valid queries, of the KL of two attention rows (fp32 scalar).

    A row is the softmax of one query over the valid keys of the other modality, recomputed from queries and keys
    (never sliced from a joint map): equations 7-9 of Huang and Guo (Computer Science 51(9), 2024), as in DiDE
    (arXiv:2112.08723). `direction="teacher-student"` is KL(teacher || student), DiDE's code and the default;
    `"student-teacher"` is the paper's letter. A query is valid if its mask says so and its pair has a valid key.
    Gradients go to the student's queries and keys alone. Padding is never read: it may hold anything.

    Args:
        student_query: [P, H, M, K]; student_key: [P, H, N, K]; any strides, but the last is 1.
        teacher_query: [P, H', M, K']; teacher_key: [P, H', N, K'].
        query_mask: [P, M] bool; key_mask: [P, N] bool; all valid if None.
        pair_weight: [P], 1/P if None.
        head_map: for each student head its teacher head; one to one if None.
        impl: `auto`, or one of IMPLS.

    Raises:
        ValueError: for an unknown direction or implementation, one that cannot run here, shapes that do not fit, or
            head counts that differ without a `head_map`.
    """
    if direction not in DIRECTIONS:
        raise ValueError(f"direction is {direction!r}; it can be {', '.join(DIRECTIONS)}")
    if impl != "auto" and impl not in IMPLS:
        raise ValueError(f"impl is {impl!r}; it can be auto, {', '.join(IMPLS)}")
    tensors = (student_query, student_key, teacher_query, teacher_key)
    _check(tensors, query_mask, key_mask, pair_weight, head_map)
    chosen = IMPLS[choose(place_of(tensors)) if impl == "auto" else impl]
    if chosen is None or not student_query.numel():  # nothing to launch for no pairs; autograd is right as it is
        teacher_query, teacher_key = (of_student_heads(x, head_map) for x in (teacher_query, teacher_key))
        return reference_attention_kl(
            student_query, student_key, teacher_query, teacher_key,
            query_mask=query_mask, key_mask=key_mask, pair_weight=pair_weight,
            direction=direction, temperature=temperature,
        )  # fmt: skip
    if chosen.needs_triton and not (HAS_TRITON and (student_query.is_cuda or interpreting())):
        raise ValueError(f"impl={impl!r} needs Triton and a GPU, or Triton and TRITON_INTERPRET=1 from the start")
    coefficient = coefficients(query_mask, key_mask, pair_weight, student_query)
    problem = Problem(
        student_query=_unit_stride(student_query),
        student_key=_unit_stride(student_key),
        teacher_query=_unit_stride(teacher_query),
        teacher_key=_unit_stride(teacher_key),
        query_mask=None if query_mask is None else _unit_stride(query_mask),
        key_mask=None if key_mask is None else _unit_stride(key_mask),
        coefficient=coefficient,
        slope=coefficient,
        direction=direction,
        temperature=temperature,
        head_map=None if head_map is None else tuple(head_map),
    )
    return solved(problem, student_query, student_key, chosen)


def attention_l2(
    student_query: Tensor,
    student_key: Tensor,
    teacher_query: Tensor,
    teacher_key: Tensor,
    *,
    query_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    pair_weight: Tensor | None = None,
    direction: str = "teacher-student",
    temperature: float = 1.0,
    head_map: Sequence[int] | None = None,
) -> Tensor:
    """Like `attention_kl`, with the squared distance of two rows in place of their KL (VIRT, arXiv:2112.04195).

    VIRT writes the norm of the difference of two maps; its square, row by row, is our reading. `direction` is without
    meaning here and only makes the two losses one table.

    Raises:
        ValueError: for shapes that do not fit, or head counts that differ without a `head_map`.
    """
    _check((student_query, student_key, teacher_query, teacher_key), query_mask, key_mask, pair_weight, head_map)
    teacher_query, teacher_key = (of_student_heads(x, head_map) for x in (teacher_query, teacher_key))
    return reference_attention_l2(
        student_query, student_key, teacher_query, teacher_key,
        query_mask=query_mask, key_mask=key_mask, pair_weight=pair_weight, temperature=temperature,
    )  # fmt: skip


MATCHES: dict[str, Callable[..., Tensor]] = {"kl": attention_kl, "l2": attention_l2}
"""Ways to compare two attention rows; a recipe's `distill.match`."""


def _check(
    tensors: tuple[Tensor, ...],
    query_mask: Tensor | None,
    key_mask: Tensor | None,
    pair_weight: Tensor | None,
    head_map: Sequence[int] | None,
) -> None:
    """Raises ValueError, naming the argument, for shapes that do not belong together."""
    student_query, student_key, teacher_query, teacher_key = tensors
    pairs, heads, queries, width = student_query.shape
    keys, teacher_heads, teacher_width = student_key.shape[2], teacher_query.shape[1], teacher_query.shape[3]
    wanted: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "student_key": (student_key, (pairs, heads, keys, width)),
        "teacher_query": (teacher_query, (pairs, teacher_heads, queries, teacher_width)),
        "teacher_key": (teacher_key, (pairs, teacher_heads, keys, teacher_width)),
        "query_mask": (query_mask, (pairs, queries)),
        "key_mask": (key_mask, (pairs, keys)),
        "pair_weight": (pair_weight, (pairs,)),
    }
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} is {list(tensor.shape)}; beside the other arguments it must be {list(shape)}")
    for name, mask in (("query_mask", query_mask), ("key_mask", key_mask)):
        if mask is not None and mask.dtype != torch.bool:
            raise ValueError(f"{name} is {mask.dtype}; it must be torch.bool, True at what is valid")
    if head_map is None and heads != teacher_heads:
        raise ValueError(
            f"the student has {heads} heads and the teacher {teacher_heads}; give a head_map of {heads} entries"
        )
    if head_map is not None and not (len(head_map) == heads and all(0 <= head < teacher_heads for head in head_map)):
        raise ValueError(
            f"head_map is {list(head_map)}; it must be {heads} numbers (one a student head), 0 to {teacher_heads - 1}"
        )


def _unit_stride(x: Tensor) -> Tensor:
    """`x` without its history: as it is, or a copy if its last stride is not 1."""
    x = x.detach()
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
