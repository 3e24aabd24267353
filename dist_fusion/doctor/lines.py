"""What a check says, and what travels to it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from dist_fusion.config import Config
from dist_fusion.facts import Facts
from dist_fusion.schema import UserError

OK, WARN, FAIL = "ok", "warn", "FAIL"
GRADES = {OK: 32, WARN: 33, FAIL: 31}
"""From well to ill, each with its colour on a terminal."""
FIGURE = "{}"
"""Stands in a line's words for the next of its figures."""


class Line(NamedTuple):
    """One finding. Ranks agree if all but their figures is the same."""

    grade: str  # of GRADES
    said: str
    remedy: str = ""
    figures: tuple[float, ...] = ()  # in the order of the FIGUREs in `said`


class Case(NamedTuple):
    """What is examined, seen from one rank."""

    config: Config | None  # of the recipe that shall run here, if one was named
    facts: Facts | None  # what it costs
    ranks: int  # that it shall run on
    here: int  # of them on a host
    folder: Path  # of the run, or what there is above it
    shards: tuple[str, ...]  # folders of tars, or tars
    device: torch.device  # of this rank


Check = Callable[[Case], list[Line]]


@contextmanager
def guarded(lines: list[Line]) -> Iterator[None]:
    """Make any error a red line.

    Here alone in the project, any: a doctor that breaks down where something is broken is of no use.
    """
    try:
        yield
    except UserError as error:
        lines.append(Line(FAIL, str(error)))
    except Exception as error:
        lines.append(Line(FAIL, f"{type(error).__name__}: {error}"))


def examined(check: Check, case: Case) -> list[Line]:
    """What `check` says; an error is a red line."""
    lines: list[Line] = []
    with guarded(lines):
        lines += check(case)
    return lines


def gigabytes(size: float) -> float:
    """10^9 bytes, as disks and networks are told."""
    return size / 1e9
