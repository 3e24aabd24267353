"""The kernels compile for GPUs that are not here: no spilled registers, and tensor cores where there should be some."""

import json
import os
import subprocess
import sys

import pytest

from dist_fusion.kernels.choice import HAS_TRITON
from dist_fusion.kernels.fused import launch
from dist_fusion.kernels.hybrid import TILE

LENGTHS = [(50, 40), (40, 577), (197, 197)]
LONG = {"row_sums": ("row_sums", "query_gradients", "key_gradients")}


def orders():
    for capability in (80, 90):
        for lengths in LENGTHS:
            plan = launch(*lengths, (capability // 10, capability % 10))
            for kernel in LONG.get(plan.kernel, (plan.kernel,)):
                for towards_teacher in (False, True):
                    sizes = {"QUERIES": plan.queries, "KEYS": plan.keys, "TOWARDS_TEACHER": towards_teacher}
                    yield dict(
                        name=kernel, capability=capability, dtype="bf16", warps=plan.warps, constants=sizes
                    )  # fmt: skip
    for capability in (70,):
        for keys in (64, 1024, 4096):
            sizes = {"QUERIES": max(1, TILE // keys), "KEYS": keys, "TOWARDS_TEACHER": False}
            yield dict(name="rows", capability=capability, dtype="fp16", warps=4, constants=sizes)


@pytest.fixture(scope="module")
def compiled():
    if not HAS_TRITON:
        pytest.skip("Triton is not installed")
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.ahead_of_time"],
        input="\n".join(map(json.dumps, orders())), capture_output=True, text=True,
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_no_kernel_spills_registers(compiled):
    assert len(compiled) == len([*orders()])
    assert not [found for found in compiled if found["spilled_bytes"]]


def test_every_product_is_the_tensor_cores(compiled):
    for found in compiled:
        assert (found["tensor_core_products"] > 0) == (found["name"] != "rows"), found
