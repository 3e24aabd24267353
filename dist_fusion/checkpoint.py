"""The folder of a run, and its sharded checkpoints.

    runs/<name>/config.yaml  ds_config.json  versions.json  metrics.jsonl  tb/  logs/  model.json  model.safetensors
    runs/<name>/checkpoints/step-00000400/   DeepSpeed's shards, rank-<r>.pt, and manifest.json, written last

A checkpoint is what its manifest says is whole; a folder without one is no candidate. The teacher is never in it.
Resuming is for runs of one's own: DeepSpeed unpickles its shards. Weights travel as model.safetensors.
"""

import hashlib
import json
import os
import platform
import random
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml

from dist_fusion import distributed
from dist_fusion.config import Config, dump
from dist_fusion.schema import UserError

FREE = {"runs", "save_every", "keep_checkpoints", "log_every", "evaluate_every", "data.num_workers"}
"""Keys that may change between the lives of a run."""
WHICH = ("python", "torch", "deepspeed", "webdataset", "numpy", "pillow", "tokenizers")


class Saved(NamedTuple):
    """A whole checkpoint."""

    folder: Path
    step: int


def open_run(config: Config, ds_config: Mapping[str, Any]) -> Path:
    """The run's folder, made if new, with the recipe and versions in it. Collective.

    Raises:
        UserError: if the name is already used by another recipe: nothing is overwritten.
    """
    run = Path(config.runs) / config.name
    problem = None
    if distributed.rank() == 0:
        problem = _claim(run, config, ds_config)
    problem = distributed.from_first(problem)
    if problem:
        raise UserError(problem)
    return run


def _claim(run: Path, config: Config, ds_config: Mapping[str, Any]) -> str | None:
    recipe = run / "config.yaml"
    if recipe.exists():
        before, now = (dict(_leaves(yaml.safe_load(text))) for text in (recipe.read_text(), dump(config)))
        changed = [key for key in {**before, **now} if before.get(key) != now.get(key) and key not in FREE]
        if changed:
            shown = "; ".join(f"{key} was {before.get(key)!r}, now {now.get(key)!r}" for key in changed[:5])
            more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
            return (
                f"the run {run} was made by another recipe: {shown}{more}. Give this one another name (name=…), "
                "or put the old values back to continue it"
            )
    try:
        for folder in ("checkpoints", "logs", "tb"):
            (run / folder).mkdir(parents=True, exist_ok=True)
        recipe.write_text(dump(config))
        (run / "ds_config.json").write_text(json.dumps(ds_config, indent=2) + "\n")
        (run / "versions.json").write_text(json.dumps(versions(), indent=2) + "\n")
    except OSError as error:
        return f"the run folder {run} cannot be written: {error}"
    return None


def versions() -> dict[str, str]:
    """The versions a run depends on."""
    return {name: platform.python_version() if name == "python" else version(name) for name in WHICH}


def _leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _leaves(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, tree


def save(engine: Any, run: Path, config: Config, step: int) -> Saved:
    """Write the checkpoint of `step`: shards by all ranks, then the manifest by rank 0. Collective."""
    folder = run / "checkpoints" / f"step-{step:08d}"
    if distributed.rank() == 0 and folder.exists():
        shutil.rmtree(folder)  # what a killed save left
    distributed.barrier()
    engine.save_checkpoint(str(folder.parent), tag=folder.name, client_state={"step": step}, save_latest=False)
    torch.save(_random_state(), folder / f"rank-{distributed.rank()}.pt")
    distributed.barrier()
    if distributed.rank() == 0:
        files = {
            str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()
        }
        manifest = {
            "step": step,
            "world_size": distributed.world_size(),
            "model": asdict(config.model),
            "teacher": teacher_digest(config),
            "files": files,
            "versions": versions(),
        }
        partial = folder / "manifest.json.partial"
        with partial.open("w") as file:
            json.dump(manifest, file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(folder / "manifest.json")
        for old in list_whole(run)[: -config.keep_checkpoints]:
            shutil.rmtree(old.folder)
    distributed.barrier()
    return Saved(folder, step)


def teacher_digest(config: Config) -> str | None:
    """SHA-256 of the teacher's weights, which are in no checkpoint; None without a teacher."""
    if config.teacher is None:
        return None
    with (Path(config.teacher.folder) / "model.safetensors").open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def list_whole(run: Path) -> list[Saved]:
    """The run's whole checkpoints, oldest first."""
    return [
        Saved(folder, json.loads((folder / "manifest.json").read_text())["step"])
        for folder in sorted((run / "checkpoints").glob("step-*"))
        if _is_whole(folder)
    ]


def _is_whole(folder: Path) -> bool:
    try:
        files = json.loads((folder / "manifest.json").read_text())["files"]
        return all((folder / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError):
        return False


def resume(engine: Any, run: Path, config: Config) -> int:
    """Load the newest whole checkpoint, chosen by rank 0 for all; returns its step, 0 if there is none. Collective.

    Raises:
        UserError: if it is of another architecture or of another number of ranks.
    """
    whole = list_whole(run) if distributed.rank() == 0 else []
    found: Saved | None = distributed.from_first(whole[-1] if whole else None)
    if found is None:
        return 0
    manifest = json.loads((found.folder / "manifest.json").read_text())
    ours = asdict(config.model)
    unlike = [
        f"{key} {manifest['model'].get(key)} there, {ours[key]} here"
        for key in ours
        if manifest["model"].get(key) != ours[key]
    ]
    if unlike:
        raise UserError(f"the checkpoint {found.folder} is of another architecture: {'; '.join(unlike)}")
    if manifest["teacher"] != teacher_digest(config):
        raise UserError(
            f"the checkpoint {found.folder} was taught by another teacher than now lies in "
            f"{config.teacher.folder if config.teacher else None!r}: its weights have changed since"
        )
    if manifest["world_size"] != distributed.world_size():
        raise UserError(
            f"the checkpoint {found.folder} was saved by {manifest['world_size']} ranks and there are "
            f"{distributed.world_size()}; start as many"
        )
    engine.load_checkpoint(str(found.folder.parent), tag=found.folder.name)
    _restore_random_state(torch.load(found.folder / f"rank-{distributed.rank()}.pt", weights_only=True))
    return found.step


def _random_state() -> dict[str, Any]:
    """Every generator of this rank, as tensors and text: DeepSpeed keeps none, and each rank needs its own."""
    kind, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "python": json.dumps(random.getstate()),
        "numpy": json.dumps([kind, [int(key) for key in keys], *rest]),
    }


def _restore_random_state(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    kind, words, gauss = json.loads(state["python"])
    random.setstate((kind, tuple(words), gauss))
    numpy_state = json.loads(state["numpy"])
    np.random.set_state((numpy_state[0], np.array(numpy_state[1], dtype=np.uint32), *numpy_state[2:]))
