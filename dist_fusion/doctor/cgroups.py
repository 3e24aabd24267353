"""What the control groups of this process leave of the host's memory: SLURM's of its job, a container's, systemd's."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Version(NamedTuple):
    """How one version of control groups tells what memory a group may take."""

    limit: str
    used: str
    mounts: tuple[str, ...]  # where its groups are, from the root of all files
    cached: tuple[str, ...]  # of memory.stat: what is counted as used, and given back when it is wanted


FIRST = Version(
    "memory.limit_in_bytes", "memory.usage_in_bytes", ("sys/fs/cgroup/memory",),
    ("total_inactive_file", "total_active_file"),
)  # fmt: skip
SECOND = Version(
    "memory.max", "memory.current", ("sys/fs/cgroup", "sys/fs/cgroup/unified"), ("inactive_file", "active_file")
)


def left(root: Path = Path("/")) -> float:
    """Bytes that this process may still take by its own group and all above it; infinite where none has a limit."""
    return min((_left(folder, version) for folder, version in groups(root)), default=float("inf"))


def groups(root: Path) -> Iterator[tuple[Path, Version]]:
    """This process's groups, from the outermost on.

    In a container the host's names of them may lead nowhere: then what is mounted is its own group.
    """
    listed = root / "proc/self/cgroup"
    for line in listed.read_text().splitlines() if listed.is_file() else ():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        version = FIRST if controllers else SECOND
        parts = Path(path.lstrip("/")).parts
        for mount in version.mounts:
            for depth in range(len(parts) + 1):
                yield (root / mount).joinpath(*parts[:depth]), version


def _left(folder: Path, version: Version) -> float:
    try:
        limit, used = ((folder / name).read_text().strip() for name in (version.limit, version.used))
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except OSError:  # there is no such group here, or nothing is counted in it
        return float("inf")
    if not limit.isdecimal():  # "max"
        return float("inf")
    return float(limit) - float(used) + sum(float(stat.get(name, 0)) for name in version.cached)
