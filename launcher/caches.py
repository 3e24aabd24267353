"""Where a rank builds and keeps compiled code: on the node's own disk, apart for each set of versions."""

import fcntl
import os
import platform
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TextIO

WHICH = ("torch", "deepspeed")
BUILDING = "lock"
"""The file by which torch's builds keep one another out. A killed one leaves it, and the next waits for it forever."""


def folders(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Variables that say where code is compiled to; those that are set already stay as they are."""
    local = Path(tempfile.gettempdir()) / f"dist-fusion-{os.getuid()}"
    names = [f"python-{platform.python_version()}", *(f"{name}-{version(name)}" for name in WHICH)]
    chosen = {
        "TORCH_EXTENSIONS_DIR": str(local / "extensions" / "-".join(names)),
        "TRITON_CACHE_DIR": str(local / "triton"),
    }
    return {name: environment.get(name) or folder for name, folder in chosen.items()}


def hold_builds(folder: Path) -> TextIO:
    """Remove what killed builds left in `folder`, unless a living process of this node uses it; returns what marks
    this process as one, as long as it is open.

    Who uses the folder shares a lock on it, which the system takes back when a process dies in whatever way. Who is
    alone with it may clean up, and nobody builds meanwhile.
    """
    folder.mkdir(parents=True, exist_ok=True)
    mark = (folder / "in-use").open("w")
    try:
        fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        pass
    else:
        for left in folder.rglob(BUILDING):
            left.unlink()
    fcntl.flock(mark, fcntl.LOCK_SH)
    return mark
