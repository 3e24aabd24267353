"""Attention distillation between queries and keys, without ever keeping a map.

`attention_kl` is the one contract; IMPLS holds its implementations, `reference` being the contract itself in plain
PyTorch. A faster one is a file here, a line in IMPLS and a test against `reference`.
"""

from collections.abc import Callable, Sequence

from torch import Tensor

from dist_fusion.kernels.reference import DIRECTIONS, reference_attention_kl, reference_attention_l2

IMPLS: dict[str, Callable[..., Tensor]] = {"reference": reference_attention_kl}


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

    Args:
        student_query: [P, H, M, K]; student_key: [P, H, N, K].
        teacher_query: [P, H', M, K']; teacher_key: [P, H', N, K'].
        query_mask: [P, M] bool; key_mask: [P, N] bool; all valid if None.
        pair_weight: [P], 1/P if None.
        head_map: for each student head its teacher head; one to one if None.

    Raises:
        ValueError: for an unknown direction or implementation, or head counts that differ without a `head_map`.
    """
    if direction not in DIRECTIONS:
        raise ValueError(f"direction is {direction!r}; it can be {', '.join(DIRECTIONS)}")
    if impl != "auto" and impl not in IMPLS:
        raise ValueError(f"impl is {impl!r}; it can be auto, {', '.join(IMPLS)}")
    teacher_query, teacher_key = _headed(student_query, teacher_query, teacher_key, head_map)
    return IMPLS["reference" if impl == "auto" else impl](
        student_query, student_key, teacher_query, teacher_key,
        query_mask=query_mask, key_mask=key_mask, pair_weight=pair_weight,
        direction=direction, temperature=temperature,
    )  # fmt: skip


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
        ValueError: for head counts that differ without a `head_map`.
    """
    teacher_query, teacher_key = _headed(student_query, teacher_query, teacher_key, head_map)
    return reference_attention_l2(
        student_query, student_key, teacher_query, teacher_key,
        query_mask=query_mask, key_mask=key_mask, pair_weight=pair_weight, temperature=temperature,
    )  # fmt: skip


MATCHES: dict[str, Callable[..., Tensor]] = {"kl": attention_kl, "l2": attention_l2}
"""Ways to compare two attention rows; a recipe's `distill.match`."""


def _headed(
    student_query: Tensor, teacher_query: Tensor, teacher_key: Tensor, head_map: Sequence[int] | None
) -> tuple[Tensor, Tensor]:
    """The teacher's queries and keys, for each student head its own."""
    heads, teacher_heads = student_query.shape[1], teacher_query.shape[1]
    if head_map is not None:
        index = list(head_map)
        return teacher_query[:, index], teacher_key[:, index]
    if heads != teacher_heads:
        raise ValueError(
            f"the student has {heads} heads and the teacher {teacher_heads}; give a head_map of {heads} entries"
        )
    return teacher_query, teacher_key
