import subprocess
import sys

import pytest
import torch

from dist_fusion.kernels import IMPLS
from dist_fusion.kernels.choice import RULES, Place, choose, place_of

FP16, BF16, FP32, FP64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
V100, T4, A100, H200 = (7, 0), (7, 5), (8, 0), (9, 0)


@pytest.mark.parametrize(
    ("device", "capability", "dtypes", "keys", "triton", "impl"),
    [
        ("cuda", H200, {BF16}, 40, True, "triton"),
        ("cuda", A100, {FP16}, 577, True, "triton"),
        ("cuda", H200, {BF16, FP16}, 40, True, "triton"),  # student and teacher in different halves
        ("cuda", H200, {FP32}, 40, True, "hybrid"),
        ("cuda", H200, {FP32, FP16}, 40, True, "hybrid"),
        ("cuda", V100, {FP16}, 40, True, "hybrid"),  # Triton multiplies without tensor cores there
        ("cuda", T4, {FP16}, 577, True, "hybrid"),
        ("cuda", V100, {FP16}, 5000, True, "chunked"),  # a row too long for registers
        ("cuda", (6, 1), {FP32}, 40, True, "chunked"),
        ("cuda", H200, {BF16}, 40, False, "chunked"),
        ("cpu", (0, 0), {FP32}, 40, True, "chunked"),
        ("cpu", (0, 0), {BF16}, 577, False, "chunked"),
        ("cpu", (0, 0), {FP64}, 40, True, "reference"),
        ("cuda", H200, {FP64}, 40, True, "reference"),
        ("mps", (0, 0), {FP32}, 40, False, "reference"),
    ],
)
def test_each_place_has_its_implementation(device, capability, dtypes, keys, triton, impl):
    assert choose(Place(device, capability, frozenset(dtypes), keys, triton)) == impl


def test_every_rule_names_an_implementation():
    assert {rule.impl for rule in RULES} <= set(IMPLS)


def test_tensors_without_data_never_reach_a_kernel():
    with torch._subclasses.FakeTensorMode():
        x = torch.empty(1, 1, 4, 16, device="cuda", dtype=FP16)
    assert choose(place_of((x,) * 4)) == "chunked"


def test_a_machine_without_triton_has_the_rest():
    """An import of triton fails there; nothing imports it before it is needed."""
    script = (
        "import sys, torch; sys.modules['triton'] = None\n"
        "from dist_fusion.kernels import attention_kl\n"
        "from dist_fusion.kernels.choice import HAS_TRITON; assert not HAS_TRITON\n"
        "x = torch.randn(1, 1, 4, 16, requires_grad=True); attention_kl(x, x, 2 * x, x).backward()\n"
        "attention_kl(x, x, x, x, impl='hybrid')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "impl='hybrid' needs Triton" in done.stderr
