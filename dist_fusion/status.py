"""`dist-fusion status RUN`: how a run is doing, from its folder alone. Loads no torch, and so answers at once."""

import argparse
import fcntl
import json
import os
import socket
import struct
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from dist_fusion.monitor.events import Event, read_events
from dist_fusion.monitor.lines import last_lines, read_lines
from dist_fusion.schema import UserError

RECIPE = "config.yaml"
DEPTHS = ("*", "*/*", "*/*/*")
"""Where runs are looked for in a folder of runs: a name may have several parts."""
TURNS = ("started", "stopped", "failed", "finished")
"""Events between which a run is alive or not."""
SILENT = 5
"""After so many times the usual time between two lines a run counts as silent."""
FLOCK = "hhqqi4x"
"""Linux's `struct flock`: type, whence, start, length, process."""
LEAST_SILENCE = 120.0
"""Seconds: saving and scoring write no lines."""
COLOURS = {"running": 32, "silent": 33, "new": 0, "stopped": 33, "died": 31, "failed": 31, "finished": 36}
"""What a run can be, and its colour on a terminal."""


class Checkpoint(NamedTuple):
    """A checkpoint whose manifest names files that are all there with their sizes; checksums are not looked at."""

    step: int
    folder: str
    age_s: float
    size: int  # bytes


@dataclass(frozen=True)
class Status:
    """How a run is doing."""

    run: str
    state: str  # of COLOURS
    why: str  # in words: where, since when, what failed
    step: int
    steps: int
    samples_per_s: float | None
    left_s: float | None  # None if it is not running
    quiet_s: float | None  # since the last line of metrics
    ranks: int | None
    restarts: int
    skipped_steps: int
    rolled_back: int
    skipped_samples: dict[str, int]  # by reason
    checkpoint: Checkpoint | None  # the newest that is whole
    checkpoints: int  # that are whole
    disk: int  # bytes of all checkpoints, whole or not
    losses: dict[str, float]
    scores: dict[str, float]
    scored_at: int | None  # step


def status_of(run: Path) -> Status:
    """How the run in a folder is doing. Raises UserError if it is no run or cannot be read."""
    try:
        recipe = yaml.safe_load((run / RECIPE).read_text())
        events, lines = read_events(run), last_lines(run / "metrics.jsonl")
        steps = int(recipe["steps"])
        whole, disk = _checkpoints(run)
        listed = Counter(str(tree.get("reason", "?")) for tree in read_lines(run / "quarantine.jsonl"))
        quiet = _age(run / "metrics.jsonl")
        log_every = int(recipe.get("log_every", 1))
        finished = (run / "model.safetensors").exists()
        held = _is_held(run / "lock")
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{run} is no run that can be read: {type(error).__name__}: {error}") from None
    last: dict[str, Any] = next((line for line in reversed(lines) if "loss/total" in line), {})
    scored = next((event for event in reversed(events) if event.kind == "evaluated"), None)
    started = [event for event in events if event.kind == "started"]
    step = max([int(line.get("step", 0)) for line in lines[-1:]], default=0)
    usual = float(last.get("speed/step_s", 0.0)) * log_every
    state, why = _state(events, finished, held, quiet, max(SILENT * usual, LEAST_SILENCE))
    left = last.get("time/left_s", float(last.get("speed/step_s", 0.0)) * (steps - step)) if last else None
    return Status(
        run=str(run),
        state=state,
        why=why,
        step=steps if state == "finished" else step,
        steps=steps,
        samples_per_s=last.get("speed/samples_per_s"),
        left_s=left if state == "running" else None,
        quiet_s=quiet,
        ranks=started[-1].details.get("ranks") if started else None,
        restarts=max(0, len(started) - 1),
        skipped_steps=max(
            sum(event.kind == "skipped" for event in events), int(last.get("optimizer/skipped_steps", 0))
        ),
        rolled_back=sum(event.kind == "rolled back" for event in events),
        skipped_samples=dict(listed.most_common()),
        checkpoint=whole[-1] if whole else None,
        checkpoints=len(whole),
        disk=disk,
        losses=_under("loss/", last),
        scores=dict(scored.details.get("scores", {})) if scored else {},
        scored_at=scored.step if scored else None,
    )


def _state(
    events: Sequence[Event], finished: bool, held: bool, quiet: float | None, patience: float
) -> tuple[str, str]:
    """What the run is, and what to say of it."""
    now = time.time()
    turn = next((event for event in reversed(events) if event.kind in TURNS), None)
    ago = f"{spoken(now - turn.time)} ago" if turn else ""
    if finished:
        return "finished", ago
    where, here = _where(turn)
    seen = f"last line {spoken(quiet)} ago" if quiet is not None else "no line yet"
    silent = min([now - event.time for event in events[-1:]] + ([] if quiet is None else [quiet]), default=0) > patience
    if held:
        return ("silent", f"{where}, and holds the run; {seen}") if silent else ("running", where)
    if turn is None:
        return "new", "nothing has happened yet"
    if turn.kind == "stopped":
        return "stopped", f"by {turn.details.get('by')}, {ago}; to be continued"
    if turn.kind == "failed":
        return "failed", f"{ago}: {turn.details.get('error')}"
    if here:
        return "died", f"without a word; {seen}"
    return ("silent" if silent else "running"), f"{where}, which cannot be seen from here; {seen}"


def _where(turn: Event | None) -> tuple[str, bool]:
    """On which hosts a life that started is or was, in words, and whether this is one of them."""
    if turn is None:
        return "somewhere", False
    hosts = [str(host) for host in turn.details.get("hosts", ())]
    here = socket.gethostname() in hosts
    named = ["here" if host == socket.gethostname() else host for host in hosts]
    more = f" and {len(named) - 4} more" if len(named) > 4 else ""
    job = turn.details.get("job")
    return f"{', '.join(named[:4])}{more}" + (f", job {job}" if job else ""), here


def _is_held(lock: Path) -> bool:
    """Whether a job of this machine (on some shared file systems: of any) holds the run.

    It is only asked: a lock taken to find out, if for a moment, could refuse a job that starts just then.
    """
    if not lock.exists():
        return False
    with lock.open() as file:
        asked = struct.pack(FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        try:
            answer = fcntl.fcntl(file, fcntl.F_GETLK, asked)
        except OSError:  # a file system without locks
            return False
    return bool(struct.unpack(FLOCK, answer)[0] != fcntl.F_UNLCK)


def _checkpoints(run: Path) -> tuple[list[Checkpoint], int]:
    """The whole checkpoints, oldest first, and the bytes that all of them take."""
    whole, disk = [], 0
    for folder in sorted((run / "checkpoints").glob("step-*")):
        sizes = {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
        disk += sum(sizes.values())
        named = _named(folder / "manifest.json")
        if named is not None and named.items() <= sizes.items():
            age = time.time() - (folder / "manifest.json").stat().st_mtime
            whole.append(Checkpoint(int(folder.name.removeprefix("step-")), folder.name, age, sum(sizes.values())))
    return whole, disk


def _named(manifest: Path) -> dict[str, int] | None:
    """The files that a manifest names, and their bytes; None if there is none that can be read."""
    try:
        return {name: file["bytes"] for name, file in json.loads(manifest.read_text())["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _age(path: Path) -> float | None:
    return time.time() - path.stat().st_mtime if path.exists() and path.stat().st_size else None


def _under(beginning: str, line: Mapping[str, Any]) -> dict[str, float]:
    return {key.removeprefix(beginning): value for key, value in line.items() if key.startswith(beginning)}


def spoken(seconds: float) -> str:
    """A length of time for people, in its two largest units."""
    left, parts = max(0, round(seconds)), []
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        if left >= size:
            parts.append(f"{left // size} {unit}")
            left %= size
    return " ".join(parts[:2]) or "0 s"


def size_in_words(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def as_text(status: Status, colours: bool) -> str:
    """One screen about one run."""
    rate = f"{status.samples_per_s:,.0f} samples/s" if status.samples_per_s is not None else ""
    left = f"{spoken(status.left_s)} left" if status.left_s is not None else ""
    share = f"{100 * status.step / max(status.steps, 1):.1f} %"
    ranks = f"{status.ranks} ranks" if status.ranks else ""
    troubles = {
        "started again": status.restarts,
        "skipped steps": status.skipped_steps,
        "rolled back": status.rolled_back,
    }
    newest = status.checkpoint
    kept = (
        f"step {newest.step:,}, {spoken(newest.age_s)} ago, {size_in_words(newest.size)}" if newest else "none is whole"
    )
    rows = {
        "run": status.run,
        "state": f"{painted(status.state, status.state, colours)}{f' ({status.why})' if status.why else ''}",
        "step": ", ".join(filter(None, [f"{status.step:,} of {status.steps:,} ({share})", rate, ranks, left])),
        "troubles": ", ".join(f"{name} {count:,}" for name, count in troubles.items() if count) or "none",
        "data": ", ".join(f"{count:,} × {reason}" for reason, count in status.skipped_samples.items())
        or "no samples skipped",
        "checkpoint": f"{kept}; {status.checkpoints} in all, {size_in_words(status.disk)} on disk",
        "losses": _figures(status.losses, 4),
        "scores": f"{_figures(status.scores, 2)} at step {status.scored_at:,}" if status.scored_at is not None else "",
    }
    return "".join(_row(name, said) for name, said in rows.items() if said)


def _figures(values: Mapping[str, float], digits: int) -> str:
    return ", ".join(f"{name} {value:.{digits}f}" for name, value in values.items())


def _row(name: str, said: str) -> str:
    """A row, broken where it is longer than a screen is wide."""
    lines = [""]
    for word in said.split(" "):
        lines = [*lines[:-1], f"{lines[-1]} {word}".strip()] if len(lines[-1]) + len(word) < 96 else [*lines, word]
    return "".join(f"{name if number == 0 else '':<12}{line}\n" for number, line in enumerate(lines))


def as_table(found: Sequence[Status], folder: Path, colours: bool) -> str:
    """One line a run, by its name in the folder."""
    cells = [
        (
            str(Path(one.run).relative_to(folder)),
            one.state,
            f"{one.step:,}/{one.steps:,}",
            spoken(one.left_s) if one.left_s is not None else "",
            f"{one.losses['total']:.3f}" if "total" in one.losses else "",
            f"{one.restarts}",
            size_in_words(one.disk),
        )
        for one in found
    ]
    rows = [("run", "state", "step", "left", "loss", "restarts", "disk"), *cells]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    text = ""
    for number, row in enumerate(rows):
        fitted = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        if number:
            fitted[1] = painted(fitted[1], row[1], colours)
        text += "  ".join(fitted).rstrip() + "\n"
    return text


def painted(text: str, state: str, colours: bool) -> str:
    """`text` in the colour of a state."""
    return f"\033[{COLOURS[state]}m{text}\033[0m" if colours else text


def find_runs(folder: Path) -> list[Path]:
    """The runs below a folder, at any of DEPTHS."""
    return sorted(path.parent for depth in DEPTHS for path in folder.glob(f"{depth}/{RECIPE}"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("run", type=Path, help="its folder, or a folder of runs")
    parser.add_argument("--json", action="store_true", help="for programs")


def show(folder: Path, as_json: bool) -> str:
    """What is to be printed of a run, or of a folder of runs. Raises UserError if it is neither."""
    colours = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    if (folder / RECIPE).is_file():
        one = status_of(folder)
        return _json(asdict(one)) if as_json else as_text(one, colours)
    runs = find_runs(folder)
    if not runs:
        raise UserError(f"{folder} is no run and holds none: there is no {RECIPE} in it or below it")
    found = [status_of(run) for run in runs]
    return _json([asdict(one) for one in found]) if as_json else as_table(found, folder, colours)


def _json(tree: object) -> str:
    return json.dumps(tree, indent=2) + "\n"
