import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_fusion.kernels import IMPLS, attention_kl, attention_l2
from dist_fusion.kernels.reference import DIRECTIONS


def taps(pairs=3, heads=2, queries=4, keys=5, width=6, seed=0, dtype=torch.float32):
    draw = torch.Generator().manual_seed(seed)
    shapes = [(pairs, heads, n, width) for n in (queries, keys, queries, keys)]
    return [torch.randn(shape, generator=draw, dtype=dtype) for shape in shapes]


@pytest.mark.parametrize(
    ("direction", "expected"),
    # One query, two keys, width 1: the student's row is softmax(log 3, 0) = (3/4, 1/4), the teacher's (1/2, 1/2).
    [
        ("teacher-student", 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)),
        ("student-teacher", 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)),
    ],
)
@pytest.mark.parametrize("impl", IMPLS)
def test_the_loss_equals_a_hand_computed_example_in_both_directions(direction, expected, impl):
    one = torch.ones(1, 1, 1, 1)
    keys = torch.tensor([math.log(3), 0.0]).view(1, 1, 2, 1)
    loss = attention_kl(one, keys, one, torch.zeros_like(keys), direction=direction, impl=impl)
    assert loss.item() == pytest.approx(expected, abs=1e-6)


def test_the_gradient_of_a_row_is_student_minus_teacher():
    query, key, teacher_query, teacher_key = taps(pairs=1, heads=1, queries=2, keys=3, dtype=torch.float64)
    key.requires_grad_()
    attention_kl(query, key, teacher_query, teacher_key).backward()
    scale = query.shape[-1] ** -0.5
    student = (query @ key.detach().transpose(-2, -1) * scale).softmax(-1)
    teacher = (teacher_query @ teacher_key.transpose(-2, -1) * scale).softmax(-1)
    by_hand = scale * (student - teacher).transpose(-2, -1) @ query / 2  # the mean of two rows
    torch.testing.assert_close(key.grad, by_hand)


@pytest.mark.parametrize("direction", DIRECTIONS)
@given(st.integers(0, 6), st.integers(0, 6), st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_padding_changes_nothing_even_if_it_holds_nan(direction, more_queries, more_keys, seed):
    tight = [x.requires_grad_() for x in taps(seed=seed)]
    loss = attention_kl(*tight, direction=direction)
    loss.backward()
    padded = []
    for x, more in zip(tight, (more_queries, more_keys) * 2, strict=True):
        nan = torch.full((*x.shape[:2], more, x.shape[-1]), float("nan"))
        padded.append(torch.cat([x.detach(), nan], 2).requires_grad_())
    masks = [torch.cat([torch.ones(3, n), torch.zeros(3, m)], 1).bool() for n, m in ((4, more_queries), (5, more_keys))]
    other = attention_kl(*padded, query_mask=masks[0], key_mask=masks[1], direction=direction)
    other.backward()
    assert other.isfinite()
    torch.testing.assert_close(other, loss)
    for x, wide in zip(tight[:2], padded[:2], strict=True):
        torch.testing.assert_close(wide.grad[:, :, : x.shape[2]], x.grad)
        assert (wide.grad[:, :, x.shape[2] :] == 0).all()


def test_repeating_heads_changes_nothing():
    inputs = taps()
    torch.testing.assert_close(attention_kl(*(x.repeat(1, 2, 1, 1) for x in inputs)), attention_kl(*inputs))


def test_a_student_with_the_teachers_queries_and_keys_has_no_loss():
    query, key, *_ = taps()
    for direction in DIRECTIONS:
        assert abs(attention_kl(query, key, query, key, direction=direction).item()) < 1e-6


def test_a_pair_without_a_valid_key_adds_nothing():
    inputs = [x.requires_grad_() for x in taps(pairs=2)]
    key_mask = torch.tensor([[True] * 5, [False] * 5])
    loss = attention_kl(*inputs, key_mask=key_mask, pair_weight=torch.ones(2))
    loss.backward()
    torch.testing.assert_close(loss, attention_kl(*(x[:1] for x in inputs), pair_weight=torch.ones(1)))
    assert all((x.grad[1] == 0).all() for x in inputs[:2])


def test_no_pairs_give_no_loss_and_a_gradient_of_nothing():
    inputs = [x.requires_grad_() for x in taps(pairs=0)]
    loss = attention_kl(*inputs)
    loss.backward()
    assert loss.item() == 0
    assert inputs[0].grad.shape == inputs[0].shape


def test_the_teacher_gets_no_gradient():
    inputs = [x.requires_grad_() for x in taps()]
    attention_kl(*inputs).backward()
    assert inputs[2].grad is None
    assert inputs[3].grad is None


def test_pair_weights_weigh_the_pairs():
    inputs = taps(pairs=2)
    apart = [attention_kl(*(x[i : i + 1] for x in inputs)) for i in range(2)]
    both = attention_kl(*inputs, pair_weight=torch.tensor([0.25, 3.0]))
    torch.testing.assert_close(both, 0.25 * apart[0] + 3 * apart[1])


def test_half_precision_inputs_are_compared_in_fp32():
    query, key, *_ = (x.bfloat16() for x in taps(queries=50, keys=40, width=64))
    with torch.autocast("cpu", torch.bfloat16):
        loss = attention_kl(query, key, query, key)
    assert loss.dtype == torch.float32
    assert loss.item() >= -1e-6


def test_heads_that_differ_need_a_map():
    student, teacher = taps(heads=4), taps(heads=2)
    with pytest.raises(ValueError, match="4 heads and the teacher 2"):
        attention_kl(*student[:2], *teacher[2:])
    mapped = attention_kl(*student[:2], *teacher[2:], head_map=[0, 0, 1, 1])
    spread = [x[:, [0, 0, 1, 1]] for x in teacher[2:]]
    torch.testing.assert_close(mapped, attention_kl(*student[:2], *spread))


def test_an_unknown_direction_or_implementation_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="teacher-student, student-teacher"):
        attention_kl(*taps(), direction="sideways")
    with pytest.raises(ValueError, match="reference"):
        attention_kl(*taps(), impl="magic")


def test_the_reference_passes_a_numerical_gradient_check():
    query, key, *teacher = taps(pairs=2, heads=1, queries=2, keys=3, width=2, dtype=torch.float64)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    for direction in DIRECTIONS:
        assert torch.autograd.gradcheck(
            lambda q, k, d=direction: attention_kl(q, k, *teacher, key_mask=mask, direction=d, temperature=0.7),
            (query.requires_grad_(), key.requires_grad_()),
        )


def test_the_squared_distance_equals_a_hand_computed_example():
    one, keys = torch.ones(1, 1, 1, 1), torch.tensor([math.log(3), 0.0]).view(1, 1, 2, 1)
    loss = attention_l2(one, keys, one, torch.zeros_like(keys))  # rows (3/4, 1/4) and (1/2, 1/2)
    assert loss.item() == pytest.approx(2 * 0.25**2, abs=1e-6)


def test_the_squared_distance_knows_padding_weights_and_head_maps():
    query, key, teacher_query, teacher_key = taps(pairs=3, heads=2)
    mask = torch.tensor([[True, True, False, False, False]] * 3)
    weight = torch.tensor([0.2, 0.0, 0.5])
    cut = [query, key[:, :, :2], teacher_query, teacher_key[:, :, :2]]
    padded = attention_l2(query, key, teacher_query, teacher_key, key_mask=mask, pair_weight=weight)
    torch.testing.assert_close(padded, attention_l2(*cut, pair_weight=weight))
    swapped = attention_l2(query, key, teacher_query.flip(1), teacher_key.flip(1), head_map=(1, 0))
    torch.testing.assert_close(swapped, attention_l2(query, key, teacher_query, teacher_key))
    with pytest.raises(ValueError, match="2 heads and the teacher 1"):
        attention_l2(query, key, teacher_query[:, :1], teacher_key[:, :1])


def test_counting_padded_queries_gives_dides_mean():
    """Without a query mask every row counts, as in DiDE's code: `mean(sum(kl_div))` over pairs, heads and queries."""
    query, key, teacher_query, teacher_key = taps(pairs=2, heads=3, queries=6, keys=4)
    key_mask = torch.tensor([[True, True, True, False]] * 2)
    scale, outside = query.shape[-1] ** -0.5, ~key_mask[:, None, None]
    student, teacher = (
        (q @ k.transpose(-2, -1) * scale).masked_fill(outside, torch.finfo(torch.float32).min)
        for q, k in ((query, key), (teacher_query, teacher_key))
    )
    dide = torch.nn.functional.kl_div(student.log_softmax(-1), teacher.softmax(-1), reduction="none").sum(-1).mean()
    torch.testing.assert_close(attention_kl(query, key, teacher_query, teacher_key, key_mask=key_mask), dide)
    valid = torch.arange(6) < 2
    masked = attention_kl(
        query, key, teacher_query, teacher_key, query_mask=valid.expand(2, 6), key_mask=key_mask, pair_weight=None
    )
    rows = torch.nn.functional.kl_div(student.log_softmax(-1), teacher.softmax(-1), reduction="none").sum(-1)
    torch.testing.assert_close(masked, rows[:, :, :2].mean())


def test_a_row_with_a_single_valid_key_has_no_loss_and_no_nan():
    inputs = [x.requires_grad_() for x in taps(pairs=2, keys=3)]
    only = torch.tensor([[True, False, False], [False, False, True]])
    loss = attention_kl(*inputs, key_mask=only)
    loss.backward()
    assert abs(loss.item()) < 1e-7
    assert all(torch.isfinite(x.grad).all() for x in inputs[:2])


def test_each_model_is_scaled_by_its_own_head_width():
    query, key, _, _ = taps(width=4)
    wide_query, wide_key = (torch.cat([x, torch.zeros_like(x)], -1) * 2**0.25 for x in (query, key))
    loss = attention_kl(query, key, wide_query, wide_key)  # twice as wide, the same rows
    assert abs(loss.item()) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_loss_is_never_negative_under_autocast(dtype):
    query, key, _, _ = (x.to(dtype) for x in taps(pairs=8, heads=4, queries=20, keys=49, width=64))
    with torch.autocast("cpu", torch.bfloat16):
        assert attention_kl(query, key, query, key).item() >= -1e-6
