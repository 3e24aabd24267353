"""How the Triton kernels are started: their arguments from a problem, by name."""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dist_fusion.kernels.problem import Problem

LOG2E = math.log2(math.e)
SMALLEST = 16
"""A side of a tile that tensor cores can multiply."""


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU: the variable must be set before they are imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def capability_of(device: torch.device) -> tuple[int, int]:
    """Compute capability of a GPU; (0, 0) of what has none."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def tile_side(length: int) -> int:
    """The power of two that holds `length`, at least what tensor cores take."""
    return max(SMALLEST, 1 << (length - 1).bit_length())


def arguments(problem: Problem) -> dict[str, Any]:
    """Everything about a problem that a kernel may name; its blocks and outputs are added where it is started."""
    p = problem
    _, heads, queries, width = p.student_query.shape
    teacher_width = p.teacher_query.shape[-1]
    inputs = {"sq": p.student_query, "sk": p.student_key, "tq": p.teacher_query, "tk": p.teacher_key}
    found: dict[str, Any] = {name.upper(): x for name, x in inputs.items()}
    for name, x in inputs.items():
        found |= strides(name, x)
    return found | {
        "QM": _bytes(p.query_mask, p.coefficient),
        "KM": _bytes(p.key_mask, p.coefficient),
        "qm_p": 0 if p.query_mask is None else p.query_mask.stride(0),
        "km_p": 0 if p.key_mask is None else p.key_mask.stride(0),
        "HM": _head_table(p.head_map, p.coefficient),
        "COEF": p.coefficient,
        "SLOPE": p.slope,
        "heads": heads,
        "queries": queries,
        "keys": p.student_key.shape[2],
        "s_scale": p.student_scale * LOG2E,
        "t_scale": p.teacher_scale * LOG2E,
        "WIDTH": width,
        "PADDED": tile_side(width),
        "T_WIDTH": teacher_width,
        "T_PADDED": tile_side(teacher_width),
        "TOWARDS_TEACHER": p.direction == "student-teacher",
        "Q_MASKED": p.query_mask is not None,
        "K_MASKED": p.key_mask is not None,
        "MAPPED": p.head_map is not None,
        "UPCAST": interpreting() and any(x.dtype == torch.bfloat16 for x in inputs.values()),
    }


def strides(name: str, x: Tensor) -> dict[str, int]:
    """Strides of [P, H, L, K] by the names kernels have for them; rows of queries are `m`, of keys `n`."""
    letters = ("p", "h", "m" if name.endswith("q") else "n")
    return {f"{name}_{letter}": stride for letter, stride in zip(letters, x.stride()[:3], strict=True)}


def start(kernel: Any, grid: tuple[int, ...], given: Mapping[str, Any], warps: int) -> None:
    """Start `kernel` with those of `given` that it names. Nothing is tuned at run time, and the host does not wait."""
    kernel[grid](**{name: given[name] for name in kernel.arg_names}, num_warps=warps, num_stages=1)


def _bytes(mask: Tensor | None, absent: Tensor) -> Tensor:
    """A mask as bytes, in place; any pointer where there is none, for it is not read."""
    return absent if mask is None else mask.view(torch.uint8)


def _head_table(head_map: Sequence[int] | None, absent: Tensor) -> Tensor:
    """The map on the device; pinned first, so that the host need not wait for the copy."""
    if head_map is None:
        return absent
    table = torch.tensor(head_map, dtype=torch.int32)
    return table.pin_memory().to(absent.device, non_blocking=True) if absent.is_cuda else table
