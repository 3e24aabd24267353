"""The cells of a table as an array of jobs, and what has become of them."""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from dist_fusion.checkpoint.folder import folder_of
from dist_fusion.config import Config
from dist_fusion.schema import UserError, build, section
from launcher import records, slurm
from launcher.check import check
from launcher.profile import Profile
from launcher.submit import submit


@section
@dataclass(frozen=True)
class Sweep:
    """A file of a sweep."""

    name: str  # of the folder in `runs` that holds a run for each cell
    recipe: str
    cells: dict[str, tuple[str, ...]]  # overrides of each, by its name
    overrides: tuple[str, ...] = field(default=())  # of all


class Row(NamedTuple):
    """What is known of a cell."""

    cell: str
    now: slurm.Queued
    step: int
    values: dict[str, float]


def read_sweep(path: Path) -> Sweep:
    """The sweep of a file. Raises UserError."""
    try:
        tree = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{path} is no sweep: {error}") from None
    sweep = build(Sweep, tree, str(path))
    if not sweep.cells:
        raise UserError(f"{path}: cells is empty; write name: [key=value, …] for each")
    return sweep


def check_cells(sweep: Sweep, ranks: int) -> dict[str, Config]:
    """Every cell's Config. Raises UserError with all that is wrong with any of them."""
    configs, wrong = {}, []
    for cell, overrides in sweep.cells.items():
        try:
            configs[cell] = check(sweep.recipe, [*sweep.overrides, *overrides, f"name={sweep.name}/{cell}"], ranks)
        except UserError as error:
            wrong.append(f"{cell}: {error}")
    if wrong:
        raise UserError("\n".join(wrong))
    return configs


def start(sweep: Sweep, configs: Mapping[str, Config], profile: Profile) -> dict[Path, records.Job]:
    """Submit the cells that neither have ended nor have a job; returns the jobs of these."""
    runs = {cell: folder_of(config) for cell, config in configs.items()}
    queued = records.queue_of(runs.values())
    waiting = [
        configs[cell]
        for cell, run in runs.items()
        if not (run / "model.safetensors").exists() and not records.lives(run, queued)
    ]
    if not waiting:
        return {}
    return submit(waiting, profile, Path(waiting[0].runs) / sweep.name / "logs")


def follow(configs: Mapping[str, Config], say: Callable[[str], None], seconds: float = 5.0) -> list[Row]:
    """Say what changes, until no cell has a job any more; returns how each stands then.

    Where SLURM does not answer it is asked again: the jobs go on meanwhile.
    """
    before: dict[str, str] = {}
    while True:
        try:
            rows = summary(configs)
        except slurm.SlurmAbsentError:
            raise
        except slurm.SlurmError as error:
            say(f"SLURM is asked again in {seconds:g} s: {error}")
            time.sleep(seconds)
            continue
        now = {row.cell: row.now.state for row in rows}
        for cell, state in now.items():
            if before.get(cell) != state:
                say(f"{cell}: {state}")
        before = now
        if all(state in records.OVER for state in now.values()):
            return rows
        time.sleep(seconds)


def summary(configs: Mapping[str, Config]) -> list[Row]:
    """How each cell stands, with the last loss and the last scores that it wrote."""
    queued, rows = records.queue_of(map(folder_of, configs.values())), []
    for cell, config in configs.items():
        run = folder_of(config)
        jobs = records.jobs_of(run)
        now = records.state(run, jobs[-1], queued) if jobs else slurm.Queued("new", "", "")
        rows.append(Row(cell, now, *_last_values(run)))
    return rows


def _last_values(run: Path) -> tuple[int, dict[str, float]]:
    path, step = run / "metrics.jsonl", 0
    values: dict[str, float] = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        if line.endswith("}"):  # a killed run leaves a torn one
            entry: dict[str, Any] = json.loads(line)
            step = entry.pop("step")
            values |= {key: value for key, value in entry.items() if key == "loss/total" or key.startswith("dev/")}
    return step, values


def as_text(rows: list[Row]) -> str:
    """A row a cell, a column a value."""
    keys = list(dict.fromkeys(key for row in rows for key in row.values))
    table = [["cell", "step", *keys, "state"]]
    for row in rows:
        shown = (f"{row.values[key]:.4f}" if key in row.values else "" for key in keys)
        table.append([row.cell, str(row.step), *shown, f"{row.now.state} {row.now.where}".strip()])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join(
        "  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)).rstrip() for line in table
    )
