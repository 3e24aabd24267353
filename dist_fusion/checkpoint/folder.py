"""The folder of a run: who may use it, and what was run in it."""

import errno
import fcntl
import json
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from dist_fusion import distributed
from dist_fusion.checkpoint.manifest import list_whole, read_manifest
from dist_fusion.checkpoint.writing import write_text
from dist_fusion.config import Config, dump
from dist_fusion.monitor.console import log
from dist_fusion.schema import UserError, leaves

FREE = {
    "runs", "save_every", "save_minutes", "save_async", "keep_checkpoints", "keep_epochs", "log_every",
    "evaluate_every", "time_budget", "data.num_workers", "activation_checkpointing", "teacher_stream", "trust_run",
    "health.streak", "health.hang_minutes",
}  # fmt: skip
"""Keys that may change between the lives of a run."""
SPOKEN = {
    "heads": "heads of the tasks",
    "vocabulary": "digest of the vocabulary",
    "teachers": "digest of the teachers' weights",
    "samples": "samples in the shards",
}
"""What a manifest's keys are called in a message."""
WHICH = ("python", "torch", "deepspeed", "webdataset", "numpy", "pillow", "tokenizers")

NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
"""What file systems without locks say, when asked for one."""


@contextmanager
def claim(config: Config, ds_config: Mapping[str, Any], identity: Mapping[str, Any]) -> Iterator[Path]:
    """The run's folder, made if new and held by this job alone until the end. Collective.

    `identity` is what else must be as it was for a checkpoint to be continued: sizes, heads, teacher, data. The number
    of ranks may change.

    Raises:
        UserError: if another job holds it, it is another user's, or it was made by another recipe or other files; then
            nothing in it has been touched.
    """
    run = folder_of(config)
    with ExitStack() as held:
        problem = _claim(run, config, ds_config, identity, held) if distributed.rank() == 0 else None
        problem = distributed.from_first(problem)
        if problem:
            raise UserError(problem)
        yield run


def folder_of(config: Config) -> Path:
    """Where the run of a recipe lives."""
    return Path(config.runs) / config.name


def _claim(
    run: Path, config: Config, ds_config: Mapping[str, Any], identity: Mapping[str, Any], held: ExitStack
) -> str | None:
    try:
        stranger = owned_by_another(run)
        if stranger and not config.trust_run:
            return f"{stranger}, or say trust_run=true"
        changed = differences(run, config)
        if changed:
            return (
                f"the run {run} was made by another recipe: {_listed(changed)}. Give this one another name (name=…), "
                "or put the old values back to continue it"
            )
        whole = list_whole(run)
        if whole:
            before, now = read_manifest(whole[-1].folder), as_json(identity)
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
            # A lock of this process alone: loader workers, which outlive a killed rank by seconds, would keep a flock.
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # POSIX leaves the choice
            return f"the run {run} is being trained by another job at this moment; stop that one first"
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            log.warning(
                "the file system of %s has no locks (%s; Lustre has them with -o flock): nothing keeps two jobs from "
                "training this run at once, so see to it yourself", run, error,
            )  # fmt: skip
        write_text(run / "config.yaml", dump(config))
        write_text(run / "ds_config.json", json.dumps(ds_config, indent=2) + "\n")
        write_text(run / "versions.json", json.dumps(versions(), indent=2) + "\n")
    except OSError as error:
        return f"the run folder {run} cannot be used: {error}"
    return None


def owned_by_another(run: Path) -> str | None:
    """Why the checkpoints of `run` must not be opened: whoever writes them can run code here, since they are pickles.

    None if the folder, its checkpoints and all their files are this user's or the administrator's, or not there.
    """
    for path in (run, run / "checkpoints", *sorted((run / "checkpoints").glob("step-*/*"))):
        if path.exists() and path.stat().st_uid not in (os.getuid(), 0):
            return (
                f"{path} belongs to another user (number {path.stat().st_uid}), and checkpoints can run code when they "
                "are opened; resume only what you trust: copy the folder"
            )
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


def as_json(identity: Mapping[str, Any]) -> dict[str, Any]:
    """`identity` as it will be read back."""
    tree: dict[str, Any] = json.loads(json.dumps(identity))
    return tree


def versions() -> dict[str, str]:
    """The versions a run depends on."""
    return {name: platform.python_version() if name == "python" else version(name) for name in WHICH}
