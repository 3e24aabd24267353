"""Why a run has failed for good: one file in its folder, by the rank that knew first."""

import os
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Never

from launcher.place import Place, hostname

CONNECTION = (
    "Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket closed", "Timed out waiting",
    "remote process exited", "failed to recv", "Failed to recv", "Application timeout caused pair closure",
)  # fmt: skip
"""By these words gloo, NCCL and their stores say that another rank no longer answers."""
SUSPECTED = ", which lost the others"
PATIENCE = 600.0
"""Seconds that a rank waits for SLURM to notice why the others have gone: a dead node takes it five minutes."""


def file_of(run: Path) -> Path:
    """Where the reason is written."""
    return run / "logs" / "failure.txt"


def forget(run: Path) -> None:
    """What ended an earlier life is no word on this one."""
    file_of(run).unlink(missing_ok=True)


def write(run: Path, place: Place, reason: str, suspected: bool = False) -> None:
    """Leave the reason, unless another rank has left its own before; one that is only suspected gives way."""
    path = file_of(run)
    path.parent.mkdir(parents=True, exist_ok=True)
    when = datetime.now(UTC).isoformat(timespec="seconds")
    head = f"{when} rank {place.rank} of {place.ranks} on {hostname()}, job {place.life}"
    own = path.with_name(f"failure-{place.rank}.partial")
    with own.open("w") as file:
        file.write(f"{head}{SUSPECTED if suspected else ''}\n{reason}\n")
        file.flush()
        os.fsync(file.fileno())
    if not suspected and path.exists() and path.read_text().partition("\n")[0].endswith(SUSPECTED):
        own.replace(path)
        return
    try:
        path.hardlink_to(own)
    except FileExistsError:
        pass
    finally:
        own.unlink()


def read(run: Path) -> str:
    """The reason, without where and when; nothing if there is none."""
    path = file_of(run)
    return path.read_text().partition("\n")[2].strip() if path.exists() else ""


def of_others(error: Exception) -> bool:
    """Whether a rank failed only because another one no longer answers."""
    from torch.distributed import DistError

    return isinstance(error, DistError | ConnectionError) or any(words in str(error) for words in CONNECTION)


def outlast(run: Path, place: Place, reason: str) -> Never:
    """Wait for the verdict on the others, which is not this rank's to give.

    If one of them failed by itself it says why, and srun ends this step. If a node has died SLURM starts the job again
    as soon as it notices; had this rank ended before, the job would be over. If they were killed without a word, this
    is the word: it is left before the wait, which may end at any moment.
    """
    said = (
        "Another rank was killed without a word: by the system for want of memory, with its node, or by hand. What "
        f"SLURM says in the job's log names the task and the signal. What this rank saw of it:\n{reason}"
    )
    write(run, place, said, suspected=True)
    sys.stderr.write(f"rank {place.rank} has lost the others, and waits for SLURM to say why: {reason}\n")
    sys.stderr.flush()
    time.sleep(PATIENCE)
    sys.exit(1)
