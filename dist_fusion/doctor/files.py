"""Disks: what is on them, what kind they are, and what room they have."""

import os
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path

from dist_fusion.data.remote import is_remote
from dist_fusion.data.shards import find_shards
from dist_fusion.doctor.lines import FAIL, OK, WARN, Case, Line, gigabytes, guarded
from dist_fusion.facts import saved_size

MOUNTS = Path("/proc/self/mountinfo")
NETWORK = (
    "nfs", "nfs4", "lustre", "gpfs", "beegfs", "cifs", "smb3", "ceph", "fuse.ceph", "fuse.sshfs", "fuse.glusterfs",
    "afs", "panfs", "wekafs", "pvfs2", "fhgfs", "fuse.juicefs",
)  # fmt: skip
"""File systems of other machines. On them a cache of many small files is slow, and may be "stale"."""
LITTLE = 10e9
"""Bytes below which a disk counts as nearly full where no recipe says what it needs."""


def triton_cache(case: Case) -> list[Line]:
    """Whether compiled kernels go to a disk of this host's own."""
    folder = Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache")
    kind = kind_of(folder)
    if kind in NETWORK:
        said = f"{folder} is on {kind}: ranks may find it stale (python -m launcher worker chooses a local one)"
        return [Line(WARN, said, "export TRITON_CACHE_DIR=/tmp/$USER/triton")]
    return [Line(OK, f"{folder}, on {kind}")]


def kind_of(path: Path, mounts: Path = MOUNTS) -> str:
    """The kind of file system that a path is on, or would be: the last mount of the longest place above it."""
    resolved = path.expanduser().resolve()
    best, kind = -1, "an unknown file system"
    for place, one in _mounted(mounts):
        if resolved.is_relative_to(place) and len(place.parts) >= best:
            best, kind = len(place.parts), one
    return kind


def _mounted(mounts: Path) -> Iterator[tuple[Path, str]]:
    """Places and kinds, in the order of mounting. A line: id parent major:minor root place options … - kind source …"""
    for line in mounts.read_text().splitlines():
        before, _, after = line.partition(" - ")
        yield Path(before.split()[4].encode().decode("unicode_escape")), after.split()[0]


def shards(case: Case) -> list[Line]:
    """Whether every folder of shards is there, and the first of its tars can be read."""
    lines: list[Line] = []
    for folder in case.shards:
        with guarded(lines):
            lines.append(_shards_of(folder))
    return lines or [Line(OK, "where they are, a recipe says (--recipe), or --shards")]


def _shards_of(folder: str) -> Line:
    if is_remote(folder):
        return Line(OK, f"{folder} is an address: not looked at")
    found = find_shards([folder])
    remedy = f"make it again, or see what is whole: dist-fusion index {folder}"
    try:
        with tarfile.open(found[0], "r:") as tar:
            first = next((member for member in tar if member.isfile()), None)
            file = tar.extractfile(first) if first else None
            if file is None:
                return Line(FAIL, f"{found[0]} is empty", remedy)
            file.read()
    except (tarfile.TarError, OSError) as error:
        return Line(FAIL, f"{found[0]} cannot be read: {error}", remedy)
    return Line(OK, f"{folder}: {len(found)} shards, the first can be read")


def disk(case: Case) -> list[Line]:
    """Room for checkpoints: those that are kept, the one that is being written, and the best."""
    free = float(shutil.disk_usage(case.folder).free)
    said, figures = f"{{}} GB are free in {case.folder}", (round(gigabytes(free), 1),)
    if case.facts is None or case.config is None:
        if free < LITTLE:
            return [Line(WARN, said, "make room, or choose another folder with runs=", figures)]
        return [Line(OK, said, "", figures)]
    kept = case.config.keep_checkpoints + 1 + bool(case.config.keep_best)
    one = saved_size(case.facts)
    more = " and one of every so many epochs" if case.config.keep_epochs else ""
    said += f" (a quota is not seen); {kept} checkpoints{more} take {gigabytes(kept * one):.2g} GB"
    if free < 2 * one:
        return [Line(FAIL, said, "make room, choose another folder with runs=, or a smaller keep_checkpoints", figures)]
    if free < kept * one:
        return [Line(WARN, said, "make room, choose another folder with runs=, or a smaller keep_checkpoints", figures)]
    return [Line(OK, said, "", figures)]
