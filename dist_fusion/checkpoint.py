"""The folder of a run, and its sharded checkpoints.

    runs/<name>/config.yaml  ds_config.json  versions.json  metrics.jsonl  tb/  logs/  model.json  model.safetensors
    runs/<name>/checkpoints/step-00000400/   DeepSpeed's shards, rank-<r>.pt, and manifest.json, written last

A checkpoint is what its manifest says is whole; a folder without one is no candidate. The teacher is never in it.
Resuming is for runs of one's own: DeepSpeed unpickles its shards. Weights travel as model.safetensors.
"""

import fcntl
import json
import os
import platform
import random
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml

from dist_fusion import distributed
from dist_fusion.config import Config, dump
from dist_fusion.schema import UserError, leaves

FREE = {
    "runs", "save_every", "keep_checkpoints", "log_every", "evaluate_every", "overlay_every", "data.num_workers",
    "activation_checkpointing", "teacher_stream",
}  # fmt: skip
"""Keys that may change between the lives of a run."""
SPOKEN = {
    "world_size": "number of ranks",
    "heads": "heads of the tasks",
    "vocabulary": "digest of the vocabulary",
    "teachers": "digest of the teachers' weights",
    "samples": "samples in the shards",
}
"""What a manifest's keys are called in a message."""
WHICH = ("python", "torch", "deepspeed", "webdataset", "numpy", "pillow", "tokenizers")


class Saved(NamedTuple):
    """A whole checkpoint."""

    folder: Path
    step: int


@contextmanager
def claim(config: Config, ds_config: Mapping[str, Any], identity: Mapping[str, Any]) -> Iterator[Path]:
    """The run's folder, made if new and held by this job alone until the end. Collective.

    `identity` is what else must be as it was for a checkpoint to be continued: sizes, heads, teacher, data.

    Raises:
        UserError: if another job holds it, or it was made by another recipe, other files or another number of ranks;
            then nothing in it has been touched.
    """
    run = Path(config.runs) / config.name
    with ExitStack() as held:
        problem = _claim(run, config, ds_config, identity, held) if distributed.rank() == 0 else None
        problem = distributed.from_first(problem)
        if problem:
            raise UserError(problem)
        yield run


def _claim(
    run: Path, config: Config, ds_config: Mapping[str, Any], identity: Mapping[str, Any], held: ExitStack
) -> str | None:
    try:
        changed = differences(run, config)
        if changed:
            return (
                f"the run {run} was made by another recipe: {_listed(changed)}. Give this one another name (name=…), "
                "or put the old values back to continue it"
            )
        whole = list_whole(run)
        if whole:
            before = json.loads((whole[-1].folder / "manifest.json").read_text())
            now = {"world_size": distributed.world_size(), **_as_json(identity)}
            changed = [
                f"{SPOKEN.get(key, key)}: {before.get(key)!s:.80} then, {value!s:.80} now"
                for key, value in now.items()
                if before.get(key) != value
            ]
            if changed:
                return f"the checkpoint {whole[-1].folder} cannot be continued: {_listed(changed)}"
        for folder in ("checkpoints", "logs", "tb"):
            (run / folder).mkdir(parents=True, exist_ok=True)
        lock = held.enter_context((run / "lock").open("w"))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return f"the run {run} is being trained by another job at this moment; stop that one first"
        _write(run / "config.yaml", dump(config))
        _write(run / "ds_config.json", json.dumps(ds_config, indent=2) + "\n")
        _write(run / "versions.json", json.dumps(versions(), indent=2) + "\n")
    except OSError as error:
        return f"the run folder {run} cannot be used: {error}"
    return None


def differences(run: Path, config: Config) -> list[str]:
    """How the recipe that made `run` differs from `config`, but for what may change; nothing if there is no run."""
    recipe = run / "config.yaml"
    if not recipe.exists():
        return []
    before, now = (dict(leaves(yaml.safe_load(text))) for text in (recipe.read_text(), dump(config)))
    keys = [key for key in {**before, **now} if before.get(key) != now.get(key) and key not in FREE]
    return [f"{key} was {before.get(key)!r}, now {now.get(key)!r}" for key in keys]


def _listed(changes: Sequence[str]) -> str:
    return "; ".join(changes[:5]) + (f" and {len(changes) - 5} more" if len(changes) > 5 else "")


def _as_json(identity: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = json.loads(json.dumps(identity))
    return tree


def _write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def versions() -> dict[str, str]:
    """The versions a run depends on."""
    return {name: platform.python_version() if name == "python" else version(name) for name in WHICH}


def save(engine: Any, run: Path, config: Config, identity: Mapping[str, Any], step: int) -> Saved:
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
        position = {"step": step, "world_size": distributed.world_size()}
        manifest = {**position, **_as_json(identity), "files": files, "versions": versions()}
        _write(folder / "manifest.json", json.dumps(manifest, indent=2) + "\n")
        for old in list_whole(run)[: -config.keep_checkpoints]:
            shutil.rmtree(old.folder)
    distributed.barrier()
    return Saved(folder, step)


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


def resume(engine: Any, run: Path) -> int:
    """Load the newest whole checkpoint, chosen by rank 0 for all; returns its step, 0 if there is none. Collective."""
    whole = list_whole(run) if distributed.rank() == 0 else []
    found: Saved | None = distributed.from_first(whole[-1] if whole else None)
    if found is None:
        return 0
    engine.load_checkpoint(str(found.folder.parent), tag=found.folder.name)
    _restore_random_state(torch.load(found.folder / f"rank-{distributed.rank()}.pt", weights_only=True))
    return found.step


def _random_state() -> dict[str, Any]:
    """Every generator of this rank, as tensors and text: DeepSpeed keeps none, and each rank needs its own."""
    kind, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
        "python": json.dumps(random.getstate()),
        "numpy": json.dumps([kind, [int(key) for key in keys], *rest]),
    }


def _restore_random_state(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])
    kind, words, gauss = json.loads(state["python"])
    random.setstate((kind, tuple(words), gauss))
    numpy_state = json.loads(state["numpy"])
    np.random.set_state((numpy_state[0], np.array(numpy_state[1], dtype=np.uint32), *numpy_state[2:]))
