"""Every implementation against float64 autograd of the reference, on the same rounded numbers.

Triton's run in its interpreter where there is no GPU. That multiplies bf16 by halves cut off instead of rounded, hence
the wider bound there.
"""

import subprocess
import sys

import pytest
import torch

from dist_fusion.kernels import IMPLS, attention_kl, fused
from dist_fusion.kernels.choice import HAS_TRITON
from dist_fusion.kernels.launch import interpreting
from dist_fusion.kernels.reference import DIRECTIONS
from tests.kernels.oracle import LAYOUTS, MASKS, Case, distances, make_case, solve, truth

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OURS = [name for name, impl in IMPLS.items() if impl and (HAS_TRITON or not impl.needs_triton)]
LOSS, GRADIENTS = 0, slice(1, None)
BOUNDS = {
    torch.float32: (1e-6, 5e-6),
    torch.float16: (1e-6, 1e-3),
    torch.bfloat16: (1e-6, 1.2e-2 if interpreting() else 4e-3),
}
"""Relative, of the loss and of the gradients."""
LENGTHS = {
    "chunked": [(21, 37)],
    # One block of queries, several; queries in one tile, keys in three; both in several.
    "triton": [(21, 37), (70, 20), (18, 130), (66, 130)],
    "hybrid": [(21, 37), (9, 70)],
}
COMBINATIONS = [
    {"masks": "none", "layout": "heads first"},
    {"masks": "key", "layout": "tokens first", "teacher_width": 24},
    {"masks": "query", "layout": "packed", "teacher_heads": 1, "head_map": (0, 0)},
    {"masks": "both", "layout": "tokens first", "teacher_heads": 3, "head_map": (2, 0)},
    {"masks": "both", "layout": "packed", "teacher_width": 48, "head_map": (1, 0)},
]


def on_device(case: Case) -> Case:
    """`case` there, with the strides it has here."""
    if DEVICE == "cpu":
        return case

    def move(x):
        if x is None:
            return None
        reach = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
        flat = torch.empty(reach, dtype=x.dtype, device=DEVICE)
        return flat.as_strided(x.shape, x.stride()).copy_(x)

    return Case(*map(move, case))


def check(case: Case, impl: str, bounds: tuple[float, float] | None = None, **how) -> None:
    dtype = case.student_query.dtype
    for direction in DIRECTIONS:
        found = solve(on_device(case), impl=impl, direction=direction, **how)
        assert found.loss.dtype == torch.float32
        assert found.query_gradient.dtype == found.key_gradient.dtype == dtype
        off = distances(type(found)(*(x.cpu() for x in found)), truth(case, direction=direction, **how))
        loss, gradients = bounds or BOUNDS[dtype]
        assert off[LOSS] <= loss and max(off[GRADIENTS]) <= gradients, (direction, off)


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("number", range(len(COMBINATIONS)))
@pytest.mark.parametrize(("impl", "lengths"), [(impl, lengths) for impl in OURS for lengths in LENGTHS[impl]])
def test_loss_and_gradients_equal_the_truth(impl, lengths, number, dtype):
    what = dict(COMBINATIONS[number])
    how = {"head_map": what.pop("head_map", None), "temperature": 1.5}
    queries, keys = lengths
    check(make_case(queries=queries, keys=keys, dtype=dtype, seed=number, **what), impl, **how)


def test_the_combinations_name_every_mask_and_layout():
    assert {c["masks"] for c in COMBINATIONS} == set(MASKS)
    assert {c["layout"] for c in COMBINATIONS} == set(LAYOUTS)


@pytest.mark.parametrize("impl", OURS)
@pytest.mark.parametrize("lengths", [(50, 40), (40, 50), (577, 40), (40, 577), (197, 40)], ids=str)
def test_the_lengths_of_real_models_come_out_right(impl, lengths):
    queries, keys = lengths
    case = make_case(pairs=1, heads=1, teacher_heads=1, queries=queries, keys=keys, width=64, teacher_width=64)
    check(case, impl, (5e-6, 5e-6))


@pytest.mark.parametrize("impl", OURS)
@pytest.mark.parametrize("widths", [(8, 128), (48, 80), (96, 8), (80, 48)], ids=str)
def test_any_head_width_goes_beside_any_other(impl, widths):
    check(make_case(heads=1, teacher_heads=1, width=widths[0], teacher_width=widths[1]), impl)


@pytest.mark.parametrize("impl", OURS)
def test_heads_may_be_split_anew_without_a_copy(impl):
    """Relation heads (MiniLMv2, arXiv:2012.15828): the same memory, with other heads."""
    memory = make_case(heads=2, teacher_heads=2, masks="none", layout="tokens first", width=24, teacher_width=24)
    split = [x.transpose(1, 2).unflatten(-1, (3, 8)).flatten(2, 3).transpose(1, 2) for x in memory[:4]]
    assert all(x.data_ptr() == y.data_ptr() for x, y in zip(split, memory, strict=False))
    check(memory._replace(**dict(zip(Case._fields[:4], split, strict=True))), impl)


@pytest.mark.parametrize("impl", OURS)
@pytest.mark.parametrize("lengths", [(1, 7), (5, 1), (1, 130), (66, 130)], ids=str)
def test_short_rows_and_columns_and_pairs_without_keys_come_out_right(impl, lengths):
    queries, keys = lengths
    case = make_case(pairs=3, heads=1, teacher_heads=1, queries=queries, keys=keys, masks="both", seed=1)
    case.key_mask[0] = False  # a pair without any valid key
    case.key_mask[1, 1:] = False  # and one with a single one: no divergence
    check(case, impl)
    if keys > 64:
        case.key_mask[2, :64] = False  # the first block of keys has none
        case.key_mask[2, 64:] &= case.student_key[2, 0, 64:, 0].isfinite()
        check(case, impl)
    case.key_mask[:] = False
    for direction in DIRECTIONS:
        found = solve(on_device(case), impl=impl, direction=direction)
        assert all((x == 0).all() for x in found)


@pytest.mark.parametrize("impl", OURS)
@pytest.mark.parametrize("lengths", [(5, 7), (18, 130), (66, 130)], ids=str)
def test_a_student_that_is_the_teacher_has_no_loss_and_no_gradient(impl, lengths):
    queries, keys = lengths
    case = make_case(pairs=1, heads=1, teacher_heads=1, queries=queries, keys=keys, masks="none", near=0.0)
    for direction in DIRECTIONS:
        found = solve(on_device(case), impl=impl, direction=direction)
        assert all(x.abs().max() <= 1e-7 for x in found)


@pytest.mark.parametrize("impl", OURS)
@pytest.mark.parametrize("lengths", [(5, 7), (18, 130), (66, 130)], ids=str)
def test_scores_of_hundreds_stay_exact(impl, lengths):
    """Then a probability underflows, and with logarithms of probabilities the KL would be infinite."""
    queries, keys = lengths
    case = make_case(pairs=1, heads=1, teacher_heads=1, queries=queries, keys=keys, masks="none", width=64, size=20)
    assert (case.student_query @ case.student_key.mT / 8).abs().max() > 600
    for direction in DIRECTIONS:
        wanted = truth(case, direction=direction)
        # A row that is nearly one key has slopes that are nearly 0: what autograd in fp32 can do is the measure.
        usual = distances(solve(case, impl="reference", direction=direction), wanted)
        found = distances(solve(on_device(case), impl=impl, direction=direction), wanted)
        assert found[LOSS] <= 5e-6
        assert max(found[GRADIENTS]) <= max(5e-6, 2 * max(usual[GRADIENTS]))


@pytest.mark.parametrize("impl", OURS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("from_above", [1.0, 0.37, 65536.0])
def test_whatever_comes_from_above_scales_the_gradients(impl, from_above, dtype):
    case = make_case(dtype=dtype)
    if dtype == torch.float16 and from_above == 65536:
        case = case._replace(pair_weight=case.pair_weight / 1e4)
    off = distances(solve(on_device(case), from_above, impl=impl), truth(case, from_above))
    assert max(off[GRADIENTS]) <= BOUNDS[dtype][1]


@pytest.mark.parametrize("impl", OURS)
def test_gradients_of_a_mean_over_a_large_batch_do_not_vanish_in_fp16(impl):
    """1 / (pairs * heads * queries) is below fp16's least number; the loss scale comes only later."""
    case = make_case(dtype=torch.float16, masks="none")
    case = case._replace(pair_weight=torch.full((2,), 1e-9))
    found, wanted = solve(on_device(case), 2.0**24, impl=impl), truth(case, 2.0**24)
    assert max(distances(found, wanted)[GRADIENTS]) <= 1e-3


@pytest.mark.parametrize("impl", OURS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_kept_graph_gives_the_same_gradients_again(impl, dtype):
    case = on_device(make_case(dtype=dtype))
    once = solve(case, 3.0, impl=impl)
    query, key = (x.detach().requires_grad_() for x in case[:2])
    loss = attention_kl(
        query, key, *case[2:4], query_mask=case.query_mask, key_mask=case.key_mask, pair_weight=case.pair_weight,
        impl=impl,
    )  # fmt: skip
    for times in (1, 2):
        (3.0 * loss).backward(retain_graph=times == 1)
        for found, first in ((query.grad, once.query_gradient), (key.grad, once.key_gradient)):
            torch.testing.assert_close(found, times * first)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("impl", OURS)
def test_gradients_add_up_over_micro_steps(impl):
    case, other = make_case(seed=0), make_case(seed=1)
    query, key = (x.detach().to(DEVICE).requires_grad_() for x in case[:2])
    for part in (case, other):
        part = on_device(part)
        mask = {"query_mask": case.query_mask, "key_mask": case.key_mask}
        mask = {name: x.to(DEVICE) for name, x in mask.items()}
        clean = [x.nan_to_num(0, 0, 0) for x in part[2:4]]
        (0.5 * attention_kl(query, key, *clean, **mask, impl=impl)).backward()
    parts = [
        solve(case._replace(pair_weight=None, **dict(zip(Case._fields[2:4], clean, strict=True))), 0.5)
        for clean in ([x.nan_to_num(0, 0, 0) for x in part[2:4]] for part in (case, other))
    ]
    torch.testing.assert_close(query.grad.cpu(), parts[0].query_gradient + parts[1].query_gradient)
    torch.testing.assert_close(key.grad.cpu(), parts[0].key_gradient + parts[1].key_gradient)


@pytest.mark.parametrize("impl", OURS)
def test_only_what_needs_a_gradient_gets_one(impl):
    case = on_device(make_case(masks="none"))
    query = case.student_query.clone().requires_grad_()
    attention_kl(query, *case[1:4], impl=impl).backward()
    torch.testing.assert_close(
        query.grad, solve(case._replace(pair_weight=torch.full((2,), 0.5, device=DEVICE)), impl=impl).query_gradient
    )
    with torch.no_grad():
        assert not attention_kl(query, *case[1:4], impl=impl).requires_grad
    with torch.inference_mode():
        assert attention_kl(*case[:4], impl=impl).isfinite()


@pytest.mark.parametrize("impl", OURS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_lie_in_memory_as_their_inputs_do(impl, layout):
    case = on_device(make_case(masks="none", layout=layout))
    inputs = [x.requires_grad_() for x in case[:2]]
    loss = attention_kl(*case[:4], impl=impl)
    for x, gradient in zip(inputs, torch.autograd.grad(loss, inputs), strict=True):
        assert sorted(range(4), key=x.stride().__getitem__) == sorted(range(4), key=gradient.stride().__getitem__)


@pytest.mark.parametrize("impl", OURS)
def test_a_last_stride_other_than_one_is_read_right(impl):
    case = make_case(masks="none")
    turned = case._replace(**{
        name: x.transpose(-1, -2).contiguous().transpose(-1, -2)
        for name, x in zip(Case._fields[:4], case[:4], strict=True)
    })  # fmt: skip
    check(turned, impl)


@pytest.mark.parametrize("impl", OURS)
def test_the_same_numbers_come_out_twice(impl):
    case = on_device(make_case(pairs=3, queries=20, keys=30))
    for one, other in zip(solve(case, impl=impl), solve(case, impl=impl), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("impl", OURS)
def test_maps_are_not_kept(impl):
    """For the backward pass there are two gradients of the inputs' type, and in fp16 a number a pair."""
    for dtype in (torch.float32, torch.float16):
        case = on_device(make_case(queries=40, keys=50, dtype=dtype, masks="none"))
        query, key = (x.clone().requires_grad_() for x in case[:2])
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):  # noqa: B023
            attention_kl(query, key, *case[2:4], impl=impl)
        allowed = (query.numel() + key.numel()) * dtype.itemsize + 4 * len(query)
        assert 0 < sum(x.numel() * x.element_size() for x in kept) <= allowed


@pytest.mark.parametrize("impl", OURS)
def test_near_the_teacher_bf16_gradients_are_ten_times_better_than_autocasts(impl):
    """Late in training the models hardly differ; scores rounded to bf16 differ by rounding alone."""
    case = make_case(
        pairs=2, heads=2, queries=20, keys=40, width=64, teacher_width=64, dtype=torch.bfloat16, masks="none",
        size=3.0, near=0.01,
    )  # fmt: skip
    wanted = truth(case, direction="student-teacher")
    query, key = (x.clone().requires_grad_() for x in case[:2])
    with torch.autocast("cpu", torch.bfloat16):
        student, teacher = (q @ k.mT / 8 for q, k in ((query, key), case[2:4]))
        student, teacher = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
        rows = (student.exp() * (student - teacher)).sum(-1).mean((1, 2))
    (rows * case.pair_weight).sum().backward()
    eager = distances(type(wanted)(rows.detach(), query.grad, key.grad)._replace(loss=wanted.loss), wanted)
    found = distances(solve(on_device(case), impl=impl, direction="student-teacher"), wanted)
    assert max(found[GRADIENTS]) <= max(eager[GRADIENTS]) / 10


def test_offsets_beyond_32_bits_are_read_right():
    """Pairs 2^31 numbers apart; only the pages that are touched take memory."""
    if not HAS_TRITON:
        pytest.skip("Triton is not installed")
    near = make_case(heads=1, teacher_heads=1, dtype=torch.float16, masks="none")
    far = torch.empty(2**31 + near.student_query[0].numel(), dtype=torch.float16, device=DEVICE)
    apart = far.as_strided(near.student_query.shape, (2**31, *near.student_query.stride()[1:]))
    apart.copy_(near.student_query)
    found = solve(on_device(near)._replace(student_query=apart), impl="triton")
    for one, other in zip(found, solve(on_device(near), impl="triton"), strict=True):
        assert torch.equal(one, other)


def test_tiles_are_never_smaller_than_tensor_cores_take_nor_rows_cut():
    for queries in (1, 15, 16, 17, 50, 64, 65, 128, 129, 577):
        for keys in (1, 16, 40, 64, 65, 128, 129, 577):
            for capability in ((8, 0), (9, 0)):
                plan = fused.launch(queries, keys, capability)
                assert min(plan.queries, plan.keys) >= 16
                assert plan.kernel != "short_keys" or plan.keys >= keys
                assert plan.kernel != "short_queries" or plan.queries >= queries


@pytest.mark.parametrize("impl", OURS)
def test_it_stays_itself_beside_compiled_code_and_under_checkpointing(impl):
    case = on_device(make_case(masks="none"))
    right = solve(case._replace(pair_weight=torch.full((2,), 0.5, device=DEVICE)), impl=impl)

    def loss(query, key):
        return attention_kl(2 * query, key, *case[2:4], impl=impl)

    def checkpointed(query, key):
        return torch.utils.checkpoint.checkpoint(loss, query, key, use_reentrant=False)

    for wrapped in (checkpointed, torch.compile(loss, backend="aot_eager")):
        query, key = (case.student_query / 2).requires_grad_(), case.student_key.clone().requires_grad_()
        wrapped(query, key).backward()
        torch.testing.assert_close(query.grad, 2 * right.query_gradient)
        torch.testing.assert_close(key.grad, right.key_gradient)


@pytest.mark.parametrize(
    ("argument", "value", "wanted"),
    [
        ("student_key", torch.zeros(2, 2, 7, 8), r"student_key is \[2, 2, 7, 8\].*must be \[2, 2, 7, 16\]"),
        ("teacher_query", torch.zeros(2, 2, 4, 16), r"teacher_query.*must be \[2, 2, 5, 16\]"),
        ("key_mask", torch.ones(2, 5, dtype=torch.bool), r"key_mask.*must be \[2, 7\]"),
        ("query_mask", torch.ones(2, 5), "must be torch.bool"),
        ("pair_weight", torch.ones(3), r"pair_weight.*must be \[2\]"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_by_name(argument, value, wanted):
    arguments = make_case(masks="none")._asdict() | {argument: value}
    with pytest.raises(ValueError, match=wanted):
        attention_kl(**arguments)


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU")
def test_triton_without_a_gpu_or_its_interpreter_is_refused():
    script = (
        "import torch; from dist_fusion.kernels import attention_kl; x = torch.ones(1, 1, 2, 16)\n"
        "assert attention_kl(x, x, x, x).item() == 0\n"
        "attention_kl(x, x, x, x, impl='triton')"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"}, cwd="."
    )
    assert done.returncode == 1
    assert "needs Triton and a GPU, or Triton and TRITON_INTERPRET=1" in done.stderr
