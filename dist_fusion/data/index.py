"""What is in a tar and where: read once, kept beside it, and from then on every sample can be sought.

An index is arrays, never objects: whoever made it, opening it runs nothing. It is valid as long as the tar has the
size and the time of last change that it was made from.
"""

import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from hashlib import sha256
from multiprocessing import get_context
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from dist_fusion.batch import Supply
from dist_fusion.data.record import READ, Unusable, annotations, picture_names
from dist_fusion.distributed import barrier, rank

VERSION = 1
SUFFIX = ".index"
CACHE = "DIST_FUSION_CACHE"
"""Environment variable: where indices go whose tar's own folder cannot be written."""
BLOCK = tarfile.BLOCKSIZE
LARGE = 1 << 28
"""Bytes of tars that are worth processes of their own to read."""


class Damage(NamedTuple):
    """A sample, or a part of a shard, that cannot be used."""

    shard: str
    key: str  # empty if it is of the shard
    reason: str  # of few, so that they can be counted
    detail: str

    def told(self) -> str:
        """For people."""
        return f"{self.shard}{'/' if self.key else ''}{self.key}: {self.reason} ({self.detail})"


class Outline(NamedTuple):
    """What planning needs of a tar: where its usable samples are and what they have."""

    shard: str
    begin: NDArray[np.int64]  # [samples] bytes into the tar
    end: NDArray[np.int64]  # [samples]
    supply: NDArray[np.int64]  # [samples] which of `supplies`
    supplies: tuple[Supply, ...]
    damages: tuple[Damage, ...]


Told = tuple[str, str, str]
"""A damage without its shard."""


class _Found(NamedTuple):
    """One file of a sample: what follows the key and a dot, and where it is."""

    name: str
    header: int
    offset: int
    size: int


def outlines(shards: Sequence[str]) -> list[Outline]:
    """The outline of every shard; indices that are not there, or no longer valid, are made first. Collective."""
    if rank() == 0:
        _make([shard for shard in shards if _saved(shard) is None])
    barrier()
    found = []
    for shard in shards:
        saved = _saved(shard)
        found.append(_outline(shard, saved if saved is not None else _scanned(shard)))
    return found


def keys(shard: str) -> NDArray[np.str_]:
    """The keys of a shard's usable samples."""
    saved = _saved(shard)
    found: NDArray[np.str_] = np.asarray((_scanned(shard) if saved is None else saved)["keys"])
    return found


def index_file(shard: str) -> Path:
    """Where the index of a shard is or goes: beside it, or in the cache where that folder cannot be written."""
    beside = Path(shard + SUFFIX)
    if beside.exists() or os.access(beside.parent, os.W_OK):
        return beside
    home = Path(os.environ.get(CACHE) or Path.home() / ".cache" / "dist-fusion")
    return home / "indices" / (sha256(shard.encode()).hexdigest()[:32] + ".npz")


def _make(shards: Sequence[str]) -> None:
    """Write the indices of some shards, in several processes where there is much to read."""
    if not shards:
        return
    cores = min(len(os.sched_getaffinity(0)), len(shards))
    shown = partial(tqdm, total=len(shards), desc="indexing shards", unit="shard", disable=None, delay=2)
    if cores == 1 or sum(_size(shard) for shard in shards) < LARGE:
        for shard in shown(shards):
            _write(shard)
        return
    with ProcessPoolExecutor(cores, get_context("forkserver")) as pool:
        for _ in shown(pool.map(_write, shards)):
            pass


def _size(shard: str) -> int:
    return Path(shard).stat().st_size if Path(shard).exists() else 0


def _write(shard: str) -> None:
    """Scan a shard and keep what was found, if there is anywhere to keep it."""
    file = index_file(shard)
    memory = io.BytesIO()
    np.savez(memory, allow_pickle=False, **_scanned(shard))
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(memory.getvalue())
        part.replace(file)
    except OSError:  # nowhere to keep it: then every rank scans for itself
        part.unlink(missing_ok=True)


def _saved(shard: str) -> Mapping[str, Any] | None:
    """The arrays of a shard's index, read when asked for; None if there is no valid one."""
    try:
        arrays = np.load(index_file(shard), allow_pickle=False)
        if list(map(int, arrays["made"])) == _made(shard):
            found: Mapping[str, Any] = arrays
            return found
    except (OSError, ValueError, KeyError, BadZipFile, EOFError):
        pass  # no index, or a torn one: it is made anew
    return None


def _made(shard: str) -> list[int]:
    """What makes an index valid: its version, and the size and last change of the shard (0 if it is gone)."""
    try:
        status = Path(shard).stat()
    except OSError:
        return [VERSION, 0, 0]
    return [VERSION, status.st_size, status.st_mtime_ns]


def _outline(shard: str, arrays: Mapping[str, Any]) -> Outline:
    supplies = (Supply(one[0], one[1], one[2], tuple(one[3])) for one in json.loads(str(arrays["supplies"])))
    damages = (Damage(shard, *one) for one in json.loads(str(arrays["damages"])))
    begin, end, supply = (np.asarray(arrays[name]) for name in ("begin", "end", "supply"))
    return Outline(shard, begin, end, supply, tuple(supplies), tuple(damages))


def _scanned(shard: str) -> dict[str, Any]:
    """The arrays of a shard's index, from the shard itself."""
    keys: list[str] = []
    begin: list[int] = []
    end: list[int] = []
    supply: list[int] = []
    damages: list[Told] = []
    seen: set[str] = set()
    supplies: dict[Supply, int] = {}
    made = _made(shard)
    try:
        with Path(shard).open("rb") as file:
            for key, files in _samples(file, made[1], damages):
                try:
                    if key in seen or len({one.name for one in files}) < len(files):
                        raise Unusable("duplicate key", key)
                    seen.add(key)
                    has = _supply(file, files)
                except Unusable as error:
                    damages.append((key, error.reason, error.detail))
                    continue
                keys.append(key)
                begin.append(files[0].header)
                end.append(files[-1].offset + files[-1].size)
                supply.append(supplies.setdefault(has, len(supplies)))
    except OSError as error:
        damages.append(("", "cannot be read", str(error)))
    return {
        "made": np.array(made, np.int64),
        "keys": np.array(keys) if keys else np.zeros(0, "<U1"),
        "begin": np.array(begin, np.int64),
        "end": np.array(end, np.int64),
        "supply": np.array(supply, np.int64),
        "supplies": np.array(json.dumps(list(supplies))),
        "damages": np.array(json.dumps(damages)),
    }


def _supply(file: BinaryIO, members: Sequence[_Found]) -> Supply:
    """What a sample has. Raises Unusable."""
    pictures = picture_names(one.name for one in members)
    read = {}
    for one in members:
        if one.name in READ:
            file.seek(one.offset)
            read[one.name] = file.read(one.size)
    said = annotations(read)
    labels = tuple(str(statement["label"]) for statement in said.statements)
    return Supply(len(pictures), len(said.texts), len(said.questions), labels)


def _samples(file: BinaryIO, size: int, damages: list[Told]) -> Iterator[tuple[str, list[_Found]]]:
    """Members of a tar by key, as long as the key is the same; what is amiss with the tar goes to `damages`."""
    key = ""
    found: list[_Found] = []
    for name, header, offset, length in _files(file, size, damages):
        now, rest = split_name(name)
        if now != key and found:
            yield key, found
            found = []
        key = now
        found.append(_Found(rest.lower(), header, offset, length))
    if found:
        yield key, found


def split_name(name: str) -> tuple[str, str]:
    """(key, what follows it and a dot) of a file in a tar: a key ends at the first dot behind the last slash."""
    folder, slash, base = name.rpartition("/")
    stem, _, rest = base.partition(".")
    return folder + slash + stem, rest


def _files(file: BinaryIO, size: int, damages: list[Told]) -> Iterator[tuple[str, int, int, int]]:
    """(name, header, offset, size) of every plain file in a tar, also behind garbage, where tarfile would stop."""
    if size == 0:
        damages.append(("", "empty shard", "0 bytes"))
        return
    place = 0
    while place < size:
        file.seek(place)
        try:
            tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115  it owns nothing
        except tarfile.TarError as error:
            damages.append(("", "no tar" if place == 0 else "garbage in a shard", f"at byte {place}: {error}"))
            if place == 0:
                return
            place = _next_header(file, place + BLOCK, size)
            continue
        try:
            for info in tar:
                tar.members.clear()  # type: ignore[attr-defined]  # it would keep them all
                if info.isfile() and info.offset_data + info.size > size:
                    raise tarfile.ReadError("unexpected end of data")
                if info.isfile():
                    yield info.name, info.offset, info.offset_data, info.size
        except (tarfile.TarError, ValueError, OverflowError, EOFError) as error:
            damages.append(("", "cut off", f"at byte {tar.offset}: {error}"))
            return
        file.seek(tar.offset)
        block = file.read(BLOCK)
        if len(block) == BLOCK and not any(block):
            return  # the end that a tar should have
        if len(block) < BLOCK:
            damages.append(("", "cut off", f"at byte {tar.offset}: no end of the archive"))
            return
        damages.append(("", "garbage in a shard", f"at byte {tar.offset}"))
        place = _next_header(file, tar.offset + BLOCK, size)


def _next_header(file: BinaryIO, place: int, size: int) -> int:
    """The next place from which a member could begin; `size` if there is none."""
    while place < size:
        file.seek(place)
        block = file.read(1 << 20)
        for start in range(0, len(block) - BLOCK + 1, BLOCK):
            if block[start + 257 : start + 262] == b"ustar":
                return place + start
        place += max(len(block) // BLOCK, 1) * BLOCK
    return size


def reasons(damages: Iterable[Damage]) -> str:
    """How many of which kind: "3 no image, 1 cut off"."""
    counts = Counter(damage.reason for damage in damages)
    return ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
