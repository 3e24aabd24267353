"""The diary of a run: `events.jsonl` in its folder, a line each time something happens to it.

Lines are only ever added. Metrics are cut back to the step that a run resumes from; the diary is not, so it tells of
all lives. Reading it needs no torch.
"""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dist_fusion.monitor.lines import append_line, read_lines

KINDS: dict[str, tuple[str, ...]] = {
    "started": ("ranks", "hosts", "job", "resumed_from", "versions"),  # a life begins; step 0 is a new run
    "saved": ("folder", "seconds", "bytes"),
    "skipped": ("what",),  # a step whose loss or gradient was not finite, and the first tensors that were not
    "rolled back": ("to", "why"),
    "refused checkpoint": ("folder", "why"),
    "evaluated": ("scores",),
    "stopped": ("by",),  # saved, to be continued
    "warned early": ("job",),  # told to stop before it trained
    "failed": ("error",),
    "finished": (),
}
"""What may happen to a run, and the details that are told of it at least."""
FILE = "events.jsonl"


class Event(NamedTuple):
    """Something that happened to a run."""

    time: float  # seconds since 1970
    kind: str  # of KINDS, or one of a later version
    step: int
    details: Mapping[str, Any]


def record(run: Path, kind: str, step: int, details: Mapping[str, object]) -> None:
    """Write down what happened to `run`, on the disk when this returns. Raises OSError.

    Rank 0 calls it for all; only `failed` is for the rank that failed. What JSON has no word for is written as text.
    """
    missing = set(KINDS[kind]) - details.keys()
    assert not missing, f"{kind!r} must tell {', '.join(sorted(missing))}"
    append_line(run / FILE, {"time": round(time.time(), 3), "kind": kind, "step": step, "details": details})


def read_events(run: Path) -> list[Event]:
    """What happened to `run`, in order; torn or foreign lines are passed over."""
    return [
        Event(tree["time"], tree["kind"], tree["step"], tree["details"])
        for tree in read_lines(run / FILE)
        if _is_event(tree)
    ]


def _is_event(tree: Mapping[str, Any]) -> bool:
    return (
        isinstance(tree.get("time"), int | float)
        and isinstance(tree.get("kind"), str)
        and isinstance(tree.get("step"), int)
        and isinstance(tree.get("details"), dict)
    )
