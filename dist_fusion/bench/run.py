"""`dist-fusion bench NAME`: run one comparison, print its rows as they come, write them as JSON."""

import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import torch

from dist_fusion.bench import checkpoint, data, inference, kernels, roofline, step, teacher
from dist_fusion.checkpoint.folder import versions
from dist_fusion.schema import UserError, nearest


class Line(Protocol):
    """A row of a bench: a NamedTuple that knows how to show itself."""

    def line(self) -> str: ...  # for people

    def _asdict(self) -> dict[str, Any]: ...  # for the file


BENCHES: dict[str, Callable[[torch.device, bool], Iterator[Line]]] = {
    "kernels": kernels.rows,
    "teacher": teacher.rows,
    "step": step.rows,
    "inference": inference.rows,
    "roofline": roofline.rows,
    "data": data.rows,
    "checkpoint": checkpoint.rows,
}
"""Benches by name: (device, quick) -> rows. Quick ones show that all runs, at sizes whose times say nothing."""
DEVICES = ("cpu", "cuda")
THREADS = 2
"""On a CPU, unless OMP_NUM_THREADS says otherwise: so many cores that figures of two machines mean the same."""


def bench(name: str, device_name: str, json_file: Path | None, quick: bool) -> None:
    """Run the bench `name`.

    Raises:
        UserError: for an unknown bench or device, no GPU, or a file that cannot be written; before anything runs.
    """
    if name not in BENCHES:
        raise UserError(f"no bench {name!r}{nearest(name, BENCHES)}; it can be {', '.join(BENCHES)}")
    if device_name not in DEVICES:
        raise UserError(f"--device is {device_name!r}; it can be {', '.join(DEVICES)}")
    if device_name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device is cuda, and torch sees no GPU here; --device cpu runs anywhere")
    if json_file and not json_file.parent.is_dir():
        raise UserError(f"--json is {str(json_file)!r}, in a folder that does not exist; make it first")
    if device_name == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(THREADS)
    device = torch.device(device_name)
    rows = []
    for row in BENCHES[name](device, quick):
        sys.stdout.write(f"{row.line()}\n")
        sys.stdout.flush()
        rows.append(row._asdict())
    if json_file:
        result = {
            "bench": name,
            "device": _describe(device),
            "versions": versions(),
            "date": datetime.now(UTC).date().isoformat(),
            "rows": rows,
        }
        json_file.write_text(json.dumps(result, indent=2) + "\n")


def _describe(device: torch.device) -> str:
    """The device and what of it was used."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return f"{found[1] if found else 'CPU'}, {torch.get_num_threads()} threads"
