"""Shards from elsewhere, brought once into a local folder: a sample is sought in a file, which an address is not.

webdataset opens an address as a pipe, which cannot seek, and would run a `pipe:` command that stands in a recipe or a
list from a stranger. Here http(s) is fetched, continued where it broke off, and a command is run only where the recipe
says `trust_shards: true`.
"""

import fcntl
import os
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from itertools import product
from pathlib import Path

from tqdm import tqdm

from dist_fusion.schema import UserError

SCHEMES = ("http://", "https://")
COMMAND = "pipe:"
PAUSES = (1.0, 5.0, 20.0)
"""Seconds before a broken transfer is continued."""
AT_ONCE = 8
SECONDS = 60
"""Without a byte, after which a transfer has broken."""


def is_remote(name: str) -> bool:
    """Whether `name` is an address or a command rather than a path."""
    return name.startswith((*SCHEMES, COMMAND))


def fetched(names: Sequence[str], folder: Path, *, trust: bool, pauses: Sequence[float] = PAUSES) -> list[Path]:
    """Local copies of shards by their addresses (or commands), in this order; those that are there are not fetched.

    `http://host/{000..099}.tar` stands for a hundred. Raises UserError for what cannot be had or is not trusted.
    """
    for name in names:
        if name.startswith(COMMAND) and not trust:
            raise UserError(
                f"data.shards has {name!r}, a command; set data.trust_shards=true if you know who wrote it, or name a "
                "local folder or an http address"
            )
    if names and not str(folder).strip("."):
        raise UserError(f"data.shards has {names[0]!r}; set data.cache to a folder with room for a copy of the shards")
    wanted = [one for name in names for one in (expanded(name) if name.startswith(SCHEMES) else [name])]
    paths = [folder / f"{sha256(one.encode()).hexdigest()[:24]}.tar" for one in wanted]
    if all(path.exists() for path in paths):
        return paths
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock, ThreadPoolExecutor(AT_ONCE) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the other ranks wait, and then find all there
        missing = [(one, path) for one, path in zip(wanted, paths, strict=True) if not path.exists()]
        found = pool.map(lambda both: _brought(both[0], both[1], pauses), missing)
        for _ in tqdm(found, total=len(missing), desc="fetching shards", unit="shard", disable=None, delay=2):
            pass
    return paths


def expanded(name: str) -> list[str]:
    """`a{08..10}.tar` as a08.tar, a09.tar, a10.tar; several ranges give all combinations."""
    parts, rest = [], name
    while (open_at := rest.find("{")) >= 0 and (close_at := rest.find("}", open_at)) >= 0:
        first, dots, last = rest[open_at + 1 : close_at].partition("..")
        if not (dots and first.isdecimal() and last.isdecimal()):
            raise UserError(f"data.shards has {name!r}; a range is written {{000..099}}")
        numbers = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
        parts += [[rest[:open_at]], numbers]
        rest = rest[close_at + 1 :]
    return ["".join(words) for words in product(*parts, [rest])]


def _brought(name: str, path: Path, pauses: Sequence[float]) -> None:
    """Fetch one shard; what is there of it after a failure is continued from, and by the next start, too."""
    part = path.with_suffix(".part")
    for pause in (*pauses, None):
        try:
            if name.startswith(COMMAND):
                _run(name.removeprefix(COMMAND), part)
            else:
                _download(name, part)
            part.replace(path)
            return
        except (OSError, subprocess.CalledProcessError) as error:
            if pause is None or (isinstance(error, urllib.error.HTTPError) and error.code in (401, 403, 404, 410)):
                raise UserError(f"the shard {name} cannot be had: {error}") from None
            time.sleep(pause)


def _download(address: str, part: Path) -> None:
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(address, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        answer = urllib.request.urlopen(request, timeout=SECONDS)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # nothing is behind what is there: it is whole
            raise
        return
    with answer, part.open("ab" if answer.status == 206 else "wb") as file:
        shutil.copyfileobj(answer, file, 1 << 20)
        file.flush()
        os.fsync(file.fileno())
        expected = answer.headers.get("Content-Length")
        if expected is not None and file.tell() != int(expected) + (have if answer.status == 206 else 0):
            raise OSError(f"{file.tell()} bytes came, and the connection ended")


def _run(command: str, part: Path) -> None:
    with part.open("wb") as file:
        subprocess.run(command, shell=True, stdout=file, check=True)
