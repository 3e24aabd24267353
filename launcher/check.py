"""What can be known before a job waits for days in a queue: whether it could run at all."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from dist_fusion.checkpoint.folder import differences
from dist_fusion.config import Config, load
from dist_fusion.describe import describe
from dist_fusion.schema import UserError


def check(recipe: str, overrides: Sequence[str], ranks: int) -> Config:
    """The recipe's Config, if a run of it on so many ranks could start here.

    Raises:
        UserError: for what is wrong with the recipe, and else for all that it lacks: shards, weights, a run's folder
            that can be written and was made by this recipe, a batch that the ranks can share.
    """
    config = load(recipe, overrides)
    _, lacking = describe(config, ranks)
    lacking += unusable(config)
    if lacking:
        raise UserError("it cannot start:\n  " + "\n  ".join(lacking))
    return config


def unusable(config: Config) -> list[str]:
    """Why the run's folder cannot be used, as far as it can be seen from this host."""
    run = folder_of(config)
    nearest = next(path for path in (run, *run.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        return [f"the run's folder {run} cannot be written: {error.strerror} ({nearest}); choose another with runs=…"]
    changed = differences(run, config)
    if changed:
        return [f"the run {run} was made by another recipe: {'; '.join(changed)}; give this one another name (name=…)"]
    return []


def folder_of(config: Config) -> Path:
    """The run's folder."""
    return Path(config.runs) / config.name


def told(config: Config, ranks: int) -> str:
    """What would run, in a line."""
    return (
        f"{folder_of(config)}: {config.steps} steps of {config.global_batch} samples on {ranks} ranks, "
        f"{config.micro_batch(ranks)} a rank and micro-step"
    )
