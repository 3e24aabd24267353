"""Tars of samples, as users name them and as they are read and written: local files, or local copies of others."""

import errno
import io
import os
import tarfile
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import webdataset as wds

from dist_fusion.data.index import outlines, reasons, split_name
from dist_fusion.data.record import Record, Unusable, record
from dist_fusion.data.remote import fetched, is_remote
from dist_fusion.schema import UserError

PAUSES = (0.1, 1.0, 5.0)
"""Seconds before a failed read is tried again: a cluster's file system may be away for a moment."""
LOST = 60.0
"""Seconds for which a shard that could not be read counts as lost."""
BLOCK = tarfile.BLOCKSIZE
MOST_OPEN = 32
"""Shards that are kept open."""


def find_shards(folders: Sequence[str], *, cache: str = "", trust: bool = False) -> list[str]:
    """Every tar of `folders` (or the tars themselves) in the order of their names, by absolute paths.

    Those at addresses are first brought into `cache`; commands are run if they are to be trusted.

    Raises:
        UserError: where there is no such folder, it has no tar, or one cannot be had or may not be.
    """
    shards: list[Path] = []
    for name in folders:
        if is_remote(name):
            shards += fetched([name], Path(cache), trust=trust)
            continue
        if ":" in name.split("/")[0]:
            raise UserError(
                f"data.shards has {name!r}; a shard is a local path, an http address, or a trusted command (pipe:…)"
            )
        path = Path(name)
        if path.is_file() and path.suffix != ".tar":
            raise UserError(f"data.shards has {name!r}, which is no .tar; name a folder of tars, or tars")
        found = [path] if path.is_file() else sorted(path.glob("*.tar"))
        if not found:
            reason = "has no .tar files" if path.is_dir() else "does not exist"
            raise UserError(f"data.shards has {name!r}, which {reason}; `dist-fusion prepare` makes shards")
        shards += found
    return [str(shard.absolute()) for shard in shards]


def write_shards(folder: Path, samples: Iterable[tuple[str, Mapping[str, bytes]]], samples_per_shard: int) -> int:
    """Write (key, {extension: bytes}) to `00000.tar`, `00001.tar`, … of `folder`; returns how many samples."""
    folder.mkdir(parents=True, exist_ok=True)
    count, writer = 0, None
    for key, members in samples:
        if count % samples_per_shard == 0:
            if writer is not None:
                writer.close()
            writer = wds.TarWriter(str(folder / f"{count // samples_per_shard:05d}.tar"), encoder=False, mtime=0)
        assert writer is not None
        writer.write({"__key__": key, **members})
        count += 1
    if writer is not None:
        writer.close()
    return count


def read_records(shards: Sequence[str]) -> Iterator[Record]:
    """The records of all shards as they lie. Raises UserError if one of them is damaged."""
    reader = Reader()
    for outline in outlines(shards):
        if outline.damages:
            raise UserError(f"unusable: {outline.damages[0].told()}; in all {reasons(outline.damages)}")
        for begin, end in zip(outline.begin.tolist(), outline.end.tolist(), strict=True):
            yield parse(outline.shard, reader.read(outline.shard, begin, end))


def parse(shard: str, raw: bytes) -> Record:
    """The record whose files these bytes of a shard are. Raises Unusable."""
    members, key = {}, ""
    try:
        for name, data in _plain(raw) or _any(raw):
            key, rest = split_name(name)
            members[rest.lower()] = data
    except (tarfile.TarError, ValueError, EOFError, OSError) as error:
        raise Unusable("changed since it was indexed", str(error)) from None
    return record(shard, key, members)


def _plain(raw: bytes) -> list[tuple[str, bytes]]:
    """Files by name where all are plain, as nearly always, in a tenth of tarfile's time; none if one is not."""
    found, place = [], 0
    while place + BLOCK <= len(raw):
        header = raw[place : place + BLOCK]
        if header[156:157] not in b"0\0" or header[345:346] != b"\0" or header[257:262] != b"ustar":
            return []
        size = int(header[124:136].rstrip(b"\0 "), 8)
        place += BLOCK
        found.append((header[:100].split(b"\0", 1)[0].decode(), raw[place : place + size]))
        place += -(-size // BLOCK) * BLOCK
    return found


def _any(raw: bytes) -> Iterator[tuple[str, bytes]]:
    """Files by name whatever their headers: long names, other formats."""
    ended = raw + bytes(-len(raw) % BLOCK + 2 * BLOCK)
    with tarfile.open(fileobj=io.BytesIO(ended), mode="r:") as tar:
        for info in tar:
            if info.isfile():
                file = tar.extractfile(info)
                assert file is not None
                yield info.name, file.read()


class Reader:
    """Reads parts of shards, and keeps some of them open."""

    def __init__(self, pauses: Sequence[float] = PAUSES):
        self._pauses, self._open = pauses, OrderedDict[str, int]()
        self._lost: dict[str, float] = {}  # until when nobody waits for a shard

    def read(self, shard: str, begin: int, end: int) -> bytes:
        """Bytes `begin` to `end` of a shard, tried again after each of the pauses.

        A shard for which that was no use is tried but once for some time: a set that has vanished as a whole must not
        cost the pauses for each of its samples.

        Raises:
            OSError: if the last try fails, too.
        """
        pauses = () if time.monotonic() < self._lost.get(shard, 0.0) else self._pauses
        for pause in (*pauses, None):
            try:
                return self._tried(shard, begin, end)
            except OSError:
                self._forget(shard)
                if pause is None:
                    self._lost[shard] = time.monotonic() + LOST
                    raise
                time.sleep(pause)
        raise AssertionError("unreachable")

    def _tried(self, shard: str, begin: int, end: int) -> bytes:
        if shard not in self._open:
            self._open[shard] = os.open(shard, os.O_RDONLY | os.O_CLOEXEC)
            if len(self._open) > MOST_OPEN:
                self._forget(next(iter(self._open)))
        self._open.move_to_end(shard)
        parts = []
        while begin < end:
            part = os.pread(self._open[shard], end - begin, begin)
            if not part:
                raise OSError(errno.EIO, f"it ends before byte {end}", shard)
            parts.append(part)
            begin += len(part)
        return b"".join(parts)

    def _forget(self, shard: str) -> None:
        descriptor = self._open.pop(shard, None)
        if descriptor is not None:
            os.close(descriptor)

    def __del__(self) -> None:
        for shard in [*self._open]:
            self._forget(shard)
