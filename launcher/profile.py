"""A profile says where jobs run: a YAML file of submitit's own parameters, such as slurm/v100.yaml."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import submitit
import yaml
from submitit.core.plugins import get_executors

from dist_fusion.schema import UserError, nearest

PROFILES = [path for path in (Path(__file__).parents[1] / "slurm", Path(__file__).parent / "profiles") if path.is_dir()]
CLUSTERS = ("slurm", "local", "debug")
CONSTRUCTED = ("slurm_max_num_timeout", "slurm_python", "local_max_num_timeout", "local_python")
"""submitit takes these when an executor is made, and all others afterwards."""


class Profile(NamedTuple):
    """Where jobs run, and with what."""

    cluster: str
    parameters: dict[str, Any]

    @property
    def ranks(self) -> int:
        """Tasks of a job, one a GPU."""
        nodes: int = self._own("nodes", 1)
        tasks: int = self._own("tasks_per_node", 1)
        return nodes * tasks

    def _own(self, key: str, default: Any) -> Any:
        return self.parameters.get(f"{self.cluster}_{key}", self.parameters.get(key, default))

    def executor(self, folder: Path) -> submitit.AutoExecutor:
        """submitit's executor, whose jobs keep their logs and pickles in `folder`/<job>. Raises UserError."""
        made = {key: value for key, value in self.parameters.items() if key in CONSTRUCTED}
        try:
            executor = submitit.AutoExecutor(folder=folder / "%j", cluster=self.cluster, **made)
            executor.update_parameters(**{k: v for k, v in self.parameters.items() if k not in CONSTRUCTED})
        except (AssertionError, NameError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(f"submitit refuses the profile: {error}") from None
        return executor


def load_profile(profile: str | Path, changes: Sequence[str] = ()) -> Profile:
    """The profile of a path, or a shipped one by its name, with `key=value` changes.

    Raises:
        UserError: if there is none, or a key is none of submitit's, with those that are.
    """
    path = _find(profile)
    try:
        tree = yaml.safe_load(path.read_text())
        given = dict(_change(change) for change in changes)
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path} is no profile: it must be a mapping of submitit's parameters")
    tree |= given
    known = valid_keys()
    for key in tree:
        if key not in known:
            raise UserError(f"{path}: unknown key {key!r}{nearest(key, known)}; valid keys: {', '.join(sorted(known))}")
    cluster = tree.pop("cluster", None)
    if cluster not in CLUSTERS:
        raise UserError(f"{path}: cluster is {cluster!r}; it can be {', '.join(CLUSTERS)}")
    gpus, tasks = tree.get("gpus_per_node"), tree.get("tasks_per_node", 1)
    if gpus and gpus != tasks:
        raise UserError(
            f"{path}: gpus_per_node is {gpus} and tasks_per_node {tasks}; a task has one GPU: make them equal"
        )
    return Profile(cluster, tree)


def valid_keys() -> set[str]:
    """What a profile may say: submitit's common parameters, and those of each kind of cluster with its name before."""
    own = {f"{name}_{key}" for name, kind in get_executors().items() for key in kind._valid_parameters()}
    return {"cluster", *submitit.AutoExecutor._typed_parameters(), *own, *CONSTRUCTED}


def _change(change: str) -> tuple[str, Any]:
    key, equals, value = change.partition("=")
    if not equals:
        raise UserError(f"--with {change}: write --with key=value")
    return key, yaml.safe_load(value)


def _find(profile: str | Path) -> Path:
    shipped = {path.stem: path for folder in PROFILES for path in sorted(folder.glob("*.yaml"))}
    if Path(profile).is_file():
        return Path(profile)
    if str(profile) in shipped:
        return shipped[str(profile)]
    raise UserError(
        f"no profile {str(profile)!r}{nearest(str(profile), shipped)}; shipped: {', '.join(shipped)}; or give a path"
    )
