"""The mathematics the kernels are written from, in float64 against autograd of the reference."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_fusion.kernels import attention_kl
from dist_fusion.kernels.reference import DIRECTIONS
from tests.kernels.oracle import MASKS, distances, make_case, solve, truth

EXACT = 1e-12


def double(case):
    return case._replace(**{name: x.double() for name, x in case._asdict().items() if name.endswith(("query", "key"))})


def by_hand(case, direction, temperature=1.0, blocks=None):
    """Loss and gradients in float64 from the closed form; with `blocks` the rows are streamed in blocks of keys."""
    pairs, heads, queries, _ = case.student_query.shape
    keys = case.student_key.shape[2]
    key_mask = torch.ones(pairs, keys, dtype=torch.bool) if case.key_mask is None else case.key_mask
    query_mask = torch.ones(pairs, queries, dtype=torch.bool) if case.query_mask is None else case.query_mask
    empty = [
        x.double().masked_fill(~mask[:, None, :, None], 0)
        for x, mask in zip(case[:4], (query_mask, key_mask) * 2, strict=True)
    ]
    s_scale, t_scale = (x.shape[-1] ** -0.5 / temperature for x in (empty[0], empty[2]))
    s, t = s_scale * empty[0] @ empty[1].mT, t_scale * empty[2] @ empty[3].mT
    live = key_mask[:, None, None, :]
    if blocks is None:
        p, r = (x.masked_fill(~live, -1e30).softmax(-1) * live for x in (s, t))
        s_log, t_log = (x.masked_fill(~live, -1e30).logsumexp(-1) for x in (s, t))
        e = (p * (s - t)).sum(-1)
        if direction == "student-teacher":
            rows, slopes = e - s_log + t_log, p * (s - t - e[..., None])
        else:
            rows, slopes = -(r * (s - t)).sum(-1) - t_log + s_log, p - r
        dq = slopes @ empty[1]
    else:
        rows, slopes, dq = streamed(s, t, live, empty[1], blocks, direction)
    valid = (query_mask & key_mask.any(-1, keepdim=True))[:, None, :]
    weight = case.pair_weight.double() / (heads * query_mask.sum(-1))
    loss = (rows * valid * weight[:, None, None]).sum()
    factor = (s_scale * weight)[:, None, None, None]
    slopes = torch.where(valid[..., None] & live, slopes, 0)
    return loss, factor * dq * valid[..., None], factor * slopes.mT @ empty[0]


def streamed(s, t, live, key, blocks, direction):
    """One pass over blocks of keys: the rows' KL, and the queries' gradients in the same pass; then the slopes."""
    shape = s.shape[:-1]
    s_max = t_max = torch.full(shape, -1e30, dtype=torch.float64)
    s_sum = t_sum = cross = torch.zeros(shape, dtype=torch.float64)
    first = second = torch.zeros(*shape, key.shape[-1], dtype=torch.float64)
    for part in torch.arange(s.shape[-1]).split(blocks):
        on = live[..., part].expand_as(s[..., part])
        s_part, t_part, k = (
            s[..., part].masked_fill(~on, -1e30),
            t[..., part].masked_fill(~on, -1e30),
            key[:, :, part],
        )
        s_new, t_new = torch.maximum(s_max, s_part.amax(-1)), torch.maximum(t_max, t_part.amax(-1))
        s_kept, t_kept = (s_max - s_new).exp(), (t_max - t_new).exp()
        p, r = (s_part - s_new[..., None]).exp() * on, (t_part - t_new[..., None]).exp() * on
        ratio = ((s_part - s_new[..., None]) - (t_part - t_new[..., None])).masked_fill(~on, 0)
        moved = torch.where(s_sum > 0, (s_max - s_new) - (t_max - t_new), 0)
        if direction == "student-teacher":
            cross = s_kept * (cross + s_sum * moved) + (p * ratio).sum(-1)
            first = s_kept[..., None] * (first + second * moved[..., None]) + (p * ratio) @ k
        else:
            cross = t_kept * (cross - t_sum * moved) - (r * ratio).sum(-1)
            first = t_kept[..., None] * first + r @ k
        second = s_kept[..., None] * second + p @ k
        s_sum, t_sum = s_kept * s_sum + p.sum(-1), t_kept * t_sum + r.sum(-1)
        s_max, t_max = s_new, t_new
    s_sum, t_sum = s_sum.masked_fill(s_sum == 0, 1), t_sum.masked_fill(t_sum == 0, 1)
    p = (s - (s_max + s_sum.log())[..., None]).exp()
    if direction == "student-teacher":
        e = cross / s_sum
        dq = (first - e[..., None] * second) / s_sum[..., None]
        return e - s_sum.log() + t_sum.log(), p * (s - t - (e + s_max - t_max)[..., None]), dq
    dq = second / s_sum[..., None] - first / t_sum[..., None]
    r = (t - (t_max + t_sum.log())[..., None]).exp()
    return cross / t_sum - t_sum.log() + s_sum.log(), p - r, dq


@pytest.mark.parametrize("blocks", [None, 3, 1])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_closed_and_the_streamed_form_equal_autograd(direction, blocks):
    for masks, temperature, width in itertools.product(MASKS, (1.0, 0.3), (4, 16)):
        case = double(make_case(pairs=3, masks=masks, teacher_width=width))
        if case.key_mask is not None:
            case.key_mask[0, :4] = False  # blocks without any valid key come first
            assert case.key_mask[0].any()
            case.key_mask[2] = False  # and one pair has none at all
        found = by_hand(case, direction, temperature, blocks)
        wanted = truth(case, direction=direction, temperature=temperature)
        for ours, right in zip(found, wanted, strict=True):
            torch.testing.assert_close(ours, right, rtol=0, atol=EXACT, check_dtype=False)


def test_the_attention_identities_hold():
    """Attention with values [keys | teacher's keys] has the gradient of KL(S || T); a second one has KL(T || S)'s."""
    case = double(make_case(masks="none", pairs=3, queries=6, keys=9))
    case = case._replace(pair_weight=torch.ones(3, dtype=torch.float64))
    rows = case.student_query.shape[1] * case.student_query.shape[2]
    attend = torch.nn.functional.scaled_dot_product_attention
    scale = case.student_query.shape[-1] ** -0.5
    query, key = (x.clone().requires_grad_() for x in case[:2])
    values = torch.cat([case.student_key, case.teacher_key], -1)
    readout = torch.cat([scale * case.student_query, -scale * case.teacher_query], -1)
    (attend(query, key, values) * readout).sum().div(rows).backward()
    wanted = truth(case, direction="student-teacher")
    for found, right in ((query.grad, wanted.query_gradient), (key.grad, wanted.key_gradient)):
        torch.testing.assert_close(found, right, rtol=0, atol=1e-14)

    query, key = (x.clone().requires_grad_() for x in case[:2])
    towards = attend(case.student_query, case.student_key, key) - attend(case.teacher_query, case.teacher_key, key)
    (scale * (query * towards).sum()).div(rows).backward()
    wanted = truth(case, direction="teacher-student")
    for found, right in ((query.grad, wanted.query_gradient), (key.grad, wanted.key_gradient)):
        torch.testing.assert_close(found, right, rtol=0, atol=1e-14)


@given(seed=st.integers(0, 10**6), direction=st.sampled_from(sorted(DIRECTIONS)))
@settings(max_examples=25, deadline=None)
def test_what_must_not_matter_does_not(seed, direction):
    """The same vector added to all keys, the order of keys, and a batch twice; and the two gradients agree."""
    case = make_case(pairs=2, masks="none", queries=4, keys=6, seed=seed)._replace(pair_weight=torch.full((2,), 0.5))
    found = solve(case, direction=direction)
    assert found.loss >= -1e-6
    moved = case._replace(student_key=case.student_key + torch.randn(1, 1, 1, case.student_key.shape[-1]))
    order = torch.randperm(6)
    turned = case._replace(student_key=case.student_key[:, :, order], teacher_key=case.teacher_key[:, :, order])
    twice = case._replace(**{n: x.repeat(2, 1, 1, 1) for n, x in zip(case._fields[:4], case[:4], strict=True)})
    twice = twice._replace(pair_weight=torch.full((4,), 0.25))
    for other in (moved, turned, twice):
        torch.testing.assert_close(solve(other, direction=direction).loss, found.loss, rtol=1e-5, atol=1e-5)
    by_query = (found.query_gradient * case.student_query).sum((2, 3))
    by_key = (found.key_gradient * case.student_key).sum((2, 3))
    torch.testing.assert_close(by_query, by_key, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("masks", MASKS)
def test_rows_are_counted_as_a_loop_counts_them(masks):
    case = make_case(pairs=3, heads=2, teacher_heads=2, masks=masks)
    if case.key_mask is not None:
        case.key_mask[1] = False
    total = 0.0
    for pair in range(3):
        live = slice(None) if case.key_mask is None else case.key_mask[pair]
        asked = range(5) if case.query_mask is None else case.query_mask[pair].nonzero()[:, 0].tolist()
        rows = []
        for head, m in itertools.product(range(2), asked):
            if case.key_mask is not None and not case.key_mask[pair].any():
                continue
            s, t = (
                (q[pair, head, m] @ k[pair, head][live].T / 4).double().log_softmax(-1)
                for q, k in (case[:2], case[2:4])
            )
            rows.append((t.exp() * (t - s)).sum())
        total += case.pair_weight[pair] * (sum(rows) / len(rows) if rows else 0)
    assert solve(case).loss.item() == pytest.approx(float(total), rel=1e-6)


def test_dides_expression_is_not_a_number_beside_padding_and_ours_is():
    """`kl_div` of maps masked with minus infinity (DiDE's code) is 0 * inf; without padding both are the same."""
    case = make_case(masks="none", pairs=2)
    scale = case.student_query.shape[-1] ** -0.5

    def dide(key_mask):
        student, teacher = (
            (q @ k.mT * scale).masked_fill(~key_mask[:, None, None], float("-inf")) for q, k in (case[:2], case[2:4])
        )
        each = torch.nn.functional.kl_div(student.log_softmax(-1), teacher.softmax(-1), reduction="none")
        return each.sum(-1).mean()

    everything = torch.ones(2, 7, dtype=torch.bool)
    torch.testing.assert_close(attention_kl(*case[:4]), dide(everything), rtol=1e-6, atol=1e-6)
    padded = everything.clone()
    padded[:, -2:] = False
    assert dide(padded).isnan()
    assert attention_kl(*case[:4], key_mask=padded).isfinite()


def test_distances_tell_a_wrong_answer():
    case = make_case()
    right = truth(case)
    assert max(distances(right, right)) == 0
    assert distances(right._replace(key_gradient=1.1 * right.key_gradient), right)[2] == pytest.approx(0.1)
